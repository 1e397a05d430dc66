"""Settings: what the user asked of a Trainer, checked. Each argument is checked by pure functions."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Optional, TypeVar, Union, cast

from levin.utilities.exceptions import MisconfigurationException, did_you_mean, require_choice, value_error
from levin.utilities.filesystem import is_local
from levin.utilities.numbers import plain_number
from levin.utilities.rank_zero import rank_zero_info
from levin.utilities.states import GradClipAlgorithmType
from levin.utilities.types import Function

Limit = Union[int, float]
F = TypeVar("F", bound=Function)


@dataclass(frozen=True)
class Settings:
    """The checked arguments of a Trainer, under their names there; made by :func:`check_settings`.

    Engine, loggers, callbacks and profiler are made of the other arguments. A setting that is changed on a Trainer
    makes a new object, which takes the place of this one.
    """

    # Limits. The live ones of training lie in ``trainer.fit_loop``, where users change them.
    max_epochs: Optional[int]
    min_epochs: Optional[int]
    max_steps: int
    min_steps: Optional[int]
    fast_dev_run: Union[int, bool]
    overfit_batches: Limit
    limit_train_batches: Limit
    limit_val_batches: Limit
    limit_test_batches: Limit
    limit_predict_batches: Limit
    # Cadences
    num_sanity_val_steps: Limit
    val_check_interval: Limit
    val_check_seconds: Optional[float]
    check_val_every_n_epoch: Optional[int]
    log_every_n_steps: int
    reload_dataloaders_every_n_epochs: int
    # The step
    accumulate_grad_batches: int
    splits_batches: bool
    gradient_clip_val: Optional[Union[int, float]]
    gradient_clip_algorithm: Optional[GradClipAlgorithmType]
    detect_anomaly: bool
    compile: Optional[dict[str, Any]]
    inference_mode: bool
    # Around it
    barebones: bool
    logger: object
    enable_checkpointing: bool
    enable_progress_bar: bool
    enable_model_summary: bool
    enable_autolog_hparams: bool
    use_distributed_sampler: bool
    default_root_dir: str
    model_registry: Optional[str]


def check_settings(arguments: Mapping[str, Any]) -> Settings:
    """Return the settings for the arguments of a Trainer, with their defaults filled in.

    Args:
        arguments: Name -> value as it was given; those that are no settings are left to others.

    Raises:
        MisconfigurationException: A value that cannot be meant, with the way out.
        TypeError: A value for clipping that is no number.
    """
    values = dict(arguments)
    is_bare = values["barebones"]
    if is_bare:
        check_barebones(values)
    for name, default in DEFAULTS.items():
        if values[name] is None:
            values[name] = BAREBONES[name] if is_bare else default
    for name in COUNTS:
        values[name] = _whole(values[name], _WITHOUT_LIMIT.get(name))
    values["splits_batches"] = values["accumulate_grad_batches"] == "auto"
    if values["splits_batches"]:
        values["accumulate_grad_batches"] = 1
    check_counts({name: values[name] for name in COUNTS})
    check_flags({name: values[name] for name in FLAGS})
    dry = values["fast_dev_run"]
    if not isinstance(dry, int) or dry < 0:
        raise value_error("fast_dev_run", dry, "must be a bool or an int >= 0", "Use True for one batch.")
    values.update({name: check_limit(values[name], name) for name in LIMITS})
    if values["overfit_batches"]:
        values["limit_train_batches"] = values["limit_val_batches"] = values["overfit_batches"]
    if values["num_sanity_val_steps"] == -1:
        values["num_sanity_val_steps"] = math.inf
    values["val_check_interval"], values["val_check_seconds"] = check_val_interval(
        values["val_check_interval"], values["check_val_every_n_epoch"], values["max_steps"]
    )
    values["fast_dev_run"] = True if dry == 1 else dry
    if dry:
        values.update(_dry(int(dry), is_overfit=bool(values["overfit_batches"])))
    values["gradient_clip_algorithm"] = check_clipping(values["gradient_clip_val"], values["gradient_clip_algorithm"])
    values["compile"] = check_compile(values["compile"])
    if values["detect_anomaly"]:
        rank_zero_info(
            "You have turned on `Trainer(detect_anomaly=True)`, which slows training down a lot. Use it to find a NaN."
        )
    if values["deterministic"] not in (None, True, False, "warn"):
        raise value_error("deterministic", values["deterministic"], "must be True, False or 'warn'")
    root = os.getcwd() if values["default_root_dir"] is None else os.fspath(values["default_root_dir"])
    values["default_root_dir"] = os.path.expanduser(root) if is_local(root) else root
    if values["model_registry"]:
        # A version behind a colon is that of a model, not of the place that models are kept in.
        values["model_registry"] = values["model_registry"].split(":")[0]
    return Settings(**{field.name: values[field.name] for field in fields(Settings)})


def _dry(batches: int, is_overfit: bool) -> dict[str, object]:
    """Return what ``fast_dev_run`` sets in place of what was given."""
    rank_zero_info(
        f"Running in `fast_dev_run` mode: will run the requested loop using {batches} batch(es). "
        "Logging and checkpointing is suppressed."
    )
    limits = ["limit_test_batches", "limit_predict_batches"]
    if not is_overfit:
        limits += ["limit_train_batches", "limit_val_batches"]
    return {
        **dict.fromkeys(limits, batches),
        "max_epochs": 1,
        "max_steps": batches,
        "num_sanity_val_steps": 0,
        "val_check_interval": 1.0,
        "val_check_seconds": None,
        "check_val_every_n_epoch": 1,
    }


COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILE_OPTIONS = ("backend", "dynamic", "fullgraph", "mode", "options")


def check_compile(value: object) -> Optional[dict[str, Any]]:
    """Return the options of ``torch.compile`` for ``Trainer(compile=...)``, with "blocks" among them; None for off.

    Raises:
        MisconfigurationException: A mode or an option that there is not.

    Example:
        >>> check_compile("reduce-overhead"), check_compile(True), check_compile(False)
        ({'mode': 'reduce-overhead'}, {}, None)
    """
    if value is None or value is False:
        return None
    if value is True:
        return {}
    if value == "blocks":
        return {"blocks": True}
    if isinstance(value, str):
        value = {"mode": value}
    hint = f"Use True, 'blocks', a mode of torch.compile {COMPILE_MODES}, or a dict with some of {COMPILE_OPTIONS} and 'blocks'."
    if not isinstance(value, Mapping) or set(value) - {*COMPILE_OPTIONS, "blocks"}:
        raise value_error("compile", value, "must be True, False, a string or a dict of options", hint)
    if value.get("mode") not in (None, *COMPILE_MODES):
        raise value_error("compile", value["mode"], "must name a mode of torch.compile", hint)
    return dict(value)


def check_val_interval(value: object, every_n_epoch: Optional[int], max_steps: int) -> tuple[Limit, Optional[float]]:
    """Return the interval between validations, as batches or a fraction, and in seconds if it goes by the clock.

    Raises:
        MisconfigurationException: It is none of them, or a fraction without epochs to be a fraction of.
    """
    meaning = "must be an int >= 1, a float in (0.0, 1.0] or a duration"
    if value is None:
        return 1.0, None
    duration = parse_duration(value, "val_check_interval")
    if duration is not None:
        return 1.0, duration.total_seconds()
    # Packages give min(interval, max_steps); without a step there is nothing to validate after.
    is_unused = value == 0 == max_steps
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (0 < value <= 1 or _is_count(value) or is_unused)
    ):
        raise value_error("val_check_interval", value, meaning)
    if isinstance(value, float) and value > 1.0:
        return int(value), None
    if every_n_epoch is None and isinstance(value, float):
        raise MisconfigurationException(
            f"val_check_interval must be an int with check_val_every_n_epoch=None, received {value}. "
            "Give the number of training batches between validations."
        )
    return value, None


def check_clipping(value: object, algorithm: object) -> Optional[GradClipAlgorithmType]:
    """Return the algorithm for clipping gradients to ``value``, None for the default one.

    Raises:
        TypeError: ``value`` is no number.
        MisconfigurationException: Another algorithm.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"gradient_clip_val must be an int or a float, received {value!r}.")
    if algorithm is None:
        return None
    name = str(algorithm).lower()
    require_choice("gradient_clip_algorithm", name, ("norm", "value"))
    return GradClipAlgorithmType(name)


