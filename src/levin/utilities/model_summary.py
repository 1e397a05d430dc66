"""The table of a model's layers: their types, parameters, sizes and floating-point operations."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from levin.utilities.modes import eval_mode, forward_of_example
from levin.utilities.numbers import plain_number
from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_warn

UNKNOWN_SIZE = "?"
NOT_APPLICABLE = "n/a"
LEFTOVER_NAME = "other params"
_UNITS = ("", "K", "M", "B", "T")

Column = tuple[str, list[str]]


class LayerSummary:
    """One row of the table: what is known about a single layer.

    The sizes are those of the first call after the summary was made; until then they are ``"?"``.

    Args:
        module: The layer.

    Example:
        >>> layer = torch.nn.Linear(3, 4)
        >>> summary = LayerSummary(layer)
        >>> _ = layer(torch.rand(2, 3))
        >>> summary.num_parameters, summary.in_size, summary.out_size
        (16, [2, 3], [2, 4])
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: nn.Module = module
        self.in_size: str | list[object] = UNKNOWN_SIZE
        """Shape of the input, a list of shapes for several, or ``"?"``."""
        self.out_size: str | list[object] = UNKNOWN_SIZE
        """Shape of the output, a list of shapes for several, or ``"?"``."""
        self._hook: RemovableHandle | None = self._register_hook()

    def _register_hook(self) -> RemovableHandle | None:
        if isinstance(self._module, torch.jit.ScriptModule):
            return None  # a compiled module takes no hooks

        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], out: object) -> None:
            inputs = [*args, *kwargs.values()]
            self.in_size = parse_batch_shape(inputs[0] if len(inputs) == 1 else inputs)
            self.out_size = parse_batch_shape(out)
            self.detach_hook()

        return self._module.register_forward_hook(hook, with_kwargs=True)

    def detach_hook(self) -> None:
        """Stop waiting for a call of the layer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def layer_type(self) -> str:
        """Name of the layer's class."""
        return str(self._module.__class__.__name__)

    @property
    def num_parameters(self) -> int:
        """Number of parameters in the layer and everything below it; lazy ones count 0 until they have a shape."""
        return sum(_num_elements(parameter) for parameter in self._module.parameters())

    @property
    def num_local_parameters(self) -> int:
        """Number of parameters that this process holds; differs from ``num_parameters`` when they are sharded."""
        return sum(_num_local_elements(parameter) for parameter in self._module.parameters())

    training: bool = reads("_module.training", "Whether the layer is in training mode.")


