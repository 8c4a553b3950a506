"""The command `rdtrain plan`: arms of a config side by side on any numbers of GPUs, as tables and as JSON."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ..errors import UserError

DESCRIPTION = """\
Says, by arithmetic alone, what a config would need and cost on so many GPUs of a kind, as denoising blocks and as
backpropagation through time side by side: memory by kind, the largest micro-batch that fits, traffic, time and price;
and where it does not fit, the nearest config that does. Nothing runs, and no GPU is needed. All arms train on as many
tokens, or, where the config's schedule is training_flops and no --tokens are given, for as many FLOPs; what an arm
learns of either is another matter (docs/results/quality.md).

  rdtrain plan configs/1b.yaml batch.global_sequences=1024 engine.name=deepspeed engine.compile=false \\
      --vocab-size 32768 --gpus 8 64 512 --tokens 1e11 --price 2.5
"""


def add_plan(verbs) -> None:
    """The verb and its arguments."""
    from ..hardware import GPUS, NETWORK

    parser = verbs.add_parser(
        "plan", help="what a run would need and cost on any number of GPUs", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_plan)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's; before the options")
    parser.add_argument("--gpu", choices=[gpu.name for gpu in GPUS], default="h200", help="kind of GPU (h200)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512], metavar="N", help="numbers of GPUs (1 8 64 512)")
    parser.add_argument("--tokens", type=float, help="tokens to train on, for example 1e11 (as the config's schedule says)")
    parser.add_argument(
        "--compare", nargs="+", default=["blocks", "truncated", "full"], metavar="ARM",
        help="arms as in `rdtrain bench --compare` (blocks truncated full)",
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4,
        help="share of the speed on paper that is reached; `rdtrain bench` measures it, as HFU (0.4)",
    )
    parser.add_argument("--price", type=float, help="of a GPU for an hour, in any currency")
    parser.add_argument(
        "--vocab-size", type=int,
        help="tokens of the vocabulary (that of the config's shards); no shards are read then, and rows of documents are taken as full",
    )
    parser.add_argument(
        "--reserve", type=float, default=4.0, metavar="GIB", help="memory of a GPU that tensors cannot have: CUDA, NCCL, gaps (4)"
    )
    parser.add_argument("--network", type=float, default=NETWORK, metavar="GB/S", help=f"what a GPU sends to other nodes ({NETWORK:g})")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers there, as JSON")


def _plan(arguments) -> None:
    from ..bench.arms import cases
    from ..config import load_config
    from ..data.output import write_atomically
    from ..hardware import GPUS
    from .costing import Cluster, cost
    from .report import report

    _refuse_impossible(arguments)
    config = load_config(arguments.config, arguments.overrides)
    vocab_size, filled = (arguments.vocab_size, 1.0) if arguments.vocab_size else _of_shards(config)
    gpu = next(gpu for gpu in GPUS if gpu.name == arguments.gpu)
    clusters = [Cluster(gpu, count, arguments.reserve, arguments.mfu, arguments.network) for count in arguments.gpus]
    arms = cases(config, arguments.compare, [])
    costs = [cost(case.arm, case.config, vocab_size, cluster, arguments.tokens, filled) for cluster in clusters for case in arms]
    if arguments.output is not None:
        options = {name: getattr(arguments, name) for name in ("tokens", "mfu", "price", "reserve", "network")}
        facts = {"config": asdict(config), "vocab_size": vocab_size, "filled": filled, "gpu": gpu._asdict(), **options}
        write_atomically(arguments.output, json.dumps(facts | {"costs": [asdict(row) for row in costs]}, indent=1) + "\n")
    print(report(costs, config, vocab_size, filled, clusters[0], arguments.price))


def _refuse_impossible(arguments) -> None:
    from ..hardware import GPUS

    for name, number in (("--tokens", arguments.tokens), ("--price", arguments.price), ("--network", arguments.network),
                         ("--vocab-size", arguments.vocab_size), ("--gpus", min(arguments.gpus))):
        if number is not None and not 0 < number < 1e30:
            raise UserError(f"{name} must be positive, and it is {number}: give what the run would have")
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu is a share of the speed on paper, and it is {arguments.mfu}: give one in (0, 1], for example 0.4")
    memory = next(gpu.memory for gpu in GPUS if gpu.name == arguments.gpu)
    if not 0 <= arguments.reserve < memory:
        raise UserError(f"--reserve is a part of the GPU's {memory:g} GiB, and it is {arguments.reserve}: give GiB in [0, {memory:g})")


def _of_shards(config) -> tuple[int, float]:
    """Tokens of the vocabulary, and the share of a sequence's positions that train."""
    from ..data.mixture import open_loader

    data = config.data
    try:
        loader = open_loader(data.train, data.mixture, data.rows, data.sequence_length, config.run.seed)
    except UserError as error:
        raise UserError(f"the number of tokens in the vocabulary is not known, as {error}; or give --vocab-size") from None
    return loader.reader.vocab_size, getattr(loader, "filled", 1.0)
