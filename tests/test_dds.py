"""DDS from outside: a published network's layout, real shapes, promises about seeds and batches, exact solvers, and answers to bad input."""
import math

import pytest
import torch
from test_checkpoints import deepinv_source, guided_net  # noqa: F401 (a fixture)

from diffusion_lit import dds as module
from diffusion_lit.dds import dds, reconstruct, settings
from diffusion_lit.denoiser import Denoiser, eps
from diffusion_lit.mri import MultiCoilMRI, add_noise, birdcage_maps, line_blocks, random_lines
from diffusion_lit.network import load_checkpoint
from diffusion_lit.sde import DDPM


def seed(s=0): return torch.Generator().manual_seed(s)
def smooth(z, sigma): return z / (1 + torch.as_tensor(sigma).reshape(-1, *[1] * (z.ndim - 1))**2)


@pytest.fixture
def scan():
    "Maps, mask, and noisy k-space of two pictures of 32 x 24."
    g = seed()
    x = torch.complex(*torch.randn(2, 2, 1, 32, 24, generator=g))
    maps, mask = birdcage_maps(4, (32, 24)).to(x), random_lines((32, 24), 3., 4, seed(1))
    A = MultiCoilMRI(maps, mask)
    return maps, mask, A, add_noise(A.forward(x), mask, .05, generator=seed(2))


def test_a_published_layout_plugs_in(deepinv_source, tmp_path, scan):  # noqa: F811
    "Two channels in, four out (learned sigma), attention in the middle only: the released MRI network's layout, narrower."
    _, state = guided_net(deepinv_source, attention_resolutions="16", img_size=320, channel_mult=(1, 1, 2), num_head_channels=32, inputs=2, outputs=4)
    torch.save(state, tmp_path / "knee.pt")
    net = load_checkpoint(tmp_path / "knee.pt", head_width=32)
    maps, mask, A, y = scan
    calls = []
    hook = net.register_forward_hook(lambda *_: calls.append(1))
    x = dds(Denoiser(net, eps(DDPM()), clip=(-3, 3)), A, y, noise=.05, like="published", calls=5, generator=seed(), batch=1)
    hook.remove()
    assert x.shape == (2, 1, 32, 24) and x.isfinite().all() and len(calls) == 10


def test_real_width_goes_through():
    "320 x 320 and 15 coils, with a network that costs nothing."
    maps, mask = birdcage_maps(15, (320, 320)).to(torch.complex64), random_lines((320, 320), 4., 24, seed())
    A = MultiCoilMRI(maps, mask)
    y = A.forward(torch.complex(*torch.randn(2, 1, 1, 320, 320, generator=seed(1))))
    r = reconstruct(y, mask, smooth, maps=maps, noise=.1, calls=3, generator=seed())
    assert r.image.shape == (1, 1, 320, 320) and r.image.isfinite().all()


def test_seeds_and_batches(scan):
    maps, mask, A, y = scan
    go = lambda y, **o: dds(smooth, A, y, noise=.05, calls=4, like="sample", **dict(generator=seed(3)) | o)
    assert torch.equal(go(y), go(y)) and not torch.equal(go(y), go(y, generator=seed(4)))
    torch.testing.assert_close(go(y, batch=1), go(y))
    torch.testing.assert_close(go(y[:1]), go(y)[:1], rtol=1e-4, atol=1e-4)


def test_an_exact_solver_is_the_limit_of_conjugate_gradients(scan):
    maps, mask, A, y = scan
    A, y = MultiCoilMRI(maps.to(torch.complex128), mask), y.to(torch.complex128)
    go = lambda **o: dds(smooth, A, y, noise=.05, calls=4, generator=seed(), **o)
    torch.testing.assert_close(go(solver=line_blocks(A)), go(cg=300), rtol=0, atol=1e-7)


def test_levels_of_noise_an_item(scan):
    "A noise for each item gives what each gives alone."
    maps, mask, A, y = scan
    both = dds(smooth, A, y, noise=torch.tensor([.05, .5]), calls=4, generator=seed())
    for noise, row in ((.05, 0), (.5, 1)):
        torch.testing.assert_close(dds(smooth, A, y, noise=noise, calls=4, generator=seed())[row], both[row], rtol=1e-4, atol=1e-4)


def test_equivariance(scan):
    maps, mask, A, y = scan
    go = lambda y, noise: reconstruct(y, mask, smooth, maps=maps, noise=noise, calls=4, generator=seed()).image
    for c in (2., -1., 1j, 3 - 4j):
        torch.testing.assert_close(go(c * y, abs(c) * .05), c * go(y, .05), rtol=1e-3, atol=1e-3 * abs(c))


BAD = {
    "magnitudes": (lambda y, maps, mask: dict(kspace=y.abs()), "complex"),
    "not finite": (lambda y, maps, mask: dict(kspace=y * math.nan), "finite"),
    "coils last": (lambda y, maps, mask: dict(kspace=y.movedim(1, -1)), "coil"),
    "no batch": (lambda y, maps, mask: dict(kspace=y[0]), "batch"),
    "all zero": (lambda y, maps, mask: dict(kspace=0 * y), "zero"),
    "other maps": (lambda y, maps, mask: dict(maps=maps[:, :2]), "coil"),
    "magnitude maps": (lambda y, maps, mask: dict(maps=maps.abs()), "complex"),
    "zero maps": (lambda y, maps, mask: dict(maps=0 * maps), "zero"),
    "zero mask": (lambda y, maps, mask: dict(mask=mask & False), "zero"),
    "mask of another width": (lambda y, maps, mask: dict(mask=mask[..., 1:]), "mask"),
    "no middle to estimate maps from": (lambda y, maps, mask: dict(maps=None), "too small"),
    "negative noise": (lambda y, maps, mask: dict(noise=-1.), "noise"),
    "unknown settings": (lambda y, maps, mask: dict(like="mine"), "published"),
    "no calls": (lambda y, maps, mask: dict(calls=0), "calls"),
    "no draws": (lambda y, maps, mask: dict(samples=0), "samples"),
    "negative weight": (lambda y, maps, mask: dict(gamma=-1.), "gamma"),
}

@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_before_any_work(case, scan):
    def never(z, sigma): raise AssertionError("the network was asked")
    (change, word), (maps, mask, _, y) = BAD[case], scan
    with pytest.raises((ValueError, TypeError), match=word):
        reconstruct(**dict(kspace=y, mask=mask, denoiser=never, maps=maps, noise=.05) | change(y, maps, mask))


def test_settings_are_complete():
    for name in ("published", "released", "point", "sample"):
        for noisy in (True, False): assert (settings(name, 19, noisy).gamma is None) != noisy
    assert set(module.Settings._fields) == {"gamma", "eta", "renoise", "keep_noise", "sigmas", "cg"}
