"""Untied blocks through the commands: train, resume, export, generate, and what is refused."""



from rdtrain.config import load_config
from rdtrain.metrics import read_metrics


def test_four_blocks_train_resume_bit_for_bit_export_and_generate(tiny_config, tmp_path, rdtrain, assert_resumes_bit_for_bit):
    config = tiny_config(model={"iterations": 8}, schedule={"steps": 40}, checkpoint={"interval": 20}, evaluation={"interval": 20})
    result = rdtrain("train", "--config", config, "model.blocks=4")
    assert result.returncode == 0, result.stderr
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    nll = [record["validation_nll"] for record in records if "validation_nll" in record]
    assert nll[-1] < nll[0] - 0.5
    for record in records[1:]:  # a step trains the two iterations of one block
        trained = {k // 2 for k, loss in enumerate(record["loss_by_iteration"]) if loss is not None}
        assert len(trained) == 1

    assert_resumes_bit_for_bit(load_config(config, ["model.blocks=4"]), tmp_path / "run/checkpoints/step-00000040")

    result = rdtrain("export", tmp_path / "run", "--output", tmp_path / "model")
    assert result.returncode == 0 and "bit for bit" in result.stdout, result.stderr
    assert "4 untied blocks" in (tmp_path / "model/README.md").read_text()
    text = rdtrain("generate", tmp_path / "model", "--prompt", "The function", "--max-new-tokens", "8", "--iterations", "6")
    assert text.returncode == 0 and len(text.stdout) > 20 and "K = 6" in text.stderr, text.stderr


def test_blocks_that_cannot_be_are_refused_before_any_work(tiny_config, tmp_path, rdtrain, refused):
    refused(rdtrain("train", "--config", tiny_config(), "model.blocks=3"), "blocks must divide iterations, and 3 does not divide 4")
    config = tiny_config(objective={"name": "bptt", "trained_iterations": 1}, model={"blocks": 2})
    refused(rdtrain("train", "--config", config), "objective.name=bptt trains one core", "model.blocks is 2", "diffusion_blocks")
    assert not (tmp_path / "run").exists()
