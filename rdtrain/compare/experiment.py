"""An experiment: arms of one config, trained for the same budget and compared, all from one YAML file.

    config: quickstart.yaml                # of all arms; paths count from this file
    arms:                                  # name: overrides of its own; the first is what the others are compared with
      denoising blocks: []
      truncated BPTT: [objective.name=bptt, optimizer.learning_rate=4e-3]
    seeds: [0, 1]                          # of each arm; [0] if left out
    budget: {training_flops: 1.2e13}       # or {seconds: 120}: of each run; with validation_nll: 4.5, until it has come down to that
    launcher: [deepspeed, --num_gpus, "2", --, launch/train.py]    # one process of `rdtrain train` if left out
    devices: ["0", "1"]                    # runs side by side, each with this in CUDA_VISIBLE_DEVICES; one after another if left out
    evaluate: [--prompts, "200"]           # options of `rdtrain evaluate`, made of the first seed's runs; none if left out

Everything goes into the output folder: a run's folder and log by its name, bench/ARM with time and memory of a step, evaluation/, and the
report. Started again it goes on: runs continue, and what is complete stays. Notable: a budget of seconds becomes a number of steps, by the
time that a step takes in bench/ARM, since the learning rate must know where the run ends.
"""

import argparse
import dataclasses
import io
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path

from ..config import Config, build, config_to_yaml, load_config, override, read_yaml
from ..data.output import report_folder, write_atomically
from ..data.shards import ShardReader
from ..errors import UserError
from ..evaluate.arguments import add_arguments, settings_of
from ..tables import bytes_text, markdown_lines
from .plots import plot_parts
from .report import compare
from .samples import side_by_side

RDTRAIN = [sys.executable, "-m", "rdtrain.cli"]


@dataclass
class Budget:
    """What each run may spend, in one of two units.

    training_flops: floating-point operations. seconds: of training, without compilation. validation_nll: a run ends sooner, at its first
    evaluation with this held-out NLL.
    """

    training_flops: float | None = None
    seconds: float | None = None
    validation_nll: float | None = None

    def __post_init__(self):
        """ValueError for none, both, or what is not positive."""
        if (self.training_flops is None) == (self.seconds is None):
            raise ValueError("one of training_flops and seconds must be given, and not both")
        if not (self.training_flops or self.seconds) > 0:
            raise ValueError("it must be positive")


@dataclass
class Experiment:
    """The file's fields, see above."""

    config: str
    arms: dict[str, list[str]]
    budget: Budget
    seeds: list[int] = field(default_factory=lambda: [0])
    launcher: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)

    def __post_init__(self):
        """ValueError for nothing to compare, and names that are no folders."""
        if len(self.arms) < 2 or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a comparison needs two arms and different seeds")
        wrong = [name for name in self.arms if folder_name(name) in ("", "bench", "evaluation")]
        if wrong or len(set(map(folder_name, self.arms))) < len(self.arms):
            names = ", ".join(self.arms)
            raise ValueError(f"arms need names of their own, in letters, other than bench and evaluation, and they are {names}")


@dataclass
class Run:
    """One run of an experiment. arm: its name; first: whether its seed is the first one."""

    arm: str
    first: bool
    config: Config

    @property
    def folder(self) -> Path:
        """Where it trains."""
        return Path(self.config.run.folder)


def folder_name(name: str) -> str:
    """The name of an arm as that of a folder."""
    words = "".join(letter if letter.isalnum() or letter in "-_." else " " for letter in name.lower())
    return "-".join(words.split()).strip(".-")


def load_experiment(path: Path) -> Experiment:
    """The experiment in a file. UserError for anything wrong with it."""
    return build(Experiment, read_yaml(path), "", str(path))


