"""Images to learn from: against scipy and scikit-image, on foreign and broken files, at real sizes, and the shipped priors."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for _name in ("scipy", "skimage", "nibabel", "nilearn", "pydicom", "h5py", "ismrmrd"):
    pytest.importorskip(_name, reason=f"{_name} is not installed (extra: images)")
import h5py  # noqa: E402
import nibabel  # noqa: E402
import pydicom  # noqa: E402
from scipy.ndimage import map_coordinates  # noqa: E402

from diffusion_lit import anatomy  # noqa: E402
from diffusion_lit.training import read_tensors  # noqa: E402

STUDIES = Path(__file__).parents[1] / "studies"
sys.path.insert(0, str(STUDIES))
import priors  # noqa: E402

SAMPLES = Path(pydicom.__file__).parent / "data/test_files"


def generator(seed=0): return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(31, 40), (12, 15, 17)])
def test_warp_is_linear_interpolation(shape):
    x, u = torch.rand(1, 2, *shape, generator=generator()), anatomy.displacement(1, shape, 2., 4., generator(1))
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")) + u[0].numpy()
    inside = np.all([(p >= 0) & (p <= s - 1) for p, s in zip(places, shape)], axis=0)
    for channel, warped in zip(x[0], anatomy.warp(x, u)[0]):
        np.testing.assert_allclose(warped.numpy()[inside], map_coordinates(channel.numpy(), places, order=1)[inside], atol=1e-4)


@pytest.mark.parametrize("d, size", [(2, 60), (3, 24)])
def test_ellipsoids_against_counting(d, size):
    "A pixel's share, from the formula and from a finer grid."
    e, fine = anatomy.random_ellipsoids(2, d, 4, generator()), 4
    grid = (np.stack(np.meshgrid(*[np.arange(size * fine)] * d, indexing="ij"), -1) + .5) * 2 / (size * fine) - 1
    for i, image in enumerate(anatomy.draw_ellipsoids(e, (size,) * d)):
        inside = sum(v.item() * (np.linalg.norm((grid - c.numpy()) @ Q.numpy() / a.numpy(), axis=-1) <= 1) for c, a, Q, v in zip(*(p[i] for p in e)))
        share = inside.reshape(*[n for _ in range(d) for n in (size, fine)]).mean(tuple(range(1, 2 * d, 2)))
        assert np.abs(image.numpy() - share).mean() < .004 and abs(image.mean().item() / share.mean() - 1) < .01


def test_no_deformation_folds():
    for seed in range(20):
        u = anatomy.displacement(2, (40, 48), .5 + seed, 3. + seed / 2, generator(seed))
        corners = u + torch.stack(torch.meshgrid(torch.arange(40.), torch.arange(48.), indexing="ij"))
        (a, b), (c, d) = (corners[:, :, 1:, :-1] - corners[:, :, :-1, :-1]).unbind(1), (corners[:, :, :-1, 1:] - corners[:, :, :-1, :-1]).unbind(1)
        assert (a * d - b * c).min() > 0                                    # every triangle keeps its orientation


def test_a_variant_is_its_number():
    "Independent of the batch, of the place in it, and of the global generator."
    for make in (anatomy.complex_slices, anatomy.ct_slices):
        torch.manual_seed(1)
        a, before = make(4, 32, generator(3)), torch.random.get_rng_state()
        torch.manual_seed(2)
        assert torch.equal(make(2, 32, generator(3)), a[:2]) and not torch.equal(make(4, 32, generator(3), "test"), a)
        torch.manual_seed(1)
        assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.dcm")), ids=lambda path: path.stem)
def test_any_dicom_is_read_or_refused(path):
    try: scan = anatomy.read_dicom(path)
    except ValueError as e: assert path.name in str(e)
    else: assert scan.values.ndim == 4 and scan.values.isfinite().all()


def nifti(path, shape=(9, 10, 11), dtype="float32"):
    data = torch.rand(shape, generator=generator()).numpy()
    nibabel.save(nibabel.Nifti1Image((100 * data).astype(dtype), np.eye(4)), path)


def fastmri(path, shape=(2, 3, 16, 12)):
    with h5py.File(path, "w") as f: f["kspace"] = torch.randn(shape, dtype=torch.complex64, generator=generator()).numpy()


def dicom(path): path.write_bytes((SAMPLES / "CT_small.dcm").read_bytes())


def array(path): np.save(path, np.ones((5, 6)))


def ismrmrd_file(path):
    import ismrmrd
    space = lambda s, x: f"<{s}><matrixSize><x>{x}</x><y>6</y><z>1</z></matrixSize><fieldOfView_mm><x>16</x><y>3</y><z>1</z></fieldOfView_mm></{s}>"
    data = ismrmrd.Dataset(str(path), "dataset", create_if_needed=True)
    data.write_xml_header('<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>'
                          f"{space('encodedSpace', 8)}{space('reconSpace', 4)}<trajectory>cartesian</trajectory></encoding></ismrmrdHeader>")
    for p in range(6):
        a = ismrmrd.Acquisition.from_array(np.full((2, 8), p + 1j, np.complex64))
        a.idx.kspace_encode_step_1, a.center_sample = p, 4
        data.append_acquisition(a)
    data.close()


FILES = {"scan.nii": (nifti, anatomy.read_nifti), "scan.nii.gz": (nifti, anatomy.read_nifti), "k.h5": (fastmri, anatomy.read_fastmri),
         "ct.dcm": (dicom, anatomy.read_dicom), "lines.h5": (ismrmrd_file, anatomy.read_ismrmrd),
         "array.npy": (array, lambda path: anatomy.read_arrays(path.parent))}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused(name, tmp_path):
    "Or, where only padding was cut off, read as it was."
    make, read = FILES[name]
    make(tmp_path / name)
    whole, values = (tmp_path / name).read_bytes(), read(tmp_path / name).values
    for share in np.linspace(0, .999, 24):
        (tmp_path / name).write_bytes(whole[:int(share * len(whole))])
        try: again = read(tmp_path / name).values
        except ValueError as e: assert name in str(e) or "lines" in str(e), str(e)
        else: assert torch.equal(again, values), share


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_kinds_are_refused(name, tmp_path):
    read = FILES[name][1]
    for other, (make, _) in FILES.items():
        if other.partition(".")[2].split(".")[0] == name.partition(".")[2].split(".")[0] and other.split(".")[0] == name.split(".")[0]: continue
        make(tmp_path / other)
        (tmp_path / other).replace(tmp_path / name)
        with pytest.raises(ValueError): read(tmp_path / name)


def test_an_affine_takes_the_values_to_the_file_s_millimetres(tmp_path):
    "Whatever way the file's axes point: the brightest voxel lies where nibabel says."
    for axes in ("RAS", "LPS", "PIR", "SLA"):
        data, turn = np.zeros((5, 6, 7), "float32"), np.linalg.qr(np.eye(3) + .1 * np.arange(9).reshape(3, 3) % .25)[0]
        data[1, 4, 5] = 1
        affine = nibabel.affines.from_matvec(turn * np.sign(np.diag(turn)) * (1., 2., 3.), (-20., 8., 31.))
        image = nibabel.Nifti1Image(data, affine)
        here = nibabel.orientations.io_orientation(affine)
        there = nibabel.orientations.axcodes2ornt(axes)
        nibabel.save(image.as_reoriented(nibabel.orientations.ornt_transform(here, there)), tmp_path / "turned.nii")
        scan = anatomy.read_nifti(tmp_path / "turned.nii")
        z, y, x = (scan.values[:, 0] == 1).nonzero()[0].tolist()
        np.testing.assert_allclose(scan.facts["affine"] @ np.array([x, y, z, 1]), affine @ [1, 4, 5, 1], rtol=1e-5)


def test_what_a_reader_says_of_raw_data_fits_the_operator(tmp_path):
    "The mask goes into MultiCoilMRI as it is; the voxel is that of the encoded grid, the readout first."
    from diffusion_lit.mri import MultiCoilMRI
    ismrmrd_file(tmp_path / "lines.h5")
    with h5py.File(tmp_path / "k.h5", "w") as f: f["kspace"], f["mask"] = np.ones((2, 2, 8, 6), "complex64"), np.arange(6) % 2
    for scan, measured in ((anatomy.read_ismrmrd(tmp_path / "lines.h5"), 6), (anatomy.read_fastmri(tmp_path / "k.h5"), 3)):
        op = MultiCoilMRI(torch.ones_like(scan.values), scan.facts["mask"])
        y = op.forward(torch.randn(len(scan.values), 1, 8, 6, dtype=torch.complex64, generator=generator()))
        assert y.shape == scan.values.shape and (y[0, 0, 0] != 0).sum() == measured
    assert anatomy.read_ismrmrd(tmp_path / "lines.h5").spacing == (1., 2., .5)


def peak(code):
    "MiB at the peak of a process of its own, above what its imports take."
    script = f"import resource, torch, numpy\nfrom pathlib import Path\nfrom diffusion_lit import anatomy\nimport h5py, nibabel\nrss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\nbefore = rss()\n{code}\nprint(rss() - before)"
    return float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()[-1])


def test_raw_data_of_real_size_one_slice_at_a_time(tmp_path):
    "24 slices of 15 coils at 640 × 320 are 590 MB; a slice is 25."
    with h5py.File(tmp_path / "big.h5", "w") as f:
        k = f.create_dataset("kspace", (24, 15, 640, 320), "complex64", chunks=(1, 15, 640, 320))
        for s in range(0, 24, 8): k[s] = s + 1
    used = peak(f"for s in range(24):\n    x = anatomy.read_fastmri({str(tmp_path / 'big.h5')!r}, slice(s, s + 1)).values\n    assert x.shape == (1, 15, 640, 320) and x[0, 0, 0, 0] == (s + 1) * (s % 8 == 0)")
    assert used < 200, used


def test_a_volume_of_real_size(tmp_path):
    "256³ voxels are 67 MB as float32."
    nibabel.save(nibabel.Nifti1Image(np.arange(256**3, dtype="int16").reshape(256, 256, 256), np.diag([-1, 1, 1, 1])), tmp_path / "v.nii")
    assert peak(f"x = anatomy.read_nifti({str(tmp_path / 'v.nii')!r}).values\nassert x.shape == (256, 1, 256, 256)") < 450


@pytest.mark.parametrize("name", anatomy.priors())
def test_a_prior_is_small_and_its_recipe_known(name):
    path = priors.WEIGHTS / f"{name}.safetensors"
    tensors, facts = read_tensors(path)
    assert path.stat().st_size < 4e6 and all(t.isfinite().all() for t in tensors.values())
    assert priors.recipe(facts) == facts["recipe"] and facts["settings"] == json.loads(json.dumps(priors.PRIORS[name]))
    np.testing.assert_allclose(priors.fingerprint(name, facts["settings"]), facts["examples"], atol=2e-3)        # the chapter still makes what it learned from


def test_all_weights_together():
    assert sum(path.stat().st_size for path in priors.WEIGHTS.glob("*")) < 20e6


def cells():
    path = STUDIES / "results/priors.json"
    if not path.exists(): pytest.skip("studies/results/priors.json is not there yet")
    return json.loads(path.read_text())


def test_every_cell_says_how_it_was_made():
    for cell, row in cells().items():
        assert set(row) == {"settings", "result", "seconds", "hardware", "versions"} and "torch" in row["versions"], cell
        if "round" in cell: assert list(row["result"]["errors"]) == [str(level) for level in priors.LEVELS]


@pytest.mark.parametrize("name", anatomy.priors())
def test_a_cheap_cell_again(name):
    "The denoising errors of the shipped weights at two levels, on fewer images."
    done = [row for cell, row in cells().items() if cell.startswith(f"{name}: round")][-1]
    s = done["settings"]["settings"]
    test, tune = (priors.examples(name, n, 0, s["size"], part, s["seed"] + k) for n, part, k in ((12, "test", 1), (120, "train", 2)))
    for level in (.1, 1.):
        again, stored = priors.errors(anatomy.load_prior(name), test, tune[:3], priors.Wiener(tune), level), done["result"]["errors"][str(level)]
        for method in ("noise", "Wiener", "prior", "total variation"): assert again[method] == pytest.approx(stored[method], rel=.25), (level, method)


def test_a_round_resumes_and_can_be_taken_as_it_stands(tmp_path, monkeypatch):
    "Augmentation is a function of the rows, so that `fit` resumes exactly."
    monkeypatch.setattr(priors.tempfile, "gettempdir", lambda: str(tmp_path))
    x = priors.Varied(priors.examples("brain", 6, 2, 32, "train", 0))
    rows = torch.tensor([1, 5, 0])
    assert torch.equal(x[rows], x[rows]) and not torch.equal(x[rows], x.x[rows]) and x[rows].shape == (3, 2, 32, 32)
    s = dict(priors.PRIORS["brain"], slices=6, others=2, size=32, net=dict(width=8, mults=[1, 2], middle=False))
    whole, loss = priors.train("brain", 3, 0, s)
    again, _ = priors.train("brain", 3, 0, s)                             # all steps are done already
    taken, seen = priors.train("brain", 3, 0, s, stopped=3)
    assert list(seen) == list(loss)
    for a, b, c in zip(whole.parameters(), again.parameters(), taken.parameters()): assert torch.equal(a, b) and torch.equal(a, c)


def test_a_displacement_is_smooth_unless_told_otherwise():
    "Neighbours move alike by default: the correlation of a Gaussian field of length 12 at one pixel is above .99."
    u = anatomy.displacement(4, (64, 64), generator=torch.Generator().manual_seed(0)).flatten(0, 1)
    a, b = u[:, 1:], u[:, :-1]
    assert ((a - a.mean()) * (b - b.mean())).mean() > .98 * u.var()
