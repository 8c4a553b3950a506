"""A run over a mixture of shards: what it records, and that its weights change at a resume only where that is asked for."""

import shutil

import pytest

from rdtrain.checkpoint import read_state
from rdtrain.config import load_config
from rdtrain.data.mixture import Mixture
from rdtrain.errors import UserError
from rdtrain.metrics import read_metrics
from rdtrain.train import train


def test_weights_change_at_a_resume_and_the_changed_run_resumes_bit_for_bit(tiny_config, shards, tmp_path, assert_resumes_bit_for_bit):
    folders = {"web": str(shards / "train"), "code": str(shards / "validation")}
    file = tiny_config(
        data={"train": folders, "mixture": {"web": 3, "code": 1}}, checkpoint={"interval": 2, "keep": 9}, schedule={"steps": 6},
        evaluation={"interval": 9}, model={"core_layers": 1},
    )
    assert train(load_config(file)) == 0
    run = tmp_path / "run"
    first = read_state(run / "checkpoints/step-00000002")
    assert first["mixture"] == [{"first_sample": 0, "weights": {"code": 1, "web": 3}}]
    before = read_metrics(run / "metrics.jsonl")
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoints/step-0000000{step}")

    with pytest.raises(UserError, match=r"holds a run with data.mixture=.*, or set data.change_mixture=true"):
        train(load_config(file, ["data.mixture={web: 1, code: 3}"]))
    with pytest.raises(UserError, match="data.train="):
        train(load_config(file, ["data.mixture={web: 1}", "data.change_mixture=true", f"data.train={{web: {folders['code']}}}"]))
    more = folders | {"more": str(shards / "train")}
    changed = load_config(file, [f"data.train={more}", "data.mixture={web: 0, code: 3, more: 1}", "data.change_mixture=true"])
    assert train(changed) == 0
    last = run / "checkpoints/step-00000006"
    phases = read_state(last)["mixture"]
    assert [phase["first_sample"] for phase in phases] == [0, 2 * 8]
    after = read_metrics(run / "metrics.jsonl")
    assert [each["loss"] for each in before[1:3]] == [each["loss"] for each in after[1:3]] and before[3]["loss"] != after[3]["loss"]
    assert all(record["data_wait_seconds"] >= 0 for record in after[1:])

    mixture = Mixture(changed.data.mixture, seed=0)
    mixture.continue_from(phases, 6 * 8)
    counts = [mixture.drawn(8 * step) for step in (2, 6)]
    assert all(sum(drawn.values()) == 8 * step for step, drawn in zip((2, 6), counts)) and counts[0]["more"] == 0
    assert counts[0]["web"] == counts[1]["web"] and counts[1]["code"] > counts[0]["code"]
    assert {*before[-1]["epochs"]} == {"web", "code"} and {*after[-1]["epochs"]} == {"code", "more"}
    assert_resumes_bit_for_bit(changed, last)


def test_a_config_whose_mixture_cannot_be_is_refused(tiny_config):
    for data, words in (
        ({"mixture": {"a": -1}}, "0 or more"), ({"mixture": {"a": 0}}, "above 0"), ({"train": {"a": "b"}}, "gives them no weights"),
        ({"train": {"a/b": "c"}, "mixture": {"a/b": 1}}, "a slash"), ({"mixture": {"a": "much"}}, "of the wrong type"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(tiny_config(data=data))
