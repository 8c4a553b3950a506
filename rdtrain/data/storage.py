"""Where shards lie: the files of a folder, behind a URL of any kind that fsspec knows, or in a zip file in either.

    data/train                         a folder
    s3://bucket/train                  an object store, with the package s3fs; gs:// with gcsfs, memory://, file://, https:// ...
    shards.zip, s3://bucket/shards.zip a zip file whose files are stored as they are, not compressed once more
    shards.zip/train                   a folder in a zip file

Notable:
- A read is a range of bytes and leaves nothing open, and a file of a zip file is a range of that. So all threads may read, and a process
  that was forked or spawned only has to connect anew, which it does by itself.
- Over a network a read or a write that fails is tried again, after 1, 2, 4, ... seconds: object stores refuse single requests as a matter
  of course. What is missing or forbidden is not tried again.
- zarr takes a file that it cannot find for zeros; `ZarrFiles` does not.
"""

import asyncio
import functools
import itertools
import os
import re
import struct
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from ..errors import UserError, first_line

OPENING_TRIES = 3
TRAINING_TRIES = 7  # in 63 seconds and what the requests take
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
ZIP_FILE = re.compile(r"(.+?\.zip)(?:/(.*))?")
LOCAL_HEADER = struct.Struct("<26xHH")  # of a file in a zip file: at its end the lengths of the name and of the extra field behind it
ENCRYPTED = 1

Result = TypeVar("Result")


def open_files(location: str | Path) -> "Files | ZipFiles":
    """The files at a folder, a URL or a zip file, as above. UserError for a URL of an unknown kind, or whose package is not installed, and
    for a zip file that is damaged or holds compressed files."""
    location = str(location)
    parts = ZIP_FILE.fullmatch(location)
    if parts and ("://" in location or Path(parts[1]).is_file()):
        return ZipFiles(parts[1], (parts[2] or "").strip("/"))
    return Files(location)


class Files:
    """The files under a folder or URL. Attribute: location, as it was given."""

    def __init__(self, location: str):
        """UserError for a URL of an unknown kind, or whose package is not installed."""
        self.location = location if location.endswith("://") else location.rstrip("/") or "/"
        self._connected()

    def place(self, name: str) -> str:
        """A file's name for people."""
        return f"{self.location}{'' if self.location.endswith('/') else '/'}{name}"

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """The sizes of files in bytes; None for those that are not there. UserError when the store cannot be asked."""
        system, path = self._connected()

        def listing() -> dict:
            system.invalidate_cache()
            try:
                return system.find(path, detail=True)  # one request for a thousand files, where asking for each would take hours
            except (*MISSING, PermissionError):  # who may read need not be allowed to list
                return {}

        found = {} if "http" in system.protocol else self._try(listing, self.location, OPENING_TRIES)
        prefix = path.rstrip("/") + "/"
        sizes = {name: found.get(prefix + name, {}).get("size") for name in names}
        return {name: self._size(name) if size is None else size for name, size in sizes.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None, tries: int = OPENING_TRIES) -> bytes:
        """Bytes start .. stop - 1 of a file, to its end when stop is None.

        Raises FileNotFoundError, OSError of a local disk, and UserError when a store behind a URL refuses, `tries` times if need be.
        """
        system, path = self._connected()
        file = f"{path.rstrip('/')}/{name}"
        limits = {"start": start, "end": stop} if start or stop is not None else {}  # an empty file has no range that begins at 0

        def content() -> bytes:
            found = system.cat_file(file, **limits)
            if stop is not None and len(found) != stop - start:
                raise OSError(f"{len(found)} bytes came instead of {stop - start}")  # the connection ended, or the server knows no ranges
            return found

        return self._try(content, self.place(name), tries)

    def open(self, name: str) -> BinaryIO:
        """A file to read from its middle, without further tries. Raises as `read`."""
        system, path = self._connected()
        return self._try(lambda: system.open(f"{path.rstrip('/')}/{name}", "rb"), self.place(name), OPENING_TRIES)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file anew. UserError when that cannot be done."""
        system, path = self._connected()
        try:
            self._try(lambda: system.pipe_file(f"{path.rstrip('/')}/{name}", content), self.place(name), OPENING_TRIES)
        except OSError as error:
            raise UserError(f"cannot write {self.place(name)} ({error.strerror or first_line(error)}); make room there, or create the "
                            "bucket, and start the same command again to continue") from error

    def remove(self, name: str) -> None:
        """Deletes a file, if it is there. UserError when that cannot be done."""
        system, path = self._connected()
        try:
            self._try(lambda: system.rm_file(f"{path.rstrip('/')}/{name}"), self.place(name), OPENING_TRIES)
        except MISSING:
            pass
        except OSError as error:
            raise UserError(f"cannot delete {self.place(name)} ({error.strerror or first_line(error)}); delete it by hand") from error

    def _size(self, name: str) -> int | None:
        """Of a file that a listing does not tell of."""
        system, path = self._connected()
        try:
            return self._try(lambda: system.info(f"{path.rstrip('/')}/{name}"), self.place(name), OPENING_TRIES)["size"]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read {self.place(name)} ({error.strerror}); correct the path or mend the disk") from None

    def _connected(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return _connect(self.location, os.getpid())

    def _try(self, action: Callable[[], Result], place: str, tries: int) -> Result:
        """action(), again after a pause when it fails for a reason that may pass. FileNotFoundError, OSError of a local disk; UserError."""
        local = isinstance(self._connected()[0], LocalFileSystem)
        for number in itertools.count(1):
            try:
                return action()
            except MISSING as error:
                raise FileNotFoundError(2, "no such file or folder", place) from error
            except Exception as error:  # every store has exceptions of its own
                if local:
                    raise
                reason = first_line(error)
                if isinstance(error, PermissionError):
                    raise UserError(f"{place} is forbidden ({reason}); give this process credentials for it") from error
                if number == tries:
                    raise UserError(f"{place} cannot be reached ({reason}), after {tries} tries; see to the network, the address and the "
                                    "credentials, and start the same command again") from error
                pause = 2 ** (number - 1)
                print(f"rdtrain: warning: {place} cannot be reached ({reason}); trying again in {pause} s", file=sys.stderr, flush=True)
                time.sleep(pause)


class ZipFiles:
    """The files in a zip file, or in a folder in it, to be read as `Files` are. Attribute: location."""

    def __init__(self, archive: str, folder: str = ""):
        """archive: path or URL of the zip file. UserError when it cannot be read, is damaged, or holds compressed files."""
        self.location = f"{archive}/{folder}" if folder else archive
        parent, slash, self._archive = archive.rpartition("/")
        self._files = Files(parent + slash or ".")
        self._members = self._directory(folder + "/" if folder else "")
        self._begins: dict[str, int] = {}

    def place(self, name: str) -> str:
        """A file's name for people."""
        return f"{self.location}/{name}"

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """The sizes of files in bytes; None for those that are not there."""
        return {name: self._members[name][1] if name in self._members else None for name in names}

    def read(self, name: str, start: int = 0, stop: int | None = None, tries: int = OPENING_TRIES) -> bytes:
        """As `Files.read`; OSError where the zip file is damaged."""
        if name not in self._members:
            raise FileNotFoundError(2, "no such file or folder", self.place(name))
        header, size = self._members[name]
        if name not in self._begins:
            content = self._files.read(self._archive, header, header + LOCAL_HEADER.size, tries)
            if len(content) < LOCAL_HEADER.size or not content.startswith(zipfile.stringFileHeader):
                raise OSError(5, "its header in the zip file is damaged", self.place(name))
            self._begins[name] = header + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(content))
        begin = self._begins[name]
        stop = size if stop is None else min(stop, size)
        return self._files.read(self._archive, begin + start, begin + stop, tries) if start < stop else b""

    def _directory(self, prefix: str) -> dict[str, tuple[int, int]]:
        """Of each file whose name begins with the prefix, without it: where its header begins in the zip file, and its size."""
        place = self._files.place(self._archive)
        try:
            with self._files.open(self._archive) as stream, zipfile.ZipFile(stream) as archive:
                members = [member for member in archive.infolist() if member.filename.startswith(prefix)]
        except MISSING:
            raise UserError(f"there is no zip file {place}; correct the path") from None
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise UserError(f"{place} is damaged or no zip file ({first_line(error)}); copy it again") from error
        if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & ENCRYPTED for member in members):
            raise UserError(f"{place} holds compressed or encrypted files, which cannot be read from their middle; make it with "
                            "`rdtrain shard copy`, or with zip -0")
        return {member.filename.removeprefix(prefix): (member.header_offset, member.file_size) for member in members}


