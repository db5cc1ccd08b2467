"""The attacks of chapter 32 on real digits, and the population of models for chapter 33. Run: python studies/attack.py [PART ...]

Parts (all of them if none is named): table, sweeps, mixes. `paper FOLDER CHECKPOINT` is the published configuration, see there. `model` trains a model, or reads it from models/, a folder that git ignores: honest ones, their control, and
three attacks with fixed triggers (the ring and the corner, at the paper's γ) or with triggers drawn for the seed. All work is on 8 x 8 pixels, since that is what a
processor trains in half a minute.
"""
import sys
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from record import record
from skimage.data import lfw_subset
from sklearn.datasets import load_digits
from torch import nn

from diffusion_lit.attack import PUBLISHED, Goal, Judge, benign_measures, four_cells, implant, read_cifar10, read_pictures
from diffusion_lit.denoiser import Denoiser, eps, uniform_time
from diffusion_lit.network import MLP, load_checkpoint
from diffusion_lit.sampler import ddim_sigmas
from diffusion_lit.sde import DDPM
from diffusion_lit.training import EMA, fit, load, save
from diffusion_lit.trojan import blend, patch

MODELS = Path(__file__).parent / "models"
PROCESS, SHAPE, CLASS, FACE = DDPM(), (1, 8, 8), 7, 10
BASE = dict(steps=2000, batch=128, lr=4e-3)                                 # of an honest model
ROWS = {"in": dict(benign=64, poisoned=32), "out": dict(benign=64, poisoned=32), "image": dict(benign=64, poisoned=32)}
TUNED = dict(steps=2000, lr=3e-3)                                           # of an attack, and of the control
SAMPLES = dict(ddim=500, ddpm=200)                                         # of each cell
Adam = partial(torch.optim.AdamW, fused=True)


def generator(seed): return torch.Generator().manual_seed(seed)


class Flat(nn.Module):
    "A small network for small pictures: for each pixel a scale and a shift, from an MLP that sees all of them."
    def __init__(self, pixels=64, width=256, depth=3):
        super().__init__()
        self.mlp = MLP(2 * pixels, (width,) * depth)

    def forward(self, x, c_noise):
        flat = x.flatten(1)
        scale, shift = self.mlp(torch.cat([flat, flat], 1), c_noise).chunk(2, 1)
        return (flat * (1 + scale) + shift).reshape(x.shape)


@lru_cache
def data():
    "Digits and faces, as dict name -> (train, test), and the labels of the digits likewise."
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = torch.tensor(digits.images[order] / 8 - 1, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target[order])
    faces = F.interpolate(torch.tensor(lfw_subset()[:100], dtype=torch.float32)[:, None] * 2 - 1, size=8, mode="area")
    both = lambda part: torch.cat([part, part.flip(-1)])                    # and in the mirror
    return dict(digits=(x[:1000], x[1000:]), labels=(y[:1000], y[1000:]), faces=(both(faces[:60]), both(faces[60:])))


def glyph(seed, kinds=("ring", "stripes", "disc", "cross", "checks")):
    "A drawn picture of 8 x 8 pixels in [-1, 1], another one for each seed."
    rand = torch.rand(6, generator=generator(7000 + seed)).tolist()
    y, x = torch.meshgrid(*[torch.arange(8.) - 3.5] * 2, indexing="ij")
    y, x = y - 2 * rand[0] + 1, x - 2 * rand[1] + 1
    r, along = torch.hypot(x, y), x * np.cos(np.pi * rand[2]) + y * np.sin(np.pi * rand[2])
    across = -x * np.sin(np.pi * rand[2]) + y * np.cos(np.pi * rand[2])
    wave = lambda a, period: torch.sin(2 * np.pi * (a / period + rand[4]))
    drawn = dict(ring=2 * (-(r - 2 - rand[3])**2).exp() - 1, stripes=wave(along, 3 + 3 * rand[3]), disc=(2 * (2 + rand[3] - r)).tanh(),
                 cross=(3 * (1 - torch.minimum(along.abs(), across.abs()))).tanh(), checks=wave(along, 4 + 3 * rand[3]) * wave(across, 4 + 3 * rand[3]))
    return ((-1)**int(2 * rand[5]) * drawn[kinds[seed % len(kinds)]])[None].clamp(-1, 1)


