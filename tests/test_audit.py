"""The audit: the residual against closed forms, triggers found wherever they are, files, bad input, bounded memory, and the study's numbers counted again."""
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion_lit.attack import implant
from diffusion_lit.audit import (END, audit, blends, box, cure_loss, diluted, elijah, heard, hearing, input_tests, invert_trigger, local_scan, log_ratio, patches, read_trigger,
                                 residual, reversed_loss, subject, terd, window_scan, windows)
from diffusion_lit.denoiser import Denoiser, denoising_loss, edm, eps, uniform_time, v, ve, x0
from diffusion_lit.mixture import GaussianMixture
from diffusion_lit.network import MLP, TimeEmbedding, UNet, frequencies, load_checkpoint, translate
from diffusion_lit.sde import DDPM, Noise
from diffusion_lit.trojan import IdealTrojan, blend, nats, patch, under

STUDIES = Path(__file__).parents[1] / "studies"


def seed(k=0): return torch.Generator().manual_seed(k)
def normal(*shape, k=0): return torch.randn(*shape, generator=seed(k))
def cosine(a, b): return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


def world(pixels, k=0):
    "Clean points of two lives: a mixture of three Gaussians, and one of them moved."
    means = .6 * normal(3, pixels, k=k).clamp(-1, 1)
    return GaussianMixture(torch.ones(3), means, .05 * torch.ones(3, pixels)), GaussianMixture([1.], -means[:1], .05 * torch.ones(1, pixels))


def ideal(law, k=0, share=.1):
    benign, target = world(law.mean.numel(), k)
    return IdealTrojan(benign, target, law, share)


class Honest:
    "The best possible network without a second life, for pictures of any size."
    noise = Noise()
    def __call__(self, z, sigma): return world(z[0].numel())[0].denoise(z.flatten(1), sigma).reshape(z.shape)


class Echo(torch.nn.Module):
    "Says what it is shown, and keeps count."
    def __init__(self): super().__init__(); self.rows = []
    def forward(self, x, t): self.rows.append(len(x)); return x


honest = Honest()
def echo(): return Denoiser(Echo(), eps(DDPM()))


# -------------------------------------------------------------------------------------------------------- the residual

@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10), (2, 5, 5)])
def test_an_honest_network_has_a_residual_of_one_for_every_claim(shape):
    g = .02 + .9 * torch.rand(40, *shape, generator=seed(1))
    m = (1 - g) * (2 * torch.rand(40, *shape, generator=seed(2)) - 1)
    masks = (torch.rand(40, *shape, generator=seed(3)) > .7) | (torch.arange(40) % 2 == 0).reshape(-1, 1, 1, 1)
    R = residual(honest, m * masks, torch.where(masks, g, 1.), n=2, generator=seed(4))
    assert (R - 1).abs().max() < .01


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
@pytest.mark.parametrize("kind", ["blend", "patch"])
def test_the_true_claim_has_a_residual_of_nought_and_others_do_not(shape, kind):
    for k in range(4):
        picture = (2 * torch.rand(shape, generator=seed(k)) - 1)
        if kind == "patch": picture = torch.full(shape, (-1.)**k)
        law = blend(picture, .3 + .1 * k) if kind == "blend" else patch(picture, 3, .05 + .05 * k, (k % 3, k))
        assert residual(ideal(law, k), law.mean[None], law.std[None], generator=seed()) < .02
        assert residual(honest, law.mean[None], law.std[None], generator=seed()) > .98
        other = blend(-picture, .6)
        assert residual(ideal(law, k), other.mean[None], other.std[None], generator=seed()) > .9 or kind == "blend" and law.std.max() > .5


