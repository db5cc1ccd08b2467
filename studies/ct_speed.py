"""What a projection and its adjoint cost, against astra's CPU projectors, deepinv and scikit-image. Run: python studies/ct_speed.py [1] [2]

Cells: (threads, views) at 256 x 256, float32, for 1, 16 and 64 slices. All ways run in turns in one process, on the same numbers, each with its own copies in
and out; times are medians of the turns, of the processor for one thread and of the clock for two. Peak memory (16 slices) and the time to build are measured in
a process for each way. The floor is the matrix, the images and the sinograms read or written once, at the speed of the memory measured in the same turns. astra's matrix,
multiplied by scipy and by torch, stands beside: it is a matrix, as ours, and no projector of theirs. Matrices are multiplied with all slices at once.
"""
import importlib.util
import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from mri_speed import deepinv_physics
from record import record

from diffusion_lit.ct import ParallelBeam, matrices
from diffusion_lit.krylov import LinearOperator, dot_test

OURS, LAST = "ours", "ours, slices last"
ASTRA = ("line", "linear", "strip")
PEERS = {name: package for name, package in {"astra": "astra-toolbox", "deepinv": "deepinv", "skimage": "scikit-image"}.items() if importlib.util.find_spec(name)}


def half_turn(views): return torch.arange(views, dtype=torch.float64) * math.pi / views


class Way(LinearOperator):
    "Two functions between `[batch, 1, size, size]` and `[batch, 1, view, bin]`."
    def __init__(self, forward, adjoint): self.forward, self.adjoint = forward, adjoint


def one_by_one(f):
    "A function of arrays of one slice, applied to the slices of a tensor."
    return lambda v: torch.stack([torch.from_numpy(np.ascontiguousarray(f(u[0].numpy()), dtype=np.float32)) for u in v])[:, None]


def ours(views, size, bins):
    op = ParallelBeam(size, half_turn(views), bins)
    matrices(op.geometry)
    return op


def astra_geometry(views, size, bins, kind):
    import astra
    volume = astra.create_vol_geom(size, size)
    return volume, astra.create_projector(kind, sinogram := astra.create_proj_geom("parallel", 1., bins, half_turn(views).numpy()), volume), sinogram


def astra_way(kind):
    def build(views, size, bins):
        import astra
        volume, projector, sinogram = astra_geometry(views, size, bins, kind)
        X, Y = astra.data2d.create("-vol", volume), astra.data2d.create("-sino", sinogram)
        run = {"FP": dict(VolumeDataId=X, ProjectionDataId=Y), "BP": dict(ProjectionDataId=Y, ReconstructionDataId=X)}
        run = {name: astra.algorithm.create(dict(type=name, ProjectorId=projector, **options)) for name, options in run.items()}

        def apply(name, source, target, v):
            astra.data2d.store(source, v)
            astra.algorithm.run(run[name])
            return astra.data2d.get(target)
        return Way(one_by_one(lambda x: apply("FP", X, Y, x)), one_by_one(lambda y: apply("BP", Y, X, y)))
    return build


def astra_matrix(multiply):
    def build(views, size, bins):
        import astra
        A = astra.matrix.get(astra.projector.matrix(astra_geometry(views, size, bins, "strip")[1])).astype(np.float32).tocsr()
        if multiply == "scipy": products = [lambda c, M=M: torch.from_numpy(M @ np.ascontiguousarray(c.numpy())) for M in (A, A.T.tocsr())]
        else: products = [lambda c, M=torch.sparse_csr_tensor(*map(torch.from_numpy, (M.indptr, M.indices, M.data)), M.shape): M @ c.contiguous() for M in (A, A.T.tocsr())]
        shapes = (1, views, bins), (1, size, size)
        return Way(*(lambda v, f=f, s=s: f(v.flatten(1).T).T.reshape(-1, *s).contiguous() for f, s in zip(products, shapes)))
    return build


def deepinv_way(exact):
    def build(views, size, bins):
        physics = deepinv_physics().Tomography(angles=torch.rad2deg(half_turn(views)).float(), img_width=size, circle=False, normalize=False,
                                               parallel_computation=True, adjoint_via_backprop=exact)
        slice_by_slice = lambda f: lambda v: torch.cat([f(u) for u in v.split(1)])     # faster here than all at once
        return Way(slice_by_slice(physics.A), slice_by_slice(physics.A_adjoint))
    return build


def skimage_way(views, size, bins):
    "Its image turns about the pixel size // 2; `iradon` has a factor π / 2V, taken out."
    from skimage.transform import iradon, radon
    degrees = np.rad2deg(half_turn(views).numpy())
    back = lambda y: iradon(y, degrees, size, filter_name=None, circle=False) * (2 * views / math.pi)
    return Way(one_by_one(lambda x: radon(x, degrees, circle=False)), one_by_one(back))


WAYS = {OURS: ours, LAST: ours}                                                     # the second is given slices that lie last in memory
if "astra" in PEERS:
    WAYS |= {f"astra, {kind}": astra_way(kind) for kind in ASTRA}
    WAYS |= {f"astra's strip matrix in {name}": astra_matrix(name) for name in ("scipy", "torch")}
