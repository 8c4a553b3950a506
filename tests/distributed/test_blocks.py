"""An untied block that a step does not train stays as it is, to the bit, on every engine that may train several: two processes."""

import itertools


def test_idle_blocks_stand_still_and_trained_ones_follow_the_reference_on_every_engine(ranks, tmp_path):
    result = ranks(tmp_path, script="tests/distributed/blocks_process.py", gpus=True, timeout=500)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    engines = ("torch", "fsdp", "zero-0", "zero-1", "zero-2", "zero-3", "zero-1-offload", "zero-2-offload", "zero-3-offload")
    ways = itertools.product(engines, ("fp32", "bf16"), ("0.3", "0.0"))
    assert (tmp_path / "right.txt").read_text().splitlines() == [" ".join(way) for way in ways]
    assert "untested optimizer" not in result.stdout + result.stderr
