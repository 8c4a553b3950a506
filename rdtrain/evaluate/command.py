"""`rdtrain evaluate`, top to bottom: everything that can be wrong is found first, then each model is measured and its text judged.

Samples are written as soon as they are made, so that a judge which is not on this machine can score them elsewhere (--samples).
"""

import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..data.output import report_folder, write_atomically
from ..data.shards import ShardReader
from ..errors import UserError
from ..evaluation import validation_rows
from ..model.chain import check_sampling
from ..model.decoding import cache_bytes
from ..model.generation import Sampling, TextGenerator
from ..model.recurrent import ModelConfig
from ..run_folder import start_facts
from .chain_likelihood import likelihood_of_chain
from .diversity import diversity_of
from .likelihood import cross_entropy_by_sigma, likelihood_by_iterations, measure_likelihood
from .mauve import Mauve, MauveSettings, require_mauve
from .models import Source, find_model
from .reference import load_reference
from .report import write_plots, write_report
from .samples import Sample, choose_prompts, generate_samples, human_samples, iterations_used, read_samples, write_samples
from .teacher import Teacher


@dataclass
class EvaluateSettings:
    """What is evaluated, and how.

    models: exported, run or checkpoint folders. samples: samples files to score, instead of models. shards: held-out text (ShardReader).
    output: folder of the report. skip: parts to leave out, of `likelihood` and `samples`. device: None for CUDA where there is one.
    sequences, sequence_length, rows: of held-out likelihood, rows as DataSettings has it. sigma_levels: noise levels of the curve against
    sigma. nll_iterations: the K's of an unrolled model's likelihood and of the bound on a denoising chain's. batch: sequences or
    continuations at a time; None: 32 sequences, and as many continuations as `default_batch` says.
    prompts, prompt_tokens, continuations, new_tokens: what is generated, at each of iterations x temperatures, with `sampling`
    (further fields of Sampling). seed: of prompts' noise, sampling and MAUVE's clusters.
    teacher, mauve_features: folders of the judges. judge_batch: texts that they read at a time.
    """

    models: list[Path]
    output: Path
    samples: list[Path] = field(default_factory=list)
    shards: str | None = None
    skip: list[str] = field(default_factory=list)
    device: str | None = None
    sequences: int = 256
    sequence_length: int = 512
    rows: str = "packed"
    sigma_levels: int = 24
    nll_iterations: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    batch: int | None = None
    prompts: int = 1000
    prompt_tokens: int = 50
    continuations: int = 5
    new_tokens: int = 50
    iterations: list[int] = field(default_factory=lambda: [1, 8, 32])
    temperatures: list[float] = field(default_factory=lambda: [1.0, 0.8])
    sampling: dict = field(default_factory=dict)
    seed: int = 0
    teacher: Path | None = None
    mauve_features: Path | None = None
    mauve: MauveSettings = field(default_factory=MauveSettings)
    judge_batch: int = 32
    overwrite: bool = False

    def check(self) -> list[Sampling]:
        """The samplings, one for each temperature. UserError for settings that make no evaluation."""
        if bool(self.models) == bool(self.samples):
            raise UserError("an evaluation is of models or of --samples files, of one of them: name model folders, or give --samples")
        if self.models and self.shards is None:
            raise UserError("models are evaluated on held-out text: give the folder of validation shards with --shards")
        if self.samples and "samples" in self.skip:
            raise UserError("--samples gives samples to score and --skip samples leaves them out: drop one of the two")
        if {"likelihood", "samples"} <= set(self.skip):
            raise UserError("--skip likelihood samples leaves nothing to evaluate: keep one of them")
        for name in ("sequences", "sequence_length", "batch", "prompts", "prompt_tokens", "continuations", "new_tokens", "judge_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, and it is {getattr(self, name)}")
        for judge in (self.teacher, self.mauve_features):
            if judge is not None and not judge.is_dir():
                raise UserError(f"{judge} is no folder: give one with a Hugging Face model, or a model of rdtrain")
        if min(self.mauve.scalings) <= 0:
            raise UserError(f"--mauve-scaling must be above 0, and it is {min(self.mauve.scalings):g}")
        if self.sigma_levels < 2:
            raise UserError(f"--sigma-levels must be at least 2, and it is {self.sigma_levels}")
        if min(*self.iterations, *self.nll_iterations) < 1:
            raise UserError("--iterations and --nll-iterations must be at least 1: give numbers from 1 on")
        if isinstance(self.mauve.clusters, int) and self.mauve.clusters < 2:
            raise UserError(f"--mauve-clusters must be at least 2, and it is {self.mauve.clusters}")
        try:
            return [Sampling(temperature=temperature, **self.sampling) for temperature in self.temperatures]
        except ValueError as error:
            raise UserError(f"the settings of sampling are impossible: {error}") from None


