"""Hyper-parameters: the arguments a module or data module was built with, kept so that it can be built again.

``save_hyperparameters`` reads them from the frames of the running ``__init__`` calls. The functions that do so are
pure and stand first; the mixin for users' classes follows.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import sys
import types
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from levin.utilities.attribute_dict import AttributeDict
from levin.utilities.exceptions import did_you_mean
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import StateDict

_PRIMITIVES = (bool, int, float, str)
# What comparing arrays, tensors or odd objects for truth raises.
_INCOMPARABLE = (ValueError, TypeError, RuntimeError)

_given: ContextVar[dict[str, object] | None] = ContextVar("levin_given_hyperparameters", default=None)


@contextmanager
def given_hyperparameters(
    values: Mapping[str, object], instantiator: str, class_path: str | None = None
) -> Iterator[None]:
    """Make ``save_hyperparameters`` store ``values`` in place of the arguments of ``__init__``.

    A configuration file describes nested objects by class path and arguments, where ``__init__`` sees the finished
    objects. Only the former can be written down, so a program that builds modules from configurations gives it here.

    Args:
        values: The configuration that the module is built from.
        instantiator: Import path of the function that builds the module from it again.
        class_path: Import path of the module's class where ``values`` may belong to a subclass.

    Example:
        >>> class Net(HyperparametersMixin):
        ...     def __init__(self, net):
        ...         super().__init__()
        ...         self.save_hyperparameters()
        >>> with given_hyperparameters({"net": {"class_path": "torch.nn.Identity"}}, "levin.cli.instantiate_module"):
        ...     Net(nn.Identity()).hparams["net"]
        {'class_path': 'torch.nn.Identity'}
    """
    stored = {**values, "_instantiator": instantiator}
    if class_path is not None:
        stored["_class_path"] = class_path
    token = _given.set(stored)
    try:
        yield
    finally:
        _given.reset(token)


def frame_arguments(frame: types.FrameType) -> dict[str, Any]:
    """Return the present values of the parameters of the function running in ``frame``.

    The first parameter (``self``) and ``*args`` are left out, and the contents of ``**kwargs`` stand beside the named
    ones.

    Example:
        >>> def build(self, width, *rest, depth=2, **options):
        ...     return frame_arguments(inspect.currentframe())
        >>> build(None, 3, 4, colour="red")
        {'width': 3, 'depth': 2, 'colour': 'red'}
    """
    code = frame.f_code
    num_named = code.co_argcount + code.co_kwonlyargcount
    num_starred = 1 if code.co_flags & inspect.CO_VARARGS else 0
    values = frame.f_locals
    arguments = {name: values[name] for name in code.co_varnames[1:num_named] if name in values}
    if code.co_flags & inspect.CO_VARKEYWORDS:
        arguments.update(values.get(code.co_varnames[num_named + num_starred], {}))
    return arguments


def collect_init_args(obj: object, frame: types.FrameType | None) -> StateDict:
    """Return the arguments of all ``__init__`` calls of ``obj`` that run in ``frame`` or around it.

    Args:
        obj: The object under construction.
        frame: The innermost frame to look at.

    Returns:
        Argument names with their present values, base classes first. Where a class and its base have an argument of
        the same name, the value is the one that the class itself received, because that is what builds it again.
    """
    collected: dict[str, object] = {}
    for arguments in _init_arguments(obj, frame):
        collected.update(arguments)
    return collected


def _init_arguments(obj: object, frame: types.FrameType | None) -> Iterator[dict[str, Any]]:
    """Yield the arguments of each ``__init__`` of ``obj`` that runs in ``frame`` or around it, the innermost first."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is obj:
            yield frame_arguments(frame)
        frame = frame.f_back


def rebound_argument(obj: object, frame: types.FrameType | None, container: object) -> str | None:
    """Return the argument of a base's ``__init__`` that holds ``container`` by now, if the class of ``obj`` takes one.

    A base may fill in defaults (``cfg = defaults | cfg``), which the ``__init__`` of a class below it does not see.

    Args:
        obj: The object under construction.
        frame: The innermost frame to look at.
        container: The hyper-parameters.
    """
    taken = inspect.signature(type(obj).__init__).parameters
    for arguments in _init_arguments(obj, frame):
        for name, value in arguments.items():
            if name in taken and _is_same(value, container):
                return name
    return None


