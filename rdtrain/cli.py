"""The `rdtrain` command: one verb for each main job, in the order in which a user meets them.

Libraries are imported inside each verb, so that `rdtrain --help` answers at once.
"""

import argparse
from pathlib import Path

from .errors import UserError, user_errors_as_exit

DESCRIPTION = """\
Train recurrent-depth language models as denoising blocks (DiffusionBlocks), compare them with
backpropagation through time, and export them for K-iteration text generation.

From text to text:
  rdtrain corpus data/corpus                                  (or --text my_book.txt more/*.jsonl.gz)
  rdtrain tokenizer train data/corpus/train.jsonl --output data/tokenizer --vocab-size 4096
  rdtrain shard data/corpus/train.jsonl --tokenizer data/tokenizer --output data/shards/train
  rdtrain shard data/corpus/validation.jsonl --tokenizer data/tokenizer --output data/shards/validation
  deepspeed launch/train.py --config configs/quickstart.yaml  (or, in one process, rdtrain train --config ...)
  rdtrain compare runs/quickstart/blocks runs/quickstart/bptt --output runs/quickstart
  rdtrain export runs/quickstart/blocks --output runs/quickstart/model
  rdtrain generate runs/quickstart/model --prompt "Returns the"
"""


def main() -> None:
    """Entry point of the `rdtrain` command."""
    parser = argparse.ArgumentParser(
        prog="rdtrain", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`rdtrain VERB --help` explains each verb.",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for add in (_add_corpus, _add_tokenizer, _add_shard, _add_train, _add_compare, _add_export, _add_generate):
        add(verbs)
    arguments = parser.parse_args()
    with user_errors_as_exit():
        raise SystemExit(arguments.run(arguments) or 0)


def _verb(verbs, name: str, run, help: str, description: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=help, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(run=run)
    return parser


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def _add_corpus(verbs) -> None:
    parser = _verb(
        verbs, "corpus", _corpus, "collect text and split off a validation part",
        "Writes train.jsonl and validation.jsonl. Without --text the corpus is the English prose that the installed packages carry: "
        "docstrings of the standard library, torch, numpy, transformers and datasets, and pydoc's topics.",
    )
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument(
        "--text", type=Path, nargs="+", help="your own text: .txt, .md, .rst, .jsonl (also .gz, .xz, .zst), .parquet, or folders"
    )
    parser.add_argument("--validation-fraction", type=float, default=0.02, help="share of the documents held out")
    _add_overwrite(parser)


def _corpus(arguments) -> None:
    from .data.corpus import write_corpus

    facts = write_corpus(
        arguments.output, text=arguments.text, validation_fraction=arguments.validation_fraction, overwrite=arguments.overwrite
    )
    for side in ("train", "validation"):
        print(f"{arguments.output}/{side}.jsonl: {facts[side]['documents']:,} documents, {facts[side]['text_bytes']:,} bytes")


def _add_tokenizer(verbs) -> None:
    actions = verbs.add_parser("tokenizer", help="train a tokenizer", description="SentencePiece tokenizers.").add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    parser = _verb(
        actions, "train", _tokenizer_train, "train a SentencePiece BPE tokenizer with byte fallback",
        "Any text round-trips exactly through the result: unknown characters become bytes, spaces and newlines are kept.",
    )
    parser.add_argument("inputs", type=Path, nargs="+", help="text files or folders, of any kind that `rdtrain corpus --text` reads")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=8192, help="number of tokens")
    _add_overwrite(parser)


def _tokenizer_train(arguments) -> None:
    from .data.tokenizer_training import train_tokenizer

    tokenizer = train_tokenizer(arguments.inputs, arguments.output, arguments.vocab_size, overwrite=arguments.overwrite)
    print(f"{arguments.output}: {tokenizer.vocab_size} tokens, hash {tokenizer.hash[:12]}")


def _add_shard(verbs) -> None:
    parser = _verb(
        verbs, "shard", _shard, "tokenize text into zarr shards",
        "Reads documents, tokenizes them and writes a folder of zarr 3 token shards with document boundaries, checksums, and the "
        "tokenizer that made them.",
    )
    parser.add_argument("inputs", type=Path, nargs="+", help="text, JSONL (also .gz, .xz, .zst) or Parquet files, or folders")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of `rdtrain tokenizer train`, or a .model file")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--column", default="text", help="the text column of JSONL and Parquet")
    _add_overwrite(parser)


