"""How a Trainer shows what lies in its parts: one line for each name that users know."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from importlib import import_module
from operator import attrgetter
from typing import Any

from levin.utilities.states import RunningStage


def part(path: str, doc: str) -> Any:
    """Return a property for what lies at ``path``, such as ``"strategy.optimizers"``, and may be set there."""
    owner, _, name = path.rpartition(".")
    owner_of = attrgetter(owner)
    return property(attrgetter(path), lambda trainer, value: setattr(owner_of(trainer), name, value), doc=doc)


def of_run(path: str, default: object, doc: str) -> Any:
    """Return a property that reads ``path`` from the present or last run; before the first one it is ``default``."""
    read = attrgetter(path)
    return property(lambda trainer: default if trainer.run is None else read(trainer.run), doc=doc)


def setting(name: str) -> Any:
    """Return a property for one of the :class:`~levin.settings.Settings`; setting it counts for the run under way."""

    def change(trainer: Any, value: object) -> None:
        trainer.settings = replace(trainer.settings, **{name: value})

    return property(attrgetter(f"settings.{name}"), change, doc=f"The argument ``{name}``, which may be set anew.")


def shared(name: str, doc: str) -> Any:
    """Return a property for a part of the Trainer that its run holds as well: setting it counts for both."""
    own = f"_{name}"

    def change(trainer: Any, value: object) -> None:
        setattr(trainer, own, value)
        if trainer.run is not None:
            setattr(trainer.run, name, value)

    return property(attrgetter(own), change, doc=doc)


def lent(name: str) -> Any:
    """Return a property for a view of the Trainer that extensions read under Lightning's name for it."""
    return cached_property(lambda trainer: getattr(import_module("levin.compat.connectors"), name)(trainer))


def lent_anew(name: str) -> Any:
    """Return a property like :func:`lent`, of what changes from call to call."""
    return property(lambda trainer: getattr(import_module("levin.compat.connectors"), name)(trainer))


def stage(which: RunningStage, doc: str) -> Any:
    """Return a property that is True while ``which`` runs; setting it says so."""

    def change(trainer: Any, value: bool) -> None:
        if value:
            trainer.state.stage = which
        elif trainer.state.stage == which:
            trainer.state.stage = None

    return property(lambda trainer: trainer.state.stage == which, change, doc=doc)


def callbacks_of(kind: type, doc: str) -> Any:
    """Return a property for all callbacks of one class."""
    return property(lambda trainer: [each for each in trainer.callbacks if isinstance(each, kind)], doc=doc)


def first_of(name: str, doc: str) -> Any:
    """Return a property for the first of a list, or None."""
    read = attrgetter(name)
    return property(lambda trainer: next(iter(read(trainer)), None), doc=doc)
