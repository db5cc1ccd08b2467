"""The small priors that are shipped in diffusion_lit/weights: a U-Net for complex brain slices, one for CT slices, and one for the slices of volumes of heads. Run: python studies/priors.py [NAME [ROUNDS [now]]]

Each is trained in rounds, every one with its own warm-up and cosine, so that the study can be stopped after any of them; within a round `fit` resumes from its
checkpoint; `now` takes what the last round has learned so far. After each round the averaged weights are written as half-precision safetensors, and the denoising error on held-out variants is recorded beside
the noise itself, the best stationary linear denoiser (Wiener's, with the training set's mean and power spectrum) and total variation with its weight tuned on training variants.
"""
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from record import record

from diffusion_lit import anatomy
from diffusion_lit.denoiser import Denoiser, edm, lognormal
from diffusion_lit.network import UNet
from diffusion_lit.training import EMA, fit, load, read_tensors, restore, save

WEIGHTS = Path(anatomy.__file__).parent / "weights"
LEVELS = .005, .01, .02, .05, .1, .2, .5, 1., 2., 5., 10., 30.
NET = dict(width=16, mults=[1, 2, 4, 5], middle=False)
PRIORS = {
    "brain": dict(channels=2, size=96, sigma_data=.35, net=NET, slices=4000, others=800, batch=8, lr=2e-3, decay=.998, seed=0),
    "ct": dict(channels=1, size=96, sigma_data=.5, net=NET, slices=3000, others=0, batch=8, lr=2e-3, decay=.998, seed=0),
    "heads": dict(channels=1, size=128, sigma_data=.5, net=NET, slices=1500, others=1500, batch=8, lr=1e-3, decay=.998, seed=0, start="ct"),
}
ROUNDS = 400, 1200, 2400, 4800


def generator(seed): return torch.Generator().manual_seed(seed)


def build(settings):
    "The untrained denoiser."
    torch.manual_seed(settings["seed"])
    net = UNet(settings["channels"], **{k: tuple(v) if isinstance(v, list) else v for k, v in settings["net"].items()})
    return Denoiser(net, edm(settings["sigma_data"])).to(memory_format=torch.channels_last)


