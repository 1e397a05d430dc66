"""The import hook that answers for Lightning's packages with levin's objects, by the table alone."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, Optional

from levin.compat.paths import ABSENT, TABLE
from levin.compat.table import PROGRAMS, ROOTS, names_in, path_of

if TYPE_CHECKING:
    from importlib.metadata import Distribution

VERSION = "2.6.6"
"""The Lightning version whose behaviour is met: packages ask for it."""

_MAIN = ".__main__"
_DISTRIBUTIONS = ("lightning", "pytorch-lightning", "lightning-fabric")
_FABRIC = ("lightning.fabric", "lightning_fabric")
# The file of levin whose lines come from Lightning's other half, and the module that speaks them there.
_SPOKEN_IN_FABRIC = {"seed": "utilities.seed", "parallel": "utilities.distributed"}


class AliasFinder:
    """Finds Lightning's modules in the table, and nothing else.

    Every one of them is a package to the import system, so that a name that is not there is looked for as a module and
    the error can say what is missing. It stands in every process that is started under the alias, so this file imports
    next to nothing.
    """

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]] = None, target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        """Return how to load ``fullname``; None where it is somebody else's.

        Raises:
            ModuleNotFoundError: It is one of Lightning's and levin has nothing for it.
        """
        key = path_of(fullname)
        if key is None:
            return None
        if key.endswith(_MAIN) and key.removesuffix(_MAIN) in PROGRAMS:
            program: Any = _ProgramLoader(PROGRAMS[key.removesuffix(_MAIN)])
            return ModuleSpec(fullname, program, origin="levin.compat")
        if key not in TABLE:
            # Without `name=` the import system takes it for an answer, not for a module to look for elsewhere.
            raise ModuleNotFoundError(_describe_missing(fullname))
        loader: Any = _AliasLoader(key)  # duck-typed, as the finder is
        return ModuleSpec(fullname, loader, is_package=True, origin="levin.compat")

    def find_distributions(self, context: object = None) -> Iterable[Distribution]:
        """Return the metadata of Lightning for those who ask by its name, and nothing for a list of all."""
        name = (getattr(context, "name", None) or "").lower().replace("_", "-")
        if name in _DISTRIBUTIONS:
            from levin.compat.distribution import AliasDistribution

            yield AliasDistribution(name, VERSION)


class _AliasLoader:
    """Makes the module for one key of the table; its names are imported when they are first used."""

    def __init__(self, key: str) -> None:
        self._key = key

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module."""
        return AliasModule(spec.name, self._key)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class _ProgramLoader:
    """Gives ``python -m`` the code of a program.

    Args:
        module: Its ``main(words)`` is called with the words of the command line.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def get_code(self, fullname: str) -> CodeType:
        """Return the code."""
        source = f"import sys\nfrom {self._module} import main\nsys.exit(main(sys.argv[1:]))"
        return compile(source, f"<{fullname}>", "exec")


class AliasModule(ModuleType):
    """A module of Lightning's that hands out levin's objects.

    Args:
        name: Its dotted name.
        key: Its row of the table.
    """

    def __init__(self, name: str, key: str) -> None:
        super().__init__(name, f"`{name}` as levin answers for it.")
        self._homes = names_in(key)
        self._children = {path.rpartition(".")[2] for path in TABLE if path and path.rpartition(".")[0] == key}
        self.__all__ = [name for name in self._homes if not name.startswith("_")]
        self.__version__ = VERSION

    def __getattr__(self, name: str) -> Any:
        if name in self._homes:
            home, ours = self._homes[name]
            value = getattr(importlib.import_module(home), ours)
        elif name in self._children:
            value = importlib.import_module(f"{self.__name__}.{name}")
        elif name.startswith("__"):
            # Asked of every module in `sys.modules` by inspect and others.
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        else:
            raise AttributeError(_describe_missing(f"{self.__name__}.{name}"))
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *self._homes, *self._children})


def install_finder() -> None:
    """Put the finder before all others, once.

    Raises:
        RuntimeError: Lightning itself was imported before.
    """
    if any(isinstance(finder, AliasFinder) for finder in sys.meta_path):
        return
    loaded = [root for root in ROOTS if root in sys.modules]
    if loaded:
        raise RuntimeError(
            f"levin.compat.install() must come before the first import of Lightning, but {loaded[0]!r} is imported "
            "already. Call it at the top of the program, or run the program with `python -m levin SCRIPT`."
        )
    sys.meta_path.insert(0, AliasFinder())
    _place_logger()


def _place_logger() -> None:
    """Put levin's logger below those that programs silence, filter and listen to, and find at level INFO: Lightning's."""
    ours = logging.getLogger("levin")
    for name in ("lightning.pytorch", *_FABRIC):
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.INFO)
    ours.setLevel(logging.NOTSET)
    # Its lines come from a logger of their own, under the name of either package.
    speakers = [logging.getLogger(f"{name}.utilities.rank_zero") for name in ("lightning.pytorch", "pytorch_lightning")]
    logging.getLogger("pytorch_lightning").parent, ours.parent = speakers
    for speaker in speakers:
        ours.addFilter(speaker)
    ours.addFilter(_is_heard_in_fabric)


def _is_heard_in_fabric(record: logging.LogRecord) -> bool:
    """Return whether the loggers of Lightning's other half let the line pass, if it comes from there in Lightning."""
    module = _SPOKEN_IN_FABRIC.get(record.module)
    speakers = [logging.getLogger(f"{package}.{module}") for package in _FABRIC] if module else []
    return all(speaker.isEnabledFor(record.levelno) and speaker.filter(record) for speaker in speakers)


def _describe_missing(fullname: str) -> str:
    """Say that there is no ``fullname``, and where its last part is found, if anywhere."""
    name = fullname.rpartition(".")[2]
    places = sorted(
        {
            f"{home}.{names_in(key)[name][1]}"
            for key in TABLE
            if name in names_in(key) and (home := names_in(key)[name][0]) != ABSENT
        },
        key=lambda place: (place.count("."), place),
    )
    if places:
        hint = f"It is `{places[0]}`."
    else:
        hint = "See docs/migrating.md for what is there, or run this program on Lightning itself, without the alias."
    return f"levin has no `{fullname}`. {hint}"
