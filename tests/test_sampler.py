"""The sampler against an independent library's schedulers, fed with one arbitrary network."""
import pytest
import torch

from diffusion_lit import DDPM, Denoiser, ddim_sigmas, ddim_steps, eps, sample, start_noise

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: test)")


def net(x, t): return torch.tanh(x) + t / 5000


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_spacings_are_those_of_diffusers(spacing):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(30)
    assert ddim_steps(1000, 30, spacing) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])      # with linspace, diffusers steps past the indices it visits
def test_ddim_is_that_of_diffusers(spacing):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    chain, sigmas = DDPM(), ddim_sigmas(DDPM(), 20, spacing)
    z = start_noise(4, (1, 2, 2), sigmas[0].item(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = z * chain.scale(scheduler.timesteps[0])
    for t in scheduler.timesteps: x = scheduler.step(net(x, t), t, x).prev_sample
    torch.testing.assert_close(sample(Denoiser(net, eps(chain)), z, sigmas), x, rtol=1e-4, atol=1e-4)     # it keeps α in float32
