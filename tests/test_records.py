"""Records at their edges: every form in which MIMIC comes, tables that are none, and the full size."""
import gzip
import itertools
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from diffusion_lit.records import (BifactorLaw, Cohort, Column, from_frame, icd_group, load_nhefs, read_mimic,
                                   simulate_cohort)


def generator(seed=0): return torch.Generator().manual_seed(seed)


# A small hospital. Three patients with codes, one admitted without any, one never admitted.
STAYS = [(10, 100), (10, 101), (11, 110), (12, 120), (13, 130)]
PEOPLE = [(10, "F"), (11, "M"), (12, "M"), (13, "F"), (99, "M")]
DIAGNOSES = [(10, 100, 1, "4019", 9), (10, 100, 2, "0389", 9), (10, 101, 1, "40100", 9), (10, 101, 2, "E8120", 9),
             (11, 110, 1, "V4581", 9), (11, 110, 2, "", 9), (11, 110, "", "042", 9), (12, 120, 1, "E8129", 9),
             (12, 120, 2, "E8120", 9), (12, 120, 3, "   ", 9)]
PROCEDURES = [(10, 100, 1, "0066", 9), (11, 110, 1, "4019", 9), (11, 110, 2, "4019", 9)]
TENTH = [(12, 120, 4, "E8120", 10), (12, 120, 5, "I10    ", 10), (10, 101, 3, "E119", 10)]      # of MIMIC-IV
COLUMNS = ["D9_038", "D9_042", "D9_401", "D9_E812", "D9_V45", "P9_006", "P9_401"]
HELD = {10: {"D9_401", "D9_038", "D9_E812", "P9_006"}, 11: {"D9_V45", "D9_042", "P9_401"}, 12: {"D9_E812"}, 13: set()}


def write(path, header, rows, *, zipped=False, quoted=False, shuffled=False, end="\n", comma=",", coding="utf-8"):
    order = np.random.default_rng(1).permutation(len(header)) if shuffled else range(len(header))
    mark = (lambda cell: f'"{cell}"') if quoted else str
    lines = [comma.join(mark(row[k]) for k in order) for row in (header, *rows)]
    text = (end.join(lines) + end).encode(coding)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text) if zipped else text)


def mimic(folder, version, *, upper=True, names=None, tenth=(), **how):
    "A tree of MIMIC-III or MIMIC-IV, in one of the forms in which it comes."
    case = str.upper if upper else str.lower
    file = case if names is None else names
    ending = ".csv.gz" if how.get("zipped") else ".csv"
    place = folder / "hosp" if version == 4 else folder
    ids = ["row_id"] * (version == 3) + ["subject_id", "hadm_id"]
    def numbered(rows): return [(i + 1, *row) for i, row in enumerate(rows)] if version == 3 else rows
    code = ["icd9_code"] if version == 3 else ["icd_code", "icd_version"]
    def coded(rows): return numbered([row[:4] if version == 3 else row for row in rows])
    born = {3: ("2080-03-05 00:00:00",), 4: (70, 2150)}[version]
    tables = {"admissions": (ids + ["admittime", "hospital_expire_flag"],
                             numbered([(*stay, "2150-03-04 11:12:00", int(stay[1] == 101)) for stay in STAYS])),
              "patients": (ids[:-1] + ["gender"] + (["dob"] if version == 3 else ["anchor_age", "anchor_year"]),
                           numbered([(*person, *born) for person in PEOPLE])),
              "diagnoses_icd": (ids + ["seq_num"] + code, coded(DIAGNOSES + list(tenth))),
              "procedures_icd": (ids + ["seq_num"] + code, coded(PROCEDURES))}
    for name, (header, rows) in tables.items():
        write(place / (file(name) + ending), [case(column) for column in header], rows, **how)
    return folder


def held(cohort):
    return {patient: {name for name, bit in zip(cohort.names, row) if bit}
            for patient, row in zip(cohort.patients.tolist(), cohort.values().tolist())}


