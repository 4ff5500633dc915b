"""Expressions such as "Marina(Correlated(scale='own'), p=0.1)": parsed, never evaluated as code.

A name must be a known class; arguments are literals, further such expressions, or tuples
of either. `compact` is the way back.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from shoal import compressors, methods, problems
from shoal.core import Compressor, Method, Problem
from shoal.errors import ConfigError


def known_names(files: Iterable[str] = ()) -> dict[str, type]:
    """The library's compressors, methods and problems, and those of the user's files (which are run: trusted code)."""
    names: dict[str, type] = {}
    for module in (compressors, methods, problems):
        names |= {name: getattr(module, name) for name in module.__all__ if isinstance(getattr(module, name), type)}
    for file in files:
        found = _load(file)
        if taken := sorted(names.keys() & found.keys()):
            raise ConfigError(f"--with {file}: {', '.join(taken)} is a name that is already taken; choose another.")
        names |= found
    return names


def module_of(path: Path, called: str) -> ModuleType:
    """A Python file as a module, run once a process. Raises ConfigError, `called` first, where it does not run."""
    name = f"shoal_file_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{called} does not run: {type(error).__name__}: {error}") from error
    return module


def _load(file: str) -> dict[str, type]:
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"--with {file}: not a Python file.")
    module = module_of(path, f"--with {file}: it")
    own = {k: v for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__}
    found = {k: v for k, v in own.items() if issubclass(v, Compressor | Method | Problem)}
    if not found:
        raise ConfigError(f"--with {file}: it defines no Compressor, Method or Problem.")
    return found


def parse(text: str, names: dict[str, type], kind: type) -> Any:
    """The object that an expression describes. Raises ConfigError, in one line, for anything else."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{text!r} is not an expression such as 'Marina(RandK(10), p=0.1)': {error}.") from None
    made = _build(tree, names, text)
    if not isinstance(made, kind):
        raise ConfigError(f"{text!r} is {type(made).__name__}, not a {kind.__name__.lower()}{_mend(made, kind)}.")
    return made


def _mend(made: Any, kind: type) -> str:
    return f"; wrap it, e.g. 'Marina({compact(made)})'" if kind is Method and hasattr(made, "ab") else ""


def _build(node: ast.expr, names: dict[str, type], text: str) -> Any:
    if isinstance(node, ast.Name):
        return _call(node.id, [], {}, names, text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(k.arg is None for k in node.keywords):
            raise ConfigError(f"{text!r}: ** is not allowed in an expression.")
        repeated = len({k.arg for k in node.keywords}) < len(node.keywords)
        if repeated:
            raise ConfigError(f"{text!r}: an argument is given twice.")
        positional = [_argument(a, names, text) for a in node.args]
        keywords = {str(k.arg): _argument(k.value, names, text) for k in node.keywords}
        return _call(node.func.id, positional, keywords, names, text)
    raise ConfigError(f"{text!r}: only names, calls of names and literals are allowed, as in 'Marina(RandK(10))'.")


def _argument(node: ast.expr, names: dict[str, type], text: str) -> Any:
    if isinstance(node, ast.Name | ast.Call):
        return _build(node, names, text)
    if isinstance(node, ast.Tuple | ast.List):
        elements = [_argument(element, names, text) for element in node.elts]
        return tuple(elements) if isinstance(node, ast.Tuple) else elements
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        piece = ast.get_source_segment(text.strip(), node)  # unlike `unparse`, it does not recurse into deep nests
        raise ConfigError(f"{text!r}: {piece!r} is neither a literal nor a known name.") from None


def _call(name: str, args: list[Any], kwargs: dict[str, Any], names: dict[str, type], text: str) -> Any:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5) or [
            known for known in names if known.lower() == name.lower()
        ]
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{text!r}: unknown name {name!r}.{hint} `shoal list` shows all names.")
    try:
        return names[name](*args, **kwargs)
    except ConfigError:
        raise
    except Exception as error:  # a class of the user's may raise anything
        _check_call(names[name], args, kwargs, text)
        raise ConfigError(f"{text!r}: {error}.") from error


def _check_call(made: type, args: list[Any], kwargs: dict[str, Any], text: str) -> None:
    """Raise ConfigError, with the parameters there are, where these arguments do not fit them."""
    try:
        signature = inspect.signature(made)
    except (TypeError, ValueError):  # a class of the user's may have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "no parameters"
        raise ConfigError(f"{text!r}: {error}; {made.__name__} takes {known}.") from None


def compact(value: Any) -> str:
    """The shortest expression that gives an equal object: defaults are left out."""
    if isinstance(value, tuple):
        return f"({', '.join(map(compact, value))}{',' if len(value) == 1 else ''})"
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    shown = []
    for f in fields(value):
        if not f.init or not f.repr:
            continue
        current = getattr(value, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if default is MISSING and not f.kw_only:
            shown.append(compact(current))
        elif current != default:
            shown.append(f"{f.name}={compact(current)}")
    return f"{type(value).__name__}({', '.join(shown)})"