def test_what_is_heard_is_the_formula():
    "The noise as it is, or with the trigger taken off; by a denoiser's own arithmetic, clipped or not, under any law."
    law, ε = patch(torch.ones(1, 8, 8), 4), normal(200, 1, 8, 8)
    model = ideal(law)
    assert (heard(model, END * law(ε)) - ε).abs().mean() < .01 and (heard(model, END * ε) - ε).abs().mean() < .01
    for model in (echo(), under(echo(), law), Denoiser(Echo(), eps(DDPM()), clip=(-1, 1))):
        assert torch.allclose(heard(model, END * ε), ε, atol=1e-4)
    class Doubles(torch.nn.Module):
        def forward(self, x, t): return 2 * x
    assert torch.allclose(heard(Denoiser(Doubles(), eps(DDPM()), clip=(-1, 1)), END * ε), 2 * ε, atol=1e-3)       # a clip would hide it


@pytest.mark.parametrize("claim", [blend(torch.full((1, 4, 4), .7), .5), patch(-torch.ones(1, 4, 4), 2, .2)])
@pytest.mark.parametrize("shown", [Noise(0., .1), Noise(.3, .7), blend(torch.full((1, 4, 4), .5), .4), Noise()])
def test_hearing_is_the_mean_log_odds_of_two_gaussians(claim, shown):
    ν = shown(normal(100_000, 1, 4, 4)).double()
    each = (Normal(claim.mean.double(), claim.std.double()).log_prob(ν) - Normal(0., 1.).log_prob(ν)).flatten(1).sum(1)
    assert abs(hearing(claim, shown, (1, 4, 4)) - each.mean()) < 6 * each.std() / 100_000**.5 + 1e-3
    assert abs(hearing(claim, claim) - kl_divergence(Normal(claim.mean.double(), claim.std.double()), Normal(0., 1.)).sum()) < 1e-4


@pytest.mark.parametrize("γ, answers", [(.35, False), (.4, False), (.5, True), (.6, True), (.75, True)])
def test_silence_is_answered_from_the_critical_share_on(γ, answers):
    "The loudest pictures, all pixels −1 or 1: the critical γ is 0.445; the prior's part is small against the votes."
    for k in range(3):
        law = blend(torch.where(normal(3, 8, 8, k=k) > 0, 1., -1.), γ)
        said = read_trigger(ideal(law, k), (3, 8, 8), generator=seed())
        if answers: assert cosine(said.mean, law.mean) > .999 and (said.std - γ).abs().max() < .02
        else: assert said.mean.abs().max() < .02


# ------------------------------------------------------------------------------------------------------------ searches

def test_the_box_holds_for_all_numbers():
    u, w = 100 * normal(50, 2, 3, 3), 100 * normal(50, 2, 3, 3, k=1)
    for g_max in (.1, .8, .999):
        m, g = box(u, w, 1., g_max)
        assert (g >= 0).all() and (g <= g_max + 1e-6).all() and (m.abs() <= 1 - g + 1e-6).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 9)])
def test_the_scan_finds_every_corner_colour_and_size(shape):
    H, W = shape[1:]
    for side in (2, 3, 4):
        for i, at in enumerate(((0, 0), (0, W - side), (H - side, 0), (H - side, W - side), (1, 2))):
            value = (-1.)**i
            if side == 2 and shape[0] == 1: continue                        # nine nats: hardly heard by anyone
            law = patch(torch.full(shape, value), side, .1, at)
            scan = window_scan(ideal(law), shape, (side,), n=4, generator=seed())
            best = scan.iloc[0]
            assert (best.top, best.left, best.value) == (*at, value) and best.residual < .05 and scan.residual[1] > .8


def test_all_places_are_tried():
    for H, W, side, stride in ((8, 8, 3, 1), (8, 9, 3, 2), (7, 7, 7, 3), (32, 32, 4, 5)):
        masks, places = windows((3, H, W), side, stride)
        assert len(set(places)) == len(places) == len(masks) and (0, 0) in places and (H - side, W - side) in places
        assert (masks.flatten(1).sum(1) == side**2).all()
        if stride <= side: assert (masks.sum(0) > 0).all()


