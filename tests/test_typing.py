"""
What a type checker and an editor see of the public names: classes and functions with typed arguments, never `Any`.
"""

import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import trl_ext


api = pytest.importorskip("mypy.api")
ROOT = Path(__file__).parents[1]
PACKAGES = [
    "trl_ext",
    *(f"trl_ext.{module.name}" for module in pkgutil.iter_modules(trl_ext.__path__) if module.ispkg),
]
# How `reveal_type` begins for a class or function, for overloads, and for a number, text or table.
KINDS = ("def ", "Overload", "builtins.", "dict[str, type[trl_ext.", "Module", "types.")


def public_names(package):
    return sorted(set(getattr(importlib.import_module(package), "__all__", ())) - {"__version__"})


PUBLIC = {f"{package}.{name}": (package, name) for package in PACKAGES for name in public_names(package)}


@pytest.fixture(scope="module")
def revealed(tmp_path_factory):
    """`{"trl_ext.FDPOTrainer": "def (model: ...) -> ...", ...}` of all public names, from one run of mypy."""
    folder = tmp_path_factory.mktemp("typing")
    lines = [f"import {package}" for package in PACKAGES] + [f"reveal_type({path})" for path in PUBLIC]
    (folder / "user.py").write_text("\n".join(lines) + "\n")
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(folder / "cache")]
    options += ["--follow-imports", "silent", "--python-executable", sys.executable]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", str(ROOT))
        output, errors, _ = api.run([*options, str(folder / "user.py")])
    found = dict(re.findall(r'user\.py:(\d+): note: Revealed type is "(.*)"', output))
    assert len(found) == len(PUBLIC), output + errors
    return {path: found[str(number)] for number, path in enumerate(PUBLIC, start=len(PACKAGES) + 1)}


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_resolved(package, revealed):
    for path in (path for path in PUBLIC if PUBLIC[path][0] == package):
        kind, name = revealed[path], path.rpartition(".")[2]
        assert kind.startswith(KINDS), f"{path}: {kind}"
        if name.endswith(("Trainer", "Config")):
            assert "-> trl_ext." in kind and kind.endswith(f".{name}"), f"{path}: {kind}"


@pytest.mark.parametrize("package", PACKAGES)
def test_arguments_are_typed(package):
    """Functions and constructors of this library declare the type of every argument; trainers take no `**kwargs`."""
    for name in public_names(package):
        value = getattr(importlib.import_module(package), name)
        function = inspect.getattr_static(value, "__init__", None) if inspect.isclass(value) else value
        if not inspect.isfunction(function) or not function.__module__.startswith("trl_ext."):
            continue  # a constant, a named tuple, or a constructor that is inherited from another library
        arguments = list(inspect.signature(function).parameters.values())[inspect.isclass(value) :]
        untyped = [argument.name for argument in arguments if argument.annotation is inspect.Parameter.empty]
        assert not untyped, f"{package}.{name}: {untyped}"
        if name.endswith("Trainer") and package == "trl_ext":
            kinds = {argument.kind for argument in arguments}
            assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}, name
