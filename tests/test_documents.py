"""Runs on documents that are kept apart, and on one document a row: from the config to the loss, the token count and the report."""

import json

import pytest
from safetensors.torch import load_file

from rdtrain.config import load_config
from rdtrain.data.rows import DocumentRows
from rdtrain.data.sharding import write_shards
from rdtrain.data.shards import ShardReader
from rdtrain.evaluate.command import EvaluateSettings, evaluate
from rdtrain.metrics import read_metrics
from rdtrain.train import train


@pytest.fixture(scope="module")
def data(texts, tokenizer, tmp_path_factory):
    """Shards of 60 documents of up to 40 tokens or so, and 20 for validation, as a config names them."""
    folder = tmp_path_factory.mktemp("documents")
    for side, count in (("train", 60), ("validation", 20)):
        (folder / f"{side}.jsonl").write_text("".join(
            json.dumps({"text": texts[number % 10][50 * number + count :][: 5 + 13 * number % 90] + "."}) + "\n" for number in range(count)
        ))
        write_shards([folder / f"{side}.jsonl"], tokenizer, folder / side)
    return {side: str(folder / side) for side in ("train", "validation")}


def reports(folder, data, output, **settings):
    """The likelihoods that `rdtrain evaluate` finds for a run on the sequences that it was evaluated on."""
    evaluate(EvaluateSettings([folder], output, shards=data["validation"], skip=["samples"], device="cpu", sequences=8, sequence_length=16,
                              sigma_levels=2, nll_iterations=[1], **settings))
    (found,) = json.loads((output / "report.json").read_text())["likelihood"]
    return found


def assert_evaluated_alike(found, last):
    assert found["held_out"]["nll"] == pytest.approx(last["validation_nll"], rel=1e-5)
    assert found["held_out"]["bits_per_byte"] == pytest.approx(last["validation_bits_per_byte"], rel=1e-5)
    # With other noise, and the target lost in it.
    assert found["cross_entropy_by_sigma"][0]["cross_entropy"] == pytest.approx(last["validation_nll"], rel=0.03)
    assert found["by_iterations"][0]["nll"] == pytest.approx(last["validation_nll"], rel=0.03)


def test_a_run_on_one_document_a_row_counts_targets_alone_however_its_steps_are_divided(tiny_config, data, tmp_path, capsys):
    seen = []
    for name, micro in (("ones", 1), ("fours", 4)):
        settings = {"data": data | {"rows": "documents"}, "batch": {"micro_sequences": micro}, "schedule": {"steps": 4}}
        assert train(load_config(tiny_config(name, **settings))) == 0
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        seen.append([value for record in records[1:] for value in (record["loss"], record["gradient_norm"], *record["loss_by_iteration"])])
        seen[-1].append(records[-1]["validation_nll"])
    loader = DocumentRows(ShardReader(data["train"]), 16, 7)
    assert str(loader) in capsys.readouterr().out and 0.2 < loader.filled < 0.9 and loader.cut > 5
    assert records[-1]["tokens"] == 4 * round(8 * 16 * loader.filled)
    assert all(one == other or one == pytest.approx(other, rel=1e-4) for one, other in zip(*seen, strict=True))
    assert_evaluated_alike(reports(tmp_path / "ones", data, tmp_path / "report", rows="documents"), records[-1])


def test_a_model_of_documents_kept_apart_is_evaluated_and_trained_on_as_such(tiny_config, data, tmp_path):
    data = data | {"document_masking": True}
    assert train(load_config(tiny_config("plain", data=data | {"document_masking": False}, schedule={"steps": 2}))) == 0
    start = {"checkpoint": {"start_from": str(tmp_path / "plain/checkpoints/step-00000002")}}
    assert train(load_config(tiny_config("apart", data=data, schedule={"steps": 4}, **start))) == 0
    state = json.loads((tmp_path / "apart/checkpoints/step-00000004/state.json").read_text())
    assert state["model"]["document_mark"] == ShardReader(data["train"]).manifest["bos_id"]
    weights = load_file(tmp_path / "apart/checkpoints/step-00000004/model.safetensors")
    assert weights.keys() == load_file(tmp_path / "plain/checkpoints/step-00000002/model.safetensors").keys()
    last = read_metrics(tmp_path / "apart/metrics.jsonl")[-1]
    assert_evaluated_alike(reports(tmp_path / "apart", data, tmp_path / "report"), last)
