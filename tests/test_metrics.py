"""Metrics: means are taken over everything, and wandb offline really writes them."""

import errno
import math
import shutil
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rdtrain.config import load_config
from rdtrain.distributed import World
from rdtrain.errors import UserError
from rdtrain.metrics import LoggingSettings, MetricLogger, MetricSums, read_metrics, slowest_rank
from rdtrain.train import train


def test_means_weigh_every_count_alike_leave_skipped_steps_out_and_start_anew():
    sums, counts, skipped = MetricSums(), torch.tensor([1.0, 0.0]), torch.tensor([False, True])
    sums.add({"loss": (torch.tensor(6.0), torch.tensor(2.0)), "parts": (torch.tensor([1.0, 0.0]), counts)}, skipped[0])
    sums.add({"loss": (torch.tensor(torch.nan), torch.tensor(2.0)), "parts": (torch.tensor([torch.inf, 1.0]), counts)}, skipped[1])
    sums.add({"loss": (torch.tensor(1.0), torch.tensor(5.0)), "parts": (torch.tensor([3.0, 0.0]), counts)}, skipped[0])
    world = World(0, 1, 0, torch.device("cpu"))
    assert sums.means(world) == {"loss": 1.0, "parts": [2.0, None]}
    assert sums.means(world) == {}


def test_a_metrics_file_that_cannot_be_read_or_holds_other_lines_is_one_sentence(tmp_path):
    path, world = tmp_path / "metrics.jsonl", World(0, 1, 0, torch.device("cpu"))
    path.write_text('{"step": "one"}\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 1 of .* is not a record of metrics"):
        MetricLogger(tmp_path, LoggingSettings(), {}, "run", world, resume_step=2)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read or written \(Is a directory\)"):
        MetricLogger(tmp_path, LoggingSettings(), {}, "run", world, resume_step=2)


def test_the_slowest_rank_is_told_by_every_ranks_own_time(monkeypatch):
    def at_rank_2(own: list[float]) -> dict:
        monkeypatch.setattr(World, "sum", lambda self, tensor: tensor + torch.tensor(own[:2] + [0.0] + own[3:], dtype=tensor.dtype))
        return slowest_rank(own[2] - 0.25, 0.25, World(2, 4, 0, torch.device("cpu")))

    assert at_rank_2([1.0, 3.0, 0.5, 1.0]) == {"rank_seconds": 1.0, "slowest_rank": 1, "slowest_rank_excess": 2.0}
    assert at_rank_2([1.0, 1.0, 1.5, 1.0]) == {"rank_seconds": 1.0, "slowest_rank": 2, "slowest_rank_excess": 0.5}
    assert slowest_rank(None, 0.1, World(0, 2, 0, torch.device("cpu"))) == {}  # weights are gathered inside of the passes
    assert slowest_rank(1.0, 0.1, World(0, 1, 0, torch.device("cpu"))) == {}


@pytest.mark.parametrize("full", ["metrics.jsonl", "an event file"])
def test_a_disk_that_is_full_is_one_sentence_also_when_the_logger_is_closed(tmp_path, full):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    logger = MetricLogger(tmp_path, LoggingSettings(), {}, "run", World(0, 1, 0, torch.device("cpu")), resume_step=0)
    if full == "metrics.jsonl":
        logger._file = open("/dev/full", "a")
    else:
        logger._tensorboard = SimpleNamespace(add_scalar=refuse, flush=refuse, close=refuse)
    with pytest.raises(UserError, match=r"metrics in .* cannot be written \(No space left on device\)"), closing(logger):
        logger.log({"step": 1})


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard would show of a folder of event files: values by step, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert all(len({event.step for event in of_tag}) == len(of_tag) for of_tag in found.values()), "a step is there twice"
    return {tag: {event.step: event.value for event in of_tag} for tag, of_tag in found.items()}


@pytest.mark.parametrize("lost", [["step-00000008"], ["step-00000008", "step-00000004"]])
def test_tensorboard_shows_what_metrics_jsonl_holds_after_a_run_that_continued_too(tiny_config, tmp_path, lost):
    """From a checkpoint, or from the start where there is none yet: of no step two records are left."""
    path = tiny_config(logging={"tensorboard": True})
    assert train(load_config(path)) == 0
    for name in lost:
        shutil.rmtree(tmp_path / "run/checkpoints" / name)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 0.0}\n')
    assert train(load_config(path)) == 0
    records, found = read_metrics(tmp_path / "run/metrics.jsonl"), scalars(tmp_path / "run/tensorboard")
    assert [record["step"] for record in records] == list(range(9))
    for tag in ("loss", "gradient_norm", "validation_nll"):
        assert found[tag] == pytest.approx({record["step"]: record[tag] for record in records if tag in record})
    for part in ("embedding", "prelude", "core", "coda", "conditioning"):
        for name in ("gradient_norm_by_part", "update_size_by_part"):
            assert found[f"{name}/{part}"] == pytest.approx({record["step"]: record[name][part] for record in records[1:]})
    by_level = {record["step"]: record["loss_by_noise_level"][15] for record in records[1:]}
    assert found["loss_by_noise_level/16"] == pytest.approx({step: loss for step, loss in by_level.items() if loss is not None})


def test_without_tensorboard_installed_a_sentence_says_what_to_install(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"pip install rdtrain\[tensorboard\]"):
        train(load_config(tiny_config(logging={"tensorboard": True})))
    assert not (tmp_path / "run").exists()  # before anything starts


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


def test_wandb_offline_writes_folders_that_hold_the_metrics_and_a_later_start_continues_the_run(tiny_config, tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    assert train(load_config(tiny_config(logging={"wandb": "offline"}))) == 0
    (file,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    expected, history, deadline = read_metrics(tmp_path / "run/metrics.jsonl"), [], time.monotonic() + 300
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
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    assert train(load_config(tmp_path / "run.yaml")) == 0
    starts = [folder.name.rpartition("-")[2] for folder in tmp_path.glob("run/wandb/offline-run-*")]
    assert starts == 2 * [(tmp_path / "run/wandb-id").read_text().strip()]  # one wandb run, of two starts


def test_what_wandb_does_not_take_is_to_be_corrected_and_offline_asks_for_no_login(tmp_path):
    world = World(0, 1, 0, torch.device("cpu"))
    mends = {"offline": "correct that, or set", "online": "correct that, run `wandb login`, or set logging.wandb=offline, or set"}
    for mode, mend in mends.items():
        with pytest.raises(UserError, match=rf"wandb could not start \(.*a/b.*\): {mend} logging.wandb=disabled"):
            MetricLogger(tmp_path, LoggingSettings(wandb=mode, wandb_project="a/b"), {}, "run", world, resume_step=0)


def test_a_continued_run_continues_its_wandb_run(tmp_path, monkeypatch):
    import wandb

    asked = []
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.append(settings["id"]) or SimpleNamespace(id="abc", finish=lambda: None))
    settings, world = LoggingSettings(wandb="offline"), World(0, 1, 0, torch.device("cpu"))
    for _ in range(2):
        MetricLogger(tmp_path, settings, {}, "run", world, resume_step=0).close()
    assert asked == [None, "abc"]
