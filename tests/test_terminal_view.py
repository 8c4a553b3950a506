"""`rdtrain watch`: what it shows of a run is what the run wrote, at any moment of it."""

import fcntl
import io
import json
from xml.etree import ElementTree

import pytest

from rdtrain.config import load_config
from rdtrain.errors import UserError
from rdtrain.metrics import read_metrics
from rdtrain.terminal_view import WatchedRun, bars, plain_console, view
from rdtrain.train import train


def shown(*runs: WatchedRun, width: int = 160) -> str:
    console = plain_console(width=width, file=io.StringIO())
    console.print(view(list(runs)))
    return console.file.getvalue()


@pytest.fixture
def finished(tiny_config, tmp_path):
    assert train(load_config(tiny_config())) == 0
    return tmp_path / "run"


def test_a_finished_run_is_shown_as_it_ended(finished, rdtrain, tmp_path, refused):
    result = rdtrain("watch", finished, "--svg", tmp_path / "view.svg")
    last = read_metrics(finished / "metrics.jsonl")[-1]
    assert result.returncode == 0, result.stderr
    for text in ("complete", "step 8 of 8", f"{last['validation_nll']:.4g}", "step-00000008", f"{last['learning_rate']:.4g}"):
        assert text in result.stdout, result.stdout
    shown_lines = {line.strip("│ ").split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    assert list(last["update_size_by_part"]) == ["embedding", "prelude", "core", "coda", "conditioning"]
    assert len(shown_lines["update / weight"]) == 3 + 5 + 2 and "noise, low to high, in 16 bins" in result.stdout
    drawn = "".join(ElementTree.parse(tmp_path / "view.svg").getroot().itertext()).replace("\xa0", " ")
    assert f"rdtrain watch {finished}" in drawn and "step 8 of 8" in drawn and "update / weight" in drawn
    refused(rdtrain("watch", finished, "--svg", tmp_path / "none/view.svg"), "cannot be written")
    refused(rdtrain("watch", finished, "--interval", "nan"), "--interval must be above 0 and a day at the most, and it is nan")
    refused(rdtrain("watch", tmp_path), "is not the folder of a run that has started")


def test_what_is_appended_later_is_read_and_a_continued_run_is_read_anew(finished):
    run, path = WatchedRun(finished), finished / "metrics.jsonl"
    run.look()
    assert run.state == "complete" and run.records == read_metrics(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # in the middle of a line
    run.look()
    assert run.state == "stopped" and run.step == 2
    with (finished / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with path.open("ab") as file:
            file.write(lines[3][20:])
        run.look()
        assert run.state == "running" and run.step == 3
        seconds = [json.loads(line)["step_seconds"] for line in lines[1:4]]
        assert run.seconds_left == pytest.approx(5 * sum(seconds) / 3)
        assert "running" in shown(run) and "left" in shown(run, run)


def test_names_are_shown_as_they_are_and_take_no_room_from_numbers(finished):
    folder = finished.rename(finished.with_name("[red]run"))
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"name": "blocks [seed 0] [/] :x: and many more words of a long name"}))
    run = WatchedRun(folder)
    run.look()
    assert "blocks [seed 0] [/] :x:" in shown(run, run) and "/[red]run " in shown(run)
    assert "…" not in shown(run, run, width=80)


def test_records_that_are_none_and_those_of_another_version_are_refused(finished):
    (finished / "metrics.jsonl").open("a").write('{"loss": 1.0}\n')
    with pytest.raises(UserError, match="a line of .*metrics.jsonl is not a record of metrics"):
        WatchedRun(finished).look()
    facts = json.loads((finished / "run.json").read_text())
    del facts["ranks"], facts["started"]
    (finished / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="run.json has no ranks, started: watch the run with the version of rdtrain that wrote it"):
        WatchedRun(finished).look()
    (finished / "run.json").write_text("[1]")
    with pytest.raises(UserError, match="is not the folder of a run that has started"):
        WatchedRun(finished).look()


def test_mfu_is_of_the_gpus_speed_on_paper():
    facts = {"machine": "NVIDIA H200", "device": "cuda", "precision": "bfloat16", "training_flops_per_token": 1e9, "ranks": 4}
    run = WatchedRun("", facts, [{"step": 1, "tokens_per_second": 1e6}])
    assert run.mfu == pytest.approx(1e15 / (4 * 989.4e12))
    assert WatchedRun("", facts | {"machine": "AMD EPYC"}, run.records).mfu is None


def test_the_slowest_rank_is_the_one_that_most_often_was_and_parts_are_means():
    rows = [(2, 0.5), (1, 0.1), (2, 0.7)]
    records = [{"step": step, "slowest_rank": rank, "slowest_rank_excess": excess} for step, (rank, excess) in enumerate(rows)]
    assert WatchedRun("", {}, records).slowest_rank == (2, pytest.approx(0.6))
    assert WatchedRun("", {}, [{"step": 1}]).slowest_rank is None
    records = [{"step": step, "sizes": {"core": size, "coda": None}} for step, size in enumerate((1.0, None, 4.0))]
    assert WatchedRun("", {}, records).recent_by_part("sizes") == {"core": 2.5}


def test_bars_are_means_over_their_part_and_blank_where_there_is_nothing():
    assert bars([0.0, 7.0], 10) == "▁█" and bars([3.0, 3.0], 2) == "▁▁"
    assert bars([1.0, None, 8.0, float("nan")], 4) == "▁ █ "
    assert bars([0.0, 2.0, 6.0, 8.0], 2) == "▁█" and bars([4.0, 8.0], 2, least=0.0) == "▅█"
    assert bars([], 5) == "" and bars([None], 5) == " "