def defaults_from_environment(init: F) -> F:
    """Let ``PL_<CLASS>_<ARGUMENT>`` stand in for each argument that is not given.

    Values are read as Python literals where possible; an explicit argument wins. Numbers of NumPy and torch become Python's.
    """
    names = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def wrapped(self: object, *args: object, **kwargs: object) -> None:
        if args:
            raise TypeError(
                f"{type(self).__name__} takes keyword arguments only, received {len(args)} by position. "
                f"Write {type(self).__name__}(max_epochs=10)."
            )
        for name in kwargs.keys() - set(names):
            hint = did_you_mean(name, names)
            raise TypeError(f"{type(self).__name__} has no argument {name!r}, received {name}={kwargs[name]!r}.{hint}")
        prefix = f"PL_{type(self).__name__.upper()}_"
        for name in names:
            text = os.environ.get(prefix + name.upper(), "")
            if text and name not in kwargs:
                try:
                    kwargs[name] = ast.literal_eval(text)
                except (ValueError, SyntaxError):
                    kwargs[name] = text
        init(self, **{name: plain_number(value) for name, value in kwargs.items()})

    return cast(F, wrapped)


def check_limit(value: Optional[Limit], name: str) -> Limit:
    """Return a limit of batches: an int counts batches, a float in [0, 1] is a fraction; None is 1.0.

    Raises:
        MisconfigurationException: Neither of them.
    """
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise value_error(name, value, "must be an int or a float", "Use 10 for ten batches, 0.1 for a tenth.")
    if not (0 <= value <= 1 or _is_count(value)):
        raise value_error(name, value, "must be a count >= 0 or a fraction in [0.0, 1.0]")
    if name != "overfit_batches" and value == 1:
        what = "1 batch" if isinstance(value, int) else "100% of the batches"
        rank_zero_info(f"`Trainer({name}={value!r})` was configured so {what} will be used.")
    return int(value) if value > 1 else value