def run_experiment(path: Path, output: Path) -> str:
    """Train, measure and evaluate what is not there yet, and write the report; returns its text. UserError for what a user can mend."""
    experiment = load_experiment(path)
    _refuse_wrong_commands(path, experiment)
    report_folder(output)
    configs = {arm: load_config(path.parent / experiment.config, overrides) for arm, overrides in experiment.arms.items()}
    _refuse_different_shards(path, configs)
    measured = {arm: _measure(arm, config, output, experiment) for arm, config in configs.items()}
    runs = [
        Run(arm, seed == experiment.seeds[0], _for_budget(arm, config, seed, experiment, measured[arm], output))
        for seed in experiment.seeds for arm, config in configs.items()
    ]
    _train_all(runs, experiment)
    more = _step_table(measured, output)
    if experiment.evaluate:
        more += _evaluated([run for run in runs if run.first], output, experiment)
    return compare([run.folder for run in runs], output, more)


def _refuse_wrong_commands(path: Path, experiment: Experiment) -> None:
    """UserError for a launcher that is not here, and for options that `rdtrain evaluate` would refuse once all runs have trained."""
    if experiment.launcher and shutil.which(experiment.launcher[0]) is None:
        raise UserError(f"'launcher' in {path} begins with {experiment.launcher[0]}, and there is no such command: correct or install it")
    if experiment.evaluate:
        parser, words, said = argparse.ArgumentParser(add_help=False), ["RUN", "--output", "FOLDER", "--shards", "SHARDS"], io.StringIO()
        add_arguments(parser)
        try:
            with redirect_stderr(said):
                arguments = parser.parse_args([*words, *experiment.evaluate])
        except SystemExit:
            reason = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
            raise UserError(f"'evaluate' in {path} holds what `rdtrain evaluate` does not take ({reason}): correct it") from None
        settings_of(arguments).check()


def _refuse_different_shards(path: Path, configs: dict[str, Config]) -> None:
    """UserError for arms whose validation shards differ, which the comparison would find once all runs have trained."""
    arms = {ShardReader(config.data.validation).content_hash: arm for arm, config in configs.items()}
    if len(arms) > 1:
        names = " and ".join(list(arms.values())[:2])
        raise UserError(f"{names} in {path} have different validation shards, so that their held-out NLLs would say nothing about each "
                        "other: give all arms one data.validation")


