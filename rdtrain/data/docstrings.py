"""English text that every installation has: the documentation inside installed Python packages.

Docstrings are parsed out of source files with `ast`; no module is imported for them. One document is one module's docstrings in
the order in which they stand, with a blank line between; a docstring that stood in an earlier module too is left out. The
language reference that Python ships for its `help` comes first, one document a topic.

Notable: this module imports the standard library and tqdm only, since worker processes load it afresh.
"""

import ast
import importlib.util
import multiprocessing
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

from tqdm import tqdm

PACKAGES = ("torch", "numpy", "transformers", "datasets")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
FILES_PER_TASK = 32


def read_docstrings() -> Iterator[tuple[str, str]]:
    """(source, text) of the Python topics and of every module with docstrings in the standard library and `PACKAGES`.

    source is "topics/NAME" or a path such as "torch/nn/functional.py". Order and content depend on the installed versions alone.
    """
    for name, text in sorted(topics.items()):
        yield f"topics/{name}", text
    files = [(source, file) for root, prefix in _roots().items() for source, file in _modules(root, prefix)]
    seen: set[str] = set()
    # spawned, not forked: the caller may run threads by now
    with ProcessPoolExecutor(max_workers=min(8, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.map(docstrings, [file for _, file in files], chunksize=FILES_PER_TASK)
        for (source, _), strings in tqdm(zip(files, found), "docstrings", len(files), unit=" files", disable=None):
            new = [string for string in dict.fromkeys(strings) if string not in seen]
            seen.update(new)
            if new:
                yield source, "\n\n".join(new) + "\n"


def package_versions() -> dict[str, str]:
    """The versions of Python and of those `PACKAGES` that are installed: what decides the text of `read_docstrings`."""
    return {"python": sys.version.split()[0]} | {package: version(package) for package in PACKAGES if _package_folder(package)}


def docstrings(file: Path) -> list[str]:
    """The docstrings of one source file in their order, stripped of indentation; none when Python cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return []
    return list(_docstrings_below(tree))


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = (ast.get_docstring(node) or "").strip()
        if text:
            yield text.encode(errors="replace").decode()  # a lone surrogate, written as an escape, becomes a question mark
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # nothing with a docstring hides in an expression
            yield from _docstrings_below(child)


def _package_folder(package: str) -> Path | None:
    specification = importlib.util.find_spec(package)  # finds a package without importing it
    return Path(specification.origin).parent if specification and specification.origin else None


def _roots() -> dict[Path, str]:
    """The folders to read and what the sources in each begin with."""
    packages = {_package_folder(package): f"{package}/" for package in PACKAGES}
    return {Path(sysconfig.get_path("stdlib")): ""} | {folder: prefix for folder, prefix in packages.items() if folder}


def _modules(root: Path, prefix: str) -> list[tuple[str, Path]]:
    """(source, file) of the modules below `root`, sorted by source."""
    modules = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        modules += [Path(parent, name) for name in names if name.endswith(".py")]
    return sorted((prefix + file.relative_to(root).as_posix(), file) for file in modules)
