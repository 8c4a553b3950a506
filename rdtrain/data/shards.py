"""Token shards: documents as numbers in a compressed, checksummed zarr 3 store that any zarr library can read.

    manifest.json      counts, tokenizer, checksums: docs/data.md has all of it
    tokenizer.model    the tokenizer that wrote the shards, or tokenizer.json
    arrays.zarr/       a zarr group with two 1-D arrays
        tokens         uint16, or uint32 for more than 65,536 pieces: `<s> ids </s>` of each document, one after the other
        documents      int64: where each document starts in `tokens`, and at the end the number of tokens

Notable: single reads cost about 2 ms whatever their length, so read long contiguous blocks (`rdtrain.data.loader` does). Every chunk
carries a CRC-32C, so damage is noticed while reading; a missing or cut shard file is noticed on opening (zarr itself would read zeros),
and `ShardReader.find_damage` checks every byte, the manifest's own too. They may lie in a folder, in a zip file or behind a URL
(`rdtrain.data.storage`). `rdtrain.data.sharding` writes them, `rdtrain.data.copying` brings them elsewhere.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr

from ..errors import UserError, first_line
from ..model.tokenizer import TOKENIZER_FILES
from .chunks import ChunkedArray
from .output import content_facts
from .progress import show_progress
from .storage import MISSING, TRAINING_TRIES, ZarrFiles, open_files

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # version 1 has neither named sources nor a checksum of the manifest
CHUNK_TOKENS = 131072  # the smallest part that can be read: small enough for one read, large enough to compress well
SHARD_TOKENS = 4194304
UNSEALED = "0" * 64
MANIFEST = "manifest.json"
ARRAYS = "arrays.zarr"
SIDES = ("train/", "validation/")
FILES_AT_ONCE = 8  # that are read and checked, as a store behind a URL keeps one waiting


def seal_manifest(file: Path, facts: dict) -> None:
    """Writes the manifest `facts` with a checksum of its own in it: the SHA-256 of the file with zeros in the place of the checksum."""
    content = json.dumps(facts | {"manifest_sha256": UNSEALED}, indent=2) + "\n"
    file.write_text(content.replace(UNSEALED, hashlib.sha256(content.encode()).hexdigest()), encoding="utf-8")


def shard_folders(location: str | Path) -> list[str]:
    """The places of the shards that a folder, URL or zip file is or holds: itself, or its train and validation sides.

    Raises the UserErrors of `open_files`.
    """
    traces = {side: [f"{side}{name}" for name in (MANIFEST, *TOKENIZER_FILES, f"{ARRAYS}/zarr.json")] for side in SIDES}
    sizes = open_files(location).sizes([MANIFEST, *(name for names in traces.values() for name in names)])
    sides = [side for side, names in traces.items() if any(sizes[name] is not None for name in names)]
    return [f"{str(location).rstrip('/')}/{side.rstrip('/')}" for side in sides] if sides and sizes[MANIFEST] is None else [str(location)]


class ShardReader:
    """Reads shards.

    `len(reader)` is the number of tokens. Attributes: path (where the shards are, for people), manifest (docs/data.md) and
    manifest_content (its bytes), vocab_size, document_count, text_bytes and bytes_per_token (UTF-8 bytes of text for each token, marks
    counted as tokens). Safe to use in threads and in forked and spawned processes.
    """

    def __init__(self, path: str | Path, tokenizer_hash: str | None = None, open_arrays: bool = True):
        """Opens the folder, zip file or URL `path`. tokenizer_hash: `Tokenizer.hash` of the tokenizer that the shards must have been
        written with. open_arrays: False for `find_damage` and `read_file` only, which then work on whatever files are left.

        Raises UserError when there are no shards, their format or tokenizer is another one, a file is missing or has a wrong size, or
        a store behind a URL does not answer.
        """
        self._files = open_files(path)
        self.path = self._files.location
        self.manifest_content, self.manifest = self._read_manifest()
        if tokenizer_hash is not None and tokenizer_hash != self.manifest["tokenizer_hash"]:
            raise UserError(f"{self.path} was written with tokenizer {self.manifest['tokenizer_hash'][:12]}, not with "
                            f"{tokenizer_hash[:12]}; use the tokenizer in that folder or write the shards again")
        if open_arrays:
            for name, size in self._files.sizes(self.manifest["files"]).items():
                self._refuse(self._wrong_size(name, size) or name.endswith("zarr.json") and self._fault(name))
        self.vocab_size: int = self.manifest["vocab_size"]
        self.document_count: int = self.manifest["documents"]
        self.text_bytes: int = self.manifest["text_bytes"]
        self.bytes_per_token = self.text_bytes / len(self)
        if open_arrays:
            sizes = {name: facts["bytes"] for name, facts in self.manifest["files"].items()}
            store, read = ZarrFiles(self._files, ARRAYS, sizes), functools.partial(self._files.read, tries=TRAINING_TRIES)
            self._tokens, self._documents = (
                ChunkedArray(zarr.open_array(store, path=name, mode="r", zarr_format=3), read, f"{ARRAYS}/", sizes)
                for name in ("tokens", "documents")
            )

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer's file among the shards' files."""
        return next(name for name in TOKENIZER_FILES if name in self.manifest["files"])

    @property
    def content_hash(self) -> str:
        """SHA-256 over the checksums of the arrays' files, which a copy has too, and what is written anew from the same text alike."""
        sums = sorted((name, facts["sha256"]) for name, facts in self.manifest["files"].items() if name.startswith(f"{ARRAYS}/"))
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()

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
        names = self.manifest["files"]
        with ThreadPoolExecutor(FILES_AT_ONCE, "verify") as pool:
            try:
                for fault in show_progress(pool.map(self._fault, names), "verify", total=len(names), unit=" files"):
                    if fault:
                        yield fault
            finally:
                pool.shutdown(cancel_futures=True)

    def read_file(self, name: str) -> bytes:
        """The content of one of the files that the manifest names. UserError when it is not what was written."""
        try:
            content = self._files.read(name)
        except OSError:
            content = b""
        if content_facts(content) != self.manifest["files"][name]:
            self._refuse(self._fault(name))
        return content

    def copy_tokenizer(self, folder: Path) -> None:
        """Copies the tokenizer, the files beside the arrays, into a folder of this machine. UserError when it is damaged."""
        for name in self.manifest["files"]:
            if "/" not in name:
                (folder / name).write_bytes(self.read_file(name))

    def _read_manifest(self) -> tuple[bytes, dict]:
        file = self._files.place(MANIFEST)
        try:
            content = self._files.read(MANIFEST)
        except MISSING:
            raise UserError(f"no shards in {self.path} (no manifest.json); correct the path or write shards there") from None
        except OSError as error:
            raise UserError(f"cannot read {file} ({error.strerror}); correct the path or mend the disk") from None
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
        return content, manifest

    def _refuse(self, fault: str | None) -> None:
        if fault:
            raise UserError(f"{fault}; copy it again or write the shards again")

    def _wrong_size(self, name: str, size: int | None) -> str | None:
        file, expected = self._files.place(name), self.manifest["files"][name]["bytes"]
        if size is None:
            return f"{file} is missing"
        return f"{file} has {size} bytes, not {expected}" if size != expected else None

    def _fault(self, name: str) -> str | None:
        """What is wrong with a file's size or content."""
        try:
            content = self._files.read(name)
        except MISSING:
            return self._wrong_size(name, None)
        except OSError as error:
            return f"{self._files.place(name)} cannot be read ({error.strerror or first_line(error)})"
        if fault := self._wrong_size(name, len(content)):
            return fault
        damaged = content_facts(content) != self.manifest["files"][name]
        return f"{self._files.place(name)} is damaged (its checksum is wrong)" if damaged else None

    def _decode(self, array: ChunkedArray, start: int, stop: int) -> np.ndarray:
        try:
            return array[start:stop]
        except UserError:  # a store behind a URL that gave no answer
            raise
        except Exception as error:  # the checksum's, the decompressor's and the store's exceptions have nothing in common
            length = array.shards[0]
            for shard in range(start // length, -(-stop // length)):
                self._refuse(self._fault(f"{ARRAYS}/{array.path}/c/{shard}"))
            raise UserError(f"numbers {start} to {stop} of {self._files.place(ARRAYS)}/{array.path} cannot be read ({error}), "
                            "though every file is as it was written; mend the disk or the zarr installation") from error
