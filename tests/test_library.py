"""The library is what the notebooks export, light to import, and built in reading order."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [path.stem.partition("_")[2] for path in sorted((ROOT / "nbs").glob("*.ipynb"))]
EXTRAS = "matplotlib PIL ipywidgets IPython accelerate sklearn scipy pyarrow opacus causaldata nbdev fastcore diffusers".split()


def python(code, *options):
    "What a fresh interpreter says when it runs `code`."
    done = subprocess.run([sys.executable, *options, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_alone_and_without_extras(name):
    python(f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); import diffusion_lit.{name}")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_earlier_chapters(name):
    tree = ast.parse((ROOT / f"diffusion_lit/{name}.py").read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    used = {node.module for node in froms if node.level}
    used |= {m.partition(".")[2] for m in plain + [node.module for node in froms if not node.level] if m.startswith("diffusion_lit")}
    assert used <= {*MODULES[:MODULES.index(name)]}, f"{name} imports {used}, the order is {MODULES}"


def test_importing_the_package_is_light():
    said = python("import diffusion_lit, sys; assert 'torch' not in sys.modules", "-X", "importtime")
    micros = int(re.search(r"(\d+) \| diffusion_lit$", said, re.M)[1])
    assert micros < 100_000


def test_every_public_name_is_found_from_the_top():
    python("import diffusion_lit as d\n"
           "assert {*d._names, *d._modules} <= {*dir(d)}\n"
           "for name in d._names: assert getattr(d, name).__name__ == name or name in d._modules, name\n"
           "try: d.nothing\n"
           "except AttributeError as e: assert 'nothing' in str(e)\n"
           "else: raise AssertionError")


def test_exporting_and_cleaning_again_change_no_byte(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for folder in ("nbs", "diffusion_lit"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for generated in (tmp_path / "diffusion_lit").glob("[!_]*.py"): generated.unlink()
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=tmp_path, check=True)
    for kind in ("nbs/*.ipynb", "diffusion_lit/*.py"):
        ours, theirs = ({p.name: p.read_bytes() for p in root.glob(kind)} for root in (ROOT, tmp_path))
        assert ours.keys() == theirs.keys()
        assert not [name for name in ours if ours[name] != theirs[name]], "run `make store`"


def test_the_live_slider_draws_again():
    from diffusion_lit.page import widget
    drawn = []
    slider = widget(lambda sigma: drawn.append(sigma), {"sigma": [0.5, 1., 2.]})
    slider.children[0].value = 2.
    assert drawn[-1] == 2.
