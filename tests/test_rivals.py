"""The rivals from outside: promises about seeds and batches with two operators, gradients through a real network with bounded memory, answers to bad input, and the study again."""
import math
import sys

import pytest
import torch
from test_studies import STUDIES, cells

from diffusion_lit import rivals
from diffusion_lit.anatomy import load_prior
from diffusion_lit.ct import ParallelBeam
from diffusion_lit.dds import InPieces, SpectralPrior, dds, judge, ring_scanner
from diffusion_lit.krylov import LinearOperator
from diffusion_lit.mri import MultiCoilMRI, add_noise, birdcage_maps, random_lines

ALL = dict(score_mri=rivals.score_mri, diffusion_mbir=rivals.diffusion_mbir, dps=rivals.dps, ddnm=rivals.ddnm, diffpir=rivals.diffpir)
every = pytest.mark.parametrize("name", ALL)


def seed(s=0): return torch.Generator().manual_seed(s)
def bent(z, sigma): return torch.tanh(z) / (1 + torch.as_tensor(sigma).reshape(-1, *[1] * (z.ndim - 1))**2)


def mri_case(n=3):
    g = seed()
    maps, mask = birdcage_maps(4, (32, 24)).to(torch.complex64), random_lines((32, 24), 3., 4, seed(1))
    A = MultiCoilMRI(maps, mask)
    return A, add_noise(A.forward(torch.complex(*torch.randn(2, n, 1, 32, 24, generator=g))), mask, .05, generator=seed(2))


def ct_case(n=3):
    beam = ParallelBeam(24, torch.arange(6) * math.pi / 6)
    A = (1 / beam.norm) * beam
    y = A.forward(torch.rand(n, 1, 24, 24, generator=seed()))
    return A, y + .01 * torch.randn(y.shape, generator=seed(1))


@pytest.mark.parametrize("case", [mri_case, ct_case])
@every
def test_a_seed_a_picture_and_rows_that_do_not_feel_each_other(name, case):
    A, y = case()
    alone = dict(tv=0.) if name == "diffusion_mbir" else {}
    go = lambda y, s=3, **o: ALL[name](bent, A, y, noise=.05, calls=6, generator=seed(s), **alone | o)
    x = go(y)
    assert torch.equal(x, go(y)) and not torch.equal(x, go(y, 4)) and x.dtype == y.dtype and x.isfinite().all()
    assert x.shape == A.adjoint(y).shape
    torch.testing.assert_close(go(y, batch=2), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(go(y[:1]), x[:1], rtol=1e-3, atol=1e-3)


def test_slices_of_a_volume_do_feel_each_other():
    A, y = ct_case()
    go = lambda y, tv: rivals.diffusion_mbir(bent, A, y, noise=.01, calls=40, tv=tv, generator=seed())
    assert not torch.allclose(go(y[:2], 1.), go(y, 1.)[:2], rtol=1e-3, atol=1e-3)
    rough = lambda x: x.diff(dim=0).abs().mean()
    assert rough(go(y, 1.)) < rough(go(y, 0.))


def test_a_level_of_noise_for_each_item():
    A, y = mri_case(2)
    both = rivals.diffpir(bent, A, y, noise=torch.tensor([.05, .5]), calls=5, generator=seed())
    for row, noise in enumerate((.05, .5)):
        one = rivals.diffpir(bent, A, y, noise=noise, calls=5, generator=seed())
        torch.testing.assert_close(one[row], both[row], rtol=1e-4, atol=1e-4)


class Kept:
    "How many bytes autograd keeps, outside of what is computed again."
    def __enter__(self):
        self.bytes = 0
        def pack(t): self.bytes += t.numel() * t.element_size(); return t
        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error): self.hooks.__exit__(*error)


def test_a_gradient_through_a_real_network_in_pieces():
    "The same gradient, and the graph of no more than a piece."
    prior, z = load_prior("brain"), torch.randn(3, 2, 32, 32, generator=seed())
    kept, gradients = [], []
    for batch in (None, 1):
        x = z.clone().requires_grad_()
        with Kept() as k: found = InPieces(prior, batch)(x, torch.tensor(.5))
        gradients.append(torch.autograd.grad(found.square().sum(), x)[0])
        kept.append(k.bytes)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert kept[1] < kept[0] / 20, kept
    A, y = mri_case()
    go = lambda batch: rivals.dps(prior, A, y, noise=.05, calls=3, generator=seed(), batch=batch)
    torch.testing.assert_close(go(1), go(None), rtol=1e-3, atol=1e-3)
    with torch.no_grad(), Kept() as k: InPieces(prior, 1)(z.requires_grad_(), torch.tensor(.5))
    assert not k.bytes


