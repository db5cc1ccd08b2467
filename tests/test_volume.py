"""Volumes from outside: batches, interruptions, a real network, memory, and answers to bad input."""
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_studies import STUDIES, cells

from diffusion_lit import ct, volume
from diffusion_lit.krylov import Dense, dot_test
from diffusion_lit.training import read_tensors, write_tensors

sys.path.insert(0, str(STUDIES))
pytest.importorskip("scipy", reason="scipy is not installed (extra: images)")
NAN = float("nan")


def seed(s=0): return torch.Generator().manual_seed(s)
def smooth(z, sigma): return z * .25 / (.25 + sigma**2)


BEAM = ct.ParallelBeam(8, [.1, 1., 2.])
A = (1 / BEAM.norm) * BEAM
Y = A.forward(torch.rand(5, 1, 8, 8, generator=seed()))
def go(**o): return volume.dds_volume(**(dict(denoiser=smooth, operator=A, y=Y, noise=.01, calls=6, generator=seed(1)) | o))


@pytest.mark.parametrize("ends", ["open", "circular"])
@pytest.mark.parametrize("n", [1, 2, 3, 9])
@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_differences_and_their_adjoint(ends, n, kind):
    D, x, y = volume.SliceDifferences(ends), torch.randn(n, 2, 3, dtype=kind, generator=seed()), torch.randn(n, 2, 3, dtype=kind, generator=seed(1))
    assert abs((D.forward(x) * y.conj()).sum() - (x * D.adjoint(y).conj()).sum()) < 1e-12
    if ends == "open": assert not D.forward(torch.ones_like(x)).any() and not D.forward(x)[-1].any()


def test_the_first_slice_does_not_hear_of_the_last():
    "With open ends a change of the last slice's measurement reaches the first through the neighbours only: not at all where there is no total variation."
    other = Y.clone()
    other[-1] += .5
    for options, close in ((dict(tv=0., cg=60), True), (dict(ends="circular", tv=20.), False)):
        a, b = go(**options), go(y=other, **options)
        assert torch.allclose(a[0], b[0], atol=2e-3) == close, options


def test_the_batch_of_the_network_is_no_matter():
    whole = go(batch=None)
    for batch in (1, 2, 5, 64): assert torch.equal(whole, go(batch=batch))
    assert torch.equal(whole, go()) and not torch.equal(whole, go(generator=seed(2)))


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    go()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kill -9")
def test_killed_and_taken_up(tmp_path):
    "kill -9 between two steps, then the same bits as without."
    code = f"""
import sys, time, torch
sys.path.insert(0, {str(os.path.dirname(__file__))!r})
import test_volume as t
t.go(calls=12, resume={str(tmp_path / "walk")!r}, callback=lambda r: time.sleep(.25))"""
    run = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and run.poll() is None:
        if (tmp_path / "walk").exists() and read_tensors(tmp_path / "walk")[1]["done"] >= 2: break
        time.sleep(.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert 2 <= read_tensors(tmp_path / "walk")[1]["done"] < 12
    assert torch.equal(go(calls=12, resume=tmp_path / "walk", generator=None), go(calls=12))


def test_a_real_network_and_a_small_head():
    pytest.importorskip("nilearn", reason="nilearn is not installed (extra: images)")
    from diffusion_lit.anatomy import ct_volumes, load_prior
    x = ct_volumes(1, 32, seed(3), "test")[0].movedim(1, 0)[8:24]
    beam = ct.ParallelBeam(32, torch.arange(8) * math.pi / 8)
    op = (1 / beam.norm) * beam
    y = op.forward(x) + .01 * torch.randn(16, *beam.sinogram, generator=seed())
    heads = load_prior("heads")
    ours, least = volume.dds_volume(heads, op, y, noise=.01, calls=7, generator=seed()), op.adjoint(y)
    error = lambda u: (u - x).square().mean().sqrt()
    assert error(ours) < .6 * error(ct.fbp(y * beam.norm, beam, "hann")) and least.shape == ours.shape
    assert (op.forward(ours) - y).square().mean().sqrt() < .03


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured in Linux's units")
def test_memory_is_a_few_volumes():
    "64 slices of 256 x 256, 16 MiB a volume: the walk takes less than thirty of them."
    script = """
import math, torch
from diffusion_lit import ct, volume
torch.set_num_threads(1)
rss = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
beam = ct.ParallelBeam(256, torch.arange(8) * math.pi / 8)
A = (1 / beam.norm) * beam
x = torch.ones(64, 1, 256, 256)
y = A.forward(x)
A.adjoint(y)
before = rss()
volume.dds_volume(lambda z, s: z / (1 + s**2), A, y, noise=.01, calls=3, cg=3)
print(rss() - before)"""
    used = float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()[-1])
    assert used < 30 * 16, used


