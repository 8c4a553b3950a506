"""Token shards: documents as numbers in a compressed, checksummed zarr 3 store that any zarr library can read.

    manifest.json      counts, tokenizer, checksums: see `write_shards`
    tokenizer.model    the tokenizer that wrote the shards
    arrays.zarr/       a zarr group with two 1-D arrays
        tokens         uint16, or uint32 for more than 65,536 pieces: `<s> ids </s>` of each document, one after the other
        documents      int64: where each document starts in `tokens`, and at the end the number of tokens

Notable: single reads cost about 2 ms whatever their length, so read long contiguous blocks (`rdtrain.data.loader` does). Whole
shard files are written, one at a time, so memory is bounded. Every chunk carries a CRC-32C, so damage is noticed while reading; a
missing or cut shard file is noticed on opening (zarr itself would read zeros), and `ShardReader.verify` checks every byte.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import zarr
from tqdm import tqdm
from zarr.codecs import BloscCodec, Crc32cCodec

from ..errors import UserError
from ..model.tokenizer import Tokenizer
from .output import output_folder
from .sources import list_files, read_documents

FORMAT_VERSION = 1
CHUNK_TOKENS = 131072  # the smallest part that can be read: small enough for one read, large enough to compress well
SHARD_TOKENS = 4194304
BATCH_CHARACTERS = 1 << 22  # text that is encoded at a time


def write_shards(inputs: list[Path], tokenizer: Tokenizer, output: Path, shard_tokens: int = SHARD_TOKENS,
                 overwrite: bool = False, column: str = "text") -> dict:
    """Writes the documents of `inputs` as shards into the folder `output` and returns the manifest.

    inputs: files, folders or patterns as `rdtrain.data.sources.list_files` takes them; column: the text's name in JSON and
    Parquet.
    shard_tokens: tokens in a shard file, a multiple of 131,072 or (for tests) less.
    The manifest: format_version, dtype, tokens, documents, text_bytes (UTF-8, without the marks), tokenizer_hash, vocab_size,
    bos_id, eos_id, chunk_tokens, shard_tokens, sources (name and bytes of each input), files (size and SHA-256 of everything else
    here, by path).
    Raises UserError for bad `shard_tokens`, inputs that cannot be read, an existing output, and a disk that refuses.
    """
    chunk_tokens = min(CHUNK_TOKENS, shard_tokens)
    if shard_tokens < 1 or shard_tokens % chunk_tokens:
        raise UserError(f"shards of {shard_tokens} tokens cannot be written; give a multiple of {CHUNK_TOKENS}")
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    files = list_files(inputs)
    with output_folder(output, "manifest.json", overwrite) as folder:
        group = zarr.create_group(folder / "arrays.zarr")
        tokens = _ArrayWriter(group, "tokens", dtype, chunk_tokens, shard_tokens)
        documents = _ArrayWriter(group, "documents", "int64", chunk_tokens, shard_tokens)
        text_bytes = 0
        with tqdm(desc="shards", unit="B", unit_scale=True, disable=None) as progress:
            for texts in _batches(read_documents(files, column)):
                for ids in tokenizer.encode_batch(texts, threads=os.cpu_count() or 1):
                    documents.append([tokens.length])
                    tokens.append([tokenizer.bos_id, *ids, tokenizer.eos_id])
                batch_bytes = sum(len(text.encode()) for text in texts)
                text_bytes += batch_bytes
                progress.update(batch_bytes)
        document_count = documents.length
        documents.append([tokens.length])
        tokens.close()
        documents.close()
        shutil.copyfile(tokenizer.file, folder / "tokenizer.model")
        manifest = {
            "format_version": FORMAT_VERSION, "dtype": dtype, "tokens": tokens.length, "documents": document_count,
            "text_bytes": text_bytes, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "chunk_tokens": chunk_tokens, "shard_tokens": shard_tokens,
            "sources": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
            "files": {file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
                      for file in sorted(folder.rglob("*")) if file.is_file()},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


class ShardReader:
    """Reads a folder of shards.

    `len(reader)` is the number of tokens. Attributes: path, manifest (see `write_shards`), vocab_size, document_count, text_bytes
    and bytes_per_token (UTF-8 bytes of text for each token, marks counted as tokens). Safe to use in forked and spawned
    processes.
    """

    def __init__(self, path: str | Path, tokenizer_hash: str | None = None):
        """Opens the folder `path`. tokenizer_hash: `Tokenizer.hash` of the tokenizer that the shards must have been written with.

        Raises UserError when there are no shards, their format or tokenizer is another one, or a file is missing or has a wrong
        size.
        """
        self.path = Path(path)
        self.manifest = self._read_manifest()
        if tokenizer_hash is not None and tokenizer_hash != self.manifest["tokenizer_hash"]:
            raise UserError(f"{self.path} was written with tokenizer {self.manifest['tokenizer_hash'][:12]}, not with "
                            f"{tokenizer_hash[:12]}; use the tokenizer.model in that folder or write the shards again")
        for name in self.manifest["files"]:
            self._check_file(name, content=name.endswith("zarr.json"))
        self.vocab_size: int = self.manifest["vocab_size"]
        self.document_count: int = self.manifest["documents"]
        self.text_bytes: int = self.manifest["text_bytes"]
        self.bytes_per_token = self.text_bytes / len(self)
        group = zarr.open_group(self.path / "arrays.zarr", mode="r")
        self._tokens, self._documents = group["tokens"], group["documents"]

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
        return self._decode(self._documents, 0, self.document_count + 1)

    def verify(self) -> None:
        """Reads every file once. Raises UserError that names the first whose content is not what was written."""
        for name in tqdm(self.manifest["files"], "verify", unit=" files", disable=None):
            self._check_file(name, content=True)

    def _read_manifest(self) -> dict:
        file = self.path / "manifest.json"
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            raise UserError(f"no shards in {self.path} (no manifest.json); correct the path or write shards there") from None
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict) or "format_version" not in manifest:
            raise UserError(f"{file} is damaged or not a manifest of shards; copy it again or write the shards again")
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(f"{self.path} holds shards of format {manifest['format_version']}, and this version reads format "
                            f"{FORMAT_VERSION}; write the shards again")
        return manifest

    def _check_file(self, name: str, content: bool) -> None:
        """Compares a file's size, and its checksum when `content` is true, with the manifest."""
        file, facts = self.path / name, self.manifest["files"][name]
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            fault = "is missing"
        elif size != facts["bytes"]:
            fault = f"has {size} bytes, not {facts['bytes']}"
        elif content and _sha256(file) != facts["sha256"]:
            fault = "is damaged (its checksum is wrong)"
        else:
            return
        raise UserError(f"{file} {fault}; copy it again or write the shards again")

    def _decode(self, array: zarr.Array, start: int, stop: int) -> np.ndarray:
        try:
            return np.asarray(array[start:stop])
        except Exception as error:  # the checksum's, the decompressor's and the store's exceptions have nothing in common
            length = array.shards[0]
            for shard in range(start // length, -(-stop // length)):
                self._check_file(f"arrays.zarr/{array.path}/c/{shard}", content=True)
            raise UserError(f"numbers {start} to {stop} of {self.path / 'arrays.zarr' / array.path} cannot be read ({error}), "
                            "though every file is as it was written; mend the disk or the zarr installation") from error


class _ArrayWriter:
    """Appends numbers to a new 1-D array of `group`, in pieces of whole shards."""

    def __init__(self, group: zarr.Group, name: str, dtype: str, chunk: int, shard: int):
        # shuffling bits makes token numbers larger, as they have no order; a chunk of zeros is written like any other
        compressors = (BloscCodec(cname="zstd", clevel=3, shuffle="noshuffle"), Crc32cCodec())
        self._array = group.create_array(name, shape=(0,), dtype=dtype, chunks=(chunk,), shards=(shard,), fill_value=0,
                                         compressors=compressors, config={"write_empty_chunks": True})
        self._buffer = np.empty(shard, dtype)
        self._filled = 0
        self.length = 0

    def append(self, numbers: list[int]) -> None:
        values = np.asarray(numbers, self._buffer.dtype)
        self.length += len(values)
        while len(values):
            part = values[:len(self._buffer) - self._filled]
            self._buffer[self._filled:self._filled + len(part)] = part
            self._filled += len(part)
            values = values[len(part):]
            if self._filled == len(self._buffer):
                self.close()

    def close(self) -> None:
        """Writes what is left in the buffer."""
        self._array.append(self._buffer[:self._filled])
        self._filled = 0


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
