"""The rivals beside DDS: one prior, one operator, one noise, one clock. Run: python studies/rivals.py [WORD ...], cells whose name holds every word

Problems: "mri", five held-out variants of the template at 96 x 96, eight coils, a quarter of the lines (redrawn for each picture), `load_prior("brain")`; "ct", five held-out variants of CT slices at 96 x 96,
eight parallel views, the operator divided by its norm, `load_prior("ct")`. Noise of 0.01 in both, told to those who ask. The five pictures are five rows of one batch, each with noise, mask and random stream of
its own, so that one call of the network serves all. PSNR and SSIM as in studies/dds.py, one number a picture. Seconds are for one picture on one thread: of the processor (`time.process_time`), which other
programs on the machine hardly touch, and of the wall. Step lengths and weights marked "tuned" had the best mean PSNR on two training variants of the same problem, with as many calls.

"oracle" cells are walks of more than a hundred calls against the exact posterior of a Gaussian prior; the chapter runs the shorter ones itself.
"""
import sys
import time
from functools import cache

import dds as plain
import torch
from record import record

from diffusion_lit import anatomy, ct, mri, rivals
from diffusion_lit.dds import Flat, SpectralPrior, dds, judge, ring_scanner
from diffusion_lit.mri import to_channels

N, SIZE, VIEWS, NOISE = 5, 96, 8, .01
METHODS = dict(dds=dds, ddnm=rivals.ddnm, diffpir=rivals.diffpir, dps=rivals.dps, score_mri=rivals.score_mri, diffusion_mbir=rivals.diffusion_mbir)
generator = plain.generator


# --- problems

@cache
def problem(name, part="test", n=N):
    "Prior, operator of norm at most one, measurement, and the truth."
    if name == "mri":
        x = plain.pictures("variants" if part == "test" else "train", 6)[:n]
        seed = 0 if part == "test" else 500
        scans = [plain.measured(x[k:k + 1], "random_lines", 4., NOISE, seed + k) for k in range(n)]
        A = mri.MultiCoilMRI(scans[0][0].maps, torch.cat([a.mask.expand(1, 1, SIZE, SIZE) for a, _ in scans]))
        return anatomy.load_prior("brain"), A, torch.cat([y for _, y in scans]), x
    x = anatomy.ct_slices(n, SIZE, generator(3), part)
    beam = ct.ParallelBeam(SIZE, torch.arange(VIEWS) * torch.pi / VIEWS)
    A = (1 / beam.norm) * beam
    clean = A.forward(x)
    return anatomy.load_prior("ct"), A, clean + NOISE * torch.randn(clean.shape, generator=generator(4)), x


def baselines(name, part="test", n=N):
    "Name -> function of a weight, and the weights to choose from."
    prior, A, y, x = problem(name, part, n)
    if name == "mri":
        rows = lambda f: torch.cat([f(y[k:k + 1], A.mask[k:k + 1]) for k in range(n)])
        ways = {"zero filled": (lambda lam: A.adjoint(y), [0])}
        for label, key in (("CG-SENSE", "cg_sense"), ("total variation", "total_variation")):
            method, grid, options = plain.CLASSICAL[key]
            ways[label] = (lambda lam, method=method, options=options: rows(lambda a, m: method(a, A.maps, m, lam, **options)), grid)
        return ways
    beam = ct.ParallelBeam(SIZE, torch.arange(VIEWS) * torch.pi / VIEWS)
    return {"FBP": (lambda lam: ct.fbp(y * beam.norm, beam), [0]), "SIRT": (lambda lam: ct.sirt(y * beam.norm, beam, lam), [100, 300, 1000, 3000]),
            "total variation": (lambda lam: ct.tv_reconstruction(y * beam.norm, beam, lam, 500), [.00001, .00003, .0001, .0003, .001])}


# --- cells

class Counted:
    "A denoiser that counts how often it is asked."
    def __init__(self, denoiser): self.denoiser, self.noise, self.sigma_data, self.calls = denoiser, denoiser.noise, denoiser.sigma_data, 0
    def __call__(self, z, sigma): self.calls += 1; return self.denoiser(z, sigma)