CASES = {  # what is wrong: (what is called, words that the answer must have)
    "a measurement with NaN": (lambda: go(y=Y * NAN), "y must be finite"),
    "one slice without a batch": (lambda: go(y=Y[0]), "must be"),
    "slices as a list": (lambda: go(y=list(Y)), "y must be"),
    "fewer bins than the operator": (lambda: go(y=Y[..., :-1]), "y must be"),
    "a negative noise": (lambda: go(noise=-1.), "noise must be"),
    "no noise level": (lambda: go(noise=NAN), "noise must be"),
    "a level for each slice": (lambda: go(noise=torch.ones(5)), "noise must be"),
    "rising levels": (lambda: go(sigmas=[1., 2., 0.]), "sigmas"),
    "one call": (lambda: go(calls=1), "calls must be"),
    "settings of nobody": (lambda: go(like="best"), "settings must be"),
    "ends of a third kind": (lambda: go(ends="loose"), "ends must be"),
    "a penalty of zero": (lambda: go(rho=0.), "rho must be"),
    "negative total variation": (lambda: go(tv=-1.), "tv must"),
    "a weight by another name": (lambda: go(gamma="large"), "gamma must"),
    "negative counts": (lambda: ct.log_transform(-torch.ones(1, 1, 3, 12), 1e4), "not negative"),
    "line integrals of another scanner": (lambda: volume.reconstruct_ct(Y[..., :-1], BEAM, smooth, pixel=1., photons=1e4), "p must be"),
    "no photons": (lambda: volume.reconstruct_ct(Y, BEAM, smooth, pixel=1., photons=0.), "photons must be"),
    "a pixel without an edge": (lambda: volume.reconstruct_ct(Y, BEAM, smooth, pixel=NAN, photons=1e4), "pixel must be"),
    "truth of another shape": (lambda: volume.plane_quality(torch.ones(4, 1, 8, 8), torch.ones(5, 1, 8, 8)), "like truth"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    call, words = CASES[case]
    with pytest.raises((ValueError, TypeError), match=words): call()


def test_files_that_are_no_walk(tmp_path):
    path = tmp_path / "walk"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="walk"): go(resume=path)
    for tensors in (dict(weight=torch.ones(2)), {name: torch.ones(2) for name in "zdp"}):
        write_tensors(path, tensors, {})
        with pytest.raises(ValueError, match="expected a walk"): go(resume=path)
    path.unlink()
    go(resume=path)
    for word, options in dict(measured=dict(y=Y * 2), tv=dict(tv=1.), noise=dict(noise=.02), sigma_data=dict(sigma_data=.3), sigmas=dict(sigmas=[1., .5, 0.]), seed=dict(generator=seed(9))).items():
        with pytest.raises(ValueError, match=word): go(resume=path, **options)
    (tmp_path / "walk").write_bytes((tmp_path / "walk").read_bytes()[:-40])
    with pytest.raises(ValueError, match="walk"): go(resume=path)


def test_a_cheap_cell_of_the_study_again():
    pytest.importorskip("nilearn", reason="nilearn is not installed (extra: images)")
    import volume as study
    stored = cells("volume")["64, 8 views, head 0: FBP"]
    again = study.classical(**stored["settings"])
    for plane, pair in stored["result"]["planes"].items(): assert again["planes"][plane] == pytest.approx(pair, rel=.01)


def test_the_study_is_whole_and_of_the_shipped_prior():
    pytest.importorskip("nilearn", reason="nilearn is not installed (extra: images)")
    import volume as study
    table = cells("volume")
    for name, _, settings in study.cells():
        assert name in table, name
        assert table[name]["settings"] == json.loads(json.dumps(settings)), name


def test_the_exact_adjoint_of_the_turned_projector():
    import volume as study
    beam = ct.ParallelBeam(16, torch.arange(5) * math.pi / 5)
    x, y = torch.randn(2, *beam.image, generator=seed()), torch.randn(2, *beam.sinogram, generator=seed(1))
    assert dot_test(study.Rotated(beam, True), x, y).max() < 1e-6 < 1e-4 < dot_test(study.Rotated(beam), x, y).max()
    disc = (torch.linspace(-1, 1, 16)[:, None]**2 + torch.linspace(-1, 1, 16)**2 < .5).float().expand(1, 1, 16, 16)
    assert (study.Rotated(beam).forward(disc) - beam.forward(disc) / beam.norm).norm() < .05 * (beam.forward(disc) / beam.norm).norm()