if "deepinv" in PEERS: WAYS |= {"deepinv, exact adjoint": deepinv_way(True), "deepinv, fast adjoint": deepinv_way(False)}
if "skimage" in PEERS: WAYS["scikit-image"] = skimage_way
OWN_MATRIX = {OURS, LAST, *(name for name in WAYS if "matrix" in name)}           # all others are projectors of peers


def numbers(shape, slices, seed): return torch.randn(slices, *shape, generator=torch.Generator().manual_seed(seed))


def shapes_of(way, views, size, bins):
    "The sinogram as this way has it, with its own number of bins and order of axes."
    return tuple(way.forward(torch.zeros(1, 1, size, size)).shape[1:])


def alone(name, views, size, bins, slices, threads):
    "To be run in a process of its own: seconds to build, and MiB at the peak above those before."
    torch.set_num_threads(threads)
    peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    if "deepinv" in name: deepinv_physics()
    if name in OWN_MATRIX: import scipy.sparse  # noqa: F401
    if name == "scikit-image": import skimage.transform  # noqa: F401
    before, began = peak(), time.perf_counter()
    way = WAYS[name](views, size, bins)
    built = time.perf_counter() - began
    way.adjoint(way.forward(numbers((1, size, size), slices, 0)))
    return dict(build_seconds=built, peak_mib=peak() - before)


def in_a_process(name, **settings):
    code = f"import json, ct_speed; print(json.dumps(ct_speed.alone({name!r}, **{settings!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(calls, turns, clock, patience=1.):
    "Median seconds of each call, all in turns after one to warm up; what takes longer than `patience` has one turn."
    times = {key: [] for key in calls}
    for turn in range(turns + 1):
        for key, call in calls.items():
            if turn and times[key][0] > patience: continue
            began = clock()
            call()
            times[key].append(clock() - began)
    return {key: statistics.median(t[1:] or t) for key, t in times.items()}


def speed(views, threads, size, bins, slices, turns, memory=True, ways=None):
    "Milliseconds of every way, forward and adjoint, for each number of slices; adjoint errors; ratios to ours; the floor."
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    found = {name: build(views, size, bins) for name, build in WAYS.items() if ways is None or name in ways}
    shape = {name: shapes_of(way, views, size, bins) for name, way in found.items()}
    error = {name: dot_test(way, numbers((1, size, size), 1, 0), numbers(shape[name], 1, 1)).item() for name, way in found.items()}
    A = matrices(ParallelBeam(size, half_turn(views), bins).geometry)[0]
    big, result = torch.ones(2**26), {}                                             # 256 MiB, more than any cache
    for n in slices:
        calls = {"memory": lambda: big.sum()}
        for name, way in found.items():
            x, y = numbers((1, size, size), n, 0), numbers(shape[name], n, 1)
            if name == LAST: x, y = (v.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for v in (x, y))
            calls |= {(name, "forward"): lambda f=way.forward, x=x: f(x), (name, "adjoint"): lambda f=way.adjoint, y=y: f(y)}
        times = take_turns(calls, turns, clock)
        bandwidth = big.nbytes / times.pop("memory")
        bytes_once = A.column.nbytes + A.weight.nbytes + A.start.nbytes + 4 * n * (size**2 + views * bins)
        peers = {way: min((t, name) for (name, w), t in times.items() if w == way and name not in OWN_MATRIX) for way in ("forward", "adjoint")} if len(found) > 2 else {}
        result[f"{n} slices"] = dict(
            milliseconds={name: {way: 1e3 * times[name, way] for way in ("forward", "adjoint")} for name in found},
            best_peer={way: name for way, (_, name) in peers.items()},
            ratio={name: {way: t / times[name, way] for way, (t, _) in peers.items()} for name in (OURS, LAST)} if peers else {},
            gigabytes_a_second=bandwidth / 1e9, floor_milliseconds=1e3 * bytes_once / bandwidth,
            to_floor={name: {way: times[name, way] * bandwidth / bytes_once for way in ("forward", "adjoint")} for name in (OURS, LAST)})
    matrix = dict(entries=len(A.weight), mib_of_both=2 * (A.column.nbytes + A.weight.nbytes + A.start.nbytes) / 2**20)
    cost = {name: in_a_process(name, views=views, size=size, bins=bins, slices=min(16, max(slices)), threads=threads) for name in found if name != LAST} if memory else {}
    return result | dict(adjoint_error=error, matrix=matrix, cost=cost)


if __name__ == "__main__":
    for missing in {"astra", "deepinv", "skimage"} - set(PEERS): print(f"{missing} is not installed, and left out")
    for threads in (1, 2) if len(sys.argv) < 2 else map(int, sys.argv[1:]):
        for views in (8, 32, 180):
            some = None if threads == 1 else [name for name in WAYS if name not in ("astra, line", "astra, strip", "scikit-image")]
            result = record("ct_speed", f"{threads} thread{'s' * (threads > 1)}, {views} views", speed, packages=("torch", "numpy", "scipy", *PEERS.values()), views=views,
                            threads=threads, size=256, bins=363, slices=[1, 16, 64] if threads == 1 else [64], turns=7, memory=threads == 1, ways=some)
            print(f"{threads} threads, {views} views:", {name: {w: round(r, 1) for w, r in row.items()} for name, row in result["64 slices"]["ratio"].items()})