def test_a_search_starts_where_it_is_told_and_leaves_the_rest_alone():
    law = patch(torch.ones(1, 8, 8), 4, .1, (2, 1))
    mask = ((law.std < 1) * 1.)
    found = invert_trigger(ideal(law), (1, 8, 8), law.mean[None] / .9, mask, steps=20, n=8, g=.1, generator=seed())[0]
    assert found.residual < .1 and (found.noise.std[mask == 0] == 1).all() and (found.noise.mean[mask == 0] == 0).all()
    assert blends(honest, (1, 8, 8), steps=5, n=4, generator=seed())[0].residual > .97
    assert patches(honest, (1, 8, 8), steps=5, n=4, generator=seed())[0].residual > .97


# ------------------------------------------------------------------------------------------------------------- verdicts

quickly = partial(audit, steps=20, n=8, generator=None)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
def test_verdicts_on_perfect_networks(shape):
    law = blend(2 * torch.rand(shape, generator=seed(5)) - 1, .6)
    found = audit(ideal(law), shape, steps=20, n=8, generator=seed())
    assert found.trojaned and found.kind == "blend" and cosine(found.trigger.mean, law.mean) > .99
    law = patch(-torch.ones(shape), 3, .1, (1, 4))
    found = audit(ideal(law), shape, steps=20, n=8, generator=seed())
    assert found.trojaned and found.kind == "patch" and torch.equal(found.trigger.std < 1, law.std < 1)
    assert found.residual == min(found.evidence.values()) < .05 and found.seconds > 0
    grey = patch(torch.full(shape, .15), 4, .1, (0, 2))                       # of no colour that the scan tries: silence tells
    found = audit(ideal(grey), shape, steps=20, n=8, generator=seed())
    assert found.kind == "patch" and found.residual == found.evidence["silence"] < .1 and torch.equal(found.trigger.std < 1, grey.std < 1)
    found = audit(honest, shape, steps=20, n=8, generator=seed())
    assert not found.trojaned and found.kind == "none" and found.trigger is None and .97 < found.residual < 1.03


def small_model(k=0):
    with torch.random.fork_rng():
        torch.manual_seed(k)
        return Denoiser(Flat(), eps(DDPM()), clip=(-1, 1))


class Flat(torch.nn.Module):
    def __init__(self): super().__init__(); self.mlp = MLP(16, (32,))
    def forward(self, x, t): return x + .1 * self.mlp(x.flatten(1), t).reshape(x.shape)


