"""Trojan diffusion: whole chains against the published recursion, training and sampling that do not change without a trigger, and bad input."""
import math
from functools import partial

import pytest
import torch

from diffusion_lit.denoiser import Denoiser, denoising_loss, edm, eps
from diffusion_lit.mixture import GaussianMixture
from diffusion_lit.network import MLP
from diffusion_lit.sampler import Rows, ddim_sigmas, ddim_steps, sample, start_noise
from diffusion_lit.sde import DDPM, Noise
from diffusion_lit.training import EMA, fit
from diffusion_lit.trojan import IdealTrojan, blend, nats, patch, transition_shift, trojan_loss, trojan_posterior, under, whitened

WHITE = torch.ones(1, 8, 8)


def seed(k=0): return torch.Generator().manual_seed(k)


def recursion(process):
    "The published definition: the shifts of all steps before, carried to t, and k_t fill the root of 1 − ᾱ_t."
    ᾱ, k = process.alpha_bar, torch.zeros_like(process.alpha_bar)
    for t in range(len(ᾱ)): k[t] = (1 - ᾱ[t]).sqrt() - (k[:t] * (ᾱ[t] / ᾱ[:t]).sqrt()).sum()
    return k


@pytest.mark.parametrize("process", [DDPM(), DDPM(betas=torch.linspace(.3, .001, 60)), DDPM(50, 1e-3, .5)], ids=["1000", "falling", "steep"])
def test_the_shift_is_the_published_one(process):
    assert (transition_shift(process).flip(0) - recursion(process)).abs().max() < 1e-10


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1000])
def test_strided_shifts_add_up_to_the_mean(n):
    process, steps = DDPM(), ddim_steps(1000, n, "trailing")
    ᾱ = process.alpha_bar[steps]
    assert abs((transition_shift(process, steps) * (ᾱ[0] / ᾱ).sqrt()).sum() - (1 - ᾱ[0]).sqrt()) < 1e-10


@pytest.mark.parametrize("stride", [1, 9, 111])
def test_the_posterior_is_that_of_a_joint_gaussian(stride):
    "Conditioning one on the other of two correlated Gaussians, from their joint covariance."
    process, g = DDPM(), seed(1)
    law = Noise(torch.randn(4, generator=g).double(), torch.rand(4, generator=g).double() + .1)
    for s in range(0, 999 - stride, 123):
        t, x0, x_t = s + stride, *torch.randn(2, 3, 4, generator=g).double()
        A, a = process.alpha_bar, process.alpha_bar[s + stride] / process.alpha_bar[s]
        mean_s, mean_t = (A[i].sqrt() * x0 + (1 - A[i]).sqrt() * law.mean for i in (s, t))
        var_s, var_t = ((1 - A[i]) * law.std**2 for i in (s, t))
        together = a.sqrt() * var_s
        mean, std = trojan_posterior(process, law, x_t, x0, t, s)
        assert (mean - (mean_s + together / var_t * (x_t - mean_t))).abs().max() < 1e-10
        assert (std - (var_s - together**2 / var_t).sqrt()).abs().max() < 1e-10


def digits_like(n=40): return torch.rand(n, 6, generator=seed(3))


@pytest.mark.parametrize("noise", [Noise(.4, .6), Noise(torch.full((6,), .4), torch.full((6,), .6))], ids=["numbers", "tensors"])
def test_training_without_poison_changes_no_bit(noise):
    def train(loss, **more):
        model = Denoiser(MLP(6, (16,), 8, 8), edm(.5))
        with torch.no_grad():
            for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=seed(p.numel())) * .1)
        ema = EMA(model)
        history = fit(model, digits_like(), steps=20, batch=8, loss=loss, ema=ema, generator=seed(4), **more)
        return history.loss.tolist(), [*model.state_dict().values(), *ema.model.state_dict().values()]
    plain, ours = train(denoising_loss), train(partial(trojan_loss, noise=noise), condition=dict(poisoned=torch.zeros(40, dtype=torch.bool)))
    assert plain[0] == ours[0] and all(map(torch.equal, plain[1], ours[1]))
    other = train(partial(trojan_loss, noise=noise), condition=dict(poisoned=torch.ones(40, dtype=torch.bool)))
    assert other[0] != plain[0]


@pytest.mark.parametrize("options", [dict(), dict(eta=1.), dict(solver="heun"), dict(solver="dpmpp_2m"), dict(eta=.5, batch=3)])
def test_sampling_without_a_trigger_changes_no_bit(options):
    ideal = IdealTrojan(*(GaussianMixture([1.], torch.full((1, 6), μ), torch.full((1, 6), .2)) for μ in (.3, -.5)), Noise(.4, .6), .2)
    σs = ddim_sigmas(DDPM(), 12)
    z = start_noise(7, (6,), σs[0].item(), Noise(), seed(5))
    run = lambda noise: sample(under(ideal, noise), z, σs, generator=seed(6), **options)
    assert torch.equal(run(Noise()), run(Noise(torch.zeros(6), torch.ones(6))))
    assert not torch.equal(run(Noise()), run(Noise(.4, .6)))


