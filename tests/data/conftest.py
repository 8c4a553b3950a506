"""One check that every message of the data room must pass, and documents in files of every kind."""

import gzip
import json
from collections.abc import Callable

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from rdtrain.errors import UserError


@pytest.fixture
def fault() -> Callable[[Callable[[], object]], str]:
    """Calls a function that must raise UserError and returns the message, which must be one line."""
    def message(call: Callable[[], object]) -> str:
        with pytest.raises(UserError) as caught:
            call()
        text = str(caught.value)
        assert "\n" not in text, text
        return text
    return message


@pytest.fixture(scope="session")
def lines() -> Callable[[list[str]], bytes]:
    """Documents as JSON Lines."""
    return lambda documents: "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


@pytest.fixture(scope="session")
def content() -> Callable:
    """Every file below a folder, by its name in it, with what it holds."""
    return lambda folder: {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="session")
def documents(texts):
    """Some hundred small documents, some of them twice, with an empty one."""
    found = [paragraph for text in texts for paragraph in text.split("\n\n")][:500]
    return [*found, found[3], "", found[40], "  \n", "the end"]


@pytest.fixture(scope="session")
def mixed(documents, lines, tmp_path_factory):
    """The documents, a hundred each, in files of every kind; their names keep the order."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + lines(documents[:100]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(documents[100:200])))
    frames = [zstandard.compress(lines(documents[start:start + 50])[:-1] + b"\n" * (start < 250)) for start in (200, 250)]
    (folder / "c.jsonl.zst").write_bytes(b"".join(frames))
    pyarrow.parquet.write_table(pyarrow.table({"id": [*range(100)], "text": documents[300:400]}), folder / "d.parquet", row_group_size=9)
    for number, text in enumerate(documents[400:500]):
        (folder / f"e{number:03}.txt").write_text(text)
    (folder / "f.json").write_text(json.dumps(documents[500:], indent=1))
    return folder
