"""What the stages have left in their folder, with predictions of `rdtrain plan` beside it and the bars that it is held to."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..bench.arms import cases
from ..config import Config
from ..distributed import World
from ..estimate import FP32, Shares, model_on_paper
from ..hardware import GPUS, NETWORK, Gpu
from ..plan.costing import CUDA, Cluster, Cost, cost, with_batch
from ..preparation import objective_and_model
from .jobs import RESERVE, Model, base_config
from .losses import REFERENCE

LOSS_LIMIT = 0.01
"""Of a loss in bf16, relative to fp32: as in tests/distributed/engines_process.py; twice what bf16 does to plain PyTorch, if more."""

DATA_PARALLEL = "a plain fp32 all-reduce"
"""What data-parallel training sends; ZeRO-1 and FSDP2 send other things in its place, of other precisions."""

WEAK_SCALING = {2: 0.95, 8: 0.90}
"""What blocks must keep of a GPU's tokens/s on so many."""


@dataclass
class Row:
    """A job of plan.json, and its measurement of bench.json, None without one (or where memory ran out: `failed` says so)."""

    job: dict
    found: dict | None
    failed: str | None

    def __getattr__(self, name: str):
        """What the job says: model, objective, layout, blocks, gpus, micro ..."""
        try:
            return self.__dict__["job"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def tokens_per_gpu(self) -> float | None:
        """Tokens/s of each GPU."""
        return self.found["tokens_per_second"] / self.gpus if self.found else None


@dataclass
class Bar:
    """Something that must hold: what, what was found, and whether it is met; None where it was not measured."""

    what: str
    found: str
    met: bool | None


class Findings:
    """All that a folder of launch/scaling.sh holds; what is missing is empty or None."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.collectives = [json.loads(path.read_text()) for path in sorted(folder.glob("nccl/*.json"))]
        self.losses = sorted((json.loads(path.read_text()) for path in folder.glob("losses/*.json")), key=lambda found: found["ranks"])
        self.resume = _read(folder / "resume/resume.json")
        self.plan = _read(folder / "measure/plan.json") or {"jobs": [], "gpu": None, "settings": []}
        self.gpu: Gpu | None = next((gpu for gpu in GPUS if gpu.name == self.plan["gpu"]), None)
        self.equality = equality_of(folder / "equality")
        self.rows = [self._row(job) for job in self.plan["jobs"]]

    def _row(self, job: dict) -> Row:
        if not job["measured"]:
            return Row(job, None, job["failed"])
        report = json.loads((self.folder / "measure" / job["measured"]).read_text())
        found = next(row for row in report["measurements"] if row["arm"] == job["arm"])
        ran_out = found["out_of_memory"]
        return Row(job, None, f"out of memory: {ran_out}") if ran_out else Row(job, found | {"facts": report["facts"]}, None)

    def find(self, **wanted: object) -> Row | None:
        """The first row that was measured of which all this holds."""
        return next((row for row in self.rows if row.found and all(row.job[key] == value for key, value in wanted.items())), None)

    def base(self, row: Row) -> Row | None:
        """What a row's weak scaling is measured by: the same on one GPU; of block-parallel training plain PyTorch with a tied model, which
        has the parameters and the work of one block's share."""
        same = {"model": row.model, "objective": row.objective, "micro": row.micro, "gpus": 1}
        if row.layout == "block-parallel":
            return self.find(**same, layout="plain", blocks=1)
        return self.find(**same, layout=row.layout, blocks=row.blocks)

    def efficiency(self, row: Row) -> float | None:
        """A GPU's tokens/s as a share of the base's; None without both."""
        base = self.base(row)
        return row.tokens_per_gpu / base.tokens_per_gpu if row.found and base is not None and row.gpus > 1 else None

    def hfu(self, row: Row) -> tuple[float | None, str]:
        """The share of the speed on paper that one GPU reached, and in what: the base, or another layout of the model and objective on one
        GPU, or else the layout itself on the fewest. None where there is none of them, or no speed on paper."""
        same = {"model": row.model, "objective": row.objective}
        others = [self.base(row), self.find(**same, gpus=1), self.find(**same, layout=row.layout, blocks=row.blocks), self.find(**same)]
        chosen = next((other for other in others if other is not None and other.found["hfu"]), None)
        return (None, "") if chosen is None else (chosen.found["hfu"], f"{chosen.layout} on {chosen.gpus}")

    def config(self, row: Row, gpus: int) -> Config:
        """The row's config, with a batch for so many GPUs."""
        model = Model(row.model, Path(row.config), row.vocab_size)
        config = cases(base_config(model, self.plan["settings"]), [row.arm], [])[0].config
        return with_batch(config, row.micro * gpus, row.micro)

    def predicted(self, row: Row, gpus: int | None = None) -> Cost | None:
        """`rdtrain plan`'s cost of a row, or of the same on another number of GPUs, at the HFU of one; None where that is not known."""
        gpus, (hfu, _) = gpus or row.gpus, self.hfu(row)
        if hfu is None or self.gpu is None:
            return None
        config = self.config(row, gpus)
        tokens = config.batch.global_sequences * config.data.sequence_length  # of one step: the time of more is no concern here
        return cost(row.arm, config, row.vocab_size, Cluster(self.gpu, gpus, RESERVE, hfu, NETWORK), tokens)

    def savings(self, row: Row) -> tuple[float, dict[str, float]]:
        """Of block-parallel training: the core's share of what a GPU trains, and by which share it sends less than others that train the
        same untied model on as many GPUs: a plain fp32 all-reduce of what a step trains, and the layouts that were planned."""
        world, config = World(0, row.gpus, 0, CUDA), self.config(row, row.gpus)
        objective, model = objective_and_model(config, world, row.vocab_size, bos_id=0)
        shares = Shares.of(model_on_paper(model), config, objective, row.gpus)
        sent = sum(row.found["traffic"].values())
        others = {DATA_PARALLEL: 2 * FP32 * shares.active * (row.gpus - 1) / row.gpus}
        for layout in ("ZeRO-1", "FSDP2"):
            other = self.find(model=row.model, objective=row.objective, layout=layout, blocks=row.blocks, gpus=row.gpus)
            if other is not None:
                others[layout] = sum(other.found["traffic"].values())
        return shares.core / row.blocks / shares.active, {name: 1 - sent / count for name, count in others.items()}

    def deviations(self) -> tuple[list[tuple[int, str, float]], float] | None:
        """Processes, layout and largest relative deviation of a loss from the reference, and their limit; None without the reference."""
        reference = next((found["losses"][REFERENCE] for found in self.losses if REFERENCE in found["losses"]), None)
        if reference is None:
            return None
        rows = [
            (found["ranks"], layout, max(abs(loss - right) / right for loss, right in zip(losses, reference, strict=True)))
            for found in self.losses for layout, losses in found["losses"].items() if layout != REFERENCE
        ]
        return rows, max([LOSS_LIMIT, *(2 * off for _, layout, off in rows if layout == "plain")])

    def bars(self) -> list[Bar]:
        """All that must hold, of each model."""
        bars = [_all_equal(self.equality, (self.folder / "equality/complete").exists()), self._losses_bar()]
        resume = self.resume
        found = "" if resume is None else f"losses within {resume['largest_deviation']:.1e}, the limit being {resume['limit']:g}"
        bars.append(Bar("a killed run goes on elsewhere with the losses of one that was not", found, resume and resume["equal"]))
        for model in dict.fromkeys(row.model for row in self.rows):
            for layout in ("ZeRO-1", "FSDP2"):
                for gpus, least in WEAK_SCALING.items():
                    row = self.find(model=model, objective="blocks", layout=layout, blocks=1, gpus=gpus)
                    share = self.efficiency(row) if row is not None else None
                    what = f"{model}, blocks, {layout}: weak scaling on {gpus} at least {least:.0%}"
                    if self.gpu is None:  # processes that share a CPU's cores say nothing of it
                        share = None
                    bars.append(Bar(what, "" if share is None else f"{share:.1%}", None if share is None else share >= least))
            parallel = [row for row in self.rows if row.found and (row.model, row.layout) == (model, "block-parallel")]
            for row in parallel:
                share, saved = self.savings(row)
                text = ", ".join(f"{less:.1%} less than {name}" for name, less in saved.items())
                what = f"{model}, block-parallel on {row.gpus}: sends less than data-parallel by the core's share, {share:.1%}"
                bars.append(Bar(what, text, saved[DATA_PARALLEL] >= share - 1e-4))  # one number more is sent, for the norm
        return bars

    def _losses_bar(self) -> Bar:
        what, found = "losses of all layouts equal within bf16 noise", self.deviations()
        if found is None or not found[0]:
            return Bar(what, "", None)
        ranks, layout, off = max(found[0], key=lambda row: row[2])
        return Bar(what, f"at most {off:.1e} off fp32 ({layout} on {ranks}), the limit being {found[1]:.1e}", off <= found[1])


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def equality_of(folder: Path) -> dict[str, str]:
    """What `pytest -v` said of each test, in lower case, of its outputs so far; a test that was cut off is not among them."""
    text = "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.output")))
    return {name: word.lower() for name, word in re.findall(r"^(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED)", text, re.M)}


def _all_equal(equality: dict[str, str], complete: bool) -> Bar:
    """complete: whether pytest came to its end, with every test passed."""
    passed = sum(word == "passed" for word in equality.values())
    found = f"{passed} of {len(equality)} pass" + ("" if complete else ", and not all have ended" * (passed == len(equality)))
    failed = False if passed < len(equality) else None
    return Bar("tests/distributed on these devices", found if equality else "", complete or failed)
