"""docs/tutorial.md as it stands: its commands one after another, on a little text and with a smaller model."""

import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from rdtrain.cli import build_parser
from rdtrain.data.commands import join_action

PAGE = (Path(__file__).parent.parent / "docs/tutorial.md").read_text()
SMALLER = {
    "data": {"sequence_length": 16}, "model": {"width": 32, "heads": 4, "mlp_width": 48, "iterations": 4}, "schedule": {"steps": 3},
    "batch": {"global_sequences": 4, "micro_sequences": 4}, "engine": {"compile": False}, "evaluation": {"sequences": 4},
}
INSTEAD = {"--vocab-size 8192": "--vocab-size 700", "schedule.steps=400": "schedule.steps=2 objective.trained_iterations=2",
           "--prompts 200": "--prompts 2 --continuations 1 --new-tokens 6 --sequences 4 --sequence-length 16 --nll-iterations 1 4",
           "--iterations 1 8 32": "--iterations 1 4", "--iterations 8": "--iterations 2 --max-new-tokens 6"}
"""What a word of the page is replaced by, to take seconds."""


@pytest.mark.slow
def test_the_tutorial_leads_from_text_to_text(text_folder, tmp_path, monkeypatch, capsys):
    """Each command runs in here, but `python FOLDER`, which tests/test_export.py runs, and what section 1 sets up."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(text_folder, tmp_path / "my_text")
    config = yaml.safe_load(re.search(r"^    # my.yaml\n((?:    .*\n)+)", PAGE, re.M)[1])
    for section, values in SMALLER.items():
        assert section == "evaluation" or values.keys() <= config[section].keys(), f"the page has no {section} like that"
        config.setdefault(section, {}).update(values)
    Path("my.yaml").write_text(yaml.safe_dump(config))
    commands = re.findall(r"^    (rdtrain .*?)(?:\s+#.*)?$", PAGE, re.M)
    assert len(commands) > 10
    done = set()
    for command in commands:
        for found in [words for words in INSTEAD if words in command]:
            command = command.replace(found, INSTEAD[found])
            done.add(found)
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        monkeypatch.setattr(sys, "stdin", io.StringIO("Once\n"))
        arguments = build_parser().parse_args(join_action(sys.argv[1:]))
        assert not arguments.run(arguments), (command, capsys.readouterr())
    assert done == INSTEAD.keys()
    for made in ("comparison/report.html", "comparison/step-time.png", "evaluation/report.md", "my-model/model.safetensors"):
        assert Path(made).stat().st_size, made
