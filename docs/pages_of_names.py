"""Give each name of the reference a page of its own, when the documentation is built.

``reference.md`` says which names are public, as ``::: path.of.the.object`` under the room that gives them out. In its place
stand links there, each with the first sentence of the object's docstring; the pages behind them have the arguments.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from docstrings import without_roles

LISTED = re.compile(r"^::: (\S+)$", re.M)
PAGE = """# {name}

`from {room} import {name}`

::: {path}
    options:
      show_root_heading: false
"""


def page_of(path: str) -> str:
    """Return the page of the object at ``path``."""
    return f"reference/{path.rsplit('.', 1)[-1]}.md"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    room = ""
    for line in Path(config["docs_dir"], "reference.md").read_text().splitlines():
        if line.startswith("## "):
            room = line[3:]
        elif found := LISTED.match(line):
            path = found[1]
            text = PAGE.format(name=path.rsplit(".", 1)[-1], room=room, path=path)
            files.append(File.generated(config, page_of(path), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """Put links into the list of names."""
    if page.file.src_uri != "reference.md":
        return markdown
    package = griffe.load("levin", search_paths=[Path(config["docs_dir"]).parent / "src"], resolve_aliases=True)

    def link(found: re.Match[str]) -> str:
        path = found[1]
        return f"- [{path.rsplit('.', 1)[-1]}]({page_of(path)}): {first_sentence(package[path.split('.', 1)[1]])}"

    return LISTED.sub(link, markdown)


def first_sentence(obj: Any) -> str:
    """Return the first line of an object's docstring; of a value that has none, how it is written."""
    return f"`{obj.value}`" if obj.docstring is None else without_roles(obj.docstring.value.split("\n")[0])
