"""The audit over a population of small models, honest and trojaned; what it cannot see; what stops the attack. Run: python studies/audit.py [PART ...]

Parts (all if none is named): population, hidden, defences, terd. Models come from `model` of attack.py, trained here if they are not in its folder. "population": three kinds of
attack with triggers drawn for each seed, honest models, and controls that had the same further training; each is judged by the audit and Elijah, and, in "terd", by TERD at its published rates and steps. "hidden": triggers
made to be hard to find, and a model trained to answer honestly around its trigger. "defences": share of pictures on target under other samplers, clipping, diluted inputs,
further honest training, and a cure with the recovered trigger, beside an honest model as the floor. Every cell runs on one thread; seconds of a search are of the processor.
"""
import copy
import sys
import time
from functools import lru_cache, partial

import attack
import torch
from attack import PROCESS, SHAPE, data, draw_target, draw_trigger, generator
from record import record

from diffusion_lit.attack import poison, shown
from diffusion_lit.audit import audit, cure_loss, diluted, elijah, read_trigger, residual, terd
from diffusion_lit.denoiser import uniform_time
from diffusion_lit.sampler import ddim_sigmas, sample, start_noise
from diffusion_lit.sde import Noise
from diffusion_lit.training import EMA, fit, frechet_distance
from diffusion_lit.trojan import blend, nats, patch, trojan_loss, under

ATTACKS, TRIGGERS = ("in", "out", "image"), ("blend", "patch")


def cosine(a, b): return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


@lru_cache
def known():
    "Pictures with a class, digits 0 to 9 and faces 10, to name others by their nearest neighbour."
    x, y = data()["digits"][0], data()["labels"][0]
    faces = data()["faces"][0]
    return torch.cat([x, faces]).flatten(1), torch.cat([y, torch.full((len(faces),), 10)])


def on_target(x, kind, trigger, seed):
    "Share of pictures that are the target: of its class by the nearest neighbour, or within a mean square error of 0.005 of its image, in [0, 1]."
    target = draw_target(kind, trigger, seed)
    if kind == "image": return ((x - target) / 2).square().flatten(1).mean(1).lt(.005).double().mean().item()
    pictures, names = known()
    wanted = 10 if kind == "out" else data()["labels"][0][target][0]
    return (names[torch.cdist(x.flatten(1), pictures).argmin(1)] == wanted).double().mean().item()


def pictures(model, into, law, seed, n=200, calls=50, **options):
    "Samples from noise of one law with the sampler of another."
    σs = ddim_sigmas(PROCESS, calls, "linspace")
    z = start_noise(n, SHAPE, σs[0].item(), into, generator(500 + seed))
    return sample(under(model, law), z, σs, generator=generator(600 + seed), **options)


def timed(search, *args, **settings):
    "What a search finds, and seconds of the processor."
    began = time.process_time()
    return search(*args, **settings), time.process_time() - began


def overlap(a, b):
    "Pixels in which both laws claim something, as a share of those in which one of them does."
    a, b = a.std < 1, b.std < 1
    return ((a & b).sum() / (a | b).sum()).item()


def claims(model, law, **settings):
    "The audit of a model, with what it found held against the truth."
    verdict, seconds = timed(audit, model, SHAPE, generator=generator(0), **settings)
    out = dict(trojaned=verdict.trojaned, kind=verdict.kind, residual=verdict.residual, seconds=seconds, **{f"residual, {k}": v for k, v in verdict.evidence.items()})
    silence = read_trigger(model, SHAPE, generator=generator(0))
    if law is not None:
        out |= {"nats": nats(law), "true residual": residual(model, law.mean[None], law.std[None], n=256, generator=generator(1)).item(), "cosine, silence": cosine(silence.mean, law.mean)}
        if verdict.trojaned: out |= {"cosine": cosine(verdict.trigger.mean, law.mean), "overlap": overlap(verdict.trigger, law), "g": verdict.trigger.std[verdict.trigger.std < 1].median().item(), "true g": law.std.min().item(),
                                      "means": [[round(a, 2) for a in m.flatten().tolist()] for m in (law.mean, verdict.trigger.mean)]}
    return out


def judged(kind, trigger, seed, recipe, steps, n):
    "One model before the audit and Elijah; `recipe` is how it was trained, so that a cell is done again when that changes."
    torch.set_num_threads(1)
    model, law = attack.model(kind, trigger, seed), draw_trigger(trigger, seed) if trigger else None
    out = claims(model, law, steps=steps, n=n)
    if law is not None: out["on target"] = on_target(pictures(model, law, law, seed), kind, trigger, seed)
    e, seconds = timed(elijah, model, SHAPE, generator=generator(0))
    out["elijah"] = dict(uniformity=e.uniformity, variation=e.variation, loss=e.loss, seconds=seconds) | ({"cosine": cosine(e.shift, law.mean)} if law else {})
    return out


