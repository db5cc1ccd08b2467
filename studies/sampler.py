"""What the sampling loop costs beside its network, and against the DDIM pipeline of diffusers. Run: python studies/sampler.py

Cells: the loop's own share of the time for several samplers and two networks of about a million weights; samples a second against diffusers.
Times are of the processor, medians of interleaved repeats in one process on one thread; ratios are what to compare across machines.
"""
import statistics
import time

import torch
from record import record

from diffusion_lit.denoiser import Denoiser, edm, eps
from diffusion_lit.network import MLP, UNet
from diffusion_lit.sampler import ddim_sigmas, edm_churn, karras_sigmas, sample, start_noise
from diffusion_lit.sde import DDPM

SAMPLERS = {"DDIM": {}, "DDPM": dict(eta=1.), "Heun": dict(solver="heun"), "DPM-Solver++(2M)": dict(solver="dpmpp_2m"),
            "EDM with churn": dict(solver="heun", churn=edm_churn(10, 3.)), "predictor-corrector": dict(langevin=1)}
NETWORKS = {"U-Net, 3 x 32 x 32": ((3, 32, 32), lambda: UNet(3, width=38, mults=(1, 2), groups=2)),
            "MLP, 512 columns": ((512,), lambda: MLP(512, hidden=(512, 512), time=64))}


class Timed(torch.nn.Module):
    "A network that counts its calls and the seconds spent in them."
    def __init__(self, net): super().__init__(); self.net, self.seconds, self.calls = net, 0., 0

    def forward(self, *args, **options):
        began = time.process_time()
        out = self.net(*args, **options)
        self.seconds, self.calls = self.seconds + time.process_time() - began, self.calls + 1
        return out


def share(network, sampler, batch, steps, repeats):
    "Seconds of the network, and of everything else, in one run of a sampler."
    torch.manual_seed(0)
    shape, make = NETWORKS[network]
    net, runs = Timed(make().eval()), []
    denoiser, sigmas = Denoiser(net, edm(.5)), karras_sigmas(steps)
    z = start_noise(batch, shape, 80., generator=torch.Generator().manual_seed(0))
    for _ in range(repeats + 1):
        net.seconds, net.calls, began = 0., 0, time.process_time()
        sample(denoiser, z, sigmas, generator=torch.Generator().manual_seed(0), **SAMPLERS[sampler])
        runs.append((net.seconds, time.process_time() - began - net.seconds))
    inside, outside = (statistics.median(x) for x in zip(*runs[1:]))
    return dict(weights=sum(p.numel() for p in net.parameters()), calls=net.calls, network_seconds=inside, other_seconds=outside, share=outside / inside)


def against_diffusers(batch, steps, repeats):
    "Samples a second of diffusers' pipeline, of our loop with the same network object, and of our loop with our reading of its weights."
    import tempfile
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
    from diffusion_lit.network import load_checkpoint
    torch.manual_seed(0)
    theirs = UNet2DModel(sample_size=32, block_out_channels=(40, 80), layers_per_block=1, norm_num_groups=8, attention_head_dim=None,
                         down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D")).eval()
    folder = tempfile.mkdtemp()
    theirs.save_pretrained(folder)
    pipeline = DDIMPipeline(theirs, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    sigmas = ddim_sigmas(DDPM(), steps)
    z = start_noise(batch, (3, 32, 32), sigmas[0].item(), generator=torch.Generator().manual_seed(0))
    run = {"diffusers": lambda: pipeline(batch, num_inference_steps=steps, output_type="np", generator=torch.Generator().manual_seed(0))}
    for name, net in {"our loop, their network": lambda x, t: theirs(x, t).sample, "our loop, our network": load_checkpoint(folder, kind="diffusers")}.items():
        run[name] = lambda denoiser=Denoiser(net, eps(DDPM())): sample(denoiser, z, sigmas)
    seconds = {name: [] for name in run}
    for _ in range(repeats + 1):
        for name, go in run.items():
            began = time.process_time()
            go()
            seconds[name].append(time.process_time() - began)
    rate = {name: batch / statistics.median(s[1:]) for name, s in seconds.items()}
    return dict(weights=sum(p.numel() for p in theirs.parameters()), per_second=rate, ratio={name: r / rate["diffusers"] for name, r in rate.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    for network, steps in zip(NETWORKS, (4, 10)):                             # fewer steps where a call takes a second
        for sampler in SAMPLERS:
            result = record("sampler", f"{network}: {sampler}", share, network=network, sampler=sampler, batch=64, steps=steps, repeats=5)
            print(f"{network}: {sampler}: {result['share']:.1%} beside {result['calls']} calls of {result['weights']:,} weights")
    print(record("sampler", "against diffusers", against_diffusers, packages=("torch", "diffusers"), batch=16, steps=10, repeats=5))
