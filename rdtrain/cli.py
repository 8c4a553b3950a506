"""The `rdtrain` command: one verb for each main job, in the order in which a user meets them.

Libraries are imported inside each verb, so that `rdtrain --help` answers at once.
"""

import argparse
import io
import os
import signal
import sys
from functools import partial
from pathlib import Path

from .data.commands import add_shard, join_action
from .data.tokenizer_commands import add_tokenizer
from .errors import UserError, disk_is_full, user_errors_as_exit
from .evaluate.arguments import add_evaluate
from .plan.command import add_plan

DESCRIPTION = """\
Train recurrent-depth language models as denoising blocks (DiffusionBlocks), compare them with
backpropagation through time, and export them for K-iteration text generation.

From text to text:
  rdtrain corpus data/corpus                                  (or --text my_book.txt more/*.jsonl.gz)
  rdtrain tokenizer train data/corpus/train.jsonl --output data/tokenizer --vocab-size 4096
  rdtrain shard data/corpus/train.jsonl --tokenizer data/tokenizer --output data/shards/train
  rdtrain shard data/corpus/validation.jsonl --tokenizer data/tokenizer --output data/shards/validation
  rdtrain plan configs/quickstart.yaml engine.zero_stage=1 --gpus 1 8 (what it would need on GPUs, and cost)
  deepspeed launch/train.py --config configs/quickstart.yaml  (or, in one process, rdtrain train --config ...)
  rdtrain watch runs/quickstart/blocks                        (from another terminal)
  rdtrain bench configs/quickstart.yaml --compare blocks truncated    (what a step costs, before or after)
  rdtrain compare runs/quickstart/blocks runs/quickstart/bptt --output runs/quickstart
  rdtrain evaluate runs/quickstart/blocks runs/quickstart/bptt --shards data/shards/validation --output runs/quickstart/evaluation
  rdtrain export runs/quickstart/blocks --output runs/quickstart/model
  rdtrain generate runs/quickstart/model --prompt "Returns the"
"""


def main() -> None:
    """Entry point of the `rdtrain` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(errors="backslashreplace")  # names of files and texts may hold what the terminal cannot show
    arguments = build_parser().parse_args(join_action(sys.argv[1:]))
    with user_errors_as_exit():
        try:
            code = arguments.run(arguments) or 0
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes what is left when it ends
            code = 128 + signal.SIGPIPE
        except OSError as error:
            if not disk_is_full(error):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise UserError(
                f"the disk is full that the output goes to ({error.strerror}): free some of it, and start the same command again"
            ) from error
        raise SystemExit(code)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; what it gives has the verb's function as `run`."""
    parser = argparse.ArgumentParser(
        prog="rdtrain", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`rdtrain VERB --help` explains each verb.",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    jobs = (
        _add_corpus, partial(add_tokenizer, add_verb=_verb), partial(add_shard, add_verb=_verb), add_plan, _add_train, _add_watch,
        _add_bench, _add_checkpoint, _add_compare, partial(add_evaluate, add_verb=_verb), _add_export, _add_generate,
    )
    for add in jobs:
        add(verbs)
    return parser


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