def dataclass_arguments(obj: Any) -> dict[str, Any]:
    """Return the fields that the dataclass instance ``obj`` takes as arguments, with their present values."""
    return {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj) if field.init}


def to_hparams(container: object) -> Any:
    """Return ``container`` as hyper-parameters: an :class:`AttributeDict`, or an OmegaConf container as it is.

    Raises:
        ValueError: ``container`` is a primitive or of another unsupported type.
    """
    if isinstance(container, Namespace):
        return AttributeDict(vars(container))
    if isinstance(container, dict):
        return AttributeDict(container)
    if is_omegaconf(container):
        return container
    expected = "save_hyperparameters takes names of arguments, or one dict, Namespace or OmegaConf container"
    kind = "the primitive" if isinstance(container, _PRIMITIVES) else f"a {type(container).__name__}:"
    raise ValueError(
        f"{expected}, received {kind} {container!r}. To save an argument, pass its name as a string; to save all of "
        "them, call save_hyperparameters()."
    )


def is_omegaconf(container: object) -> bool:
    """Return whether ``container`` is an OmegaConf container, without importing omegaconf."""
    omegaconf = sys.modules.get("omegaconf")
    return omegaconf is not None and isinstance(container, omegaconf.Container)


def merge_hparams(old: Any, new: Any) -> Any:
    """Return ``old`` with the entries of ``new`` added; where both have an entry, ``new`` counts."""
    if not old:
        return new
    if is_omegaconf(old) and is_omegaconf(new):
        return sys.modules["omegaconf"].OmegaConf.merge(old, new)
    return AttributeDict({**old, **new})


def copy_hparams(hparams: object) -> Any:
    """Return a deep copy of ``hparams``.

    Raises:
        TypeError: A value cannot be copied; the message names it.
    """
    if not isinstance(hparams, dict):
        return copy.deepcopy(hparams)
    memo: dict[int, object] = {}
    copied = AttributeDict()
    for name, value in hparams.items():
        try:
            copied[name] = copy.deepcopy(value, memo)
        except (TypeError, RuntimeError) as error:
            raise TypeError(
                f"Hyper-parameter {name!r} must be a value that can be copied, received {value!r} ({error}). "
                f"Leave it out with self.save_hyperparameters(ignore=[{name!r}])."
            ) from error
    return copied


def drop_unpicklable(hparams: object) -> None:
    """Remove the entries of ``hparams`` that no checkpoint can hold, with a warning for each."""
    if not isinstance(hparams, dict):
        return
    for name, value in list(hparams.items()):
        if value is None or isinstance(value, (*_PRIMITIVES, Tensor)):
            continue
        try:
            pickle.dumps(value)
        except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
            rank_zero_warn(
                f"Hyper-parameter {name!r} is removed, because it cannot be pickled: {error}. "
                f"Leave it out with self.save_hyperparameters(ignore=[{name!r}])."
            )
            del hparams[name]


