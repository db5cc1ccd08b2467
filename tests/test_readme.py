"""The code of the README and of the preface runs; only its sizes are made smaller here."""
import re
from pathlib import Path

import pytest
import torch

import diffusion_lit

ROOT = Path(__file__).parents[1]
BLOCKS = [(name, code) for name in ("README.md", "nbs/index.md") for code in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)]

SMALLER = {"EHRDiff()": "EHRDiff(hidden=(16,))", "fit(train, progress": "fit(train, steps=2, progress", "fit(train, resume": "fit(train, steps=2, resume", "10_000": "100", "DDPM(), 50": "DDPM(), 2", "karras_sigmas(18)": "karras_sigmas(2)",
           "calls=49": "calls=4", "calls=19, samples=4": "calls=4, samples=2", "calls=19": "calls=5", "movedim(1, 0)": "movedim(1, 0)[24:40]", "slice(10, 12)": "slice(0, 1)", "(3, 32, 32)": "(3, 8, 8)", "audit(model, ": "audit(model, steps=2, n=2, shape="}


def shrink(code):
    "The same lines at a size that ends in seconds."
    code = re.sub(r"steps=\d+", "steps=2", code)
    for large, small in SMALLER.items(): code = code.replace(large, small)
    return code


@pytest.mark.parametrize("name, code", BLOCKS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BLOCKS)])
def test_a_taste_runs(name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusion_lit, "load_checkpoint", lambda path: diffusion_lit.UNet(3, outputs=None if "audit" in code else 6, width=8), raising=False)
    smaller = shrink(code)
    names = dict(images=torch.randn(20, 1, 8, 8) / 2, table=diffusion_lit.simulate_cohort(400, 12, density=.2)[0].to_frame())
    exec(compile(smaller, name, "exec"), names)
    if "EHRDiff" in code: assert len(names["synthetic"]) in (100, 300); return
    if "reconstruct_ct" in code: assert names["found"].hu.isfinite().all() and .3 < names["found"].residual.mean() < 2; return
    if "reconstruct" in code: assert names["found"].image.isfinite().all() and .5 < names["found"].residual < 1.5; return
    if "audit" in code: assert 0 < names["verdict"].residual and names["verdict"].evidence; return
    made = names.get("digits", names.get("new"))
    assert made.isfinite().all() and len(made) in (10, 16)
