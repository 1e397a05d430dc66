"""``levin migrate PATH``: leaving the alias behind."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

from levin.codemod.rewrite import Rewritten, rewrite_python, rewrite_yaml

_SUFFIXES = {".py": rewrite_python, ".pyi": rewrite_python, ".yaml": rewrite_yaml, ".yml": rewrite_yaml}
_SKIPPED_FOLDERS = {".git", ".hg", ".venv", "venv", "node_modules", "__pycache__", "site-packages", "build", "dist"}


def main(arguments: Sequence[str]) -> int:
    """Show what would change in the files below the given paths, ask, and write it.

    Args:
        arguments: The words behind ``levin migrate``.

    Returns:
        0 when everything is written or there was nothing to do, 1 when the user said no.
    """
    parser = argparse.ArgumentParser(
        prog="levin migrate",
        description="Rewrite imports of Lightning to imports of levin in Python files, and class paths in YAML files.",
        epilog="Example: levin migrate src train.py",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", type=Path, help="a file, or a folder with all below it")
    parser.add_argument("--yes", action="store_true", help="write without asking")
    parsed = parser.parse_args(arguments)
    changes: dict[Path, bytes] = {}
    for path in parsed.paths:
        if not path.exists():
            parser.error(f"PATH must exist, received {str(path)!r}.")
        for file in _files(path):
            _collect(file, changes)
    if not changes:
        print("Nothing to change.")
        return 0
    noun = "file" if len(changes) == 1 else "files"
    if not parsed.yes and not _agrees(f"Write {len(changes)} {noun}? [y/N] "):
        print("Nothing written.")
        return 1
    for file, content in changes.items():
        _write(file, content)
    print(f"{len(changes)} {noun} written.")
    return 0


def _collect(file: Path, changes: dict[Path, bytes]) -> None:
    """Print the difference and the remarks for one file, and remember its new content."""
    content = file.read_bytes()
    if b"lightning" not in content:
        return
    try:
        encoding = _encoding(file)
        old = content.decode(encoding)
        result: Rewritten = _SUFFIXES[file.suffix](old)
    except (SyntaxError, UnicodeDecodeError) as error:
        print(f"{file}: left as it is: {error}", file=sys.stderr)
        return
    for line, remark in result.remarks:
        print(f"{file}:{line}: {remark}", file=sys.stderr)
    if result.text == old:
        return
    before, after = old.splitlines(keepends=True), result.text.splitlines(keepends=True)
    for text in difflib.unified_diff(before, after, str(file), str(file)):
        print(text.rstrip("\r\n"))
    changes[file] = result.text.encode(encoding)


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        if path.suffix in _SUFFIXES:
            yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if Path(name).suffix in _SUFFIXES)


def _encoding(file: Path) -> str:
    if file.suffix in (".yaml", ".yml"):
        return "utf-8"
    with open(file, "rb") as opened:
        return tokenize.detect_encoding(opened.readline)[0]


def _agrees(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _write(file: Path, content: bytes) -> None:
    """Replace the file's content at once, so that an interruption leaves the old or the new one."""
    beside = file.with_name(f".{file.name}.levin")
    beside.write_bytes(content)
    beside.chmod(file.stat().st_mode)
    os.replace(beside, file)
