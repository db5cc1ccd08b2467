"""A progress bar shows when it is asked for, and reaches its end."""
import pytest
import torch

from diffusion_lit import DDPM, MLP, Denoiser, UNet, edm, eps, fit, karras_sigmas, sample
from diffusion_lit.audit import audit


def model(): return Denoiser(MLP(2, hidden=(4,)), edm(.5))


@pytest.mark.parametrize("work", [lambda progress: sample(model(), torch.ones(5, 2), karras_sigmas(3), batch=2, progress=progress),
                                  lambda progress: fit(model(), torch.ones(5, 2), steps=3, batch=2, progress=progress),
                                  lambda progress: audit(Denoiser(UNet(1, width=8), eps(DDPM())), (1, 8, 8), steps=2, n=2, progress=progress)], ids=["sample", "fit", "audit"])
def test_a_bar_shows_when_asked(work, capsys):
    work(False)
    assert capsys.readouterr().err == ""
    work(True)
    shown = capsys.readouterr().err
    assert "100%" in shown and shown.endswith("\n")