FORMS = [dict(), dict(upper=False), dict(zipped=True), dict(quoted=True), dict(zipped=True, quoted=True, upper=False),
         dict(shuffled=True), dict(end="\r\n"), dict(names=str.lower), dict(names=str.upper, upper=False)]


@pytest.mark.parametrize("version, form", [*itertools.product((3, 4), FORMS)], ids=str)
def test_every_form_of_mimic_gives_the_same_cohort(tmp_path, version, form):
    cohort = read_mimic(mimic(tmp_path, version, **form))
    assert list(cohort.names) == COLUMNS and held(cohort) == HELD
    assert cohort.facts == dict(source="MIMIC-III" if version == 3 else "MIMIC-IV", level="patient", never_admitted=1,
                                not_in_admissions=0, rows=13, blank=2, unknown=0, repeated=3, without_code=1)


def test_the_ninth_and_the_tenth_revision_never_meet(tmp_path):
    cohort = read_mimic(mimic(tmp_path, 4, tenth=TENTH), version=4)
    assert set(cohort.names) - set(COLUMNS) == {"D10_E81", "D10_I10", "D10_E11"}
    assert held(cohort)[12] == {"D9_E812", "D10_E81", "D10_I10"} and held(cohort)[10] - HELD[10] == {"D10_E11"}


def test_hosp_itself_is_a_folder_too(tmp_path):
    assert held(read_mimic(mimic(tmp_path, 4) / "hosp")) == HELD


def test_a_plain_file_goes_before_its_gzipped_copy_and_mimic_iv_1_keeps_some_in_core(tmp_path):
    mimic(tmp_path, 4, upper=False)
    (tmp_path / "hosp" / "admissions.csv.gz").write_bytes(b"not looked at")
    (tmp_path / "core").mkdir()
    (tmp_path / "hosp" / "patients.csv").rename(tmp_path / "core" / "patients.csv")
    assert read_mimic(tmp_path).facts["never_admitted"] == 1


def test_what_to_read_can_be_chosen(tmp_path):
    mimic(tmp_path, 3)
    assert list(read_mimic(tmp_path, procedures=False).names) == COLUMNS[:5]
    whole = read_mimic(tmp_path, truncate=False)
    assert "D9_40100" in whole.names and "D9_4019" in whole.names and "P9_0066" in whole.names
    assert read_mimic(tmp_path, min_count=2).names == ("D9_E812",)
    train = read_mimic(tmp_path, train=[10, 12])
    assert set(train.names) == HELD[10] | HELD[12] and len(train) == 4 and train.facts["unknown"] == 4
    test = read_mimic(tmp_path, vocabulary=["P9_401", "D9_999"])
    assert test.names == ("P9_401", "D9_999") and test.bits().sum(0).tolist() == [1, 0]


def test_admissions_as_rows_stay_with_their_patient(tmp_path):
    cohort = read_mimic(mimic(tmp_path, 3), level="admission")
    assert cohort.patients.tolist() == [10, 10, 11, 12, 13]
    assert cohort.select(["D9_401"]).bits().flatten().tolist() == [1, 1, 0, 0, 0]
    for seed in range(8):
        first, second = cohort.split(.5, generator(seed))
        assert not set(first.patients) & set(second.patients) and len(first) + len(second) == 5


@pytest.mark.parametrize("version, age", [(3, 69), (4, 70)])
def test_age_sex_and_death(tmp_path, version, age):
    cohort = read_mimic(mimic(tmp_path, version), demographics=True)
    frame = cohort.to_frame()
    assert [c.kind for c in cohort.columns[:4]] == ["category", "number", "bit", "bit"]
    assert frame.sex.tolist() == ["F", "M", "M", "F"] and frame.age.tolist() == [age] * 4
    assert frame.died.tolist() == [1, 0, 0, 0] and list(cohort.names[3:]) == COLUMNS


