"""Every setting of a run: typed dataclasses, a YAML file, and `section.key=value` on the command line.

Each section's dataclass sits beside the code that it configures; this file composes them, and turns whatever is wrong with a
config into one sentence before any work starts. A file may name another as its `base` and then says only what differs.
"""

import dataclasses
import difflib
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from .checkpoint import CheckpointSettings
from .engine import EngineSettings
from .errors import UserError
from .evaluation import EvaluationSettings
from .faults import FaultSettings
from .metrics import LoggingSettings
from .model.noise import NoiseSettings
from .model.recurrent import ModelSettings
from .objectives import ObjectiveSettings
from .optimization import OptimizerSettings, ScheduleSettings
from .yaml_loader import YamlDumper, YamlLoader


@dataclass
class RunSettings:
    """Where the run lives and what it is called.

    folder: everything the run writes goes here; starting again with the same config continues the run.
    name: the arm's name in reports.
    seed: of initialisation, sample order and noise.
    """

    folder: str = "runs/run"
    name: str = "run"
    seed: int = 0

    def __post_init__(self):
        """ValueError for a seed or a folder that cannot be."""
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2^64), and it is {self.seed}")
        if "\0" in self.folder:
            raise ValueError("folder must not hold NUL characters")


@dataclass
class DataSettings:
    """What is read.

    train: shards of `rdtrain shard`: a folder, a zip file or a URL, or several of these, each by a name: {web: FOLDER, code: URL}.
    mixture: how often each source is drawn, {NAME: weight}; only the ratios matter, and what is not named is not read. A name is that of a
        source in the folder, or of one of several folders, or FOLDER/SOURCE for a source in that. Empty: one folder, as one stream.
    change_mixture: a run that is continued may have other weights and more sources than before, from the step where it goes on.
    validation: likewise, but one.
    sequence_length: T, predicted tokens of a sequence.
    rows: what a sequence is: `packed`, T + 1 neighbouring tokens, whatever documents they are of, or `documents`, the first T + 1 tokens of
        one document, padded where it is shorter.
    document_masking: rows=packed only: positions attend to their own document alone, and not to those before it in the sequence.
    """

    train: str | dict[str, str] = "data/shards/train"
    mixture: dict[str, float] = field(default_factory=dict)
    change_mixture: bool = False
    validation: str = "data/shards/validation"
    sequence_length: int = 512
    rows: Literal["packed", "documents"] = "packed"
    document_masking: bool = False

    def __post_init__(self):
        """ValueError for a sequence without tokens, weights that are none, folders that none is of, and what excludes another."""
        if self.document_masking and self.rows == "documents":
            raise ValueError("document_masking belongs to rows=packed, and rows is documents, one in each row: leave it out")
        if self.mixture and self.rows == "documents":
            raise ValueError("mixture belongs to rows=packed, and rows is documents: leave it out, or set data.rows=packed")
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, and it is {self.sequence_length}")
        if self.mixture and (min(self.mixture.values()) < 0 or not any(self.mixture.values())):
            raise ValueError(f"weights of mixture must be 0 or more, and one of them above 0, and they are {self.mixture}")
        if isinstance(self.train, dict) and not self.mixture:
            raise ValueError("train names several folders and mixture gives them no weights: set data.mixture={NAME: WEIGHT, ...}")
        if isinstance(self.train, dict) and not all(name and "/" not in name for name in self.train):
            raise ValueError(f"names of folders in train must not be empty or hold a slash, and they are {', '.join(self.train)}")


