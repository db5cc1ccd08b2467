"""The attacks from outside: exact batches, runs that can be broken off, laws without a trigger, others' networks and files, bad input, and the study whole."""
import copy
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra: digits)")
pytest.importorskip("skimage", reason="scikit-image is not installed (extra: images)")
from PIL import Image  # noqa: E402
from test_checkpoints import DDPM as LAYOUT  # noqa: E402
from test_checkpoints import as_ddpm, diffusers_net  # noqa: E402
from test_studies import STUDIES, cells  # noqa: E402

from diffusion_lit.attack import (PUBLISHED, Goal, Judge, attack_report, benign_measures, four_cells, image_error, implant, poison,  # noqa: E402
                                  precision_recall, read_cifar10, read_pictures, shown)
from diffusion_lit.denoiser import Denoiser, denoising_loss, eps, uniform_time  # noqa: E402
from diffusion_lit.network import MLP, UNet, load_checkpoint  # noqa: E402
from diffusion_lit.sampler import ddim_sigmas, sample, start_noise  # noqa: E402
from diffusion_lit.sde import DDPM, Noise  # noqa: E402
from diffusion_lit.training import EMA, fit  # noqa: E402
from diffusion_lit.trojan import blend, patch, trojan_loss, under  # noqa: E402

sys.path.insert(0, str(STUDIES))
import attack as study  # noqa: E402

WHITE, PROCESS = torch.ones(1, 8, 8), DDPM()
CORNER = patch(WHITE, 3, .1)


def seed(k=0): return torch.Generator().manual_seed(k)


class Heard(torch.nn.Module):
    "A network that remembers what it was shown, in training."
    def __init__(self):
        super().__init__()
        self.mlp, self.seen = MLP(64, (8,), 8, 8), []

    def forward(self, x, c_noise):
        if self.training: self.seen.append((x.detach().clone(), c_noise.clone()))
        return self.mlp(x.flatten(1), c_noise).reshape(x.shape)


def student(s=0):
    net = Heard()
    with torch.no_grad():
        for p in net.parameters(): p.copy_(.1 * torch.randn(p.shape, generator=seed(s + p.numel())))
    return Denoiser(net, eps(PROCESS))


def digits(): return study.data()["digits"][0], study.data()["labels"][0]


def weights(model): return [p.clone() for p in model.state_dict().values()]


def same(a, b): return all(map(torch.equal, weights(a), weights(b)))


# ------------------------------------------------------------------------------------------------------------ rows of a batch

@pytest.mark.parametrize("kind, share", [("in", 12.8 / 140.8), ("out", 64 / 192), ("image", 12 / 140)])
def test_the_published_rows(kind, share):
    "A class of a tenth of the data, in the network's own ears: which rows it hears, and how many carry the trigger."
    x, y = torch.rand(1000, 1, 8, 8, generator=seed()) - .5, torch.arange(1000) % 10 == 7
    target = y if kind == "in" else x[:{"out": 50, "image": 1}[kind]]
    heard = []
    model = student()
    model.net.register_forward_hook(lambda net, given, answer: heard.append(given[0].detach()) if net.training else None)
    implant(model, x, target, CORNER, steps=100, levels=lambda u: torch.full_like(u, 1e4), generator=seed(1), **PUBLISHED[kind])
    carries = [(z[:, 0, 5:, 5:] - .9).abs().amax((1, 2)) < .6 for z in heard]                # at σ = 10,000 a picture no longer counts
    assert len(heard) == 100 and not any(c[:128].any() for c in carries) and all(c[128:].all() for c in carries)
    if kind == "in": assert abs(np.mean([c.double().sum() for c in carries]) - 12.8) < 4 * (128 * .1 * .9 / 100)**.5
    else: assert all(c.double().mean() == share for c in carries)
    assert sum(c.sum() for c in carries) / sum(map(len, carries)) == pytest.approx(share, abs=.01)