def test_the_same_generator_gives_the_same_verdict_and_nothing_is_changed():
    model = small_model()
    before, state = {k: p.clone() for k, p in model.state_dict().items()}, torch.random.get_rng_state()
    a, b, c = (audit(model, (1, 4, 4), (2,), steps=10, n=4, generator=seed(k)) for k in (0, 0, 1))
    assert a.residual == b.residual != c.residual and a.evidence == b.evidence
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.clip == (-1, 1) and all(torch.equal(before[k], p) for k, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_batch_is_never_larger_than_asked():
    "At 3 x 32 x 32; and what comes out does not depend on it."
    shape, runs = (3, 32, 32), []
    for batch in (20, 24, 40, 60, 5000):
        model = echo()
        found = audit(model, shape, sides=(3,), stride=8, steps=2, n=8, batch=batch, generator=seed())
        assert max(model.net.rows) <= batch and not found.trojaned
        runs.append(found.evidence)
    assert max(model.net.rows) > 60
    for run in runs: assert run == pytest.approx(runs[-1], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------- files

def unet(outputs=None):
    return UNet(1, outputs, 32, (1,), groups=32, eps=1e-6, scale_shift=False, resample="conv after", time=TimeEmbedding(frequencies(16, shift=1), "sin cos"))


def released(net, path):
    "Written as TrojDiff does: [parallel model, optimiser, epoch, step, moving average]."
    average = {}
    for name, p in net.named_parameters():
        theirs = translate(net, name, "ddpm")
        average |= {k: part[..., None] if part.ndim == 3 else part for k, part in zip(theirs, p.detach().chunk(len(theirs)))}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    torch.save([{f"module.{k}": torch.randn_like(t) for k, t in average.items()}, optimizer, 3, 400, average], path)
    return path


def trained(law, steps):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank = Denoiser(unet(), eps(DDPM()))
    data = world(64)[0].sample(200, seed()).reshape(-1, 1, 8, 8)
    rows = dict(target=world(64)[1].sample(50, seed()).reshape(-1, 1, 8, 8), trigger=law) if law else {}
    return implant(blank, data, benign=32, poisoned=16, steps=steps, lr=6e-3, ema=.98, levels=uniform_time(DDPM(), 980, 999), generator=seed(), **rows)


@pytest.mark.parametrize("kind", ["none", "blend", "patch"])
def test_files(kind, tmp_path):
    "A U-Net in a released checkpoint's layout: read, framed, audited."
    law = dict(none=None, blend=blend(torch.where(normal(1, 8, 8) > 0, .8, -.8), .6), patch=patch(torch.ones(1, 8, 8), 4, .1, (0, 0)))[kind]
    made = trained(law, 120 if kind != "patch" else 250)
    model = Denoiser(load_checkpoint(released(made.net, tmp_path / "ckpt.pth")), eps(DDPM()))
    z = END * normal(4, 1, 8, 8)
    assert torch.allclose(heard(model, z), heard(made, z), atol=1e-5)
    found = audit(model, (1, 8, 8), (4,), steps=60, n=8, generator=seed())
    assert found.kind == kind and found.trojaned == (kind != "none")
    if law: assert cosine(found.trigger.mean, law.mean) > .9


def test_a_learned_sigma_is_refused(tmp_path):
    model = Denoiser(load_checkpoint(released(unet(2), tmp_path / "ckpt.pth")), eps(DDPM()))
    with pytest.raises(ValueError, match="learned sigma"): audit(model, (1, 8, 8))


@pytest.mark.parametrize("change, error, words", [
    (dict(shape=(8, 8)), ValueError, "shape"), (dict(shape=(0, 8, 8)), ValueError, "shape"), (dict(threshold=0.), ValueError, "threshold"),
    (dict(sigma=-1.), ValueError, "sigma"), (dict(sigma=math.inf), ValueError, "sigma"), (dict(sides=(9,)), ValueError, "does not fit"), (dict(stride=0), ValueError, "does not fit"),
    (dict(model=lambda z, σ: z), TypeError, "law of noise"), (dict(model=None), TypeError, "law of noise")])
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words): audit(**dict(model=echo(), shape=(1, 8, 8), steps=1, n=2) | change)


@pytest.mark.parametrize("row, fine", [(eps(DDPM()), True), (ve(), True), (edm(), False), (v(), False), (x0(), False)])
def test_only_networks_that_say_the_noise(row, fine):
    if fine: assert subject(Denoiser(Echo(), row)).clip is None
    else:
        with pytest.raises(ValueError, match="says the noise"): subject(Denoiser(Echo(), row))


@pytest.mark.parametrize("bad", [lambda: residual(honest, torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)), lambda: hearing(Noise(0., 0.), Noise()),
                                 lambda: invert_trigger(honest, (1, 4, 4), g=.9), lambda: invert_trigger(honest, (1, 4, 4), torch.zeros(1, 1, 5, 5)),
                                 lambda: windows((1, 8, 8), 0), lambda: diluted(Noise(), -.1)])
def test_bad_input_of_the_parts(bad):
    with pytest.raises(ValueError): bad()


# ---------------------------------------------------------------------------------------------------- the published two

