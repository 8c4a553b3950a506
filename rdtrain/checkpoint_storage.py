"""Checkpoint folders on disk: a kill at any moment leaves whole ones only, and what a disk has damaged since is found before it is used.

    checkpoints/
      step-00000200/           a whole checkpoint: its files, and manifest.json with the size and CRC-32 of each
      latest                   the newest one's name, for scripts; moves last
      .step-00000300.START.saving/  one that is being written; swept at the next start

This file knows no engine: a checkpoint is files of bytes or of tensors by name (safetensors). Several ranks write into one folder, on a
file system that they all share, and agree without a collective call, so that a background thread can write: a rank's last file is
manifest-RANK.json, renamed into place when its others are on the disk, and rank 0 looks for those of all ranks. It alone joins them,
renames the folder and moves `latest`. Every file is synced before its rename, and every folder after it.

The checksum is zlib's CRC-32, of the standard library, taken of the bytes on their way to the file, so that nothing is read twice: 5 GB/s
on a core of the machine that writes 0.3 GB/s to its disk, without the interpreter's lock. It finds all damage within 32 bits in a row, and
of any other all but one in four thousand million; it is no seal against intent.
"""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 24
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.uint8: "U8", torch.bool: "BOOL",
}
"""What safetensors calls them."""

Content = bytes | Path | dict[str, Tensor]
"""What a file is to hold: bytes, the bytes of another file, or tensors on the CPU by name."""

Entry = dict[str, int | str]
"""What a manifest says of a file: `size` in bytes and `crc32`, eight hexadecimal digits."""


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def temporary_folder(run_folder: Path, step: int, start: int) -> Path:
    """Where it is written. start: a number that no other start of the run has."""
    return run_folder / "checkpoints" / f".step-{step:08d}.{start}.saving"


def checkpoint_steps(run_folder: Path) -> list[int]:
    """The steps of a run's checkpoints, in order, the damaged ones among them."""
    names = (path.name for path in run_folder.glob("checkpoints/step-*") if path.is_dir())
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d{8,}", name))


def write_files(folder: Path, rank: int, contents: dict[str, Content]) -> dict[str, Entry]:
    """Write a rank's files by name into `folder`, which is made, and last its manifest, which is returned. OSError where it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {name: _write(folder / name, _buffers(content)) for name, content in contents.items()}
    _replace(folder / f"manifest-{rank}.json", json.dumps(manifest))
    return manifest


def written_files(folder: Path, ranks: int) -> dict[str, Entry] | None:
    """The manifests of all ranks, joined; None while one is missing. OSError for one that cannot be read."""
    joined = {}
    for rank in range(ranks):
        try:
            joined |= json.loads((folder / f"manifest-{rank}.json").read_text())
        except FileNotFoundError:
            return None
    return joined


def publish(folder: Path, target: Path, files: dict[str, Entry]) -> None:
    """Make a checkpoint of a folder that all ranks have written, in place of a damaged `target`. OSError where it cannot."""
    _write(folder / MANIFEST, [json.dumps({"files": files}, indent=1).encode()])
    for part in folder.glob("manifest-*.json"):
        part.unlink()
    _sync_folder(folder)
    remove(target)
    os.replace(folder, target)
    _sync_folder(target.parent.parent)
    _sync_folder(target.parent)
    _replace(target.parent / "latest", target.name + "\n")


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, so that it is never seen in part. OSError where the folder cannot be renamed."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f".{checkpoint.name}.dropped")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(checkpoint, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def sweep(run_folder: Path) -> None:
    """Delete what killed processes left half-written or half-deleted; nobody else may be writing there."""
    for end in ("saving", "dropped"):
        for folder in run_folder.glob(f"checkpoints/.step-*.{end}"):
            shutil.rmtree(folder, ignore_errors=True)


def find_damage(checkpoint: Path, names: Iterable[str] | None = None, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None where they are whole.

    names: the files in question; all of them by default. rank, ranks: of several ranks that all ask, each reads its share of the files.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        sizes = {name: int(files[name]["size"]) for name in (files if names is None else names)}
        checksums = {name: files[name]["crc32"] for name in sizes}
        if not sizes:
            raise ValueError
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    largest_first = sorted(sizes, key=lambda name: (-sizes[name], name))
    try:
        for name in largest_first:
            size = (checkpoint / name).stat().st_size
            if size != sizes[name]:
                return f"{name} has {size} bytes and was written with {sizes[name]}"
        for name in largest_first[rank::ranks]:
            if _checksum(checkpoint / name) != checksums[name]:
                return f"{name} does not have the checksum that it was written with"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


@contextmanager
def open_tensors(checkpoint: Path, pattern: str) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """Functions that read a tensor, by its name in any of the safetensors files of a pattern, while the block lasts."""
    with ExitStack() as opened:
        tensors = {}
        for path in sorted(checkpoint.glob(pattern)):
            file = opened.enter_context(safe_open(path, "pt"))
            tensors |= {name: lambda file=file, name=name: file.get_tensor(name) for name in file.keys()}
        yield tensors


def _buffers(content: Content) -> Iterator[bytes | memoryview]:
    """The bytes of a file in pieces, none of them a copy of a tensor."""
    if isinstance(content, Path):
        content = content.read_bytes()
    if isinstance(content, bytes):
        yield content
        return
    names = sorted(content, key=lambda name: (-content[name].element_size(), name))  # so that each is aligned
    header, offset = {}, 0
    for name in names:
        tensor = content[name]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield memoryview(content[name].contiguous().reshape(-1).view(torch.uint8).numpy())


def _write(path: Path, buffers: Iterable[bytes | memoryview]) -> Entry:
    size = checksum = 0
    with path.open("wb") as file:
        for buffer in buffers:
            for start in range(0, len(buffer), CHUNK_BYTES):
                chunk = buffer[start : start + CHUNK_BYTES]
                checksum = zlib.crc32(chunk, checksum)
                size += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "crc32": f"{checksum:08x}"}


def _checksum(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"


def _replace(path: Path, text: str) -> None:
    """Write a small file that is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    _write(temporary, [text.encode()])
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put names and renames on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that syncs no folders
            raise
    finally:
        os.close(descriptor)
