"""Small files are whole or absent, in one encoding, and what a disk refuses is said with a mend that fits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rdtrain.data.output import write_atomically
from rdtrain.errors import UserError


def test_a_refusal_names_the_mend_and_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"nowhere/a.json cannot be written \(No such file .*make its folder one that is there"):
        write_atomically(tmp_path / "nowhere/a.json", "{}")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="free some disk space"):
        write_atomically(tmp_path / "a.json", "{}")
    assert not list(tmp_path.iterdir())


def test_the_encoding_is_not_the_locales(tmp_path):
    code = r"from pathlib import Path; from rdtrain.data.output import write_atomically; write_atomically(Path('a.md'), '\xb1 \u4e00')"
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | ascii_locale, check=True)
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == "\xb1 \u4e00"
