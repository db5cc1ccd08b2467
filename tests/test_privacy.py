"""The attacks against independent libraries and plain loops, on trial over five seeds, and on tables that are not all bits."""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_lit.privacy import (adversarial, as_table, attribute_inference, auc, bootstrap, closeness, density_ratio, distances, dp_bound, epsilon_floor, known_columns, leaky,
                                   log_kernel, nearer_to_train, nearest, privacy_loss, privacy_report, self_test, true_positives, twins)
from diffusion_lit.records import Cohort, Column, simulate_cohort

pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra: health)")
pytest.importorskip("scipy", reason="scipy is not installed (extra: health)")

ROOT = Path(__file__).parents[1]


def generator(seed=0): return torch.Generator().manual_seed(seed)


def quarters(seed, n, columns=256):
    cohort, _ = simulate_cohort(4 * n, columns, density=.04, generator=generator(seed))
    return [cohort[i * n:(i + 1) * n] for i in range(4)]


def mixed_cohort(n, seed):
    "Bits, bits with gaps, a category, a count and a number with gaps; patients of two kinds."
    rng = np.random.default_rng(seed)
    kind = rng.integers(2, size=n)
    columns = [Column("dead", "bit", "uint8", (0, 1)), Column("ill", "bit", "Int64", (0, 1), missing=True), Column("ward", "category", "str", ("a", "b", "c"), missing=True),
               Column("stays", "count", "int64", (), 0, 40, 1), Column("kg", "number", "float64", (), 40, 120, missing=True)]
    values = np.c_[rng.random(n) < .2 + .3 * kind, rng.random(n) < .5, rng.integers(3, size=n) * kind, rng.poisson(3 + 9 * kind), 80 + 20 * kind + rng.normal(0, 5, n)].astype(float)
    values[:, 3:] = values[:, 3:].clip([0, 40], [40, 120])
    for j in (1, 2, 4): values[rng.random(n) < .15, j] = np.nan
    return Cohort.from_values(columns, values)


def gower(a, b):
    "The distance of two rows of values, cell by cell."
    total = 0.
    for x, y, width in zip(a, b, (None, None, None, 40, 80)):
        if math.isnan(x) or math.isnan(y): total += math.isnan(x) != math.isnan(y)
        else: total += float(x != y) if width is None else abs(x - y) / width
    return total


def test_mixed_distances_are_those_of_a_plain_loop():
    a, b = mixed_cohort(40, 0), mixed_cohort(30, 1)
    expected = np.array([[gower(x, y) for y in b.values()] for x in a.values()])
    assert np.allclose(distances(as_table(a), as_table(b, a)).numpy(), expected, atol=1e-5)
    found, index = nearest(a, b, 3, batch=7)
    assert np.allclose(found.numpy(), np.sort(expected, axis=1)[:, :3], atol=1e-5)
    assert np.allclose(np.take_along_axis(expected, index.numpy(), 1), found.numpy(), atol=1e-5)


def test_ranges_are_those_of_the_cohort_that_is_named():
    a = mixed_cohort(20, 0)
    wide = Cohort.from_values([c._replace(high=240.) if c.name == "kg" else c for c in a.columns], a.values())
    assert not torch.allclose(nearest(a, a, 2, like=wide)[0], nearest(a, a, 2, like=a)[0])
    assert torch.allclose(nearest(a, wide, 2, like=a)[0], nearest(a, a, 2)[0])


@pytest.mark.parametrize("batch", [13, 97, 1000])
@pytest.mark.parametrize("k", [1, 4])
def test_neighbours_do_not_depend_on_the_blocks(k, batch):
    from scipy.spatial.distance import cdist
    rng = np.random.default_rng(0)
    x, y = rng.random((60, 77)) < .1, rng.random((210, 77)) < .1
    expected = np.sort(77 * cdist(x, y, "hamming").round(8), axis=1)[:, :k]
    assert np.allclose(nearest(x.astype(int), y.astype(int), k, batch=batch)[0].numpy(), expected)
    own = 77 * cdist(x, x, "hamming") + 1e9 * np.eye(60)
    assert np.allclose(nearest(x.astype(int), x.astype(int), k, exclude_self=True, batch=batch)[0].numpy(), np.sort(own, axis=1)[:, :k])


