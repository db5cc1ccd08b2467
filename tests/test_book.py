"""The book builds without a warning, and what it says of itself is true."""
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "nbs").glob("*.*"))
HTML = ROOT / "_build/html"
PAGES = [f"nbs/{path.stem}.html" for path in SOURCES] + ["genindex.html", "search.html"]
MODULES = [path.stem.partition("_")[2] for path in SOURCES if path.suffix == ".ipynb"]
TEXT = "\n".join(path.read_text() for path in SOURCES)


@cache
def soup(path): return BeautifulSoup(path.read_text(), "html.parser")


@cache
def anchors(path): return {tag["id"] for tag in soup(path).find_all(id=True)} | {"", "top"}


def test_the_book_builds_strictly(book):
    warnings = [line for line in book["output"].splitlines() if "WARNING" in line or "ERROR" in line]
    assert not warnings
    assert book["code"] == 0, book["output"][-3000:]


def test_every_source_is_a_page(book):
    assert not [page for page in PAGES if not (HTML / page).exists()]


def test_every_bibliography_entry_is_cited():
    cited = {key.strip() for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", TEXT) for key in keys.split(",")}
    assert {*re.findall(r"^@\w+\{([^,\s]+)", (ROOT / "references.bib").read_text(), re.M)} == cited


def test_every_label_is_used():
    labels = re.findall(r"\$\$ \((eq-[\w-]+)\)", TEXT) + re.findall(r"(?:#\| label|:name): (fig-[\w-]+)", TEXT)
    assert len(labels) == len(set(labels))
    assert not [label for label in labels if len(re.findall(rf"{label}(?![\w-])", TEXT)) < 2]


def test_every_code_name_of_the_notation_exists():
    rows = re.findall(r"^\|.*\| *(.*?) *\|$", (ROOT / "nbs/notation.md").read_text(), re.M)
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert names
    for name in names:
        module, *rest = name.split(".")
        thing = import_module(f"diffusion_lit.{module}")
        for part in rest: thing = getattr(thing, part)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_on_the_api_page(book, name):
    public = {f"diffusion_lit.{name}.{thing}" for thing in import_module(f"diffusion_lit.{name}").__all__}
    assert public <= anchors(HTML / "nbs/api.html")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_small_and_hides_its_directives(book, page):
    size = (HTML / page).stat().st_size
    size += sum((HTML / page).parent.joinpath(img["src"]).stat().st_size for img in soup(HTML / page).find_all("img", src=re.compile("^[^d]")))
    assert size < 1_500_000
    assert not re.search(r"^\s*(#\s*\||#\s*NBVAL_)", "\n".join(pre.get_text() for pre in soup(HTML / page).find_all("pre")), re.M)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_pictures_are_described(book, page):
    here, broken = HTML / page, []
    for tag in soup(here).find_all(["a", "img", "script", "link"]):
        url, anchor = urldefrag(tag.get("href") or tag.get("src") or "")
        if re.match("data:|https?:|mailto:", url):
            if tag.name != "a" and not url.startswith("data:"): broken.append(url)
            continue
        target = (here.parent / unquote(url.partition("?")[0])).resolve() if url else here
        if not target.exists() or target.suffix == ".html" and unquote(anchor) not in anchors(target): broken.append(f"{url}#{anchor}")
        if tag.name == "img" and not tag.get("alt"): broken.append(f"no alt: {url}")
    assert not broken
