"""The speed that a device has on paper, which MFU and HFU are shares of.

Figures are NVIDIA's own for bf16 matrix products with fp32 sums, without sparsity: the data sheets print twice as much, with it. What a
large product reaches is less (790 TFLOP/s of an H200's 989, by our measurement).
"""

import re

PEAK_TFLOPS = (
    (r"\bGB200\b", 2500.0, "GB200 NVL72: 360 PFLOPS of 72 GPUs with sparsity"),
    (r"\bB200\b", 2250.0, "HGX B200: 36 PFLOPS of 8 GPUs with sparsity"),
    (r"\bG?H200\b(?!.*NVL)", 989.4, "H200 SXM and GH200 data sheets: 1,979 with sparsity"),
    (r"\bH200 NVL\b", 835.5, "H200 NVL data sheet: 1,671 with sparsity"),
    (r"\bH100 NVL\b", 835.5, "H100 NVL data sheet: 1,671 with sparsity"),
    (r"\bH100 PCIe\b", 756.0, "H100 PCIe data sheet: 1,513 with sparsity"),
    (r"\bH100\b", 989.4, "H100 SXM data sheet: 1,979 with sparsity"),
    (r"\bA100\b", 312.0, "A100 data sheet"),
    (r"\bA40\b", 149.7, "A40 data sheet"),
    (r"\bA30\b", 165.0, "A30 data sheet"),
    (r"\bA10\b", 125.0, "A10 data sheet"),
    (r"\bL40S\b", 362.0, "L40S data sheet"),
    (r"\bL40\b", 181.0, "L40 data sheet"),
    (r"\bL4\b", 121.0, "L4 data sheet: 242 with sparsity"),
    (r"\bRTX 4090\b", 165.2, "Ada architecture white paper, appendix A"),
    (r"\bRTX 3090\b(?! Ti)", 71.0, "GA102 architecture white paper, appendix A"),
)
"""Pattern of torch's name of the device, dense bf16 TFLOP/s, source. The first that fits holds."""


def peak_flops(name: str) -> float | None:
    """Dense bf16 operations a second that a device of this name (torch.cuda.get_device_name) has on paper; None where that is not known,
    as for a part of a device (MIG)."""
    if "MIG" in name:
        return None
    return next((1e12 * tflops for pattern, tflops, _ in PEAK_TFLOPS if re.search(pattern, name)), None)
