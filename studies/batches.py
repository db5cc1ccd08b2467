"""Batch preparation alone, and the training step it serves, at full width. Run: python studies/batches.py

Cells: a batch of 1,024 rows of 1,782 bits from a loader that collates rows one by one (as the released code does), from a dense tensor by one index (floats or bytes),
and from packed bits; the whole training step with each; and the step's distance from its floor, 6 x weights x batch operations at the rate of a plain matrix product.
Times are of the processor, medians of interleaved repeats in one process on one thread; ratios are what to compare across machines.
"""
import statistics
import time

import torch
from record import record
from torch.utils.data import DataLoader, Dataset

from diffusion_lit.denoiser import Denoiser, denoising_loss, edm, lognormal
from diffusion_lit.network import MLP
from diffusion_lit.records import pack, unpack
from diffusion_lit.training import EMA

WIDTHS = 1024, 384, 384, 384, 1024


class RowByRow(Dataset):
    "Rows of a NumPy matrix handed out one at a time, to be collated by the loader."
    def __init__(self, x): self.x = x.numpy()
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]


def endless(loader):
    "Batches for ever; the short last one of a pass is dropped."
    while True: yield from loader


def preparations(x, batch):
    "Each way of making a float batch, as a function without arguments; most write into a buffer that is kept, so that no fresh memory is touched."
    octets, packed, count, g = x.to(torch.uint8), pack(x), x.shape[1], torch.Generator().manual_seed(0)
    buffer, bytewise = torch.empty(batch, count), torch.empty(batch, count, dtype=torch.uint8)
    loader = endless(DataLoader(RowByRow(x), batch, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0)))
    rows = lambda: torch.randint(len(x), (batch,), generator=g)
    return {"row by row": lambda: next(loader), "dense tensor": lambda: torch.index_select(x, 0, rows(), out=buffer),
            "dense tensor, fresh memory": lambda: x[rows()],
            "dense tensor of bytes": lambda: buffer.copy_(torch.index_select(octets, 0, rows(), out=bytewise)), "packed bits": lambda: buffer.copy_(unpack(packed[rows()], count))}


def interleaved(run, repeats, inner):
    "Median seconds of each function; every round runs all of them, the first round is not counted."
    seconds = {name: [] for name in run}
    for _ in range(repeats + 1):
        for name, go in run.items():
            began = time.process_time()
            for _ in range(inner): go()
            seconds[name].append((time.process_time() - began) / inner)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}


def step_function(columns, hidden):
    "One step of training on a given batch, and the number of weights."
    torch.manual_seed(0)
    model, g = Denoiser(MLP(columns, hidden, 384, 384), edm(.14)), torch.Generator().manual_seed(0)
    ema, optimizer, levels = EMA(model), torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0., fused=True), lognormal()

    def step(x0):
        loss = denoising_loss(model, x0, levels(torch.rand(len(x0), generator=g)), torch.randn(x0.shape, generator=g)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
    return step, sum(p.numel() for p in model.parameters())


def batches(rows, columns, batch, repeats, hidden=WIDTHS):
    "Seconds of preparing a batch in three ways, of the step, and of the multiplications that the step cannot do without."
    x = (torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < .0107).float()
    ways, (step, weights) = preparations(x, batch), step_function(columns, hidden)
    alone = interleaved(ways, repeats, 5)
    a, b = torch.randn(batch, hidden[0]), torch.randn(hidden[0], columns)
    still = x[:batch].clone()
    timed = interleaved({"step": lambda: step(still), "product": lambda: a @ b}, repeats, 2)
    rate = 2 * batch * hidden[0] * columns / timed["product"]
    floor = 6 * weights * batch / rate
    return dict(seconds=alone, rows_per_second={way: batch / s for way, s in alone.items()}, ratio={way: alone["row by row"] / s for way, s in alone.items()},
                step_seconds=timed["step"], share_of_step={way: s / (s + timed["step"]) for way, s in alone.items()},
                weights=weights, gemm_gflops=rate / 1e9, floor_seconds=floor, step_over_floor=timed["step"] / floor,
                bytes=dict(floats=x.numel() * 4, bytes=x.numel(), packed=pack(x[:1]).numel() * rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = record("batches", "1,782 columns", batches, packages=("torch", "numpy"), rows=41868, columns=1782, batch=1024, repeats=9)
    for way, seconds in result["seconds"].items():
        print(f"{way}: {1000 * seconds:.1f} ms a batch, {result['ratio'][way]:.1f} times as fast, {result['share_of_step'][way]:.1%} of a step")
    print(f"step: {result['step_seconds']:.2f} s, {result['step_over_floor']:.2f} times its floor at {result['gemm_gflops']:.0f} GFLOP/s")