@dataclass
class BatchSettings:
    """How many sequences a step sees; accumulation follows from the number of ranks.

    global_sequences: sequences of one optimizer step, over all ranks.
    micro_sequences: sequences that one rank holds at a time.
    """

    global_sequences: int = 64
    micro_sequences: int = 8

    def __post_init__(self):
        """ValueError for an empty batch."""
        if self.global_sequences < 1 or self.micro_sequences < 1:
            raise ValueError("global_sequences and micro_sequences must be at least 1")

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of one rank per step. UserError when the global batch cannot be shared evenly."""
        share = self.micro_sequences * world_size
        if self.global_sequences % share:
            raise UserError(
                f"batch.global_sequences={self.global_sequences} is not a multiple of batch.micro_sequences="
                f"{self.micro_sequences} times {world_size} ranks: choose a multiple of {share}"
            )
        return self.global_sequences // share


@dataclass
class Config:
    """A whole run."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=lambda: ScheduleSettings(steps=1000))
    engine: EngineSettings = field(default_factory=EngineSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    faults: FaultSettings = field(default_factory=FaultSettings)

    def result_settings(self) -> dict:
        """The settings that decide what is computed; a run continues only where these are unchanged.

        Engine, micro-batches, ranks and what layers keep change how a step is computed, and its results by no more than rounding. (To or
        from engine.name=block_parallel, untied blocks go on with the same weights and the same samples, but train side by side or in turn.)
        """
        sections = ("data", "model", "objective", "noise", "batch", "optimizer", "schedule", "engine")
        settings = {name: dataclasses.asdict(getattr(self, name)) for name in sections} | {"seed": self.run.seed}
        del settings["optimizer"]["learning_rate_source"], settings["batch"]["micro_sequences"]
        del settings["objective"]["layer_checkpointing"], settings["objective"]["layer_checkpointing_interval"]
        del settings["data"]["change_mixture"]
        settings["engine"] = {"precision": self.engine.precision}
        return settings


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """A config from a YAML file (or the defaults) and `section.key=value` overrides. UserError for anything wrong with them."""
    tree = read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(tree, override)
    places = [] if path is None else [str(path)]
    if overrides or not places:
        places.append("the command line")
    return build(Config, tree, "", " and ".join(places))


def override(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """A config with `section.key=value` overrides. UserError for anything wrong with them."""
    tree = dataclasses.asdict(config)
    for each in overrides:
        _apply_override(tree, each)
    return build(Config, tree, "", "the command line")


def config_to_yaml(config: Config) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back."""
    return yaml.dump(dataclasses.asdict(config), Dumper=YamlDumper, sort_keys=False)


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The sections of a YAML file, merged over those of its `base`. UserError where it cannot be read."""
    if path.resolve() in seen:
        raise UserError(f"config {path} is its own base: remove the circle of `base:` lines")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist: give the path of a YAML file, for example configs/quickstart.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read ({error}): give the path of a YAML text file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML lets a date that cannot be through as a ValueError
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path} must hold sections such as `model:`, and it holds a {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(read_yaml(path.parent / str(base), (*seen, path.resolve())), tree)


def _merge(under: dict, over: dict) -> dict:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(tree: dict, override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or len(keys) != 2 or not all(keys):
        raise UserError(f"override '{override}' is not of the form section.key=value, for example optimizer.learning_rate=3e-4")
    try:
        value = yaml.load(text, YamlLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    section = tree.setdefault(keys[0], {})
    if not isinstance(section, dict):
        raise UserError(f"override '{override}' names a section, but '{keys[0]}' is a plain value in the config file")
    section[keys[1]] = value


@functools.cache  # making one takes longer than all that it does
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind, config={"strict": True, "allow_inf_nan": False})


def build(kind: type, tree: dict, prefix: str, origin: str) -> Any:
    """An instance of a dataclass from a tree of plain values; types are strict (no "4" for 4, no 4.0 for 4, no 1 for true).

    UserError for what is wrong with them, by the names of the keys, behind `prefix`, and of what holds them, `origin`.
    """
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    for needed in dataclasses.fields(kind):
        if needed.name not in tree and needed.default is needed.default_factory is dataclasses.MISSING:
            raise UserError(f"{origin} has no '{prefix}{needed.name}': add it")
    values = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{close[0]}'?" if close else f"the keys there are {', '.join(fields)}"
            raise UserError(f"unknown key '{name}' in {origin}: {hint}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise UserError(f"'{name}' in {origin} must be a section with keys below it, and it is {value!r}")
            values[key] = build(fields[key], value, f"{name}.", origin)
            continue
        try:
            values[key] = _adapter(fields[key]).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise UserError(f"'{name}' in {origin} is of the wrong type: {message[0].lower()}{message[1:]}, and it is {value!r}") from None
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"'{prefix.rstrip('.')}' in {origin} is impossible: {error}") from None