def _measure(arm: str, config: Config, output: Path, experiment: Experiment) -> dict:
    """What `rdtrain bench` finds of an arm, or has found."""
    folder = output / "bench" / folder_name(arm)
    file, known = folder / "bench.json", folder / "config.yaml"
    text = config_to_yaml(config)
    if _read(file) is None or not (known.exists() and known.read_text(errors="replace") == text):
        print(f"measuring a step of {arm}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        write_atomically(known, text)
        device = experiment.devices[:1]
        _call([*RDTRAIN, "bench", str(known), "--output", str(folder)], folder / "bench.log", device[0] if device else None)
    return json.loads(file.read_text())["measurements"][0]


def _read(file: Path) -> object:
    """What a JSON file holds; None where there is none, or one that cannot be read, as a machine that went down may leave it."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _for_budget(arm: str, config: Config, seed: int, experiment: Experiment, measured: dict, output: Path) -> Config:
    budget, name = experiment.budget, arm if len(experiment.seeds) == 1 else f"{arm}, seed {seed}"
    if budget.training_flops is not None:
        length = ["schedule.steps=null", f"schedule.training_flops={budget.training_flops}"]
    else:
        if measured["out_of_memory"]:
            raise UserError(f"a step of {arm} runs out of memory: lower its batch.micro_sequences, or see `rdtrain plan` for what fits")
        steps = max(1, int(budget.seconds / measured["step_seconds"]["typical"]))
        length = ["schedule.training_flops=null", f"schedule.steps={steps}"]
    if budget.validation_nll is not None:
        length.append(f"schedule.until_nll={budget.validation_nll}")
    config = override(config, [f"run.seed={seed}", *length])
    run = dataclasses.replace(config.run, name=name, folder=str(output / folder_name(name)))
    return dataclasses.replace(config, run=run)


def _train_all(runs: list[Run], experiment: Experiment) -> None:
    """One after another, or one on each device at a time. UserError, once those under way have ended, where one has failed."""
    devices = queue.SimpleQueue()
    for device in experiment.devices or [None]:
        devices.put(device)
    command = experiment.launcher or [*RDTRAIN, "train"]

    def train(run: Run) -> None:
        file, log = (run.folder.with_name(run.folder.name + ending) for ending in (".yaml", ".log"))
        write_atomically(file, config_to_yaml(run.config))
        device = devices.get()
        try:
            print(f"training {run.config.run.name}, see {log} or `{shlex.join(['rdtrain', 'watch', str(run.folder)])}`", flush=True)
            _call([*command, "--config", str(file)], log, device)
        finally:
            devices.put(device)

    if len(experiment.devices) < 2:
        for run in runs:
            train(run)
        return
    with ThreadPoolExecutor(len(experiment.devices)) as pool:
        jobs = [pool.submit(train, run) for run in runs]
        for job in jobs:
            try:
                job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _call(command: list[str], log: Path, device: str | None) -> None:
    """Run a command with its output in a file. UserError with its last line where it fails."""
    environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    with log.open("ab") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        lines = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
        said = next((line for line in reversed(lines) if line.startswith("rdtrain: ")), lines[-1] if lines else "nothing was said")
        raise UserError(f"`{shlex.join(command)}` ended with code {code} ({said.removeprefix('rdtrain: ')}): see {log}, and start again")


def _step_table(measured: dict[str, dict], output: Path) -> str:
    """Time and memory of a step of each arm, as Markdown; writes the plot of the memory, memory-by-kind.png."""
    kinds = ("peak", "weights", "gradients", "optimizer_state", "activations")
    memory = {
        arm: {kind.replace("_", " "): (found["memory"].get(kind) or 0) / 2**20 for kind in kinds}
        for arm, found in measured.items() if not found["out_of_memory"]
    }
    if memory:
        plot_parts(memory, "MiB", "Memory of a step, by kind", output / "memory-by-kind.png", add_up=False)
    header = ["arm", "ms a step", "tokens/s", "MFU", "busy ms", "host ms", *(kind.replace("_", " ") for kind in kinds)]
    rows = []
    for arm, found in measured.items():
        if found["out_of_memory"]:
            rows.append([arm, "out of memory", *[""] * (len(header) - 2)])
            continue
        seconds = [found["step_seconds"]["typical"], found["busy_seconds"], found["enqueue_seconds"]]
        step, busy, host = ("-" if each is None else f"{1000 * each:.1f}" for each in seconds)
        mfu = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
        sizes = ["-" if each is None else bytes_text(each) for each in (found["memory"].get(kind) for kind in kinds)]
        rows.append([arm, step, f"{found['tokens_per_second']:,.0f}", mfu, busy, host, *sizes])
    by = "By `rdtrain bench`, in one process; its documentation says what each column is."
    lines = ["## A step", "", *markdown_lines(header, rows), "", by, ""]
    plot = ["![memory of a step, by kind](memory-by-kind.png)", ""] if memory else []
    return "\n".join(["", *lines, *plot])


def _evaluated(runs: list[Run], output: Path, experiment: Experiment) -> str:
    """`rdtrain evaluate`'s report of the runs, as a part of this one; made where it is not there, or was asked for with other options."""
    folder, known = output / "evaluation", output / "evaluation.json"
    words = ["evaluate", *(str(run.folder) for run in runs), "--shards", runs[0].config.data.validation, "--output", str(folder)]
    words += experiment.evaluate
    if _read(known) != words:
        print(f"evaluating {', '.join(run.config.run.name for run in runs)}", flush=True)
        device = (experiment.devices or [None])[0]
        _call([*RDTRAIN, *words, *(["--overwrite"] if folder.exists() else [])], output / "evaluation.log", device)
        write_atomically(known, json.dumps(words) + "\n")
    text = (folder / "report.md").read_text(encoding="utf-8").replace("](", "](evaluation/")
    text = "\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines())
    return f"\n{text}\n{side_by_side(sorted(folder.glob('samples-*.jsonl')))}"
