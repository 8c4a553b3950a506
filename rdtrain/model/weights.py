"""The weights of an exported folder: one safetensors file, or several and an index, as Hugging Face transformers names them.

A tied weight is one tensor here, as it is in the model.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_weights(tensors: dict[str, Tensor], folder: Path, shard_bytes: float) -> None:
    """Write a state dict; files are no larger than shard_bytes but where a single tensor is."""
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
        save_file(shard, folder / name, {"format": "pt"})
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


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors by name. Errors as `weight_files` and safetensors have them."""
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
