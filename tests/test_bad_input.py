"""What the library answers to input that makes no sense. `python tests/test_bad_input.py` prints the table."""
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch

import diffusion_lit as lit

NAN, INF = float("nan"), float("inf")
HERE = Path(tempfile.mkdtemp())
MIXTURE = lit.GaussianMixture([1., 1.], torch.tensor([[0., 0.], [1., 1.]]), torch.ones(2, 2))
Z, IMAGES = torch.randn(4, 2), torch.randn(6, 1, 4, 4)


class Bomb:
    "A pickle that leaves a trace when it is run."
    def __reduce__(self): return os.mkdir, (str(HERE / "exploded"),)


def file(name, data):
    (HERE / name).write_bytes(data)
    return HERE / name


def model(): return lit.Denoiser(lit.UNet(1, width=8), lit.edm(.5))


def saved():
    lit.save(HERE / "whole.safetensors", model())
    return (HERE / "whole.safetensors").read_bytes()


def changed_run():
    network, path = model(), HERE / "run.safetensors"
    lit.fit(network, IMAGES, steps=2, batch=2, resume=path)
    lit.fit(network, IMAGES, steps=3, batch=2, resume=path)


def unlike_net():
    torch.save(lit.UNet(1, width=16).state_dict(), HERE / "other.pt")
    lit.load_checkpoint(HERE / "other.pt", kind="ddpm")


