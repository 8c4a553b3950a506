"""The folder in which `rdtrain shard` works, so that a killed run is continued: beside the output, named .OUTPUT.unfinished.

    settings.json    what decides the result; a run continues only what was begun with the same, or where nothing has been done yet
    units/           the finished units (in result/units for a part)
    result/          what becomes the output
    complete         the result is whole, and only has to be moved

Notable: every step is a rename, so that a kill at any moment leaves the old output, or the new one, and nothing between.
"""

import fcntl
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .output import refuse_existing

MARKERS = ("manifest.json", "train/manifest.json", "part.json")


@contextmanager
def work_folder(output: Path, settings: dict, times: str, overwrite: bool, written: Callable[[], bool]) -> Iterator[Path | None]:
    """Yields the folder to work in, new or with what an interrupted run has left; None when that run only had to be moved into place, or
    when `written` says that the output is what this one would write.

    settings: what decides the result; times: a hash of when the inputs were changed. The folder stays when the block is left by an
    exception, and becomes the output when it has been marked by `complete`.
    Raises UserError when the output exists and may not be replaced, when the work was begun with other settings or inputs, when another
    process is at it, and for every OSError inside the block.
    """
    if output.suffix.lower() == ".zip" or output.parts and output.parts[0].endswith(":"):
        raise UserError(f"shards are written to a folder of this machine first, and {output} is a zip file or a URL; write them to a "
                        "folder, and bring them there with `rdtrain shard copy`")
    target = Path(output).resolve()  # of a link, what it leads to: there is the room, and a folder cannot take the place of a link
    work = target.parent / f".{target.name}.unfinished"
    try:
        shutil.rmtree(_trash(target), ignore_errors=True)
        finished = (work / "complete").is_file()
        if not finished and not overwrite and not (work / "settings.json").is_file() and written():
            print(f"{output} has been written by this command before; --overwrite writes it anew", file=sys.stderr)
            yield None
            return
        if not finished:
            refuse_existing(Path(output), MARKERS, overwrite)
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another rdtrain shard is writing {output}; wait for it or choose another output") from None
            if finished:
                _publish(work, target)
                yield None
                return
            _check_settings(work, output, settings, times)
            yield work
            if (work / "complete").is_file():
                _publish(work, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {output} ({reason}); make room there and start the same command again to continue") from error


def complete(work: Path) -> None:
    """Says that work / "result" is whole."""
    (work / "complete").touch()


def give_up(work: Path) -> None:
    """Deletes work that no other settings of the same command could make use of."""
    _delete(work, work.with_suffix(".deleted"))


def _check_settings(work: Path, output: Path, settings: dict, times: str) -> None:
    file = work / "settings.json"
    begun = json.loads(file.read_text()) if file.is_file() else None
    different = begun and [key for key in settings if begun["settings"].get(key) != settings[key]]
    if begun and not different and begun["times"] != times:
        different = ["inputs (they have changed since)"]
    if begun is None or different and not any(work.rglob("units/*/*.json")):  # nothing has been done that could be lost
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"settings": settings, "times": times}, indent=2))
        temporary.replace(file)
        return
    if different:
        names = ", ".join(different).replace("_", " ")
        raise UserError(f"{work} holds an unfinished run for {output} with other {names}; start that command again to finish it, or delete "
                        "the folder")


def _publish(work: Path, target: Path) -> None:
    if (work / "result").is_dir():
        if target.exists() and any(target.iterdir()):
            target.rename(work / "replaced")
        (work / "result").rename(target)
    _delete(work, _trash(target))


def _trash(target: Path) -> Path:
    return target.parent / f".{target.name}.deleted"


def _delete(work: Path, trash: Path) -> None:
    """Deletes the folder under another name, so that a half-deleted one is not taken for work to continue."""
    work.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)