class HyperparametersMixin:
    """Gives a class ``save_hyperparameters`` and ``hparams``."""

    _hparams: Any
    _hparams_initial: Any
    _hparams_name: str | None = None
    _log_hyperparams: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: types.FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of ``__init__`` in ``self.hparams``, in checkpoints, and in the loggers.

        Call it in ``__init__``. Without arguments it keeps every argument of every class of the object, ``**kwargs``
        included; for dataclasses it keeps the fields. Later calls add to what is kept.

        Args:
            args: Names of the arguments to keep, or one dict, ``argparse.Namespace`` or OmegaConf container, whose
                entries are kept in their place.
            ignore: Names of the arguments not to keep. They also leave what an earlier call kept.
            frame: Frame of the ``__init__`` call. By default it is found among the callers.
            logger: Whether to send them to the loggers when a run starts.

        Raises:
            KeyError: A name is not an argument of ``__init__``.
            ValueError: What is passed is neither names nor a single container.
            TypeError: A value cannot be copied.

        Example:
            >>> class Net(HyperparametersMixin):
            ...     def __init__(self, width, depth=2, path=None):
            ...         super().__init__()
            ...         self.save_hyperparameters(ignore="path")
            >>> Net(8).hparams.width
            8
        """
        ignored = set(_as_names(ignore))
        non_names = [arg for arg in args if not isinstance(arg, str)]
        if len(non_names) > 1 or (non_names and len(args) > 1):
            raise ValueError(
                "save_hyperparameters takes names of arguments, or one container, "
                f"received {len(args)} arguments: {args!r}. Pass the names as strings."
            )
        self._log_hyperparams = logger
        if len(args) == 1 and _is_empty(args[0]):
            return

        given = _given.get()
        if given is not None:
            init_args = dict(given)
        elif dataclasses.is_dataclass(self):
            init_args = dataclass_arguments(self)
        else:
            init_args = collect_init_args(self, frame if frame is not None else sys._getframe(1))
        _warn_of_misspelt(ignored - {*init_args, *self.hparams}, init_args)
        init_args = {name: value for name, value in init_args.items() if name not in ignored}

        name: str | None
        if non_names:
            hparams = to_hparams(non_names[0])
            name = next((key for key, value in init_args.items() if _is_same(value, non_names[0])), None)
            if name is None:
                name = rebound_argument(self, frame if frame is not None else sys._getframe(1), non_names[0])
            if ignored:
                hparams = _without(hparams, ignored)
        else:
            hparams = AttributeDict(_pick(init_args, args) if args else init_args)
            name = "kwargs" if hparams else None
            _warn_about_modules(hparams)

        if given is not None and not non_names:
            hparams.update({key: value for key, value in given.items() if key in ("_instantiator", "_class_path")})
        if ignored:
            self._hparams = _without(self.hparams, ignored)
        self._set_hparams(hparams)
        self._hparams_initial = copy_hparams(self._hparams)
        self._hparams_name = name

    def _set_hparams(self, hparams: object) -> None:
        """Add to what is kept; what a run began with stays (graphium, nemo)."""
        self._hparams = merge_hparams(self.hparams, to_hparams(hparams))

    @property
    def hparams(self) -> Any:
        """What ``save_hyperparameters`` kept: an :class:`AttributeDict`, or an OmegaConf container."""
        if "_hparams" not in self.__dict__:
            self._hparams = AttributeDict()
        return self._hparams

    @property
    def hparams_initial(self) -> Any:
        """A copy of ``hparams`` as they were when saved; changing it changes nothing."""
        return copy_hparams(self.__dict__.get("_hparams_initial", AttributeDict()))


def _as_names(names: Sequence[str] | str | None) -> Iterable[str]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else names


def _is_empty(container: Any) -> bool:
    return container is None or ((isinstance(container, dict) or is_omegaconf(container)) and len(container) == 0)


def _pick(init_args: Mapping[str, object], names: Sequence[str]) -> dict[str, object]:
    missing = [name for name in names if name not in init_args]
    if missing:
        raise KeyError(
            f"save_hyperparameters takes names of arguments of __init__, received {missing[0]!r}. "
            f"Choose from {sorted(init_args)}."
        )
    return {name: init_args[name] for name in names}


def _without(hparams: Any, names: set[str]) -> Any:
    if is_omegaconf(hparams):
        return sys.modules["omegaconf"].OmegaConf.masked_copy(hparams, [key for key in hparams if key not in names])
    return AttributeDict({key: value for key, value in hparams.items() if key not in names})


def _is_same(value: object, container: object) -> bool:
    if value is container:
        return True
    try:
        return type(value) is type(container) and bool(value == container)
    except _INCOMPARABLE:
        return False


def _warn_of_misspelt(unknown: set[str], arguments: Mapping[str, object]) -> None:
    """Warn of names to ignore that are no arguments, but nearly so."""
    for name in sorted(unknown):
        if meant := did_you_mean(name, arguments):
            rank_zero_warn(f"save_hyperparameters(ignore=[{name!r}]) names no argument of __init__.{meant}")


def _warn_about_modules(hparams: Mapping[str, object]) -> None:
    for name, value in hparams.items():
        if isinstance(value, nn.Module):
            rank_zero_warn(
                f"Argument {name!r} is a torch.nn.Module, whose weights every checkpoint holds already. "
                f"Leave it out with self.save_hyperparameters(ignore=[{name!r}])."
            )
