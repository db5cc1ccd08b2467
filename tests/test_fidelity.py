"""Chapter 13 beside libraries that define the same, at other seeds, with odd cohorts, and at its real size."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffusion_lit import fidelity as f
from diffusion_lit.records import Cohort, Column, load_nhefs, simulate_cohort


def seeded(seed): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    "Real patients to learn from, held out, and perfect ones."
    everyone, law = simulate_cohort(4500, 120, density=.03, rarest=.002, generator=seeded(1))
    return everyone[:1500], everyone[1500:3000], everyone[3000:], law


@pytest.fixture(scope="module")
def survey():
    "A real table with gaps, in two halves."
    return load_nhefs().split(.5, seeded(0))


def test_columns_and_pairs_agree_with_sdmetrics(survey):
    single, pair = pytest.importorskip("sdmetrics.single_column"), pytest.importorskip("sdmetrics.column_pairs")
    a, b = survey
    A, B = ({c.name: c_.values(names=[c.name])[:, 0] for c in c_.columns} for c_ in survey)
    for row in f.column_shapes(a, b).itertuples():
        theirs = single.KSComplement if row.kind in ("number", "count") else single.TVComplement
        assert row.shape == pytest.approx(theirs.compute(A[row.column], B[row.column])), row.column
        rates = single.MissingValueSimilarity.compute(A[row.column], B[row.column])
        assert 1 - row.missing == pytest.approx(rates), row.column
    import pandas as pd
    ours = f.column_pairs(a, b, pairs=250, generator=seeded(3))
    number = {c.name: c.kind in ("number", "count") for c in a.columns}
    for row in ours.itertuples():
        names = [row.first, row.second]
        frames = [pd.DataFrame({name: c[name] for name in names}) for c in (A, B)]
        if row.score == "correlation": score = pair.CorrelationSimilarity.compute(*frames)
        else: score = pair.ContingencySimilarity.compute(*frames, continuous_column_names=[n for n in names if number[n]])
        assert row.similarity == pytest.approx(score), names
    assert set(ours.score) == {"correlation", "contingency"}


def test_prevalences_and_correlations_agree_with_scipy_and_numpy(world):
    stats = pytest.importorskip("scipy.stats")
    train, test, _, _ = world
    p, q = (c.bits().double().mean(0).numpy() for c in (train, test))
    assert f.prevalence_pearson(train, test) == pytest.approx(stats.pearsonr(p, q)[0])
    assert f.prevalence_spearman(train, test) == pytest.approx(stats.spearmanr(p, q)[0])
    moving = (p > 0) & (q > 0)
    R = [np.corrcoef(c.bits()[:, moving].double().T) for c in (train, test)]
    assert f.correlation_distance(train, test, moving) == pytest.approx(np.linalg.norm(R[0] - R[1]))


def test_log_cluster_is_the_published_formula_for_equal_sizes(world):
    cluster, decomposition = pytest.importorskip("sklearn.cluster"), pytest.importorskip("sklearn.decomposition")
    train, test, _, _ = world
    X = np.concatenate([train.bits(), test.bits()]).astype(np.float32)
    seed = int(f.numpy_rng(seeded(5)).integers(2**31))
    Z = decomposition.PCA(.8, svd_solver="covariance_eigh").fit_transform(X)
    k = cluster.KMeans(4, n_init=4, random_state=seed).fit_predict(Z)
    share = [np.mean(np.flatnonzero(k == j) < len(train)) for j in range(4)]
    published = math.log2(np.mean((np.array(share) - .5)**2))
    assert f.log_cluster(train, test, 4, generator=seeded(5)) == pytest.approx(published)


def test_correlations_converge_to_the_law(world):
    law = world[-1]
    R = f.correlation(Cohort.from_matrix(law.sample(40_000, seeded(2))))
    often = law.prevalence > .01
    assert (R - law.correlation())[often][:, often].abs().max() < .06


@pytest.mark.parametrize("make", [f.independent_marginals, f.gaussian_copula])
def test_a_baseline_keeps_kinds_gaps_and_marginals(make, survey):
    known, held = survey
    made = make(known, 3000, seeded(4))
    assert made.columns[0].name == known.columns[0].name and [c.kind for c in made.columns] == [c.kind for c in known.columns]
    assert len(made) == 3000 and len(set(made.patients.tolist())) == 3000
    shapes = f.column_shapes(known, made)
    assert shapes["shape"].min() > .94 and shapes.missing.max() < .035
    assert [str(t) for t in made.to_frame().dtypes] == [str(t) for t in known.to_frame().dtypes]


def test_the_copula_keeps_pairs_that_independent_columns_lose(world, survey):
    train, test, _, law = world
    truth = law.correlation()
    often = law.prevalence > .02
    off = [torch.linalg.norm((f.correlation(make(train, 20_000, seeded(0))) - truth)[often][:, often])
           for make in (f.gaussian_copula, f.independent_marginals)]
    assert off[0] < .5 * off[1]
    known, held = survey
    pairs = [f.column_pairs(held, make(known, len(held), seeded(1)), 200, seeded(2)).similarity.mean()
             for make in (f.gaussian_copula, f.independent_marginals)]
    assert pairs[0] > pairs[1]


def test_a_report_orders_generators_and_repeats_itself(world):
    train, test, perfect, _ = world
    settings = dict(outcome="outcome", draws=4, costly_draws=2, codes=3)
    good, again, naive = (f.fidelity_report(train, test, s, generator=seeded(0), **settings).set_index("metric")
                          for s in (perfect, perfect, f.independent_marginals(train, 1500, seeded(1))))
    assert good.equals(again)
    for name in ("correlation_distance above 1%", "abundance_distance", "code_auroc"):
        assert not naive.within[name]
        assert abs(good.value[name] - good.floor[name]) < abs(naive.value[name] - naive.floor[name])
    assert naive.within[["prevalence_pearson", "prevalence_difference"]].all()
    assert good.within.mean() >= .8
    assert ((good.floor_low <= good.floor) & (good.floor <= good.floor_high)).all()


def test_a_generator_that_has_collapsed_is_reported_on(world):
    train, test, perfect, _ = world
    nothing = Cohort.from_matrix(np.zeros((1500, 120), np.uint8), train.names)
    everything = Cohort.from_matrix(np.ones((1500, 120), np.uint8), train.names)
    for cohort in (nothing, everything, perfect[[0] * 1500]):
        report = f.fidelity_report(train, test, cohort, outcome="outcome", draws=2, costly_draws=2, codes=2,
                                   generator=seeded(0)).set_index("metric")
        assert not report.within["prevalence_difference"] and report.value["tstr_auroc"] == .5
        assert report.value["prevalence_pearson"] < .99


def test_numbers_without_bits_get_a_report():
    g = np.random.default_rng(0).normal(size=(300, 2))
    cohort = Cohort.from_values([Column("a", "number", "float64"), Column("b", "number", "float64")], g)
    report = f.fidelity_report(cohort[:100], cohort[100:200], cohort[200:], draws=3, costly_draws=3, generator=seeded(0))
    assert report.metric.tolist() == ["column_shape", "missing_difference", "column_pair"] and np.isfinite(report.value).all()
    for metric in (f.prevalence_pearson, f.correlation_distance, f.abundance_distance, f.log_cluster):
        with pytest.raises(ValueError, match="bit columns"): metric(cohort, cohort)


def test_nothing_global_changes(world):
    train, test, perfect, _ = world
    torch.manual_seed(7), np.random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    f.fidelity_report(train, test, perfect, draws=2, costly_draws=2, codes=2, generator=seeded(0))
    f.gaussian_copula(train, 10, seeded(0))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_counts_at_full_width_take_seconds_and_little_memory():
    code = """
import time, torch
from diffusion_lit import fidelity as f
from diffusion_lit.records import Cohort, Column
bits = torch.randint(256, (46_520, 223), dtype=torch.uint8) & torch.randint(256, (46_520, 223), dtype=torch.uint8)
bits[:, -1] &= 0b11111100
cohort = Cohort([Column(f"c{j}", "bit", "uint8", (0, 1)) for j in range(1782)], bits)
start = time.process_time()
f.prevalence(cohort), f.abundance(cohort), f.correlation(cohort)
print(time.process_time() - start, int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20)
"""
    seconds, gigabytes = map(float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                                   check=True).stdout.split())
    assert seconds < 60 and gigabytes < 1.5