def test_dps_needs_no_derivative_of_the_operator():
    "Any forward and adjoint will do, even in numpy."
    A, y = ct_case()
    class Foreign(LinearOperator):
        def forward(self, x): return torch.from_numpy(A.forward(x).numpy())
        def adjoint(self, y): return torch.from_numpy(A.adjoint(y).numpy())
    torch.testing.assert_close(*(rivals.dps(bent, op, y, noise=.01, calls=4, generator=seed()) for op in (Foreign(), A)))


def test_a_spectral_prior_tells_a_good_sampler_from_a_bad_one():
    prior, A = SpectralPrior(8), ring_scanner(8, (1, 4, 6))
    x = prior.draw(60, seed())
    y = A.forward(x)
    y = y + A.mask * .1 * torch.complex(*torch.randn(2, *y.shape, generator=seed(1), dtype=torch.float64))
    mean, cov = prior.posterior(A, y, .1)
    good, bad = (judge(lambda g, o=o: dds(prior, A, y, noise=.1, calls=15, generator=g, **o), mean, cov, seed(2))
                 for o in (dict(like="sample"), dict(like="sample", gamma=.01)))
    assert good["mean off by"] < .2 < bad["mean off by"] and abs(good["spread"] - 1) < .15


BAD = {
    "not finite": (dict(y=torch.full((3, 1, 6, 34), math.nan)), "finite"),
    "no batch": (dict(y=torch.ones(34)), "batch"),
    "no tensor": (dict(y=[1.]), "tensor"),
    "negative noise": (dict(noise=-1.), "noise"),
    "noise of other items": (dict(noise=torch.ones(2)), "noise"),
    "no calls": (dict(calls=0), "."),
    "levels that rise": (dict(sigmas=torch.tensor([1., 2., 0.])), "sigmas"),
    "no rows at a time": (dict(batch=0), "batch"),
    "a sinogram of another beam": (dict(y=torch.ones(3, 1, 5, 34)), "."),
}
OWN = [("score_mri", dict(snr=0.), "snr"), ("diffusion_mbir", dict(snr=0.), "snr"), ("diffusion_mbir", dict(rho=0.), "rho"), ("diffusion_mbir", dict(tv=-1.), "tv"),
       ("dps", dict(zeta=-1.), "zeta"), ("ddnm", dict(like="mine"), "like"), ("diffpir", dict(weight=0.), "weight"), ("diffpir", dict(zeta=2.), "zeta"),
       ("diffpir", dict(calls=1000), "calls")]

@pytest.mark.parametrize("name, change, word", [(name, *BAD[case]) for name in ALL for case in BAD] + OWN)
def test_bad_input_is_answered_before_any_work(name, change, word):
    def never(z, sigma): raise AssertionError("the network was asked")
    A, y = ct_case()
    with pytest.raises(ValueError, match=word): ALL[name](**dict(denoiser=never, operator=A, y=y, noise=.01) | change)


# --- the study

@pytest.fixture
def study():
    sys.path.insert(0, str(STUDIES))
    pytest.importorskip("sigpy", reason="sigpy is not installed (extra: images)")
    pytest.importorskip("nilearn", reason="nilearn is not installed (extra: images)")
    import rivals as study
    return study


def test_every_cell_says_how_it_was_made_and_of_which_prior():
    recipes = dict(mri=load_prior("brain").facts["recipe"], ct=load_prior("ct").facts["recipe"])
    for cell, row in cells("rivals").items():
        assert set(row) == {"settings", "result", "seconds", "hardware", "versions"} and "torch" in row["versions"], cell
        if "recipe" in row["settings"]: assert row["settings"]["recipe"] == recipes[row["settings"]["problem_name"]], cell
        if "psnr" in row["result"] and "best" not in row["result"]: assert len(row["result"]["psnr"]) == 5, cell


def test_a_cheap_cell_again(study):
    stored = cells("rivals")["ct: dds point, 9 calls"]
    again = study.cell(**stored["settings"])
    assert again["calls"] == stored["result"]["calls"] == 9
    for metric in ("psnr", "ssim"): assert list(again[metric]) == pytest.approx(stored["result"][metric], rel=.01), metric


def test_the_oracle_again_with_fewer_calls(study):
    found = study.oracle("dps", m=16, calls=60, zeta=1.)
    assert found["mean off by"] < .6 and .7 < found["spread"] < 1.3
