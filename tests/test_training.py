"""What a notebook cannot do to itself: be killed in the middle of training, and run as two processes."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
RUN = """
import sys, time, torch
from diffusion_lit import Denoiser, EMA, UNet, edm, fit, save
path, resume, pause = sys.argv[1], sys.argv[2] or None, float(sys.argv[3])
accelerator = None
if len(sys.argv) > 4:
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
torch.set_num_threads(1)
rank = accelerator.process_index if accelerator else 0
torch.manual_seed(rank)                      # each process has weights and a seed of its own: those of process 0 must win
model = Denoiser(UNet(1, width=8, classes=3, dropout=0. if accelerator else .2), edm(.5))
images = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
if accelerator: model, images = model.double(), images.double()        # so that rounding cannot hide a difference
ema = EMA(model, .9)

def wait(k):
    print(k, flush=True)
    time.sleep(pause)
fit(model, images, steps=30, batch=8, condition=dict(label=torch.arange(40) % 3), drop=.2, ema=ema, warmup=5, resume=resume, every=7,
    generator=torch.Generator().manual_seed(1 + rank), accelerator=accelerator, callback=wait)
if rank == 0: save(path, torch.nn.ModuleList([model, ema.model]))
"""


def start(*arguments, launcher=()):
    return subprocess.Popen([sys.executable, *launcher, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"))


@pytest.fixture
def script(tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    return tmp_path / "run.py"


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, script):
    assert start(script, tmp_path / "straight", "", 0).wait(120) == 0
    killed = start(script, tmp_path / "resumed", tmp_path / "checkpoint", .05)
    for line in killed.stdout:
        if line.strip() == "17": break
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(10) == -signal.SIGKILL and not (tmp_path / "resumed").exists() and (tmp_path / "checkpoint").exists()
    again = start(script, tmp_path / "resumed", tmp_path / "checkpoint", 0)
    steps = again.communicate(timeout=120)[0].split()
    assert again.returncode == 0 and steps[0] == "15"                     # the checkpoint of step 14, not the beginning
    torch.testing.assert_close(load_file(tmp_path / "resumed"), load_file(tmp_path / "straight"), rtol=0, atol=0)


def test_two_processes_learn_what_one_does(tmp_path, script):
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra: train)")
    one = start(script, tmp_path / "one", "", 0, "accelerate")
    two = start(script, tmp_path / "two", "", 0, "accelerate",
                launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    assert one.wait(120) == 0 and two.wait(240) == 0
    torch.testing.assert_close(load_file(tmp_path / "two"), load_file(tmp_path / "one"), rtol=0, atol=1e-9)
