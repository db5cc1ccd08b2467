"""Projectors over many geometries: adjoints, other people's projectors, closed forms, mass, memory, and answers to bad input."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_studies import STUDIES, cells

from diffusion_lit import anatomy, ct, krylov

sys.path.insert(0, str(STUDIES))
pytest.importorskip("scipy", reason="scipy is not installed (extra: images)")
NAN, INF, PI = float("nan"), math.inf, math.pi
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}


def seed(s=0): return torch.Generator().manual_seed(s)
def randn(*shape, s=0, dtype=torch.float64): return torch.randn(shape, generator=seed(s), dtype=dtype)
def half_turn(views, arc=PI): return torch.arange(views, dtype=torch.float64) * arc / views
def name(x): return getattr(x, "__name__", str(x))
def uniform(low, high, s): return low + (high - low) * torch.rand((), generator=seed(s)).item()


def any_beam(case, **options):
    "Random size, angles, bins, spacing; every third a fan, every fourth without a matrix, every fifth truncated."
    size, views, spacing = int(uniform(1, 40, case)), int(uniform(1, 25, case + 100)), uniform(.3, 3., case + 200)
    source = uniform(.75, 3., case + 300) * size if case % 3 == 2 else INF
    angles = (2 * torch.rand(views, generator=seed(case)) - 1) * 2 * PI
    op = ct.Beam(size, angles, None, spacing, source, 0 if case % 4 == 3 else 2**31)
    if case % 5 == 4: op = ct.Beam(size, angles, max(1, op.geometry.bins // 2), spacing, source, truncated=True)
    return op


# ------------------------------------------------------------------------------------------------------------ operator

@pytest.mark.parametrize("dtype", CLOSE, ids=name)
@pytest.mark.parametrize("case", range(24))
def test_the_adjoint_is_exact(case, dtype):
    op, batch = any_beam(case), case % 4 + 1
    x, y = randn(batch, *op.image, s=1, dtype=dtype), randn(batch, *op.sinogram, s=2, dtype=dtype)
    assert krylov.dot_test(op, x, y).max() < CLOSE[dtype]
    u = op.adjoint(op.forward(x))
    assert torch.equal(op.normal(x), u) and u.dtype == dtype


@pytest.mark.parametrize("case", range(0, 24, 5))
def test_with_a_matrix_and_without(case):
    op = any_beam(case)
    g = op.geometry
    other = ct.Beam(g.size, g.angles, g.bins, g.spacing, g.source, 2**31 - op.limit, truncated=True)
    x, y = randn(2, *op.image), randn(2, *op.sinogram, s=1)
    assert op.kept() != other.kept()
    torch.testing.assert_close(op.forward(x), other.forward(x))
    torch.testing.assert_close(op.adjoint(y), other.adjoint(y))


@pytest.mark.parametrize("dtype", CLOSE, ids=name)
def test_no_item_feels_its_neighbours(dtype):
    "Any number of slices, more than one pass of the table, and either order of the axes in memory."
    for views in (3, 20):
        op = ct.ParallelBeam(13, half_turn(views))
        x, y = randn(70, *op.image, dtype=dtype), randn(70, *op.sinogram, s=1, dtype=dtype)
        Ax, Ay = op.forward(x), op.adjoint(y)
        for some in (slice(0, 1), slice(69, 70), slice(5, 7), slice(40, 57), slice(3, 69)):
            assert torch.equal(op.forward(x[some]), Ax[some]) and torch.equal(op.adjoint(y[some]), Ay[some])
        last = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        assert torch.equal(op.forward(last), Ax) and op.forward(last).flatten(1).stride(0) == 1
        assert Ax.is_contiguous() and Ay.is_contiguous()


def test_gradients_to_second_order():
    op = ct.Beam(5, half_turn(3, 2 * PI), source=9.)
    x, y = randn(2, *op.image).requires_grad_(), randn(2, *op.sinogram, s=1).requires_grad_()
    for f, v in ((op.forward, x), (op.adjoint, y), (op.normal, x)):
        assert torch.autograd.gradcheck(f, v) and torch.autograd.gradgradcheck(lambda v: f(v)**3, v)
    grad, = torch.autograd.grad((op.forward(x) - y).square().sum() / 2, x)
    torch.testing.assert_close(grad, op.adjoint(op.forward(x) - y))


@pytest.mark.parametrize("case", [0, 1, 3, 6, 7, 10, 12, 13])
def test_every_view_has_the_mass_of_the_image(case):
    op = any_beam(case)
    assert op.geometry.source == INF
    x = randn(2, *op.image)
    mass = op.forward(x).sum(-1) * op.geometry.spacing
    torch.testing.assert_close(mass, x.sum((-1, -2))[..., None].expand_as(mass), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", range(24))
def test_the_norm_is_between_its_bounds(case):
    op = any_beam(case)
    if not len(op.forward(torch.ones(1, *op.image)).nonzero()): pytest.skip("sees nothing")
    exact = torch.linalg.matrix_norm(krylov.matrix_of(op, randn(1, *op.image)), 2).item()
    low, high = ct.norm_bounds(op)
    assert low <= exact * (1 + 1e-5) and exact <= high * (1 + 1e-5) and high < 1.01 * low


def test_a_matrix_is_built_once_and_forgotten_in_order():
    ct.KEPT.clear()
    g = [ct.check_geometry(6, [a], None, 1., INF) for a in (.1, .2, .3)]
    both = [ct.matrices(h) for h in g]
    assert all(ct.matrices(h) is b for h, b in zip(g, both)) and len(ct.KEPT) == 3
    assert ct.matrices(g[0]._replace(angles=(.1,)), torch.float64)[0].weight.dtype == torch.float64 and len(ct.KEPT) == 4
    ct.matrices(g[1], room=0)
    assert list(ct.KEPT) == [(g[1], torch.float32, torch.device("cpu"))]


# ------------------------------------------------------------------------------------------------- against other people's

def phantoms(size, n=4): return (e := anatomy.random_ellipsoids(n, 2, 8, seed(2))), anatomy.draw_ellipsoids(e, (size, size))[:, None].double()
def apart(a, b): return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("size, spacing", [(128, 1.), (129, 1.), (128, .7), (128, 2.), (100, 3.3)])
def test_sinograms_of_ellipses(size, spacing):
    e, x = phantoms(size)
    op = ct.ParallelBeam(size, half_turn(24), None, spacing)
    assert apart(op.forward(x), ct.ellipse_sinogram(e, op.geometry)) < .01


def test_scikit_image_agrees_where_its_axis_is_ours():
    transform = pytest.importorskip("skimage.transform", reason="scikit-image is not installed (extra: images)")
    e, x = phantoms(91, 2)
    op = ct.ParallelBeam(91, half_turn(12), 129)
    theirs = np.stack([transform.radon(u[0].numpy(), np.rad2deg(op.geometry.angles), circle=False).T for u in x])[:, None]
    assert apart(op.forward(x), torch.from_numpy(theirs)) < .01


@pytest.mark.parametrize("size, bins, spacing", [(48, 72, 1.), (33, 99, .5), (48, 30, 2.5)])
def test_astra_agrees(size, bins, spacing):
    "Its strips have the area of pixel and ray in common, as ours: the same matrix, pixel for pixel and bin for bin."
    astra = pytest.importorskip("astra", reason="astra is not installed (extra: peers)")
    op = ct.ParallelBeam(size, half_turn(11) + .05, bins, spacing)
    x = phantoms(size, 1)[1]
    volume, rays = astra.create_vol_geom(size, size), astra.create_proj_geom("parallel", spacing, bins, np.array(op.geometry.angles))
    for kind, close in (("strip", 1e-4), ("line", .05), ("linear", .05)):
        A = astra.matrix.get(astra.projector.matrix(astra.create_projector(kind, rays, volume))).tocsr()
        theirs = torch.from_numpy(A @ x[0, 0].numpy().ravel()).view(op.sinogram)
        off = min(apart(op.forward(x)[0], theirs / c) for c in (1, spacing))
        assert off < close, (kind, off)


# ----------------------------------------------------------------------------------------------------------- reconstruction

@pytest.mark.parametrize("window", ct.WINDOWS)
def test_filtered_backprojection_of_many_views(window):
    e, x = phantoms(128)
    op = ct.ParallelBeam(128, half_turn(180))
    found = ct.fbp(ct.ellipse_sinogram(e, op.geometry).float(), op, window)
    assert 10 * math.log10(x.max().item()**2 / (found - x).square().mean().item()) > 28


def test_filtered_backprojection_does_not_care_how_views_are_listed():
    e, x = phantoms(64)
    θ = half_turn(40)
    base = None
    for angles in (θ, θ.flip(0), θ - PI, (θ + 1.) % PI, θ[torch.randperm(40, generator=seed())]):
        op = ct.ParallelBeam(64, angles)
        found = ct.fbp(ct.ellipse_sinogram(e, op.geometry), op)
        base = found if base is None else base
        assert apart(found, base) < .1                                                    # other angles, other streaks


def test_sirt_and_total_variation_mind_their_items_and_their_start():
    pytest.importorskip("skimage", reason="scikit-image is not installed (extra: images)")
    _, x = phantoms(24, 3)
    op, x = ct.ParallelBeam(24, half_turn(8)), x.clamp(min=0)
    y = op.forward(x)
    for solve in (lambda y: ct.sirt(y, op, 20), lambda y: ct.tv_reconstruction(y, op, 1e-3, 10)):
        whole = solve(y)
        assert whole.min() >= 0
        for i in range(3): torch.testing.assert_close(solve(y[i:i + 1]), whole[i:i + 1])
    torch.testing.assert_close(ct.sirt(y, op, 5, x0=x), x)                              # the truth stays


def test_photons_do_not_depend_on_the_batch():
    p = torch.rand(5, 1, 4, 7, generator=seed()) * 6
    N = ct.photon_counts(p, 1e4, seed(1))
    assert torch.equal(ct.photon_counts(p[:2], 1e4, seed(1)), N[:2]) and (N == N.round()).all()
    state = torch.get_rng_state()
    ct.photon_counts(p, 1e4, seed(1))
    assert torch.equal(state, torch.get_rng_state())
    many = ct.photon_counts(torch.full((1, 1, 1, 50_000), 6.), 1e4, seed())             # some 25 photons a bin
    assert abs(ct.log_transform(many, 1e4).mean() - 6) < 2e-3 < abs(ct.log_transform(many, 1e4, 0.).mean() - 6)


# ------------------------------------------------------------------------------------------------------------------ memory

def peak(code):
    "MiB at the peak of a process of its own, above what its imports and a small run take."
    small = "ct.ParallelBeam(8, [0., 1.], limit=0).normal(torch.ones(1, 1, 8, 8))"
    rss = "rss = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024"  # ru_maxrss starts at the parent's
    script = f"import math, torch, scipy.sparse\nfrom diffusion_lit import ct\ntorch.set_num_threads(1)\n{rss}\n{small}\nbefore = rss()\n{code}\nprint(rss() - before)"
    return float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured in Linux's units")
def test_memory_at_512_by_512_is_that_of_one_view():
    "720 views would need 7 GB for their matrix; without one, more views take no more memory than their sinogram."
    assert not ct.ParallelBeam(512, half_turn(720)).kept() and ct.ParallelBeam(512, half_turn(180)).kept()
    run = "op = ct.ParallelBeam(512, torch.arange({0}) * math.pi / {0}, limit=0)\nassert op.normal(torch.ones(1, *op.image)).isfinite().all()"
    few, many = peak(run.format(2)), peak(run.format(16))
    assert many < 300 and many < few + 120, (few, many)                                   # kept weights of 14 more views would be 190


# --------------------------------------------------------------------------------------------------------------- bad input

OP = ct.ParallelBeam(16, half_turn(6))
FAN = ct.Beam(16, half_turn(6), source=40.)
X, Y = torch.rand(2, *OP.image, generator=seed()), torch.rand(2, *OP.sinogram, generator=seed())
CASES = {  # what is wrong: (what is called, words that the answer must have)
    "angles in degrees": (lambda: ct.ParallelBeam(16, [0., 45., 90.]), "degrees"),
    "an angle that is none": (lambda: ct.ParallelBeam(16, [NAN]), "angles must be finite"),
    "no angles": (lambda: ct.ParallelBeam(16, []), "angles must be [view]"),
    "one angle without a list": (lambda: ct.ParallelBeam(16, .3), "angles must be [view]"),
    "too few bins for the image": (lambda: ct.ParallelBeam(16, half_turn(6), 16), "too few bins"),
    "a fraction of a bin": (lambda: ct.ParallelBeam(16, half_turn(6), 30.5), "bins must be a whole number"),
    "bins without width": (lambda: ct.ParallelBeam(16, half_turn(6), 30, 0.), "spacing must be"),
    "half a pixel": (lambda: ct.ParallelBeam(16.5, half_turn(6)), "size must be"),
    "a source inside the image": (lambda: ct.Beam(16, half_turn(6), source=5.), "source must be outside"),
    "an image of another size": (lambda: OP.forward(X[..., :15]), "x must be [batch, 1, 16, 16]"),
    "an image without a channel": (lambda: OP.forward(X[:, 0]), "x must be"),
    "an image with two channels": (lambda: OP.normal(X.expand(-1, 2, -1, -1)), "x must be"),
    "an empty batch": (lambda: OP.forward(X[:0]), "x must be"),
    "a complex image": (lambda: OP.forward(X + 0j), "float32 or float64"),
    "whole numbers": (lambda: OP.forward(X.long()), "float32 or float64"),
    "an array of numpy": (lambda: OP.forward(X.numpy()), "float32 or float64"),
    "NaN in an image": (lambda: OP.forward(X * NAN), "x must be finite"),
    "NaN in a sinogram": (lambda: OP.adjoint(Y * NAN), "y must be finite"),
    "a sinogram with its axes exchanged": (lambda: OP.adjoint(Y.mT), "y must be"),
    "a sinogram of other views": (lambda: ct.fbp(Y[..., :5, :], OP), "y must be"),
    "a fan for parallel rays": (lambda: ct.fbp(Y, FAN), "fan"),
    "the ellipses of a fan": (lambda: ct.ellipse_sinogram(anatomy.random_ellipsoids(1, 2, 1, seed()), FAN.geometry), "parallel"),
    "an unknown window": (lambda: ct.fbp(Y, OP, "hanning"), "window must be one of"),
    "a negative λ": (lambda: ct.tv_reconstruction(Y, OP, -1.), "lam"),
    "negative weights": (lambda: ct.tv_reconstruction(Y, OP, weights=-Y), "weights"),
    "weights of another shape": (lambda: ct.tv_reconstruction(Y, OP, weights=Y[..., 1:]), "weights must be"),
    "a start of another shape": (lambda: ct.sirt(Y, OP, x0=X[..., 1:]), "x0 must be"),
    "negative counts": (lambda: ct.log_transform(-Y, 1e4), "not negative"),
    "NaN counts": (lambda: ct.log_transform(Y * NAN, 1e4), "finite"),
    "zero counts": (lambda: ct.log_transform(0 * Y, 1e4, 0.), "zero counts"),
    "no photons": (lambda: ct.photon_counts(Y, 0.), "photons must be positive"),
    "no photons, counted": (lambda: ct.log_transform(Y, -1.), "photons must be positive"),
    "endless line integrals": (lambda: ct.photon_counts(Y / 0, 1e4), "p must be finite"),
    "pixels without width": (lambda: ct.line_integrals(Y, 0.), "pixel and mu"),
    "a weight below zero": (lambda: ct.Weights(-Y), "weights must be"),
}


@pytest.mark.parametrize("what", CASES)
def test_bad_input_is_named(what):
    call, words = CASES[what]
    with pytest.raises((ValueError, TypeError)) as error: call()
    assert words in str(error.value)


# ------------------------------------------------------------------------------------------------------------------- study

def test_every_cell_of_the_study_says_how_it_was_made():
    for cell, row in cells("ct_speed").items():
        assert set(row) == {"settings", "result", "seconds", "hardware", "versions"} and "torch" in row["versions"], cell
        assert row["result"]["adjoint_error"]["ours"] < 1e-5


def test_a_cheap_cell_again():
    "The adjoint errors and the size of the matrix of the smallest cell, and the whole study made small."
    study = pytest.importorskip("ct_speed")
    stored = cells("ct_speed")["1 thread, 8 views"]
    for way, now in {name: study.WAYS[name] for name in ("ours", "scikit-image") if name in study.WAYS}.items():
        op, s = now(8, 256, 363), stored["settings"]
        x, y = study.numbers((1, s["size"], s["size"]), 1, 0), study.numbers(study.shapes_of(op, 8, 256, 363), 1, 1)
        assert krylov.dot_test(op, x, y).item() == pytest.approx(stored["result"]["adjoint_error"][way], rel=.02, abs=1e-6)
    A, _ = ct.matrices(ct.ParallelBeam(256, half_turn(8), 363).geometry)
    assert len(A.weight) == stored["result"]["matrix"]["entries"]
    threads = torch.get_num_threads()
    try: small = study.speed(4, 1, 20, 29, [1, 2], 1, memory=False)
    finally: torch.set_num_threads(threads)
    assert all(t > 0 for n in (1, 2) for row in small[f"{n} slices"]["milliseconds"].values() for t in row.values())
    exact = {name: e for name, e in small["adjoint_error"].items() if "fast" not in name and "scikit" not in name}
    assert max(exact.values()) < 1e-5 and exact["ours"] < 1e-6