def _add_train(verbs) -> None:
    parser = _verb(
        verbs, "train", _train, "train, or continue, a run in this process",
        "The same as launch/train.py, of which `deepspeed`, `torchrun` or `srun` start several processes. Started again with the same "
        "config, a run continues from its last checkpoint.",
    )
    add_train_arguments(parser)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of training, shared by `rdtrain train` and launch/train.py."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", type=Path, help="YAML file of settings; without it the defaults hold")
    source.add_argument(
        "--like", type=Path, metavar="RUN",
        help="repeat a run from its own record, in the folder RUN-again or run.folder; says what is not as it was then",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's")
    parser.add_argument("--print-config", action="store_true", help="print every setting with its value, and stop")
    parser.add_argument(
        "--print-deepspeed-config", action="store_true",
        help="print the DeepSpeed config that follows from the settings, for as many processes as have been started, as JSON, and stop",
    )
    parser.add_argument(
        "--dry-run", action="store_true",
        help="check config, data and folder, print what the run will need (parameters, FLOPs, memory, traffic, disk), and stop with code 2 "
        "if a start would be refused; no GPU is touched and nothing is written",
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run and --print-deepspeed-config: for N processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="with the same two: on such processes (default: as on this machine)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers pass it; the environment says the same


def _train(arguments) -> int:
    from .config import config_to_yaml, load_config

    if arguments.like is not None:
        from .run_folder import config_like

        config = config_like(arguments.like, arguments.overrides)
    else:
        config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config_to_yaml(config), end="")
        return 0
    if arguments.dry_run:
        return _dry_run(config, arguments.world_size, arguments.device)
    if arguments.print_deepspeed_config:
        print(_deepspeed_config(config, arguments.world_size, arguments.device))
        return 0
    if arguments.world_size is not None or arguments.device is not None:
        raise UserError(
            "--world-size and --device belong to --dry-run and --print-deepspeed-config: leave them out, as the launcher decides how many "
            "processes there are"
        )
    from .distributed import end_process
    from .train import train

    code = train(config)
    end_process(code)
    return code


def _world(world_size: int | None, device: str | None):
    """The world that has been started or, where something of it is given, rank 0 of one that need not exist."""
    import torch

    from .distributed import World, present_device

    if world_size is None and device is None:
        return World.from_environment()
    if world_size is not None and world_size < 1:
        raise UserError(f"--world-size must be at least 1, and it is {world_size}: give the number of processes")
    return World(0, world_size or 1, 0, torch.device(device or present_device()))


def _dry_run(config, world_size: int | None, device: str | None) -> int:
    from .dry_run import dry_run

    table, refusals = dry_run(config, _world(1 if world_size is None else world_size, device))
    print(table)
    if refusals:
        raise UserError("; ".join(refusals))
    return 0


def _deepspeed_config(config, world_size: int | None, device: str | None) -> str:
    import json

    from .engine import deepspeed_config

    if config.engine.name != "deepspeed":
        raise UserError(f"engine.name={config.engine.name} has no DeepSpeed config: set engine.name=deepspeed")
    world = _world(world_size, device)
    accumulation = config.batch.accumulation(world.size)
    values = deepspeed_config(
        config.engine, config.optimizer, config.batch.micro_sequences, accumulation, world.size, world.device
    )
    return json.dumps(values, indent=2)


def train_main() -> None:
    """What launch/train.py runs in each process."""
    parser = argparse.ArgumentParser(
        description="One process of a training run; start it with `deepspeed launch/train.py --config FILE`, `torchrun` or `srun`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_train_arguments(parser)
    with user_errors_as_exit():
        raise SystemExit(_train(parser.parse_args()))


def _add_watch(verbs) -> None:
    parser = _verb(
        verbs, "watch", _watch, "see runs in the terminal while they train, or afterwards",
        "Shows progress, losses, the loss of each iteration, speed and memory of a run, or a line for each of several, from what they "
        "write in their folders. It ends when they have ended, or with Ctrl-C, which leaves them alone.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--once", action="store_true", help="show them as they are now and stop, as where the output is no terminal")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also write what is shown first as a picture")


def _watch(arguments) -> None:
    from .terminal_view import watch_runs

    if not 0 < arguments.interval <= 86400:  # nor more than Python can wait, nor NaN
        raise UserError(f"--interval must be above 0 and a day at the most, and it is {arguments.interval}: give seconds")
    watch_runs(arguments.runs, arguments.interval, arguments.once, arguments.svg)


def _add_bench(verbs) -> None:
    parser = _verb(
        verbs, "bench", _bench, "measure what a training step costs, in time and memory",
        "Makes some steps of a config, those of training, and says how long they take, what share of the device's speed that is, what "
        "bounds them, and where the memory goes; nothing is learned or saved. With --compare it does so for denoising blocks and the "
        "baselines one after another, with --sweep for several values of a setting. docs/performance.md says what each number means.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's; before the options")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=5, help="steps before these")
    parser.add_argument(
        "--tokens", choices=("random", "shards"), default="random", help="what is read: random tokens, or the shards that the config names"
    )
    parser.add_argument("--vocab-size", type=int, help="tokens of the vocabulary, with random ones (default: that of the config's shards)")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="ARM",
        help="the config with these objectives, with ratios to the first: blocks (the config's own, if it has them), one_pass, truncated "
        "(24 iterations without gradient and 8 with it, of 32), full or local (backpropagation through time). Overrides of an arm's own "
        "go between its quotes: \"truncated objective.activation_checkpointing=true\"",
    )
    parser.add_argument(
        "--sweep", nargs="+", default=[], metavar="section.key=A,B",
        help="with each of these values; further keys go along: batch.micro_sequences=1,2,4 batch.global_sequences=1,2,4",
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FOLDER",
        help="write a trace for chrome://tracing or perfetto.dev and, on CUDA, a memory snapshot for pytorch.org/memory_viz, and list the "
        "ten costliest kernels",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write bench.json there and, of a sweep, sweep.png")
    parser.add_argument("--resume", action="store_true", help="keep the measurements that the output folder has")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="begin no further measurement once they are over; --resume makes what is left"
    )


