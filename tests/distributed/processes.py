"""What the scripts of this folder share: each is one of several processes that a launcher starts, and holds engines to a plain loop.

They run on GPUs where each process has one of its own, else on the CPU with gloo (`ranks` in tests/conftest.py decides).
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from rdtrain.distributed import World, end_process
from rdtrain.engine import EngineSettings, deepspeed_config, start_processes
from rdtrain.optimization import OptimizerSettings
from rdtrain.randomness import SampleRandom

ARGUMENTS = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
WORLD = World.from_environment()
DEVICE = WORLD.device
if DEVICE.type == "cuda":  # what is held to the bit must be added up in one order
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
ALONE = World(0, 1, 0, DEVICE)
RATE, SEED, VOCABULARY = 3e-3, 1301, 50
BUCKET = 1_000_002
sys.modules[deepspeed_config.__module__].BUCKET = BUCKET  # dozens of engines in a process would fill a GPU with real ones
WAIT = 20
"""Seconds within which a case must fail on all ranks where it fails on one: otherwise some wait in a collective call."""


def micro_batch(indices: range, step: int, length: int = 8) -> tuple[Tensor, SampleRandom]:
    """Tokens [B, length + 1] of these samples, the same in every process, and their random numbers."""
    rows = [torch.randint(VOCABULARY, (length + 1,), generator=torch.Generator().manual_seed(index)) for index in indices]
    return torch.stack(rows).to(DEVICE), SampleRandom(SEED, indices, DEVICE, step)


def drawn(step: int) -> SampleRandom:
    """What a whole step draws from."""
    return SampleRandom(SEED, (), DEVICE, step)


def plain_adamw(parameters: Iterable[Tensor], embedding: Tensor, optimizer: OptimizerSettings) -> torch.optim.AdamW:
    """torch's own, as the settings have it: no decay of norms, and a rate of its own for the embedding."""
    groups = {"matrices": [], "norms": [], "embedding": []}
    for parameter in parameters:
        groups["embedding" if parameter is embedding else "matrices" if parameter.dim() > 1 else "norms"].append(parameter)
    settings = {
        "matrices": {"weight_decay": optimizer.weight_decay},
        "norms": {"weight_decay": 0.0},
        "embedding": {"weight_decay": optimizer.weight_decay, "lr": optimizer.learning_rate * optimizer.embedding_scale},
    }
    return torch.optim.AdamW(
        [{"params": members, **settings[name]} for name, members in groups.items() if members],
        lr=optimizer.learning_rate, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon,
    )


def copy_of_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def norms_by_part(gradients: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """What an engine's `norms_by_part` must be, from whole gradients (unclipped) and the weights before and after a step, by name."""
    words = {
        "embedding": ["embedding"], "prelude": ["prelude_layers"], "core": ["cores"],
        "coda": ["coda_layers", "final_norm", "core_norm", "core_scale"], "conditioning": ["noise_embedding", "estimate_adapter"],
    }
    right = {"gradient_norm_by_part": {}, "update_size_by_part": {}}
    for part, first_words in words.items():
        names = [name for name in gradients if name.split(".")[0] in first_words]
        if names:
            gradient, update, weight = (
                torch.cat([of[name].double().flatten() for name in names]).norm().item()
                for of in (gradients, {name: after[name].double() - before[name].double() for name in names}, after)
            )
            right["gradient_norm_by_part"][part], right["update_size_by_part"][part] = gradient, update / weight
    return right


def assert_norms_by_part(found: dict, right: dict, where: str, tolerance: float = 1e-3) -> None:
    for kind, values in right.items():
        assert found[kind].keys() == values.keys(), f"{where}: {kind} has {list(found[kind])}"
        off = [part for part, value in values.items() if not abs(found[kind][part] - value) <= tolerance * value]
        assert not off, f"{where}: {kind} of {' and '.join(off)}: {found[kind]}, not {values}"


def mean_of_ranks(values: list[float], world: World) -> float:
    """The mean of all ranks' values, as many on each."""
    return world.sum(torch.tensor(sum(values) / len(values) / world.size, device=DEVICE)).item()


def whole_snapshot(engine, world: World) -> dict[str, Tensor]:
    """The snapshot of the whole run, put together from all ranks' shares, of which none may overlap."""
    shares = world.gather(engine.snapshot())
    whole = {name: tensor for share in shares for name, tensor in share.items()}
    assert len(whole) == sum(map(len, shares))
    return whole


def largest_difference(found: dict[str, Tensor], right: dict[str, Tensor], scale: Callable[[str], float] = lambda name: 1.0) -> float:
    """Of any element; divided by the scale of its tensor's name. 0 where nothing was found, as on ranks that gather no weights."""
    return max(((tensor.cpu().float() - right[name].cpu()).abs().max().item() / scale(name) for name, tensor in found.items()), default=0.0)


def fails_everywhere(case: str) -> bool:
    """Note that a case has failed on this rank; whether it does on all, so that the next one finds none of them in a collective call."""
    noted = [Path(ARGUMENTS[0]) / f"failed-{rank}.txt" for rank in range(WORLD.size)]
    with noted[WORLD.rank].open("a") as file:
        print(case, file=file)
    until = time.monotonic() + WAIT
    while not all(path.exists() and case in path.read_text().splitlines() for path in noted):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def run_cases(cases: Iterable[str], check: Callable[[str, World], str | None], engine: str = "deepspeed") -> None:
    """Check each case, those of engine torch on rank 0 alone, and write a line into right.txt, in the first argument's folder, for each
    that was right: its name and what `check` says. Those that are there already are left out, so a long campaign may be started again.
    Past an assertion that fails on all ranks the next cases are checked, and the process ends with code 1 and what has failed.
    engine: of those that the processes are to be started for.
    """
    folder, failed = Path(ARGUMENTS[0]), []
    (folder / f"failed-{WORLD.rank}.txt").unlink(missing_ok=True)  # an earlier start's
    start_processes(EngineSettings(engine), WORLD)
    notes = folder / "right.txt"
    done = {line.partition(":")[0] for line in notes.read_text().splitlines()} if notes.exists() else ()
    for case in cases:
        alone = case.startswith("torch")
        if case in done or (alone and not WORLD.is_main):
            continue
        try:
            said = check(case, ALONE if alone else WORLD)
        except AssertionError as error:
            traceback.print_exc()
            failed.append(f"{case}: {str(error).removeprefix(f'{case}: ')}")
            if not alone and not fails_everywhere(case):
                raise
            continue
        if WORLD.is_main:
            with notes.open("a") as file:
                print(case + (f": {said}" if said else ""), file=file)
    if WORLD.is_main and failed:
        print(f"{len(failed)} failed", *failed, sep="\n", file=sys.stderr)
    end_process(1 if failed else 0)
