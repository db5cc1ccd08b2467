"""Attacks on trial, their speed, and differential privacy against utility. Run: python studies/privacy.py [PART ...]

Parts (all of them if none is named): trials, speed, dp. A trial gives every attack a copy of the members, fresh real records, and a cohort with 5 % copies; each seed has a
law of its own. Speed is the ratio of the blocked nearest neighbours to one large matrix product and to scikit-learn's brute force, in turns in one run. A dp cell trains the
exact head on one simulated cohort with a promise of (ε, δ), and judges its cohort by utility and by the attacks; ε = null is training without a promise.
"""
import sys
import time
import warnings

import numpy as np
import torch
from record import record

from diffusion_lit.ehrdiff import EHRDiff, Privacy
from diffusion_lit.fidelity import fidelity_report
from diffusion_lit.privacy import (attribute_inference, auc, closeness, density_ratio, epsilon_floor, leaky, nearer_to_train, nearest, privacy_loss, self_test,
                                   true_positives, twins)
from diffusion_lit.records import simulate_cohort

UTILITY = ["prevalence_spearman", "prevalence_difference", "correlation_distance", "abundance_distance"]


def generator(seed): return torch.Generator().manual_seed(seed)


def parts(cohort, n): return [cohort[i:i + n] for i in range(0, len(cohort), n)]


def trial(columns, density, n, known, seed):
    "Every attack on a copy of the members, on fresh real records, and on 5 % copies: n members and n others."
    hospital, _ = simulate_cohort(4 * n, columns, density=density, generator=generator(seed))
    train, test, fresh, reference = parts(hospital, n)
    done = {attack.__name__: self_test(attack, train, test, fresh, reference) for attack in (closeness, density_ratio)}
    done["twins"] = float((twins(test, train) > 0).mean())
    for name, cohort in (("copy", train), ("fresh", fresh), ("5 % copies", leaky(train, fresh, .05, generator=generator(100 + seed)))):
        s, r = (density_ratio(real, cohort, reference) for real in (train, test))
        told = [attribute_inference(who, cohort, known, like=train, generator=generator(200 + seed)) for who in (train, test)]
        reach = np.hypot(*(high - low for _, low, high in told)) / 2
        done[name] = dict(auc=[auc(closeness(train, cohort), closeness(test, cohort)), auc(s, r)], tpr=true_positives(s, r, [.01, .001]).tolist(),
                          loss=privacy_loss(train, test, cohort, generator=generator(300 + seed))["loss"],
                          leak=[told[0][0] - told[1][0], told[0][0] - told[1][0] - reach, told[0][0] - told[1][0] + reach],
                          nearer=nearer_to_train(train, test, cohort, generator=generator(400 + seed)))
    return done


def speed(columns, rows, few, rounds, threads):
    "Operations a second of a plain product and of `nearest`, and seconds of scikit-learn's brute force on fewer rows against ours: medians of the rounds' ratios."
    from sklearn.neighbors import NearestNeighbors
    torch.set_num_threads(threads)
    cohort, _ = simulate_cohort(rows, columns, generator=generator(0))
    x, small = torch.rand(4096, columns), cohort[:few].bits().float().numpy()

    def timed(f):
        began = time.perf_counter()
        f()
        return time.perf_counter() - began
    brute = NearestNeighbors(n_neighbors=1, algorithm="brute", metric="manhattan", n_jobs=threads).fit(small)
    euclid = NearestNeighbors(n_neighbors=1, algorithm="brute", metric="euclidean", n_jobs=threads).fit(small)
    seconds = [[timed(lambda: x @ x.T), timed(lambda: nearest(cohort, cohort)), timed(lambda: nearest(cohort[:few], cohort[:few])),
                timed(lambda: brute.kneighbors(small)), timed(lambda: euclid.kneighbors(small))] for _ in range(rounds)]
    product, ours, short, manhattan, euclidean = np.array(seconds).T
    floor = 2 * rows**2 * columns / (2 * 4096**2 * columns / product)
    return dict(product_gflops=float(np.median(2 * 4096**2 * columns / product / 1e9)), share_of_floor=float(np.median(floor / ours)),
                times_manhattan=float(np.median(manhattan / short)), times_euclidean=float(np.median(euclidean / short)))


def private(columns, density, patients, epsilon, delta, hidden, steps, batch, draws, lr, seed):
    "Utility and attacks of one training with a promise, or with none."
    warnings.simplefilter("ignore")                                         # Opacus and PyTorch on hooks
    hospital, _ = simulate_cohort(4 * patients, columns, density=density, generator=generator(seed))
    train, test, _, reference = parts(hospital, patients)
    promise = None if epsilon is None else Privacy(epsilon=epsilon, delta=delta, draws=draws)
    ehr = EHRDiff(hidden=hidden).fit(train, steps=steps, batch=batch, lr=lr, privacy=promise, generator=generator(seed))
    synthetic = ehr.sample(patients, generator=generator(1000 + seed))
    report = fidelity_report(train, test, synthetic, metrics=UTILITY, draws=8, generator=generator(2000 + seed))
    scores = [density_ratio(real, synthetic, reference) for real in (train, test)]
    table = {r.metric: [float(f"{getattr(r, k):.5g}") for k in ("value", "floor", "baseline")] for r in report.itertuples()}
    return dict(utility=table, auc=auc(*scores), tpr=true_positives(*scores, [.01, .001]).tolist(), epsilon_floor=epsilon_floor(*scores, delta=delta))


def trials():
    for seed in range(5):
        record("privacy", f"trial, seed {seed}", trial, packages=("torch", "numpy"), columns=256, density=.04, n=4000, known=.25, seed=seed)


def speeds(): record("privacy", "speed", speed, packages=("torch", "numpy", "scikit-learn"), columns=1782, rows=8192, few=2048, rounds=3, threads=1)


def dp():
    for seed in range(5):
        for epsilon in (10., None, 1., 3.):
            record("privacy", f"dp, epsilon {epsilon or 'none'}, seed {seed}", private, packages=("torch", "opacus"), columns=96, density=.05, patients=8000,
                   epsilon=epsilon, delta=1e-5, hidden=[64], steps=200 if epsilon else 1000, batch=512, draws=2, lr=.004 if epsilon else .002, seed=seed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    todo = dict(trials=trials, speed=speeds, dp=dp)
    for part in sys.argv[1:] or todo: todo[part]()
