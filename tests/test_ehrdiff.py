"""EHRDiff at its edges: interrupted runs, bad input, files of another kind, odd tables."""
import pickle
import re

import numpy as np
import pandas as pd
import pytest
import torch

from diffusion_lit import Cohort, EHRDiff, Privacy, from_frame, simulate_cohort


def generator(seed=0): return torch.Generator().manual_seed(seed)


def people(n=200):
    rng = np.random.default_rng(0)
    return from_frame(pd.DataFrame(dict(ill=rng.random(n) < .3, seen=pd.array(rng.choice([True, False, None], n), dtype="boolean"),
                                        sex=pd.Categorical(rng.choice(["f", "m", "x"], n), ["f", "m", "x", "never seen"]), visits=rng.poisson(3, n) * 5,
                                        age=np.where(rng.random(n) < .2, np.nan, rng.normal(60, 9, n).round(1)))), kinds=dict(visits="count"))


@pytest.mark.parametrize("privacy", [None, Privacy(3., draws=2)], ids=["plain", "private"])
def test_an_interrupted_fit_goes_on_with_the_same_bits(tmp_path, privacy):
    class Stop(Exception): "The power fails."
    def fail(step):
        if step == 7: raise Stop
    options = dict(steps=10, batch=40, every=5, privacy=privacy)
    whole = EHRDiff(hidden=(8,)).fit(people(), generator=generator(), **options)
    with pytest.raises(Stop):
        EHRDiff(hidden=(8,)).fit(people(), generator=generator(), resume=tmp_path / "run", callback=fail, **options)
    resumed = EHRDiff(hidden=(8,)).fit(people(), generator=generator(), resume=tmp_path / "run", **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()))
    assert (whole.history is None) == (privacy is not None)


@pytest.fixture(scope="module")
def fitted(): return EHRDiff(hidden=(8,)).fit(people(), steps=5, batch=20, generator=generator())


BAD_FITS = {"one patient": (lambda: dict(cohort=people()[:1]), "two patients"), "no column": (lambda: dict(cohort=people().select([])), "two patients"),
            "no step": (lambda: dict(steps=0), "steps"), "no batch": (lambda: dict(batch=0), "batch"), "learning rate": (lambda: dict(lr=-1.), "lr"),
            "all missing": (lambda: dict(cohort=from_frame(pd.DataFrame(dict(a=[1., 0, 1], b=[np.nan] * 3)), kinds=dict(b="number"))), "'b'"),
            "private batch": (lambda: dict(batch=8, privacy=Privacy(3.)), "batch"), "delta": (lambda: dict(batch=40, privacy=Privacy(3., delta=.5)), "delta"),
            "epsilon": (lambda: dict(batch=40, privacy=Privacy(-1.)), "epsilon"), "no noise": (lambda: dict(batch=40, privacy=Privacy(.01)), "epsilon")}


@pytest.mark.parametrize("name", BAD_FITS)
def test_a_bad_fit_is_refused_by_name(name):
    options, word = BAD_FITS[name]
    with pytest.raises(ValueError, match=re.escape(word)):
        EHRDiff(hidden=(8,)).fit(**dict(cohort=people(), steps=2, batch=20) | options())


BAD_SAMPLES = {"none": (dict(n=0), "n, batch"), "batch": (dict(n=1, batch=0), "batch"), "steps": (dict(n=1, steps=0), "steps"),
               "column": (dict(n=1, condition=dict(height=1)), "height"), "level": (dict(n=1, condition=dict(sex="q")), "'q'"),
               "too few": (dict(n=3, condition=dict(ill=[True, False])), "3 values"), "never missing": (dict(n=1, condition=dict(ill=None)), "ill"),
               "text for a number": (dict(n=1, condition=dict(age="old")), "'old'"), "out of range": (dict(n=1, condition=dict(visits=999)), "999")}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_bad_sample_is_refused_by_name(name, fitted):
    options, word = BAD_SAMPLES[name]
    with pytest.raises(ValueError, match=re.escape(word)): fitted.sample(**options)


def test_a_promise_refuses_what_it_does_not_pay_for():
    with pytest.raises(ValueError, match="label"):
        EHRDiff("edm", hidden=(8,), label="ill").fit(people(), steps=2, batch=40, privacy=Privacy(3.))


def test_files_of_another_kind_are_refused(tmp_path, fitted):
    fitted.save(tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    bad = {"half": good[:len(good) // 2], "empty": b"", "pickle": pickle.dumps(dict(a=1)), "text": b"not a model"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name): EHRDiff.load(tmp_path / name)
    with pytest.raises(ValueError, match="fitted"): EHRDiff().save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_comes_out_is_what_went_in(fitted):
    real, new = people().to_frame(), fitted.sample(500, generator=generator()).to_frame()
    assert (new.dtypes == real.dtypes).all() and list(new.sex.cat.categories) == list(real.sex.cat.categories)
    assert new.visits.between(real.visits.min(), real.visits.max()).all() and (new.visits % 5 == 0).all() and new.ill.notna().all()
    assert new.age.isna().any() and np.allclose(new.age.dropna() * 10, (new.age.dropna() * 10).round())


def test_conditions_hold_for_every_patient(fitted):
    who = ["f", "m", "x", "m"]
    new = fitted.sample(4, condition=dict(sex=who, age=[50., None, 61.5, None], visits=10), generator=generator()).to_frame()
    assert list(new.sex) == who and new.age.isna().tolist() == [False, True, False, True] and (new.visits == 10).all()
    for w in (0., 2.): assert list(fitted.sample(4, condition=dict(sex=who), guidance=w, generator=generator()).to_frame().sex) == who


def test_tables_of_one_kind_work():
    bits, _ = simulate_cohort(100, 9, density=.3, generator=generator())
    number = from_frame(pd.DataFrame(dict(a=np.random.default_rng(0).normal(size=100))))
    level = from_frame(pd.DataFrame(dict(a=list("abcd") * 25)))
    for cohort in (bits, number, level, Cohort.from_matrix(np.zeros((50, 3)))):
        for head in ("bernoulli", "edm", "ve", "vp", "v", "x0"):
            new = EHRDiff(head, hidden=(8,)).fit(cohort, steps=3, batch=20, generator=generator()).sample(30, steps=3, generator=generator())
            assert new.names == cohort.names and len(new) == 30


def test_lower_precision_is_close():
    cohort, _ = simulate_cohort(500, 30, density=.2, generator=generator())
    ehr = EHRDiff(hidden=(32,)).fit(cohort, steps=50, batch=100, generator=generator())
    full, half = (ehr.sample(2000, precision=p, generator=generator()).bits().float().mean(0) for p in (None, torch.bfloat16))
    assert (full - half).abs().max() < .03
