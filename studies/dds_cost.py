"""What a reconstruction costs at 320 x 320 x 15 coils, and where the time goes. Run: python studies/dds_cost.py

"split": a 49-call reconstruction with the shipped prior's network: processor seconds in the network, in the operator (and what its bare Fourier transforms alone would take), and in the rest,
for our preset and the published settings; total variation beside them. "whole": k-space to picture with a network of the published MRI checkpoint's shape (361 million random weights), two calls,
peak memory and seconds a call. One thread.
"""
import resource
import sys
import time

import torch
from record import record

from diffusion_lit.anatomy import ellipses, load_prior, smooth_phase
from diffusion_lit.dds import dds, reconstruct
from diffusion_lit.denoiser import Denoiser, eps
from diffusion_lit.mri import MultiCoilMRI, add_noise, birdcage_maps, random_lines, total_variation
from diffusion_lit.network import UNet
from diffusion_lit.sde import DDPM

SIZE, COILS = 320, 15
PUBLISHED = dict(width=256, mults=(1, 1, 2, 2, 4, 4), groups=32, head_width=64, resample="resblock")


def generator(seed): return torch.Generator().manual_seed(seed)


class Clock:
    "Processor seconds and calls of functions, by name."
    def __init__(self): self.seconds, self.calls = {}, {}

    def __call__(self, name, function):
        def timed(*args, **options):
            began = time.process_time()
            out = function(*args, **options)
            self.seconds[name] = self.seconds.get(name, 0) + time.process_time() - began
            self.calls[name] = self.calls.get(name, 0) + 1
            return out
        return timed


def scan(size=SIZE, coils=COILS, noise=.01, acceleration=4.):
    "A phantom, its operator and its noisy k-space."
    x = torch.polar(ellipses(1, size, generator(0)), smooth_phase(1, size, generator(1)))
    mask = random_lines((size, size), acceleration, max(14, round(.08 * size)), generator(2))
    A = MultiCoilMRI(birdcage_maps(coils, (size, size)), mask)
    return x, A, add_noise(A.forward(x), mask, noise, generator=generator(3))


def seconds(run, repeats=1):
    began = time.process_time()
    for _ in range(repeats): run()
    return (time.process_time() - began) / repeats


def split(like, calls, size=SIZE, coils=COILS):
    "Processor seconds of one reconstruction in the network, the operator and the rest."
    x, A, y = scan(size, coils)
    clock, prior = Clock(), load_prior("brain")
    maps = A.maps
    bare = seconds(lambda: torch.fft.ifftn(torch.fft.fftn(maps, dim=A.axes, norm="ortho"), dim=A.axes, norm="ortho"), 5)
    for name in ("forward", "adjoint", "normal"): setattr(A, name, clock("operator", getattr(A, name)))
    prior.forward = clock("network", prior.forward)
    whole = seconds(lambda: dds(prior, A, y, noise=.01, like=like, calls=calls, generator=generator(4)))
    clock.seconds["rest"] = whole - sum(clock.seconds.values())
    return dict(seconds=round(whole, 2), share={k: round(s / whole, 4) for k, s in clock.seconds.items()}, calls=clock.calls,
                fourier=round(bare * clock.calls["operator"] / whole, 4))                # what bare transforms of all coils, two an application, would take


def classical(iterations, size=SIZE, coils=COILS):
    x, A, y = scan(size, coils)
    return dict(seconds=round(seconds(lambda: total_variation(y, A.maps, A.mask, .005, iterations=iterations)), 2))


def whole(calls, net, size=SIZE, coils=COILS):
    "k-space in, picture out, maps and noise estimated, with random weights: peak memory, and seconds a call."
    x, A, y = scan(size, coils)
    torch.manual_seed(0)
    denoiser = Denoiser(UNet(2, 4, **net).eval().requires_grad_(False), eps(DDPM()))
    clock = Clock()
    denoiser.forward = clock("network", denoiser.forward)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, total = peak(), 0
    total = seconds(lambda: reconstruct(y, A.mask, denoiser, calls=calls, generator=generator(5)))
    weights = sum(p.numel() for p in denoiser.parameters())
    return dict(weights=weights, weights_mib=round(4 * weights / 2**20), peak_mib=round(peak()), before_mib=round(before),
                seconds_a_call=round(clock.seconds["network"] / clock.calls["network"], 1), seconds_beside=round(total - clock.seconds["network"], 1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for like in ("point", "published"):
        print(like, record("dds_cost", f"split: {like}, 49 calls", split, ("torch",), like=like, calls=49))
    print(record("dds_cost", "split: total variation", classical, ("torch", "sigpy"), iterations=60))
    if "quick" not in sys.argv: print(record("dds_cost", "whole: the published network's shape", whole, ("torch",), calls=2, net=PUBLISHED))
