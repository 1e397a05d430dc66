"""Turning the source of a program that imports Lightning into one that imports levin, by the table alone.

Positions come from ``ast``: only import statements and the dotted names that start with what they bind are touched, so
strings, comments and layout stay as they are.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field

from levin.compat.paths import ABSENT, TABLE
from levin.compat.table import ROOMS, names_in, path_of

_CONFIG_LINE = re.compile(
    r"""^(?P<key>\s*(?:-\s+)*["']?(?:class_path|_target_)["']?\s*:\s*)(?P<quote>["']?)"""
    r"""(?P<path>(?:lightning|pytorch_lightning|lightning_fabric)(?:\.\w+)+)"""
)


@dataclass
class Rewritten:
    """What became of a text.

    Args:
        text: The new text; the old one where nothing had to change.
        remarks: What was left as it is, and why: line number (from 1) and a sentence.
    """

    text: str
    remarks: list[tuple[int, str]] = field(default_factory=list)


def rewrite_python(source: str) -> Rewritten:
    r"""Return Python source with imports of levin in the place of those of Lightning.

    Args:
        source: The text of a module.

    Raises:
        SyntaxError: It is no Python that this version understands.

    Example:
        >>> print(rewrite_python("import pytorch_lightning as pl\npl.Trainer()\n").text, end="")
        import levin as pl
        pl.Trainer()
    """
    tree = ast.parse(source)
    return _Rewriter(source, tree).run()


def rewrite_yaml(source: str) -> Rewritten:
    r"""Return a YAML configuration whose ``class_path`` and ``_target_`` name levin's classes.

    Args:
        source: The text of a YAML file; only lines with these keys are looked at, so comments and layout stay.

    Example:
        >>> rewrite_yaml("class_path: lightning.pytorch.callbacks.EarlyStopping\n").text
        'class_path: levin.callbacks.EarlyStopping\n'
    """
    lines, remarks = source.splitlines(keepends=True), []
    for index, line in enumerate(lines):
        match = _CONFIG_LINE.match(line)
        if match is None:
            continue
        module, _, name = match["path"].rpartition(".")
        found = _home_of(module, name)
        if found is None:
            remarks.append((index + 1, _nothing_for(match["path"])))
        else:
            lines[index] = f"{match['key']}{match['quote']}{'.'.join(found)}{line[match.end() :]}"
    return Rewritten("".join(lines), remarks)


def _home_of(module: str, name: str) -> tuple[str, str] | None:
    """Return levin's module and name for a name of Lightning's; None where there is none."""
    key = path_of(module)
    found = names_in(key).get(name) if key is not None and key in TABLE else None
    return None if found is None or found[0] == ABSENT else found


def _module_of(path: str) -> str | None:
    """Return levin's module that stands for a module of Lightning's: the one that holds most of its names."""
    key = path_of(path)
    if key is None or key not in TABLE:
        return None
    homes = [home for home in TABLE[key] if home != ABSENT]
    if key in ("", "pytorch"):
        return "levin"
    return max(homes, key=lambda home: len(TABLE[key][home].split()), default=None)


def _nothing_for(path: str) -> str:
    return f"levin has nothing for `{path}`; left as it is."


class _Rewriter:
    def __init__(self, source: str, tree: ast.Module) -> None:
        self._tree = tree
        # Positions of `ast` count bytes of UTF-8.
        self._lines = source.encode().splitlines(keepends=True)
        self._edits: list[tuple[tuple[int, int], tuple[int, int], str]] = []
        self._remarks: list[tuple[int, str]] = []
        # Bound name -> (the path of Lightning's module that it stands for, what stands for that now).
        self._bound: dict[str, tuple[str, str]] = {}
        self._needed: set[str] = set()
        self._statements: list[tuple[ast.stmt, str]] = []

    def run(self) -> Rewritten:
        statements = [node for node in ast.walk(self._tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        plain = [node for node in statements if isinstance(node, ast.Import) and self._concerns(node)]
        for node in plain:
            self._bind(node)
        for statement in statements:
            if (
                isinstance(statement, ast.ImportFrom)
                and not statement.level
                and path_of(statement.module or "") is not None
            ):
                self._rewrite_from(statement)
        if self._bound:
            self._rewrite_uses()
        for node in plain:
            self._rewrite_import(node)
        self._add_needed()
        text = list(self._lines)
        for (line, column), (end_line, end_column), new in sorted(self._edits, reverse=True):
            head, tail = text[line - 1][:column], text[end_line - 1][end_column:]
            text[line - 1 : end_line] = [head + new.encode() + tail]
        return Rewritten(b"".join(text).decode(), sorted(self._remarks))

    @staticmethod
    def _concerns(node: ast.Import) -> bool:
        return any(path_of(alias.name) is not None for alias in node.names)

    # ---------------------------------------------------------------- import a.b as c

    def _bind(self, node: ast.Import) -> None:
        for alias in node.names:
            if path_of(alias.name) is None or _module_of(alias.name) is None:
                continue
            if alias.asname:
                self._bound[alias.asname] = (alias.name, alias.asname)
            else:
                root = alias.name.partition(".")[0]
                self._bound[root] = (root, "levin")

    def _rewrite_import(self, node: ast.Import) -> None:
        parts = []
        for alias in node.names:
            home = _module_of(alias.name) if path_of(alias.name) is not None else alias.name
            if home is None:
                self._remarks.append((node.lineno, _nothing_for(alias.name)))
                home = alias.name
            elif home != alias.name and not alias.asname:
                home = "levin"
            part = f"{home} as {alias.asname}" if alias.asname else home
            if part not in parts:
                parts.append(part)
        self._statements.append((node, f"import {', '.join(parts)}"))

    def _add_needed(self) -> None:
        """Write the statements, the first of them with the imports that uses of dotted names need."""
        top = {id(node) for node in self._tree.body}
        first = min(self._statements, key=lambda pair: (id(pair[0]) not in top, pair[0].lineno), default=(None, ""))[0]
        for node, text in self._statements:
            if node is first and self._needed:
                text = self._separator(node).join([text, *(f"import {home}" for home in sorted(self._needed))])
            self._replace(node, text)

    def _separator(self, node: ast.stmt) -> str:
        """Return what stands between statements in the place of one: a line break, or ``;`` where it shares its line."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        line = self._lines[node.lineno - 1]
        indent, rest = line[: node.col_offset], self._lines[node.end_lineno - 1][node.end_col_offset :]
        if indent.strip() or rest.lstrip()[:1] == b";":
            return "; "
        return ("\r\n" if line.endswith(b"\r\n") else "\n") + indent.decode()

    # ---------------------------------------------------------------- from a.b import c

    def _rewrite_from(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        groups: dict[str, list[str]] = {}
        left: list[str] = []
        for alias in node.names:
            bound = f" as {alias.asname}" if alias.asname else ""
            if alias.name == "*":
                home = _module_of(module)
                found = None if home is None else (home, "*")
            else:
                found = _home_of(module, alias.name)
            submodule = None if found else _module_of(f"{module}.{alias.name}")
            if found is not None:
                home, name = found
                kept = bound or (f" as {alias.name}" if name != alias.name else "")
                groups.setdefault(f"from {home} import ", []).append(f"{name}{kept}")
            elif submodule is not None:
                groups.setdefault(f"import {submodule} as {alias.asname or alias.name}", [])
                self._bound[alias.asname or alias.name] = (f"{module}.{alias.name}", alias.asname or alias.name)
            elif alias.name == "__version__":
                groups.setdefault("from levin import ", []).append(f"__version__{bound}")
            else:
                left.append(f"{alias.name}{bound}")
                self._remarks.append((node.lineno, _nothing_for(f"{module}.{alias.name}")))
        if not groups:
            return
        statements = [f"{start}{', '.join(names)}" for start, names in groups.items()]
        if left:
            statements.append(f"from {module} import {', '.join(left)}")
        self._statements.append((node, self._joined(node, statements, list(groups))))

    def _joined(self, node: ast.ImportFrom, statements: list[str], starts: list[str]) -> str:
        segment, separator = self._segment(node), self._separator(node)
        if len(statements) == 1 and "\n" in segment and " as " not in statements[0] and starts[0].startswith("from "):
            # The names are the same: the layout and the comments between them stay.
            return re.sub(r"from\s+[\w.]+\s+import", starts[0].rstrip(), segment, count=1)
        if separator == "; ":
            return separator.join(statements)
        newline, indent = separator.rstrip(" \t"), separator.lstrip("\r\n")
        lines = _comments(segment)
        for statement in statements:
            if len(indent) + len(statement) > 120 and statement.startswith("from "):
                start, _, names = statement.partition(" import ")
                inner = "".join(f"{newline}{indent}    {name}," for name in names.split(", "))
                statement = f"{start} import ({inner}{newline}{indent})"
            lines.append(statement)
        return separator.join(lines)

    # ---------------------------------------------------------------- uses of what imports bind

    def _rewrite_uses(self) -> None:
        rebound = {node.arg for node in ast.walk(self._tree) if isinstance(node, ast.arg)} | {
            node.id
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        }
        inner: set[int] = set()
        for node in ast.walk(self._tree):
            if id(node) in inner or not isinstance(node, (ast.Attribute, ast.Name)):
                continue
            chain = list(_chain(node))
            inner.update(id(part) for part, _ in chain)
            root, _ = chain[-1]
            if not isinstance(root, ast.Name) or root.id not in self._bound:
                continue
            if root.id in rebound:
                self._remarks.append(
                    (node.lineno, f"`{root.id}` is bound to something else too; its uses are left as they are.")
                )
                continue
            self._rewrite_use(root, chain)

    def _rewrite_use(self, root: ast.Name, chain: list[tuple[ast.expr, str]]) -> None:
        path, now = self._bound[root.id]
        # From the root outwards: through modules up to the first name that is none.
        for part, name in reversed(chain[:-1]):
            found = _home_of(path, name)
            if found is not None:
                self._edit_use(part, root, path, now, found)
                return
            if _module_of(f"{path}.{name}") is None:
                if name != "__version__":
                    self._remarks.append((part.lineno, _nothing_for(f"{path}.{name}")))
                elif now != root.id or path != self._bound[root.id][0]:
                    self._replace(part, f"{now}.{name}")
                return
            path = f"{path}.{name}"
        last = chain[0][0]
        home = _module_of(path)
        if home is not None and (path != self._bound[root.id][0] or now != root.id):
            self._replace(last, self._spelled(root, now, home))

    def _edit_use(self, part: ast.expr, root: ast.Name, path: str, now: str, found: tuple[str, str]) -> None:
        home, name = found
        new = f"{self._spelled(root, now, home)}.{name}"
        if self._segment(part) != new:
            self._replace(part, new)

    def _spelled(self, root: ast.Name, now: str, home: str) -> str:
        """Return how ``home`` is written where ``root`` stood: behind the bound name, or by its full path."""
        base = _module_of(self._bound[root.id][0])
        if home == base:
            return now
        if base == "levin" and home in ROOMS:
            return now + home.removeprefix("levin")
        self._needed.add(home)
        return home

    # ---------------------------------------------------------------- text

    def _segment(self, node: ast.stmt | ast.expr) -> str:
        assert node.end_lineno is not None and node.end_col_offset is not None
        if node.lineno == node.end_lineno:
            return self._lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()
        first = self._lines[node.lineno - 1][node.col_offset :]
        middle = self._lines[node.lineno : node.end_lineno - 1]
        return b"".join([first, *middle, self._lines[node.end_lineno - 1][: node.end_col_offset]]).decode()

    def _replace(self, node: ast.stmt | ast.expr, new: str) -> None:
        assert node.end_lineno is not None and node.end_col_offset is not None
        self._edits.append(((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset), new))


def _chain(node: ast.expr) -> Iterator[tuple[ast.expr, str]]:
    """Yield the parts of ``a.b.c`` from the outside: (a.b.c, "c"), (a.b, "b"), (a, "")."""
    while isinstance(node, ast.Attribute):
        yield node, node.attr
        node = node.value
    yield node, ""


def _comments(segment: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(segment + "\n").readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]
