"""The folder tree is the architecture: imports run downwards only."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "levin"
# From the street to the ground: a room imports only from rooms below its own. Rooms on one line do not import each other.
STOREYS = {
    "what people start": [
        ["__init__", "__main__"],
        ["demos"],
        ["cli"],
        ["tuner"],
        ["codemod"],
        ["planning"],
        ["compat"],
        ["trainer", "fabric"],
        ["explain", "report"],
    ],
    "what people plug in": [["callbacks"]],
    "the run": [["loops"], ["ranks"], ["resume"]],
    "what people subclass": [
        ["datamodule"],
        ["module"],
        ["optimizer", "loading", "exports", "self_log"],
        ["hparams"],
        ["protocols"],
        ["hooks"],
        ["loggers", "profilers", "settings", "counters", "log_store"],
        ["log_slot"],
    ],
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
    """All imports of a file, those for types and those inside of functions counted too, each as a dotted path."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "levin")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "levin":
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def file_of(module: str) -> Path | None:
    """The file that an import of the dotted path ``module``, or of a name in it, reads."""
    parts = module.split(".")[1:]
    while parts:
        path = ROOT.joinpath(*parts)
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
        parts.pop()
    return None


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of files that reach each other, of two and more (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in graph:
        if node not in order:
            visit(node)
    return found


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
            if FLOOR.get(other, -1) <= FLOOR[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        targets = {file_of(module) for _, module in imports(path)} - {None, path}
        graph[str(path.relative_to(ROOT))] = {str(target.relative_to(ROOT)) for target in targets}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    found = circles(graph)
    assert not found, "\n".join(", ".join(files) for files in found)


def test_no_file_holds_more_than_one_idea():
    long = {
        str(path.relative_to(ROOT)): n for path in ROOT.rglob("*.py") if (n := len(path.read_text().splitlines())) > 500
    }
    assert not long, long


# Over the whole tree; `Any` per thousand lines that hold code.
MOST_SUPPRESSIONS = 30
MOST_ANY = 50


def test_the_type_checker_looks_at_nearly_everything():
    suppressions = anys = lines = 0
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
        suppressions += sum(token.type == tokenize.COMMENT and "type: ignore" in token.string for token in tokens)
        anys += sum(token.type == tokenize.NAME and token.string == "Any" for token in tokens)
        lines += len({token.start[0] for token in tokens if token.type not in (tokenize.COMMENT, tokenize.STRING)})
    assert suppressions <= MOST_SUPPRESSIONS
    assert 1000 * anys / lines <= MOST_ANY, f"{1000 * anys / lines:.1f}"


def test_every_room_is_in_the_design():
    """A newcomer finds each room on the page that says what lies where."""
    page = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
    missing = [
        room
        for floor in FLOORS
        for room in floor
        if room != "__init__" and f"`{room}/`" not in page and f"`{room}.py`" not in page
    ]
    assert not missing
