"""The command line of `rdtrain tokenizer train`, `import` and `benchmark`."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError


def add_tokenizer(verbs, add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb and its actions. add_verb(verbs, name, run, help, description) makes a parser."""
    actions = verbs.add_parser(
        "tokenizer", help="train or import a tokenizer",
        description="Tokenizers: SentencePiece models, and byte-level ones of Hugging Face's kind.",
    ).add_subparsers(title="actions", metavar="ACTION", required=True)
    parser = add_verb(
        actions, "train", _train, "train a SentencePiece tokenizer with byte fallback",
        "Any text round-trips exactly through the result: unknown characters become bytes, spaces and newlines are kept.",
    )
    parser.add_argument("inputs", type=Path, nargs="+", help="text files or folders, of any kind that `rdtrain corpus --text` reads")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=8192, help="number of tokens, all kinds together")
    parser.add_argument("--model", choices=("bpe", "unigram"), default="bpe", help="byte-pair encoding, or a unigram language model")
    parser.add_argument(
        "--special-tokens", nargs="+", default=[], metavar="NAME", help="further marks, such as <|user|>; a text that holds such a name "
        "does not become one"
    )
    parser.add_argument("--multiple-of", type=int, default=1, metavar="N", help="learn as many pieces more as make their number one of N")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser = add_verb(
        actions, "import", _import, "take a SentencePiece model, or a byte-level tokenizer of Hugging Face's kind",
        "Writes it as `rdtrain shard` takes it. What changes text before it is encoded (a space put before it, normalisation) is turned "
        "off and named; pieces and ids stay. A tokenizer that would lose text even so is refused.",
    )
    parser.add_argument("path", type=Path, help="a .model file, a tokenizer.json, or a folder with one, such as save_pretrained writes")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--bos", metavar="NAME", help="token before each document (default: the one that the model or its folder names)")
    parser.add_argument("--eos", metavar="NAME", help="token after each document (likewise)")
    parser.add_argument(
        "--multiple-of", type=int, default=1, metavar="N", help="add tokens that are never used, so that their number is a multiple of N"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser = add_verb(
        actions, "benchmark", _benchmark, "measure how fast tokenizers encode",
        "Prints MB of text a second, of the clock and of the processors, on one core and in as many processes as there are workers, with "
        "ratios to the first tokenizer.",
    )
    parser.add_argument("tokenizers", type=Path, nargs="+", help="folders of `rdtrain tokenizer train` or `import`, or their files")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text, of any kind that `rdtrain corpus --text` reads")
    parser.add_argument("--megabytes", type=float, default=10, help="of the text, from its beginning")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--workers", type=int, default=cores, help="processes of the second measurement")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each tokenizer; the median counts")


def load_tokenizer(path: Path):
    """The tokenizer at `path`; UserError when there is none that can be used."""
    from ..model.tokenizer import Tokenizer

    try:
        return Tokenizer(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{error}: make one with `rdtrain tokenizer train` or `import`") from None
    except OSError as error:
        raise UserError(f"the tokenizer at {path} cannot be read ({error.strerror}): see to its permissions or its disk") from None


def _train(arguments) -> None:
    from .tokenizer_training import train_tokenizer

    tokenizer = train_tokenizer(
        arguments.inputs, arguments.output, arguments.vocab_size, overwrite=arguments.overwrite, model=arguments.model,
        special_tokens=arguments.special_tokens, multiple_of=arguments.multiple_of,
    )
    _print(arguments.output, tokenizer)


def _import(arguments) -> None:
    from .tokenizer_import import import_tokenizer

    tokenizer, turned_off = import_tokenizer(
        arguments.path, arguments.output, arguments.bos, arguments.eos, arguments.multiple_of, arguments.overwrite
    )
    _print(arguments.output, tokenizer)
    if turned_off:
        print(f"turned off, as it changes text: {', '.join(turned_off)}")


def _print(output: Path, tokenizer) -> None:
    unused = f" ({tokenizer.unused_tokens} of them unused)" if tokenizer.unused_tokens else ""
    name = tokenizer.backend.name
    print(f"{output}: {tokenizer.vocab_size} tokens{unused}, documents between {name(tokenizer.bos_id)} and {name(tokenizer.eos_id)}, hash "
          f"{tokenizer.hash[:12]}")


def _benchmark(arguments) -> None:
    from .tokenizer_benchmark import benchmark_tokenizers

    print(benchmark_tokenizers(arguments.tokenizers, arguments.text, arguments.megabytes, arguments.workers, arguments.rounds))