def _is_count(value: Limit) -> bool:
    return value > 1 and value % 1 == 0  # not infinity, nor NaN


def num_from_limit(limit: Limit, length: Limit, name: str) -> Limit:
    """Return how many batches a limit leaves of a loader of ``length`` batches (inf when unknown).

    Raises:
        MisconfigurationException: A fraction of an unknown length, or one that leaves nothing.
    """
    if isinstance(limit, int) or limit == 0.0:
        return min(length, int(limit))
    if length == math.inf:
        if limit == 1.0:
            return length
        raise MisconfigurationException(
            f"{name} must be 1.0 or an int when the loader's length is unknown, received {limit}. Give a number of batches."
        )
    count = int(length * limit)
    if count == 0 and length > 0:
        raise MisconfigurationException(
            f"{name} must leave at least one of {length} batches, received {limit}. Use at least {1 / length:.4g}."
        )
    return count


def parse_duration(value: object, name: str) -> Optional[timedelta]:
    """Return a duration given as ``"DD:HH:MM:SS"``, dict or timedelta; None when ``value`` is no duration at all.

    Raises:
        MisconfigurationException: A string or dict that is not a duration.
    """
    if isinstance(value, timedelta):
        return value
    if isinstance(value, dict):
        try:
            return timedelta(**value)
        except TypeError as error:
            raise value_error(name, value, "must hold arguments of datetime.timedelta", 'Use {"hours": 1}.') from error
    if isinstance(value, str):
        parts = value.strip().split(":")
        if len(parts) != 4 or not all(part.isdigit() for part in parts):
            raise value_error(name, value, 'must have the form "DD:HH:MM:SS"', 'Use "00:01:30:00" for 90 minutes.')
        days, hours, minutes, seconds = map(int, parts)
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    return None