class ZarrFiles(Store):
    """The files below a folder of `files` as a store that zarr reads; of their sizes it must be told.

    A file that is missing is a FileNotFoundError, where zarr's own stores give zeros.
    """

    supports_writes = supports_deletes = supports_listing = False

    def __init__(self, files: Files | ZipFiles, folder: str, sizes: dict[str, int]):
        """sizes: of every file, by its name in `files`, in bytes."""
        super().__init__(read_only=True)
        self._files, self._folder, self._sizes = files, folder, sizes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrFiles) and (self._files.location, self._folder) == (other._files.location, other._folder)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The bytes of a file that zarr asks for."""
        name = f"{self._folder}/{key}"
        if name not in self._sizes:
            if "/c/" in key:
                raise FileNotFoundError(2, "no such file or folder", self._files.place(name))
            return None  # zarr asks for descriptions of other formats too
        start, stop = _ends(byte_range, self._sizes[name])
        return prototype.buffer.from_bytes(await asyncio.to_thread(self._files.read, name, start, stop, TRAINING_TRIES))

    async def get_partial_values(self, prototype: BufferPrototype,
                                 key_ranges: Iterable[tuple[str, ByteRequest | None]]) -> list[Buffer | None]:
        """Several of these."""
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        return f"{self._folder}/{key}" in self._sizes

    async def set(self, key: str, value: Buffer) -> None:
        """Not supported, as `delete` and the lists are not."""
        raise NotImplementedError("shards are read only")

    async def delete(self, key: str) -> None:
        """Not supported."""
        raise NotImplementedError("shards are read only")

    def list(self) -> AsyncIterator[str]:
        """Not supported."""
        raise NotImplementedError("the manifest lists the files")

    list_prefix = list_dir = lambda self, prefix: self.list()


def _ends(byte_range: ByteRequest | None, size: int) -> tuple[int, int]:
    if isinstance(byte_range, RangeByteRequest):
        return byte_range.start, byte_range.end
    if isinstance(byte_range, OffsetByteRequest):
        return byte_range.offset, size
    if isinstance(byte_range, SuffixByteRequest):
        return max(size - byte_range.suffix, 0), size
    return 0, size


@functools.lru_cache(maxsize=64)
def _connect(location: str, process: int) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a location and the path in it. process: a file system is of use in the process that made it only."""
    try:
        system, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        known = "install that package" if isinstance(error, ImportError) else "give a folder, a zip file or another URL"
        raise UserError(f"{location} cannot be opened ({first_line(error).rstrip('.')}); {known}") from None
    return (LocalFileSystem(auto_mkdir=True), path) if isinstance(system, LocalFileSystem) else (system, path)