class ModelSummary:
    """Describe the layers of a model; ``str()`` of it is the table.

    With an ``example_input_array`` on the model, one forward pass in eval mode finds the sizes and the FLOPs. It
    leaves the modes of the submodules and the random generators as they were.

    Args:
        model: A LightningModule, or any ``torch.nn.Module``.
        max_depth: How many levels of nested layers to list: 1 for the direct children, -1 for all, 0 for none.

    Raises:
        ValueError: ``max_depth`` is not -1, 0 or a positive integer.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU())
        >>> summary = ModelSummary(model)
        >>> summary.layer_types, summary.param_nums, summary.total_parameters
        (['Linear', 'ReLU'], [2112, 0], 2112)
    """

    def __init__(self, model: nn.Module, max_depth: int = 1) -> None:
        self._model: nn.Module = model
        self._max_depth: int = check_max_depth(max_depth)
        self._flop_counts: dict[str, int] = {}
        # Floating-point operations of one forward pass of the example input; 0 without one.
        self.total_flops: int = 0
        self._layer_summary: dict[str, LayerSummary] = self.summarize()

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """Names and modules of the listed layers, in the order of their definition."""
        named = [(name, module) for name, module in self._model.named_modules() if name]
        if self._max_depth == -1:
            return named
        return [(name, module) for name, module in named if name.count(".") < self._max_depth]

    @property
    def layer_names(self) -> list[str]:
        """Names of the listed layers, as ``named_modules`` has them."""
        return list(self._layer_summary)

    @property
    def layer_types(self) -> list[str]:
        """Class names of the listed layers."""
        return [layer.layer_type for layer in self._layer_summary.values()]

    @property
    def in_sizes(self) -> list[object]:
        """Input shapes of the listed layers."""
        return [layer.in_size for layer in self._layer_summary.values()]

    @property
    def out_sizes(self) -> list[object]:
        """Output shapes of the listed layers."""
        return [layer.out_size for layer in self._layer_summary.values()]

    @property
    def param_nums(self) -> list[int]:
        """Numbers of parameters of the listed layers, each with everything below it."""
        return [layer.num_parameters for layer in self._layer_summary.values()]

    @property
    def training_modes(self) -> list[bool]:
        """Whether each listed layer is in training mode."""
        return [layer.training for layer in self._layer_summary.values()]

    @property
    def total_training_modes(self) -> dict[str, int]:
        """How many submodules, listed or not, are in ``"train"`` and in ``"eval"`` mode."""
        modes = [module.training for name, module in self._model.named_modules() if name]
        return {"train": modes.count(True), "eval": modes.count(False)}

    @property
    def total_parameters(self) -> int:
        """Number of parameters in the model, shared ones counted once."""
        return sum(_num_elements(parameter) for parameter in self._model.parameters())

    @property
    def trainable_parameters(self) -> int:
        """Number of those that require a gradient."""
        return sum(_num_elements(parameter) for parameter in self._model.parameters() if parameter.requires_grad)

    @property
    def total_layer_params(self) -> int:
        """Sum of ``param_nums``; with nested or shared layers this counts some parameters more than once."""
        return sum(self.param_nums)

    @property
    def model_size(self) -> float:
        """Size of the parameters in megabytes, in the dtypes they have now."""
        sized = [p for p in self._model.parameters() if not isinstance(p, UninitializedParameter)]
        return sum(_num_elements(parameter) * parameter.element_size() for parameter in sized) / 1e6

    @property
    def flop_counts(self) -> dict[str, int]:
        """Layer name -> floating-point operations of its calls in one forward pass of the example input."""
        return {name: self._flop_counts.get(name, 0) for name in self._layer_summary}

    def summarize(self) -> dict[str, LayerSummary]:
        """Look at the layers, running the example input through them if there is one."""
        summary = OrderedDict((name, LayerSummary(module)) for name, module in self.named_modules)
        try:
            if self._example_input is not None:
                self._forward_example_input()
        finally:
            for layer in summary.values():
                layer.detach_hook()
        if any(isinstance(parameter, UninitializedParameter) for parameter in self._model.parameters()):
            rank_zero_warn(
                "The total number of parameters detected may be inaccurate because the model contains an instance of"
                " `UninitializedParameter`. To get an accurate number, set `self.example_input_array` in your"
                " LightningModule."
            )
        return summary

    @property
    def _example_input(self) -> object:
        return getattr(self._model, "example_input_array", None)

    def _forward_example_input(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        model = self._model
        counter = FlopCounterMode(display=False)
        # A counting mode does not see through sharded tensors.
        counting = contextlib.nullcontext() if _is_sharded(model) else counter
        with eval_mode(model), forward_of_example(model, self._example_input) as example, counting:
            if isinstance(example, dict):
                model(**example)
            elif isinstance(example, (list, tuple)):
                model(*example)
            else:
                model(example)
        root = type(model).__name__
        counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        self._flop_counts = {name[len(root) + 1 :]: count for name, count in counts.items() if name.startswith(root)}
        self.total_flops = counter.get_total_flops()

    def _get_summary_data(self) -> list[Column]:
        """Return the columns of the table: title and cells."""
        layers = self._layer_summary
        columns: list[Column] = [
            (" ", [str(index) for index in range(len(layers))]),
            ("Name", self.layer_names),
            ("Type", self.layer_types),
            ("Params", [get_human_readable_count(number) for number in self.param_nums]),
        ]
        if _is_sharded(self._model):
            local = [layer.num_local_parameters for layer in layers.values()]
            columns.append(("Params per Device", [get_human_readable_count(number) for number in local]))
        columns.append(("Mode", ["train" if mode else "eval" for mode in self.training_modes]))
        if self.total_flops:  # 0: nothing was counted
            columns.append(("FLOPs", [get_human_readable_count(count) for count in self.flop_counts.values()]))
        if self._example_input is not None:
            columns += [
                ("In sizes", [str(size) for size in self.in_sizes]),
                ("Out sizes", [str(size) for size in self.out_sizes]),
            ]
        leftover = self._leftover_parameters()
        if leftover:
            row = {
                " ": " ",
                "Name": LEFTOVER_NAME,
                "Params": get_human_readable_count(sum(map(_num_elements, leftover))),
                "Params per Device": get_human_readable_count(sum(map(_num_local_elements, leftover))),
            }
            for title, cells in columns:
                cells.append(row.get(title, NOT_APPLICABLE))
        return columns

    def _leftover_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that belong to no listed layer and have a shape."""
        listed = {id(parameter) for _, module in self.named_modules for parameter in module.parameters()}
        return [p for p in self._model.parameters() if id(p) not in listed and _num_elements(p) > 0]

    def __str__(self) -> str:
        return format_summary_table(
            self._get_summary_data(),
            self.total_parameters,
            self.trainable_parameters,
            self.model_size,
            self.total_training_modes,
            self.total_flops,
        )

    def __repr__(self) -> str:
        return str(self)


def summarize(lightning_module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """Return the summary of a model; see :class:`ModelSummary`.

    Args:
        lightning_module: The model.
        max_depth: How many levels of nested layers to list: 1 for the direct children, -1 for all, 0 for none.
    """
    return ModelSummary(lightning_module, max_depth=max_depth)


def check_max_depth(max_depth: int) -> int:
    """Return ``max_depth`` if it is -1, 0 or positive.

    Raises:
        ValueError: It is something else.
    """
    max_depth = plain_number(max_depth)
    if not isinstance(max_depth, int) or max_depth < -1:
        raise ValueError(
            f"`max_depth` can be -1, 0 or > 0, got {max_depth!r}. Use 1 for the direct children, -1 for all layers."
        )
    return max_depth


def parse_batch_shape(batch: object) -> str | list[object]:
    """Return the shape of a tensor, the list of shapes of a list or tuple, and ``"?"`` for everything else.

    Example:
        >>> parse_batch_shape([torch.zeros(2, 3), (torch.zeros(4), "text")])
        [[2, 3], [[4], '?']]
    """
    if hasattr(batch, "shape"):
        return list(batch.shape)
    if isinstance(batch, (list, tuple)):
        return [parse_batch_shape(element) for element in batch]
    return UNKNOWN_SIZE


def get_human_readable_count(number: int) -> str:
    """Return ``number`` with two or more significant digits and K, M, B or T for thousands, millions and so on.

    Raises:
        ValueError: ``number`` is negative.

    Example:
        >>> get_human_readable_count(123), get_human_readable_count(1234), get_human_readable_count(2_000_000)
        ('123  ', '1.2 K', '2.0 M')
    """
    if number < 0:
        raise ValueError(f"number must be >= 0, received {number}.")
    digits = len(str(int(number)))
    group = min((digits - 1) // 3, len(_UNITS) - 1)
    scaled = number / 1000**group
    if group == 0 or scaled >= 100:
        return f"{int(scaled):,d} {_UNITS[group] or ' '}"
    return f"{scaled:,.1f} {_UNITS[group]}"


def get_formatted_model_size(total_model_size: float) -> str:
    """Return a size in megabytes as text.

    Example:
        >>> get_formatted_model_size(1234.5678)
        '1,234.568'
    """
    return f"{total_model_size:,.3f}"


def format_summary_table(
    columns: Iterable[Column],
    total_parameters: int,
    trainable_parameters: int,
    model_size_mb: float,
    total_training_modes: dict[str, int],
    total_flops: int,
) -> str:
    """Return the table as plain text, with the totals below it.

    Args:
        columns: Title and cells of each column, all of one length.
        total_parameters: Number of parameters in the model.
        trainable_parameters: Number of those that require a gradient.
        model_size_mb: Size of the parameters in megabytes.
        total_training_modes: How many submodules are in ``"train"`` and in ``"eval"`` mode.
        total_flops: Floating-point operations of one forward pass.
    """
    columns = list(columns)
    widths = [max(len(text) for text in (title, *cells)) for title, cells in columns]
    titles = [title for title, _ in columns]
    rows = [list(row) for row in zip(*(cells for _, cells in columns))]
    lines = [" | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)) for row in (titles, *rows)]
    rule = "-" * (sum(widths) + 3 * len(widths) + 3)
    totals = summary_totals(total_parameters, trainable_parameters, model_size_mb, total_training_modes)
    if total_flops or "FLOPs" in titles:
        totals["Total Flops"] = get_human_readable_count(total_flops)
    # The totals keep one column; a size in the terabytes must not run into its label.
    width = max(10, *(len(value) + 1 for value in totals.values()))
    footer = [f"{value:<{width}}{label}" for label, value in totals.items()]
    return "\n".join([lines[0], rule, *lines[1:], rule, *footer])


def summary_totals(
    total_parameters: int, trainable_parameters: int, model_size_mb: float, total_training_modes: dict[str, int]
) -> dict[str, str]:
    """Return what stands below the table, by its label; arguments as in :func:`format_summary_table`."""
    return {
        "Trainable params": get_human_readable_count(trainable_parameters),
        "Non-trainable params": get_human_readable_count(total_parameters - trainable_parameters),
        "Total params": get_human_readable_count(total_parameters),
        "Total estimated model params size (MB)": get_formatted_model_size(model_size_mb),
        "Modules in train mode": str(total_training_modes["train"]),
        "Modules in eval mode": str(total_training_modes["eval"]),
    }


def _num_elements(parameter: Tensor) -> int:
    if isinstance(parameter, UninitializedParameter):
        return 0
    # DeepSpeed's ZeRO 3 leaves an empty tensor in place of the parameter and the real count beside it.
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def _num_local_elements(parameter: Tensor) -> int:
    if isinstance(parameter, UninitializedParameter):
        return 0
    if hasattr(parameter, "to_local"):
        return int(parameter.to_local().numel())
    return int(getattr(parameter, "ds_tensor", parameter).numel())


def _is_sharded(model: nn.Module) -> bool:
    """Return whether parameters of ``model`` are spread over processes (DTensor, ZeRO 3)."""
    return any(hasattr(p, "to_local") or hasattr(p, "ds_tensor") for p in model.parameters())
