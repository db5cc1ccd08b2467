"""Volumes: DDS with total variation along z beside what it stands against. Run: python studies/volume.py [WORD ...], cells whose name holds every word

Held-out heads (`ct_volumes(part="test")`) of 64^3 and 128^3 voxels, parallel beam, the operator divided by its norm, noise of 0.01 in those units (about what 100,000 photons a bin leave).
Weights of the classical methods and of total variation along z were chosen on a training head. Seconds are for the whole volume on one thread: of the processor (`time.process_time`) and of the wall.
"""
import math
import resource
import sys
import time

import torch
import torch.nn.functional as F
from record import record

from diffusion_lit import anatomy, ct, rivals
from diffusion_lit.krylov import LinearOperator
from diffusion_lit.page import need
from diffusion_lit.volume import dds_volume, plane_quality, volume_settings

NOISE = .01
TASKS = {"8 views": (8, 180), "4 views": (4, 180), "2 views": (2, 180), "90 degrees": (90, 90), "120 degrees": (120, 120)}     # views, over degrees
CALLS = 19, 49, 99


def generator(seed): return torch.Generator().manual_seed(seed)


def head(size, number, part="test"):
    "A head `[slice, 1, size, size]`."
    return anatomy.ct_volumes(number + 1, size, generator(11), part)[number].movedim(1, 0)


def measured(x, task, seed=0):
    "The projector, the operator of norm one, and the measurement."
    views, arc = TASKS[task]
    beam = ct.ParallelBeam(x.shape[-1], torch.arange(views) * math.radians(arc) / views)
    A = (1 / beam.norm) * beam
    clean = A.forward(x)
    return beam, A, clean + NOISE * torch.randn(clean.shape, generator=generator(seed))


def tv3(y, beam, lam, iterations=60):
    "Total variation in all three directions, by FISTA (Beck and Teboulle 2009) with scikit-image's denoising step."
    denoise = need("skimage.restoration", "images").denoise_tv_chambolle
    x = z = torch.zeros(len(y), *beam.image)
    t = 1.
    for _ in range(iterations):
        step = z - beam.adjoint(beam.forward(z) - y) / beam.norm**2
        last, x = x, torch.from_numpy(denoise(step[:, 0].numpy(), lam, eps=1e-6, max_num_iter=20))[:, None].clamp(min=0)
        before, t = t, (1 + math.sqrt(1 + 4 * t * t)) / 2
        z = x + (before - 1) / t * (x - last)
    return x


CLASSICAL = {
    "FBP": (lambda y, beam, window: ct.fbp(y, beam, window), ["ramp", "cosine", "hann"]),
    "SIRT": (lambda y, beam, steps: ct.sirt(y, beam, steps), [30, 100, 300]),
    "TV": (lambda y, beam, lam: ct.tv_reconstruction(y, beam, lam, 60), [1e-4, 3e-4, 1e-3]),
    "TV in 3D": (tv3, [1e-4, 3e-4, 1e-3, 3e-3]),
}


class Rotated(LinearOperator):
    "A projector that turns the picture, by bilinear interpolation, and adds up its columns; its backprojection reads each view at the pixels' centres, or is exact, by automatic differentiation."
    def __init__(self, beam, exact=False):
        g, n = beam.geometry, beam.geometry.size
        θ, centred = torch.tensor(g.angles).float()[:, None, None], lambda m: torch.arange(m) - (m - 1) / 2
        s, t, i = centred(g.bins), centred(g.bins)[:, None], centred(n)
        self.lines = 2 / n * torch.stack([s * θ.cos() - t * θ.sin(), -s * θ.sin() - t * θ.cos()], -1)           # rows are downwards
        self.at = 2 / g.bins * torch.stack([i * θ.cos() - i[:, None] * θ.sin(), 0 * θ + 0 * i + 0 * i[:, None]], -1)
        self.beam, self.exact = beam, exact
    def forward(self, x):
        turned = [F.grid_sample(x, at.expand(len(x), -1, -1, -1), align_corners=False).sum(2) for at in self.lines]
        return torch.stack(turned, 2) / self.beam.norm
    def adjoint(self, y):
        if not self.exact: return sum(F.grid_sample(y[:, :, [v]], at.expand(len(y), -1, -1, -1), align_corners=False) for v, at in enumerate(self.at)) / self.beam.norm
        with torch.enable_grad():
            x = torch.zeros(len(y), *self.beam.image, requires_grad=True)
            return torch.autograd.grad(self.forward(x), x, y)[0]