def _shard(arguments) -> None:
    from .data.shards import write_shards

    manifest = write_shards(
        arguments.inputs, _load_tokenizer(arguments.tokenizer), arguments.output, overwrite=arguments.overwrite,
        column=arguments.column,
    )
    tokens = manifest["tokens"]
    print(
        f"{arguments.output}: {tokens:,} tokens of {manifest['documents']:,} documents, "
        f"{manifest['text_bytes'] / tokens:.2f} bytes a token"
    )


def _add_train(verbs) -> None:
    parser = _verb(
        verbs, "train", _train, "train, or continue, a run in this process",
        "The same as `deepspeed launch/train.py`, which starts several processes. Started again with the same config, a run "
        "continues from its last checkpoint.",
    )
    add_train_arguments(parser)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of training, shared by `rdtrain train` and launch/train.py."""
    parser.add_argument("--config", type=Path, help="YAML file of settings; without it the defaults hold")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's")
    parser.add_argument("--print-config", action="store_true", help="print every setting with its value, and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers pass it; the environment says the same


def _train(arguments) -> int:
    from .config import config_to_yaml, load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config_to_yaml(config), end="")
        return 0
    from .distributed import leave
    from .train import train

    code = train(config)
    leave()
    return code


def train_main() -> None:
    """What launch/train.py runs in each process."""
    parser = argparse.ArgumentParser(
        description="One process of a training run; start it with `deepspeed launch/train.py --config FILE` or `torchrun`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_train_arguments(parser)
    with user_errors_as_exit():
        raise SystemExit(_train(parser.parse_args()))


def _add_compare(verbs) -> None:
    parser = _verb(
        verbs, "compare", _compare, "report runs side by side",
        "Writes report.md, report.json and nll-against-flops.png: cost per token, speed, memory and held-out NLL of each run.",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the report to")


def _compare(arguments) -> None:
    from .compare import compare

    print(compare(arguments.runs, arguments.output))


def _add_export(verbs) -> None:
    parser = _verb(
        verbs, "export", _export, "turn a checkpoint into a folder that generates text on its own",
        "The folder holds safetensors weights, config, tokenizer and the model's own source files; it needs torch, safetensors and "
        "sentencepiece, and nothing of rdtrain.",
    )
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest checkpoint) or a checkpoint folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    _add_overwrite(parser)


def _export(arguments) -> None:
    from .export import export

    export(arguments.checkpoint, arguments.output, overwrite=arguments.overwrite)


def _add_generate(verbs) -> None:
    parser = _verb(
        verbs, "generate", _generate, "generate text with an exported folder",
        "Runs the exported folder's own program, in a process of its own, with the arguments that follow the folder; "
        "`rdtrain generate FOLDER --help` lists them.",
    )
    parser.add_argument("folder", type=Path, help="an exported folder")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on: --prompt, --iterations, --temperature ...")


def _generate(arguments) -> int:
    import subprocess
    import sys

    if not (arguments.folder / "__main__.py").is_file():
        raise UserError(f"{arguments.folder} is not an exported model: make one with `rdtrain export RUN --output FOLDER`")
    process = subprocess.Popen([sys.executable, str(arguments.folder), *arguments.arguments])
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal has told the program too
        return process.wait()


def _load_tokenizer(path: Path):
    from .model.tokenizer import Tokenizer

    try:
        return Tokenizer(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{error}: train one with `rdtrain tokenizer train`") from None


if __name__ == "__main__":
    main()
