"""The studies of images: their files are whole, they speak of the prior that is shipped, and a cheap cell of each can be computed again."""
import sys

import pytest
from test_studies import STUDIES, cells

sys.path.insert(0, str(STUDIES))
pytest.importorskip("sigpy", reason="sigpy is not installed (extra: images)")
pytest.importorskip("nilearn", reason="nilearn is not installed (extra: images)")
import dds as study  # noqa: E402
import dds_cost  # noqa: E402
import priors  # noqa: E402

from diffusion_lit.anatomy import load_prior  # noqa: E402


@pytest.mark.parametrize("name", ["ct_speed", "dds", "dds_cost", "mri_speed", "priors", "rivals", "volume"])
def test_every_cell_says_how_it_was_made(name):
    for cell, row in cells(name).items():
        assert set(row) == {"settings", "result", "seconds", "hardware", "versions"} and "torch" in row["versions"], cell


@pytest.mark.parametrize("name", ["brain", "ct", "heads"])
def test_the_recorded_prior_is_the_shipped_one(name):
    prior, table = load_prior(name), cells("priors")
    last = [row["result"] for cell, row in table.items() if cell.startswith(f"{name}: round")][-1]
    assert prior.facts["recipe"] == last["recipe"] == priors.recipe(prior.facts) == table[f"{name}: real scans"]["settings"]["recipe"]


def test_the_training_images_are_still_the_same():
    for name in ("brain", "ct", "heads"):
        for ours, then in zip(priors.fingerprint(name, priors.PRIORS[name]), load_prior(name).facts["examples"]): assert ours == pytest.approx(then, rel=.01, abs=1e-4)


def test_reconstructions_are_of_the_shipped_prior_and_the_tuned_weights():
    table, cases = cells("dds"), set()
    for cell, row in table.items():
        if cell.startswith("weights"): continue
        data, case, kind = cell.split(": ")
        cases.add((data, case, kind))
        if kind == "classical": assert row["settings"]["weights"] == table[f"weights: {case}"]["result"]
        else: assert row["settings"]["recipe"] == load_prior("brain").facts["recipe"] and row["settings"]["settings"] == study.SETTINGS[kind]
    assert len(cases) == 3 * 3 * 2 * 3 * len(study.MASKS)


def test_a_cheap_reconstruction_again():
    stored = cells("dds")["abdomen: equispaced_lines, x4, noise 0.01: classical"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "CLASSICAL", {"cg_sense": study.CLASSICAL["cg_sense"]})
        again = study.cell(**stored["settings"])["scores"]
    for name in ("zero_filled", "cg_sense"):
        for metric in ("psnr", "ssim", "nrmse"): assert again[name][metric][0] == pytest.approx(stored["result"]["scores"][name][metric][0], rel=.01), name


def test_the_cost_of_a_small_reconstruction_adds_up():
    small = dds_cost.split("point", 3, size=64, coils=3)
    assert small["calls"]["network"] == 3 and sum(small["share"].values()) == pytest.approx(1, abs=.01) and small["share"]["rest"] > 0
    net = dds_cost.whole(2, dict(width=32, mults=(1, 1), groups=32), size=64, coils=4)
    assert net["weights"] > 1e5 and net["peak_mib"] >= net["before_mib"]