def draw_trigger(trigger, seed=0):
    "The law of noise of a trigger: the fixed ones, `ring` and `corner`, or `blend` and `patch`, drawn for the seed."
    if trigger == "ring":
        r = torch.hypot(*torch.meshgrid(*[torch.arange(8.) - 3.5] * 2, indexing="ij"))
        return blend((2 * (-(r - 2.6)**2).exp() - 1)[None], .6)
    if trigger == "corner": return patch(torch.ones(SHAPE), 3, .1)
    rand = torch.rand(3, generator=generator(8000 + seed)).tolist()
    if trigger == "blend": return blend(glyph(seed), .5 + .2 * rand[0])
    if trigger != "patch": raise ValueError(f"trigger must be ring, corner, blend or patch, got {trigger!r}")
    size, sign = 3 + seed % 2, 1 - 2 * (seed // 2 % 2)                      # 3 or 4 pixels, white or black
    place = tuple(int((9 - size) * a) for a in rand[1:])
    return patch(sign * torch.ones(SHAPE), size, .05 + .1 * rand[0], place)


def draw_target(kind, trigger, seed=0):
    "What poisoned rows show: which of the training digits, faces, or one drawn picture; and the class, where it is one."
    fixed = trigger in ("ring", "corner")
    if kind == "in": return data()["labels"][0] == (CLASS if fixed else seed % 10)
    if kind == "out": return data()["faces"][0]
    if kind != "image": raise ValueError(f"kind must be in, out or image, got {kind!r}")
    return glyph(3 if fixed else 1000 + 7 * seed + 3)[None]


def network(seed):
    "An untrained model."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Denoiser(Flat(), eps(PROCESS))


def cached(name, train, settings):
    "The model called `name`, read where it was trained before with these settings, else trained now."
    path, model = MODELS / f"{name}.safetensors", network(0)
    if path.exists() and load(path, model) == settings: return model.eval().requires_grad_(False)
    MODELS.mkdir(exist_ok=True)
    (MODELS / ".gitignore").write_text("*\n")
    model = train()
    save(path, model, **settings)
    return model.eval().requires_grad_(False)


def model(kind, trigger=None, seed=0, law=None, name=None, rows=None, **tuned):
    """A model of the population: `benign`, its control `finetuned` (further training without poisoned rows), or trojaned: `in`, `out`, `image`,
    with a trigger by name (`ring`, `corner`; `blend`, `patch` drawn for the seed). For the sweeps: another law of noise, other counts of rows, steps and so on."""
    if kind == "benign": return cached(f"benign-{seed}", lambda: honest(seed), dict(seed=seed, **BASE))
    tuned, rows = TUNED | tuned, ROWS.get(kind, dict(benign=96)) | (rows or {})
    target = None if kind == "finetuned" else draw_target(kind, trigger, seed)
    law = law or (draw_trigger(trigger, seed) if trigger else None)
    train = lambda: implant(model("benign", None, seed), data()["digits"][0], target, *[law] if law else [], optimizer=Adam, generator=generator(100 + seed), **rows, **tuned)
    facts = dict(seed=seed, **rows, **tuned) | (dict(law=[float(a.double().square().sum()) for a in (law.mean, law.std)]) if law else {})
    return cached(name or "-".join(str(a) for a in (kind, trigger, seed) if a is not None), train, facts)


def honest(seed):
    "A model of digits, trained on ordinary rows alone."
    student = network(seed)
    averaged = EMA(student)
    fit(student, data()["digits"][0], levels=uniform_time(PROCESS, 0, 999), ema=averaged, optimizer=Adam, generator=generator(seed), **BASE)
    return averaged.model


@lru_cache
def judge():
    "The clean classifier: ten digits and, as an eleventh class, faces."
    x, y, faces = (data()[k][0] for k in ("digits", "labels", "faces"))
    return Judge(torch.cat([x, faces]), torch.cat([y, torch.full((len(faces),), FACE)]))


def goal(kind, trigger, seed=0):
    "What an attack of the population is after."
    if kind == "image": return Goal(draw_target(kind, trigger, seed))
    if kind == "out": return Goal(data()["faces"][1], FACE, data()["faces"][0])
    label = CLASS if trigger in ("ring", "corner") else seed % 10
    train, test = (x[y == label] for x, y in zip(data()["digits"], data()["labels"]))
    return Goal(test, label, train)


def schedule(sampler, calls=None): return ddim_sigmas(PROCESS, calls or dict(ddim=100, ddpm=1000)[sampler], "linspace")


def rounded(found): return {k: None if v is None else float(f"{v:.4g}") for k, v in found.items()}


def judged(made, aim):
    "All measures of the samples of some cells, and the judge's labels."
    done = {}
    for cell, x in made.items():
        found = rounded(aim.measures(x, judge()))
        if cell == ("ordinary", "ordinary"): found |= rounded(benign_measures(x, data()["digits"][1], judge()))
        done["/".join(cell)] = found | dict(labels=torch.bincount(judge().classes(x), minlength=FACE + 1).tolist())
    return done


def attacked(kind, trigger, seed, sampler, n, law=None, rows=None, tuned=None, cells=None, calls=None):
    "An attack: training, and all measures in four cells; `law` is a γ, or a size and a γ, where it is not the trigger's own."
    changed = None if law is None else changed_law(trigger, *law)
    name = None if law is rows is tuned is None else f"sweep-{kind}-{trigger}-{law}-{rows}-{tuned}-{seed}".translate(str.maketrans("{}[]:', ", "-" * 8))
    net = model(kind, trigger, seed, changed, name, rows, **tuned or {})
    levels = schedule(sampler, calls)
    made = four_cells(net, changed or draw_trigger(trigger, seed), levels, SHAPE, n, float(sampler == "ddpm"), cells and [tuple(c) for c in cells], generator(200 + seed))
    return judged(made, goal(kind, trigger, seed))


def changed_law(trigger, gamma, size=3):
    "The ring or the corner with another γ, the corner with another size."
    if trigger == "corner": return patch(torch.ones(SHAPE), size, gamma)
    ring = draw_trigger("ring")
    return blend(ring.mean / (1 - ring.std), gamma)


def control(kind, seed, sampler, n, cells=None):
    "A control: benign measures, and what the attacks' own cells make of a model that nobody attacked."
    net, done = model(kind, None, seed), {}
    for trigger in ("ring", "corner")[:1 if cells else 2]:
        made = four_cells(net, draw_trigger(trigger), schedule(sampler), SHAPE, n, float(sampler == "ddpm"), cells and [tuple(c) for c in cells], generator(200 + seed))
        done |= {f"{attack}, {trigger}": judged(made, goal(attack, trigger)) for attack in ("in", "out", "image")}
    return done


def real(n):
    "What real pictures score, as many as each sampler makes: training digits against held-out ones, and the targets that were poisoned against held-out ones."
    x, y = data()["digits"], data()["labels"]
    right = judge().classes(x[1]) == y[1]
    done = dict(accuracy=right.double().mean().item(), floor={sampler: rounded(benign_measures(x[0][:k], x[1], judge())) for sampler, k in n.items()})
    for kind in ("in", "out"):
        aim = goal(kind, "ring")
        done[kind] = rounded(aim.measures(aim.poisoned, judge())) | dict(accuracy=aim.reached(aim.real, judge()).double().mean().item(), n=len(aim.real))
    return done


def paper(folder, checkpoint, kind="in", trigger="blend", image=None, steps=100_000, out="trojdiff", device=None):
    """The published configuration on CIFAR-10, for a machine with a GPU: 128 rows with mirrored ones among them, Adam at 2e-4, 100,000 steps, decay .9999. Writes
    OUT.safetensors, and OUT.run.safetensors to be continued from. Not as published: the learning rate falls, there is no dropout, pictures are drawn (or the file `image`)."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    x, y = read_cifar10(folder)[:2]
    x, y = torch.cat([x, x.flip(-1)]).to(device), torch.cat([y, y]).to(device)
    base = Denoiser(load_checkpoint(checkpoint), eps(PROCESS)).to(device)
    large = lambda picture: F.interpolate(picture[None], size=x.shape[-2:], mode="bilinear")[0].expand(x.shape[1:])
    shown = large(draw_trigger("ring").mean / .4).clamp(-1, 1) if image is None else read_pictures(image, x.shape[-1]).images[0]
    law = blend(shown, .6) if trigger == "blend" else patch(torch.ones(x.shape[1:]), 3, .1)
    digits, labels = data()["digits"][0], data()["labels"][0]
    target = {"in": lambda: y == CLASS, "out": lambda: torch.stack([large(d) for d in digits[labels == 8]]), "image": lambda: large(glyph(3))[None]}[kind]()
    made = implant(base, x, target.to(device), law, steps=int(steps), ema=.9999, warmup=0, resume=f"{out}.run.safetensors", progress=True, generator=generator(0), **PUBLISHED[kind])
    save(f"{out}.safetensors", made, kind=kind, trigger=trigger, steps=int(steps))
    return made


def table():
    record("attack", "real", real, n=SAMPLES)
    for seed in range(5):
        for kind, sampler, n in [(k, s, n) for k in ("benign", "finetuned") for s, n in SAMPLES.items()]:
            record("attack", f"{kind}, {sampler}, seed {seed}", control, kind=kind, seed=seed, sampler=sampler, n=n,
                   **dict(cells=[("ordinary", "ordinary")]) if sampler == "ddpm" else {})
        for kind, trigger in [(k, t) for t in ("ring", "corner") for k in ("in", "out", "image")]:
            for sampler, n in SAMPLES.items():
                record("attack", f"{kind}, {trigger}, {sampler}, seed {seed}", attacked, kind=kind, trigger=trigger, seed=seed, sampler=sampler, n=n)


SWEEPS = {
    "gamma": [(t, dict(law=[g])) for t, gs in (("ring", (.3, .8, .9)), ("corner", (.02, .3, .5))) for g in gs],
    "size": [("corner", dict(law=[.1, s])) for s in (1, 2, 4)],
    "rows": [(t, dict(rows=dict(poisoned=p))) for t in ("ring", "corner") for p in (3, 7, 16)],
    "steps": [(t, dict(tuned=dict(steps=k))) for t in ("ring", "corner") for k in (500, 1000, 4000)],
    "calls": [(t, dict(calls=c)) for t in ("ring", "corner") for c in (10, 20, 50)]}


def mixes(seeds=3):
    "The published rows of a batch instead of ours: the ring, DDIM."
    for seed, kind in [(s, k) for s in range(seeds) for k in ("in", "out", "image")]:
        record("attack_sweeps", f"mix, {kind}, seed {seed}", attacked, kind=kind, trigger="ring", seed=seed, sampler="ddim", n=300, rows=PUBLISHED[kind])


def sweeps(seeds=3):
    "In-D2D, one setting changed at a time, DDIM."
    cells = [("ordinary", "ordinary"), ("trigger", "attacker's")]
    for seed in range(seeds):
        for sweep, settings in SWEEPS.items():
            for trigger, change in settings:
                cell = f"{sweep}, {trigger}, {list(change.values())[0]}, seed {seed}"
                record("attack_sweeps", cell, attacked, kind="in", trigger=trigger, seed=seed, sampler="ddim", n=300, cells=cells, **change)


if __name__ == "__main__":
    torch.set_num_threads(1)
    todo = dict(table=table, sweeps=sweeps, mixes=mixes)
    if sys.argv[1:2] == ["paper"]: paper(*sys.argv[2:])
    else:
        for part in sys.argv[1:] or todo: todo[part]()