def released(adjoint="theirs", near=0., ends="circular", weights="plain"):
    "The released settings for 3D CT, with none of the repairs or some: operator of a beam, and changes to \"published\"."
    def of(beam):
        n, views = beam.geometry.size, len(beam.geometry.angles)
        c = beam.norm**2 if weights == "plain" else 1.52 * n
        scale = c if near else 1.                                   # without proximity only ratios count
        A = (1 / beam.norm) * beam if adjoint == "footprint" else Rotated(beam, adjoint == "exact")
        return A, dict(like="published", near=near, ends=ends, gamma=scale, tv=.04 * scale / c, rho=10 * scale / c)
    return of


REPAIRS = {"none": {}, "exact adjoint": dict(adjoint="exact"), "footprints": dict(adjoint="footprint"), "footprints, proximity kept": dict(near=1.), "footprints, open ends": dict(ends="open"),
           "footprints, weights free of the views": dict(weights="free"), "all of them": dict(near=1., ends="open", weights="free")}
REPAIRS = {name: which if "adjoint" in which or name == "none" else which | dict(adjoint="footprint") for name, which in REPAIRS.items()}


WITHOUT = {"proximity": dict(near=0.), "open ends": dict(ends="circular"), "weights that fall with the noise": dict(gamma=97.28, tv=.04, rho=10.), "old noise": dict(eta=1.)}


def timed(run):
    "What run returns, with processor and wall seconds."
    cpu, wall = time.process_time(), time.perf_counter()
    x = run()
    return x, dict(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)


def judged(x, truth):
    "Numbers for the table."
    planes = {p: [round_to(v) for v in pair] for p, pair in plane_quality(x, truth).items()}
    mse = float((x - truth).square().mean())
    return dict(planes=planes, psnr=round_to(10 * math.log10(4 / mse)), jump=round_to(float(x.diff(dim=0).abs().mean() / truth.diff(dim=0).abs().mean())))


def prior(): return anatomy.load_prior("heads").to(memory_format=torch.channels_last)


def classical(size, number, task, method, recipe=None):
    "A classical method, its weight the best on a training head of 64^3."
    run, weights = CLASSICAL[method]
    def error(weight):
        x = head(64, 0, "train")[16:48:4]
        beam, A, y = measured(x, task)
        return float((run(y * beam.norm, beam, weight) - x).square().mean())
    weight = min(weights, key=error) if len(weights) > 1 else weights[0]
    truth = head(size, number)
    beam, A, y = measured(truth, task)
    x, seconds = timed(lambda: run(y * beam.norm, beam, weight))
    return judged(x, truth) | dict(weight=weight, seconds=seconds)


def diffusion(size, number, task, calls, recipe, slices=None, part="test", **options):
    "DDS for the volume, or for a slab of it."
    truth = head(size, number, part)[slice(*(slices or [None]))]
    beam, A, y = measured(truth, task)
    with torch.no_grad(): x, seconds = timed(lambda: dds_volume(prior(), A, y, noise=NOISE, calls=calls, generator=generator(1), progress=True, **options))
    return judged(x, truth) | dict(calls=calls, seconds=seconds, residual=round_to(float((A.forward(x) - y).square().mean()**.5) / NOISE))