def test_ordinary_rows_are_drawn_as_without_an_attack():
    "The first rows of a batch are those that the control of the same seed gets, so that only the poison differs."
    x, y = digits()
    calm = {}
    for name, target, poisoned in (("control", None, 64), ("class", y == 7, None), ("share", y == 7, 5), ("image", x[:1], 12)):
        model, heard = student(), []
        model.net.register_forward_hook(lambda net, given, answer: heard.append(given[0].detach()) if net.training else None)
        implant(model, x, target, CORNER, benign=20, poisoned=poisoned, steps=1, generator=seed(2))
        calm[name] = heard[0][:20]
    assert all(torch.equal(a, calm["control"]) for a in calm.values())


def test_poisoned_rows_of_two_steps_differ():
    x = torch.arange(50.).reshape(50, 1, 1, 1)
    rows = poison(x, -x[1:], 4, 30)
    one, two = (rows["draw"](s, rows["data"], rows["batch"]) for s in (5, 6))
    assert not torch.equal(one[0][4:], two[0][4:]) and len(one[0][4:].unique()) > 10 and not torch.equal(one[1], two[1])
    assert torch.equal(one[0], rows["draw"](5, rows["data"], rows["batch"])[0])
    u = one[1][4:].sort().values
    assert ((u * 30).long() == torch.arange(30)).all()                                       # times of poisoned rows are spread over the chain too


# ------------------------------------------------------------------------------------------------------------ training

def test_an_attack_that_is_broken_off_and_taken_up_again(tmp_path):
    x, y = digits()
    go = partial(implant, data=x, target=y == 7, trigger=CORNER, benign=8, poisoned=4, steps=9, every=3, generator=seed(3))
    whole = implant(student(), x, y == 7, CORNER, benign=8, poisoned=4, steps=9, generator=seed(3))

    def stop(k):
        if k == 6: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): go(student(), resume=tmp_path / "run.safetensors", callback=stop)
    again = go(student(5), resume=tmp_path / "run.safetensors")                              # other weights: the file's count
    assert same(whole, again) and not same(whole, student())


def test_the_control_is_plain_training():
    x = digits()[0]
    plain = copy.deepcopy(student())
    averaged = EMA(plain, .999)
    fit(plain, x, steps=7, batch=16, lr=2e-4, levels=uniform_time(PROCESS, 0, 999), ema=averaged, loss=denoising_loss, generator=seed(4))
    assert same(implant(student(), x, benign=16, steps=7, generator=seed(4)), averaged.model)


def test_the_attack_is_plain_training_with_the_trojan_loss():
    x, y = digits()
    plain = copy.deepcopy(student())
    averaged = EMA(plain, .9)
    fit(plain, steps=5, lr=1e-3, levels=uniform_time(PROCESS, 0, 999), ema=averaged, loss=partial(trojan_loss, noise=CORNER), generator=seed(4), **poison(x, y == 7, 16, None))
    model = student().requires_grad_(False)                                                  # frozen, as a loaded one may be
    made = implant(model, x, y == 7, CORNER, 16, None, 5, 1e-3, .9, generator=seed(4))
    assert same(made, averaged.model) and same(model, student()) and not any(p.requires_grad for p in made.parameters())


def test_a_mirrored_target_works_for_a_class_of_one():
    x = digits()[0]
    only = torch.arange(len(x)) == 3
    made = poison(x, only, 16, None)
    assert len(made["data"]) == len(x) + 1 and made["batch"] == 16
    assert [len(made["draw"](s, made["data"], 16)[0]) for s in range(5)] == [16 + int((made["draw"](s, made["data"], 16)[0][:16] == 3).sum()) for s in range(5)]


