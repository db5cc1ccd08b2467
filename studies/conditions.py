"""Any columns given, holes, and classes: EHRDiff's answers against the simulator's exact ones. Run: python studies/conditions.py

Cells, 5 seeds each: "given" trains both heads on 8,000 simulated patients of 96 codes, gives them 12 conditions of one to three codes, and compares the prevalences of
the free codes with the exact conditional law, in thousandths; "guidance" counts, at several weights, the ten codes most typical of the outcome; "holes" trains on the real
survey and compares missing rates column by column, in points. Seconds are of the processor, on one thread.
"""
import time

import numpy as np
import torch
from record import record

from diffusion_lit.ehrdiff import EHRDiff
from diffusion_lit.records import load_nhefs, simulate_cohort

HEADS = {"exact head, given": dict(head="bernoulli"), "published, overwritten": dict(head="edm")}


def generator(seed): return torch.Generator().manual_seed(seed)


def world(seed, patients=8000, columns=96, density=.04):
    "Patients and their law."
    return simulate_cohort(patients, columns, density=density, generator=generator(seed))


def questions(law, seed, number=12):
    "Conditions of one to three codes that a hundredth of the patients have at least."
    rng, often = np.random.default_rng(seed), np.flatnonzero(law.prevalence.numpy() > .02)
    names = [name for name in law.names if name != "outcome"]
    return [{law.names[j]: int(rng.random() < .8) for j in rng.choice([j for j in often if law.names[j] in names], 1 + k % 3, replace=False)} for k in range(number)]


def given(seed, steps, hidden, n):
    "Mean error of the free prevalences, in thousandths, for each way to answer, and for as many real patients drawn from the exact conditional."
    cohort, law = world(seed)
    asked, errors = questions(law, seed), {}
    truth = [law.conditional(q).float() for q in asked]

    def error(q, p, answer):
        free = [j for j, name in enumerate(law.names) if name not in q]
        return 1000 * (answer[free] - p[free]).abs().mean().item()
    for name, settings in HEADS.items():
        ehr = EHRDiff(hidden=hidden, **settings).fit(cohort, steps=steps, batch=256, decay=.99, lr=.002, generator=generator(seed))
        answers = [ehr.sample(n, condition=q, generator=generator(100 * seed + k)).bits().float().mean(0) for k, q in enumerate(asked)]
        errors[name] = float(np.mean([error(q, p, a) for q, p, a in zip(asked, truth, answers)]))
        if name == "exact head, given":
            free = ehr.sample(n, generator=generator(seed)).bits().float().mean(0)
            errors["exact head, not told"] = float(np.mean([error(q, p, free) for q, p in zip(asked, truth)]))
    draws = [torch.bernoulli(p.expand(n, -1), generator=generator(k)).mean(0) for k, p in enumerate(truth)]
    errors[f"{n:,} exact draws"] = float(np.mean([error(q, p, a) for q, p, a in zip(asked, truth, draws)]))
    return errors


def guidance(seed, steps, hidden, n, weights=(0., .5, 1., 1.5, 2., 3.)):
    "Typical codes of a patient with the outcome, at each weight; exact at weights 0 and 1."
    cohort, law = world(seed)
    gap = (law.conditional(dict(outcome=1)) - law.conditional(dict(outcome=0))).float()
    typical = [j for j in gap.argsort(descending=True).tolist() if law.names[j] != "outcome"][:10]
    out = dict(exact={"0.0": law.prevalence[typical].sum().item(), "1.0": law.conditional(dict(outcome=1))[typical].sum().item()})
    for name, settings in {"exact head": {}, "published, label": dict(head="edm", label="outcome")}.items():
        ehr = EHRDiff(hidden=hidden, **settings).fit(cohort, steps=steps, batch=256, decay=.99, lr=.002, generator=generator(seed))
        out[name] = {str(w): ehr.sample(n, condition=dict(outcome=1), guidance=w, generator=generator(seed)).bits()[:, typical].float().sum(1).mean().item()
                     for w in weights}
    return out


def holes(seed, steps, hidden, n):
    "Missing rates, real and synthetic, in points, of the columns that have holes."
    people = load_nhefs()
    began = time.process_time()
    ehr = EHRDiff(hidden=hidden).fit(people, steps=steps, batch=256, generator=generator(seed))
    synthetic = ehr.sample(n, generator=generator(seed))
    names = [c.name for c in people.columns if c.missing]
    rates = [100 * np.isnan(cohort.values(names=names)).mean(0) for cohort in (people, synthetic)]
    return dict(seconds=round(time.process_time() - began, 1), rates={name: [round(float(a), 2), round(float(b), 2)] for name, a, b in zip(names, *rates)},
                largest=float(np.abs(rates[0] - rates[1]).max()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in range(5):
        print(seed, record("conditions", f"given, seed {seed}", given, seed=seed, steps=1500, hidden=[128, 128], n=4000), flush=True)
        print(seed, record("conditions", f"holes, seed {seed}", holes, seed=seed, steps=4000, hidden=[128, 128], n=20_000)["largest"], flush=True)
        print(seed, record("conditions", f"guidance, seed {seed}", guidance, seed=seed, steps=1500, hidden=[128, 128], n=4000), flush=True)
