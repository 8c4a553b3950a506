"""The documentation is of this version: its commands parse, its links lead somewhere, and the errors that it explains exist."""

import re
import shlex
from pathlib import Path

import pytest

from rdtrain.cli import build_parser
from rdtrain.config import load_config
from rdtrain.data.commands import join_action
from rdtrain.train import train

PROJECT = Path(__file__).parent.parent
PAGES = [PROJECT / "README.md", *sorted(PROJECT.glob("docs/**/*.md")), *sorted(PROJECT.glob("configs/**/*.md"))]


def commands(page: Path) -> list[str]:
    """The `rdtrain` commands of a page's indented or fenced blocks, without remarks."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines() if line.startswith("   ")]
    fenced = [line.strip() for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    found = [re.split(r"\s+#|\s{3,}", line)[0] for line in [*lines, *fenced] if line.startswith("rdtrain ")]
    return [command for command in found if not re.match(r"rdtrain [a-z]+ *(VERB|,|`)", command)]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_this_version_takes(page, capsys):
    parser = build_parser()
    for command in commands(page):
        words = [word for word in shlex.split(re.sub(r"\[[^\]]*\]", "", command))[1:] if word != "..."]
        try:
            arguments = parser.parse_args(join_action(words))
        except SystemExit:
            pytest.fail(f"{page.name}: {command}\n{capsys.readouterr().err}")
        overrides = [word for word in getattr(arguments, "overrides", []) if "=" in word]
        if overrides:
            load_config(None, overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_of_a_page_lead_somewhere(page):
    prose = "\n".join(line for line in page.read_text().splitlines() if not line.startswith("    "))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            names = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in names, f"{page.name}: {target}"


def test_explained_errors_are_those_of_the_code():
    """Each error of docs/troubleshooting.md that is quoted as ours, up to its changing parts."""
    sources = "".join(file.read_text() for file in sorted((PROJECT / "rdtrain").rglob("*.py")))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # sentences go over several lines
    page = (PROJECT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^### `(.*)`$", page, re.M)
    assert len(quoted) > 20
    for sentence in quoted:
        for part in sentence.split("..."):
            assert part.strip() in sources, sentence


def test_the_drawing_of_a_runs_folder_has_what_a_run_writes_and_nothing_else(tiny_config, tmp_path):
    page = (PROJECT / "docs/architecture.md").read_text().partition("## A run's folder\n")[2].partition("\nStarting the same")[0]
    drawn, folders = {}, []
    for indent, name, remark in re.findall(r"^    ( *)(\S.*?) {2,}(.*)$", page, re.M):
        if len(indent) > 6:  # a remark that goes on
            continue
        folders = folders[:len(indent) // 2]
        for each in name.split(", "):
            drawn["".join(folders) + each] = remark
        if name.endswith("/"):
            folders.append(name)
    seldom = {name.rstrip("/") for name, remark in drawn.items() if remark.startswith("only ")}
    assert seldom == {"wandb", "wandb-id", "tensorboard", "stacks-rank-1.txt", "skipped_steps.json"}
    assert train(load_config(tiny_config())) == 0
    run = tmp_path / "run"
    written = {str(path.relative_to(run)) + "/" * path.is_dir() for path in run.rglob("*")}
    assert {re.sub(r"step-\d+", "step-00000431", name) for name in written} == {name for name in drawn if name.rstrip("/") not in seldom}
