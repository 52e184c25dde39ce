"""
The rooms of `trl_ext` and who may import whom, read from the source without importing it.

`test_rooms.py` holds the code to it, and `.ci/docs` draws it.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trl_ext"

# Rooms that every other one may import.
GROUND = ("_version", "_paths", "_secrets", "_checks", "_trl", "_patches")
STEP = (*GROUND, "losses", "kernels", "training", "judges")
PAIRED = (*GROUND, "losses", "training", "preference")
ROLLOUT = (*GROUND, "losses", "kernels", "training", "judges")
DIFFUSION = (*GROUND, "losses", "training")

# Room -> the rooms that it may import, from the ground floor up: each only names rooms above its own line.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "_version": (),
    "_paths": (),
    "_trl": (),
    "_patches": (),
    "_secrets": (),
    "_checks": ("_secrets",),
    "losses": ("_checks",),
    "kernels": ("_checks",),
    "training": (*GROUND, "losses", "kernels"),
    "judges": (*GROUND, "losses", "kernels", "training"),
    "preference": STEP,
    "fdpo": PAIRED,
    "tdpo": PAIRED,
    "mallows": PAIRED,
    "rainbowpo": PAIRED,
    "simper": PAIRED,
    "d2po": (*PAIRED, "judges"),
    "rollout": ROLLOUT,
    "dph_rl": (*ROLLOUT, "rollout"),
    "fdpg": (*ROLLOUT, "rollout"),
    "wro": (*ROLLOUT, "rollout"),
    "mixing": (*GROUND, "losses", "training"),
    "diffusion": (*DIFFUSION, "judges"),
    "diffusion_dpo": (*DIFFUSION, "diffusion"),
    "dspo": (*DIFFUSION, "diffusion"),
    "score_as_action": (*DIFFUSION, "diffusion"),
    "evaluation": STEP,
}
# The doors: they import everything, but only once a command has been chosen.
LAZY = ("__main__", "cli", "launch")


@dataclass(frozen=True)
class Import:
    """One imported name: where it stands and what it asks for."""

    path: Path  # the importing file
    line: int
    module: str  # absolute name of the module that is imported from
    name: str | None  # the imported name, None for `import module`
    is_lazy: bool  # inside a function, so that importing the file does not import it

    @property
    def source(self) -> str:
        """The importing module, below the package: `d2po.window`."""
        return ".".join(self.path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")

    @property
    def room(self) -> str:
        return room_of_path(self.path)

    @property
    def target(self) -> str | None:
        """
        The room of this package that is imported from, `""` for the package's own lazy names, None for a library.
        """
        package, *parts = self.module.split(".")
        if package != "trl_ext":
            return None
        if parts:
            return parts[0]
        is_room = self.name is not None and ((PACKAGE / self.name).is_dir() or (PACKAGE / f"{self.name}.py").exists())
        return self.name if is_room else "" if self.name != "__version__" else "_version"


def room_of_path(path: Path) -> str:
    """`trl_ext/d2po/window.py` is in `d2po`, `trl_ext/_trl.py` in `_trl`, `trl_ext/__init__.py` in none (`""`)."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py").removesuffix("__init__")


def rooms() -> list[str]:
    """The rooms that exist, in the order of the table; those that it does not know come last."""
    found = {room_of_path(path) for path in files()} - {""}
    return sorted(found, key=lambda room: [*MAY_IMPORT, *LAZY, room].index(room))


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, wherever in it, and `importlib.import_module` of a constant name."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    lazy = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        is_lazy = id(node) in lazy
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, None, is_lazy)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = ("trl_ext", *path.relative_to(PACKAGE).parts[:-1])
                base = parts[: len(parts) - node.level + 1]
                module = ".".join([*base, module] if module else base)
            for alias in node.names:
                yield Import(path, node.lineno, module, alias.name, is_lazy)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if isinstance(name, str):
                yield Import(path, node.lineno, name, None, is_lazy)


def edges() -> dict[tuple[str, str], list[Import]]:
    """(importing room, imported room) -> the imports, of different rooms."""
    found: dict[tuple[str, str], list[Import]] = {}
    for path in files():
        for item in imports(path):
            if item.target not in (None, item.room):
                found.setdefault((item.room, item.target), []).append(item)
    return found
