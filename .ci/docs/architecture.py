"""The page on the architecture: a drawing and a table of the rooms, from the imports that are really there."""

import ast
import sys
from html import escape
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import rooms  # noqa: E402


WIDTH, ROOM, HEIGHT, GAP = 960, 118, 46, 62
HIDDEN = ("_version",)


def page() -> str:
    return f"""# Architecture

{TEXT}

{drawing()}

An arrow leads from a room to one that it imports. The drawing leaves out what a room also reaches through another one,
as well as `_trl`, `_patches` and `_checks`, which most rooms import, and the command line, which imports all; the
table below has everything.

{table()}
"""


TEXT = """To add a method, write a leaf: a configuration, a trainer that declares what it needs and which loss it
calls, and the loss as a pure function. Everything else is shared, in rooms that import only from the rooms above them
in the table. `tests/test_rooms.py` holds the code to that; this page is drawn from the same imports when the site is
built."""


def graph(without: tuple[str, ...] = (), only_down: bool = False) -> dict[str, set[str]]:
    """Room -> the rooms that it imports; with `only_down`, of those above it in the table."""
    order = [room for room in rooms.rooms() if room not in without]
    found = {room: set() for room in order}
    for room, target in rooms.edges():
        if room in found and target in found and not (only_down and order.index(target) > order.index(room)):
            found[room].add(target)
    return found


def reaches(edges: dict[str, set[str]], start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        for target in edges[todo.pop()] - seen:
            seen.add(target)
            todo.append(target)
    return seen


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without what is reached through another room anyhow."""
    return {
        room: {t for t in targets if not any(t in reaches(edges, other) for other in targets - {t})}
        for room, targets in edges.items()
    }


def levels(edges: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by the longest way down to the ground."""
    depth: dict[str, int] = {}
    for room in edges:  # in the table's order, in which what is imported comes first
        depth[room] = 1 + max((depth[target] for target in edges[room]), default=-1)
    return [[room for room in edges if depth[room] == level] for level in range(max(depth.values()) + 1)]


def drawing() -> str:
    edges = reduced(graph(without=(*rooms.GROUND, *rooms.LAZY), only_down=True))
    rows = levels(edges)
    place = {}
    for level, row in enumerate(rows):
        if level:  # near what they import
            row.sort(key=lambda room: sum(place[t][0] for t in edges[room] if t in place) / max(1, len(edges[room])))
        y = (len(rows) - 1 - level) * (HEIGHT + GAP) + 4
        step = WIDTH / len(row)
        for i, room in enumerate(row):
            place[room] = ((i + 0.5) * step, y)
    parts = []
    for room, targets in edges.items():
        x, y = place[room]
        for target in sorted(targets):
            to_x, to_y = place[target]
            bend = (to_y - y - HEIGHT) / 2
            path = f"M{x:.0f},{y + HEIGHT} C{x:.0f},{y + HEIGHT + bend:.0f} {to_x:.0f},{to_y - bend:.0f} "
            path += f"{to_x:.0f},{to_y - 7}"
            parts.append(f'<path class="edge" d="{path}" marker-end="url(#head)"/>')
    lines = lines_of_code()
    for room, (x, y) in place.items():
        width = min(ROOM, WIDTH / len(next(row for row in rows if room in row)) - 6)
        parts.append(
            f'<g class="room"><rect x="{x - width / 2:.0f}" y="{y}" width="{width:.0f}" height="{HEIGHT}" rx="6"/>'
            f'<text x="{x:.0f}" y="{y + 20}" text-anchor="middle" font-size="13">{escape(room)}</text>'
            f'<text x="{x:.0f}" y="{y + 36}" text-anchor="middle" font-size="10" opacity=".7">{lines[room]} '
            "lines</text></g>"
        )
    height = len(rows) * (HEIGHT + GAP) - GAP + 8
    head = '<marker id="head" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head = f'<defs>{head}<path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    label = 'role="img" aria-label="Rooms and their imports"'
    return f'<svg class="rooms" viewBox="0 0 {WIDTH} {height}" {label}>{head}{"".join(parts)}</svg>'


def lines_of_code() -> dict[str, int]:
    """Room -> lines that are neither empty nor comment nor docstring."""
    found: dict[str, int] = {}
    for path in rooms.files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        code = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.stmt) and not (
                isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            ):
                last = node.end_lineno if not hasattr(node, "body") else node.body[0].lineno - 1
                code.update(range(node.lineno, last + 1))
        text = path.read_text(encoding="utf-8").splitlines()
        count = sum(1 for number in code if text[number - 1].strip() and not text[number - 1].strip().startswith("#"))
        room = rooms.room_of_path(path) or "trl_ext"
        found[room] = found.get(room, 0) + count
    return found


def purpose(room: str) -> str:
    """The first sentence of the room's docstring."""
    path = rooms.PACKAGE / room / "__init__.py"
    path = path if path.exists() else rooms.PACKAGE / f"{room}.py"
    text = " ".join(
        (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0].split()
    )
    return text.replace("|", "\\|")


def table() -> str:
    edges = graph(without=HIDDEN)
    lines = lines_of_code()
    rows = ["| room | what lives there | imports | lines of code |", "|---|---|---|--:|"]
    for room, targets in edges.items():
        imported = ", ".join(f"`{target}`" for target in edges if target in targets) or "-"
        rows.append(f"| `{room}` | {purpose(room)} | {imported} | {lines[room]} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(page())
