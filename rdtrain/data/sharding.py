"""`rdtrain shard`: documents to shards, by worker processes, in bounded memory, and so that a killed run continues.

    units of the input -> a file of tokens for each unit (rdtrain.data.encoding) -> which documents stay (rdtrain.data.deduplication)
    -> the shard files (rdtrain.data.array_files) -> manifest

Notable: the tokens are those of the documents in the order of the input, whatever the number of workers, kills and parts. Of copies of
a document the first stays. Each finished unit and each finished shard is a file on disk, and continuing means to skip those. Parts of
an input, worked on by different nodes, are finished units only, which `merge_parts` brings together.
"""

import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..model.tokenizer import Tokenizer
from .array_files import Layout, create_arrays, forget_open_files, kept_documents, shard_state, shard_tasks, write_shard
from .deduplication import sort_documents
from .encoding import RECORD, content_hash, encode_unit, unit_file
from .output import file_facts
from .progress import show_progress
from .reading import Unit
from .shards import CHUNK_TOKENS, FORMAT_VERSION, MANIFEST, SHARD_TOKENS, seal_manifest
from .units import Inputs, NamedSource
from .work_folder import complete, give_up, work_folder
from .workers import run_tasks

UNIT_BYTES = 8 << 20
SHARDS_OF_A_WORKER = 10  # at least: to start one takes 0.35 s of processor time, and a shard 0.12 s


def write_shards(inputs: list[Path] | list[NamedSource], tokenizer: Tokenizer, output: Path, shard_tokens: int = SHARD_TOKENS,
                 overwrite: bool = False, column: str = "text", workers: int = 1, validation_share: float = 0.0,
                 part: tuple[int, int] | None = None, unit_bytes: int = UNIT_BYTES) -> dict:
    """Writes the documents of `inputs` as shards into the folder `output`, or continues to, and returns the manifest.

    inputs: named sources, or paths as `NamedSource` takes them, which make one source named "text"; column: of paths, the text's name in
    JSON and Parquet. workers: processes. shard_tokens: tokens in a shard file, a multiple of 131,072 or (for tests) less.
    validation_share: the share of documents, expected by the hash of their text, that go into `output`/validation, the others into
    `output`/train; 0: all go into `output` itself. The manifest returned is the training side's.
    part: (i, n), 1 <= i <= n: do the i-th part of the work only, and write a folder for `merge_parts`; returns what its part.json holds.
    unit_bytes: about how much of the input is a unit of work.
    What cannot be read is left out and counted in the manifest. Raises UserError for settings out of range, inputs without any document,
    an existing output, unfinished work of other settings, a data set or standard input that fails, and a disk that refuses.
    """
    if shard_tokens < 1 or shard_tokens % min(CHUNK_TOKENS, shard_tokens):
        raise UserError(f"shards of {shard_tokens} tokens cannot be written; give a multiple of {CHUNK_TOKENS}")
    if not 0 <= validation_share <= 0.5:
        raise UserError(f"a validation share of {validation_share} is out of range; give one of 0 to 0.5")
    if workers < 1:
        raise UserError(f"{workers} workers can do nothing; give at least 1")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise UserError(f"there is no part {part[0]}/{part[1]}; give I/N with I from 1 to N")
    if not inputs or not isinstance(inputs[0], NamedSource):
        inputs = [NamedSource("text", tuple(map(str, inputs)), column)]
    found = Inputs(inputs, unit_bytes, output)
    if part is not None and found.has_standard_input:
        raise UserError("standard input cannot be shared by parts; give files")
    settings = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer.hash, "inputs": found.describe(), "unit_bytes": unit_bytes,
                "shard_tokens": shard_tokens, "validation_share": validation_share, "part": part and list(part)}
    name = "part.json" if part else MANIFEST

    def written() -> bool:
        facts = _written(output, name)
        return facts.get("settings_sha256") == _settings_hash(settings) and found.older_than(_written_file(output, name))

    with work_folder(output, settings, found.times(), overwrite, written) as work:
        if work is not None:
            folder = work / "units" if part is None else work / "result" / "units"
            folder.mkdir(parents=True, exist_ok=True)
            count = _encode(found, folder, tokenizer, workers, part or (1, 1))
            if part is None:
                layout = Layout(work, (folder,), _dtype(tokenizer), min(CHUNK_TOKENS, shard_tokens), shard_tokens)
                _write_result(layout, count, settings, tokenizer, workers)
            else:
                for file in folder.rglob("*.*.*"):
                    file.unlink()  # of workers that were killed
                shutil.copyfile(tokenizer.file, work / "result" / tokenizer.file_name)
                facts = {"settings": settings, "settings_sha256": _settings_hash(settings), "units": count}
                (work / "result" / "part.json").write_text(json.dumps(facts, indent=2) + "\n")
            complete(work)
    return _written(output, name)


