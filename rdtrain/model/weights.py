"""The weights of an exported folder: one safetensors file, or several and an index, as Hugging Face transformers names them.

A tied weight is one tensor here, as it is in the model. The header of each file has the checksum of its tensors, among what safetensors
calls metadata, which transformers leaves out of files that it writes: those are taken as they are.
"""

import json
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .exceptions import first_line

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_weights(tensors: dict[str, Tensor], folder: Path, shard_bytes: float) -> None:
    """Write a state dict; files are no larger than shard_bytes but where a single tensor is. OSError when the disk refuses."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor.contiguous()
        room -= tensor.nbytes
    names = [WHOLE] if len(shards) == 1 else [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        try:
            save_file(shard, folder / name, {"format": "pt", "crc32": checksum(shard)})
        except SafetensorError as error:  # which has the disk's own error as text
            raise OSError(str(error)) from None
        (folder / name).chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody else read it
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder. OSError when there are none, KeyError or ValueError for a damaged index."""
    if (folder / WHOLE).exists() or not (folder / INDEX).exists():
        return [folder / WHOLE]
    names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    return [folder / Path(name).name for name in names]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors by name. Errors as `weight_files` and `read_file` have them."""
    return {name: tensor for path in weight_files(folder) for name, tensor in read_file(path).items()}


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name. ValueError where they are not those that were written; else errors as safetensors has them."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        written = (file.metadata() or {}).get("crc32")
    if written not in (None, checksum(tensors)):
        raise ValueError(f"{path.name} has changed since it was written, by its checksum")
    return tensors


def refuse_changed(folder: Path) -> None:
    """ValueError where weights are not those that were written, by the checksums, which transformers knows nothing of."""
    try:
        for path in weight_files(folder):
            if path.exists():  # transformers says what is missing
                read_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(not_whole(folder, error)) from None


def not_whole(folder: Path | str, error: Exception) -> str:
    """What is said of weights that cannot be read."""
    return f"the weights in {folder} are not whole ({first_line(error)}): export the model again"


def checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of the bytes of contiguous tensors on the CPU, one after another by name: eight hexadecimal digits."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), found)
    return f"{found:08x}"
