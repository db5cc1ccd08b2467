"""Reconstruction with the shipped prior: DDS beside the classical methods. Run: python studies/dds.py [DATA ...]

Cells are (data, mask, acceleration, noise). Data: "variants" of the template held out from the prior's training; "brain" and "abdomen", real scans of other people, with a smooth phase added, as
tests outside of what the prior has seen. Eight coils are simulated (birdcage), and known to every method; the noise is a share of the 99th percentile of the magnitudes. Masks are redrawn for each image.
Classical weights are tuned on two *training* variants for each mask, acceleration and noise, over a grid. Every image counts once: PSNR and SSIM of magnitudes with a data range of the truth's largest
magnitude, and the complex NRMSE; nothing is rescaled. Means, and 95 % intervals of the mean over images. Seconds are of the processor on one thread, for one image.
"""
import sys
import time

import torch
from record import record
from scipy.stats import t as student

from diffusion_lit import anatomy, mri
from diffusion_lit.dds import dds

MASKS = dict(random_lines=mri.random_lines, equispaced_lines=mri.equispaced_lines, gaussian_points=mri.gaussian_points, poisson_disc=mri.poisson_disc)
CLASSICAL = dict(cg_sense=(mri.cg_sense, [0., .003, .01, .03, .1, .3], dict(iterations=20)),
                 l1_wavelet=(mri.l1_wavelet, [.0005, .001, .002, .005, .01, .02, .05], dict(iterations=40)),
                 total_variation=(mri.total_variation, [.0005, .001, .002, .005, .01, .02, .05], dict(iterations=60)))
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


def cell(data, mask, acceleration, noise, n, calls):
    "Scores of every method: mean and half an interval over images, and seconds an image."
    truth, prior, weights = pictures(data, n), anatomy.load_prior("brain"), tuned(mask, acceleration, noise)
    floor = max(noise, .003)                                        # what "noiseless" means to the data step
    ways = dict(zero_filled=lambda A, y, k: A.adjoint(y))
    for name, (method, _, options) in CLASSICAL.items():
        ways[name] = lambda A, y, k, method=method, lam=weights[name], options=options: method(y, A.maps, A.mask, lam, **options)
    for number in calls:
        ways[f"dds point, {number} calls"] = lambda A, y, k, number=number: dds(prior, A, y, noise=floor, calls=number, sigma_data=.35, generator=generator(k))
    ways["dds published, 49 calls"] = lambda A, y, k: dds(prior, A, y, noise=noise, like="published", calls=49, generator=generator(k))
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
    return dict(images=len(truth), weights=weights, scores={name: dict(zip(("psnr", "ssim", "nrmse", "seconds"), summary(v))) for name, v in rows.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    for data, n in dict(variants=6, brain=6, abdomen=1).items():
        if sys.argv[1:] and data not in sys.argv[1:]: continue
        for acceleration in (4., 8.):
            for noise in (.01, .05, 0.):
                for mask in MASKS:
                    name = f"{data}: {mask}, x{acceleration:g}, noise {noise:g}"
                    result = record("dds", name, cell, packages=("torch", "sigpy", "scikit-image"), data=data, mask=mask, acceleration=acceleration, noise=noise, n=n, calls=[19, 49, 99])
                    print(name, {k: v["psnr"][0] for k, v in result["scores"].items()}, flush=True)