def test_wide_records_are_exact():
    "Sums of products stay whole numbers, also in records of thousands of codes."
    x = torch.randint(2, (20, 5000), generator=generator(1))
    expected = (x[:, None] != x[None]).sum(-1)
    assert torch.equal(distances(as_table(x), as_table(x)), expected.float())


def test_every_score_of_a_cohort_on_trial_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score
    train, test, fresh, reference = quarters(7, 400)
    for attack in (closeness, density_ratio):
        s, r = (attack(real, fresh, reference) for real in (train, test))
        assert abs(auc(s, r)[0] - roc_auc_score([1] * 400 + [0] * 400, np.r_[s, r])) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_the_attacks_prove_themselves(seed):
    "4,000 members and 4,000 others: a copy is caught up to the twins, fresh records are not."
    n = 4000
    train, test, fresh, reference = quarters(100 + seed, n)
    d, bound = (twins(test, train) > 0).mean(), 3 / math.sqrt(6 * n)
    close, dense = (self_test(attack, train, test, fresh, reference) for attack in (closeness, density_ratio))
    assert abs(close["copy"] - (1 - d / 2)) <= .01 and dense["copy"] >= 1 - d / 2 - .01
    assert abs(close["fresh"] - .5) <= bound and abs(dense["fresh"] - .5) <= bound
    assert close["passed"] and dense["passed"]


@pytest.mark.parametrize("seed", range(2))
def test_the_other_attacks_catch_a_copy_and_nothing_else(seed):
    n = 2000
    train, test, fresh, _ = quarters(200 + seed, n)
    alone = (twins(train, train) == 1).mean()
    on_copy, on_fresh = (privacy_loss(train, test, cohort, level=.999, generator=generator(seed)) for cohort in (train, fresh))
    assert abs(on_copy["train"][0] - (1 - alone) / 2) < 1e-6 and on_copy["loss"][1] > .3
    assert on_fresh["loss"][1] < 0 < on_fresh["loss"][2] and abs(on_fresh["test"][0] - .5) < 4 * .5 / math.sqrt(2 * n)
    copied, free = (nearer_to_train(train, test, cohort, .999, generator(seed)) for cohort in (train, fresh))
    assert abs(copied[0] - (1 - (twins(train, test) > 0).mean() / 2)) < 1e-12 and free[1] < .5 < free[2]
    told = {name: [attribute_inference(who, cohort, .25, like=train, level=.999, generator=generator(seed)) for who in (train, test)]
            for name, cohort in (("copy", train), ("fresh", fresh))}
    assert told["copy"][0][0] - told["copy"][1][0] > .3
    (member, low, high), (other, least, most) = told["fresh"]
    assert abs(member - other) < math.hypot(high - low, most - least) / 2


def test_a_tie_is_no_leak():
    "Counted as `not greater`, ties would pull the adversarial accuracy of fresh records far below one half."
    train, _, fresh, _ = quarters(300, 1500)
    near, own = nearest(train, fresh)[0], nearest(train, train, exclude_self=True)[0]
    assert (near > own).double().mean() < .42 and abs(np.mean(adversarial(train, fresh)) - .5) < .03


def test_the_intervals_cover():
    "Standard errors of the privacy loss and of the share nearer to members, against their spread over draws of fresh cohorts."
    everyone, _ = simulate_cohort(30_000, 128, density=.06, generator=generator(1))
    losses, shares = [], []
    for seed in range(40):
        rows = torch.randperm(30_000, generator=generator(seed))
        train, test, fresh = (everyone[rows[i:i + 400]] for i in (0, 400, 800))
        losses.append(privacy_loss(train, test, fresh, generator=generator(seed))["loss"])
        shares.append(nearer_to_train(train, test, fresh, generator=generator(seed)))
    for draws, truth in ((np.array(losses), 0), (np.array(shares), .5)):
        claimed = (draws[:, 2] - draws[:, 1]).mean() / (2 * 1.96)
        assert abs(draws[:, 0].mean() - truth) < 4 * claimed / 40**.5 and .7 < draws[:, 0].std() / claimed < 1.35