def evaluate(settings: EvaluateSettings) -> str:
    """Write report.md, report.json, samples and plots to the output folder; returns the report's text.

    UserError for whatever a user can mend; before any measurement, but for what only a judge can find in a model's text.
    """
    samplings = settings.check()
    if settings.mauve_features:
        require_mauve()
    device = _device(settings.device)
    sources = [find_model(path) for path in settings.models]
    _refuse_equal_names(sources)
    written = read_samples(settings.samples) if settings.samples else []
    reader, tokens, prompts = None, None, []
    if sources:
        for source in sources:  # each must have been trained with the shards' tokenizer
            reader = ShardReader(settings.shards, tokenizer_hash=source.tokenizer().hash)
        if "likelihood" not in settings.skip:
            tokens, bytes_per_token = validation_rows(reader, settings.sequence_length, settings.sequences, settings.rows)
        if "samples" not in settings.skip:
            for source in sources:
                _refuse_samplings(source, samplings)
            windows = choose_prompts(reader, settings.prompts, settings.prompt_tokens, settings.new_tokens)
            prompts = human_samples(sources[0].tokenizer(), windows, settings.prompt_tokens)
    output = _prepare(settings)
    teacher = mauve = None
    if settings.teacher:
        teacher = Teacher(load_reference(settings.teacher, device, head=True), settings.judge_batch)
    if settings.mauve_features:
        mauve = Mauve(load_reference(settings.mauve_features, device, head=False), settings.mauve, settings.judge_batch)
    for human in [prompts] if prompts else written:  # a judge that cannot read the text is found before hours of sampling
        if teacher:
            teacher.score_human(human)
        if mauve:
            mauve.prepare(human)
    report = start_facts(device.type) | {
        "device": str(device),
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "teacher": teacher and teacher.model.name,
        "mauve_features": mauve and mauve.model.name,
        "likelihood": [],
        "texts": [],
    }
    for group in written:
        report["texts"].append(_judge(group, teacher, mauve))
    for source in sources:
        generator = source.load(str(device))
        if tokens is not None:
            report["likelihood"].append(_likelihood(source, generator, tokens, bytes_per_token, settings))
        for iterations in filter(source.runs_at, settings.iterations if prompts else []):
            for sampling in samplings:
                started = time.perf_counter()
                group = generate_samples(
                    generator, source.name, prompts, settings.continuations, iterations, sampling, settings.batch, settings.seed
                )
                seconds = time.perf_counter() - started
                name = f"samples-{_slug(source.name)}-K{iterations}-T{sampling.temperature:g}.jsonl"
                write_samples(group, output / name)
                capacity = settings.prompt_tokens + settings.new_tokens
                cost = {
                    "tokens_per_second": len(group) * settings.new_tokens / seconds,
                    "cache_bytes_per_text": cache_bytes(generator.model, iterations, sampling, capacity),
                }
                report["texts"].append({"file": name} | cost | _judge(group, teacher, mauve))
        del generator
    write_atomically(output / "report.json", json.dumps(report, indent=2) + "\n")
    try:
        write_plots(report, output)
    except OSError as error:
        raise UserError(
            f"the plots cannot be written to {output} ({error.strerror}), and report.json there has the numbers: free some disk space, "
            "and start again with --overwrite for a report"
        ) from None
    text = write_report(report)
    write_atomically(output / "report.md", text)
    return text


def _likelihood(source: Source, generator: TextGenerator, tokens: Tensor, bytes_per_token: float, settings: EvaluateSettings) -> dict:
    model, batch = generator.model, settings.batch or 32
    record = {
        "model": source.name,
        "folder": str(source.folder),
        "denoising": source.denoising,
        "iterations": source.iterations,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_tokens": source.config["trained_tokens"],
        "dtype": source.config["dtype"],
        "held_out": asdict(measure_likelihood(model, source.objective(), tokens, bytes_per_token, batch)),
    }
    if source.denoising:
        record["by_iterations"] = likelihood_of_chain(generator, settings.nll_iterations, tokens, bytes_per_token, batch, source.name)
        record["cross_entropy_by_sigma"] = cross_entropy_by_sigma(generator, tokens, batch, settings.sigma_levels, source.name)
    else:
        iterations = [k for k in settings.nll_iterations if source.runs_at(k)]
        record["by_iterations"] = likelihood_by_iterations(source, model, iterations, tokens, bytes_per_token, batch)
    return record


def _judge(group: list[Sample], teacher: Teacher | None, mauve: Mauve | None) -> dict:
    """What the judges say of one model's samples at one setting, and of the human text after the same prompts."""
    ours, human = diversity_of(group)
    record = {
        "model": group[0].model,
        "setting": group[0].setting,
        "continuations": len(group),
        "prompts": len({sample.prompt_number for sample in group}),
        "ended": sum(sample.ended for sample in group) / len(group),
        "diversity": asdict(ours),
        "human_diversity": asdict(human),
    }
    if used := iterations_used(group):
        record["iterations_used"] = used
    if teacher:
        record |= {"teacher": asdict(teacher.score(group)), "human_teacher": asdict(teacher.score_human(group))}
    if mauve:
        record["mauve"] = asdict(mauve.score(group))
    return record


def _device(name: str | None) -> torch.device:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name is not None:
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):
            raise UserError(f"there is no device {name} here: choose cpu, or leave the choice to the program") from None
    return device


def _refuse_equal_names(sources: list[Source]) -> None:
    names = [source.name for source in sources]
    if len({_slug(name) for name in names}) < len(names):
        raise UserError(f"two of the models have the same name ({', '.join(names)}): export them to folders with names of their own")


def _refuse_samplings(source: Source, samplings: list[Sampling]) -> None:
    try:
        for sampling in samplings:
            check_sampling(ModelConfig(**source.config["model"]), sampling)
    except ValueError as error:
        raise UserError(f"{source.name} cannot generate so: {error}") from None


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _prepare(settings: EvaluateSettings) -> Path:
    output = settings.output
    if (output / "report.json").exists() and not settings.overwrite:
        raise UserError(f"{output} holds a report already; choose another output or ask to overwrite it")
    return report_folder(output)