def heads(n, size, generator, part, each=25):
    "CT slices `[n, 1, size, size]` of whole heads, about so many of each."
    volumes = anatomy.ct_volumes(max(1, n // each), size, generator, part)
    slices = volumes.movedim(1, 2).flatten(0, 1)
    return slices[torch.randint(len(slices), (n,), generator=generator)]


def examples(name, n, others, size, part, seed):
    "Clean images `[n + others, channel, size, size]`; the others are procedural, or, of heads, four of half the size side by side."
    g = generator(seed)
    if name == "ct": return anatomy.ct_slices(n, size, g, part)
    if name == "heads":
        x = heads(n, size, g, part)
        if not others: return x
        small = heads(4 * others, size // 2, g, part).view(others, 2, 2, size // 2, size // 2)
        return torch.cat([x, small.transpose(2, 3).reshape(others, 1, size, size)])
    x = anatomy.complex_slices(n, size, g, part)
    if others: x = torch.cat([x, torch.polar(anatomy.ellipses(others, size, g), anatomy.smooth_phase(others, size, g))])
    return torch.cat([x.real, x.imag], 1)


class Varied:
    "Images that come mirrored, a little brighter or darker and, if complex, with another phase each time they are drawn."
    def __init__(self, x): self.x, self.shape, self.dtype, self.device = x, x.shape, x.dtype, x.device
    def __len__(self): return len(self.x)

    def __getitem__(self, rows):
        g = generator(int((rows * torch.arange(1, len(rows) + 1)).sum()))         # the same rows give the same images, so that fit resumes exactly
        x, r = self.x[rows], torch.rand(4, len(rows), 1, 1, 1, generator=g)
        x = torch.where(r[0] < .5, x.flip(-1), x)
        if x.shape[1] == 1: return x
        z = torch.complex(x[:, :1], x[:, 1:]) * torch.polar(.8 + .4 * r[1], 2 * torch.pi * r[2])
        return torch.cat([z.real, z.imag], 1)


def levels(u): return lognormal(-1.4, 1.7)(u).clamp(.005, 30)


def train(name, steps, round, settings, stopped=None):
    "One round, or the `stopped` steps of it that are done: the denoiser with averaged weights, and its losses."
    model, folder = build(settings), Path(tempfile.gettempdir()) / "diffusion_lit_priors"
    if stopped:
        path = folder / f"{name}{round}.run"
        tensors, _ = read_tensors(path)
        restore(model, {k[4:]: v for k, v in tensors.items() if k.startswith("ema.")}, path)
        return model, pd.Series(tensors["history"][:, 0])
    folder.mkdir(exist_ok=True)
    if round: load(folder / f"{name}{round - 1}.safetensors", model)
    elif "start" in settings: model.load_state_dict(anatomy.load_prior(settings["start"]).state_dict())
    ema = EMA(model, settings["decay"])
    x = Varied(examples(name, settings["slices"], settings["others"], settings["size"], "train", settings["seed"]))
    history = fit(model, x, steps=steps, batch=settings["batch"], levels=levels, lr=settings["lr"] / (1 + round), ema=ema, every=100, progress=True,
                  resume=folder / f"{name}{round}.run", generator=generator(settings["seed"] + round))
    save(folder / f"{name}{round}.safetensors", ema.model)
    return ema.model, history.loss


class Wiener:
    "The best linear denoiser that treats all places alike: each spatial frequency shrunk by its power over power plus noise."
    def __init__(self, x):
        self.mean = x.mean((0, 2, 3), keepdim=True)
        self.power = torch.fft.fft2(x - self.mean, norm="ortho").abs().square().mean((0, 1))
    def __call__(self, z, sigma):
        return self.mean + torch.fft.ifft2(torch.fft.fft2(z - self.mean) * self.power / (self.power + sigma**2)).real


def tv(z, weight):
    "Total variation denoising of all channels together."
    from skimage.restoration import denoise_tv_chambolle
    return torch.stack([torch.from_numpy(denoise_tv_chambolle(i.double().numpy(), weight, channel_axis=0)) for i in z]).float()


def errors(denoiser, clean, tune, wiener, level, seed=0):
    "Root mean square error per real number at a noise level, of each way to denoise; the weight of TV is the best on other images."
    rms = lambda a, b: float((a - b).square().mean().sqrt())
    noisy = clean + level * torch.randn(clean.shape, generator=generator(seed))
    practice = tune + level * torch.randn(tune.shape, generator=generator(seed + 1))
    weight = min((level * f for f in (.3, .5, .8, 1.2, 2., 4., 8., 16.)), key=lambda w: rms(tv(practice, w), tune))
    with torch.no_grad(): ours = torch.cat([denoiser(part, level) for part in noisy.split(8)])
    return {"noise": level, "Wiener": rms(wiener(noisy, level), clean), "total variation": rms(tv(noisy, weight), clean), "prior": rms(ours, clean)}


def cell(name, steps, round, settings, tests=48, stopped=None):
    "Train one round, judge it, write the weights."
    model, loss = train(name, steps, round, settings, stopped)
    size, seed = settings["size"], settings["seed"]
    fixed = examples(name, 400, 0, size, "train", seed + 2)
    test, wiener = examples(name, tests, 0, size, "test", seed + 1), Wiener(fixed)
    model = half(model)
    table = {str(level): {k: round_to(v) for k, v in errors(model, test, fixed[:6], wiener, level).items()} for level in LEVELS}
    facts = dict(name=name, settings=settings, steps=[*ROUNDS[:round], stopped or steps], examples=fingerprint(name, settings), study="studies/priors.py")
    WEIGHTS.mkdir(exist_ok=True)
    save(WEIGHTS / f"{name}.safetensors", model.half(), **facts, recipe=recipe(facts))
    every = max(len(loss) // 50, 1)
    curve = loss.groupby(loss.index // every).mean()
    return dict(weights=sum(p.numel() for p in model.parameters()), recipe=recipe(facts), every=every, loss=[round_to(v) for v in curve], errors=table)


def fingerprint(name, settings, n=3):
    "Mean and standard deviation of the first training images: they show whether the chapter still makes the same ones."
    return [[round_to(float(f(x))) for f in (torch.mean, torch.std)] for x in examples(name, n, 0, settings["size"], "train", settings["seed"])]


def recipe(facts):
    "A short hash of all that the weights depend on, but for rounding."
    return hashlib.sha256(json.dumps({k: facts[k] for k in ("name", "settings", "steps", "examples")}, sort_keys=True).encode()).hexdigest()[:16]


def foreign(name, size):
    "Real scans in the channels of a prior: name -> `[n, channel, size, size]`. The phase of MR is made up."
    scans = {k: anatomy.square(x, size, size if k == "brain" else None) for k, x in anatomy.real_scans().items()}
    if name != "brain": return {k: scans[k] for k in (("spine", "skull") if name == "ct" else ("skull",))}
    mr = {"brain": scans["brain"][4:20], "abdomen": scans["abdomen"]}
    mr = {k: torch.polar(x, anatomy.smooth_phase(len(x), size, generator(5))) for k, x in mr.items()}
    return {k: torch.cat([x.real, x.imag], 1) for k, x in mr.items()}


def abroad(name, settings, recipe, levels=(.02, .05, .1, .2, .5, 1.)):
    "The shipped prior's error on real scans, beside the same methods, tuned as before."
    size, seed = settings["size"], settings["seed"]
    fixed, model = examples(name, 400, 0, size, "train", seed + 2), anatomy.load_prior(name)
    wiener = Wiener(fixed)
    return {scan: {str(level): {k: round_to(v) for k, v in errors(model, x, fixed[:6], wiener, level).items()} for level in levels}
            for scan, x in foreign(name, size).items()}


def half(model):
    "Weights rounded to half precision, kept as single: what is shipped is what is judged."
    return model.half().float()


def round_to(value, digits=4): return float(f"{value:.{digits}g}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    names, rounds = sys.argv[1:2] or list(PRIORS), int(sys.argv[2]) if len(sys.argv) > 2 else 2
    packages = "torch", "nilearn", "scikit-image"
    for name in names:
        for i, steps in enumerate(ROUNDS[:rounds]):
            kw = dict(name=name, steps=steps, round=i, settings=PRIORS[name])
            if sys.argv[3:] == ["now"] and i == rounds - 1:
                kw["stopped"] = len(read_tensors(Path(tempfile.gettempdir()) / f"diffusion_lit_priors/{name}{i}.run")[0]["history"])
            result = record("priors", f"{name}: round {i}", cell, packages, **kw)
            print(name, i, json.dumps(result["errors"]), flush=True)
        print(json.dumps(record("priors", f"{name}: real scans", abroad, packages, name=name, settings=PRIORS[name], recipe=result["recipe"])))