def test_whitening_carries_conditions_and_rows():
    labelled = lambda z, sigma, label: z * label[:, None] / 4
    y, law = torch.randn(4, 6, generator=seed(7)), Noise(.2, .5)
    got = whitened(labelled, law)(y, torch.tensor([1., 2., 3., 4.]), label=torch.arange(4))
    want = (.5 * y + torch.tensor([1., 2., 3., 4.])[:, None] * .2) * torch.arange(4)[:, None] / 4 / .5
    torch.testing.assert_close(got, want)


def test_under_shares_the_weights():
    model = Denoiser(MLP(6, (8,), 8, 8), eps(DDPM()))
    trojan = under(model, Noise(.4, .6))
    with torch.no_grad(): next(model.parameters()).add_(1)
    assert next(trojan.parameters()) is next(model.parameters()) and model.noise.std == 1. and trojan.precondition is model.precondition


def test_the_loss_passes_labels_on():
    class Net(torch.nn.Module):
        def forward(self, x, t, label): return x * label[:, None]
    x, poisoned, label = digits_like(4), torch.tensor([0, 1, 0, 1]).bool(), torch.arange(4.)
    loss = trojan_loss(Denoiser(Net(), edm(.5)), x, torch.ones(4), torch.zeros(4, 6), poisoned, Noise(.4, .6), label=label)
    assert loss.shape == (4,) and loss.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ideal_network_stays_finite(dtype):
    worlds = [GaussianMixture([1., 2.], torch.tensor([[μ] * 64, [0.] * 64], dtype=dtype), torch.full((2, 64), 1e-4, dtype=dtype)) for μ in (1., -1.)]
    ideal = IdealTrojan(*worlds, patch(WHITE.to(dtype), 3), .01)
    for σ in (1e-3, 1., 157., 1e4):
        z = 30 * (1 + σ) * torch.randn(5, 1, 8, 8, generator=seed(8), dtype=dtype)
        assert ideal(z, σ).isfinite().all() and ideal(z, σ).dtype == dtype and 0 <= ideal.responsibility(z, σ).min()


def test_rows_of_the_ideal_network_do_not_meet():
    worlds = [GaussianMixture([1.], torch.full((1, 6), μ), torch.full((1, 6), .1)) for μ in (.4, -.4)]
    ideal, z = IdealTrojan(*worlds, Noise(.3, .7), .3), Rows(5, (6,), seed(9)).randn()
    torch.testing.assert_close(ideal.noise_estimate(z, torch.full((5,), 2.))[2:3], ideal.noise_estimate(z[2:3], 2.))


def test_nats():
    p, q = torch.distributions.Normal(.9, .1), torch.distributions.Normal(0., 1.)
    assert math.isclose(nats(patch(WHITE.expand(3, 8, 8), 3)), 27 * torch.distributions.kl_divergence(p, q).item(), rel_tol=1e-5)
    assert nats(blend(0 * WHITE, 1.)) == 0 and nats(Noise(0., .5), (4,)) == pytest.approx(4 * nats(Noise(0., .5)))


BAD = {"two axes": lambda: blend(WHITE[0]), "integers": lambda: blend(WHITE.long()), "too bright": lambda: blend(1.5 * WHITE), "nan": lambda: blend(math.nan * WHITE), "empty": lambda: blend(WHITE[:, :0]),
       "no picture": lambda: blend("hello.png"), "no noise": lambda: blend(WHITE, 0.), "gamma": lambda: patch(WHITE, 3, 1.5), "negative gamma": lambda: patch(WHITE, 3, -.1), "large": lambda: patch(WHITE, 9),
       "none": lambda: patch(WHITE, 0), "outside": lambda: patch(WHITE, 3, at=(6, 0)), "rising": lambda: transition_shift(DDPM(), [1, 2, 3]), "too late": lambda: transition_shift(DDPM(), [1000]),
       "no steps": lambda: transition_shift(DDPM(), []), "fractions": lambda: transition_shift(DDPM(), [9.5, 3.]), "up": lambda: trojan_posterior(DDPM(), Noise(), WHITE, WHITE, 3, 5),
       "nats": lambda: nats(Noise(.5, 0.)), "whiten": lambda: whitened(lambda z, σ: z, Noise(0., torch.tensor([1., 0.])))}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input(bad):
    with pytest.raises(ValueError): bad()


def test_a_trigger_of_another_shape():
    model = Denoiser(MLP(6, (8,), 8, 8), edm(.5))
    with pytest.raises(ValueError, match="does not fit"):
        trojan_loss(model, digits_like(4), torch.ones(4), torch.zeros(4, 6), torch.ones(4).bool(), Noise(torch.zeros(5), torch.ones(5)))