def merge_parts(parts: list[Path], output: Path, overwrite: bool = False, workers: int = 1) -> dict:
    """Makes the shards that one run would have written out of the folders of all its parts, and returns the manifest.

    Raises UserError when a part is missing, damaged or of another run, and otherwise as `write_shards`.
    """
    facts = [_part_facts(part) for part in parts]
    settings = facts[0]["settings"]
    for folder, other in zip(parts, facts):
        different = [key for key in settings if key != "part" and other["settings"][key] != settings[key]]
        if different or other["units"] != facts[0]["units"]:
            raise UserError(f"{folder} and {parts[0]} are parts of different runs, with other {', '.join(different) or 'inputs'}; give the "
                            "parts of one run")
    count = settings["part"][1]
    for folder, other in zip(parts, facts):
        if other["settings"]["part"][1] != count:
            raise UserError(f"{folder} is part {other['settings']['part'][0]} of {other['settings']['part'][1]}, and {parts[0]} one of "
                            f"{count}; give the parts of one run")
    folders = {other["settings"]["part"][0]: folder for folder, other in zip(parts, facts)}
    if missing := [number for number in range(1, count + 1) if number not in folders]:
        raise UserError(f"of {count} parts, number {missing[0]} is not given; give all of them")
    try:
        tokenizer = Tokenizer(folders[1])
    except (FileNotFoundError, ValueError):
        tokenizer = None
    if tokenizer is None or tokenizer.hash != settings["tokenizer"]:
        raise UserError(f"the tokenizer in {folders[1]} is missing or damaged; copy it from another part")
    units = tuple((folders[number] / "units").absolute() for number in range(1, count + 1))

    def written() -> bool:
        begun = max((part / "part.json").stat().st_mtime_ns for part in parts)
        same = _written(output, MANIFEST).get("settings_sha256") == _settings_hash({**settings, "part": None})
        return same and begun < _written_file(output, MANIFEST).stat().st_mtime_ns

    with work_folder(output, {**settings, "part": [str(folder) for folder in units]}, "", overwrite, written) as work:
        if work is not None:
            layout = Layout(work, units, _dtype(tokenizer), min(CHUNK_TOKENS, settings["shard_tokens"]), settings["shard_tokens"])
            _check_units(layout, facts[0]["units"], workers)
            _write_result(layout, facts[0]["units"], settings, tokenizer, workers)
            complete(work)
    return _written(output, MANIFEST)


