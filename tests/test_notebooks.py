"""Every notebook keeps the rules of a chapter, as nbs/00_page.ipynb states them."""
import ast
import base64
import json
import re
from collections import Counter
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "nbs").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
DEFINITION = (ast.FunctionDef, ast.ClassDef)


class Cell:
    "A cell with its directives read and its code parsed."
    def __init__(self, cell):
        self.source, self.outputs = "".join(cell["source"]), cell.get("outputs", [])
        self.code = cell["cell_type"] == "code"
        self.directives = dict(re.findall(r"^#\| *([\w-]+):? *(.*)$", self.source, re.M)) if self.code else {}
        self.exported = "export" in self.directives
        python = re.sub(r"^\s*[%!].*$", "pass", self.source, flags=re.M) if self.code else ""
        self.tree = ast.parse(python)
        self.definitions = [node.name for node in self.tree.body if isinstance(node, DEFINITION)]

    def data(self, kind): return [o["data"][kind] for o in self.outputs if kind in o.get("data", {})]

    def length(self):
        "Lines that are neither blank nor comments, signatures nor docstrings."
        skipped = set()
        for node in ast.walk(self.tree):
            if isinstance(node, DEFINITION):
                skipped.update(range(node.lineno, node.body[0].lineno))
                if ast.get_docstring(node): skipped.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        lines = enumerate(self.source.splitlines(), 1)
        return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in skipped for i, line in lines)

    def checks(self, name):
        "Whether the cell could fail over `name`."
        mentions = any(getattr(node, "id", getattr(node, "attr", None)) == name for node in ast.walk(self.tree))
        return mentions and re.search(r"\bassert|\btest_\w+\(|\braises\(", self.source)


def cells(path): return [Cell(cell) for cell in json.loads(path.read_text())["cells"]]
def code(path): return [cell for cell in cells(path) if cell.code]


def test_a_name_is_defined_once_in_the_book():
    homes = [(name, path.name) for path in NOTEBOOKS for cell in code(path) for name in cell.definitions]
    twice = {name for name, n in Counter(name for name, _ in homes).items() if n > 1}
    assert not twice, [home for home in homes if home[0] in twice]


@each_notebook
def test_an_exported_definition_is_checked_within_two_cells(path):
    all_code = code(path)
    unchecked = [name for i, cell in enumerate(all_code) if cell.exported for name in cell.definitions
                 if not any(after.checks(name) for after in all_code[i + 1:i + 3])]
    assert not unchecked


@each_notebook
def test_cells_are_short(path):
    long = [(cell.length(), cell.source[:60]) for cell in code(path) if cell.length() > (25 if cell.exported else 35)]
    assert not long


@each_notebook
def test_one_exported_cell_imports(path):
    importing = [cell for cell in code(path) if cell.exported and any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in cell.tree.body)]
    assert len(importing) == 1
    assert all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in importing[0].tree.body)


@each_notebook
def test_a_figure_is_numbered_captioned_and_described(path):
    for cell in code(path):
        pictures, pages = cell.data("image/png"), [page for page in map("".join, cell.data("text/html")) if "<img" in page]
        if not pictures + pages: continue
        assert len(pictures) == 1, f"one figure a cell:\n{cell.source}"
        assert cell.directives.get("label", "").startswith("fig-"), cell.source
        assert cell.directives.get("fig-cap"), cell.source
        assert cell.directives.get("fig-alt") or all(re.search('<img[^>]* alt="[^"]+"', page) for page in pages) and pages, cell.source
        assert pages or len(base64.b64decode("".join(pictures[0]))) <= 60_000, f"over 60 KB:\n{cell.source}"


@each_notebook
def test_a_notebook_is_small_and_names_no_folder_of_its_author(path):
    assert path.stat().st_size <= 500_000
    outputs = re.sub("[A-Za-z0-9+/=]{200,}", "", json.dumps([cell.outputs for cell in cells(path)]))
    assert not re.search(r"/(home|root|Users|tmp|work)/", outputs)


@each_notebook
def test_no_stored_cell_failed(path):
    assert not [cell.source for cell in code(path) if any(o["output_type"] == "error" for o in cell.outputs)]


@each_notebook
def test_a_chapter_opens_and_closes_as_agreed(path):
    first, text = cells(path)[0].source, "\n".join(cell.source for cell in cells(path) if not cell.code)
    assert re.match(r"# \S.*\n+> \S.*(\n\n|$)", first), "the first cell opens with a title and one line that begins with >"
    assert [c.directives["default_exp"] for c in code(path) if "default_exp" in c.directives] == [path.stem.partition("_")[2]]
    for heading in ("## What we built", "## Exercises", "## Further reading"): assert text.count(f"\n{heading}\n") == 1, heading
    labels = re.findall(r"\{exercise\}.*\n:label: (\S+)", text)
    solved = re.findall(r"\{solution(?:-start)?\} (\S+)", text)
    assert 3 <= len(labels) <= 5 and sorted(labels) == sorted(solved)