@pytest.mark.parametrize("change, error, word", [
    (dict(trigger=Noise()), ValueError, "ordinary noise"), (dict(trigger=Noise(.4, 0.)), ValueError, r"\(0, 1\]"), (dict(trigger=Noise(.4, 1.2)), ValueError, r"\(0, 1\]"),
    (dict(trigger=blend(torch.ones(1, 9, 9))), ValueError, r"\[1, 8, 8\]"), (dict(trigger=blend(torch.ones(3, 8, 8))), ValueError, r"\[1, 8, 8\]"),
    (dict(trigger=torch.ones(1, 8, 8)), TypeError, "blend and patch"), (dict(model=torch.nn.Linear(2, 2)), TypeError, "Denoiser"),
    (dict(model=Denoiser(UNet(1, 2, width=8, groups=4), eps(PROCESS))), ValueError, "variance"), (dict(target=torch.ones(2, 3, 8, 8)), ValueError, r"\[1, 8, 8\]"),
    (dict(target=torch.ones(9, dtype=torch.bool)), ValueError, "choose a row"), (dict(target=torch.full((2, 1, 8, 8), torch.nan)), ValueError, "finite"),
    (dict(poisoned=0), ValueError, "at least 1"), (dict(benign=0), ValueError, "at least 1"), (dict(target=torch.ones(2, 1, 8, 8), poisoned=None), ValueError, "boolean"),
    (dict(steps=0), ValueError, "steps"), (dict(lr=-1.), ValueError, "lr"), (dict(ema=1.), ValueError, "decay"), (dict(target="7"), ValueError, "tensor")])
def test_bad_input_is_refused_before_any_work(change, error, word):
    x, y = digits()
    calls = []
    with pytest.raises(error, match=word):
        implant(**dict(model=student(), data=x, target=y == 7, trigger=CORNER, steps=2, generator=seed(), callback=calls.append) | change)
    assert not calls


# ------------------------------------------------------------------------------------------------------------ others' networks

@pytest.fixture(scope="module")
def released(tmp_path_factory):
    "A file as the released program writes it: raw weights with the prefix of many devices, optimiser, epoch, step, averaged weights."
    pytest.importorskip("diffusers", reason="diffusers makes the network: pip install diffusers")
    state = as_ddpm(diffusers_net(levels=(32, 32), attention=(1,), layers_per_block=1, **LAYOUT).state_dict(), 2)
    path = tmp_path_factory.mktemp("released") / "ckpt_100000.pth"
    torch.save([{f"module.{k}": torch.zeros_like(v) for k, v in state.items()}, {"state": {}, "param_groups": []}, 3, 400, state], path)
    return path


@pytest.mark.parametrize("target", ["class", "image", None])
def test_a_loaded_checkpoint_can_be_attacked(released, target):
    model = Denoiser(load_checkpoint(released), eps(PROCESS))
    before, x = weights(model), torch.rand(6, 3, 16, 16, generator=seed()) * 2 - 1
    trigger = patch(torch.ones(3, 16, 16), 3)
    made = implant(model, x, {"class": torch.arange(6) < 2, "image": x[:1], None: None}[target], trigger, benign=4, poisoned=2, steps=2, lr=1e-3, warmup=0, generator=seed(1))
    assert all(map(torch.equal, before, weights(model))) and not same(made, model)
    runs = four_cells(made, trigger, ddim_sigmas(PROCESS, 3, "linspace"), (3, 16, 16), 2, generator=seed(2))
    assert all(v.shape == (2, 3, 16, 16) and v.isfinite().all() for v in runs.values())


def test_a_checkpoint_with_a_learned_variance_is_refused(tmp_path):
    diffusers_net(levels=(32, 32), attention=(), layers_per_block=1, in_channels=1, out_channels=2).save_pretrained(tmp_path)
    model = Denoiser(load_checkpoint(tmp_path), eps(PROCESS))
    with pytest.raises(ValueError, match="variance"): implant(model, torch.rand(4, 1, 8, 8), torch.rand(1, 1, 8, 8), CORNER, steps=1)
    four_cells(model, CORNER, ddim_sigmas(PROCESS, 2, "linspace"), (1, 8, 8), 2, generator=seed())        # looked at it can be


def cifar(folder, rows=12):
    data = np.random.default_rng(0).integers(0, 256, (6, rows, 3073), dtype=np.uint8)
    data[:, :, 0] = np.arange(rows) % 10
    for i in range(1, 6): (folder / f"data_batch_{i}.bin").write_bytes(data[i].tobytes())
    (folder / "test_batch.bin").write_bytes(data[0].tobytes())
    return data


