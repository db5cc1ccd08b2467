"""Peers from PyPI, each in an environment of its own: a table in, a synthetic table of the same columns out.

`PEERS` says what was tried on 22 November 2026 with Python 3.11, two busy cores and no GPU, and what came of it. Those that run are called as
`python studies/ehrdiff_peers.py NAME in.parquet out.parquet ROWS SEED MINUTES`, by `peer_sample`, with the interpreter that the variable PEER_NAME names
(PEER_ARFPY, PEER_MOSTLYAI_ENGINE, PEER_PYTHON_SYNTHPOP), or else with this one.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEERS = {
    "arfpy": dict(version="0.1.1", licence="MIT", method="adversarial random forest", studied=True,
                  installs="yes; stops with NumPy 2.4 (module 'numpy' has no attribute 'in1d'), so run with NumPy 2.3.5 and pandas 2.3.3",
                  verdict="8,000 x 64: 92 s, 417 MiB; 8,000 x 512: not done after 15 minutes of a busy core"),
    "mostlyai-engine": dict(version="2.7.3", licence="Apache-2.0", method="autoregressive network (TabularARGN)", studied=True,
                            installs="yes, beside torch 2.13 and pandas 3; beside a CPU-only torch the torchvision it brings does not load (operator torchvision::nms does not exist) and has to go",
                            verdict="8,000 x 64: 2 minutes given, 755 MiB; 8,000 x 512: 4 minutes given (6.5 used), then 134 s to draw 8,000, 1.7 GiB, far from converged"),
    "python-synthpop": dict(version="0.1.2", licence="EUPL-1.2", method="a decision tree for each column given all others, at the columns of real patients", studied=True,
                            installs="yes, with pandas 2.3.3",
                            verdict="8,000 x 64: 56 s, 266 MiB; its cost grows with the square of the columns: not tried to the end at 512"),
    "pyvinecopulib": dict(version="1.0.1", licence="MIT", method="vine copula with discrete margins", studied=False, installs="yes",
                          verdict="8,000 x 64: 48 s for one tree, 83 s for three; the choice among all pairs alone would take most of an hour at 512"),
    "pomegranate": dict(version="1.1.2", licence="MIT", method="Bayesian network (Chow-Liu tree)", studied=False, installs="yes",
                        verdict="8,000 x 64: 13 s to fit, then 16 ms a patient to draw, which is minutes for a cohort"),
    "ForestDiffusion": dict(version="1.0.6", licence="MIT", method="diffusion with gradient-boosted trees", studied=False, installs="yes",
                            verdict="8,000 x 64: not done after 2 minutes of a busy core with 10 noise levels; a model for each column and level"),
    "DataSynthesizer": dict(version="0.1.13", licence="MIT", method="Bayesian network (PrivBayes)", studied=False, installs="yes",
                            verdict="8,000 x 64: 3 columns of the greedy network after 2 minutes of a busy core"),
    "realtabformer": dict(version="0.2.4", licence="MIT", method="GPT-2 on rows as text", studied=False, installs="yes", verdict="not run: a token for each cell, on a processor"),
    "be-great": dict(version="0.0.14", licence="MIT", method="pretrained language model on rows as text", studied=False, installs="resolves", verdict="not run: needs pretrained weights"),
    "synthcity": dict(version="0.2.12", licence="Apache-2.0", method="many", studied=False, installs="resolves to torch 2.2.2, NumPy 1.26.4, pandas 2.3.3: 134 packages",
                      verdict="not run: pins of another year"),
    "dpmm": dict(version="0.1.9", licence="Apache-2.0", method="private marginals", studied=False, installs="resolves to NumPy 1.26.4, pandas 2.1.0; Python below 3.12", verdict="not run"),
    "smartnoise-synth": dict(version="1.0.8", licence="MIT", method="private marginals and GANs", studied=False, installs="resolves to pandas 2.3.3 and opacus 0.14.0", verdict="not run"),
    "sdv": dict(version="2.0.0", licence="BUSL-1.1", method="Gaussian copula, CTGAN, TVAE", studied=False, installs="resolves to pandas 2.3.3", verdict="left out: not an open licence"),
}


def arfpy(frame, rows, seed, minutes):
    "One forest that tells the table from shuffled columns, and the density in its leaves; columns of few values are categories, holes a value of their own."
    import numpy as np
    import pandas as pd
    from arfpy import arf
    np.random.seed(seed)
    fine = [c for c in frame if pd.api.types.is_numeric_dtype(frame[c]) and frame[c].nunique() > 40]
    words = frame.astype({c: "str" for c in frame if c not in fine}).astype({c: "category" for c in frame if c not in fine})
    holes = {c: frame[c].isna() for c in fine if frame[c].isna().any()}
    for c, gone in holes.items():                                     # it knows no missing cells: a column of holes, and a number drawn from the rest
        words[c] = words[c].where(~gone, frame[c].dropna().sample(len(frame), replace=True, random_state=seed).to_numpy())
        words[c + ":hole"] = gone.astype("str").astype("category")
    for c in fine: words[c] = words[c].astype("float64")
    forest = arf.arf(words, num_trees=10, max_iters=0, verbose=False, random_state=seed)
    forest.forde()
    began, out = time.perf_counter(), forest.forge(rows)
    out = out.copy()
    for c in holes: out[c] = out[c].where(out.pop(c + ":hole").astype("str") != "True")
    return out[list(frame)], began


def mostlyai_engine(frame, rows, seed, minutes):
    "Its small network, columns in a fixed order, for so many minutes at most."
    from mostlyai.engine import TabularARGN, set_random_state
    set_random_state(seed)
    argn = TabularARGN(model="MOSTLY_AI/Small", enable_flexible_generation=False, max_training_time=minutes, device="cpu", verbose=0)
    argn.fit(frame)
    began = time.perf_counter()
    return argn.sample(n_samples=rows), began


def python_synthpop(frame, rows, seed, minutes):
    "Its trees on codes: categories as whole numbers, and -1 for a hole, which its trees cannot see otherwise."
    import numpy as np
    import pandas as pd
    from synthpop import CARTMethod
    np.random.seed(seed)
    code = {c: pd.factorize(frame[c], sort=True) for c in frame if not pd.api.types.is_numeric_dtype(frame[c])}
    plain = pd.DataFrame({c: code[c][0] if c in code else frame[c].astype("float64").fillna(-1.) for c in frame})
    fine = {c: c not in code and frame[c].nunique() > 40 for c in frame}
    trees = CARTMethod({c: "numerical" if fine[c] else "categorical" for c in frame}, random_state=seed)
    trees.fit(plain)
    began, out = time.perf_counter(), trees.sample(rows)
    for c in frame:
        cells = out[c].astype("float64")
        if c in code: out[c] = pd.Series(np.asarray(code[c][1], dtype=object)[cells.astype(int)], index=out.index).where(cells >= 0)
        elif frame[c].isna().any(): out[c] = cells.where(cells >= 0)
    return out, began


def peer_sample(name, train, n, seed, minutes=None):
    "A peer's synthetic table, and its seconds of fitting and of drawing; values come back as they went in, where the peer kept them."
    import pandas as pd
    python = os.environ.get(f"PEER_{name.upper().replace('-', '_')}", sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "in.parquet", Path(folder) / "out.parquet"
        train.reset_index(drop=True).to_parquet(given)
        done = subprocess.run([python, "-W", "ignore", __file__, name, given, made, str(n), str(seed), str(minutes)], cwd=folder, capture_output=True, text=True)
        if done.returncode: raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1:]}")
        return pd.read_parquet(made), json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    import resource

    import pandas as pd
    name, given, made, rows, seed, minutes = sys.argv[1:]
    frame, started = pd.read_parquet(given), time.perf_counter()
    out, began = {"arfpy": arfpy, "mostlyai-engine": mostlyai_engine, "python-synthpop": python_synthpop}[name](frame, int(rows), int(seed), float(minutes.replace("None", "nan")))
    ended = time.perf_counter()
    out.to_parquet(made)
    print(json.dumps(dict(fit_seconds=round(began - started, 1), sample_seconds=round(ended - began, 1), peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)))