def test_patients_whom_admissions_do_not_know_are_kept_and_counted(tmp_path):
    mimic(tmp_path, 3)
    rows = [line for line in (tmp_path / "ADMISSIONS.csv").read_text().splitlines() if ",12,120," not in line]
    (tmp_path / "ADMISSIONS.csv").write_text("\n".join(rows) + "\n")
    cohort = read_mimic(tmp_path)
    assert cohort.facts["not_in_admissions"] == 1 and held(cohort) == HELD


def test_no_patients_table_is_needed(tmp_path):
    mimic(tmp_path, 3)
    (tmp_path / "PATIENTS.csv").unlink()
    assert read_mimic(tmp_path).facts["never_admitted"] == 0


def edit(name, old, new):
    def apply(folder):
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
    return apply


def put(name, content):
    def apply(folder): (folder / name).write_bytes(content)
    return apply


def gone(name):
    def apply(folder): (folder / name).unlink()
    return apply


def cut(name):
    def apply(folder):
        whole = gzip.compress((folder / name).read_bytes() * 50)
        (folder / name).unlink()
        (folder / (name + ".gz")).write_bytes(whole[:len(whole) // 2])
    return apply


BAD = {
    "no admissions": (gone("ADMISSIONS.csv"), ["admissions.csv"]),
    "no diagnoses": (gone("DIAGNOSES_ICD.csv"), ["diagnoses_icd.csv"]),
    "no procedures": (gone("PROCEDURES_ICD.csv"), ["procedures_icd.csv"]),
    "empty diagnoses": (put("DIAGNOSES_ICD.csv", b""), ["DIAGNOSES_ICD.csv", "empty", "subject_id"]),
    "empty admissions": (put("ADMISSIONS.csv", b""), ["ADMISSIONS.csv", "empty"]),
    "empty patients": (put("PATIENTS.csv", b""), ["PATIENTS.csv", "empty"]),
    "only newlines": (put("ADMISSIONS.csv", b"\n\n"), ["ADMISSIONS.csv", "empty"]),
    "diagnoses without rows": (put("DIAGNOSES_ICD.csv", b"SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE\n"),
        ["DIAGNOSES_ICD.csv", "no rows"]),
    "admissions without rows": (put("ADMISSIONS.csv", b"SUBJECT_ID,HADM_ID\n"), ["ADMISSIONS.csv", "no rows"]),
    "procedures without rows": (put("PROCEDURES_ICD.csv", b"SUBJECT_ID,HADM_ID,ICD9_CODE\n"),
        ["PROCEDURES_ICD.csv", "no rows"]),
    "no column of codes": (edit("DIAGNOSES_ICD.csv", "ICD9_CODE", "CODE"),
        ["DIAGNOSES_ICD.csv", "icd9_code", "icd_version"]),
    "no column of codes in procedures": (edit("PROCEDURES_ICD.csv", "ICD9_CODE", "CODE"),
        ["PROCEDURES_ICD.csv", "icd9_code"]),
    "no subjects": (edit("DIAGNOSES_ICD.csv", "SUBJECT_ID", "SUBJECT"), ["DIAGNOSES_ICD.csv", "subject_id"]),
    "no stays": (edit("ADMISSIONS.csv", "HADM_ID", "STAY"), ["ADMISSIONS.csv", "hadm_id"]),
    "a column twice": (edit("ADMISSIONS.csv", "ADMITTIME", "SUBJECT_ID"),
        ["ADMISSIONS.csv", "one column 'subject_id'"]),
    "code but no version": (edit("DIAGNOSES_ICD.csv", "ICD9_CODE", "ICD_CODE"), ["DIAGNOSES_ICD.csv", "icd_version"]),
    "text for a subject": (edit("DIAGNOSES_ICD.csv", "1,10,100,1", "1,ten,100,1"),
        ["DIAGNOSES_ICD.csv", "subject_id", "line 2", "'ten'"]),
    "no subject": (edit("DIAGNOSES_ICD.csv", "2,10,100,2", "2,,100,2"),
        ["DIAGNOSES_ICD.csv", "subject_id", "line 3"]),
    "a fraction of a stay": (edit("ADMISSIONS.csv", ",101,", ",101.5,"),
        ["ADMISSIONS.csv", "hadm_id", "line 3", "'101.5'"]),
    "a negative subject": (edit("ADMISSIONS.csv", ",13,", ",-13,"), ["ADMISSIONS.csv", "subject_id", "line 6"]),
    "text for a sequence": (edit("DIAGNOSES_ICD.csv", "3,10,101,1", "3,10,101,first"),
        ["DIAGNOSES_ICD.csv", "seq_num", "line 4", "'first'"]),
    "text for a person": (edit("PATIENTS.csv", ",99,", ",x,"), ["PATIENTS.csv", "subject_id", "'x'"]),
    "a stay twice": (edit("ADMISSIONS.csv", ",101,", ",100,"), ["ADMISSIONS.csv", "hadm_id", "100", "twice"]),
    "a longer row": (edit("DIAGNOSES_ICD.csv", "4019", "4019,9,9"), ["DIAGNOSES_ICD.csv"]),
    "longer rows": (put("ADMISSIONS.csv", b"SUBJECT_ID,HADM_ID\n1,2,3\n4,5,6\n"), ["ADMISSIONS.csv", "longer"]),
    "an open quote": (edit("DIAGNOSES_ICD.csv", "4019", '"4019'), ["DIAGNOSES_ICD.csv"]),
    "pictures": (put("DIAGNOSES_ICD.csv", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9),
        ["DIAGNOSES_ICD.csv", "subject_id"]),
    "half a gzip": (cut("DIAGNOSES_ICD.csv"), ["DIAGNOSES_ICD.csv.gz", "cannot be read"]),
    "text called gzip": (lambda folder: (folder / "ADMISSIONS.csv").rename(folder / "ADMISSIONS.csv.gz"),
        ["ADMISSIONS.csv.gz", "cannot be read"]),
    "gzip called text": (
        lambda folder: (folder / "ADMISSIONS.csv").write_bytes(gzip.compress(b"SUBJECT_ID,HADM_ID\n1,2\n")),
        ["ADMISSIONS.csv"]),
    "UTF-16": (
        lambda folder: write(folder / "ADMISSIONS.csv", ["SUBJECT_ID", "HADM_ID"], STAYS, coding="utf-16"),
        ["ADMISSIONS.csv"]),
    "semicolons": (
        lambda folder: write(folder / "ADMISSIONS.csv", ["SUBJECT_ID", "HADM_ID"], STAYS, comma=";"),
        ["ADMISSIONS.csv", "subject_id"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_tree_is_named(tmp_path, case):
    damage, words = BAD[case]
    damage(mimic(tmp_path, 3))
    with pytest.raises(ValueError) as error: read_mimic(tmp_path)
    assert not [word for word in words if word not in str(error.value)], error.value


@pytest.mark.parametrize("old, new, words", [
    (",9\n", ",11\n", ["icd_version", "line 2", "9 or 10", "11"]), (",9\n", ",nine\n", ["icd_version", "'nine'"]),
    (",9\n", ",\n", ["icd_version", "line 2"])])
def test_a_bad_revision_is_named(tmp_path, old, new, words):
    edit("hosp/DIAGNOSES_ICD.csv", old, new)(mimic(tmp_path, 4))
    with pytest.raises(ValueError) as error: read_mimic(tmp_path)
    assert not [word for word in words if word not in str(error.value)], error.value


@pytest.mark.parametrize("choice, word", [
    (dict(version=4), "version 3"), (dict(level="ward"), "level"), (dict(folder="nowhere"), "nowhere")])
def test_a_bad_choice_is_named(tmp_path, choice, word):
    with pytest.raises(ValueError, match=word): read_mimic(**dict(folder=mimic(tmp_path, 3)) | choice)


def test_byte_order_mark_and_padded_names(tmp_path):
    mimic(tmp_path, 3)
    path = tmp_path / "DIAGNOSES_ICD.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"SUBJECT_ID", b" SUBJECT_ID "))
    assert held(read_mimic(tmp_path)) == HELD


FULL = """
import resource, sys
import numpy as np
from pathlib import Path
folder, rng = Path(sys.argv[1]), np.random.default_rng(0)
def write(name, header, *columns):
    with open(folder / name, "w") as file:
        file.write(header + "\\n")
        file.writelines(",".join(row) + "\\n" for row in zip(*(column.astype(str) for column in columns)))
n, stays, patients = 651_047, 58_976, 46_520
stay = np.concatenate([np.arange(stays), rng.integers(stays, size=n - stays)])
who = np.concatenate([np.arange(patients), rng.integers(patients, size=stays - patients)])
code = np.char.zfill((100 + 900 * rng.random(n)**3).astype(int).astype(str), 4)
write("ADMISSIONS.csv", "SUBJECT_ID,HADM_ID", who, np.arange(stays))
write("DIAGNOSES_ICD.csv", "ROW_ID,SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE", np.arange(n), who[stay],
      stay, np.ones(n, int), code)
write("PROCEDURES_ICD.csv", "ROW_ID,SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE", np.arange(240_095), who[stay[:240_095]],
      stay[:240_095], np.ones(240_095, int), code[:240_095])
"""
READ = """
import resource, sys, time
from diffusion_lit.records import read_mimic
import pandas, scipy.sparse
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cohort = read_mimic(sys.argv[1])
print(*cohort.shape, cohort.facts["rows"], cohort.facts["repeated"] + int(cohort.bits().long().sum()),
      (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured in Linux's units")
def test_as_many_rows_as_mimic_iii_has(tmp_path):
    for script in (FULL, READ):
        done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    patients, columns, rows, codes, mebibytes = map(float, done.stdout.split())
    assert (patients, rows) == (46_520, 651_047 + 240_095) and 150 < columns < 200 and codes == rows
    assert mebibytes < 600


# Tables

DTYPES = {**{name: [0, 3, -2, 100] for name in ("int8", "int16", "int32", "int64")},
          **{name: [0, 3, 200, 100] for name in ("uint8", "uint16", "uint32", "uint64")},
          **{name: [0, None, -2, 100] for name in ("Int8", "Int16", "Int32", "Int64")},
          **{name: [0.25, np.nan, 1e-7, -1e30] for name in ("float32", "float64")},
          **{name: [.5, None, 1.5, -3.] for name in ("Float32", "Float64")},
          "UInt8": [0, None, 200, 1], "bool": [True, False, True, True], "boolean": [True, None, False, True],
          "str": ["a", "", None, "ü"], "string": ["a", "b", None, "a"], "object": ["a", None, "b", "a"],
          "category": ["a", None, "b", "a"]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("through", ["memory", "file"])
def test_a_column_comes_back_as_it_was(tmp_path, dtype, through):
    frame = pd.DataFrame({"x": pd.Series(DTYPES[dtype], dtype=dtype)}, index=["d", "a", "c", "b"])
    cohort = from_frame(frame)
    if through == "file":
        cohort.save(tmp_path / "x.parquet")
        again = Cohort.load(tmp_path / "x.parquet")
        assert again.columns == cohort.columns and again.facts == cohort.facts
        cohort = again
    pd.testing.assert_frame_equal(cohort.to_frame(), frame)
    np.testing.assert_array_equal(Cohort.from_values(cohort.columns, cohort.values()).values(), cohort.values())


@pytest.mark.parametrize("series", [
    pd.Series(pd.Categorical(["b", None], ["c", "b", "a"], ordered=True)), pd.Series(pd.Categorical([3, 1], [3, 2, 1])),
    pd.Series(pd.Categorical(np.array([3, 1], "int8"))), pd.Series(pd.Categorical([2.5, None])),
    pd.Series(pd.Categorical([True, False])), pd.Series(["a", np.nan], dtype=object),
    pd.Series(["a", pd.NA], dtype=object), pd.Series([True, None], dtype=object), pd.Series([None, None], dtype=object),
    pd.Series([np.nan, np.nan]), pd.Series([], dtype="float64"), pd.Series([0, 0]),
    pd.Series([1., np.nan], dtype="float32"), pd.Series([2**53, -2**53]), pd.Series(pd.Categorical([None, None], []))],
    ids=str)
def test_an_odd_column_comes_back_as_it_was(tmp_path, series):
    frame = series.to_frame("x")
    from_frame(frame).save(tmp_path / "x.parquet")
    for cohort in (from_frame(frame), Cohort.load(tmp_path / "x.parquet")):
        pd.testing.assert_frame_equal(cohort.to_frame(), frame)
        assert [type(v) for v in cohort.to_frame().x] == [type(v) for v in frame.x]


@pytest.mark.parametrize("series, word", [
    (pd.Series(pd.to_datetime(["2020-01-01"])), "dates"), (pd.Series(pd.to_timedelta([1], "s")), "dates"),
    (pd.Series([1 + 2j]), "complex128"), (pd.Series([2**53 + 1, 7]), "2**53"), (pd.Series([-2**60, 7]), "2**53"),
    (pd.Series(["a", 1], dtype=object), "mixed"), (pd.Series([[1], [2]], dtype=object), "list"),
    (pd.Series([b"a"], dtype=object), "bytes"), (pd.Series([np.inf, 1.5, 2]), "infinities"),
    (pd.Series(pd.Categorical(pd.to_datetime(["2020-01-01"]))), "category"),
    (pd.Series(["a", None, np.nan], dtype=object), "ways"),
    (pd.Series(pd.period_range("2020", periods=2, freq="Y")), "period")], ids=str)
def test_what_cannot_be_held_is_refused_with_a_way_out(series, word):
    with pytest.raises(ValueError, match="(?s)'x'") as error: from_frame(series.to_frame("x"))
    assert word in str(error.value), error.value


def test_order_index_and_categories_survive_cutting_and_joining():
    nhefs = load_nhefs()
    frame = nhefs.to_frame()
    rows = torch.randperm(len(nhefs), generator=generator())
    mixed = nhefs[rows]
    pd.testing.assert_frame_equal(mixed.to_frame(), frame.iloc[rows.numpy()])
    first, second = mixed.split(.8, generator(1))
    back = Cohort.concat([first, second])
    pd.testing.assert_frame_equal(back.to_frame().sort_index(), frame)
    names = list(nhefs.names)[::-1]
    pd.testing.assert_frame_equal(nhefs.select(names).to_frame(), frame[names])
    assert len(first) == round(.8 * 1629) and first.facts["split"]["seed"] == 1


def test_rows_can_be_named_in_every_way():
    cohort, _ = simulate_cohort(50, 40, density=.1, generator=generator())
    whole = cohort.bits()
    mask = np.arange(50) % 3 == 0
    for rows in (slice(5, 20, 3), slice(None, None, -1), [4, 4, 1], np.array([7, -1]), mask, torch.tensor([2, 3]),
                 torch.from_numpy(mask), slice(None), []):
        chosen = np.arange(50)[rows if isinstance(rows, slice) else np.asarray(rows, dtype=None if len(rows) else int)]
        expected = whole[torch.from_numpy(chosen.copy())]
        assert torch.equal(cohort[rows].bits(), expected) and torch.equal(cohort.bits(rows), expected)
        np.testing.assert_array_equal(cohort[rows].values(), expected.double())
    assert torch.equal(cohort[-3].bits(), whole[-3:-2]) and torch.equal(cohort.bits(7), whole[7:8])
    for wrong in (50, [0, 50], np.ones(49, bool)):
        with pytest.raises(IndexError): cohort[wrong]


def test_generated_values_are_made_possible():
    columns = (Column("b", "bit", "Int64", (0, 1), missing=True), Column("c", "category", "category", ("x", "y")),
               Column("n", "count", "int64", low=0, high=9, step=1), Column("f", "number", "float32", low=-1, high=1),
               Column("t", "number", "Float64", low=.1, high=.7, step=.1, missing=True))
    wild = np.random.default_rng(0).normal(size=(200, 5)) * 5
    wild[::7, [0, 4]] = np.nan
    frame = Cohort.from_values(columns, wild, [f"s{i}" for i in range(200)]).to_frame()
    assert [str(dtype) for dtype in frame.dtypes] == ["Int64", "category", "int64", "float32", "Float64"]
    assert frame.n.between(0, 9).all() and frame.f.between(-1, 1).all()
    assert frame.b.isna().sum() == frame.t.isna().sum() == 29
    assert set(frame.t.dropna()) <= {.1, .2, .3, .4, .5, .6, .7} and frame.index[-1] == "s199"
    wild[0, 2] = np.nan
    with pytest.raises(ValueError, match="'n' may not have missing"): Cohort.from_values(columns, wild)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    cohort, _ = simulate_cohort(5, 8, generator=generator())
    path = tmp_path / "a.parquet"
    cohort.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"): cohort.save(path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


def test_long_table_needs_no_dense_matrix():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(dict(p=rng.integers(3000, size=20_000), c=rng.integers(500, size=20_000).astype(str)))
    cohort = from_frame(frame, patient="p", code="c")
    pairs = frame.drop_duplicates()
    assert cohort.shape == (pairs.p.nunique(), pairs.c.nunique())
    assert cohort.facts["repeated"] == len(frame) - len(pairs)
    crossed = pd.crosstab(frame.p, frame.c).clip(upper=1)
    assert (cohort.to_frame().to_numpy() == crossed[list(cohort.names)].to_numpy()).all()
    assert list(cohort.names) == sorted(pairs.c.unique())
    with pytest.raises(ValueError, match="both patient= and code="): from_frame(frame, patient="p")


# The law

@pytest.mark.parametrize("columns, clusters", [(8, 1), (9, 3), (10, 10)])
def test_the_law_against_every_record(columns, clusters):
    _, law = simulate_cohort(10, columns, density=.15, clusters=min(clusters, columns - 1), rarest=.02,
                             generator=generator(columns))
    X = torch.tensor(list(itertools.product((0., 1.), repeat=columns)), dtype=torch.float64)
    p = law.log_prob(X).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(p @ X, law.prevalence)
    moments, mean = (X.T * p) @ X, p @ X
    spread = (mean * (1 - mean)).sqrt()
    torch.testing.assert_close((moments - mean[:, None] * mean) / (spread[:, None] * spread), law.correlation())
    e = 4 * torch.randn(6, columns, generator=generator(), dtype=torch.float64)
    tilted = (p.log() + e @ X.T).softmax(1)
    torch.testing.assert_close(law.posterior(e), tilted @ X)
    for sigma in (1e-3, .3, 2., 1e4):
        z = X[::17] + sigma * torch.randn(X[::17].shape, generator=generator(), dtype=torch.float64)
        r = (p.log() - ((z[:, None] - X)**2).sum(-1) / 2 / sigma**2).softmax(1)
        torch.testing.assert_close(law.denoise(z, sigma), r @ X)
        levels = torch.full((len(z),), sigma, dtype=torch.float64)
        torch.testing.assert_close(law.denoise(z, levels), r @ X)
    for given in ({}, {law.names[0]: 1}, {law.names[1]: 0, law.names[-1]: 1}, dict.fromkeys(law.names, 1)):
        keep = torch.ones(len(X), dtype=bool)
        for name, value in given.items(): keep &= X[:, law.names.index(name)] == value
        torch.testing.assert_close(law.conditional(given), (p * keep) @ X / (p * keep).sum())


def test_the_levels_of_the_factors_are_as_good_as_a_normal():
    "A grid eight times as fine gives the same probabilities."
    a, b, t = torch.tensor([[.5, .3, .4], [.6, .7, .5], [-1., -2, -3]], dtype=torch.float64)
    law = BifactorLaw(t, a, b, torch.zeros(3, dtype=torch.long))
    X = torch.tensor(list(itertools.product((0., 1.), repeat=3)), dtype=torch.float64)
    u = torch.linspace(-6, 6, 121, dtype=torch.float64)
    w = torch.softmax(-u**2 / 2, 0)
    chance = torch.special.ndtr((t + a * u[:, None, None] + b * u[:, None]) / (1 - a**2 - b**2).sqrt())
    fine = torch.stack([(w[:, None] * w * torch.where(x == 1, chance, 1 - chance).prod(-1)).sum() for x in X])
    torch.testing.assert_close(law.log_prob(X).exp(), fine, atol=2e-5, rtol=1e-2)


def test_the_law_against_many_patients():
    cohort, law = simulate_cohort(200_000, 64, density=.08, generator=generator())
    bits = cohort.bits().double()
    error = (law.prevalence * (1 - law.prevalence) / len(bits)).sqrt()
    assert ((bits.mean(0) - law.prevalence) / error).abs().max() < 4.5
    common = law.prevalence > .02
    assert (torch.corrcoef(bits.T) - law.correlation())[common][:, common].abs().max() < .02
    given = {"outcome": 1, law.names[int(law.prevalence[:-1].argmax())]: 1}
    chosen = bits[(bits[:, [law.names.index(name) for name in given]] == 1).all(1)]
    exact = law.conditional(given)
    error = (exact * (1 - exact) / len(chosen)).sqrt().clamp(min=1e-9)
    assert len(chosen) > 2000 and ((chosen.mean(0) - exact) / error)[exact < 1].abs().max() < 4.5


def test_a_cohort_has_the_shape_that_was_asked_for():
    cohort, law = simulate_cohort(46_520, generator=generator())
    bits = cohort.bits()
    count = bits[:, :-1].sum(1, dtype=torch.int64).double()
    assert cohort.shape == (46_520, 1782) and cohort.packed.nbytes == 46_520 * 223
    assert bits[:, :-1].double().mean().item() == pytest.approx(.0107, rel=.02)
    assert law.prevalence[-1].item() == pytest.approx(.12, rel=.01) and law.prevalence.min() > 1 / 46_520
    assert count.var() > 5 * count.mean() and count.quantile(.99) > 3 * count.mean()
    first, second = (simulate_cohort(300, 90, generator=generator(4))[0].packed for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("n, columns, choice", [
    (100, 1782, {}), (1, 4, {}), (5000, 12, dict(density=.2)), (50, 64, dict(density=.5, rarest=.1)),
    (50, 64, dict(outcome=None)), (50, 64, dict(clusters=1)), (50, 64, dict(clusters=63))])
def test_small_and_dense_cohorts_can_be_simulated(n, columns, choice):
    cohort, law = simulate_cohort(n, columns, generator=generator(), **choice)
    assert cohort.shape == (n, columns) and law.prevalence.isfinite().all() and len(law.names) == columns
    assert law.prevalence[:columns - 1].mean().item() == pytest.approx(choice.get("density", .0107), rel=.1)


def test_the_exact_denoiser_is_a_denoiser_of_the_sampler():
    from diffusion_lit.sampler import karras_sigmas, sample
    _, law = simulate_cohort(2000, 24, density=.15, clusters=2, generator=generator(1))
    z = torch.randn(1000, 24, generator=generator(2)) * 20
    x = sample(law.denoise, z, karras_sigmas(12, .05, 20.), solver="heun")
    assert x.dtype == torch.float32
    error = x.round().double().mean(0) - law.prevalence
    assert error.abs().mean() < .012 and error.abs().max() < .06


def test_short_codes_and_points():
    for code, group in {"E9": "E9", "E": "E", "V1": "V1", "1": "1", "00845": "008", "e849.0": "E849"}.items():
        assert icd_group(code) == group
    assert [icd_group(code, 10) for code in ("E11.65", "V43", "0BH17EZ")] == ["E11", "V43", "0BH"]