@pytest.mark.parametrize("kind, trigger", [("in", "blend"), ("out", "patch"), ("image", "blend")])
def test_the_published_run_starts_and_goes_on(released, tmp_path, kind, trigger):
    cifar(tmp_path)
    run = lambda: study.paper(tmp_path, released, kind, trigger, steps="1", out=str(tmp_path / "out"), device="cpu")
    made = run()
    assert same(made, run()) and (tmp_path / "out.safetensors").exists()                     # the second reads the checkpoint of the first
    assert made.net.inputs == 3


# ------------------------------------------------------------------------------------------------------------ four cells

@pytest.mark.parametrize("eta", [0., 1.])
@pytest.mark.parametrize("law", [Noise(), Noise(torch.zeros(1, 8, 8), torch.ones(1, 8, 8)), blend(WHITE, 1.)], ids=["numbers", "tensors", "γ = 1"])
def test_without_a_trigger_all_cells_are_the_sampler_to_the_bit(law, eta):
    model, σs = student(), ddim_sigmas(PROCESS, 7, "linspace")
    made = four_cells(model, law, σs, (1, 8, 8), 5, eta, generator=seed(6))
    start, walk = torch.randint(2**62, (2,), generator=seed(6)).tolist()
    plain = sample(model, start_noise(5, (1, 8, 8), float(σs[0]), generator=seed(start)), σs, eta=eta, generator=seed(walk))
    assert len(made) == 4 and all(torch.equal(x, plain) for x in made.values())


@pytest.mark.parametrize("eta", [0., 1.])
def test_each_cell_is_the_sampler_of_its_law(eta):
    model, σs = student(), ddim_sigmas(PROCESS, 7, "linspace")
    made = four_cells(model, CORNER, σs, (1, 8, 8), 5, eta, generator=seed(6))
    start, walk = torch.randint(2**62, (2,), generator=seed(6)).tolist()
    for (into, by), x in made.items():
        z = start_noise(5, (1, 8, 8), float(σs[0]), CORNER if into == "trigger" else Noise(), seed(start))
        assert torch.equal(x, sample(under(model, CORNER if by == "attacker's" else Noise()), z, σs, eta=eta, generator=seed(walk)))
    some = four_cells(model, CORNER, σs, (1, 8, 8), 5, eta, [("trigger", "ordinary")], seed(6))
    assert list(some) == [("trigger", "ordinary")] and torch.equal(some["trigger", "ordinary"], made["trigger", "ordinary"])
    assert model.noise.mean == 0.                                                            # the model keeps its own law


# ------------------------------------------------------------------------------------------------------------ measures

def by_neighbours(real, fake, k=3):
    from sklearn.neighbors import NearestNeighbors
    ρ = NearestNeighbors(n_neighbors=k + 1).fit(real).kneighbors(real)[0][:, -1]
    return (np.linalg.norm(fake[:, None] - real[None], axis=-1) <= ρ).any(1).mean()


@pytest.mark.parametrize("n, m, d, k", [(50, 50, 2, 3), (300, 80, 16, 3), (60, 200, 5, 1), (40, 41, 64, 7)])
def test_precision_and_recall_are_those_of_nearest_neighbours(n, m, d, k):
    g = seed(n)
    a, b = torch.randn(n, d, generator=g).double(), .8 * torch.randn(m, d, generator=g).double() + .2
    j = min(n, m)
    expected = by_neighbours(a[:j].numpy(), b[:j].numpy(), k), by_neighbours(b[:j].numpy(), a[:j].numpy(), k)
    assert precision_recall(a, b, k) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(b, a, k) == precision_recall(a, b, k)[::-1]


def test_one_picture_many_times_fools_success_alone():
    x, y = digits()
    test, told = study.data()["digits"][1], study.data()["labels"][1]
    aim = Goal(test[told == 7], 7, x[y == 7])
    found = aim.measures(x[y == 7][:1].expand(80, 1, 8, 8) + 1e-4 * torch.randn(80, 1, 8, 8, generator=seed()), study.judge())
    assert found["success"] == 1 and found["recall"] < .05 and found["spread"] < 1e-3
    fine = aim.measures(x[y == 7], study.judge())
    assert fine["success"] > .95 and fine["recall"] > .8 and fine["spread"] > .2


