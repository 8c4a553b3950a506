"""launch/scaling.sh and what it runs: which jobs, starts that fail or stall, what is made of measurements; a short rehearsal with gloo."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rdtrain.scaling.measure as measure
from rdtrain.bench.arms import Case
from rdtrain.bench.measure import Effort, on_paper
from rdtrain.config import load_config
from rdtrain.distributed import World
from rdtrain.errors import UserError
from rdtrain.hardware import GPUS
from rdtrain.metrics import read_metrics
from rdtrain.scaling.findings import Findings, equality_of
from rdtrain.scaling.jobs import Job, Model, jobs_of, order_of, room_of
from rdtrain.scaling.losses import run as run_losses
from rdtrain.scaling.report import page
from rdtrain.train import train

PROJECT = Path(__file__).parent.parent
H100 = next(gpu for gpu in GPUS if gpu.name == "h100")
LARGE, HUGINN = Model("857M", PROJECT / "configs/1b.yaml", 32768), Model("3.5B", PROJECT / "configs/3.5b.yaml", 65536)
CPU = torch.device("cpu")


def of(jobs: list[Job], **wanted) -> list[Job]:
    return [job for job in jobs if all(getattr(job, key) == value for key, value in wanted.items())]


def test_jobs_are_ordered_by_importance_with_one_micro_batch_that_fits():
    jobs = jobs_of(LARGE, order_of([4, 1, 8, 2]), [], H100, True)
    assert list(dict.fromkeys(job.gpus for job in jobs)) == [1, 2, 8, 4]
    assert [(job.objective, job.layout, job.blocks) for job in of(jobs, gpus=2)][:3] == [
        ("blocks", "ZeRO-1", 1), ("blocks", "FSDP2", 1), ("blocks", "block-parallel", 2)]
    assert all(job.layout == "ZeRO-3" for job in of(jobs, gpus=2)[-2:])
    for objective in ("blocks", "truncated"):
        sizes = {job.micro for job in of(jobs, objective=objective)}
        assert len(sizes) == 1 and all(job.config.batch.global_sequences == job.micro * job.gpus for job in of(jobs, objective=objective))
    largest = of(jobs, objective="truncated", layout="ZeRO-1", gpus=1)[0]
    assert largest.micro == 4 and largest.peak < room_of(H100)
    assert {job.blocks for job in of(jobs, layout="ZeRO-1", gpus=1)} == {1, 2, 4, 8}
    assert all(job.blocks == job.gpus for job in of(jobs, layout="block-parallel"))
    for job in jobs:
        compiled = job.config.engine.compile
        assert compiled == ("engine.compile=true" in job.arm) and not (compiled and job.layout == "ZeRO-3")
    assert not any(job.config.engine.compile for job in jobs_of(LARGE, [1, 2], [], H100, False))


def test_what_does_not_fit_is_known_before_it_is_tried():
    jobs = jobs_of(HUGINN, [1, 2], [], H100, False)
    assert {job.micro for job in jobs} == {1}
    assert of(jobs, objective="truncated", layout="FSDP2", gpus=1)[0].peak > room_of(H100)
    assert of(jobs, objective="blocks", layout="ZeRO-1", gpus=2)[0].peak < room_of(H100)
    with pytest.raises(UserError, match="is not NAME=CONFIG:VOCABULARY"):
        Model.parse("configs/1b.yaml")


FAKE = """
import json, pathlib, sys, time
folder, arms = pathlib.Path(sys.argv[1]), sys.argv[2:]
path = folder / "bench.json"
rows = json.loads(path.read_text())["measurements"] if path.exists() else []
for arm in arms:
    if any(row["arm"] == arm for row in rows):
        continue
    if "zero_stage=2" in arm:
        print("torch.OutOfMemoryError: it does not fit"), sys.exit(1)
    if "zero_stage=3" in arm:
        time.sleep(600)
    rows.append({"arm": arm})
    path.write_text(json.dumps({"measurements": rows}))
