"""Synthetic records, method against method: EHRDiff as published, the exact head, simple baselines and peers. Run: python studies/ehrdiff.py [PART[:HEAD] ...]

Parts (all of them if none is named): main, baselines, small, peers, table, wide, curve, calls. Cells are (cohort, method, seed); each seed has a simulated law, a cohort and a training
of its own. A cell holds rows of `fidelity_report`, synthetic against held-out patients: [value, low, high, floor, floor_low, floor_high], where the floor is real against
real. Fewer patients are judged than were learned from (4,000 of 20,000; 326 of 1,303), because the floor does not hold the training cohort's own noise: with as
many judged as learned from, even a perfect learner would stand outside. Cells also hold seconds of the processor on one thread, and network calls. The two heads have the same widths, steps, batch and optimiser; the published one is given the output
bias that the other has. Mind that the simulated laws are factor models, for which a Gaussian copula is nearly the right model, not a stranger to the data.
Peers run in environments of their own: see `ehrdiff_peers.py`.
"""
import sys
import time

import torch
from ehrdiff_peers import peer_sample
from record import record

from diffusion_lit.ehrdiff import EHRDiff
from diffusion_lit.fidelity import fidelity_report, gaussian_copula, independent_marginals
from diffusion_lit.records import Cohort, load_nhefs, simulate_cohort

METRICS = ["prevalence_pearson", "prevalence_spearman", "prevalence_difference", "band_ratio below 0.1%", "band_ratio 0.1% to 1%", "nonzero_columns",
           "correlation_distance", "correlation_distance above 1%", "abundance_distance"]
MIXED = ["prevalence_pearson", "prevalence_difference", "column_shape", "missing_difference", "column_pair"]
HEADS = {"exact": dict(head="bernoulli"), "published": dict(head="edm", sigma_data=.14)}
SIM128 = dict(columns=128, patients=4000, density=.03)
SIM512 = dict(columns=512, patients=41_868, held_out=4652, density=.02)     # the paper's split
SIM1782 = dict(columns=1782, patients=41_868, held_out=4652, density=.0107)
SEEDS = range(5)


def generator(seed): return torch.Generator().manual_seed(seed)


def cohorts(cohort, seed):
    "Training and held-out patients: of one simulated law, or four fifths and one fifth of the real table."
    if cohort == "nhefs": return load_nhefs().split(.8, generator(seed))
    n, m = cohort["patients"], cohort.get("held_out", cohort["patients"])
    both, _ = simulate_cohort(n + m, cohort["columns"], density=cohort["density"], generator=generator(seed))
    return both[:n], both[n:]


def judge(cohort, train, test, synthetic, seed, rows=4000):
    "The report's rows, five digits each; a band that a small cohort does not have is left out."
    known = MIXED if cohort == "nhefs" else [m for m in METRICS if cohort["patients"] > 10_000 or m != "band_ratio below 0.1%"]
    report = fidelity_report(train, test, synthetic, metrics=known, draws=8, costly_draws=4, rows=rows, generator=generator(1000 + seed))
    wanted = ["value", "low", "high", "floor", "floor_low", "floor_high"]
    return {row.metric: [float(f"{getattr(row, k):.5g}") for k in wanted] for row in report.itertuples()}


def model_cell(cohort, seed, head, hidden, steps, batch, lr, samplers, n):
    "One training, judged with each number of Heun steps."
    train, test = cohorts(cohort, seed)
    ehr = EHRDiff(**HEADS[head], hidden=hidden)

    def judged():
        for heun in samplers:
            began = time.process_time()
            synthetic = ehr.sample(n, steps=heun, generator=generator(2000 + seed))
            seconds = round(time.process_time() - began, 1)
            yield f"{2 * heun - 1} calls", dict(metrics=judge(cohort, train, test, synthetic, seed), sample_seconds=seconds, calls=2 * heun - 1)
    began = time.process_time()
    ehr.fit(train, steps=steps, batch=batch, lr=lr, generator=generator(3000 + seed))
    fit_seconds = round(time.process_time() - began, 1)
    return dict(fit_seconds=fit_seconds, weights=sum(p.numel() for p in ehr.model.parameters()), final_loss=float(ehr.history.loss.iloc[-200:].mean()), samplers=dict(judged()))