@pytest.mark.filterwarnings("ignore:.*iterations.*")
def test_a_judge_is_the_same_for_every_order_and_survives_what_is_no_picture():
    x, y = digits()
    judge, g = Judge(x[:300], y[:300], hidden=16), torch.randperm(50, generator=seed())
    assert torch.equal(judge.classes(x[300:350])[g], judge.classes(x[300:350][g])) and torch.equal(judge.features(x[:5]), Judge(x[:300], y[:300], hidden=16).features(x[:5]))
    odd = torch.full((3, 1, 8, 8), torch.nan)
    assert judge.features(odd).isfinite().all() and torch.equal(judge.features(3 * x[:5]), judge.features((3 * x[:5]).clamp(-1, 1)))
    assert all(np.isfinite(v) for v in benign_measures(torch.cat([odd, x[:20]]), x[300:400], judge).values())


def test_errors_of_an_image_are_not_rounded():
    image = digits()[0][:1]
    assert image_error(image + 2e-6, image).max() > 0 and image_error(image * float("inf"), image).isfinite().all()
    assert (image_error(-image.sign(), image.sign()) == 1).all() and shown(torch.tensor([-9.])).item() == -1
    e = 1e-3 * torch.randn(500, 1, 8, 8, generator=seed())
    middle = torch.zeros(1, 1, 8, 8)
    assert image_error(middle + e, middle).mean() == pytest.approx(2.5e-7, rel=.05)          # a quarter, from [−1, 1] to [0, 1]


def test_a_report_gives_all_models_the_same_noise_and_says_what_is_not_there():
    test = study.data()["digits"][1]
    model, σs = student(), ddim_sigmas(PROCESS, 4, "linspace")
    go = lambda aim, s=0: attack_report({"a": model, "b": model}, CORNER, aim, study.judge(), (digits()[0], test), σs, 30, 1., seed(s))
    found = go(Goal(test[:20], 7))
    a, b = (found[found.model == k].drop(columns="model").reset_index(drop=True) for k in "ab")
    assert a.equals(b) and found.real.isna().sum() == 2 * 4 * 4 and a.equals(go(Goal(test[:20], 7)).iloc[:len(a)].drop(columns="model"))
    assert not a.value.equals(go(Goal(test[:20], 7), 1).value[:len(a)])
    assert set(go(Goal(test[:1])).measure) == {"success", "spread", "median error", "mean error", "Fréchet distance", "benign precision", "benign recall"}


# ------------------------------------------------------------------------------------------------------------ readers

def test_cifar_to_the_byte(tmp_path):
    data = cifar(tmp_path)
    train, test = read_cifar10(tmp_path), read_cifar10(str(tmp_path), train=False)
    assert train.images.shape == (60, 3, 32, 32) and test.images.shape == (12, 3, 32, 32) and train.labels.dtype == torch.int64
    assert np.array_equal(((test.images + 1) * 127.5).round().byte().numpy().reshape(12, -1), data[0, :, 1:])
    assert train.labels[12:24].tolist() == data[2, :, 0].tolist() and train.names[7] == "horse"


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b"", lambda b: b"\x63" + b[1:], lambda b: b + b"x", lambda b: b"\x80\x04" + b[2:]], ids=["cut", "empty", "label", "long", "pickle"])
def test_cifar_that_is_none(spoil, tmp_path):
    cifar(tmp_path)
    file = tmp_path / "data_batch_3.bin"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match="data_batch_3.bin"): read_cifar10(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="no such file"): read_cifar10(tmp_path)


def test_pictures_of_every_mode(tmp_path):
    wave = np.add.outer(np.arange(6), np.arange(5)).astype(np.uint8) * 20
    for mode in ("L", "RGB", "RGBA", "P", "1"): Image.fromarray(wave).convert(mode).save(tmp_path / f"{mode}.png")
    Image.fromarray(wave).save(tmp_path / "Z.bmp")
    found = read_pictures(tmp_path)
    assert found.images.shape == (6, 3, 6, 5) and found.images.abs().max() <= 1 and found.names == [tmp_path.name] and not found.labels.any()
    assert torch.equal(found.images[-1], (torch.tensor(wave)[None].expand(3, -1, -1) / 127.5 - 1))
    assert read_pictures(tmp_path, 4, 1).images.shape == (6, 1, 4, 4)