def repair(size, number, task, recipe, **which):
    "The released settings with some of the repairs, 49 calls; None where conjugate gradients refuse the operator."
    truth = head(size, number)
    beam, _, y = measured(truth, task)
    A, changes = released(**which)(beam)
    with torch.no_grad(): x, seconds = timed(lambda: dds_volume(prior(), A, y, noise=NOISE, calls=49, generator=generator(1), progress=True, **changes))
    return judged(x, truth) | dict(seconds=seconds)


def mbir(size, number, task, calls, slices, recipe):
    "DiffusionMBIR with the published weights for an operator of norm one, on a slab."
    truth = head(size, number)[slice(*slices)]
    beam, A, y = measured(truth, task)
    s = volume_settings("published", size=size)
    with torch.no_grad():
        x, seconds = timed(lambda: rivals.diffusion_mbir(prior(), A, y, noise=NOISE, calls=calls, rho=s.rho, tv=s.tv, batch=16, generator=generator(1), progress=True))
    return judged(x, truth) | dict(calls=calls, seconds=seconds)


def full(calls, recipe):
    "448 slices of 256 x 256 from eight views, with the walk kept on disk: peak memory and seconds. To be run in a process of its own."
    import tempfile
    small = anatomy.ct_volumes(1, 64, generator(11), "test")
    truth = F.interpolate(small, (448, 256, 256), mode="trilinear")[0].movedim(1, 0).contiguous()
    beam, A, y = measured(truth, "8 views")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        x, seconds = timed(lambda: dds_volume(prior(), A, y, noise=NOISE, calls=calls, generator=generator(1), resume=f"{folder}/walk", progress=True))
    return dict(peak_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), before_mib=round(before), volume_mib=round(truth.numel() * 4 / 2**20), calls=calls, seconds=seconds)


def round_to(value, digits=4): return float(f"{value:.{digits}g}")


def cells():
    "Name -> (function, settings)."
    recipe = anatomy.load_prior("heads").facts["recipe"]
    def case(size, task, number, many, few=False):
        at, name = dict(size=size, number=number, task=task, recipe=recipe), f"{size}, {task}, head {number}: "
        for method in CLASSICAL: yield name + method, classical, at | dict(method=method, recipe=None)
        for calls in (49,) if few else CALLS if many else CALLS[:2]: yield name + f"DDS {calls}", diffusion, at | dict(calls=calls)
        if not few: yield name + "slice by slice 49", diffusion, at | dict(calls=49, tv=0.)
        if many and not few: yield name + "published 49", diffusion, at | dict(calls=49, like="published")
    for task in TASKS:
        for number in (0, 1): yield from case(64, task, number, True)
    for number in (0, 1):
        at = dict(size=64, number=number, task="8 views", recipe=recipe)
        for label, which in REPAIRS.items(): yield f"repair, 8 views, head {number}: {label}", repair, at | which
        for label, options in WITHOUT.items(): yield f"without, 8 views, head {number}: {label}", diffusion, at | dict(calls=49) | options
        slab = at | dict(slices=[20, 52])
        for calls in (49, 99, 199): yield f"slab, head {number}: DDS {calls}", diffusion, slab | dict(calls=calls)
        yield f"slab, head {number}: published 49", diffusion, slab | dict(calls=49, like="published")
        for calls in (100, 1000, 4000): yield f"slab, head {number}: DiffusionMBIR {calls}", mbir, slab | dict(calls=calls)
    for task in ("8 views", "90 degrees"):
        for tv in (0., .3, 1., 3.): yield f"training head, {task}: tv {tv:g}", diffusion, dict(size=64, number=0, part="train", task=task, calls=49, tv=tv, recipe=recipe)
    yield "full size", full, dict(calls=3, recipe=recipe)
    for task in ("8 views", "4 views", "2 views", "90 degrees"): yield from case(128, task, 0, False, few=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, compute, settings in cells():
        if all(word in name for word in sys.argv[1:]):
            print(name, record("volume", name, compute, ("torch", "scikit-image"), **settings), flush=True)
