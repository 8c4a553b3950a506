"""Metrics: means are taken over everything, and wandb offline really writes them."""

import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rdtrain.config import load_config
from rdtrain.distributed import World
from rdtrain.metrics import LoggingSettings, MetricLogger, MetricSums, read_metrics
from rdtrain.train import train


def test_means_weigh_every_count_alike_leave_skipped_steps_out_and_start_anew():
    sums, counts, skipped = MetricSums(), torch.tensor([1.0, 0.0]), torch.tensor([False, True])
    sums.add({"loss": (torch.tensor(6.0), torch.tensor(2.0)), "parts": (torch.tensor([1.0, 0.0]), counts)}, skipped[0])
    sums.add({"loss": (torch.tensor(torch.nan), torch.tensor(2.0)), "parts": (torch.tensor([torch.inf, 1.0]), counts)}, skipped[1])
    sums.add({"loss": (torch.tensor(1.0), torch.tensor(5.0)), "parts": (torch.tensor([3.0, 0.0]), counts)}, skipped[0])
    world = World(0, 1, 0, torch.device("cpu"))
    assert sums.means(world) == {"loss": 1.0, "parts": [2.0, None]}
    assert sums.means(world) == {}


def wandb_records(file: Path) -> list[bytes]:
    """The records of a .wandb file: a LevelDB log (blocks of 32 KiB, records in fragments) behind a header of seven bytes."""
    data, records, at = file.read_bytes(), [], 7
    assert data.startswith(b":W&B")
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left  # padding: a fragment's own header would not fit
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        fragment = data[at + 7 : at + 7 + length]
        if kind in (1, 2):  # whole, or first
            records.append(fragment)
        else:
            records[-1] += fragment
        at += 7 + length
    return records


def test_wandb_offline_writes_a_run_folder_that_holds_the_metrics(tiny_config, tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    assert train(load_config(tiny_config(logging={"wandb": "offline"}))) == 0
    (file,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    expected, history, deadline = read_metrics(tmp_path / "run/metrics.jsonl"), [], time.monotonic() + 30
    while len(history) < len(expected) and time.monotonic() < deadline:  # wandb writes it in a process of its own
        time.sleep(0.1)
        history = [
            {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            for record in map(Record.FromString, wandb_records(file))
            if record.WhichOneof("record_type") == "history"
        ]
    assert len(history) == len(expected) == 9  # before the first step, and eight steps
    for row, record in zip(history, expected):
        assert float(row.get("loss", "nan")) == pytest.approx(record.get("loss", math.nan), nan_ok=True)
    assert float(history[-1]["validation_nll"]) == pytest.approx(expected[-1]["validation_nll"])
    assert "loss_by_iteration/01" in {key for row in history for key in row}


def test_a_continued_run_continues_its_wandb_run(tmp_path, monkeypatch):
    import wandb

    asked = []
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.append(settings["id"]) or SimpleNamespace(id="abc", finish=lambda: None))
    settings, world = LoggingSettings(wandb="offline"), World(0, 1, 0, torch.device("cpu"))
    for _ in range(2):
        MetricLogger(tmp_path, settings, {}, "run", world, resume_step=0).close()
    assert asked == [None, "abc"]
