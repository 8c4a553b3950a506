"""One process of one or several: the same real steps under one layout after another, and the loss of each step, as JSON.

The same samples, noise and first weights, whatever the layout and the number of ranks; so losses differ by rounding alone.
"""

import argparse
import json
from contextlib import closing
from pathlib import Path

import torch

from ..config import Config, load_config, override
from ..data.loader import rank_indices, read_ahead
from ..data.mixture import open_loader
from ..data.output import write_atomically
from ..distributed import World, end_process
from ..engine import build_engine, start_processes
from ..errors import user_errors_as_exit
from ..faults import StepJudge
from ..metrics import MetricSums
from ..model.recurrent import RecurrentDepthLM
from ..optimization import learning_rate
from ..plan.costing import batch_for
from ..preparation import objective_and_model
from ..randomness import SampleRandom
from ..run_folder import start_facts
from ..train import run_step
from .jobs import LAYOUTS

REFERENCE = "plain fp32"
"""What all are held to; its bf16 is `plain`."""


def run(config: Config, steps: int, world: World) -> list[float]:
    """The loss of each of the first steps of a config, mean over the ranks. Collective."""
    config, _ = batch_for(config, world.size)
    data, batch, seed = config.data, config.batch, config.run.seed
    loader = open_loader(data.train, data.mixture, data.rows, data.sequence_length, seed)
    objective, shape = objective_and_model(config, world, loader.reader.vocab_size, loader.reader.manifest["bos_id"])
    start_processes(config.engine, world)
    torch.manual_seed(seed)
    with world.device:
        model = RecurrentDepthLM(shape)
    engine = build_engine(
        config.engine, model, objective, config.optimizer, batch.micro_sequences, batch.accumulation(world.size), world
    )
    judge, sums, losses = StepJudge(config.faults, config.model.blocks, world), MetricSums(), []

    def read(step: int) -> list:
        shares = rank_indices(step, batch.global_sequences, world.size, world.rank, batch.micro_sequences)
        return [(share, loader.batch(share)) for share in shares]

    with closing(read_ahead(read, 0, steps)) as batches:
        for step, micro_batches in enumerate(batches):
            of_step = SampleRandom(seed, (), world.device, step)
            rate = learning_rate(step, steps, config.optimizer, config.schedule)
            run_step(engine, objective, micro_batches, rate, of_step, seed, step, world, judge, sums)
            losses.append(sums.means(world)["loss"])
            judge.read(last_too=True)
    engine.close()
    return losses


def main() -> None:
    """Write the losses by layout to the file that is given, on rank 0."""
    parser = argparse.ArgumentParser(prog="python -m rdtrain.scaling.losses", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings of all layouts; before the options")
    parser.add_argument("--layouts", nargs="+", required=True, metavar="LAYOUT", help=f"of {', '.join([*LAYOUTS, REFERENCE])}")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    with user_errors_as_exit():
        world = World.from_environment()
        base = load_config(options.config, [*options.settings, "engine.compile=false", "engine.precision=bf16"])
        losses = {}
        for layout in options.layouts:
            words = LAYOUTS[layout.removesuffix(" fp32")].split() + ["engine.precision=fp32"] * layout.endswith(" fp32")
            losses[layout] = run(override(base, words), options.steps, world)
        if world.is_main:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            facts = {"config": str(options.config), "settings": options.settings, "steps": options.steps, "ranks": world.size}
            facts |= {"facts": start_facts(world.device.type), "losses": losses}
            write_atomically(options.output, json.dumps(facts, indent=1) + "\n")
        end_process(0)


if __name__ == "__main__":
    main()
