"""Photograph every page of _build/html (light, dark, phone) into _build/shots, for a person to look at."""
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

HTML = Path(__file__).parents[1] / "_build/html"
LOOKS = {"light": ("light", 1200), "dark": ("dark", 1200), "phone": ("light", 390)}


def main():
    shots = HTML.parent / "shots"
    shots.mkdir(exist_ok=True)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=os.environ.get("CHROMIUM") or shutil.which("chromium"), args=["--no-sandbox"])
        for look, (scheme, width) in LOOKS.items():
            page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
            for path in sorted([*HTML.glob("*.html"), *HTML.glob("nbs/*.html")]):
                page.goto(path.as_uri())
                page.wait_for_function("!window.MathJax || MathJax.startup?.promise.then(() => true)")
                page.screenshot(path=shots / f"{path.stem}-{look}.png", full_page=True)
    print(shots)


if __name__ == "__main__": main()
