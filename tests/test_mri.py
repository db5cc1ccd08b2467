"""Multi-coil MRI over many shapes: adjoints, other people's operators, promises of masks, and answers to bad input."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_lit import krylov, mri

STUDIES = Path(__file__).parents[1] / "studies"
sys.path.insert(0, str(STUDIES))
NAN = float("nan")
LINES = [mri.random_lines, mri.equispaced_lines, mri.gaussian_lines]
POINTS = [mri.gaussian_points, mri.poisson_disc, mri.radial_spokes]
COMPLEX = {torch.complex64: 1e-5, torch.complex128: 1e-12}


def seed(s=0): return torch.Generator().manual_seed(s)
def randn(*shape, s=0, dtype=torch.complex128): return torch.randn(shape, generator=seed(s), dtype=dtype)
def name(x): return getattr(x, "__name__", str(x))


# ------------------------------------------------------------------------------------------------------------ operator

@pytest.mark.parametrize("dtype", COMPLEX, ids=name)
@pytest.mark.parametrize("case", range(12))
def test_the_adjoint_is_exact(case, dtype):
    "Random batch, coils, odd and even sizes, every kind of mask, any tile."
    b, coils, H, W = (torch.randint(low, high, (), generator=seed(case + 10 * i)).item() for i, (low, high) in enumerate(((1, 4), (1, 17), (9, 70), (9, 70))))
    mask = (LINES + POINTS)[case % 6]((H, W), 3., 2, generator=seed(case))
    maps = randn(b if case % 2 else 1, coils, H, W, s=1, dtype=dtype)
    op = mri.MultiCoilMRI(maps, mask, [None, 1, 3 * H * W][case % 3])
    x, y = randn(b, 1, H, W, s=2, dtype=dtype), randn(b, coils, H, W, s=3, dtype=dtype)
    assert torch.as_tensor(krylov.dot_test(op, x, y)).max() < COMPLEX[dtype]
    u = op.adjoint(op.forward(x))
    assert (op.normal(x) - u).norm() < 10 * COMPLEX[dtype] * u.norm() and op.normal(x).dtype == dtype


@pytest.mark.parametrize("n", [1, 2, 5, 8, 64, 65])
def test_the_centred_transform_is_numpys(n):
    x = randn(3, n, n + 1)
    theirs = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(x.numpy(), (-2, -1)), norm="ortho"), (-2, -1))
    np.testing.assert_allclose(mri.centred_fft(x).numpy(), theirs, atol=1e-13)
    torch.testing.assert_close(mri.centred_ifft(mri.centred_fft(x)), x)


@pytest.mark.parametrize("size", [(20, 24), (21, 24), (20, 25), (21, 25)], ids=str)
def test_sigpy_and_deepinv_agree(size):
    "Its k-space, its adjoint and its normal operator, odd sizes included."
    linop, study = pytest.importorskip("sigpy.mri.linop", reason="sigpy is not installed (extra: images)"), pytest.importorskip("mri_speed")
    maps, x = mri.birdcage_maps(5, size).to(torch.complex128), randn(1, 1, *size)
    mask = mri.gaussian_points(size, 3., 4, generator=seed())
    op = mri.MultiCoilMRI(maps, mask)
    y = randn(1, 5, *size, s=1)
    A = linop.Sense(maps[0].numpy(), weights=mask[0, 0].double().numpy())
    for ours, theirs in ((op.forward(x)[0], A(x[0, 0].numpy())), (op.adjoint(y)[0, 0], A.H(y[0].numpy())), (op.normal(x)[0, 0], A.N(x[0, 0].numpy()))):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-12)
    if "deepinv" not in study.PEERS: pytest.skip("sigpy agrees; deepinv is not installed: pip install --no-deps deepinv")
    physics = study.deepinv_physics().MultiCoilMRI(mask=mask[0, 0].double(), coil_maps=maps[0], img_size=(2, *size))
    theirs = torch.view_as_complex(physics.A(mri.to_channels(x)).movedim(1, -1).contiguous())
    torch.testing.assert_close(theirs, op.forward(x))
    back = physics.A_adjoint(torch.view_as_real(y).movedim(-1, 1).contiguous())
    torch.testing.assert_close(mri.to_complex(back), op.adjoint(y))


def test_normalised_maps_bound_the_operator():
    maps = mri.loop_maps(6, (32, 32)).to(torch.complex128)
    op = mri.MultiCoilMRI(maps, mri.random_lines((32, 32), 2., 4, seed()))
    assert .9 < krylov.operator_norm(op, randn(1, 1, 32, 32), 100).max() <= 1 + 1e-9


def test_a_batch_of_eight_is_eight_of_one():
    maps, x = mri.loop_maps(5, (40, 32)), randn(8, 1, 40, 32, dtype=torch.complex64)
    for make in (mri.random_lines, mri.gaussian_points):
        op = mri.MultiCoilMRI(maps, make((40, 32), 3., 4, generator=seed()))
        y = mri.add_noise(op.forward(x), op.mask, .1, generator=seed())
        for whole, one in ((op.normal(x), lambda i: op.normal(x[i])), (op.adjoint(y), lambda i: op.adjoint(y[i])),
                           (mri.cg_sense(y, maps, op.mask, .01), lambda i: mri.cg_sense(y[i], maps, op.mask, .01))):
            for i in range(8): torch.testing.assert_close(whole[i:i + 1], one(slice(i, i + 1)), rtol=0, atol=2e-5)


def test_the_discrepancy_principle_counts_both_parts_of_the_noise():
    maps, mask = mri.loop_maps(8, (48, 48)).to(torch.complex128), mri.gaussian_lines((48, 48), 3., 8, generator=seed())
    op, x = mri.MultiCoilMRI(maps, mask), randn(1, 1, 48, 48)
    y = mri.add_noise(op.forward(x), mask, .02, generator=seed())
    assert [krylov.discrepancy(op, y, s, 1.05)(x).item() for s in (.02, .02 * 2**.5)] == [False, True]


def test_the_metrics_know_a_truth_of_zero():
    zero = torch.zeros(2, 1, 8, 8)
    torch.testing.assert_close(mri.psnr(zero + .1, zero), torch.tensor([20., 20.]))
    assert (mri.psnr(zero, zero) == torch.inf).all() and (mri.complex_nrmse(zero + .1, zero) == torch.inf).all()


def test_exact_rows_at_full_width():
    "A few rows as wide as in practice, in single and double precision, against conjugate gradients run long."
    for dtype, close in ((torch.complex128, 1e-8), (torch.complex64, 1e-4)):
        maps = mri.loop_maps(8, (6, 128)).to(dtype)
        op = mri.MultiCoilMRI(maps, mri.equispaced_lines((6, 128), 4., 12, seed()))
        x, y = randn(2, 1, 6, 128, dtype=dtype), randn(2, 8, 6, 128, s=1, dtype=dtype)
        exact = krylov.proximal(op, x, y, 5., solver=mri.line_blocks(op))
        long = krylov.proximal(op, x, y, 5., 300)
        assert (exact - long).norm() < close * long.norm()


# --------------------------------------------------------------------------------------------------------------- masks

@pytest.mark.parametrize("make", LINES + POINTS, ids=name)
@pytest.mark.parametrize("shape", [(320, 320), (33, 47)], ids=str)
@pytest.mark.parametrize("acceleration", [1, 2.5, 4, 8])
def test_a_mask_has_exactly_its_acceleration(make, shape, acceleration):
    acs = shape[1] // 25
    mask = make(shape, acceleration, acs, generator=seed(1))
    places = shape[1] if make in LINES else shape[0] * shape[1]
    assert mask.sum() == round(places / acceleration)
    assert torch.equal(mask, make(shape, acceleration, acs, generator=seed(1)))
    middle = [slice(n // 2 - acs // 2, n // 2 - acs // 2 + acs) for n in shape]
    assert mask.expand(1, 1, *shape)[0, 0][tuple(middle)].all() and mri.calibration_width(mask, shape) >= acs


def test_nobody_touches_the_global_generators():
    torch.manual_seed(0)
    np.random.seed(0)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    maps = mri.loop_maps(4, (24, 24))
    for make in LINES + POINTS: mask = make((24, 24), 2., 12, generator=seed())
    y = mri.add_noise(mri.MultiCoilMRI(maps, mask).forward(randn(1, 1, 24, 24, dtype=torch.complex64)), mask, .1, generator=seed())
    if pytest.importorskip("sigpy", reason="sigpy is not installed (extra: images)"):
        for solve in (mri.l1_wavelet, mri.total_variation): solve(y, maps, mask, .01, 3)
        mri.estimate_maps(y)
    assert torch.equal(state[0], torch.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


# ------------------------------------------------------------------------------------------------------------ baselines

@pytest.mark.parametrize("solve", [mri.zero_filled, mri.cg_sense, mri.l1_wavelet, mri.total_variation], ids=name)
def test_other_units_give_the_same_picture(solve):
    pytest.importorskip("sigpy", reason="sigpy is not installed (extra: images)")
    maps, mask = mri.loop_maps(4, (32, 32)), mri.gaussian_lines((32, 32), 2., 8, generator=seed())
    y = mri.MultiCoilMRI(maps, mask).forward(randn(2, 1, 32, 32, dtype=torch.complex64))
    x, c = solve(y, maps, mask), 300 * (1 - 2j)
    assert ((solve(c * y, maps, mask) - c * x).norm() / (c * x).norm()) < 1e-4
    torch.testing.assert_close(solve(y[1:], maps, mask), x[1:], rtol=0, atol=1e-4)


def test_a_file_of_fastmri_becomes_a_picture(tmp_path):
    "Fully sampled, and so without a mask; the picture is the truth with the phase of the first coil."
    h5py, anatomy = pytest.importorskip("h5py", reason="h5py is not installed (extra: images)"), pytest.importorskip("diffusion_lit.anatomy")
    pytest.importorskip("sigpy", reason="sigpy is not installed (extra: images)")
    maps, truth = mri.loop_maps(4, (48, 48)), torch.zeros(1, 1, 48, 48, dtype=torch.complex64)
    truth[..., 10:38, 12:34] = 1 + .5j * torch.rand(28, 22, generator=seed())
    with h5py.File(tmp_path / "mine.h5", "w") as f: f["kspace"] = mri.centred_fft(maps * truth).numpy()
    own = anatomy.read_fastmri(tmp_path / "mine.h5", slice(0, 1))
    assert own.facts["mask"] is None
    found = mri.estimate_maps(own.values, own.facts["mask"])
    x = mri.cg_sense(own.values, found, torch.ones(48), .01)
    seen = (found != 0).any(1, keepdim=True) & (truth != 0)
    assert seen.sum() > .9 * (truth != 0).sum() and mri.complex_nrmse(x * seen, truth * torch.exp(1j * maps[:, :1].angle()) * seen) < .1


def test_the_study_made_small():
    study = pytest.importorskip("mri_speed")
    for mask in study.MASKS:
        small = study.speed(mask, 2, 24, 3, 1)
        assert max(small["apart"].values()) < 1e-5 and study.OURS in small["milliseconds"]


# ------------------------------------------------------------------------------------------------------------ bad input

MAPS, MASK = randn(1, 4, 32, 32), mri.random_lines((32, 32), 2., 6, seed())
OP = mri.MultiCoilMRI(MAPS, MASK)
IMAGE, KSPACE = randn(1, 1, 32, 32), randn(1, 4, 32, 32)
CASES = {  # what is wrong: (what is called, words that the answer must have)
    "k-space of another number of coils": (lambda: OP.adjoint(KSPACE[:, :3]), "k-space must be [1, 4, 32, 32]"),
    "k-space of another size": (lambda: mri.cg_sense(KSPACE[..., :30], MAPS, MASK), "k-space must be [1, 4, 32, 32]"),
    "a mask of another size": (lambda: mri.MultiCoilMRI(MAPS, MASK[..., :30]), "mask must be broadcastable to [batch, 1, 32, 32]"),
    "maps and masks for another batch": (lambda: mri.MultiCoilMRI(MAPS.expand(2, -1, -1, -1), MASK.expand(3, -1, -1, -1)), "one batch size, got 2 and 3"),
    "a mask of zeros": (lambda: mri.MultiCoilMRI(MAPS, 0 * MASK), "mask must not be all zero"),
    "a mask of zeros for one item": (lambda: mri.MultiCoilMRI(MAPS, torch.cat([MASK, ~MASK & MASK])), "mask must not be all zero"),
    "a mask of weights": (lambda: mri.MultiCoilMRI(MAPS, .5 * MASK), "only zeros and ones"),
    "a mask with a channel for each coil": (lambda: mri.MultiCoilMRI(MAPS, MASK.expand(1, 4, 32, 32)), "broadcastable"),
    "maps of zeros": (lambda: mri.MultiCoilMRI(0 * MAPS, MASK), "maps must not be all zero"),
    "NaN in the maps": (lambda: mri.MultiCoilMRI(NAN * MAPS, MASK), "maps must be finite"),
    "NaN in the k-space": (lambda: mri.zero_filled(NAN * KSPACE, MAPS, MASK), "k-space must be finite"),
    "NaN in the image": (lambda: OP.forward(NAN * IMAGE), "image must be finite"),
    "magnitudes for k-space": (lambda: mri.cg_sense(KSPACE.abs(), MAPS, MASK), "magnitudes have lost their phase"),
    "magnitudes for maps": (lambda: mri.MultiCoilMRI(MAPS.abs(), MASK), "maps must be a complex tensor"),
    "a magnitude image": (lambda: OP.forward(IMAGE.abs()), "image must be complex"),
    "maps without a batch": (lambda: mri.MultiCoilMRI(MAPS[0], MASK), "maps must be [1 or batch, coil, H, W]"),
    "maps with the coil axis last": (lambda: mri.MultiCoilMRI(MAPS.movedim(1, -1), MASK), "is the coil axis last?"),
    "k-space with the coil axis last": (lambda: OP.adjoint(KSPACE.movedim(1, -1)), "k-space must be"),
    "an image without a channel": (lambda: OP.normal(IMAGE[:, 0]), "image must be"),
    "three channels for two": (lambda: mri.to_complex(torch.ones(1, 3, 4, 4)), "[batch, 2, H, W]"),
    "a calibration block too small": (lambda: mri.estimate_maps(KSPACE * MASK), "too small"),
    "no calibration block": (lambda: mri.estimate_maps(KSPACE * (torch.arange(32) % 2 == 1)), "0 wide"),
    "a calibration block wider than was measured": (lambda: mri.estimate_maps(KSPACE * MASK, width=24), "too small"),
    "an autocalibration block beyond the budget": (lambda: mri.random_lines((32, 32), 8., 6), "allows only 4 of 32"),
    "an acceleration below one": (lambda: mri.poisson_disc((32, 32), .5), "acceleration must be"),
    "a density without width": (lambda: mri.gaussian_points((32, 32), 4., width=0.), "width must be positive"),
    "negative noise": (lambda: mri.add_noise(KSPACE, MASK, -1.), "sigma must be"),
    "a covariance that is none": (lambda: mri.prewhiten(KSPACE, -torch.eye(4)), "positive definite"),
    "a covariance of other coils": (lambda: mri.prewhiten(KSPACE, torch.eye(3)), "x must be"),
    "too little noise to measure": (lambda: mri.noise_covariance(randn(4, 3)), "more samples than coils"),
    "a negative weight": (lambda: mri.total_variation(KSPACE, MAPS, MASK, -1.), "lam"),
    "row systems of a mask of points": (lambda: mri.line_blocks(mri.MultiCoilMRI(MAPS, torch.eye(32))), "mask of lines"),
    "two channels for a magnitude": (lambda: mri.ssim(mri.to_channels(IMAGE), mri.to_channels(IMAGE)), "to_complex"),
    "an image without a channel, compared": (lambda: mri.ssim(IMAGE[0], IMAGE[0]), "x must be [batch, 1, H, W]"),
    "a comparison of unlike images": (lambda: mri.psnr(IMAGE.abs(), IMAGE), "alike"),
}


@pytest.mark.parametrize("what", CASES)
def test_bad_input_is_named(what):
    call, words = CASES[what]
    with pytest.raises((ValueError, TypeError)) as error: call()
    assert words in str(error.value)


def test_ssim_is_that_of_wang_and_others():
    "Their equation with Gaussian windows of 11 pixels, written out; the rim that has no whole window is left out."
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed (extra: images)")
    x, truth = randn(1, 1, 30, 26), randn(1, 1, 30, 26, s=1)
    a, b = (v.abs()[0, 0].numpy() for v in (x, truth))
    mean = lambda v: ndimage.gaussian_filter(v, 1.5, truncate=3.5)
    c1, c2, ma, mb = .03**2, .09**2, mean(a), mean(b)                                   # (.01 · 3)², (.03 · 3)²
    va, vb, vab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    s = (2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert mri.ssim(x, truth, 3.).item() == pytest.approx(s[5:-5, 5:-5].mean(), rel=1e-9)


def test_defaults_and_limits():
    "No calibration block unless asked for; a spoke reaches the first row and column; as many coils as twice the shorter side pass."
    assert all(torch.equal(make((16, 64), 4., generator=seed(s)), make((16, 64), 4., 0, seed(s))) for make in LINES[:2] for s in range(8))
    edge = mri.radial_spokes((33, 33), 2., generator=seed())[0, 0]
    assert edge[0].any() and edge[:, 0].any()
    assert mri.check_maps(randn(1, 8, 4, 6)).shape == (1, 8, 4, 6)
