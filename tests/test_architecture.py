"""The folder tree is the architecture: imports run downwards only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "levin"
# From the street to the ground: a room imports only from rooms below its own. Rooms on one line do not import each other.
STOREYS = {
    "what people start": [["__init__", "__main__"], ["compat"], ["trainer"]],
    "what people plug in": [["plugins"], ["callbacks"], ["loggers", "profilers"]],
    "the run": [["loops"], ["ranks"], ["resume"], ["log_store", "settings"]],
    "what people subclass": [["datamodule"], ["module"], ["optimizer", "loading", "exports"], ["hparams"], ["hooks"]],
    "the engine": [
        ["data"],
        ["engine"],
        ["strategies"],
        ["launchers"],
        ["environments"],
        ["precision"],
        ["accelerators"],
        ["checkpoint"],
    ],
    "the ground": [["utilities"]],
}
FLOORS = [rooms for storey in STOREYS.values() for rooms in storey]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(id(child) for child in ast.walk(node))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "levin")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "levin":
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}" if node.module == "levin" else str(node.module)


def test_every_room_has_a_floor():
    rooms = {
        path.stem if path.is_file() else path.name
        for path in ROOT.iterdir()
        if path.suffix in ("", ".py") and not path.name.startswith(".")
    }
    assert {room for room in rooms if not room.startswith((".", "__pycache__"))} - {"py"} == set(FLOOR)


def test_no_room_imports_upwards():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        for line, module in imports(path):
            other = room_of(module)
            if module.startswith("levin.__version__") or other == own:
                continue
            if str(path.relative_to(ROOT)) == "data/feed.py":
                continue  # the position is still to be handed in from above
            if FLOOR.get(other, -1) <= FLOOR[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_file_holds_more_than_one_idea():
    long = {
        str(path.relative_to(ROOT)): n for path in ROOT.rglob("*.py") if (n := len(path.read_text().splitlines())) > 600
    }
    assert not long, long
