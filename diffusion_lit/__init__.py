__version__ = "0.1.0"
__doc__ = "Diffusion models as a book that is a library: one sampling loop, three edits."

from importlib import import_module as _import
from ._modidx import d as _index

_modules = {module.rpartition(".")[2]: module for module in _index["syms"]}
_homes = {name[len(module) + 1:]: module for module, names in _index["syms"].items() for name in names}
_names = {name: module for name, module in _homes.items() if "." not in name and not name.startswith("_")}


def __getattr__(name):
    "Load a module, or the module that defines `name`, when it is first used (PEP 562)."
    if name in _modules: return _import(_modules[name])
    if name in _names: return getattr(_import(_names[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__(): return sorted({*globals(), *_modules, *_names})