CASES = {  # what is wrong: (what is called, words that the answer must have)
    "weights that do not match the means": (lambda: lit.GaussianMixture([1.], [[0.], [1.]], [[1.], [1.]]), "weights must be [2]"),
    "a covariance that is not symmetric": (lambda: lit.GaussianMixture([1.], [[0., 0.]], [[[1., .5], [0., 1.]]]), "symmetric"),
    "a covariance with a negative eigenvalue": (lambda: lit.GaussianMixture([1.], [[0., 0.]], [[[1., 2.], [2., 1.]]]), "semidefinite"),
    "NaN in the means": (lambda: lit.GaussianMixture([1.], [[NAN]], [[1.]]), "means must be finite"),
    "an image where a point of the plane is due": (lambda: MIXTURE.score(IMAGES, 1.), "2 numbers a row"),
    "a measurement of another dimension": (lambda: MIXTURE.posterior(torch.ones(1, 3), torch.ones(1), .1), "A must be [m, 2]"),
    "a measurement without noise": (lambda: MIXTURE.posterior(torch.ones(1, 2), torch.ones(1), 0.), "noise_std must be positive"),
    "a negative noise level": (lambda: MIXTURE.denoise(Z, -1.), "sigma must be finite and not negative"),
    "a noise level for each of the wrong number of rows": (lambda: MIXTURE.denoise(Z, torch.ones(3)), "one a row (4,)"),
    "whole numbers where noisy points are due": (lambda: MIXTURE.denoise(Z.int(), 1.), "floating point or complex"),
    "a noise law of negative spread": (lambda: lit.Noise(0., -1.), "std must not be negative"),
    "β of a chain beyond one": (lambda: lit.DDPM(beta_end=2.), "betas in (0, 1)"),
    "limits of VE the wrong way round": (lambda: lit.VE(50., .01), "sigma_min < sigma_max"),
    "σ_data of zero": (lambda: lit.edm(0.), "sigma_data must be positive"),
    "a preconditioning given by name": (lambda: lit.Denoiser(torch.nn.Identity(), "edm"), "precondition must be a row"),
    "an unknown view": (lambda: lit.to_view(Z, Z, 1., "noise"), "view must be one of"),
    "a network that answers in another shape": (lambda: lit.Denoiser(lambda x, c: x[:, :1], lit.ve())(Z, 1.), "answered with shape (4, 1)"),
    "a schedule that rises": (lambda: lit.sample(MIXTURE, Z, [1., 2., 0.]), "fall strictly"),
    "a schedule below zero": (lambda: lit.sample(MIXTURE, Z, [1., -1.]), "not negative"),
    "a schedule of one level": (lambda: lit.sample(MIXTURE, Z, [1.]), "at least two levels"),
    "no rows to sample": (lambda: lit.sample(MIXTURE, Z[:0], [1., 0.]), "not empty"),
    "NaN in the starting points": (lambda: lit.sample(MIXTURE, Z * NAN, [1., 0.]), "finite"),
    "an unknown solver": (lambda: lit.sample(MIXTURE, Z, [1., 0.], solver="rk4"), "solver must be one of"),
    "η beyond one": (lambda: lit.sample(MIXTURE, Z, [1., 0.], eta=2.), "eta must leave"),
    "labels for another number of rows": (lambda: lit.sample(MIXTURE, Z, [1., 0.], condition=dict(label=torch.ones(3))), "'label' must have 4 rows"),
    "more steps than the chain has": (lambda: lit.ddim_sigmas(lit.DDPM(100), 200), "between 1 and 100"),
    "an image whose sides cannot be halved": (lambda: lit.UNet(1, width=8, mults=(1, 2, 2))(torch.ones(1, 1, 6, 6), torch.tensor(0.)), "divi"),
    "a label that the network does not know": (lambda: lit.UNet(1, width=8, classes=3)(IMAGES, torch.tensor(0.), label=torch.full((6,), 3)), "label"),
    "empty data": (lambda: lit.fit(model(), IMAGES[:0], steps=1), "not empty"),
    "NaN in the data": (lambda: lit.fit(model(), IMAGES * NAN, steps=1), "finite"),
    "whole numbers for data": (lambda: lit.fit(model(), IMAGES.int(), steps=1), "floating-point"),
    "labels to drop where there are none": (lambda: lit.fit(model(), IMAGES, steps=1, drop=.1), "no 'label'"),
    "a learning rate that is not a number": (lambda: lit.fit(model(), IMAGES, steps=1, lr=NAN), "lr > 0"),
    "a run resumed with other settings": (changed_run, "other settings: steps: 2 there, 3 here"),
    "weights of another architecture": (lambda: (saved(), lit.load(HERE / "whole.safetensors", lit.Denoiser(lit.UNet(1, width=16), lit.edm(.5)))), "do not fit"),
    "a file cut short": (lambda: lit.load(file("cut.safetensors", saved()[:-100]), model()), "not a whole safetensors file"),
    "an empty file": (lambda: lit.load(file("empty.safetensors", b""), model()), "not a whole safetensors file"),
    "a file that is not there": (lambda: lit.load(HERE / "nowhere", model()), "no such file"),
    "a checkpoint cut short": (lambda: lit.load_checkpoint(file("cut.ckpt", b"PK\x03\x04" + bytes(100))), "cut.ckpt"),
    "a text file as a checkpoint": (lambda: lit.load_checkpoint(file("text.pt", b"once upon a time")), "text.pt"),
    "a pickle that runs code as a checkpoint": (lambda: lit.load_checkpoint(file("bomb.pt", pickle.dumps(Bomb(), 2))), "bomb.pt cannot be read as plain tensors: what else it holds was not run"),
    "a checkpoint of a network of another kind": (unlike_net, "other.pt"),
    "an unknown kind of checkpoint": (lambda: lit.load_checkpoint(file("text.pt", b"once"), kind="gan"), "kind"),
    "feature clouds of different widths": (lambda: lit.frechet_distance(torch.ones(3, 2), torch.ones(3, 4)), "same k"),
    "a slider without values": (lambda: lit.explore(lambda x: None, alt="nothing", x=[]), "x"),
}


def answer(call):
    "The error that a call is answered with."
    with pytest.raises((ValueError, TypeError)) as error: call()
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize("what", CASES)
def test_bad_input_is_named(what):
    call, words = CASES[what]
    assert words in answer(call)
    assert not (HERE / "exploded").exists() and not list(HERE.glob("*.part*"))


if __name__ == "__main__":
    for what, (call, _) in CASES.items(): print(f"| {what} | {answer(call).splitlines()[0].replace(str(HERE), '…')} |")
