"""The studies of health records: their files are whole, and a cheap cell of each can be computed again."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

STUDIES = Path(__file__).parents[1] / "studies"
sys.path.insert(0, str(STUDIES))
pytest.importorskip("scipy", reason="scipy is not installed (extra: health)")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra: health)")
import batches  # noqa: E402
import ehrdiff  # noqa: E402
import full_size  # noqa: E402
from ehrdiff_peers import PEERS  # noqa: E402


def cells(name):
    "A study's cells; a study that has not been run yet is skipped, and says so."
    path = STUDIES / "results" / f"{name}.json"
    if not path.exists(): pytest.skip(f"studies/results/{name}.json is not there yet")
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["batches", "full_size", "full_size_sampling", "ehrdiff", "ehrdiff_peers", "ehrdiff_table", "ehrdiff_wide", "ehrdiff_curve"])
def test_every_cell_says_how_it_was_made(name):
    for cell, row in cells(name).items():
        assert set(row) == {"settings", "result", "seconds", "hardware", "versions"} and "torch" in row["versions"], cell


def test_five_seeds_of_every_method():
    seeds = {}
    for cell, row in cells("ehrdiff").items(): seeds.setdefault(cell.split(": ")[1].split(", seed")[0], set()).add(row["settings"]["seed"])
    assert {"exact", "published", "fresh patients", "independent marginals", "Gaussian copula"} <= set(seeds)
    assert all(s == set(range(5)) for s in seeds.values()), seeds


@pytest.mark.parametrize("name", ["ehrdiff", "ehrdiff_peers"])
def test_the_heads_had_the_same_budget(name):
    rows = {cell: row for cell, row in cells(name).items() if "hidden" in row["settings"]}
    for cell, row in rows.items():
        twin = rows.get(cell.replace("exact", "published"), row)["settings"]
        assert all(row["settings"][k] == twin[k] for k in ("cohort", "seed", "hidden", "steps", "batch", "lr", "n")), cell
        if "published" in cell: assert row["result"]["samplers"]["63 calls"]["calls"] == 63


def test_fresh_patients_stand_in_the_floor():
    "An interval for one more draw holds about 95 of 100 of them."
    inside = [v[4] <= v[0] <= v[5] for cell, row in cells("ehrdiff").items() if "fresh" in cell for v in row["result"]["metrics"].values()]
    assert len(inside) >= 40 and np.mean(inside) > .8


@pytest.mark.parametrize("study, cell", [("ehrdiff", "512: independent marginals, seed 0"), ("ehrdiff_table", "nhefs: independent marginals, seed 0")])
def test_a_cheap_cell_again(study, cell):
    stored = cells(study)[cell]
    if study == "ehrdiff_table": pytest.importorskip("causaldata", reason="causaldata is not installed (extra: health)")
    again = ehrdiff.simple_cell(**stored["settings"])["metrics"]
    for metric, row in stored["result"]["metrics"].items(): assert row[0] == pytest.approx(again[metric][0], rel=.02, abs=1e-3), metric


def test_a_small_cell_of_the_two_heads():
    "The code that wrote the long cells, made short."
    cohort = dict(columns=64, patients=300, density=.05)
    for head, heun in (("exact", 6), ("published", 32)):
        cell = ehrdiff.model_cell(cohort, 0, head, [16], 20, 64, .002, [heun], 200)
        ours = cell["samplers"][f"{2 * heun - 1} calls"]
        assert np.isfinite([v for row in ours["metrics"].values() for v in row]).all() and np.isfinite(cell["final_loss"])


def test_peers_are_open_or_left_out():
    done = {cell.split(": ")[1].split(", seed")[0] for cell in [*cells("ehrdiff_peers"), *cells("ehrdiff_table")]}
    for name, facts in PEERS.items():
        assert {"version", "licence", "method", "studied", "installs", "verdict"} == set(facts)
        assert facts["studied"] or name not in done
        if facts["studied"]: assert facts["licence"] in ("MIT", "Apache-2.0", "EUPL-1.2")
    assert sum(f["studied"] for f in PEERS.values()) >= 2


def test_the_published_sampler_is_one_line_of_ours():
    from diffusion_lit.denoiser import Denoiser, edm
    from diffusion_lit.ehrdiff import published_net
    from diffusion_lit.sampler import karras_sigmas, sample
    torch.manual_seed(0)
    denoiser = Denoiser(published_net(24, (16,)), edm(.14)).double()
    class Double(torch.nn.Module):                                        # the study's sampler talks to networks in single precision
        def forward(self, z, sigma): return denoiser(z.double(), sigma.double())
    z = torch.randn(50, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad(): ours = sample(lambda z, sigma: denoiser(z.float().double(), torch.as_tensor(sigma).float().double()), 80 * z, karras_sigmas(32, .02, 80.), solver="heun")
    theirs = full_size.published_sampler(Double(), z)
    assert (theirs == ours.clamp(0, 1).round()).double().mean() > .999


def test_the_whole_path_made_small():
    result = full_size.full_size(400, 40, 80, 3, 32, [16])
    assert len(result["steps"]) == 7 and all({"wall_seconds", "cpu_seconds", "peak_mib"} == set(step) for step in result["steps"].values())
    stored = cells("full_size")["46,520 patients"]["result"]
    assert len(stored["steps"]) == 7 and result["privacy"].keys() == stored["privacy"].keys()
    assert stored["shape"] == [41868, 4652, 1782] and stored["peak_mib"] < 4096


def test_sampling_made_small():
    small = full_size.against_published(40, 40, [16], 1, 1)
    assert small["ratio"]["published, 63 calls"]["wall"] == 1
    for stored in cells("full_size_sampling").values():
        assert set(stored["result"]["ratio"]) <= set(small["ratio"]) and stored["result"]["ratio"]["exact, 11 calls"]["cpu"] > 5


def test_batches_made_small():
    stored = cells("batches")["1,782 columns"]["result"]
    assert max(stored["ratio"]["dense tensor"], stored["ratio"]["dense tensor of bytes"]) >= 5 and stored["ratio"]["packed bits"] > 2
    x = (torch.rand(500, 40, generator=torch.Generator().manual_seed(0)) < .1).float()
    for way, make in batches.preparations(x, 64).items():
        batch = make()
        assert batch.shape == (64, 40) and batch.dtype == torch.float32 and set(batch.unique().tolist()) <= {0., 1.}, way
        assert (batch[:, None] == x).all(2).any(1).all(), way             # every row is one of the patients
    small = batches.batches(500, 40, 64, 1, (16,))
    assert small.keys() == stored.keys() and small["ratio"]["dense tensor"] > 1