def simple_cell(cohort, seed, method, n):
    "A baseline: shuffled columns, correlated normals, or fresh patients of the same law."
    train, test = cohorts(cohort, seed)
    began = time.process_time()
    if method == "fresh patients": synthetic = simulate_law_again(cohort, seed, n)
    else: synthetic = {"independent marginals": independent_marginals, "Gaussian copula": gaussian_copula}[method](train, n, generator(2000 + seed))
    return dict(sample_seconds=round(time.process_time() - began, 1), metrics=judge(cohort, train, test, synthetic, seed))


def simulate_law_again(cohort, seed, n):
    "More patients of the law that `cohorts` drew for a seed."
    n, m = cohort["patients"], cohort.get("held_out", cohort["patients"])
    _, law = simulate_cohort(n + m, cohort["columns"], density=cohort["density"], generator=generator(seed))
    return Cohort.from_matrix(law.sample(n, generator(4000 + seed)).numpy(), law.names)


def peer_cell(cohort, seed, method, n, minutes):
    "A peer, for so many minutes at most if it can be told so."
    train, test = cohorts(cohort, seed)
    out, facts = peer_sample(method, train.to_frame(), n, seed, minutes)
    return facts | dict(metrics=judge(cohort, train, test, as_cohort(train, out), seed))


def as_cohort(like, frame):
    "A peer's table with the columns' meaning put back: codes of categories, numbers as they come."
    import numpy as np
    import pandas as pd
    values = np.empty((len(frame), len(like.columns)))
    for j, c in enumerate(like.columns):
        cells = frame[c.name]
        if c.kind == "category" or (c.kind == "bit" and not set(c.values) <= {0, 1}):
            code = {str(v): k for k, v in enumerate(c.values)}
            values[:, j] = [code.get(str(v), np.nan) for v in cells]
        else: values[:, j] = pd.to_numeric(cells, errors="coerce").astype("float64")
    if not any(c.missing for c in like.columns): values = np.nan_to_num(values)
    return Cohort.from_values(like.columns, values)


def show(name, result):
    "One line a sampler: the value of each metric, and a star where it is outside its floor's interval."
    for label, r in (result.get("samplers") or {"": result}).items():
        def cell(m, v):
            ideal = {"prevalence_pearson": 1, "prevalence_spearman": 1, "column_shape": 1, "column_pair": 1}.get(m, 0)
            outside = v[0] < v[4] if ideal else v[0] > v[5]
            if "band" in m or m == "nonzero_columns": outside = not v[4] <= v[0] <= v[5]
            return f"{v[0]:.4g}{'*' if outside else ''}"
        print(f"{name} {label}:", " ".join(f"{m.replace('prevalence', 'p').replace('correlation_distance', 'cd')}={cell(m, v)}" for m, v in r["metrics"].items()),
              {k: v for k, v in (result | r).items() if "seconds" in k}, flush=True)


def head_cells(file, name, cohort, head, seeds, **settings):
    "Trainings of one head, a seed each; 11 calls for the exact head (and 63), 63 for the published one."
    for seed in seeds:
        cell = f"{name}: {head}, seed {seed}"
        show(cell, record(file, cell, model_cell, cohort=cohort, seed=seed, head=head, **settings))


def main_part(heads=("published", "exact")):
    "The two heads, 5 seeds."
    for head in heads:
        head_cells("ehrdiff", "512", SIM512, head, SEEDS, hidden=[256, 256], steps=3000, batch=256, lr=.002, samplers=[6, 32] if head == "exact" else [32], n=4652)


