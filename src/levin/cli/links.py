"""Links between arguments that stand in a configuration: the value of one is that of another."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any, Literal, Optional, TypedDict

import fsspec
import yaml
from jsonargparse import Namespace, get_loader
from typing_extensions import NotRequired

from levin.cli.callables import ArgsType
from levin.cli.parser import LightningArgumentParser
from levin.utilities.types import Kwargs


class Link(TypedDict):
    """An entry of ``links``.

    Attributes:
        source: Key that the value is taken from.
        target: Key that it is given to, which can then not be set otherwise.
        apply_on: ``"parse"`` for values of the configuration; ``"instantiate"`` for attributes of objects once made.
    """

    source: str
    target: str
    apply_on: NotRequired[Literal["parse", "instantiate"]]


def add_links_argument(parser: LightningArgumentParser) -> None:
    """Add ``links``; a configuration without it is one for Lightning as well."""
    parser.add_argument(
        "--links",
        type=list[Link],
        default=argparse.SUPPRESS,
        help="Links between arguments: [{source: data.batch_size, target: model.batch_size}], and apply_on: "
        "instantiate for attributes of objects.",
    )


def link_as_configured(
    parser: LightningArgumentParser, subparsers: Mapping[str, LightningArgumentParser], args: ArgsType
) -> None:
    """Make the links that files, or the object in place of a command line, ask for; before they are parsed.

    Args:
        parser: The parser of the whole.
        subparsers: Name of each subcommand -> its parser; empty where there are none.
        args: The command line, or what was given in its place.

    Raises:
        SystemExit: An entry names no argument, or is none.
    """
    if isinstance(args, (dict, Namespace)):
        subcommand = args.get("subcommand") or next((name for name in subparsers if name in args), None)
        given: list[Any] = [args]
    else:
        words = sys.argv[1:] if args is None else args
        subcommand = next((word for word in words if word in subparsers), None)
        given = [_read(text, parser) for text in _texts(words, parser, subcommand)]
    chosen = subparsers.get(str(subcommand), parser)
    given += [each.get_defaults(skip_validation=True) for each in {parser, chosen}]  # of files that are read by default
    for configuration in given:
        for part in (configuration, configuration.get(subcommand)):
            links = part.get("links") if isinstance(part, (dict, Namespace)) else None
            for entry in links if isinstance(links, list) else ():
                _link(chosen, entry)


def _texts(words: list[str], parser: LightningArgumentParser, subcommand: Optional[str]) -> list[str]:
    """Return the configurations of a command line, files or texts, and the links that it gives itself."""
    reader = argparse.ArgumentParser(add_help=False)
    reader.add_argument("-c", "--config", action="append", default=[])
    reader.add_argument("--links")
    found = reader.parse_known_args(words)[0]
    texts = [*found.config, *([f"links: {found.links}"] if found.links else [])]
    if parser.default_env:
        names = ("CONFIG", f"{subcommand}__CONFIG".upper())
        texts += [os.environ[name] for name in (f"{parser.env_prefix}_{name}" for name in names) if name in os.environ]
    return texts


def _read(text: str, parser: LightningArgumentParser) -> Kwargs:
    """Return what a file, or the text itself, holds; nothing where the parser will say what is wrong with it."""
    with contextlib.suppress(OSError, ValueError, ImportError), fsspec.open(text, "r") as file:
        text = file.read()
    try:
        value = get_loader(parser.parser_mode)(text)
    except (ValueError, RuntimeError, yaml.YAMLError):
        value = None
    return value if isinstance(value, dict) else {}


def _link(parser: LightningArgumentParser, entry: Any) -> None:
    words = entry if isinstance(entry, dict) and all(isinstance(word, str) for word in entry.values()) else {}
    if not {"source", "target"} <= set(words) <= {"source", "target", "apply_on"}:
        return  # what is wrong with it is told when it is parsed
    try:
        parser.link_arguments(**words)
    except ValueError as error:
        parser.error(f"links: {entry} cannot be made. {error}")
