"""The full-size path, 46,520 patients by 1,782 codes, in one process; and the time to sample 10,000 patients. Run: python studies/full_size.py [STEPS]

Cells: simulate, split by patient as the paper does (41,868 and 4,652), fit at the paper's width for so many steps, sample 46,520, both reports, and the nearest
neighbours of 41,868 in 41,868: wall and processor seconds of each, and the most memory resident during each. Then the published sampler, written here from its
formula as its authors run it (state in double precision, all patients at once, 32 Heun steps: 63 calls), against the exact head at 11 calls, in turns in one run.
"""
import sys
import threading
import time

import torch
from record import record

from diffusion_lit.denoiser import Denoiser, edm
from diffusion_lit.ehrdiff import EHRDiff, published_net
from diffusion_lit.fidelity import fidelity_report
from diffusion_lit.privacy import nearest, privacy_report
from diffusion_lit.records import simulate_cohort


def generator(seed): return torch.Generator().manual_seed(seed)


def resident():
    "MiB of memory resident now."
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20


class Watch:
    "Seconds and peak memory of a block, looked at fifty times a second."
    def __init__(self, steps, name): self.steps, self.name, self.over, self.peak = steps, name, threading.Event(), 0.

    def look(self):
        while not self.over.wait(.02): self.peak = max(self.peak, resident())

    def __enter__(self):
        self.peak, self.wall, self.cpu = resident(), time.perf_counter(), time.process_time()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()
        self.steps[self.name] = dict(wall_seconds=round(time.perf_counter() - self.wall, 1), cpu_seconds=round(time.process_time() - self.cpu, 1),
                                     peak_mib=round(max(self.peak, resident())))
        print(self.name, self.steps[self.name], flush=True)


def full_size(patients, columns, test, steps, batch, hidden, seed=0):
    "Every step of the path: seconds and memory, and what the reports say."
    done = {}
    with Watch(done, "simulate"): everyone, _ = simulate_cohort(patients, columns, generator=generator(seed))
    with Watch(done, "split"): train, held = everyone.split(1 - test / patients, generator(seed))
    with Watch(done, f"fit, {steps} steps"): ehr = EHRDiff(hidden=hidden).fit(train, steps=steps, batch=batch, generator=generator(seed))
    with Watch(done, f"sample {patients:,}"): synthetic = ehr.sample(patients, generator=generator(seed))
    with Watch(done, "fidelity_report"): fidelity = fidelity_report(train, held, synthetic, generator=generator(seed))
    with Watch(done, "privacy_report"): privacy = privacy_report(train, held, synthetic, generator=generator(seed))
    with Watch(done, f"nearest, {len(train):,} in {len(train):,}"): distance, _ = nearest(synthetic[:len(train)], train)
    table = lambda report: {r.metric: [round(float(r.value), 5), round(float(r.floor), 5), round(float(r.baseline), 5)] for r in report.itertuples()}
    return dict(shape=[len(train), len(held), columns], weights=sum(p.numel() for p in ehr.model.parameters()), steps=done,
                peak_mib=max(s["peak_mib"] for s in done.values()), nearest_mean=round(float(distance.double().mean()), 3),
                fidelity=table(fidelity), privacy=table(privacy))


@torch.no_grad()
def published_sampler(denoiser, z, n=32, low=.02, high=80., rho=7.):
    "The paper's deterministic Heun sampler, state in double precision, network in single; 2 n - 1 calls."
    i = torch.arange(n, dtype=torch.float64)
    t = torch.cat([(high**(1 / rho) + i / (n - 1) * (low**(1 / rho) - high**(1 / rho)))**rho, torch.zeros(1, dtype=torch.float64)])
    D = lambda x, s: denoiser(x.float(), s.float()).double()
    x = z.double() * t[0]
    for a, b in zip(t[:-1], t[1:]):
        d = (x - D(x, a)) / a
        trial = x + (b - a) * d
        x = trial if b == 0 else x + (b - a) * (d + (trial - D(trial, b)) / b) / 2
    return x.clamp(0, 1).round()


def against_published(patients, columns, hidden, rounds, threads, batch=1024):
    "Seconds to sample so many patients, in turns: medians over rounds, and ratios to the published sampler of the same round."
    torch.set_num_threads(threads)
    cohort, _ = simulate_cohort(2048, columns, generator=generator(0))
    ours = EHRDiff(hidden=hidden).fit(cohort, steps=1, batch=64, generator=generator(0))
    theirs = Denoiser(published_net(columns, hidden), edm(.14)).eval()
    run = {"published, 63 calls": lambda: published_sampler(theirs, torch.randn(patients, columns, generator=generator(1))),
           "exact, 11 calls": lambda: ours.sample(patients, batch=batch, generator=generator(1)),
           "exact, 9 calls": lambda: ours.sample(patients, steps=5, batch=batch, generator=generator(1)),
           "exact, 7 calls": lambda: ours.sample(patients, steps=4, batch=batch, generator=generator(1)),
           "exact, 11 calls, bf16 network": lambda: ours.sample(patients, batch=batch, precision=torch.bfloat16, generator=generator(1))}
    run["exact, 11 calls"]()                                              # not counted: buffers and threads begin
    times = {name: [] for name in run}
    for _ in range(rounds):
        for name, go in reversed(run.items()):
            wall, cpu = time.perf_counter(), time.process_time()
            go()
            times[name].append([round(time.perf_counter() - wall, 4), round(time.process_time() - cpu, 4)])
            print(name, times[name][-1], flush=True)
    first = times["published, 63 calls"]
    ratio = {name: [sorted(a[k] / b[k] for a, b in zip(first, rows))[len(rows) // 2] for k in (0, 1)] for name, rows in times.items()}
    return dict(seconds={name: dict(wall=[a for a, _ in rows], cpu=[b for _, b in rows]) for name, rows in times.items()},
                ratio={name: dict(wall=round(w, 2), cpu=round(c, 2)) for name, (w, c) in ratio.items()})


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    widths = [1024, 384, 384, 384, 1024]
    torch.set_num_threads(1)
    packages = "torch", "numpy", "scipy", "scikit-learn"
    result = record("full_size", "46,520 patients", full_size, packages, patients=46_520, columns=1782, test=4652, steps=steps, batch=1024, hidden=widths)
    print(f"peak {result['peak_mib']} MiB")
    print(record("full_size_sampling", "10,000 patients", against_published, packages, patients=10_000, columns=1782, hidden=widths, rounds=1, threads=1)["ratio"])