def scored(x, truth):
    "PSNR and SSIM of each picture."
    rows = [[round(v, 4) for v in plain.scores(a[None], b[None])[:2]] for a, b in zip(x, truth)]
    return dict(zip(("psnr", "ssim"), map(list, zip(*rows))))


def timed(run, n):
    "What it returns, and seconds of one of n pictures."
    cpu, wall = time.process_time(), time.perf_counter()
    return run(), dict(cpu=round((time.process_time() - cpu) / n, 4), wall=round((time.perf_counter() - wall) / n, 4))


def pictures(problem_name, method, calls, part="test", n=N, draws=1, recipe=None, **options):
    "Reconstructions, the mean of some draws, network calls as counted, and seconds."
    prior, A, y, x = problem(problem_name, part, n)
    asked = Counted(prior)
    draw = lambda k: METHODS[method](asked, A, y, noise=NOISE, calls=calls, generator=generator(1 + k), **options)
    found, spent = timed(lambda: sum(map(draw, range(draws))) / draws, n)
    return found, dict(calls=asked.calls) | spent


def cell(problem_name, method, calls, part="test", n=N, **options):
    "Quality of each picture, network calls, and seconds of one picture."
    found, spent = pictures(problem_name, method, calls, part, n, **options)
    return scored(found, problem(problem_name, part, n)[3]) | spent


def classical(problem_name, label, lam):
    "The same for a method without a network."
    found, spent = timed(lambda: baselines(problem_name)[label][0](lam), N)
    return scored(found, problem(problem_name)[3]) | dict(calls=0) | spent


def tuned(problem_name, what, grid, n=2, recipe=None, **settings):
    "Mean PSNR on training variants for each value, and the best."
    def quality(value):
        if "label" in settings: return scored(baselines(problem_name, "train", n)[settings["label"]][0](value), problem(problem_name, "train", n)[3])["psnr"]
        return cell(problem_name, part="train", n=n, **settings, **{what: value})["psnr"]
    means = [round(sum(v) / n, 3) for v in map(quality, grid)]
    return dict(best=grid[means.index(max(means))], grid=grid, psnr=means)


# --- the oracle

@cache
def oracle_case(m=96):
    "Twelve by twelve pixels, four coils, three of twelve lines, noise of 0.05: prior, operator, measurements, truth, exact mean and covariance."
    prior, scanner, g = SpectralPrior(12), ring_scanner(12, (1, 6, 10)), generator(0)
    matrix = scanner.forward(prior.pixels()).flatten(1).T
    A, x = Flat(matrix[matrix.abs().sum(1) > 0]), prior.draw(m, g)
    clean = A.forward(x)
    y = clean + .05 * 2**.5 * torch.randn(clean.shape, generator=g, dtype=clean.dtype)
    return prior, A, y, x, *prior.posterior(A, y, .05)


@cache
def eigen(op):
    "Eigenvalues and -vectors of A^H A."
    return torch.linalg.eigh(op.matrix.mH @ op.matrix)


def exactly(op, e, gamma, x):
    "The data step of a dense operator without iteration, for one γ."
    (λ, Q), γ = eigen(op), float(torch.as_tensor(gamma).flatten()[0])
    return (γ * op.adjoint(e).flatten(1) @ Q.conj() / (1 + γ * λ.clamp(min=0)) @ Q.mT).reshape(x.shape)


def oracle(method, m=96, **options):
    "Distance of the mean and spread, by two draws for each of m measurements; residual and error of the first draws."
    prior, A, y, x, mean, cov = oracle_case(m)
    drawn, solver = [], dict(solver=exactly) if method in ("dds", "diffpir") else {}
    def run(g): drawn.append(METHODS[method](prior, A, y, noise=.05, generator=g, **options | solver)); return drawn[-1]
    found = judge(run, mean, cov, generator(1))
    return {k: round(v, 4) for k, v in (found | beside(drawn[0], A, y, x)).items()}


def beside(draw, A, y, x):
    "Residual over the noise, and the error over the truth."
    return {"residual": ((A.forward(draw) - y).abs().square().mean() / 2).sqrt().item() / .05, "error of a draw": ((draw - x).norm() / x.norm()).item()}


# --- the list of cells

