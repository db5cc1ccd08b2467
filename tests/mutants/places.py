"""Every way to break one place of an exported cell, found with `ast` and applied as text, so the rest stays as it was.

Not broken, by rule: docstrings, comments, annotations, decorators, imports and other strings (a string default is a
place); what only words an error, a warning or a progress bar (`raise`, `warn`, `print`, `assert`'s message, f-strings,
arguments named in WORDS); and breaks that cannot change a value: swapped arguments of a symmetric function, a dropped
`.contiguous()` or `.item()`, the types asked of `isinstance`, a doubled numerical floor (a constant below 1e-5 becomes
0 or 1), a break whose syntax tree is the original's.
"""
import ast, hashlib, io, json, tokenize
from dataclasses import dataclass
from pathlib import Path

WORDS = {"progress", "desc", "unit", "leave", "verbose", "dynamic_ncols", "stacklevel"}
TALK = {"print", "warn", "warning", "display"}
SYMMETRIC = {"max", "min", "maximum", "minimum", "equal", "allclose", "isclose", "hypot", "promote_types"}
SAME_VALUE = {"__init__", "contiguous", "cpu", "detach", "item", "tolist"}
UNARY_MATHS = {"sqrt", "exp", "log", "log1p", "expm1", "abs", "square", "sin", "cos", "tanh", "sigmoid", "atan"}
BINARY = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.Pow: ("**", "*"),
          ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&")}
COMPARE = {ast.Lt: ("<", ["<=", ">="]), ast.LtE: ("<=", ["<", ">"]), ast.Gt: (">", [">=", "<="]),
           ast.GtE: (">=", [">", "<"]), ast.Eq: ("==", ["!="]), ast.NotEq: ("!=", ["=="]), ast.Is: ("is", ["is not"]),
           ast.IsNot: ("is not", ["is"]), ast.In: ("in", ["not in"]), ast.NotIn: ("not in", ["in"])}


@dataclass(frozen=True)
class Mutant:
    module: str      # name of the module, e.g. "mixture"
    notebook: str    # file name of its notebook
    cell: int        # number of the cell among the notebook's code cells, as nbval counts them
    index: int       # position among all the notebook's cells
    start: int       # characters from the cell's start
    end: int
    new: str         # the text put there
    kind: str        # sign, factor, index, comparison, default, ...
    source: str      # the whole cell, unbroken

    @property
    def broken(self): return self.source[:self.start] + self.new + self.source[self.end:]

    @property
    def id(self):
        program = ast.dump(ast.parse(self.broken))      # as long as the cell's program stays, whatever its comments
        return f"{self.module}-{hashlib.sha1(program.encode()).hexdigest()[:7]}"

    @property
    def diff(self):
        first, last = self.source.rfind("\n", 0, self.start) + 1, self.source.find("\n", self.end)
        tail = len(self.source) - (last if last >= 0 else len(self.source))
        return f"- {self.source[first:len(self.source) - tail]}\n+ {self.broken[first:len(self.broken) - tail]}"