def _encode(inputs: Inputs, folder: Path, tokenizer: Tokenizer, workers: int, part: tuple[int, int]) -> int:
    """Encodes the units of the part that are not done yet and returns how many units the whole input has."""
    units = tokens = 0
    with show_progress(desc="shards", total=inputs.bytes, unit="B", unit_scale=True) as progress:

        def unfinished() -> Iterator[Unit]:
            nonlocal units, tokens
            for unit in inputs.units():
                units += 1
                if unit.number % part[1] != part[0] - 1:
                    progress.total = progress.total and progress.total - unit.input_bytes
                elif (state := unit_file(folder, unit.number, "json")).is_file():
                    facts = json.loads(state.read_text())
                    if facts["content_hash"] != content_hash(unit):
                        raise UserError(f"{unit.files[0]} does not give what it gave before; give the same input to continue, or delete "
                                        f"{folder.parent} to begin anew")
                    tokens += facts["tokens"]
                    if not progress.disable:
                        progress.initial += unit.input_bytes  # does not count for the speed
                    progress.update(unit.input_bytes)
                else:
                    yield unit

        perform = functools.partial(encode_unit, folder=folder, tokenizer=(tokenizer.file, tokenizer.hash), dtype=_dtype(tokenizer))
        with closing(run_tasks(workers, perform, unfinished())) as finished:
            for facts in finished:
                tokens += facts["tokens"]
                progress.set_postfix_str(f"{tokens:,} tokens", refresh=False)
                progress.update(facts["input_bytes"])
    return units


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _write_result(layout: Layout, units: int, settings: dict, tokenizer: Tokenizer, workers: int) -> None:
    """From all finished units to the folder work / "result"."""
    work, share = layout.work, settings["validation_share"]
    forget_open_files()
    sides = ("train", "validation") if share else (".",)
    if not (work / "starts.npz").is_file():
        _lay_out(layout, units, sides, share)
    with np.load(work / "starts.npz") as arrays:
        starts = dict(arrays)
    sizes = {side: (int(starts[f"{side} tokens"][-1]), int(starts[f"{side} documents"][-1])) for side in sides}
    left_out, first_units = _left_out(layout, units, settings["inputs"], starts, sides)
    for side in sides:
        if not sizes[side][1]:
            names = ", ".join(source["name"] for source in settings["inputs"][:3])
            give_up(work)
            raise UserError(f"no text in {names}{_first_reason(left_out)}; give files that hold some" if side != "validation" else
                            "no document falls on the validation side; give a larger share or more documents, or have `rdtrain corpus` "
                            "cut these and share them out")
    tasks = [task for side in sides for task in shard_tasks(layout, side, *sizes[side])]
    if not (work / "arrays").is_file():
        shutil.rmtree(work / "result", ignore_errors=True)
        shutil.rmtree(work / "done", ignore_errors=True)
        (work / "done").mkdir()
        for side in sides:
            create_arrays(layout, side, *sizes[side])
        (work / "arrays").touch()
    tasks = [task for task in tasks if not shard_state(layout, task).is_file()]
    workers = max(min(workers, len(tasks) // SHARDS_OF_A_WORKER), 1)
    with closing(run_tasks(workers, functools.partial(write_shard, layout=layout), tasks)) as finished:
        for _ in show_progress(finished, "files", total=len(tasks), unit=" files"):
            pass
    for side in sides:
        _write_manifest(layout, side, settings, tokenizer, starts, first_units, left_out)


def _lay_out(layout: Layout, units: int, sides: tuple[str, ...], share: float) -> None:
    """Decides which documents stay where, and writes starts.npz: see `array_files._starts`."""
    records = [layout.unit(unit, "records") for unit in range(units)]
    documents = np.cumsum([0, *(file.stat().st_size // RECORD.itemsize for file in records)])
    starts = {"documents": documents}
    if documents[-1]:
        sort_documents(records, int(documents[-1]), share, layout.work)
    for side in sides:
        facts = np.zeros((3, units + 1), np.int64)
        for unit in range(units if documents[-1] else 0):
            kept = kept_documents(layout, side, unit, documents)
            facts[:, unit + 1] = kept.lengths.sum(), len(kept.lengths), kept.text_bytes.sum()
        starts |= {f"{side} {name}": np.cumsum(row) for name, row in zip(("tokens", "documents", "bytes"), facts)}
    temporary = layout.work / "starts.tmp.npz"
    np.savez(temporary, **starts)
    temporary.replace(layout.work / "starts.npz")


def _left_out(layout: Layout, units: int, inputs: list[dict], starts: dict, sides: tuple[str, ...]) -> tuple[list[dict], np.ndarray]:
    """For each source {reason: {"documents": how many, "first": where}}, and the first unit of each source, with the end; [sources + 1]."""
    counts = [Counter() for _ in inputs]
    firsts: list[dict] = [{} for _ in inputs]
    of_units = np.empty(units, np.int64)
    file, rows = None, 0
    for unit in range(units):
        facts = json.loads(layout.unit(unit, "json").read_text())
        source = of_units[unit] = facts["source"]
        if facts["file"] != file:
            file, rows = facts["file"], 0
        counts[source].update(facts["counts"])
        for reason, (name, row, detail) in facts["examples"].items():
            place = f"{name}:{rows + row}" if row else name
            firsts[source].setdefault(reason, f"{place} ({detail})" if detail else place)
        rows += facts["rows"]
    first_units = np.searchsorted(of_units, np.arange(len(inputs) + 1))
    for source, (first, last) in enumerate(zip(first_units, first_units[1:])):
        kept = sum(int(starts[f"{side} documents"][last] - starts[f"{side} documents"][first]) for side in sides)
        if copies := int(starts["documents"][last] - starts["documents"][first]) - kept:
            counts[source]["duplicate"] += copies
    left_out = [{reason: {"documents": number} | ({"first": first[reason]} if reason in first else {})
                 for reason, number in sorted(count.items())} for count, first in zip(counts, firsts)]
    return left_out, first_units


def _first_reason(left_out: list[dict]) -> str:
    """Why nothing could be read, when something other than emptiness is to blame."""
    for reasons in left_out:
        for reason, facts in reasons.items():
            if reason != "empty":
                return f" ({facts['documents']} {reason}, the first is {facts.get('first')})"
    return ""


def _write_manifest(layout: Layout, side: str, settings: dict, tokenizer: Tokenizer, starts: dict, first_units: np.ndarray,
                    left_out: list[dict]) -> None:
    folder = layout.work / "result" / side
    shutil.copyfile(tokenizer.file, folder / tokenizer.file_name)
    tokens, documents, text_bytes = (starts[f"{side} {name}"] for name in ("tokens", "documents", "bytes"))
    tasks = shard_tasks(layout, side, int(tokens[-1]), int(documents[-1]))
    files = {f"arrays.zarr/{task.array}/c/{task.number}": json.loads(shard_state(layout, task).read_text()) for task in tasks}
    for name in ("arrays.zarr/zarr.json", "arrays.zarr/tokens/zarr.json", "arrays.zarr/documents/zarr.json", tokenizer.file_name):
        files[name] = file_facts(folder / name)
    for file in folder.rglob("*"):
        if file.is_file() and file.relative_to(folder).as_posix() not in files:
            file.unlink()  # half a shard of a worker that was killed
    sources = []
    for source, first, last, reasons in zip(settings["inputs"], first_units, first_units[1:], left_out):
        sources.append({"name": source["name"], "input_files": source["files"], "input_bytes": source["bytes"],
                        "first_document": int(documents[first]), "documents": int(documents[last] - documents[first]),
                        "first_token": int(tokens[first]), "tokens": int(tokens[last] - tokens[first]),
                        "text_bytes": int(text_bytes[last] - text_bytes[first]), "left_out": reasons})
    seal_manifest(folder / MANIFEST, {
        "format_version": FORMAT_VERSION, "dtype": layout.dtype, "tokens": int(tokens[-1]), "documents": int(documents[-1]),
        "text_bytes": int(text_bytes[-1]), "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size,
        "unused_tokens": tokenizer.unused_tokens, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id,
        "chunk_tokens": layout.chunk, "shard_tokens": layout.shard,
        "side": "all" if side == "." else side, "validation_share": settings["validation_share"],
        "settings_sha256": _settings_hash({**settings, "part": None}), "sources": sources, "files": files})


def _settings_hash(settings: dict) -> str:
    """Of what decides an output; the size of the units, which does not decide what is in shards, only that of a part."""
    return hashlib.sha256(json.dumps({**settings, "unit_bytes": settings["part"] and settings["unit_bytes"]}).encode()).hexdigest()


def _part_facts(folder: Path) -> dict:
    try:
        return json.loads((folder / "part.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no whole part.json, so it is no part that `rdtrain shard --part` has finished; correct the "
                        "path") from None


def _check_units(layout: Layout, units: int, workers: int) -> None:
    """UserError when a file of a unit is not what was written."""
    with closing(run_tasks(workers, functools.partial(_damage, layout=layout), range(units))) as found:
        for fault in show_progress(found, "check", total=units, unit=" units"):
            if fault:
                raise UserError(f"{fault}; copy that part again or make it anew")


def _damage(unit: int, layout: Layout) -> str | None:
    try:
        facts = json.loads(layout.unit(unit, "json").read_text())
        for ending, checksum in facts["checksums"].items():
            if file_facts(layout.unit(unit, ending))["sha256"] != checksum:
                return f"{layout.unit(unit, ending)} is damaged (its checksum is wrong)"
    except (OSError, ValueError, KeyError):
        return f"{layout.unit(unit, 'json')} or a file beside it is missing or damaged"
    return None


def _written_file(output: Path, name: str) -> Path:
    """The manifest, or part.json, of an output."""
    return output / name if (output / name).is_file() else output / "train" / name


def _written(output: Path, name: str) -> dict:
    """What it says; nothing where it is no whole one."""
    try:
        facts = json.loads(_written_file(output, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
