"""The command line of `rdtrain shard` and of what belongs to it: `rdtrain shard verify`, `inspect`, `copy`, `merge`, `benchmark` and
`read-benchmark`.

Notable: an action is a verb of its own whose name has a space in it, so that `rdtrain shard FILE ...` needs no word before its files.
A file that bears the name of an action is given as ./verify.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from .tokenizer_commands import load_tokenizer

ACTIONS = ("verify", "inspect", "copy", "merge", "benchmark", "read-benchmark")


def join_action(arguments: list[str]) -> list[str]:
    """`shard verify ...` as the verb "shard verify" and its arguments; anything else as it is."""
    if arguments[:1] == ["shard"] and arguments[1:2] and arguments[1] in ACTIONS:
        return [f"shard {arguments[1]}", *arguments[2:]]
    return arguments


def add_shard(verbs, add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb and its actions. add_verb(verbs, name, run, help, description) makes a parser."""
    parser = add_verb(
        verbs, "shard", _shard, "tokenize text into zarr shards",
        "Reads documents, drops exact duplicates, tokenizes on all cores and writes a folder of zarr 3 token shards with document "
        "boundaries, checksums, and the tokenizer that made them. What cannot be read is left out, counted and named. A run that was "
        "stopped continues when the same command is started again. `rdtrain shard verify`, `inspect`, `copy`, `merge`, `benchmark` and "
        "`read-benchmark` have a help of their own.",
    )
    parser.add_argument(
        "inputs", nargs="*", help="text, JSONL (also .gz, .xz, .zst), Parquet, folders, patterns, or - for JSONL on standard input"
    )
    parser.add_argument(
        "--config", type=Path, help="instead of inputs: YAML file of named sources, also data sets of Hugging Face (docs/data.md)"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of `rdtrain tokenizer train` or `import`, or its file")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--column", help="of inputs: the text column of JSONL and Parquet (default: text)")
    parser.add_argument(
        "--validation-share", type=float, default=0.0, metavar="SHARE",
        help="write OUTPUT/train and OUTPUT/validation, about this share of the documents, by a hash of the text, in the latter",
    )
    _add_workers(parser)
    parser.add_argument(
        "--part", type=_part, metavar="I/N", help="do part I of N only, for `rdtrain shard merge`; the parts need not know of each other"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser = add_verb(
        verbs, "shard verify", _verify, "check every byte of shards",
        "Reads every file and compares it with its checksum. Prints a line for each folder and each damaged file; the exit code is 1 when "
        "there is one.",
    )
    parser.add_argument("folders", nargs="+", help="shards, or folders with train and validation shards in them; zip files and URLs too")
    parser = add_verb(
        verbs, "shard inspect", _inspect, "show what shards hold",
        "Prints the sources with their tokens and what was left out of them, how long documents are, and a window of the text.",
    )
    parser.add_argument("folder", help="folder, zip file or URL of shards")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--start", type=int, default=0, metavar="TOKEN", help="the window's first token")
    place.add_argument("--document", type=int, metavar="N", help="begin the window at the N-th document, from 0")
    parser.add_argument("--length", type=int, default=200, metavar="TOKENS", help="of the window; 0 for none")
    parser.add_argument("--histogram", type=Path, metavar="FILE.png", help="draw the lengths of documents")
    parser = add_verb(
        verbs, "shard copy", _copy, "bring shards to another folder, behind a URL, or into a zip file",
        "Reads every file, writes it, reads it back and compares the checksums. The manifest comes last, so that a copy is whole or none; "
        "one that was stopped continues when the same command is started again.",
    )
    parser.add_argument("source", help="folder, zip file or URL of shards, or of train and validation shards")
    parser.add_argument("target", help="folder or URL (s3://BUCKET/NAME needs the package s3fs), or FILE.zip on this machine")
    parser.add_argument("--overwrite", action="store_true", help="replace other shards there")
    parser = add_verb(
        verbs, "shard merge", _merge, "make shards out of the parts of several nodes",
        "The shards are those that one run without --part would have written.",
    )
    parser.add_argument("parts", type=Path, nargs="+", help="the outputs of `rdtrain shard --part` of one input")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    _add_workers(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser = add_verb(
        verbs, "shard benchmark", _benchmark, "measure sharding beside the bare tokenizer",
        "Makes text of each size, shards it with each number of workers, and prints the speed beside that of the tokenizer alone in as "
        "many processes, and the peak memory.",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of `rdtrain tokenizer train` or `import`, or its file")
    parser.add_argument("--output", type=Path, required=True, help="folder to work in; what is made there is deleted again")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000], help="sizes of the input")
    parser.add_argument("--workers", type=int, nargs="+", default=[_cores()], help="processes; of each number a row")
    parser = add_verb(
        verbs, "shard read-benchmark", _read_benchmark, "measure reading in training order",
        "Reads shards in the shuffled order of training, and the same windows by np.memmap, zarr and, where it is installed, tensorstore; "
        "prints tokens a second.",
    )
    parser.add_argument("folder", type=Path, help="folder of shards")
    parser.add_argument("--output", type=Path, required=True, help="folder for an uncompressed copy, which is deleted again")
    parser.add_argument("--sequence-length", type=int, default=512, help="predicted tokens of a window (default: 512)")
    parser.add_argument("--batch", type=int, default=64, help="windows read together (default: 64)")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each way is measured at a time, three times (default: 3)")


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=_cores(), help="processes")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _part(text: str) -> tuple[int, int]:
    try:
        number, count = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no part; give I/N, such as 1/4") from None
    return number, count