def small_part(heads=("published", "exact")):
    "A cohort small enough for the peers, with the heads and baselines beside them."
    for seed in SEEDS:
        where = dict(cohort=SIM128, seed=seed)
        for method in ("fresh patients", "independent marginals", "Gaussian copula"):
            show(f"128 {method} {seed}", record("ehrdiff_peers", f"128: {method}, seed {seed}", simple_cell, **where, method=method, n=4000))
        for head in heads:
            head_cells("ehrdiff_peers", "128", SIM128, head, [seed], hidden=[128, 128], steps=2000, batch=256, lr=.002, samplers=[6] if head == "exact" else [32], n=4000)
        for method, minutes in (("arfpy", None), ("python-synthpop", None), ("mostlyai-engine", 1.)):
            show(f"128 {method} {seed}", record("ehrdiff_peers", f"128: {method}, seed {seed}", peer_cell, **where, method=method, n=4000, minutes=minutes))


def peers_part():
    "The peer that copes with 512 columns, for so many minutes."
    for seed in SEEDS:
        show(f"512 mostlyai {seed}", record("ehrdiff_peers", f"512: mostlyai-engine, seed {seed}", peer_cell, cohort=SIM512, seed=seed, method="mostlyai-engine", n=4652, minutes=3.))


def table_part(heads=("published", "exact")):
    "The real table: four fifths to learn from, one fifth held out."
    for seed in SEEDS:
        where = dict(cohort="nhefs", seed=seed)
        for method in ("independent marginals", "Gaussian copula"):
            show(f"nhefs {method} {seed}", record("ehrdiff_table", f"nhefs: {method}, seed {seed}", simple_cell, **where, method=method, n=326))
        for head in heads:
            head_cells("ehrdiff_table", "nhefs", "nhefs", head, [seed], hidden=[128, 128], steps=2000, batch=256, lr=.002, samplers=[6] if head == "exact" else [32], n=326)
        for method, minutes in (("arfpy", None), ("python-synthpop", None), ("mostlyai-engine", .5)):
            show(f"nhefs {method} {seed}", record("ehrdiff_table", f"nhefs: {method}, seed {seed}", peer_cell, **where, method=method, n=326, minutes=minutes))


def wide_part(heads=("published", "exact")):
    "1,782 columns, with a budget that an afternoon can afford."
    for seed in SEEDS:
        for head in heads:
            head_cells("ehrdiff_wide", "1782", SIM1782, head, [seed], hidden=[256, 256], steps=1000, batch=256, lr=.002, samplers=[6] if head == "exact" else [32], n=4652)
        for method in ("fresh patients", "independent marginals", "Gaussian copula"):
            show(f"1782 {method} {seed}", record("ehrdiff_wide", f"1782: {method}, seed {seed}", simple_cell, cohort=SIM1782, seed=seed, method=method, n=4652))


def curve_part(heads=("published", "exact")):
    "Quality against steps of training, each point a training of its own with its own fall of the learning rate."
    for steps in (300, 1000, 3000, 10_000, 30_000):
        for head in heads:
            head_cells("ehrdiff_curve", f"512, {steps} steps", SIM512, head, [0], hidden=[256, 256], steps=steps, batch=256, lr=.002, samplers=[6] if head == "exact" else [32], n=4652)


def calls_part(heads=("exact",)):
    "How few calls will do: 3, 4, 5 and 6 Heun steps of one training."
    for head in heads:
        head_cells("ehrdiff_calls", "512", SIM512, head, SEEDS, hidden=[256, 256], steps=3000, batch=256, lr=.002, samplers=[3, 4, 5, 6], n=4652)


def baselines_part():
    "No network."
    for seed in SEEDS:
        for method in ("fresh patients", "independent marginals", "Gaussian copula"):
            show(f"512 {method} {seed}", record("ehrdiff", f"512: {method}, seed {seed}", simple_cell, cohort=SIM512, seed=seed, method=method, n=4652))


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = dict(main=main_part, baselines=baselines_part, small=small_part, peers=peers_part, table=table_part, wide=wide_part, curve=curve_part, calls=calls_part)
    for part in sys.argv[1:] or parts:                                # e.g. main, or main:published
        name, _, heads = part.partition(":")
        parts[name](*([heads.split(",")] if heads else []))
