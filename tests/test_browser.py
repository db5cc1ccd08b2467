"""Every page, opened from the disk in a Chromium without a network: nothing fails, nothing leaves, everything shows."""
import os
import shutil
from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import sync_playwright
from test_book import HTML, PAGES

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
LOOKS = {"light": ("light", 1200), "dark": ("dark", 1200), "phone": ("light", 390)}
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: pages not opened (apt-get install chromium, or set CHROMIUM)")

FAULTS = r"""() => {
  const text = document.querySelector("main").cloneNode(true), faults = [];
  text.querySelectorAll("code, pre, script, mjx-container").forEach(node => node.remove());
  const tex = text.textContent.match(/.{0,20}(\$|\\[(\[]|\\[a-z]+[ {]).{0,20}/g);
  if (tex) faults.push(...tex.map(s => "raw TeX: " + s));
  document.querySelectorAll("mjx-merror, mjx-container [style*='color: red']").forEach(node => faults.push("MathJax: " + node.outerHTML));
  document.querySelectorAll("img").forEach(img => {
    if (!img.complete || !img.naturalWidth) faults.push("broken image: " + img.src.slice(0, 80));
    if (!img.alt) faults.push("no description: " + img.src.slice(0, 80));
  });
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 0) faults.push("wider than the window by " + wide);
  return faults;
}"""

SETTLED = """() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))
    .then(() => Promise.allSettled(document.getAnimations().map(fade => fade.finished)))"""


@pytest.fixture(scope="module")
def chromium(book):
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    "Open a page under a look; at the end, no error was logged and nothing but files was asked for."
    faults, contexts = [], []

    def go(page, query="", **options):
        context = chromium.new_context(offline=True, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda m: m.type in ("error", "warning") and faults.append(f"console: {m.text}"))
        tab.on("pageerror", lambda e: faults.append(f"error: {e}"))
        tab.on("request", lambda r: r.url.startswith(("file:", "data:")) or faults.append(f"request: {r.url}"))
        tab.goto((HTML / page).as_uri() + query)
        if options.get("java_script_enabled", True): tab.evaluate("window.MathJax?.startup?.promise.then(() => null)")
        return tab

    yield go
    for context in contexts: context.close()
    assert not faults


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_whole_in_light_in_dark_and_on_a_phone(visit, page):
    tab = visit(page)
    for look, (scheme, width) in LOOKS.items():
        tab.emulate_media(color_scheme=scheme)
        tab.set_viewport_size({"width": width, "height": 900})
        tab.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
        assert tab.evaluate(FAULTS) == [], look


@pytest.mark.parametrize("page", PAGES if os.environ.get("AXE") else ["nbs/index.html", "nbs/00_page.html", "nbs/glossary.html", "nbs/26_volume.html"])
def test_a_page_is_accessible(visit, page):
    "No serious or critical finding of axe, in light and in dark; AXE=1 looks at every page, which takes ten minutes."
    tab = visit(page)
    tab.evaluate(AXE)
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        tab.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
        tab.evaluate(SETTLED)
        found = tab.evaluate("axe.run(document, {resultTypes: ['violations'], preload: false})")["violations"]
        told = [(v["id"], n["html"][:120], n["failureSummary"][:200]) for v in found if v["impact"] in ("serious", "critical") for n in v["nodes"]]
        assert not told, (scheme, told[:3])


@pytest.mark.parametrize("page", [page for page in PAGES if page[4].isdigit()])
def test_a_slider_turns_the_picture(visit, page):
    tab = visit(page)
    for box in tab.query_selector_all(".flipbook"):
        image, inputs = box.query_selector("img"), box.query_selector_all("input")
        assert inputs
        for control in inputs:
            source, said = image.get_attribute("src"), control.get_attribute("aria-valuetext")
            control.press("ArrowLeft")              # it opens in the middle, so there is room on the left
            assert image.get_attribute("src") != source
            assert control.evaluate("input => input.nextElementSibling.value") == control.get_attribute("aria-valuetext") != said
            assert control.evaluate("input => input.labels[0].innerText.trim()")


def test_a_flipbook_without_scripts_is_a_still(visit):
    tab = visit("nbs/00_page.html", java_script_enabled=False)
    assert tab.query_selector(".flipbook img").is_visible() and not tab.query_selector(".flipbook input").is_visible()


def test_search_finds_a_word(visit):
    tab = visit("search.html", query="?q=flipbook")
    tab.wait_for_selector("ul.search li a")
    assert any("00_page.html" in link.get_attribute("href") for link in tab.query_selector_all("ul.search li a"))
