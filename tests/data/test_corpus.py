"""The corpus is the same every time, its sides share no paragraph, and a short text still gives two sides."""

import ast
import json
import sysconfig
from pathlib import Path

import pytest

from rdtrain.data import corpus as corpus_module
from rdtrain.data import docstrings as docstrings_module
from rdtrain.data.corpus import write_corpus
from rdtrain.data.docstrings import docstrings, read_docstrings


def documents(folder, side):
    return [json.loads(line) for line in (folder / f"{side}.jsonl").read_text().splitlines()]


def paragraphs(text):
    """Long paragraphs, found in another way than the corpus does: line by line."""
    found, lines = set(), []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            lines.append(line)
        else:
            found.add(" ".join(" ".join(lines).split()))
            lines = []
    return {paragraph for paragraph in found if len(paragraph) > 40}


@pytest.fixture
def small_documentation(monkeypatch):
    """Instead of whole packages, one package of the standard library, so that a test takes a second."""
    monkeypatch.setattr(docstrings_module, "_roots", lambda: {Path(sysconfig.get_path("stdlib"), "email"): "email/"})


def test_docstrings_are_those_of_python(tmp_path):
    file = tmp_path / "module.py"
    file.write_text('"""One."""\nimport nothing_of_this_name\nif True:\n    class A:\n        """  Two\n\n        more. """\n'
                    '        def f(self):\n            r"""Three \\d."""\n'
                    '        async def g(self):\n            "\\ud800"\n    x = "no"\n')
    assert docstrings(file) == ["One.", "Two\n\nmore.", "Three \\d.", "?"]
    file.write_text("print 'two'")
    assert docstrings(file) == []


def test_documents_of_packages(small_documentation):
    found = dict(read_docstrings())
    assert found["topics/lambda"] and "email/message.py" in found and not any("test" in Path(name).parts for name in found)
    charset = Path(sysconfig.get_path("stdlib"), "email", "charset.py")
    for node in ast.walk(ast.parse(charset.read_text())):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            assert sum(ast.get_docstring(node).strip() in text for text in found.values()) >= 1


def test_the_default_corpus_is_the_same_every_time(tmp_path, small_documentation):
    facts = write_corpus(tmp_path / "a", validation_fraction=0.1)
    assert facts == write_corpus(tmp_path / "b", validation_fraction=0.1)
    names = ["corpus.json", "train.jsonl", "validation.jsonl"]
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a/corpus.json").read_text()) == facts
    train, validation = documents(tmp_path / "a", "train"), documents(tmp_path / "a", "validation")
    assert {d["source"] for d in train}.isdisjoint(d["source"] for d in validation)
    assert facts["train"]["documents"] == len(train) and facts["validation"]["documents"] == len(validation) > 0
    assert facts["train"]["text_bytes"] == sum(len(d["text"].encode()) for d in train)
    assert facts["packages"]["torch"]


def test_no_validation_paragraph_is_in_the_training_text(tmp_path, texts):
    copied = "This paragraph was copied\ninto every single document of them."
    lines = [json.dumps({"text": f"{part}\n\n   {copied}\n\nEnd of part {number}.\n"})
             for number, part in enumerate("\n".join(texts).split("\n\n"))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    facts = write_corpus(tmp_path / "corpus", [tmp_path / "a.jsonl"], validation_fraction=0.2)
    train, validation = documents(tmp_path / "corpus", "train"), documents(tmp_path / "corpus", "validation")
    in_training = set().union(*(paragraphs(d["text"]) for d in train))
    in_validation = set().union(*(paragraphs(d["text"]) for d in validation))
    assert len(in_validation) > 20 and in_validation.isdisjoint(in_training)
    assert facts["paragraphs_dropped_from_validation"] >= 1 and copied.replace("\n", " ") in in_training
    assert facts["packages"] == {}


def test_a_single_book_is_cut_between_paragraphs(tmp_path, texts):
    book = "\n\n".join(texts)
    (tmp_path / "book.txt").write_text(book)
    write_corpus(tmp_path / "corpus", [tmp_path / "book.txt"])
    train, validation = documents(tmp_path / "corpus", "train"), documents(tmp_path / "corpus", "validation")
    assert train and validation and len(train) + len(validation) >= 16
    assert all(d["text"] in book and d["source"].startswith(f"{tmp_path}/book.txt#") for d in train)
    pieces = list(corpus_module._pieces(corpus_module.Document("x", book), 500))
    assert "".join(piece.text for piece in pieces) == book and max(len(piece.text) for piece in pieces) < 2000


def test_copies_of_a_document_stand_on_one_side(tmp_path):
    lines = [json.dumps({"text": f"A document whose number is {number}, which is all it says."}) for number in range(50)] * 4
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    facts = write_corpus(tmp_path / "corpus", [tmp_path / "a.jsonl"], validation_fraction=0.2)
    assert facts["paragraphs_dropped_from_validation"] == 0
    assert facts["train"]["documents"] + facts["validation"]["documents"] == 200


@pytest.mark.parametrize("fraction", [1e-9, 0.5])
def test_no_side_is_ever_empty(tmp_path, fraction):
    for number in range(2, 40):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("\n".join(json.dumps({"text": f"{number} {line}"}) for line in range(number)))
        facts = write_corpus(tmp_path / "corpus", [file], fraction, overwrite=True)
        assert facts["train"]["documents"] and facts["validation"]["documents"]


def test_faults(tmp_path, fault):
    file = tmp_path / "a.txt"
    file.write_text("only one line")
    assert "out of range" in fault(lambda: write_corpus(tmp_path / "x", [file], 0.0))
    assert "too short" in fault(lambda: write_corpus(tmp_path / "x", [file]))
    file.write_text("The same paragraph again and again, all along this text.\n\n" * 500)
    assert "is in the training text too" in fault(lambda: write_corpus(tmp_path / "x", [file], 0.5))
    assert "no such file" in fault(lambda: write_corpus(tmp_path / "x", [tmp_path / "none"]))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").touch()
    assert "exists already" in fault(lambda: write_corpus(tmp_path / "x", [file]))
    assert "not an earlier output" in fault(lambda: write_corpus(tmp_path / "x", [file], overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "x"]
