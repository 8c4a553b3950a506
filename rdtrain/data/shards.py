"""Token shards: documents as numbers in a compressed, checksummed zarr 3 store that any zarr library can read.

    manifest.json      counts, tokenizer, checksums: docs/data.md has all of it
    tokenizer.model    the tokenizer that wrote the shards, or tokenizer.json
    arrays.zarr/       a zarr group with two 1-D arrays
        tokens         uint16, or uint32 for more than 65,536 pieces: `<s> ids </s>` of each document, one after the other
        documents      int64: where each document starts in `tokens`, and at the end the number of tokens

Notable: single reads cost about 2 ms whatever their length, so read long contiguous blocks (`rdtrain.data.loader` does). Every chunk
carries a CRC-32C, so damage is noticed while reading; a missing or cut shard file is noticed on opening (zarr itself would read zeros),
and `ShardReader.find_damage` checks every byte, the manifest's own too. `rdtrain.data.sharding` writes them.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zarr
from tqdm import tqdm

from ..errors import UserError
from ..model.tokenizer import TOKENIZER_FILES
from .output import file_facts

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # version 1 has neither named sources nor a checksum of the manifest
CHUNK_TOKENS = 131072  # the smallest part that can be read: small enough for one read, large enough to compress well
SHARD_TOKENS = 4194304
UNSEALED = "0" * 64


def seal_manifest(file: Path, facts: dict) -> None:
    """Writes the manifest `facts` with a checksum of its own in it: the SHA-256 of the file with zeros in the place of the checksum."""
    content = json.dumps(facts | {"manifest_sha256": UNSEALED}, indent=2) + "\n"
    file.write_text(content.replace(UNSEALED, hashlib.sha256(content.encode()).hexdigest()), encoding="utf-8")


def shard_folders(path: Path) -> list[Path]:
    """The folders of shards that `path` is or holds: itself, or its train and validation sides."""
    sides = [side for side in (path / "train", path / "validation") if side.is_dir()]
    return sides if sides and not (path / "manifest.json").exists() else [path]


class ShardReader:
    """Reads a folder of shards.

    `len(reader)` is the number of tokens. Attributes: path, manifest (docs/data.md), vocab_size, document_count, text_bytes
    and bytes_per_token (UTF-8 bytes of text for each token, marks counted as tokens). Safe to use in forked and spawned
    processes.
    """

    def __init__(self, path: str | Path, tokenizer_hash: str | None = None, open_arrays: bool = True):
        """Opens the folder `path`. tokenizer_hash: `Tokenizer.hash` of the tokenizer that the shards must have been written with.
        open_arrays: False for `find_damage` only, which then works on whatever files are left.

        Raises UserError when there are no shards, their format or tokenizer is another one, or a file is missing or has a wrong
        size.
        """
        self.path = Path(path)
        self.manifest = self._read_manifest()
        if tokenizer_hash is not None and tokenizer_hash != self.manifest["tokenizer_hash"]:
            raise UserError(f"{self.path} was written with tokenizer {self.manifest['tokenizer_hash'][:12]}, not with "
                            f"{tokenizer_hash[:12]}; use the tokenizer in that folder or write the shards again")
        for name in self.manifest["files"] if open_arrays else ():
            self._check_file(name, content=name.endswith("zarr.json"))
        self.vocab_size: int = self.manifest["vocab_size"]
        self.document_count: int = self.manifest["documents"]
        self.text_bytes: int = self.manifest["text_bytes"]
        self.bytes_per_token = self.text_bytes / len(self)
        if open_arrays:
            group = zarr.open_group(self.path / "arrays.zarr", mode="r")
            self._tokens, self._documents = group["tokens"], group["documents"]

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer's file among the shards' files."""
        return next(name for name in TOKENIZER_FILES if name in self.manifest["files"])

    def __len__(self) -> int:
        return self.manifest["tokens"]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1, 0 <= start <= stop <= len, as [stop - start] of the stored dtype.

        Raises ValueError for positions out of range and UserError, with the file's name, when a shard is damaged.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"tokens {start} to {stop} are outside the {len(self)} of {self.path}")
        return self._decode(self._tokens, start, stop)

    @property
    def documents(self) -> np.ndarray:
        """int64 [document_count + 1]: document i is tokens documents[i] .. documents[i + 1] - 1. UserError when damaged."""
        return self.document_starts(0, self.document_count + 1)

    def document_starts(self, first: int, last: int) -> np.ndarray:
        """documents[first:last], int64 [last - first], 0 <= first <= last <= document_count + 1. UserError when damaged."""
        return self._decode(self._documents, first, last)

    def verify(self) -> None:
        """Reads every file once. Raises UserError that names the first whose content is not what was written."""
        if damage := next(self.find_damage(), None):
            raise UserError(f"{damage}; copy it again or write the shards again")

    def find_damage(self) -> Iterator[str]:
        """Reads every file once, and says of each whose content is not what was written what is wrong with it."""
        for name in tqdm(self.manifest["files"], "verify", unit=" files", disable=None):
            if fault := self._fault(name, content=True):
                yield fault

    def _read_manifest(self) -> dict:
        file = self.path / "manifest.json"
        try:
            content = file.read_bytes()
        except OSError:
            raise UserError(f"no shards in {self.path} (no manifest.json); correct the path or write shards there") from None
        try:
            manifest = json.loads(content.decode())
        except (ValueError, RecursionError):
            manifest = None
        if not isinstance(manifest, dict) or "format_version" not in manifest:
            raise UserError(f"{file} is damaged or not a manifest of shards; copy it again or write the shards again")
        if manifest["format_version"] not in READABLE_VERSIONS:
            readable = " and ".join(map(str, READABLE_VERSIONS))
            raise UserError(f"{self.path} holds shards of format {manifest['format_version']}, and this version reads formats {readable}; "
                            "write the shards again")
        seal = manifest.get("manifest_sha256", "")
        unsealed = content.replace(str(seal).encode(), UNSEALED.encode()) if seal else b""
        if (seal or manifest["format_version"] > 1) and hashlib.sha256(unsealed).hexdigest() != seal:
            raise UserError(f"{file} is damaged (its checksum is wrong); copy it again or write the shards again")
        return manifest

    def _check_file(self, name: str, content: bool) -> None:
        if fault := self._fault(name, content):
            raise UserError(f"{fault}; copy it again or write the shards again")

    def _fault(self, name: str, content: bool) -> str | None:
        """What is wrong with a file's size, or its checksum when `content` is true."""
        file, facts = self.path / name, self.manifest["files"][name]
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            return f"{file} is missing"
        if size != facts["bytes"]:
            return f"{file} has {size} bytes, not {facts['bytes']}"
        return f"{file} is damaged (its checksum is wrong)" if content and file_facts(file)["sha256"] != facts["sha256"] else None

    def _decode(self, array: zarr.Array, start: int, stop: int) -> np.ndarray:
        try:
            return np.asarray(array[start:stop])
        except Exception as error:  # the checksum's, the decompressor's and the store's exceptions have nothing in common
            length = array.shards[0]
            for shard in range(start // length, -(-stop // length)):
                self._check_file(f"arrays.zarr/{array.path}/c/{shard}", content=True)
            raise UserError(f"numbers {start} to {stop} of {self.path / 'arrays.zarr' / array.path} cannot be read ({error}), "
                            "though every file is as it was written; mend the disk or the zarr installation") from error