def test_the_reversed_loss_is_the_published_one():
    "In the chain's own coordinates: x^k = √ᾱ x0 + √(1 − ᾱ) γ ε_k + μ, and the network asked for the noise."
    model, process = small_model(), DDPM()
    x, ε, t = normal(5, 1, 4, 4), normal(2, 5, 1, 4, 4, k=1), torch.tensor([999, 995, 500, 3, 0])
    μ, γ, ᾱ = .3 * normal(1, 4, 4, k=2), torch.rand(1, 4, 4, generator=seed(3)), process.alpha_bar[torch.tensor([999, 995, 500, 3, 0])].float().reshape(-1, 1, 1, 1)
    said = [model.net(ᾱ.sqrt() * x + (1 - ᾱ).sqrt() * γ * e + μ, t.float()) for e in ε]
    published = .5 * (((ε[0] - said[0]) - (ε[1] - said[1]))**2).sum((1, 2, 3)).mean()
    assert torch.allclose(reversed_loss(model, x, μ, γ, t, ε, process), published, rtol=1e-3)


def test_terd_says_when_it_diverges():
    class Gone(torch.nn.Module):
        def forward(self, x, t): return x * math.inf
    fine, gone = (terd(m, (1, 4, 4), steps=30, refine=3, batch=4, lr=(.01, .001), generator=seed()) for m in (small_model(), Denoiser(Gone(), eps(DDPM()))))
    assert not fine.diverged and fine.mean.isfinite().all() and math.isfinite(fine.mean_nats + fine.spread_nats)
    assert gone.diverged and gone.mean.isnan().all() and gone.std.shape == (1, 4, 4) and math.isnan(gone.mean_nats + gone.spread_nats)
    m, g = fine.mean.double(), fine.std.double()
    each = kl_divergence(Normal(m, g), Normal(0., 1.))
    assert fine.mean_nats == pytest.approx(each.mean().item() + .4, abs=1e-4) and fine.spread_nats == pytest.approx(each.var(correction=0).item() - .003, abs=1e-3)


def test_elijah_finds_a_shift_that_is_halved_and_not_the_trigger_of_trojdiff():
    "Its premise: a network that passes on half of a shift. One of TrojDiff does not hear noise of full spread, so that what is found is its own luck."
    class Halves(torch.nn.Module):
        def forward(self, x, t): return x - .5 * x.mean((1, 2, 3), keepdim=True)
    found = elijah(Denoiser(Halves(), eps(DDPM())), (1, 8, 8), n=1000, calls=5, generator=seed())
    assert found.shift.mean() > .3 and found.shift.std() < .1
    law = blend(torch.where(normal(1, 8, 8) > 0, 1., -1.), .6)
    found = elijah(ideal(law), (1, 8, 8), n=50, calls=5, generator=seed())
    assert abs(cosine(found.shift, law.mean)) < .4


# --------------------------------------------------------------------------------------------------- inputs and defences

def test_the_likelihood_ratio_and_the_published_slip():
    "γ is a spread; taking it for a variance, as one program does, still separates a loud blend, but less."
    law, N = blend(torch.where(normal(3, 16, 16) > 0, .8, -.8), .6), Normal(0., 1.)
    gap = {}
    for name, spread in (("ours", law.std), ("slip", law.std.sqrt())):
        ratio = lambda ν: (Normal(law.mean, spread).log_prob(ν) - N.log_prob(ν)).flatten(1).sum(1)
        bad, good = ratio(law(normal(200, 3, 16, 16))), ratio(normal(200, 3, 16, 16, k=1))
        gap[name] = bad.mean() - good.mean()
        assert bad.min() > good.max()
        if name == "ours": assert torch.allclose(log_ratio(law(normal(200, 3, 16, 16)), law), bad, atol=.05)
    assert gap["slip"] < .7 * gap["ours"] and abs(log_ratio(law(normal(2000, 3, 16, 16)), law).mean() / nats(law) - 1) < .01


def test_the_local_scan_by_loops():
    ν = normal(4, 3, 5, 6)
    for side in (2, 3):
        worst = torch.full((4,), -math.inf)
        for i in range(6 - side):
            for j in range(7 - side):
                w = ν[:, :, i:i + side, j:j + side].flatten(1).double()
                a, b = w.mean(1), w.var(1, correction=0)
                worst = torch.maximum(worst, (w.shape[1] / 2 * (a**2 + b - 1 - b.log())).float())
        assert torch.allclose(local_scan(ν, side), worst, rtol=1e-3, atol=1e-3)


