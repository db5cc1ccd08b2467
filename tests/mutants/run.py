"""Break the library one place at a time and see who notices: `python tests/mutants/run.py --number 60 --seed 1`.

Run by hand (pytest does not collect it). The repository is copied once and must pass unbroken; then, for every mutant,
a fresh copy gets the break in its notebook, `nbdev_export` carries it to the module, and three juries sit in turn until
one objects: the chapter's own notebook (`pytest --nbval -x`), the later notebooks that import the module, directly or
not, and tests/ (without what judges the book's form). What runs too long counts as noticed, in a column of
its own. `--only ID` runs a mutant again; identifiers last as long as the program in the cell.
"""
import argparse, collections, filecmp, json, os, random, re, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from places import mutants_of

LIB, ROOT = "diffusion_lit", Path(__file__).resolve().parents[2]
NOT_A_JURY = ("test_book", "test_browser", "test_notebooks")      # these judge the page and the form of its sources,
FORM = "not exporting_and_cleaning"                               # and so does this one, by its name
JURIES = ("own", "later", "tests")


def draw(mutants, lines, number, seed):
    "Every module gets its share by exported lines, at least half an even share; first a place is drawn, then a break."
    lines = {m: n for m, n in lines.items() if mutants[m]}
    least = number // (2 * len(lines))
    exact = {m: least + (number - least * len(lines)) * n / sum(lines.values()) for m, n in lines.items()}
    share = {m: int(x) for m, x in exact.items()}
    for m in sorted(exact, key=lambda m: share[m] - exact[m])[:number - sum(share.values())]: share[m] += 1
    drawn = []
    for module in lines:
        dice, places = random.Random(f"{seed} {module}"), collections.defaultdict(list)
        for m in mutants[module]: places[m.cell, m.start, m.end].append(m)
        picked = dice.sample(sorted(places), min(share[module], len(places)))
        drawn += [dice.choice(places[p]) for p in picked]
    return drawn


def copy(root, to):
    "Copy what git knows or would add."
    git = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    for name in filter(None, subprocess.run(git, cwd=root, stdout=subprocess.PIPE, text=True).stdout.split("\0")):
        if not (root / name).is_file() or name.startswith("tests/mutants"): continue
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, to / name)
    return to


def command(args, root, timeout=None):
    "Run in the copy, with the copy's package first on the path. Returns exit code (None: killed for time) and output."
    env = os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    with tempfile.TemporaryFile("w+") as out:
        p = subprocess.Popen(args, cwd=root, env=env, stdout=out, stderr=subprocess.STDOUT)
        try: code = p.wait(timeout)
        except subprocess.TimeoutExpired:
            for q in [*psutil.Process(p.pid).children(recursive=True), p]: q.kill()    # kernels lead their own groups
            p.wait()
            code = None
        out.seek(0)
        return code, out.read()


def export(root):
    code, out = command([str(Path(sys.executable).with_name("nbdev_export"))], root)
    if code: raise SystemExit(f"nbdev_export failed:\n{out}")


