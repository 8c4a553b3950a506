"""What GPUs have on paper: speed, which MFU and HFU are shares of, memory, and how fast they send to each other.

Speeds are NVIDIA's own for bf16 matrix products with fp32 sums, without sparsity: the data sheets print twice as much, with it. What a
large product reaches is less (790 TFLOP/s of an H200's 989, by our measurement). Memory is what PyTorch calls the device's total capacity
(in its out-of-memory messages), a little less than the data sheets say.
"""

import re
from typing import NamedTuple

NETWORK = 50.0
"""GB/s that a GPU sends to other nodes: an InfiniBand adapter of 400 Gbit/s for each GPU, as in DGX H100 and later."""


class Gpu(NamedTuple):
    """A kind of GPU.

    name: as it is asked for; pattern: of torch's name of the device, the first that fits holds.
    tflops: dense bf16 TFLOP/s; memory: GiB; link: GB/s that it sends to the others of its node, by NVLink or PCIe, one way; per_node: how
    many a usual node has, 72 of them being a rack; source: of speed and link.
    """

    name: str
    pattern: str
    tflops: float
    memory: float
    link: float
    per_node: int
    source: str


GPUS = (
    Gpu("gb200", r"\bGB200\b", 2500.0, 184.3, 900, 72, "GB200 NVL72: 360 PFLOPS of 72 GPUs with sparsity, NVLink 5"),
    Gpu("b200", r"\bB200\b", 2250.0, 178.3, 900, 8, "HGX B200: 36 PFLOPS of 8 GPUs with sparsity, NVLink 5"),
    Gpu("h200", r"\bG?H200\b(?!.*NVL)", 989.4, 139.8, 450, 8, "H200 SXM and GH200 data sheets: 1,979 with sparsity, NVLink 4"),
    Gpu("h200-nvl", r"\bH200 NVL\b", 835.5, 139.8, 64, 8, "H200 NVL data sheet: 1,671 with sparsity; PCIe 5, without bridges"),
    Gpu("h100-nvl", r"\bH100 NVL\b", 835.5, 93.0, 64, 8, "H100 NVL data sheet: 1,671 with sparsity; PCIe 5, without bridges"),
    Gpu("h100-pcie", r"\bH100 PCIe\b", 756.0, 79.1, 64, 8, "H100 PCIe data sheet: 1,513 with sparsity"),
    Gpu("h100", r"\bH100\b", 989.4, 79.1, 450, 8, "H100 SXM data sheet: 1,979 with sparsity, NVLink 4"),
    Gpu("a100-40gb", r"\bA100\b.*40GB", 312.0, 39.4, 300, 8, "A100 data sheet, NVLink 3"),
    Gpu("a100", r"\bA100\b", 312.0, 79.1, 300, 8, "A100 data sheet, NVLink 3"),
    Gpu("a40", r"\bA40\b", 149.7, 44.3, 32, 8, "A40 data sheet"),
    Gpu("a30", r"\bA30\b", 165.0, 23.5, 32, 8, "A30 data sheet"),
    Gpu("a10", r"\bA10\b", 125.0, 21.9, 32, 8, "A10 data sheet"),
    Gpu("l40s", r"\bL40S\b", 362.0, 44.3, 32, 8, "L40S data sheet"),
    Gpu("l40", r"\bL40\b", 181.0, 44.3, 32, 8, "L40 data sheet"),
    Gpu("l4", r"\bL4\b", 121.0, 21.9, 32, 8, "L4 data sheet: 242 with sparsity"),
    Gpu("rtx-4090", r"\bRTX 4090\b", 165.2, 23.5, 32, 4, "Ada architecture white paper, appendix A"),
    Gpu("rtx-3090", r"\bRTX 3090\b(?! Ti)", 71.0, 23.6, 32, 4, "GA102 architecture white paper, appendix A"),
)


def peak_flops(name: str) -> float | None:
    """Dense bf16 operations a second that a device of this name (torch.cuda.get_device_name) has on paper; None where that is not known,
    as for a part of a device (MIG)."""
    if "MIG" in name:
        return None
    return next((1e12 * gpu.tflops for gpu in GPUS if re.search(gpu.pattern, name)), None)


def model_flops_utilization(flops: float, facts: dict) -> float | None:
    """MFU: the model's operations a second, of all ranks, as a share of what the run's GPUs have on paper; None where that is not known,
    and on a CPU or in fp32. facts: `machine`, `device`, `precision` and `ranks`, of a run's record (run.json)."""
    peak = peak_flops(facts["machine"]) if facts["device"] == "cuda" and facts["precision"] == "bfloat16" else None
    return flops / (peak * facts["ranks"]) if peak else None