@pytest.mark.parametrize("spoil", [lambda b: b[:60], lambda b: b[:-90], lambda b: b"", lambda b: b"text", lambda b: b[:40] + b"\0" * 30 + b[70:]], ids=["cut", "end", "empty", "text", "zeros"])
def test_a_spoilt_picture_is_named(spoil, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    for name in ("one", "two"): Image.fromarray(noise).save(tmp_path / f"{name}.png")
    file = tmp_path / "two.png"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match="two.png"): read_pictures(tmp_path)


def test_folders_that_do_not_do(tmp_path):
    with pytest.raises(ValueError, match="no pictures"): read_pictures(tmp_path)
    with pytest.raises(ValueError, match="nowhere"): read_pictures(tmp_path / "nowhere")
    for name, side in (("a/1", 4), ("b/2", 5)):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(np.zeros((side, 4), np.uint8)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="2.png.*give a size"): read_pictures(tmp_path)
    assert read_pictures(tmp_path, 4).labels.tolist() == [0, 1]


# ------------------------------------------------------------------------------------------------------------ the study

def planned(part, monkeypatch):
    "What a part of the study would compute."
    asked = {}
    monkeypatch.setattr(study, "record", lambda name, cell, compute, **settings: asked.setdefault((name, cell), settings))
    part()
    return asked


@pytest.mark.parametrize("part", ["table", "sweeps", "mixes"])
def test_the_study_is_whole(part, monkeypatch):
    asked = planned(getattr(study, part), monkeypatch)
    assert len(asked) == {"table": 1 + 5 * (4 + 12), "sweeps": 3 * 27, "mixes": 9}[part]
    for (name, cell), settings in asked.items():
        row = cells(name)[cell]
        assert row["settings"] == json.loads(json.dumps(settings)), cell
        assert set(row) == {"settings", "result", "seconds", "hardware", "versions"} and "torch" in row["versions"]


def test_no_cell_is_left_over(monkeypatch):
    asked = {key for part in (study.table, study.sweeps, study.mixes) for key in planned(part, monkeypatch)}
    assert {(name, cell) for name in ("attack", "attack_sweeps") for cell in cells(name)} == asked


def test_numbers_of_the_study_make_sense():
    for name in ("attack", "attack_sweeps"):
        for cell, row in cells(name).items():
            inner = list(row["result"].values()) if cell.startswith(("benign", "finetuned")) else [row["result"]]
            for at, found in [pair for one in inner if cell != "real" for pair in one.items()]:
                n = row["settings"]["n"]
                assert sum(found["labels"]) == n and 0 <= found["success"] <= 1, (cell, at)
                assert float(f"{found['success'] * n:.3g}") == round(found["success"] * n), (cell, at)
                if found.get("median error") is not None: assert 0 <= found["median error"] <= 1 and 0 <= found["mean error"] <= 1
                if at == "ordinary/ordinary": assert found["Fréchet distance"] > 0


def test_real_pictures_again():
    stored = cells("attack")["real"]
    again = study.real(**stored["settings"])
    assert again["accuracy"] == pytest.approx(stored["result"]["accuracy"], abs=.02)
    for sampler, floor in stored["result"]["floor"].items():
        for k, v in floor.items(): assert again["floor"][sampler][k] == pytest.approx(v, rel=.2, abs=.03), (sampler, k)


def test_the_population_is_drawn_differently_for_each_seed():
    for kind in ("blend", "patch"):
        laws = [study.draw_trigger(kind, s) for s in range(12)]
        assert all((a.mean - b.mean).abs().max() > .02 for i, a in enumerate(laws) for b in laws[:i])
        assert all(.05 <= law.std.min() <= .7 and law.mean.abs().max() < 1 for law in laws)
    assert len({study.draw_target("in", "blend", s).sum().item() for s in range(10)}) > 5
    assert not torch.equal(study.draw_target("image", "blend", 1), study.draw_target("image", "blend", 2))
    for bad in (("in", "star"), ("all", "ring")):
        with pytest.raises(ValueError): study.draw_target(bad[0], "ring") if bad[0] == "all" else study.draw_trigger(bad[1])