COUNTS = {
    "max_epochs": (-1, "Use -1 for no limit."),
    "min_epochs": (0, "Use 1 for at least one epoch."),
    "max_steps": (-1, "Use -1 for no limit."),
    "min_steps": (0, "Use 1 for at least one step."),
    "num_nodes": (1, "Use 1 for one machine."),
    "accumulate_grad_batches": (1, "Use 1 to step on every batch, 'auto' to split batches that do not fit."),
    "log_every_n_steps": (0, "Use 0 to log no steps."),
    "num_sanity_val_steps": (-1, "Use -1 for all batches."),
    "reload_dataloaders_every_n_epochs": (0, "Use 0 to load them once."),
    "check_val_every_n_epoch": (1, "Use None to count batches across epochs."),
}
"""Argument -> its least value, and the way out when it is less."""

_MAY_BE_LEFT_OPEN = ("max_epochs", "min_epochs", "min_steps", "check_val_every_n_epoch")


_WITHOUT_LIMIT = {"max_epochs": -1, "max_steps": -1, "num_sanity_val_steps": -1, "log_every_n_steps": 0}
"""Argument -> what says the same as infinity."""


def _whole(value: object, without_limit: Optional[int]) -> object:
    """Return a whole float (people write 1e5) or infinity as an int, anything else as it is."""
    if not isinstance(value, float):
        return value
    if value == math.inf and without_limit is not None:
        return without_limit
    return int(value) if value.is_integer() else value


def check_counts(given: dict[str, object]) -> None:
    """Raise MisconfigurationException when an argument that counts something is no int, or too small."""
    for name, value in given.items():
        minimum, remedy = COUNTS[name]
        if value is None and name in _MAY_BE_LEFT_OPEN:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise value_error(name, value, f"must be an int >= {minimum}", remedy)


FLAGS = (
    "barebones", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "benchmark", "inference_mode",
    "use_distributed_sampler", "detect_anomaly", "sync_batchnorm", "enable_autolog_hparams", "suggest_integrations",
)  # fmt: skip
"""The arguments that switch something on or off."""

LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
"""The arguments that are a number of batches or a fraction of them."""

DEFAULTS = {
    "logger": True, "enable_checkpointing": True, "enable_progress_bar": True, "enable_model_summary": True,
    "num_sanity_val_steps": 2, "log_every_n_steps": 50,
}  # fmt: skip
"""What stands for None, unless barebones does."""


def check_flags(given: dict[str, object]) -> None:
    """Raise MisconfigurationException when an argument that switches something is neither on nor off (None: the default)."""
    for name, value in given.items():
        if value is not None and value not in (True, False):
            raise value_error(name, value, "must be True or False")


BAREBONES = {
    "enable_checkpointing": False, "logger": False, "enable_progress_bar": False, "log_every_n_steps": 0,
    "enable_model_summary": False, "num_sanity_val_steps": 0, "fast_dev_run": False, "detect_anomaly": False,
    "profiler": None,
}  # fmt: skip
"""What barebones switches off, with the values it forces."""


def check_barebones(given: dict[str, object]) -> None:
    """Raise ValueError when an argument asks for what ``barebones=True`` switches off."""
    wrong = {name: value for name, value in given.items() if value and name in BAREBONES}
    if wrong:
        text = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise ValueError(f"Trainer(barebones=True) switches these off, received {text}. Leave them out.")
    rank_zero_info(
        "You are running in `Trainer(barebones=True)` mode. These are off, to measure the overhead of the Trainer: "
        + ", ".join([*BAREBONES, "self.log", "self.log_dict"])
    )
