"""`rdtrain shard copy`: shards from a folder, URL or zip file to another, checked there, and whole or not to be seen.

Notable: a file goes to a folder or URL as it is, is read back from there, and the manifest, without which there are no shards, comes last.
So a copy that was stopped is continued by the same command, which leaves what is there and whole. A zip file is written under another
name and renamed. Its bytes depend on those of the shards alone.
"""

import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import UserError
from .output import content_facts
from .progress import show_progress
from .shards import FILES_AT_ONCE, MANIFEST, ShardReader, shard_folders
from .storage import MISSING, Files, ZipFiles, open_files


def copy_shards(source: str, target: str, overwrite: bool = False) -> list[ShardReader]:
    """Copies shards, or a training and a validation side, and returns readers of the copies.

    source, target: folders, URLs or zip files; a target that ends in .zip is a zip file of this machine to be written.
    Raises UserError when there are no shards or they are damaged, when the target holds other shards and is not to be overwritten, and
    when it cannot be written or gives back something else.
    """
    readers = {place.removeprefix(source.rstrip("/")).strip("/"): ShardReader(place, open_arrays=False) for place in shard_folders(source)}
    if target.endswith(".zip"):
        _write_zip(readers, target, overwrite)
    else:
        for side, reader in readers.items():
            _copy(reader, Files(_below(target, side)), overwrite)
    return [ShardReader(_below(target, side)) for side in readers]


def _below(place: str, side: str) -> str:
    return f"{place.rstrip('/')}/{side}" if side else place


def _copy(reader: ShardReader, target: Files, overwrite: bool) -> None:
    """One side into a folder or behind a URL."""
    files, manifest = reader.manifest["files"], reader.manifest_content
    present = _present_manifest(target)
    if present is not None and present != manifest:
        if not overwrite:
            raise UserError(f"{target.location} holds other shards; choose another place or ask to overwrite them")
        target.remove(MANIFEST)  # until the new ones are whole there are none
    sizes = target.sizes(files)

    def copy(name: str) -> None:
        if sizes[name] == files[name]["bytes"] and _holds(target, name, files[name]):
            return
        target.write(name, reader.read_file(name))
        if not _holds(target, name, files[name]):
            raise UserError(f"{target.place(name)} does not hold what was written to it; start the same command again")

    _for_all(copy, list(files), "copy")
    if present != manifest:
        target.write(MANIFEST, manifest)


def _present_manifest(target: Files) -> bytes | None:
    try:
        return target.read(MANIFEST)
    except MISSING:
        return None


def _holds(files: Files | ZipFiles, name: str, facts: dict) -> bool:
    try:
        return content_facts(files.read(name)) == facts
    except OSError:
        return False


def _for_all(action: Callable[[str], None], names: list[str], title: str) -> None:
    """action(name) of every name, several at a time."""
    with ThreadPoolExecutor(FILES_AT_ONCE, title) as pool:
        try:
            for _ in show_progress(pool.map(action, names), title, total=len(names), unit=" files"):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def _write_zip(readers: dict[str, ShardReader], target: str, overwrite: bool) -> None:
    if "://" in target:
        raise UserError(f"a zip file cannot be written straight to {target}; write it to a disk and copy that file, or leave .zip out")
    path = Path(target)
    if path.exists() and not (overwrite and zipfile.is_zipfile(path)):
        mend = "it is no zip file, so choose another name" if overwrite else "choose another name or ask to overwrite it"
        raise UserError(f"{path} exists already; {mend}")
    temporary = path.with_name(f".unfinished.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            with zipfile.ZipFile(stream, "w") as archive:
                for side, reader in readers.items():
                    names = [*reader.manifest["files"], MANIFEST]
                    for name in show_progress(names, "copy", total=len(names), unit=" files"):
                        content = reader.manifest_content if name == MANIFEST else reader.read_file(name)
                        archive.writestr(zipfile.ZipInfo(_below(side, name) if side else name), content)
            stream.flush()
            os.fsync(stream.fileno())
        for side, reader in readers.items():
            written = open_files(_below(str(temporary), side))
            if damaged := [name for name, facts in reader.manifest["files"].items() if not _holds(written, name, facts)]:
                raise UserError(f"{written.place(damaged[0])} does not hold what was written to it; see to the disk")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); make room there or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)
