"""How a study keeps its results: a JSON file of independent cells, each written as it ends, so that a study can be stopped and resumed."""
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def processor():
    "The name of the processor, where the system tells it."
    try: return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration): return platform.processor() or platform.machine()


def record(study, cell, compute, packages=("torch",), **settings):
    "The result of compute(**settings), from results/STUDY.json if the cell was done before with these settings."
    path = RESULTS / f"{study}.json"
    read = lambda: json.loads(path.read_text()) if path.exists() else {}
    done = read()
    if cell in done and done[cell]["settings"] == json.loads(json.dumps(settings)): return done[cell]["result"]
    began = time.perf_counter()
    result = compute(**settings)
    done = read()                                                   # again: another run may have written its cells in the meantime
    done[cell] = dict(settings=settings, result=result, seconds=round(time.perf_counter() - began, 1), hardware=f"{processor()}, {os.cpu_count()} cores",
                      versions={name: version(name) for name in packages} | dict(python=platform.python_version()))
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")
    os.replace(part, path)
    return result