class _Breaks(ast.NodeVisitor):
    "Collect (start, end, new text, kind) for one cell."
    def __init__(self, source):
        self.source, self.found = source, []
        self.lines = [0]
        for line in source.splitlines(keepends=True): self.lines.append(self.lines[-1] + len(line))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.tokens = [(self.lines[t.start[0] - 1] + t.start[1], t.string) for t in tokens
                       if t.type in (tokenize.OP, tokenize.NAME)]
        self.visit(ast.parse(source))

    def at(self, line, col):   # ast counts bytes of UTF-8, text counts characters
        text = self.source[self.lines[line - 1]:self.lines[line]]
        return self.lines[line - 1] + len(text.encode()[:col].decode())

    def span(self, node): return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)
    def text(self, node): return self.source[slice(*self.span(node))]
    def add(self, start, end, new, kind): self.found.append((start, end, new, kind))
    def put(self, node, new, kind): self.add(*self.span(node), new, kind)

    def without_last_name(self, node): return self.text(node).removesuffix(node.attr).rstrip().removesuffix(".")

    def operator(self, left, right, old, news, kind):
        "Replace the operator `old` that stands between two nodes."
        words, a, b = old.split(), self.span(left)[1], self.span(right)[0]
        start = next(p for p, s in self.tokens if a <= p < b and s == words[0])
        last = next(p + len(s) for p, s in self.tokens if start <= p < b and s == words[-1])
        for new in news: self.add(start, last, new, kind)

    def number(self, node, value, kind):
        if isinstance(value, bool): return self.put(node, str(not value), "boolean")
        if isinstance(value, complex) or value != value: return
        tiny = isinstance(value, float) and 0 < abs(value) < 1e-5
        for new in ([0., 1.] if tiny else [-value, value * 2, 0] if value < 0 else [value * 2, value + 1, 0 * value]):
            self.put(node, repr(new), kind)

    # what is left alone
    def visit_Import(self, node): pass
    visit_ImportFrom = visit_Raise = visit_JoinedStr = visit_Import
    def visit_Assert(self, node): self.visit(node.test)
    def visit_arg(self, node): pass
    def visit_keyword(self, node):
        if node.arg not in WORDS: self.generic_visit(node)
    def visit_AnnAssign(self, node):
        if node.value is not None: self.visit(node.value)
    def visit_ClassDef(self, node):
        for n in node.body: self.visit(n)

    # what is broken
    def visit_FunctionDef(self, node):
        self.visit(node.args)
        for n in node.body: self.visit(n)
    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_arguments(self, node):
        plain = node.posonlyargs + node.args
        named = plain[len(plain) - len(node.defaults):] + node.kwonlyargs
        for arg, default in zip(named, node.defaults + node.kw_defaults):
            if default is None or arg.arg in WORDS: continue
            if isinstance(default, ast.Constant) and isinstance(default.value, str):
                self.put(default, repr(default.value + "_"), "default")
            elif isinstance(default, ast.Constant) and isinstance(default.value, (int, float)):
                self.number(default, default.value, "default")
            else: self.visit(default)

    def visit_Constant(self, node):
        if isinstance(node.value, (int, float)): self.number(node, node.value, "constant")

    def visit_UnaryOp(self, node):
        if isinstance(node.op, (ast.USub, ast.Not)):
            if isinstance(node.operand, ast.Constant) and isinstance(node.op, ast.USub):
                return self.number(node, -node.operand.value, "constant")
            self.put(node, self.text(node).removeprefix("-").removeprefix("not"), "sign")
        self.generic_visit(node)

    def visit_BinOp(self, node):
        words = any(isinstance(n, ast.JoinedStr) or isinstance(getattr(n, "value", None), str)
                    for n in (node.left, node.right))
        if type(node.op) in BINARY and not words:
            old, new = BINARY[type(node.op)]
            self.operator(node.left, node.right, old, [new], "sign" if old in "+-" else "factor")
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        if type(node.op) in BINARY:
            old, new = BINARY[type(node.op)]
            self.operator(node.target, node.value, old + "=", [new + "="], "sign" if old in "+-" else "factor")
        self.generic_visit(node)

    def visit_Compare(self, node):
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators):
            old, news = COMPARE[type(op)]
            self.operator(left, right, old, news, "comparison")
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:]): self.operator(left, right, old, [new], "boolean")
        self.generic_visit(node)

    def visit_If(self, node):
        if isinstance(node.test, (ast.Name, ast.Attribute, ast.Call)):
            self.put(node.test, f"not {self.text(node.test)}", "boolean")
        self.generic_visit(node)
    visit_IfExp = visit_While = visit_If

    def visit_Subscript(self, node):
        for i in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            if isinstance(i, ast.Slice):
                for bound in filter(None, (i.lower, i.upper)):
                    if not isinstance(bound, ast.Constant): self.put(bound, f"{self.text(bound)} + 1", "index")
            elif isinstance(i, (ast.Name, ast.Attribute, ast.BinOp)): self.put(i, f"{self.text(i)} + 1", "index")
        self.generic_visit(node)

    def visit_Attribute(self, node):
        if node.attr in ("T", "mT", "H", "mH"): self.put(node, self.without_last_name(node), "transpose")
        self.generic_visit(node)

    def visit_Call(self, node):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in TALK: return
        if name in ("isinstance", "issubclass"): return self.visit(node.args[0])
        whole = isinstance(node.func, ast.Attribute) and not (isinstance(node.func.value, ast.Name)
                                                              and node.func.value.id in ("torch", "np", "math"))
        if whole and not node.args and not node.keywords and name not in SAME_VALUE:
            self.put(node, self.without_last_name(node.func), "call dropped")
        if len(node.args) == 1 and name in UNARY_MATHS and not whole:
            self.put(node, f"({self.text(node.args[0])})", "call dropped")
        if len(node.args) == 2 and name not in SYMMETRIC and not any(isinstance(a, ast.Starred) for a in node.args):
            (a, b), (c, d) = map(self.span, node.args)
            self.add(a, d, self.source[c:d] + self.source[b:c] + self.source[a:b], "arguments swapped")
        for key in node.keywords:
            if key.arg == "dim" and self.text(key.value) != "0": self.put(key.value, "0", "index")
        self.generic_visit(node)


def differs(source, mutated):
    "Whether the mutated cell is Python, and another program."
    try: return ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source))
    except SyntaxError: return False


def mutants_of(notebook: Path):
    "All mutants of a notebook, and the number of exported lines of code."
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    sources = ["".join(c["source"]) for c in cells]
    default = [s.split("default_exp")[1].split()[0] for s in sources if s.lstrip().startswith("#| default_exp")]
    found, lines, number = {}, 0, -1
    for index, (cell, source) in enumerate(zip(cells, sources)):
        if cell["cell_type"] != "code": continue
        number += 1
        head = [line.split()[1] for line in source.splitlines() if line.startswith("#|") and len(line.split()) > 1]
        if not default or not {"export", "exporti", "exports"} & set(head): continue
        lines += sum(1 for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#"))
        for start, end, new, kind in _Breaks(source).found:
            m = Mutant(default[0], notebook.name, number, index, start, end, new, kind, source)
            if differs(source, m.broken): found.setdefault(m.broken, m)
    return list(found.values()), lines