"""


def test_a_start_that_fails_or_stalls_goes_on_without_the_measurement_in_which_it_did(tmp_path, monkeypatch):
    def command(start, jobs, options, budget):
        return [sys.executable, "-c", FAKE, str(start.folder), *(job.arm for job in jobs)]

    monkeypatch.setattr(measure, "command", command)
    jobs = of(jobs_of(LARGE, [2], [], H100, False), objective="blocks", blocks=1)
    start = measure.Start(jobs, tmp_path / "start")
    measure.run(start, argparse.Namespace(stall=1.5), time.monotonic() + 60)
    assert {job.layout for job in jobs if job.arm in start.measured()} == {"ZeRO-1", "FSDP2"}
    reasons = {job.layout: start.failed[job.arm] for job in jobs if job.arm in start.failed}
    assert reasons == {"ZeRO-2": "torch.OutOfMemoryError: it does not fit", "ZeRO-3": "nothing was measured for 2 s"}
    late = measure.Start(jobs, tmp_path / "late")
    measure.run(late, argparse.Namespace(stall=1.5), time.monotonic() - 1)
    assert not late.measured() and not late.failed


def test_jobs_of_one_gpu_are_shared_out_over_all(tmp_path):
    jobs = jobs_of(LARGE, [1, 2], [], H100, False)
    alone, together = measure.starts_of(jobs, tmp_path, ["3", "5"])
    assert [start.device for start in alone] == ["3", "5"] and len(together) == 1 and together[0].device is None
    assert alone[0].jobs[0].layout == "ZeRO-1" and alone[1].jobs[0].layout == "FSDP2"
    assert sorted(job.arm for start in alone for job in start.jobs) == sorted(job.arm for job in of(jobs, gpus=1))


@pytest.fixture
def measured(tmp_path):
    """A folder as `measure` leaves it on two H100s, with speeds that are made up: tokens/s a GPU of each job by its layout and GPUs."""
    speeds = {"ZeRO-1": (80_000, 77_000), "FSDP2": (80_000, 75_000), "block-parallel": (None, 78_000), "plain": (81_000, None)}
    rows, found = [], {1: [], 2: []}
    for job in of(jobs_of(LARGE, [1, 2], [], H100, False), objective="blocks"):
        speed = speeds.get(job.layout, (None, None))[job.gpus - 1]
        place = f"{job.gpus}/bench.json" if speed else None
        rows.append(dict(model=job.model.name, config=str(job.model.config), vocab_size=job.model.vocab_size, objective=job.objective,
                         layout=job.layout, blocks=job.blocks, gpus=job.gpus, micro=job.micro, arm=job.arm, peak=job.peak, fits=True,
                         measured=place, failed=None if speed else "it stalled"))
        if speed:
            row = dataclasses.asdict(on_paper(Case(job.arm, None, job.config), World(0, job.gpus, 0, CPU), 32768, Effort()))
            row |= dict(device="NVIDIA H100 80GB HBM3", tokens_per_second=speed * job.gpus, mfu=0.5, hfu=0.5, exposed_seconds=0.002,
                        step_seconds={"typical": row["tokens_per_step"] / speed / job.gpus}, memory={"peak": job.peak})
            found[job.gpus].append(row)
    for gpus, measurements in found.items():
        (tmp_path / f"measure/{gpus}").mkdir(parents=True)
        facts = {"started": "2026-01-01T00:00:00", "commit": None, "versions": {"torch": "2"}}
        (tmp_path / f"measure/{gpus}/bench.json").write_text(json.dumps({"facts": facts, "measurements": measurements}))
    plan = {"gpu": "h100", "settings": [], "jobs": rows}
    (tmp_path / "measure/plan.json").write_text(json.dumps(plan))
    return tmp_path


def test_efficiencies_predictions_and_bars_of_what_was_measured(measured):
    (measured / "losses").mkdir()
    for ranks, losses in ((1, {"plain fp32": [4.0, 2.0], "plain": [4.0, 2.01]}), (2, {"ZeRO-1": [4.0, 1.99], "FSDP2": [4.1, 2.0]})):
        (measured / f"losses/{ranks}.json").write_text(json.dumps({"ranks": ranks, "steps": 2, "config": "c", "losses": losses}))
    (measured / "equality").mkdir()
    (measured / "equality/test_a.output").write_text("tests/a.py::one PASSED [ 50%]\ntests/a.py::two[x] FAILED [100%]\ntests/a.py::three ")
    assert equality_of(measured / "equality") == {"tests/a.py::one": "passed", "tests/a.py::two[x]": "failed"}
    (measured / "equality/test_a.output").write_text("tests/a.py::one PASSED [ 50%]\ntests/a.py::three ")
    assert Findings(measured).bars()[0].met is None  # cut off
    (measured / "equality/complete").touch()
    assert Findings(measured).bars()[0].met is True
    (measured / "equality/complete").unlink()
    (measured / "equality/test_a.output").write_text("tests/a.py::two[x] FAILED [100%]\n")
    resume = dict(steps=9, engine="ZeRO-1", ranks=2, rank=1, step_when_killed=5, launcher_code=1, resumed_from=4, resumed_engine="FSDP2",
                  resumed_ranks=1, compared_steps=5, largest_deviation=0.03, at_step=7, largest_deviation_to_the_end=0.03, limit=0.02,
                  equal=False)
    (measured / "resume").mkdir()
    (measured / "resume/resume.json").write_text(json.dumps(resume))
    findings = Findings(measured)
    row = findings.find(layout="ZeRO-1", gpus=2, blocks=1)
    assert findings.efficiency(row) == pytest.approx(77 / 80) and findings.hfu(row) == (0.5, "ZeRO-1 on 1")
    parallel = findings.find(layout="block-parallel", gpus=2)
    assert findings.efficiency(parallel) == pytest.approx(78 / 81) and findings.base(parallel).layout == "plain"
    cost = findings.predicted(row)
    tokens = 16 * 2048
    assert cost.step_seconds == pytest.approx(tokens * cost.flops_per_token / (2 * 989.4e12 * 0.5)) and cost.peak == row.peak
    share, saved = findings.savings(parallel)
    assert share == pytest.approx(saved["a plain fp32 all-reduce"], abs=1e-6) and 0.3 < share < 0.6 and saved["ZeRO-1"] > share
    met = {bar.what: bar.met for bar in findings.bars()}
    assert met == {
        "tests/distributed on these devices": False,
        "losses of all layouts equal within bf16 noise": False,  # 2.5e-2 off, where plain PyTorch is 5e-3 off
        "a killed run goes on elsewhere with the losses of one that was not": False,
        "857M, blocks, ZeRO-1: weak scaling on 2 at least 95%": True, "857M, blocks, ZeRO-1: weak scaling on 8 at least 90%": None,
        "857M, blocks, FSDP2: weak scaling on 2 at least 95%": False, "857M, blocks, FSDP2: weak scaling on 8 at least 90%": None,
        f"857M, block-parallel on 2: sends less than data-parallel by the core's share, {share:.1%}": True,
    }
    text = page(findings)
    assert "| 2 | blocks | ZeRO-1 | 8 | 77,000 | 50.0% |" in text and "2.0 | " in text and "96.2% |" in text
    assert "blocks, ZeRO-2 on 2: failed: it stalled" in text and "the run went on from step 4 under FSDP2 on 1" in text
    assert "A projection, not a measurement" in text and "| 1,024 | blocks, 2 untied | block-parallel |" in text


def test_losses_of_real_steps_are_those_of_training(tiny_config, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    path = tiny_config(faults={"gradient_spike": 0.0})
    config = load_config(path)
    assert train(config) == 0
    recorded = [record["loss"] for record in read_metrics(Path(config.run.folder) / "metrics.jsonl") if record["step"]]
    assert run_losses(config, 8, World(0, 1, 0, CPU)) == recorded


def test_a_short_rehearsal_measures_within_its_budget_and_reports(tmp_path, monkeypatch, capsys):
    """On two gloo processes; time is over before the second measurement, and the exit code says that some are missing."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(measure, "GRACE", 150)  # the first measurement may take as long as a busy machine needs for it
    arguments = ["model.width=32", "model.heads=4", "model.mlp_width=48", "data.sequence_length=16", "--models",
                 f"tiny={PROJECT / 'configs/1b.yaml'}:300", "--counts", "2", "--steps", "1", "--warmup", "1", "--budget", "3",
                 "--no-compile", "--output", str(tmp_path / "measure")]
    monkeypatch.setattr(sys, "argv", ["measure", *arguments])
    with pytest.raises(SystemExit) as ended:
        measure.main()
    assert ended.value.code == 1 and capsys.readouterr().out == "1 of 11 measured, 0 do not fit\n"
    environment = os.environ | {"FOLDER": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", "launch/scaling.sh", "report"]
    report = subprocess.run(command, cwd=PROJECT, env=environment, text=True, capture_output=True, timeout=600)
    assert report.returncode == 0, report.stdout + report.stderr
    text = (tmp_path / "scaling.md").read_text()
    assert "| 2 | blocks | ZeRO-1 |" in text and "block-parallel on 2: not measured yet" in text