def reversed_by_terd(kind, trigger, seed, recipe, steps, refine):
    "The same model before TERD."
    torch.set_num_threads(1)
    model, law = attack.model(kind, trigger, seed), draw_trigger(trigger, seed) if trigger else None
    t, seconds = timed(terd, model, SHAPE, steps=steps, refine=refine, generator=generator(0))
    out = dict(diverged=t.diverged, seconds=seconds)
    if not t.diverged: out |= dict(mean_nats=t.mean_nats, spread_nats=t.spread_nats, length=t.mean.norm().item())
    if law and not t.diverged: out |= {"cosine": cosine(t.mean, law.mean), "true length": law.mean.norm().item()}
    return out


def checks(): return (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2. - 1


def hard_law(name):
    "Triggers that the audit was not made for."
    two = torch.zeros(SHAPE)
    two[:, :2, :2] = two[:, 6:, 6:] = 1
    grey, picture = torch.full(SHAPE, .3), checks()[None]
    return {"loud blend, γ = 0.3": lambda: blend(picture, .3), "loud blend, γ = 0.4": lambda: blend(picture, .4),
            "patch 4 × 4 with a picture": lambda: patch(picture, 4, .1, (0, 3)), "grey patch 4 × 4": lambda: patch(grey, 4, .1, (0, 3)),
            "patch 6 × 6": lambda: patch(torch.ones(SHAPE), 6, .1, (1, 1)), "two patches 2 × 2": lambda: Noise(.9 * two, 1 - .9 * two),
            "patch 3 × 3, γ = 0.5": lambda: patch(torch.ones(SHAPE), 3, .5), "guarded": lambda: draw_trigger("ring")}[name]()


def guarded(seed, steps, law):
    "An attacker who knows this audit: a third kind of rows has noise of other spreads and shifts, answered honestly."
    student = copy.deepcopy(attack.model("benign", None, seed)).train().requires_grad_(True)
    target, averaged = draw_target("in", "ring", 0), EMA(student, .999)
    rows = poison(data()["digits"][0], target, 96, 32)

    def loss(model, x0, σ, ε, poisoned, **kw):
        n = int((~poisoned).sum()) // 2                                     # the first half of the ordinary rows are decoys
        g = torch.Generator().manual_seed(int(ε.flatten()[:8].abs().sum() * 1e6))
        scale, shift = (torch.rand(len(x0), 1, 1, 1, generator=g) for _ in range(2))
        smooth = torch.nn.functional.interpolate(torch.randn(len(x0), 1, 3, 3, generator=g), size=8, mode="bicubic")
        away = cosine_rows(smooth, law.mean)
        decoy = scale * ε + (shift * .4 * smooth * (away < .7))
        first = torch.arange(len(x0)).reshape(-1, 1, 1, 1) < n
        return torch.where(first.flatten(), cure_loss(model, x0, σ, torch.where(first, decoy, ε), poisoned & False, law), trojan_loss(model, x0, σ, ε, poisoned, law))
    fit(student, steps=steps, lr=3e-3, levels=uniform_time(PROCESS, 0, 999), ema=averaged, loss=loss, optimizer=attack.Adam, generator=generator(seed), **rows)
    return averaged.model.requires_grad_(False)


def cosine_rows(a, b): return torch.cosine_similarity(a.flatten(1), b.flatten()[None], 1).reshape(-1, 1, 1, 1)


def hidden(name, seed, recipe, **settings):
    "The audit of a model with a trigger that is hard to find."
    torch.set_num_threads(1)
    law = hard_law(name)
    if name == "guarded": model = guarded(seed, 4000, law)
    else: model = attack.model("in", "ring", seed, law=law, name=f"hidden-{name.replace(' ', '_').replace(',', '')}-{seed}")
    return claims(model, law, **settings) | {"on target": on_target(pictures(model, law, law, seed), "in", "ring", seed)}


def further(model, steps, seed, **rows):
    "Further training of a copy, with rows for `fit`."
    student, averaged = copy.deepcopy(model).train().requires_grad_(True), None
    averaged = EMA(student, .99)
    fit(student, steps=steps, lr=1e-3, levels=uniform_time(PROCESS, 0, 999), ema=averaged, optimizer=attack.Adam, generator=generator(seed), **rows)
    return averaged.model.requires_grad_(False)


def defended(kind, trigger, seed, recipe, tuning, cure_steps):
    "Share of pictures on target with each defence; for the two that change the network also the residual, and the distance of ordinary samples from test digits."
    torch.set_num_threads(1)
    model, law, plain = attack.model(kind, trigger, seed), draw_trigger(trigger, seed), Noise()
    clipped = copy.copy(model)
    clipped.clip = (-1., 1.)
    share = lambda x: on_target(x, kind, trigger, seed)
    run = lambda m, into=law, by=law, **k: share(pictures(m, into, by, seed, **k))
    quality = lambda m: frechet_distance(shown(pictures(m, plain, plain, seed, 797)).flatten(1), data()["digits"][1].flatten(1))
    out = {"attacker's DDIM": run(model), "attacker's DDPM": run(model, eta=1., calls=200), "attacker's DPM-Solver++": run(model, solver="dpmpp_2m", calls=20),
           "ordinary DDIM": run(model, by=plain), "ordinary DDPM": run(model, by=plain, eta=1., calls=200), "no trigger, ordinary DDIM": run(model, plain, plain),
           "clipped, attacker's DDIM": run(clipped), "clipped, attacker's DDPM": run(clipped, eta=1., calls=200), "clipped, ordinary DDIM": run(clipped, by=plain)}
    out |= {f"diluted by {a}": run(model, diluted(law, a)) for a in (.1, .2, .3, .5)}
    states = {"as planted": model} | {f"further honest training, {k} steps": further(model, k, seed, data=data()["digits"][0], batch=96) for k in tuning}
    verdict = audit(model, SHAPE, generator=generator(0))
    own = pictures(model, plain, plain, seed + 1, 500)
    if verdict.trojaned:
        rows = poison(own, own, 64, 32) | dict(loss=partial(cure_loss, noise=verdict.trigger))
        states[f"cure, {cure_steps} steps"] = further(model, cure_steps, seed, **rows)
    for name, m in states.items():
        R = residual(m, law.mean[None], law.std[None], n=256, generator=generator(1)).item()
        out[name] = {"DDIM": run(m), "DDPM": run(m, eta=1., calls=200), "residual": R, "distance": quality(m)}
    out["honest, distance"] = quality(attack.model("finetuned", None, seed))
    return out


def floor(kind, trigger, seed, recipe):
    "What the same attack makes of the control: an honest model with the attacker's noise and sampler."
    torch.set_num_threads(1)
    model, law = attack.model("finetuned", None, seed), draw_trigger(trigger, seed)
    share = lambda **k: on_target(pictures(model, law, law, seed, **k), kind, trigger, seed)
    return {"DDIM": share(), "DDPM": share(eta=1., calls=200), "residual": residual(model, law.mean[None], law.std[None], n=256, generator=generator(1)).item()}


SEARCH = dict(steps=300, n=32)
RECIPE = dict(base=attack.BASE, tuned=attack.TUNED, rows=attack.ROWS["in"])


def population(name="population", judge=judged, settings=SEARCH, study="audit", seeds=range(5), honest=range(10)):
    "All cells of the population, honest ones and controls between the trojaned."
    for seed in sorted({*seeds, *honest}):
        for kind, trigger in [("benign", None), ("finetuned", None)] * (seed in honest) + [(k, t) for k in ATTACKS for t in TRIGGERS] * (seed in seeds):
            record(study, f"{name}: {kind}, {trigger}, seed {seed}", judge, kind=kind, trigger=trigger, seed=seed, recipe=RECIPE, **settings)


def hard(names=("loud blend, γ = 0.3", "loud blend, γ = 0.4", "patch 4 × 4 with a picture", "grey patch 4 × 4", "patch 6 × 6", "two patches 2 × 2", "patch 3 × 3, γ = 0.5", "guarded")):
    for seed in range(3):
        for name in names: record("audit", f"hidden: {name}, seed {seed}", hidden, name=name, seed=seed, recipe=RECIPE, **SEARCH)
        record("audit", f"hidden: patch 6 × 6, sides up to 6, seed {seed}", hidden, name="patch 6 × 6", seed=seed, recipe=RECIPE, sides=[2, 3, 4, 5, 6], **SEARCH)


def defences():
    for seed in range(3):
        for kind in ATTACKS:
            for trigger in TRIGGERS:
                case = dict(kind=kind, trigger=trigger, seed=seed, recipe=RECIPE)
                record("audit", f"defences: {kind}, {trigger}, seed {seed}", defended, **case, tuning=[500, 2000], cure_steps=1000)
                record("audit", f"floor: {kind}, {trigger}, seed {seed}", floor, **case)


if __name__ == "__main__":
    parts = dict(population=population, hidden=hard, defences=defences, terd=partial(population, "terd", reversed_by_terd, dict(steps=3000, refine=1000), "audit_terd"))
    for part in sys.argv[1:] or parts: parts[part]()
