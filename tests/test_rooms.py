"""
Who imports whom: each room only from below, methods never from each other, TRL's inner names through `_trl.py` alone.
"""

import ast
import re

import pytest
import rooms


# Imports (module, room) that the table does not allow and that are still there. It only gets shorter, and ends empty.
REMAINING: set[tuple[str, str]] = set()


def forbidden() -> dict[tuple[str, str], str]:
    """(module, room) -> where it stands."""
    found = {}
    for (room, target), items in rooms.edges().items():
        if room in ("", *rooms.LAZY) or target in rooms.MAY_IMPORT[room]:
            continue
        for item in items:
            found[item.source, target] = f"{item.path.relative_to(rooms.ROOT)}:{item.line}"
    return found


def test_every_room_is_in_the_table():
    assert set(rooms.rooms()) <= {*rooms.MAY_IMPORT, *rooms.LAZY}


def test_table_only_names_rooms_above():
    order = list(rooms.MAY_IMPORT)
    for room, allowed in rooms.MAY_IMPORT.items():
        assert all(order.index(other) < order.index(room) for other in allowed), room


def test_imports_follow_the_table():
    found = forbidden()
    unknown = {key: place for key, place in found.items() if key not in REMAINING}
    lines = [f"{place}: `{module}` imports `{target or 'trl_ext'}`" for (module, target), place in unknown.items()]
    assert not lines, "\n".join(lines)
    assert set(found) >= REMAINING, f"no longer needed, remove from REMAINING: {sorted(REMAINING - set(found))}"


@pytest.mark.parametrize(
    "leaf",
    [
        "fdpo",
        "tdpo",
        "mallows",
        "rainbowpo",
        "simper",
        "diffusion_dpo",
        "dspo",
        "score_as_action",
        "dph_rl",
        "fdpg",
        "wro",
    ],
)
def test_leaves_fit_on_a_screen(leaf):
    assert len((rooms.PACKAGE / leaf / f"{leaf}_trainer.py").read_text(encoding="utf-8").splitlines()) < 150


def test_doors_import_rooms_lazily():
    """`trl-ext --help` must not wait for torch."""
    for (room, target), items in rooms.edges().items():
        if room in rooms.LAZY and target not in (*rooms.GROUND, *rooms.LAZY):
            assert all(item.is_lazy for item in items), f"{room} imports {target} at its top level"


def test_trl_is_imported_from_its_top_level():
    """What `trl` does not export is imported in `_trl.py` alone."""
    import trl

    exported = set(trl.__all__) | {"__version__"}
    for path in [*rooms.files(), *sorted((rooms.ROOT / "recipes").rglob("*.py"))]:
        if path == rooms.PACKAGE / "_trl.py":
            continue
        place = path.relative_to(rooms.ROOT)
        if path.is_relative_to(rooms.PACKAGE):
            found = [(item.module, item.name, item.line) for item in rooms.imports(path)]
        else:
            found = outside(path)
        for module, name, line in found:
            assert not module.startswith("trl."), f"{place}:{line} imports from {module}"
            assert module != "trl" or name is None or name in exported, f"{place}:{line}: trl does not export {name}"
        for name in re.findall(r"(?<![\w.`\"'/\-])trl\.(\w+)", "\n".join(code_of(path))):
            assert name in exported, f"{place}: trl does not export {name}"


def outside(path) -> list[tuple[str, str | None, int]]:
    """Imports (module, name, line) of a file outside the package."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name, node.lineno) for alias in node.names]
    return found


def code_of(path) -> list[str]:
    """The attributes `a.b.c` of a file, without its strings and comments."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]


def test_recipes_use_public_names():
    """No private module or name; the benchmarks alone compare with inner parts."""
    for path in sorted((rooms.ROOT / "recipes").rglob("*.py")):
        if path.parent.name == "benchmarks":
            continue
        for module, name, line in outside(path):
            private = any(part.startswith("_") for part in [*module.split("."), name or ""]) and name != "__version__"
            is_own = module.partition(".")[0] == "trl_ext"
            assert not (is_own and private), f"{path.relative_to(rooms.ROOT)}:{line} imports {module}.{name}"


@pytest.mark.parametrize(
    "source, expected",
    [
        ("from ..preference import X", {"preference"}),
        ("from .. import __version__", {"_version"}),
        ("from .. import FDPOConfig", {""}),
        ("from .. import losses", {"losses"}),
        ("import trl_ext.d2po.window", {"d2po"}),
        ("def f():\n    from trl_ext.losses.tdpo import tdpo_loss", {"losses"}),
        ("import importlib\nimportlib.import_module('trl_ext.d2po')", {None, "d2po"}),
        ("from .window import Window", {"mallows"}),
        ("from torch import nn", {None}),
    ],
)
def test_imports_are_read(source, expected, tmp_path, monkeypatch):
    path = rooms.PACKAGE / "mallows" / "not_there.py"
    monkeypatch.setattr(type(path), "read_text", lambda self, encoding=None: source)
    found = list(rooms.imports(path))
    assert {item.target for item in found} == expected
    assert [item.is_lazy for item in found][-1:] == [source.startswith("def")]
