"""Render nbdev notebooks as pages: directives become tags and captions, names become links, docments become fields."""
import inspect
import json
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from fastcore.docments import docments

LIBRARY = Path(__file__).parents[1] / "diffusion_lit"
DIRECTIVE = re.compile(r"\s*#\s*\|\s*([\w-]+):?\s*(.*)$")
MARKER = re.compile(r"\s*#\s*NBVAL_\w+\s*$")
CODE = re.compile(r"(?<![\\}`\[])`([A-Za-z_][\w.]*)(\(\))?`(?!`)")
ONLINE = re.compile(r'\s*(<link rel="preload" as="font"[^>]*>|<script>const THEBE_JS_URL[^<]*</script>'
                    r'|<script[^>]*sphinx-thebe.js[^>]*></script>)')
TAGS = {"hide": "remove-cell", "default_exp": "remove-cell", "hide_input": "remove-input",
        "hide_output": "remove-output", "export": "export"}
FIGURE, IMAGE = {"label": "name", "fig-cap": "caption"}, {"fig-alt": "alt", "fig-width": "width"}


@cache
def modules():
    "The generated modules in the order of their notebooks."
    home = {path.stem: re.search(r"File to edit: (\S+)\.$", path.read_text(), re.M) for path in LIBRARY.glob("*.py")}
    return sorted((name for name in home if home[name]), key=lambda name: home[name][1])


@cache
def targets():
    "What a name in backticks links to: `sample`, `sampler.sample`, `sampler`; a method only with its class, and no one-letter symbol."
    from diffusion_lit._modidx import d
    full = {f"diffusion_lit.{name}" for name in modules()}
    full |= {name for names in d["syms"].values() for name in names if not re.search(r"\._", name)}
    found = {}
    for parts in sorted((name.split(".") for name in full), key=len):
        for i in range(min(len(parts), 3)): found[".".join(parts[i:])] = ".".join(parts)
    return {name: target for name, target in found.items() if len(name) > 2}


def link(text):
    "Turn `name` into a link to its entry on the API page, outside code fences and headings."
    lines, fence = [], None
    for line in text.splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and (fence is None or line.strip() == fence): fence = mark[1] if fence is None else None
        if fence is None and not mark and not line.startswith("#"):
            line = CODE.sub(lambda m: f"{{py:obj}}`{m[1]}{m[2] or ''} <{targets()[m[1]]}>`" if m[1] in targets() else m[0], line)
        lines.append(line)
    return "\n".join(lines)


def render_code(cell):
    "Move a code cell's directives from its source to its metadata."
    lines, found = [line for line in "".join(cell["source"]).splitlines() if not MARKER.match(line)], {}
    while lines and (m := DIRECTIVE.match(lines[0])): found[m[1]], lines = m[2], lines[1:]
    cell["source"] = "\n".join(lines)
    for kind, names in (("figure", FIGURE), ("image", IMAGE)):
        if options := {names[k]: link(v) if k == "fig-cap" else v for k, v in found.items() if k in names}:
            cell["metadata"].setdefault("mystnb", {})[kind] = options
    cell["metadata"]["tags"] = sorted({*cell["metadata"].get("tags", []), *(TAGS[k] for k in found if k in TAGS)})


def source_read(app, docname, source):
    "Rewrite a page before it is parsed; the file itself stays what nbdev and Jupyter know."
    if not docname.startswith("nbs/"): return
    app.env.note_dependency(str(LIBRARY / "_modidx.py"))
    if app.env.doc2path(docname).endswith(".ipynb"):
        nb = json.loads(source[0])
        for cell in nb["cells"]:
            if cell["cell_type"] == "code": render_code(cell)
            else: cell["source"] = link("".join(cell["source"]))
        source[0] = json.dumps(nb)
    else: source[0] = link(source[0]).replace("{{ modules }}", api())


def api():
    "The body of the API page."
    return "\n\n".join(f"## {name}\n\n```{{eval-rst}}\n.. automodule:: diffusion_lit.{name}\n"
                       "   :members:\n   :undoc-members:\n   :special-members: __call__\n   :no-value:\n```" for name in modules())


def rst(text, own=()):
    "A docstring's Markdown (`code`, $math$) in reStructuredText, nothing else special; a function's own parameters are no links."
    def piece(part):
        if part.startswith("$"): return f"\\ :math:`{part.strip('$')}`\\ "
        if not part.startswith("`"): return re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part)
        name = part.strip("`")
        return rf"\ :py:obj:`{name} <{targets()[name]}>`\ " if name in targets() and name not in own else rf"\ ``{name}``\ "
    return "".join(map(piece, re.split(r"(`+[^`]+`+|\$[^$]+\$)", text)))


def docstring(app, what, name, obj, options, lines):
    "Docstrings in Markdown, and docments as a table of parameters."
    comments = {}
    if inspect.isroutine(obj) or inspect.isclass(obj):
        with suppress(OSError, SyntaxError, TypeError):         # no source to read comments from
            comments = docments(obj, full=True, returns=what != "class")
    said = {k: v["docment"] for k, v in comments.items() if v.get("docment")}
    fields = [f":{'returns' if k == 'return' else f'param {k}'}: {' '.join(v.split())}" for k, v in said.items()]
    lines[:] = [rst(line, comments) for line in lines + [""] * bool(fields) + fields]


def offline(app, exception):
    "Drop what a page opened from the disk cannot use: font preloads (refused there) and the launcher of remote kernels."
    for page in Path(app.outdir).glob("**/*.html") if app.builder.format == "html" else ():
        page.write_text(ONLINE.sub("", page.read_text()))


def setup(app):
    app.connect("source-read", source_read)
    app.connect("build-finished", offline)
    app.connect("autodoc-process-docstring", docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
