"""The README's results are those of docs/results, and each ratio is of the runs of one day."""

import json
import re
import shutil
from pathlib import Path
from statistics import mean

import pytest

from rdtrain.compare.results_table import END, PROJECT, START, results, write
from rdtrain.errors import UserError

README = PROJECT / "README.md"


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the README and the measurements."""
    shutil.copytree(PROJECT / "docs/results", tmp_path / "docs/results")
    shutil.copy(README, tmp_path)
    return tmp_path


def shares(text: str) -> list[tuple[str, str, str]]:
    """(commit, share of the time, share of the training FLOPs) of each comparison."""
    return re.findall(r"At (\w+),.*?: ([\d.]+) of the time and ([\d.]+) of the training FLOPs", " ".join(text.split()))


def test_the_readme_holds_what_the_command_makes():
    held = README.read_text().partition(START)[2].partition(END)[0].strip()
    assert held == results(PROJECT), "run `python -m rdtrain.compare.results_table`"


def test_what_is_between_the_marks_is_replaced_and_nothing_else(project):
    readme = project / "README.md"
    before = readme.read_text()
    readme.write_text(before.replace("| arm |", "| old |"))
    for _ in range(2):
        write(readme, results(project))
        assert readme.read_text() == before
    readme.write_text(before.replace(END, ""))
    with pytest.raises(UserError, match="has no place for results"):
        write(readme, "")


def test_shares_are_those_of_one_commit(project):
    file = project / "docs/results/quality.json"
    rows = json.loads(file.read_text())
    expected = []
    for commit in ("2205f7d", "4b9cd89", "7ac4a84"):
        blocks, truncated = ([row for row in rows if row["commit"] == commit and row["objective"].startswith(kind)]
                             for kind in ("diffusion_blocks", "bptt truncated"))
        goal = mean(row["validation_nll"] for row in truncated)
        flops, seconds, _ = min((point for row in blocks for point in row["curve"] if point[2] <= goal), key=lambda point: point[1])
        expected.append((commit, f"{seconds / mean(row['seconds'] for row in truncated):.3f}",
                         f"{flops / mean(row['training_flops'] for row in truncated):.3f}"))
    found = shares(results(project))
    assert len(found) == 5 and set(expected) < set(found)
    for row in rows:  # another machine, half as fast
        if row["commit"] == "7ac4a84":
            row["seconds"] *= 2
            row["curve"] = [[flops, 2 * seconds, nll] for flops, seconds, nll in row["curve"]]
    file.write_text(json.dumps(rows))
    assert shares(results(project)) == found and "| local BPTT | 7ac4a84 | 234 |" in results(project)
    for row in rows:
        row["machine"] = "NVIDIA H100" if "local" in row["objective"] else row["machine"]
    file.write_text(json.dumps(rows))
    assert "| local BPTT | 7ac4a84 |" in results(project)
    assert shares(results(project)) == [share for share in found if share[0] != "7ac4a84"]


def test_a_day_whose_arms_were_all_run_again_is_left_out(project):
    assert "30058de" in (project / "docs/results/quality.json").read_text() and "30058de" not in results(project)


@pytest.mark.parametrize("name, change", [
    ("quality.json", lambda text: text.replace('"commit"', '"day"')),
    ("quality.json", lambda text: text.replace("bptt local", "bptt global")),
    ("ablations.json", lambda text: text[:-9]),
    ("quickstart.md", lambda text: text.replace("training FLOPs", "FLOPs")),
    ("quickstart.md", lambda text: text.replace("commit ", "")),
])
def test_measurements_that_are_not_as_expected_are_refused(project, name, change):
    file = project / "docs/results" / name
    file.write_text(change(file.read_text()))
    with pytest.raises(UserError, match="cannot be read"):
        results(project)