def changed(a, b):
    "Names of the package's files that differ between two copies."
    names = [p.relative_to(a) for p in (a / LIB).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return [str(n) for n in names if not filecmp.cmp(a / n, b / n, shallow=False)]


def jury(root, notebook):
    "The three lists of files that judge a notebook's module."
    books = sorted(p for p in (root / "nbs").glob("[0-9]*.ipynb"))
    uses = {p.name: set(re.findall(rf"{LIB}\.(\w+)|{LIB} import (\w+)", p.read_text(encoding="utf8"))) for p in books}
    uses = {n: {a or b for a, b in u} for n, u in uses.items()}
    touched, later = {notebook.split("_", 1)[1].removesuffix(".ipynb")}, []
    for p in books:
        if p.name > notebook and uses[p.name] & touched:
            touched.add(p.stem.split("_", 1)[1])
            later.append(f"nbs/{p.name}")
    tests = [p for p in sorted((root / "tests").glob("test_*.py")) if not p.stem.startswith(NOT_A_JURY)]
    return dict(own=[f"nbs/{notebook}"], later=later, tests=[f"tests/{p.name}" for p in tests])


def judge(root, files, timeout=None):
    "Run pytest on some files, stop at the first failure. Returns (passed, who, why)."
    if not files: return True, "", ""
    flags = ["-x", "-n0", "-rfE", "--tb=short", "--color=no", "--nbval-cell-timeout=1000"]     # `timeout` is the clock
    if files[0].startswith("tests/"): flags += ["-k", FORM]
    code, out = command([sys.executable, "-m", "pytest", *flags, *files], root, timeout)
    if code == 0: return True, "", ""
    if code is None: return False, "time limit", "timeout"
    out = re.sub(r"\x1b\[[0-9;]*m", "", out)
    who = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", out, re.M)
    why = re.findall(r"^(?:E +)?(\w*(?:Error|Exception|Interrupt|Exit|Warning|Failed)\b(?:: .*)?)$", out, re.M)
    return False, (who or [out[-1500:]])[0], why[-1][:160] if why else "output differs"


def trial(m, base, limits, depth):
    "Break one place in a fresh copy and ask the juries."
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        root = Path(folder)
        shutil.copytree(base, root, dirs_exist_ok=True)
        path = root / "nbs" / m.notebook
        book = json.loads(path.read_text(encoding="utf8"))
        cell = book["cells"][m.index]
        assert "".join(cell["source"]) == m.source
        cell["source"] = m.broken.splitlines(keepends=True)
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
        export(root)
        assert changed(base, root) == [f"{LIB}/{m.module}.py"], f"{m.id} changed {changed(base, root)}"
        code, out = command([sys.executable, "-c", f"import {LIB}; print({LIB}.__file__)"], root)
        assert out.split()[-1].startswith(str(root.resolve())), f"the tests would import {out}"
        by, who, why = "survived", "", ""
        for name in JURIES[:depth]:
            passed, who, why = judge(root, jury(root, m.notebook)[name], limits.get((m.notebook, name)))
            if not passed:
                by = "timeout" if why == "timeout" else name
                break
    return dict(id=m.id, module=m.module, kind=m.kind, cell=m.cell, diff=m.diff, by=by, who=who, why=why,
                seconds=round(time.time() - began, 1))


def table(results):
    columns = ["own", "later", "tests", "timeout", "survived"]
    print(f"\n{'module':12}{'drawn':>7}" + "".join(f"{c:>10}" for c in columns) + f"{'noticed':>10}")
    for module in [*dict.fromkeys(r["module"] for r in results), "all"]:
        rows = [r for r in results if module in (r["module"], "all")]
        count = collections.Counter(r["by"] for r in rows)
        print(f"{module:12}{len(rows):7}" + "".join(f"{count[c]:10}" for c in columns)
              + f"{100 * (1 - count['survived'] / len(rows)):9.1f}%")
    noticed = [r for r in results if r["by"] in JURIES]
    checks = sum(r["why"].startswith(("AssertionError", "output differs", "Failed")) for r in noticed)
    print(f"of the {len(noticed)} that a jury noticed in time, {checks} failed a check, the rest an error")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--number", type=int, default=60)
    p.add_argument("--modules", nargs="*", help="these modules (default: all but the page's own tool, 00)")
    p.add_argument("--only", nargs="*", help="run these mutants (identifiers)")
    p.add_argument("--list", action="store_true", help="print the mutants drawn and stop")
    p.add_argument("--all", action="store_true", help="every mutant there is, instead of a draw")
    p.add_argument("--own", action="store_true", help="ask only the chapter's own notebook")
    p.add_argument("--trust", action="store_true", help="do not run the unbroken copy first")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--timeout", type=float, help="seconds a jury may take (default: 3 times the unbroken run, plus 60)")
    p.add_argument("--json", type=Path, help="write the results there, after every mutant")
    p.add_argument("--root", type=Path, default=ROOT, help="the repository")
    a = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="unbroken-") as folder:
        base = copy(a.root.resolve(), Path(folder))
        if not a.list: export(base)
        mutants, lines = {}, {}
        for notebook in sorted((base / "nbs").glob("[0-9]*.ipynb")):
            found, n = mutants_of(notebook)
            module = found[0].module if found else ""
            wanted = module in a.modules if a.modules else notebook.name > "01"
            if found and wanted: mutants[module], lines[module] = found, n
        every = [m for ms in mutants.values() for m in ms]
        if not every: raise SystemExit("no exported cell to break")
        print(f"{len(every)} mutants in", ", ".join(f"{k} ({len(v)}, {lines[k]} lines)" for k, v in mutants.items()))
        chosen = every if a.all else draw(mutants, lines, a.number, a.seed)
        if a.only: chosen = [m for m in every if m.id in a.only]
        if gone := set(a.only or []) - {m.id for m in chosen}: raise SystemExit(f"no such mutant any more: {gone}")
        if a.list:
            for m in chosen: print(f"{m.id}  cell {m.cell}, {m.kind}\n{m.diff}")
            return
        if stale := changed(base, a.root.resolve()): print("the package was not current; exported again:", *stale)
        depth, limits = 1 if a.own else 3, {}
        juries = {(m.notebook, name): jury(base, m.notebook)[name] for m in chosen for name in JURIES[:depth]}
        def unbroken(file):
            with tempfile.TemporaryDirectory(prefix="whole-") as other:
                began, root = time.time(), shutil.copytree(base, other, dirs_exist_ok=True)
                return *judge(Path(root), [file]), time.time() - began
        with ThreadPoolExecutor(a.workers) as pool:
            if not a.trust:
                files, took = sorted({f for v in juries.values() for f in v}), {}
                for file, (passed, who, why, took[file]) in zip(files, pool.map(unbroken, files)):
                    if not passed: raise SystemExit(f"unbroken, {file} fails: {who}: {why}")
                    print(f"unbroken: {file} passes in {took[file]:.0f} s", flush=True)
                limits = {k: 3 * sum(took[f] for f in v) + 60 for k, v in juries.items()}
            if a.timeout: limits = {k: a.timeout for k in juries}
            results = []
            for r in pool.map(lambda m: trial(m, base, limits, depth), chosen):
                results.append(r)
                print(f"{r['id']:18}{r['by']:9}{r['seconds']:6.0f} s  {r['who']}  {r['why']}", flush=True)
                if r["by"] == "survived": print(r["diff"], flush=True)
                record = dict(seed=a.seed, number=a.number, results=results)
                if a.json: a.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
        table(results)


if __name__ == "__main__": main()
