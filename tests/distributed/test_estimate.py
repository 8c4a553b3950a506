"""What rdtrain/estimate.py says of memory and traffic is what every engine, stage and precision keeps and sends: two processes."""

import pytest


@pytest.mark.parametrize(("length", "cases"), [("short", 12), pytest.param("full", 24, marks=pytest.mark.slow)])
def test_memory_and_traffic_are_those_of_every_engine(ranks, tmp_path, length, cases):
    result = ranks(tmp_path, length, script="tests/distributed/estimate_process.py", gpus=True, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert len((tmp_path / "right.txt").read_text().splitlines()) == cases
