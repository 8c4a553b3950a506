"""Folders and files that are whole or absent: written under a temporary name beside the target, then renamed.

Notable: only a folder that bears the writer's own marker file is ever replaced, so a mistyped output path with `overwrite` cannot
delete somebody's home. The old folder stays until the new one is complete.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from ..errors import UserError, disk_is_full


def refuse_existing(output: Path, markers: Sequence[str], overwrite: bool) -> None:
    """UserError when `output` exists, is no empty folder, and is not to be overwritten or holds none of the markers."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not overwrite:
            raise UserError(f"{output} exists already; choose another output or ask to overwrite it")
        if not any((output / marker).is_file() for marker in markers):
            raise UserError(f"{output} holds no {' or '.join(markers)}, so it is not an earlier output of this command and is not "
                            "replaced; choose another output")


@contextmanager
def output_folder(output: Path, marker: str, overwrite: bool) -> Iterator[Path]:
    """Yields a new empty folder that becomes `output` when the block ends well and is deleted when it does not.

    marker: the file that the caller writes into every such folder; a folder without it is not replaced, whatever `overwrite`
    says. An empty folder counts as absent.
    Raises UserError when `output` exists and may not be replaced, and for every OSError inside the block, which is to do nothing
    but write (reading of the user's files raises UserErrors of its own).
    """
    output = Path(output)
    refuse_existing(output, (marker,), overwrite)
    target = output.absolute()
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    replaced = target.parent / f".{target.name}.{os.getpid()}.replaced"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had the same number
        partial.mkdir(parents=True)
        yield partial
        if target.exists() and any(target.iterdir()):
            target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {output} ({reason}); make room there or choose another output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def report_folder(output: Path, held: str = "the report", option: str = "--output") -> Path:
    """The folder `output`, made if need be. UserError where no file can be written there, before the work whose report it is to hold.

    held: what it is to hold instead; option: by which it is chosen.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=output).close()
    except OSError as error:
        raise UserError(f"{held} cannot be written to {output} ({error.strerror}): choose another {option}") from None
    return output


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file, text in UTF-8 everywhere, under a temporary name and rename it. UserError when the disk refuses."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # a machine that goes down could else leave an empty file under the name
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        mend = "free some disk space" if disk_is_full(error) else "make its folder one that is there and can be written"
        raise UserError(f"{path} cannot be written ({error.strerror}): {mend}, and start the same command again") from error


def write_figure(figure, path: Path) -> None:
    """Write a figure of matplotlib's pyplot as PNG, as `write_atomically` does, and close it."""
    from matplotlib import pyplot

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    pyplot.close(figure)
    write_atomically(path, picture.getvalue())


def file_facts(file: Path) -> dict:
    """The size and SHA-256 of a file."""
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def content_facts(content: bytes) -> dict:
    """The size and SHA-256 of what a file holds, as `file_facts` gives them."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
