"""What a Trojan law costs. Run: python studies/trojan_cost.py

Cells: seconds of the shift k_t of all 1000 steps, in closed form, by the published double loop over zero-dimensional tensors, and by the same recursion a row at a time; and DDIM under a Trojan law against DDIM under
the ordinary one, same network, in turns. Times are of the processor, medians of the turns, one thread; ratios are what to compare across machines.
"""
import statistics
import time

import torch
from record import record

from diffusion_lit.denoiser import Denoiser, edm, eps
from diffusion_lit.network import MLP, UNet
from diffusion_lit.sampler import ddim_sigmas, sample, start_noise
from diffusion_lit.sde import DDPM, Noise
from diffusion_lit.trojan import blend, patch, transition_shift, under

NETWORKS = {"MLP, 64 columns": ((64,), lambda: MLP(64, (192, 192, 192)), 128), "U-Net, 3 x 32 x 32": ((3, 32, 32), lambda: UNet(3, width=32, mults=(1, 2, 2)), 16),
            "U-Net of DDPM's size for CIFAR-10": ((3, 32, 32), lambda: UNet(3, width=128, mults=(1, 2, 2, 2), blocks=2, attention=(1,)), 4)}


def seconds(run):
    "Of the processor."
    began = time.process_time()
    run()
    return time.process_time() - began


def double_loop(process):
    "The recursion as published, one step and one product at a time."
    a, k = process.alpha_bar / torch.cat([torch.ones(1).double(), process.alpha_bar[:-1]]), []
    for t in range(len(a)):
        rest, product = 0., 1.
        for j in range(t):
            product = product * a[t - j]
            rest = rest + k[t - 1 - j] * product.sqrt()
        k.append((1 - process.alpha_bar[t]).sqrt() - rest)
    return torch.stack(k)


def by_rows(process):
    "The same sums, a row at a time."
    ᾱ, k = process.alpha_bar, torch.zeros_like(process.alpha_bar)
    for t in range(len(ᾱ)): k[t] = (1 - ᾱ[t]).sqrt() - (k[:t] * (ᾱ[t] / ᾱ[:t]).sqrt()).sum()
    return k


def shifts(turns):
    "Seconds for 1000 steps, and the largest difference from the closed form."
    process, exact = DDPM(), transition_shift(DDPM()).flip(0)
    ways = {"closed form": lambda: transition_shift(process).flip(0), "row by row": lambda: by_rows(process), "double loop": lambda: double_loop(process)}
    return {name: dict(seconds=statistics.median(seconds(way) for _ in range(turns if name != "double loop" else 1)), error=(way() - exact).abs().max().item()) for name, way in ways.items()}


def ddim(network, calls, turns):
    "Seconds of DDIM under three laws, in turns, and the ratios to the ordinary one."
    torch.manual_seed(0)
    shape, make, n = NETWORKS[network]
    white = torch.ones(shape if len(shape) == 3 else (1, 8, 8))
    flat = lambda law: Noise(law.mean.reshape(shape), law.std.reshape(shape))
    laws = {"ordinary": Noise(), "blend": flat(blend(white)), "patch": flat(patch(white, 3))}
    model, σs = Denoiser(make().eval(), eps(DDPM())), ddim_sigmas(DDPM(), calls)
    starts = {name: start_noise(n, shape, σs[0].item(), law, torch.Generator().manual_seed(0)) for name, law in laws.items()}
    spent = {name: [] for name in laws}
    for _ in range(turns + 1):
        for name, law in laws.items(): spent[name].append(seconds(lambda: sample(under(model, law), starts[name], σs)))
    median = {name: statistics.median(s[1:]) for name, s in spent.items()}
    ratios = {name: statistics.median(a / b for a, b in zip(spent[name][1:], spent["ordinary"][1:])) for name in laws}
    return dict(weights=sum(p.numel() for p in model.parameters()), seconds=median, ratios=ratios)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(record("trojan_cost", "shifts", shifts, turns=20))
    for name in NETWORKS: print(name, record("trojan_cost", name, ddim, network=name, calls=100 if name.startswith("MLP") else 10, turns=15 if "size" not in name else 5))