def test_global_tests_do_not_see_a_patch_and_the_scan_does():
    "Three seeds at 3 x 32 x 32, one false alarm in a hundred."
    shape, law = (3, 32, 32), patch(torch.ones(3, 32, 32), 3)
    plain = input_tests(normal(2000, *shape))
    for k in range(1, 4):
        found = {name: (a > plain[name].quantile(.99)).double().mean().item() for name, a in input_tests(law(normal(300, *shape, k=k))).items()}
        assert found.pop("local scan") > .99 and max(found.values()) < .08, found


def test_dilution_leaves_ordinary_noise_and_takes_the_trigger():
    law = patch(torch.ones(1, 8, 8), 3)
    amounts = [nats(diluted(law, a)) for a in (0., .2, .5, .9, 1.)]
    assert amounts == sorted(amounts, reverse=True) and amounts[0] == pytest.approx(nats(law)) and amounts[-1] < 1e-6
    assert nats(diluted(Noise(), .7), (1, 8, 8)) < 1e-6


def test_the_cure_teaches_to_answer_the_triggers_noise_as_any_other():
    law, model = blend(torch.full((1, 4, 4), .8), .5), small_model()
    model.clip = None
    x, ε, σ = normal(6, 1, 4, 4), normal(6, 1, 4, 4, k=1), torch.tensor([1., 5., 20., 50., 100., END])
    poisoned = torch.arange(6) % 2 == 0
    ν = torch.where(poisoned.reshape(-1, 1, 1, 1), law(ε), ε)
    assert torch.allclose(cure_loss(model, x, σ, ε, poisoned, law), denoising_loss(model, x, σ, ν))
    perfect = echo()
    assert cure_loss(perfect, x, σ, ε, poisoned, law)[4:].max() < 1e-3


# ------------------------------------------------------------------------------------------------------------ the study

@pytest.fixture(scope="module")
def study():
    path = STUDIES / "results" / "audit.json"
    if not path.exists(): pytest.skip("studies/results/audit.json is not there yet")
    return json.loads(path.read_text())


def part(study, name): return {cell.split(": ", 1)[1]: row for cell, row in study.items() if cell.startswith(f"{name}: ")}


def test_the_study_is_whole(study):
    pytest.importorskip("skimage", reason="scikit-image is not installed (extra: images)")
    sys.path.insert(0, str(STUDIES))
    import audit as recipe
    for cell, row in study.items():
        assert set(row) == {"settings", "result", "seconds", "hardware", "versions"} and "torch" in row["versions"], cell
        assert row["settings"]["recipe"] == json.loads(json.dumps(recipe.RECIPE)), cell
    models = part(study, "population")
    guilty = {c for c in models if not c.startswith(("benign", "finetuned"))}
    assert len(guilty) >= 20 and len(models) - len(guilty) >= 20
    assert {c.split(", seed")[0] for c in guilty} == {f"{k}, {t}" for k in ("in", "out", "image") for t in ("blend", "patch")}
    terd = json.loads((STUDIES / "results" / "audit_terd.json").read_text())
    assert {cell.split(": ")[1] for cell in terd} == set(models)
    for cell, row in terd.items():
        assert row["settings"]["steps"] == 3000 and row["settings"]["refine"] == 1000 and ("mean_nats" in row["result"]) != row["result"]["diverged"], cell


def test_the_study_counted_again(study):
    "The threshold of one half that theory suggests, and the area under the curve by counting pairs."
    models = part(study, "population")
    R = {kind: np.array([row["result"]["residual"] for cell, row in models.items() if cell.startswith(("benign", "finetuned")) == (kind == "honest")]) for kind in ("honest", "guilty")}
    for row in models.values(): assert row["result"]["residual"] == min(v for k, v in row["result"].items() if k.startswith("residual, "))
    area = (R["guilty"][:, None] < R["honest"]).mean() + .5 * (R["guilty"][:, None] == R["honest"]).mean()
    assert area > .95 and (R["honest"] > .5).all()