def _shard(arguments) -> None:
    from .sharding import write_shards
    from .units import load_sources

    if bool(arguments.inputs) == (arguments.config is not None):
        raise UserError("rdtrain shard needs either inputs or --config: give one of the two")
    if arguments.config is not None and arguments.column is not None:
        raise UserError("--column is of inputs, and sources have columns of their own: give `column` to those of --config")
    inputs = arguments.inputs or load_sources(arguments.config)
    manifest = write_shards(
        inputs, load_tokenizer(arguments.tokenizer), arguments.output, overwrite=arguments.overwrite, column=arguments.column or "text",
        workers=arguments.workers, validation_share=arguments.validation_share, part=arguments.part,
    )
    if arguments.part is None:
        _print_result(arguments.output, manifest)
    else:
        print(f"{arguments.output}: part {arguments.part[0]} of {arguments.part[1]}, for rdtrain shard merge")


def _merge(arguments) -> None:
    from .sharding import merge_parts

    _print_result(arguments.output, merge_parts(arguments.parts, arguments.output, arguments.overwrite, arguments.workers))


def _print_result(output: Path, manifest: dict) -> None:
    from .shards import ShardReader, shard_folders

    for source in manifest["sources"]:
        for reason, facts in source["left_out"].items():
            place = f", the first is {facts['first']}" if "first" in facts else ""
            print(f"{source['name']}: left out {facts['documents']:,} {reason}{place}")
    for folder in shard_folders(output):
        reader = ShardReader(folder)
        print(f"{folder}: {len(reader):,} tokens of {reader.document_count:,} documents, {reader.bytes_per_token:.2f} bytes a token")


def _verify(arguments) -> int:
    from .shards import ShardReader, shard_folders

    damaged = False
    for folder in (found for given in arguments.folders for found in shard_folders(given)):
        try:
            faults = list(ShardReader(folder, open_arrays=False).find_damage())
        except UserError as error:
            faults = [str(error)]
        damaged |= bool(faults)
        print("\n".join(faults) if faults else f"{folder}: whole", flush=True)
    return int(damaged)


def _inspect(arguments) -> None:
    from .inspection import inspect_shards

    print(inspect_shards(arguments.folder, arguments.start, arguments.document, arguments.length, arguments.histogram))


def _copy(arguments) -> None:
    from .copying import copy_shards

    for reader in copy_shards(arguments.source, arguments.target, arguments.overwrite):
        print(f"{reader.path}: {len(reader):,} tokens of {reader.document_count:,} documents, whole")


def _benchmark(arguments) -> None:
    from .sharding_benchmark import benchmark

    print(benchmark(load_tokenizer(arguments.tokenizer), arguments.output, arguments.megabytes, arguments.workers))


def _read_benchmark(arguments) -> None:
    from .reading_benchmark import read_benchmark

    print(read_benchmark(arguments.folder, arguments.output, arguments.sequence_length, arguments.batch, arguments.seconds))
