"""Texts of several models after the same prompts, side by side."""

import json
from pathlib import Path

SHOWN = 3


def side_by_side(files: list[Path]) -> str:
    """Markdown: the first prompts of samples files, how a person went on, and how each model did at its settings."""
    if not files:
        return ""
    columns: dict[str, dict[int, str]] = {}
    prompts: dict[int, tuple[str, str]] = {}
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                sample = json.loads(line)
                if sample["number"] or sample["prompt_number"] >= SHOWN:
                    continue
                setting = sample["setting"]
                name = f"{sample['model']}, K = {setting['iterations']}, temperature {setting['temperature']:g}"
                columns.setdefault(name, {})[sample["prompt_number"]] = sample["continuation"]
                prompts[sample["prompt_number"]] = sample["prompt"], sample["human"]
    text = ["## Text side by side", ""]
    for number, (prompt, human) in sorted(prompts.items()):
        text += [f"**{_cell(prompt)}**", "", "| | |", "| --- | --- |", f"| the book | {_cell(human)} |"]
        text += [f"| {_cell(name)} | {_cell(texts.get(number, ''))} |" for name, texts in columns.items()] + [""]
    return "\n".join(text)


def _cell(text: str) -> str:
    """Text that says in a cell of a table what it says."""
    special = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_{}[]<>#|!&"})
    return " ".join(text.split()).translate(special)