def plan():
    "Cells in the order in which they are wanted: name, function, settings."
    recipe = {"mri": anatomy.load_prior("brain").facts["recipe"], "ct": anatomy.load_prior("ct").facts["recipe"]}
    for p in ("mri", "ct"):
        for label, (_, grid) in baselines(p).items():
            best = record("rivals", f"{p}: weight of {label}", tuned, problem_name=p, what="lam", grid=grid, label=label)["best"] if len(grid) > 1 else grid[0]
            yield f"{p}: {label}", classical, dict(problem_name=p, label=label, lam=best)
    def cells(p, method, calls, label=None, **options):
        for n in calls: yield f"{p}: {label or method}, {n} calls", cell, dict(problem_name=p, method=method, calls=n, recipe=recipe[p], **options)
    def with_tuned(p, method, calls, what, grid, label, **options):
        for n in calls:
            best = record("rivals", f"{p}: {what} of {label}, {n} calls", tuned, problem_name=p, what=what, grid=grid, method=method, calls=n, recipe=recipe[p], **options)["best"]
            yield from cells(p, method, [n], f"{label}, tuned", **options, **{what: best})
    old, no_tv = dict(mri="score_mri", ct="diffusion_mbir"), dict(mri={}, ct=dict(tv=0.))
    for p in ("mri", "ct"):
        for like in ("point", "published", "sample"): yield from cells(p, "dds", (9, 19, 49), f"dds {like}", like=like)
        yield from cells(p, old[p], (20, 100), **no_tv[p])
        for method in ("ddnm", "diffpir"): yield from cells(p, method, (10, 20, 50, 100))
        yield from with_tuned(p, "ddnm", (20,), "cg", [2, 5, 10, 20], "ddnm")
        yield from cells(p, "diffpir", (20, 50), "diffpir, all noise new", zeta=1.)
        for label, method, calls, options in (("dds sample", "dds", 19, dict(like="sample")), ("diffpir", "diffpir", 20, {})):
            yield f"{p}: {label}, mean of five, 5 x {calls} calls", cell, dict(problem_name=p, method=method, calls=calls, recipe=recipe[p], draws=5, **options)
        yield from cells(p, "dds", (3, 5), "dds point", like="point")
        yield from cells(p, "dps", (20, 100), zeta=1.)
        yield from with_tuned(p, "dps", (20, 100), "zeta", [1., 3., 10., 30.], "dps")
        yield from cells(p, "dps", (20, 100), "mcg", zeta=1., constrain=10)
    for p in ("mri", "ct"): yield from cells(p, "diffpir", (100,), "diffpir, all noise new", zeta=1.)
    for name, method, calls, options in (("Score-MRI, 4000", "score_mri", 4000, {}), ("DiffusionMBIR, no TV, 4000", "diffusion_mbir", 4000, dict(tv=0.)),
                                         ("DPS, ζ′ = 1, 1000", "dps", 1000, dict(zeta=1.)), ("DPS, ζ′ = 0.15, 1000", "dps", 1000, dict(zeta=.15))):
        yield f"oracle: {name}", oracle, dict(method=method, calls=calls, **options)
    for p in ("mri", "ct"):
        yield from cells(p, old[p], (4000,), **no_tv[p])
        yield from cells(p, "dps", (1000,), zeta=1.)
    for p in ("mri", "ct"): yield from cells(p, old[p], (1000,), **no_tv[p])
    for p in ("mri", "ct"): yield from cells(p, "dps", (1000,), "dps, shorter steps", zeta=.3)
    for p in ("mri", "ct"):
        for like in ("point", "published", "sample"): yield from cells(p, "dds", (99,), f"dds {like}", like=like)
        yield from cells(p, "diffpir", (200,), "diffpir, all noise new", zeta=1.)
        for method in ("ddnm", "diffpir"): yield from cells(p, method, (200,))
    for p in ("mri", "ct"): yield from cells(p, "dps", (1000,), "mcg", zeta=1., constrain=10)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, compute, settings in plan():
        if all(word in name for word in sys.argv[1:]): print(name, record("rivals", name, compute, ("torch", "sigpy", "scikit-image"), **settings), flush=True)
