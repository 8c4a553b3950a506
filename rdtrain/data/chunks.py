"""Reading the arrays of shards without zarr's own machinery, which takes a millisecond for each read, several times as long as the work.

What is read is the same: the codecs are those that `rdtrain.data.array_files` writes, the index at the end of a shard file (docs/data.md),
and the checksums of index and chunks are compared. zarr opens the array and says what it is.
"""

from collections.abc import Callable

import google_crc32c
import numcodecs.blosc
import numpy as np
import zarr

from ..errors import UserError

CHECKSUM_BYTES = 4
INDEXES = 1024  # of shard files that are kept in memory


class ChunkedArray:
    """A 1-D array of shards, to be read as array[start:stop]. Attributes: path (in its group), shards (numbers in a file, a tuple)."""

    def __init__(self, array: zarr.Array, read: Callable[[str, int, int], bytes], folder: str, sizes: dict[str, int]):
        """read(name, start, stop) gives bytes of a shard file, whose name begins with `folder`; sizes: of each by its name, in bytes.

        UserError where the array is not of the form that `rdtrain shard` writes.
        """
        self.path, self.shards = array.path, array.shards
        codecs = [codec.to_dict() for codec in array.metadata.codecs]
        inner = codecs[0].get("configuration", {})
        names = [[codec["name"] for codec in inner.get(kind, ())] for kind in ("codecs", "index_codecs")]
        if len(codecs) != 1 or names != [["bytes", "blosc", "crc32c"], ["bytes", "crc32c"]] or inner["index_location"] != "end":
            raise UserError(f"the array {array.store_path} is not compressed as rdtrain shard does it; write the shards again")
        self._dtype, self._chunk, self._length = array.dtype.newbyteorder("<"), array.chunks[0], array.shape[0]
        self._read, self._folder, self._sizes = read, folder, sizes
        self._indexes: dict[int, np.ndarray] = {}

    def __getitem__(self, numbers: slice) -> np.ndarray:
        """Numbers start .. stop - 1, which must lie in the array. ValueError for damage, and the exceptions of `read`."""
        numbers = range(self._length)[numbers]
        found = np.empty(len(numbers), self._dtype)
        for chunk in range(numbers.start // self._chunk, -(-numbers.stop // self._chunk) if numbers else 0):
            first = chunk * self._chunk
            start, stop = max(numbers.start, first), min(numbers.stop, first + self._chunk)
            found[start - numbers.start:stop - numbers.start] = self._decode(chunk)[start - first:stop - first]
        return found

    def _decode(self, chunk: int) -> np.ndarray:
        """A chunk, [chunk]; in the last of an array what is beyond its end is fill."""
        shard, place = divmod(chunk, self.shards[0] // self._chunk)
        if shard not in self._indexes:
            if len(self._indexes) == INDEXES:
                self._indexes.clear()
            self._indexes[shard] = self._read_index(shard)
        start, size = self._indexes[shard][place].tolist()
        content = _checked(self._read(self._name(shard), start, start + size), size)
        numbers = np.frombuffer(numcodecs.blosc.decompress(content), self._dtype)
        if len(numbers) != self._chunk:
            raise ValueError(f"chunk {chunk} holds {len(numbers)} numbers")
        return numbers

    def _read_index(self, shard: int) -> np.ndarray:
        """Where the chunks of a shard file begin in it, and their sizes: uint64 [chunks, 2]."""
        size, length = self._sizes[self._name(shard)], 16 * (self.shards[0] // self._chunk) + CHECKSUM_BYTES
        content = _checked(self._read(self._name(shard), size - length, size), length)
        return np.frombuffer(content, "<u8").reshape(-1, 2)

    def _name(self, shard: int) -> str:
        return f"{self._folder}{self.path}/c/{shard}"


def _checked(content: bytes, size: int) -> bytes:
    """Without the checksum at its end. ValueError when it is another one."""
    content, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if len(content) != size - CHECKSUM_BYTES or google_crc32c.value(content) != int.from_bytes(checksum, "little"):
        raise ValueError("the checksum is wrong")
    return content
