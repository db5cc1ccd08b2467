"""Networks that others trained: the same answers as the original network's, and a clear refusal of everything else.

The references are independent programs, on random weights and reduced width: diffusers' UNet2DModel for its own layout
and, with names translated here by hand, for the layout of pesser and ermongroup; deepinv's copy of guided-diffusion's
network for that one. No second program exists for EHRDiff's LinearModel, so `test_ehrdiff` compares with the published
equations written out: equality with its authors' program is unverified.
"""
import importlib.util, inspect, json, math, re, sys, types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from diffusion_lit.network import MLP, UNet, diffusers_config, load_checkpoint


def shaken(net, seed=0):
    "The reference, with weights far from their initial zeros, in evaluation mode."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim > 1: p.normal_(0, p[0].numel() ** -0.5, generator=g)
            else: p.normal_(float(name.endswith("weight")), 0.2, generator=g)              # the gain of a normalisation
    return net.eval()


def same(net, reference, channels, side=16, atol=1e-5, **label):
    "Equal answers at several noise levels; `reference(x, t)` is the original program."
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, channels, side, side, generator=g), torch.tensor([0., 17., 500., 999.])
    with torch.no_grad(): y, expected = net(x, t, **label), reference(x, t)
    assert expected.std() > 0.1
    torch.testing.assert_close(y / expected.std(), expected / expected.std(), atol=atol, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- diffusers

def diffusers_net(levels=(32, 64, 64), attention=(1,), **options):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference here: pip install diffusers")
    down = ["AttnDownBlock2D" if l in attention else "DownBlock2D" for l in range(len(levels))]
    up = [t.replace("Down", "Up") for t in reversed(down)]
    return shaken(diffusers.UNet2DModel(block_out_channels=levels, down_block_types=down, up_block_types=up, **options))


DDPM = dict(norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None)

@pytest.mark.parametrize("options", [
    DDPM | dict(layers_per_block=2),
    dict(layers_per_block=1, attention=(0, 2), in_channels=1, out_channels=2),
    dict(layers_per_block=1, resnet_time_scale_shift="scale_shift", norm_num_groups=16),
    dict(layers_per_block=1, levels=(32, 96), attention=(), add_attention=False),
    dict(layers_per_block=1, levels=(64,), attention=(0,), attention_head_dim=16),
], ids=["ddpm", "many heads", "scale and shift", "no attention", "one level"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_diffusers(options, safe, tmp_path):
    reference = diffusers_net(**options)
    reference.save_pretrained(tmp_path, safe_serialization=safe)
    for path in (tmp_path, next(tmp_path.glob("diffusion_pytorch_model.*"))):
        net = load_checkpoint(path)
        assert isinstance(net, UNet) and not net.training
        same(net, lambda x, t: reference(x, t).sample, reference.config.in_channels)


def test_diffusers_classes(tmp_path):
    reference = diffusers_net(layers_per_block=1, num_class_embeds=3)
    reference.save_pretrained(tmp_path)
    label = torch.tensor([0, 1, 2, 2])
    same(load_checkpoint(tmp_path), lambda x, t: reference(x, t, label).sample, 3, label=label)


def test_diffusers_old_names(tmp_path):
    "Files from before 2023 call the attention layers query, key, value and proj_attn."
    reference = diffusers_net(layers_per_block=1, **DDPM)
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {re.sub(r"to_[qkv]|to_out\.0", lambda m: new[m[0]], k): v for k, v in reference.state_dict().items()}
    reference.save_config(tmp_path)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    same(load_checkpoint(tmp_path), lambda x, t: reference(x, t).sample, 3)


def test_diffusers_defaults():
    "What config.json leaves out is what diffusers would take."
    from diffusers import UNet2DModel
    theirs = {k: p.default for k, p in inspect.signature(UNet2DModel.__init__).parameters.items()}
    for k, v in diffusers_config({}).items(): assert v == (list(theirs[k]) if isinstance(v, list) else theirs[k]), k


@pytest.mark.parametrize("change", [
    dict(act_fn="gelu"), dict(class_embed_type="timestep"), dict(time_embedding_type="fourier"),
    dict(mid_block_scale_factor=2), dict(up_block_types=["UpBlock2D"] * 3)])
def test_diffusers_other_kinds(change, tmp_path):
    diffusers_net(layers_per_block=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not supported"): load_checkpoint(tmp_path)


# --------------------------------------------------------------------------------------------------------------- ddpm

def as_ddpm(state, levels):
    "The names of pesser and ermongroup for the tensors of a diffusers network."
    out, rules = {}, [
        (r"time_embedding\.linear_([12])", lambda m: f"temb.dense.{int(m[1]) - 1}"),
        (r"mid_block\.resnets\.([01])", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", lambda m: "mid.attn_1"),
        (r"down_blocks\.(\d+)", lambda m: f"down.{m[1]}"),
        (r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}"),
        (r"resnets\.", lambda m: "block."), (r"attentions\.", lambda m: "attn."),
        (r"downsamplers\.0", lambda m: "downsample"), (r"upsamplers\.0", lambda m: "upsample"),
        (r"time_emb_proj", lambda m: "temb_proj"), (r"conv_shortcut", lambda m: "nin_shortcut"),
        (r"conv_norm_out", lambda m: "norm_out"), (r"group_norm", lambda m: "norm"),
        (r"to_([qkv])", lambda m: m[1]), (r"to_out\.0", lambda m: "proj_out")]
    for k, v in state.items():
        matrix = re.search(r"to_([qkv]|out\.0)\.weight$", k)
        for pattern, new in rules: k = re.sub(pattern, new, k)
        out[k] = v[:, :, None, None] if matrix else v                        # 1x1 convolutions there
    return out


@pytest.fixture(scope="module")
def ddpm():
    reference = diffusers_net(layers_per_block=2, **DDPM)
    state = as_ddpm(reference.state_dict(), 3)
    assert {"temb.dense.0.weight", "down.1.attn.0.q.weight", "up.0.block.2.nin_shortcut.weight"} <= set(state)
    assert state["down.1.attn.0.q.weight"].shape == (64, 64, 1, 1)
    return state, lambda x, t: reference(x, t).sample


@pytest.mark.parametrize("how", ["plain", "list", "parallel", "no average"])
def test_ddpm(how, ddpm, tmp_path):
    state, reference = ddpm
    parallel = {f"module.{k}": v for k, v in state.items()}
    noise = {k: torch.randn_like(v) for k, v in parallel.items()}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    torch.save({"plain": state, "parallel": parallel, "no average": [parallel, optimizer, 3, 400],
                "list": [noise, optimizer, 3, 400, state]}[how], tmp_path / "model.ckpt")
    for kind in (None, "ddpm"): same(load_checkpoint(tmp_path / "model.ckpt", kind), reference, 3)
    if how == "list":
        with pytest.raises(AssertionError): same(load_checkpoint(tmp_path / "model.ckpt", ema=False), reference, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, ddpm, tmp_path):
    "The numbers in the file are used as they are, in float32."
    state = {k: v.to(dtype) for k, v in ddpm[0].items()}
    save_file({k: v.float().contiguous() for k, v in state.items()}, tmp_path / "float.safetensors")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "other.safetensors")
    net, float_net = (load_checkpoint(tmp_path / f"{name}.safetensors") for name in ("other", "float"))
    assert all(p.dtype == torch.float32 for p in net.parameters())
    same(net, float_net, 3, atol=0)
    same(net, ddpm[1], 3, atol={torch.float16: 0.05, torch.bfloat16: 0.5, torch.float64: 1e-5}[dtype])


# --------------------------------------------------------------------------------------------------- guided-diffusion

@pytest.fixture
def deepinv_source(monkeypatch):
    """The text of deepinv's network. The package itself imports torchvision, which this project does not need,
    so its module is run alone, with empty parents, and with the widths that it hard-codes replaced by small ones."""
    spec = importlib.util.find_spec("deepinv")
    if spec is None: pytest.skip("deepinv is the reference here: pip install --no-deps deepinv")
    folder = Path(spec.origin).parent
    for name in ("deepinv", "deepinv.models", "deepinv.utils", "deepinv.utils.io"):
        module = types.ModuleType(name)
        module.__path__, module.DownloadError = [str(folder / "models")] if name == "deepinv.models" else [], OSError
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("deepinv.models.base", "deepinv.models.utils"): monkeypatch.delitem(sys.modules, name, raising=False)
    yield (folder / "models" / "diffunet.py").read_text()
    for name in ("deepinv.models.base", "deepinv.models.utils"): sys.modules.pop(name, None)


def guided_net(source, inputs=1, outputs=1, **change):
    "deepinv's DiffUNet with other numbers in the place of those it fixes."
    for name, value in (dict(model_channels=32, num_res_blocks=1, channel_mult=(1, 2, 2)) | change).items():
        source, n = re.subn(rf"(?m)^(        (?:    )?{name} = )(?!tuple).+$", lambda m: m[1] + repr(value), source)
        assert n, f"deepinv no longer sets {name}"
    module = types.ModuleType("deepinv.models.diffunet")
    module.__package__ = "deepinv.models"
    exec(compile(source, "diffunet.py", "exec"), module.__dict__)
    net = shaken(module.DiffUNet(inputs, outputs, pretrained=None))
    return net, {k: v for k, v in net.state_dict().items() if not k.startswith("sqrt_")}   # deepinv's own additions


GUIDED = {
    "as released": (dict(attention_resolutions="128", num_head_channels=32), dict(head_width=32)),
    "320: complex, middle attention only, learned sigma": (
        dict(attention_resolutions="16", img_size=320, channel_mult=(1, 1, 2), num_head_channels=32,
             inputs=2, outputs=4),
        dict(head_width=32)),
    "two levels of attention": (
        dict(attention_resolutions="256,64", num_head_channels=16, num_res_blocks=2), dict(head_width=16)),
    "a number of heads": (
        dict(attention_resolutions="128", num_head_channels=-1, num_heads=4), dict(head_width=None, heads=4)),
    "new order": (
        dict(attention_resolutions="64", num_head_channels=8, use_new_attention_order=True),
        dict(head_width=8, legacy=False)),
    "convolutions, shift only": (
        dict(attention_resolutions="128", resblock_updown=False, use_scale_shift_norm=False, num_head_channels=32),
        dict(head_width=32)),
    "half a width, default heads": (
        dict(attention_resolutions="128", channel_mult=(0.5, 1), model_channels=64, num_head_channels=64), dict()),
}

@pytest.mark.parametrize("change, options", GUIDED.values(), ids=GUIDED)
def test_guided_diffusion(change, options, deepinv_source, tmp_path):
    reference, state = guided_net(deepinv_source, **change)
    torch.save(state, tmp_path / "model.pt")
    for kind in (None, "guided-diffusion"):
        net = load_checkpoint(tmp_path / "model.pt", kind, **options)
        same(net, lambda x, t: reference.forward_diffusion(x, t), change.get("inputs", 1), side=32)
    asked = [l for l, size in enumerate((256, 128, 64)) if str(size) in change["attention_resolutions"].split(",")]
    found = sorted({p.level for p, step in zip(net.places["down"], net.down) if "attention" in step})
    assert found == asked and "attention" in net.middle


def test_guided_diffusion_classes(deepinv_source, tmp_path):
    reference, state = guided_net(deepinv_source, attention_resolutions="128", num_head_channels=32, num_classes=5)
    torch.save(state, tmp_path / "model.pt")
    label = torch.tensor([0, 4, 2, 2])
    net = load_checkpoint(tmp_path / "model.pt", head_width=32)
    same(net, lambda x, t: reference.forward_diffusion(x, t, label), 1, label=label)
    with pytest.raises(ValueError, match="-1 to 4"): net(torch.ones(1, 1, 8, 8), 0., torch.tensor([5]))


def test_guided_diffusion_half(deepinv_source, tmp_path):
    "Released files of the torso in float16 are used as they are, in float32."
    reference, state = guided_net(deepinv_source, attention_resolutions="128", num_head_channels=32)
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "model.pt")
    reference.load_state_dict({k: v.half().float() for k, v in state.items()}, strict=False)
    net = load_checkpoint(tmp_path / "model.pt", head_width=32)
    same(net, lambda x, t: reference.forward_diffusion(x, t), 1, side=32)


def test_wrong_heads(deepinv_source, tmp_path):
    _, state = guided_net(deepinv_source, attention_resolutions="128", num_head_channels=32)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="cannot be cut"): load_checkpoint(tmp_path / "model.pt", head_width=48)
    with pytest.raises(TypeError): load_checkpoint(tmp_path / "model.pt", head_size=32)


# ------------------------------------------------------------------------------------------------------------ EHRDiff

def linear_model(columns, hidden, time, classes=0, fourier=False):
    "A file as EHRDiff writes it, from its published layout, with random numbers."
    g, widths = torch.Generator().manual_seed(0), [columns, *hidden, columns]
    blocks = ["block_in", *[f"block_mid.{i}" for i in range(len(hidden) - 1)], "block_out"]
    layers = {"time_embedding.1": (33 if fourier else columns, time), "time_embedding.3": (time, time)}
    for b, i, o in zip(blocks, widths, widths[1:]): layers |= {f"{b}.time_mlp.0": (time, i), f"{b}.out_proj.1": (i, o)}
    if classes: layers |= {"class_mlp.0": (20, time), "class_mlp.2": (time, time)}
    state = {"time_embedding.0.weights": torch.randn(16, generator=g)} if fourier else {}
    if classes: state["class_emb.weight"] = torch.randn(classes + 1, 20, generator=g)
    for k, (i, o) in layers.items():
        state[f"{k}.weight"] = torch.randn(o, i, generator=g) / math.sqrt(i)
        state[f"{k}.bias"] = torch.randn(o, generator=g)
    return state, blocks


def linear_model_by_hand(state, blocks, x, c, label=None):
    linear = lambda k, h: F.linear(h, state[f"{k}.weight"], state[f"{k}.bias"])
    if (w := state.get("time_embedding.0.weights")) is not None:
        a = torch.outer(c, w) * 2 * math.pi
        waves = torch.cat([c[:, None], a.sin(), a.cos()], 1)
    else:
        n = x.shape[1] // 2
        a = torch.outer(c, torch.tensor([10_000 ** (-i / (n - 1)) for i in range(n)]))
        waves = torch.cat([a.sin(), a.cos()], 1)
    e = linear("time_embedding.3", F.silu(linear("time_embedding.1", waves)))
    if label is not None: e = e + linear("class_mlp.2", F.silu(linear("class_mlp.0", state["class_emb.weight"][label])))
    for b in blocks: x = linear(f"{b}.out_proj.1", F.relu(x + linear(f"{b}.time_mlp.0", e)))
    return x


@pytest.mark.parametrize("hidden, fourier, classes", [
    ((64, 24, 24, 64), False, 0), ((32, 48), True, 0), ((16,), True, 2)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_ehrdiff(hidden, fourier, classes, wrapped, tmp_path):
    "Equal to the published equations; to the authors' program, unverified."
    state, blocks = linear_model(30, hidden, 40, classes, fourier)
    saved = state
    if wrapped:                                          # DistributedDataParallel around a denoiser around the network
        names = [k for k in state if k != "time_embedding.0.weights"]
        raw = {f"module.model.{k}": torch.zeros_like(v) if k in names else v for k, v in state.items()}
        average = {"decay": 0.999, "num_updates": 7, "shadow_params": [state[k] for k in names]}
        saved = {"model": raw, "ema": average, "optimizer": {}, "step": 7}
    torch.save(saved, tmp_path / "final_checkpoint.pth")
    net = load_checkpoint(tmp_path / "final_checkpoint.pth")
    assert isinstance(net, MLP) and not net.training
    g = torch.Generator().manual_seed(1)
    x, c = torch.randn(4, 30, generator=g), torch.tensor([-1., 0.1, 0.6, 1.1])
    theirs, ours = (torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, -1, 0])) if classes else (None, None)
    with torch.no_grad():
        expected = linear_model_by_hand(state, blocks, x, c, theirs)
        torch.testing.assert_close(net(x, c, ours), expected, atol=1e-5, rtol=1e-5)
        half = {k: v.half() for k, v in state.items()}
        torch.save(half, tmp_path / "half.pth")
        expected = linear_model_by_hand({k: v.float() for k, v in half.items()}, blocks, x, c, theirs)
        torch.testing.assert_close(load_checkpoint(tmp_path / "half.pth")(x, c, ours), expected, atol=1e-5, rtol=1e-5)


def test_ehrdiff_published_sizes(tmp_path):
    "The network for MIMIC-III has 7,486,444 parameters."
    torch.save(linear_model(1782, (1024, 384, 384, 384, 1024), 384)[0], tmp_path / "mimic.pth")
    assert sum(p.numel() for p in load_checkpoint(tmp_path / "mimic.pth").parameters()) == 7_486_444


# ------------------------------------------------------------------------------------------------------------- refusals

class Bomb:
    def __reduce__(self): return (exec, ("import builtins; builtins.bomb_went_off = True",))


def test_nothing_is_run(tmp_path, ddpm):
    import builtins
    for saved in (Bomb(), {"conv_in.weight": Bomb()}, [ddpm[0], Bomb()]):
        torch.save(saved, tmp_path / "bomb.pt")
        with pytest.raises(ValueError, match=r"bomb\.pt cannot be read"): load_checkpoint(tmp_path / "bomb.pt")
    assert not hasattr(builtins, "bomb_went_off")


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("end", ["pt", "safetensors"])
def test_truncated(share, end, ddpm, tmp_path):
    path = tmp_path / f"model.{end}"
    if end == "pt": torch.save(ddpm[0], path)
    else: save_file({k: v.contiguous() for k, v in ddpm[0].items()}, path)
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError, match=rf"model\.{end} cannot be read"): load_checkpoint(path)


@pytest.mark.parametrize("saved", [
    {}, [], 3, torch.ones(3), {"epoch": 3}, {"fc.weight": torch.ones(3, 3)}, [{"fc.bias": torch.ones(3)}]])
def test_foreign(saved, tmp_path):
    torch.save(saved, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"foreign\.pt"): load_checkpoint(tmp_path / "foreign.pt")
    for kind in ("ddpm", "guided-diffusion", "ehrdiff"):
        with pytest.raises(ValueError, match=r"foreign\.pt"): load_checkpoint(tmp_path / "foreign.pt", kind)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError): load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="config.json"): load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="kind must be one of"): load_checkpoint(tmp_path, "ncsn")


def test_what_does_not_fit(ddpm, tmp_path):
    "The message lists the tensors: missing, unexpected, and of which shape against which expected."
    state = dict(ddpm[0])
    del state["mid.block_1.norm1.bias"]
    state |= {"norm_out.weight": torch.ones(33), "logvar": torch.zeros(1000)}
    torch.save(state, tmp_path / "model.ckpt")
    with pytest.raises(ValueError) as e: load_checkpoint(tmp_path / "model.ckpt")
    for line in ("model.ckpt (ddpm): 3 tensors do not fit", "missing mid.block_1.norm1.bias",
                 "norm_out.weight has shape [33], expected [32]", "unexpected logvar [1000]"):
        assert line in str(e.value)


@pytest.mark.parametrize("gone", range(0, 300, 23))
def test_any_missing_tensor(gone, ddpm, tmp_path):
    state = dict(ddpm[0])
    name = sorted(state)[gone % len(state)]
    del state[name]
    torch.save(state, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt"): load_checkpoint(tmp_path / "model.ckpt")
