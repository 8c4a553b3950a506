"""Ranks that save together: two processes, one of them slow, failing, or reading a damaged file."""


def test_two_ranks_agree_on_what_is_saved_and_what_is_whole(ranks, tmp_path):
    result = ranks(tmp_path, script="tests/distributed/checkpoints_process.py", timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert (tmp_path / "right.txt").read_text() == "both ranks\n"
