"""An untied block that a step does not train stays as it is, to the bit, on every engine that may train several: two processes."""

import pytest


@pytest.mark.parametrize(("length", "cases"), [("short", 15), pytest.param("full", 36, marks=pytest.mark.slow)])
def test_idle_blocks_stand_still_and_trained_ones_follow_the_reference_on_every_engine(ranks, tmp_path, length, cases):
    result = ranks(tmp_path, length, script="tests/distributed/blocks_process.py", gpus=True, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    right = (tmp_path / "right.txt").read_text().splitlines()
    assert len(set(right)) == cases
    engines = ("torch", "fsdp", "zero-0", "zero-1", "zero-2", "zero-3", "zero-1-offload", "zero-2-offload", "zero-3-offload")
    assert {f"{engine} fp32 0.3" for engine in engines} <= set(right)
    assert "untested optimizer" not in result.stdout + result.stderr
