"""The command line of `rdtrain evaluate`."""

import argparse
from collections.abc import Callable
from pathlib import Path


def add_evaluate(verbs, add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb. add_verb(verbs, name, run, help, description) makes a parser."""
    parser = add_verb(
        verbs, "evaluate", _evaluate, "measure trained models: likelihood, and the text that they write",
        "Held-out NLL and bits per byte (one iteration from pure noise for denoising models, all K for unrolled ones); a denoising "
        "model's cross-entropy against the noise level; an unrolled model's NLL against K; and text written after held-out prompts, at "
        "each K and temperature: its variety, its NLL under a teacher, and its MAUVE, beside the human text. Writes report.md, "
        "report.json, plots and every sample. docs/evaluation.md says what each number means.",
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the verb takes; `settings_of` reads it."""
    parser.add_argument("models", type=Path, nargs="*", metavar="MODEL", help="exported folders, run folders or checkpoint folders")
    parser.add_argument("--shards", help="validation shards (folder, zip file or URL), of the models' tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--samples", type=Path, nargs="+", default=[], help="score these samples-*.jsonl instead of models")
    parser.add_argument("--skip", nargs="+", default=[], choices=("likelihood", "samples"), help="parts to leave out")
    parser.add_argument("--device", help="cpu, cuda ... (default: cuda where there is one)")
    parser.add_argument(
        "--batch", type=int, help="sequences or continuations at a time (default: 32; of continuations on CUDA, as many as have a "
        "cache in a third of the memory, at most 1024)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise, sampling and MAUVE's clusters")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    likelihood = parser.add_argument_group("likelihood")
    likelihood.add_argument("--sequences", type=int, default=256, help="validation sequences, from the start of the shards")
    likelihood.add_argument("--sequence-length", type=int, default=512, help="tokens of each")
    likelihood.add_argument("--rows", choices=("packed", "documents"), default="packed", help="what a sequence is, as data.rows has it")
    likelihood.add_argument("--sigma-levels", type=int, default=24, help="noise levels of a denoising model's curve")
    likelihood.add_argument(
        "--nll-iterations", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="K",
        help="of an unrolled model's NLL, and of the bound on that of a denoising chain",
    )
    samples = parser.add_argument_group("samples", "The defaults are the protocol of DiffusionBlocks' paper.")
    samples.add_argument("--prompts", type=int, default=1000, help="held-out prompts, spread evenly over the shards")
    samples.add_argument("--prompt-tokens", type=int, default=50, help="tokens of each prompt")
    samples.add_argument("--continuations", type=int, default=5, help="texts after each prompt")
    samples.add_argument("--new-tokens", type=int, default=50, help="tokens of each text")
    samples.add_argument("--iterations", type=int, nargs="+", default=[1, 8, 32], metavar="K", help="iterations of the core per token")
    samples.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.8], metavar="T", help="each with each K; 0 is greedy")
    samples.add_argument("--top-k", type=int, help="keep the k likeliest tokens (default: all)")
    samples.add_argument("--top-p", type=float, help="keep the likeliest tokens that make up this probability (default: all)")
    samples.add_argument("--min-p", type=float, help="keep tokens at least this share as likely as the likeliest (default: all)")
    samples.add_argument("--solver", help="how a denoising model's chain steps: euler, multistep or ancestral (default: euler)")
    samples.add_argument("--chain-temperature", type=float, help="of the distributions inside the chain (default: 1)")
    samples.add_argument("--chain-top-p", type=float, help="top-p of the distributions inside the chain (default: 1)")
    samples.add_argument("--chain-top-k", type=int, help="top-k of the distributions inside the chain (default: all)")
    samples.add_argument("--chain-readout", help="where those are read: coda or core (default: coda)")
    samples.add_argument("--exit", help="end a token's iterations when it has settled: never, entropy, kl or argmax (default: never)")
    samples.add_argument("--exit-threshold", type=float, help="nats, or of argmax iterations (default: 0.05, 0.001 and 3)")
    samples.add_argument("--exit-minimum", type=int, help="iterations that a token takes at least (default: 1)")
    samples.add_argument("--caches", type=int, help="key-value caches that the iterations share (default: one for each)")
    samples.add_argument("--cache-order", help="which of them share one: adjacent or cyclic (default: adjacent)")
    judges = parser.add_argument_group("judges", "Folders of Hugging Face models on this disk, or models of rdtrain; nothing is fetched.")
    judges.add_argument("--teacher", type=Path, help="a causal language model that scores each text given its prompt")
    judges.add_argument("--mauve-features", type=Path, help="a model whose last hidden state MAUVE compares (pip install rdtrain[mauve])")
    judges.add_argument("--mauve-scaling", type=float, nargs="+", default=[0.2, 5.0], metavar="C", help="MAUVE's scaling factors")
    judges.add_argument("--mauve-clusters", type=int, help="clusters of MAUVE (default: prompts / 10)")
    judges.add_argument("--judge-batch", type=int, default=32, help="texts that a judge reads at a time")


def _evaluate(arguments) -> None:
    from .command import evaluate

    print(evaluate(settings_of(arguments)))


def settings_of(arguments):
    """The EvaluateSettings of a parsed command."""
    from .command import EvaluateSettings
    from .mauve import MauveSettings

    values = vars(arguments)
    names = ("top_k", "top_p", "min_p", "solver", "chain_temperature", "chain_top_p", "chain_top_k", "chain_readout", "exit",
             "exit_threshold", "exit_minimum", "caches", "cache_order")
    sampling = {name: values[name] for name in names if values[name] is not None}
    mauve = MauveSettings(arguments.mauve_scaling, "auto" if arguments.mauve_clusters is None else arguments.mauve_clusters, arguments.seed)
    others = {name: values[name] for name in EvaluateSettings.__dataclass_fields__ if name not in ("sampling", "mauve")}
    return EvaluateSettings(**others, sampling=sampling, mauve=mauve)
