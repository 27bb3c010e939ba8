"""What pages, docstrings and examples name exists: files, folders, names in the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: What the texts only give as an example.
EXAMPLES = {"demo.py", "model.py", "my_pass.py", "passes/my_pass.py", "your_script.py"}
#: A file is named from the top, from its package, or as a neighbour.
FROM = ("", "mosaic", "passes", "tests")


def named(text: str) -> set[str]:
    return {m for m in re.findall(r"[\w./*]*\w\.py\b", text) if not m.startswith("/")} - EXAMPLES


def exists(name: str) -> bool:
    return any(any(ROOT.joinpath(folder).glob(name)) for folder in FROM)


PAGES = sorted(ROOT.glob("docs/*.md"))
FOLDERS = {"passes": ROOT / "passes"} | {
    path.parent.name: path.parent for path in ROOT.glob("mosaic/*/__init__.py")
}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_files_in_pages_exist(page: str) -> None:
    text = (ROOT / page).read_text().replace("\\", "")
    folders = set(re.findall(r"`((?:mosaic|passes|tests|examples)/[\w/]*)`", text))
    assert not [name for name in sorted(named(text) | folders) if not exists(name)]


def test_files_in_docstrings_and_comments_exist() -> None:
    wrong = []
    for path in [*ROOT.glob("mosaic/**/*.py"), *ROOT.glob("passes/*.py")]:
        if ROOT / "mosaic/passes" in path.parents:
            continue
        for name in re.findall(r"``([\w/]+\.py)``|\(``?([\w/]+\.py)", path.read_text()):
            name = name[0] or name[1]
            if name not in EXAMPLES and not (exists(name) or (path.parent / name).exists()):
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_what_examples_import_from_mosaic_exists(path: Path) -> None:
    """Some of them only run in the slow sweep."""
    imports = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom))
    for found in imports:
        if found.module and found.module.startswith("mosaic"):
            module = import_module(found.module)
            assert [x.name for x in found.names if not hasattr(module, x.name)] == []


def test_every_folder_has_a_page_and_every_file_its_place_there() -> None:
    missing = []
    for name, folder in FOLDERS.items():
        page = (ROOT / f"docs/{name}.md").read_text()
        files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        missing += [f"{name}/{file}" for file in files if f"`{file}`" not in page]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_in_the_docs_exist(page: Path) -> None:
    """Files, and every word in backticks that could be a name of ours."""
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    folder = FOLDERS.get(page.stem, ROOT)
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    files = [word for word in quoted if re.fullmatch(r"[\w/.*]+\.py", word)]
    assert [word for word in files if not exists(word) and not (folder / word).exists()] == []
    words = {word for word in quoted if re.fullmatch(r"[\w.]+", word)} - set(files)
    known = names_in_code()
    assert [word for word in sorted(words) if not set(word.split(".")) <= known] == []


@cache
def names_in_code() -> set[str]:
    """Every word in the code and its strings."""
    paths = [*ROOT.glob("passes/*.py"), *ROOT.glob("mosaic/**/*.py")]
    return {"tests"}.union(*(re.findall(r"\w+", path.read_text()) for path in paths))