def test_the_report_on_a_mixed_table():
    train, test, same = mixed_cohort(300, 0), mixed_cohort(300, 1), mixed_cohort(300, 2)
    clean = privacy_report(train, test, same, known=["ward", "stays"], generator=generator()).set_index("metric")
    copy = privacy_report(train, test, train, known=["ward", "stays"], generator=generator()).set_index("metric")
    assert not clean.alarm.any()
    assert {"membership by distance, AUC", "attribute inference, members less others", "adversarial accuracy, privacy loss", "copies, share equal to just one member"} <= set(
        copy.index[copy.alarm])
    assert copy.value["closest record, median distance"] == 0 < clean.value["closest record, median distance"]
    assert list(clean.columns[:4]) == ["value", "low", "high", "ideal"] and {"floor", "floor_low", "floor_high", "baseline"} < set(clean.columns)
    assert clean.value["membership by distance, TPR at 0.1 % FPR"] != clean.value["membership by distance, TPR at 0.1 % FPR"]       # too few others: NaN


def test_the_report_can_be_repeated():
    train, test, fresh, _ = quarters(5, 200, 64)
    one, two = (privacy_report(train, test, fresh, generator=generator(3)) for _ in range(2))
    assert one.equals(two)


def test_bad_input_is_named():
    train, test, fresh, reference = quarters(6, 60, 32)
    wrong = {
        "columns": [lambda: nearest(train, fresh.select(fresh.names[:9])), lambda: privacy_report(train, test, fresh.select(fresh.names[::-1])), lambda: twins(train, mixed_cohort(9, 0))],
        "patients": [lambda: nearest(train[:0], fresh), lambda: closeness(train, fresh[:0])],
        "k must": [lambda: nearest(train, fresh, 61), lambda: nearest(train, train, 60, exclude_self=True)],
        "known": [lambda: attribute_inference(train, fresh, 1.5), lambda: attribute_inference(train, fresh, 32), lambda: known_columns(train, ["no such code"])],
        "at least 20": [lambda: privacy_report(train, test[:3], fresh)],
        "positive": [lambda: privacy_report(train, test, fresh, cap=0)],
        "flip": [lambda: log_kernel(train, fresh, .5)],
        "reference": [lambda: density_ratio(train, fresh, None)],
        "share": [lambda: leaky(train, fresh, 2.)],
        "as many": [lambda: self_test(closeness, train, test[:9], fresh)],
        "fpr": [lambda: true_positives([1.], [0.], [.1, 1.1])],
        "level": [lambda: bootstrap(np.mean, [1., 2.], level=1.)],
        "epsilon": [lambda: dp_bound(.1, -1)],
        "scores": [lambda: auc([], []), lambda: epsilon_floor([float("nan")] * 9, [0.] * 9)],
    }
    for word, calls in wrong.items():
        for call in calls:
            with pytest.raises(ValueError, match=word): call()


def test_a_promise_holds_against_the_attack_that_knows_it():
    "Randomised response on one bit: the attack with the best possible score never refutes a true promise, and refutes a false one."
    rng, ε, refuted, false = np.random.default_rng(0), 1.5, 0, 0
    keep = math.exp(ε) / (1 + math.exp(ε))
    for _ in range(40):
        s, r = ((rng.random(2000) < p).astype(float) for p in (keep, 1 - keep))
        refuted += epsilon_floor(s, r) > ε
        false += epsilon_floor(s, r) > ε - .5
    assert refuted <= 4 and false == 40


def test_the_module_needs_no_extra_to_be_imported():
    code = "import sys; sys.modules.update(dict.fromkeys(['sklearn', 'scipy', 'pandas', 'opacus', 'pyarrow'])); import diffusion_lit.privacy"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_recorded_trials_passed():
    study = json.loads((ROOT / "studies/results/privacy.json").read_text())
    found = [cell["result"] for name, cell in study.items() if name.startswith("trial")]
    assert len(found) == 5 and all(trial[attack]["passed"] for trial in found for attack in ("closeness", "density_ratio"))
