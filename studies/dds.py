"""Reconstruction with the shipped prior: DDS beside the classical methods. Run: python studies/dds.py [DATA ...] [ACCELERATION]

Cells are (data, mask, acceleration, noise). Data: "variants" of the template held out from the prior's training; "brain" and "abdomen", real scans of other people, with a smooth phase added, as
tests outside of what the prior has seen. Eight coils are simulated (birdcage), and known to every method; the noise is a share of the 99th percentile of the magnitudes. Masks are redrawn for each image.
Classical weights are tuned on two *training* variants for each mask, acceleration and noise, over a grid. The presets of DDS are as they are shipped, with the noise level told. Every image counts once: PSNR and SSIM of magnitudes with a data range of the truth's largest
magnitude, and the complex NRMSE; nothing is rescaled. A cell holds one kind of method. Means, and 95 % intervals of the mean over images. Seconds are of the processor on one thread, for one image.
"""
import itertools
import sys
import time
from functools import partial

import torch
from record import record
from scipy.stats import t as student

from diffusion_lit import anatomy, mri
from diffusion_lit.dds import dds, several

MASKS = dict(random_lines=mri.random_lines, equispaced_lines=mri.equispaced_lines, gaussian_points=mri.gaussian_points, poisson_disc=mri.poisson_disc)
CLASSICAL = dict(cg_sense=(mri.cg_sense, [0., .003, .01, .03, .1, .3], dict(iterations=20)),
                 l1_wavelet=(mri.l1_wavelet, [.0005, .001, .002, .005, .01, .02, .05], dict(iterations=40)),
                 total_variation=(mri.total_variation, [.0005, .001, .002, .005, .01, .02, .05], dict(iterations=60)))
SETTINGS = dict(published=[["published", 19, 1], ["published", 49, 1], ["published", 99, 1]], point=[["point", 19, 1], ["point", 49, 1], ["point", 99, 1], ["point", 19, 3]])
SIZE, COILS = 96, 8


def generator(seed): return torch.Generator().manual_seed(seed)


def pictures(data, n):
    "Complex images, the 99th percentile of each magnitude about 1."
    if data in ("train", "variants"): return anatomy.complex_slices(n, SIZE, generator(len(data)), "train" if data == "train" else "test")
    x = anatomy.real_scans()[data]
    x = anatomy.square(x[torch.linspace(0, len(x) - 1, min(n, len(x)) + 2 * (len(x) > 2)).long()[1:-1] if len(x) > 2 else slice(None)], SIZE)
    return torch.polar(x.clamp(min=0), anatomy.smooth_phase(len(x), SIZE, generator(9)).reshape(len(x), 1, SIZE, SIZE))


def measured(x, mask, acceleration, noise, seed):
    "Operator and noisy k-space of one image."
    maps = mri.birdcage_maps(COILS, (SIZE, SIZE))
    acs = 8 if "lines" in mask else 12
    m = MASKS[mask]((SIZE, SIZE), acceleration, acs if acceleration < 8 else acs // 2, generator=generator(seed))
    A = mri.MultiCoilMRI(maps, m)
    return A, mri.add_noise(A.forward(x), m, noise, generator=generator(1000 + seed))


def scores(x, truth):
    "PSNR, SSIM and complex NRMSE of one image."
    top = truth.abs().max().item()
    return [mri.psnr(x.abs(), truth.abs(), top).item(), mri.ssim(x, truth, top).item(), mri.complex_nrmse(x, truth).item()]


def tuned(mask, acceleration, noise, n=2):
    "The weight of each classical method with the least mean error on training variants."
    best, truth = {}, pictures("train", n)
    scans = [measured(x[None], mask, acceleration, noise, 500 + k) for k, x in enumerate(truth)]
    for name, (method, grid, options) in CLASSICAL.items():
        errors = [sum(mri.complex_nrmse(method(y, A.maps, A.mask, lam, **options), x[None]).item() for (A, y), x in zip(scans, truth)) for lam in grid]
        best[name] = grid[errors.index(min(errors))]
    return best


def classical(weights):
    "Name -> function of (operator, k-space, seed) that reconstructs one image, with the weights as tuned."
    ways = dict(zero_filled=lambda A, y, k: A.adjoint(y))
    for name, (method, _, options) in CLASSICAL.items():
        ways[name] = lambda A, y, k, method=method, lam=weights[name], options=options: method(y, A.maps, A.mask, lam, **options)
    return ways


def diffusion(prior, noise, settings):
    "Name -> the same for `dds`, with settings by name, number of calls and of draws, of which the mean is taken."
    ways = {}
    for like, calls, draws in settings:
        run = lambda A, y, g, like=like, calls=calls: dds(prior, A, y, noise=noise, like=like, calls=calls, generator=g)
        ways[f"dds {like}, {f'{draws} x ' * (draws > 1)}{calls} calls"] = lambda A, y, k, run=run, draws=draws: several(partial(run, A, y), draws, generator(k))[0]
    return ways


def cell(data, mask, acceleration, noise, n, weights=None, settings=None, recipe=None):
    "Scores of classical methods, with weights, or of `dds`, with settings: mean and half an interval over images, and seconds an image."
    truth = pictures(data, n)
    ways = classical(weights) if weights else diffusion(anatomy.load_prior("brain"), noise, settings)
    rows = {name: [] for name in ways}
    for k, x in enumerate(truth):
        A, y = measured(x[None], mask, acceleration, noise, k)
        for name, way in ways.items():
            began = time.process_time()
            found = way(A, y, k)
            rows[name].append([*scores(found, x[None]), time.process_time() - began])
    half = float(student.ppf(.975, len(truth) - 1)) if len(truth) > 1 else 0.
    def summary(values):
        v = torch.tensor(values, dtype=torch.float64)
        return [[round(m, 4), round(half * s / len(v)**.5, 4)] for m, s in zip(v.mean(0).tolist(), v.std(0, correction=int(len(v) > 1)).tolist())]
    return dict(images=len(truth), scores={name: dict(zip(("psnr", "ssim", "nrmse", "seconds"), summary(v))) for name, v in rows.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    packages, recipe = ("torch", "sigpy", "scikit-image"), anatomy.load_prior("brain").facts["recipe"]
    asked = lambda choices: [c for c in choices if f"{c}" in sys.argv] or list(choices)
    number = dict(variants=6, brain=3, abdomen=1)
    for acceleration, data in itertools.product(map(float, asked((4, 8))), asked(number)):
        for noise, mask in itertools.product((.01, .05, 0.), MASKS):
            case = dict(mask=mask, acceleration=acceleration, noise=noise)
            name, line = f"{mask}, x{acceleration:g}, noise {noise:g}", {}
            kinds = dict(classical=dict(weights=record("dds", f"weights: {name}", tuned, packages, **case))) | {k: dict(settings=v, recipe=recipe) for k, v in SETTINGS.items()}
            for kind, options in kinds.items():
                result = record("dds", f"{data}: {name}: {kind}", cell, packages, data=data, n=number[data], **options, **case)
                line |= {k: v["psnr"][0] for k, v in result["scores"].items()}
            print(data, name, line, flush=True)