def _bench(arguments) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler would tell whenever it starts and stops

    from .bench.command import BenchSettings, bench
    from .bench.measure import Effort
    from .config import load_config

    effort = Effort(arguments.warmup, arguments.steps, arguments.tokens == "shards", arguments.profile)
    names = ("compare", "sweep", "vocab_size", "output", "resume", "budget")
    settings = BenchSettings(effort, **{name: getattr(arguments, name) for name in names})
    text = bench(load_config(arguments.config, arguments.overrides), settings)
    if text is not None:
        print(text)


def _add_checkpoint(verbs) -> None:
    actions = verbs.add_parser("checkpoint", help="check checkpoints", description="The checkpoints of a run.").add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    parser = _verb(
        actions, "verify", _checkpoint_verify, "check every file of a checkpoint against its size and checksum",
        "Prints a line for each checkpoint; the exit code is 1 when one of them is damaged.",
    )
    parser.add_argument("folder", type=Path, help="a run folder (all its checkpoints) or a checkpoint folder")


def _checkpoint_verify(arguments) -> int:
    from .checkpoint_storage import checkpoint_folder, checkpoint_steps, find_damage

    if not arguments.folder.is_dir():
        raise UserError(f"there is no folder {arguments.folder}: give a run folder or one of its checkpoints/step-* folders")
    folders = [checkpoint_folder(arguments.folder, step) for step in checkpoint_steps(arguments.folder)] or [arguments.folder]
    damages = [find_damage(folder) for folder in folders]
    for folder, damage in zip(folders, damages):
        print(f"{folder}: whole" if damage is None else f"{folder}: damaged ({damage})")
    return int(any(damages))


def _add_compare(verbs) -> None:
    parser = _verb(
        verbs, "compare", _compare, "report runs side by side, or train them first",
        "Of run folders, writes report.md, report.html (one file), report.json and plots: what it takes the first run to reach what the "
        "others end with, what a token costs, speed, memory, and held-out NLL against training FLOPs and time. Of an experiment file "
        "(configs/experiments/quickstart.yaml is one, and explains itself), first measures, trains and evaluates its arms for the same "
        "budget; started again, it goes on.",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or one experiment file (.yaml)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")


def _compare(arguments) -> None:
    from .compare.experiment import run_experiment
    from .compare.report import compare

    experiments = [path for path in arguments.runs if path.suffix in (".yaml", ".yml") and not path.is_dir()]
    if experiments and len(arguments.runs) > 1:
        raise UserError("an experiment file says what is compared: give it alone, or run folders alone")
    print(run_experiment(experiments[0], arguments.output) if experiments else compare(arguments.runs, arguments.output))


def _add_export(verbs) -> None:
    parser = _verb(
        verbs, "export", _export, "turn a checkpoint into a folder that generates text on its own",
        "The folder holds safetensors weights, config, tokenizer and the model's own source files; it needs torch, safetensors and "
        "the tokenizer's library, and nothing of rdtrain. transformers 5 loads it too (trust_remote_code=True).",
    )
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest checkpoint) or a checkpoint folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--shard-gigabytes", type=float, default=5.0, help="how large a file of weights may become (default: 5)")
    _add_overwrite(parser)


def _export(arguments) -> None:
    from .export import export

    if not arguments.shard_gigabytes > 0:
        raise UserError(f"--shard-gigabytes must be positive, and it is {arguments.shard_gigabytes}: leave it out for 5")
    export(arguments.checkpoint, arguments.output, arguments.overwrite, 1e9 * arguments.shard_gigabytes)


def _add_generate(verbs) -> None:
    parser = _verb(
        verbs, "generate", _generate, "generate text with an exported folder",
        "Becomes the exported folder's own program, with the arguments that follow the folder; `rdtrain generate FOLDER --help` lists "
        "them.",
    )
    parser.add_argument("folder", type=Path, help="an exported folder")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on: --prompt, --interactive, --jsonl IN OUT, --iterations ...")


def _generate(arguments) -> None:
    if not all((arguments.folder / name).is_file() for name in ("__main__.py", "configuration_rdtrain.py")):  # what others have is not run
        raise UserError(f"{arguments.folder} is not an exported model: make one with `rdtrain export RUN --output FOLDER`")
    os.execv(sys.executable, [sys.executable, str(arguments.folder), *arguments.arguments])  # so that signals reach the program


if __name__ == "__main__":
    main()
