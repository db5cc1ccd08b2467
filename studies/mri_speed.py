"""What the multi-coil normal operator costs, against its bare Fourier transforms, sigpy and deepinv. Run: python studies/mri_speed.py

Cells: (mask, batch) at 320 x 320 x 15 coils, complex64, one thread. All ways run in turns in one process, on the same numbers; times are of the
processor, medians of the turns; ratios to two bare FFTs of all coils (one call each, as one would write it) are what to compare across machines.
"""
import importlib.machinery
import importlib.util
import statistics
import sys
import time
import types
from unittest.mock import MagicMock

import torch
from record import record

from diffusion_lit.mri import MultiCoilMRI, centred_fft, centred_ifft, gaussian_points, loop_maps, random_lines, tiles

MASKS = {"2-D mask": gaussian_points, "1-D mask": random_lines}
BARE, BARE_TILED, BARE_LINES, OURS = "two bare FFTs", "two bare FFTs, tile by tile", "two bare 1-D FFTs, tile by tile", "ours"
PEERS = {name for name in ("sigpy", "deepinv") if importlib.util.find_spec(name)}


class Absent:
    "Stands in for packages that deepinv imports on its way to an operator that has no use for them."
    names = [name for name in ("torchvision", "natsort") if not importlib.util.find_spec(name)]

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names: return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: MagicMock()
        return module

    def exec_module(self, module): pass


def deepinv_physics():
    "deepinv.physics, with or without the packages for images that it asks for."
    sys.meta_path.append(absent := Absent())
    try: return importlib.import_module("deepinv.physics")
    finally:
        sys.meta_path.remove(absent)
        for name in [n for n in sys.modules if n.split(".")[0] in Absent.names]: del sys.modules[name]


def ways(mask, batch, size, coils):
    "Name -> function of the image `[batch, 1, size, size]`; the bare transforms return what is of no use."
    maps, M = loop_maps(coils, (size, size)), MASKS[mask]((size, size), 4, 24 if size > 100 else 4, generator=torch.Generator().manual_seed(0))
    ours, many = MultiCoilMRI(maps, M), maps.expand(batch, -1, -1, -1).contiguous()
    cuts, dims = tiles(batch, coils, size * size, ours.tile), (-2, -1)

    def bare_tiles(dims):
        for at in cuts: torch.fft.ifftn(torch.fft.fftn(many[at], dim=dims, norm="ortho"), dim=dims, norm="ortho")
    found = {BARE: lambda x: torch.fft.ifft2(torch.fft.fft2(many, norm="ortho"), norm="ortho"),
             BARE_TILED: lambda x: bare_tiles(dims), BARE_LINES: lambda x: bare_tiles((-1,)), OURS: ours.normal,
             "as usually written, with shifts": lambda x: (maps.conj() * centred_ifft(M * centred_fft(maps * x))).sum(1, keepdim=True)}
    if "sigpy" in PEERS:
        import sigpy.mri.linop
        N = sigpy.mri.linop.Sense(maps[0].numpy(), weights=M[0, 0].expand(size, size).float().numpy()).N
        found["sigpy"] = lambda x: torch.stack([torch.from_numpy(N(item[0].numpy())) for item in x])[:, None]
    if "deepinv" in PEERS:
        physics = deepinv_physics().MultiCoilMRI(mask=M[0, 0].expand(size, size).float(), coil_maps=maps[0], img_size=(2, size, size))
        found["deepinv"] = lambda x: torch.view_as_complex(physics.A_adjoint_A(torch.view_as_real(x[:, 0]).movedim(-1, 1).contiguous()).movedim(1, -1).contiguous())[:, None]
    return found


def speed(mask, batch, size, coils, repeats):
    "Milliseconds of the processor for each way, their ratios to the bare transforms, and how far their answers are from ours."
    x = torch.randn(batch, 1, size, size, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    found = ways(mask, batch, size, coils)
    want, times, apart = found[OURS](x), {name: [] for name in found}, {}
    for _ in range(repeats + 1):
        for name, way in found.items():
            began = time.process_time()
            out = way(x)
            times[name].append(1e3 * (time.process_time() - began))
            if not name.startswith("two bare"): apart[name] = ((out - want).norm() / want.norm()).item()
    middle = {name: statistics.median(t[1:] or t) for name, t in times.items()}
    return dict(milliseconds=middle, ratio={name: t / middle[BARE] for name, t in middle.items() if middle[BARE]},
                ratio_to_tiles={name: t / middle[BARE_TILED] for name, t in middle.items() if middle[BARE_TILED]}, apart=apart)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for missing in {"sigpy", "deepinv"} - PEERS: print(f"{missing} is not installed, and left out")
    for mask in MASKS:
        for batch in (1, 8):
            result = record("mri_speed", f"{mask}, batch {batch}", speed, packages=("torch", "numpy", *sorted(PEERS)),
                            mask=mask, batch=batch, size=320, coils=15, repeats=9)
            print(f"{mask}, batch {batch}:", {name: round(r, 2) for name, r in result["ratio"].items()})
