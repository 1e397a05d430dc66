"""Collectives over a group of processes as an object: for algorithms in which only some of the processes talk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self, override

from levin.strategies.collectives import parse_reduce_op
from levin.strategies.contexts import environment_variables
from levin.utilities.process_group import disconnect_processes


class Collective(ABC):
    """What processes say to each other. Results are written into the arguments, as torch.distributed does, and returned.

    :meth:`setup` connects this process with the others, :meth:`create_group` makes the group that the rest speaks to.
    """

    def __init__(self) -> None:
        self._group: object = None

    @staticmethod
    def is_available() -> bool:
        """Return whether this build of torch can do it."""
        return True

    @staticmethod
    def is_initialized() -> bool:
        """Return whether this process is connected with the others."""
        return True

    @staticmethod
    def init_group(**kwargs: Any) -> None:
        """Connect this process with the others."""

    @property
    def group(self) -> Any:
        """The group.

        Raises:
            RuntimeError: There is none yet.
        """
        return self._own_group()

    @property
    @abstractmethod
    def rank(self) -> int:
        """Index of this process in the group."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """Number of processes of the group."""

    @abstractmethod
    def setup(self, **kwargs: Any) -> Self:
        """Connect this process with the others, unless it is."""

    @abstractmethod
    def new_group(self, **kwargs: object) -> Any:
        """Return a new group."""

    @abstractmethod
    def destroy_group(self, group: object) -> None:
        """Take a group down."""

    def create_group(self, **kwargs: object) -> Self:
        """Make the group.

        Args:
            kwargs: For example ``ranks``; all processes without.

        Raises:
            RuntimeError: There is one already.
        """
        if self._group is not None:
            raise RuntimeError(f"{type(self).__name__} has a group already. Call teardown() before.")
        self._group = self.new_group(**kwargs)
        return self

    def teardown(self) -> Self:
        """Take the group down.

        Raises:
            RuntimeError: :meth:`create_group` was not called.
        """
        group, self._group = self._own_group(), None
        self.destroy_group(group)
        return self

    def _own_group(self) -> Any:
        if self._group is None:
            raise RuntimeError(f"{type(self).__name__} has no group yet. Call create_group() before.")
        return self._group

    @abstractmethod
    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Give all processes the tensor of rank ``src``."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: object = "sum") -> Tensor:
        """Give all processes the reduced tensor."""

    @abstractmethod
    def reduce(self, tensor: Tensor, dst: int, op: object = "sum") -> Tensor:
        """Give rank ``dst`` the reduced tensor."""

    @abstractmethod
    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        """Give all processes the tensors of all."""

    @abstractmethod
    def gather(self, tensor: Tensor, gather_list: list[Tensor], dst: int = 0) -> list[Tensor]:
        """Give rank ``dst`` the tensors of all."""

    @abstractmethod
    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], src: int = 0) -> Tensor:
        """Give each process its one of the tensors of rank ``src``."""

    @abstractmethod
    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: object = "sum") -> Tensor:
        """Give each process its one of the reduced tensors."""

    @abstractmethod
    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        """Give each process one tensor of each."""

    @abstractmethod
    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        """Send a tensor to one process."""

    @abstractmethod
    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        """Receive a tensor of one process."""

    @abstractmethod
    def barrier(self, device_ids: list[int] | None = None) -> None:
        """Wait until all processes are here."""


class TorchCollective(Collective):
    """Collectives of torch.distributed.

    Example:
        >>> collective = TorchCollective()
        >>> collective.setup(main_address="localhost", main_port="29500")  # doctest: +SKIP
        >>> collective.create_group().all_reduce(torch.ones(1))  # doctest: +SKIP
    """

    def __init__(self) -> None:
        if not dist.is_available():
            raise RuntimeError("This torch was built without torch.distributed. Install another build.")
        super().__init__()
        self._owns_world: bool = False

    @property
    def group(self) -> Any:
        """The group; that of all processes where they are connected and none was made.

        Raises:
            RuntimeError: There is none yet.
        """
        return dist.group.WORLD if self._group is None and dist.is_initialized() else self._own_group()

    @staticmethod
    def is_available() -> bool:
        """Return whether this build of torch has torch.distributed."""
        return dist.is_available()

    @staticmethod
    def is_initialized() -> bool:
        """Return whether this process is connected with the others."""
        return dist.is_initialized()

    @staticmethod
    def init_group(**kwargs: Any) -> None:
        """Connect this process with the others; see ``torch.distributed.init_process_group``."""
        dist.init_process_group(**kwargs)

    @property
    @override
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    @override
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    def setup(self, main_address: str | None = None, main_port: str | None = None, **kwargs: Any) -> Self:
        """Connect this process with the others, unless it is.

        Args:
            main_address: Where rank 0 listens; ``MASTER_ADDR`` by default.
            main_port: Its port; ``MASTER_PORT`` by default.
            kwargs: Passed to ``torch.distributed.init_process_group``.
        """
        if dist.is_initialized():
            return self
        with environment_variables(MASTER_ADDR=main_address, MASTER_PORT=main_port):
            dist.init_process_group(**kwargs)
        self._owns_world = True
        return self

    def new_group(self, **kwargs: Any) -> Any:
        """Return a new group of torch.distributed."""
        return dist.new_group(**kwargs)

    def destroy_group(self, group: object) -> None:
        """Take a group down, if this process is in it."""
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)

    def teardown(self) -> Self:
        """Take the group down and, where :meth:`setup` connected this process, the connection."""
        super().teardown()
        if self._owns_world:
            disconnect_processes()
            self._owns_world = False
        return self

    @override
    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        dist.broadcast(tensor, src, group=self.group)
        return tensor

    def all_reduce(self, tensor: Tensor, op: object = "sum") -> Tensor:
        """Give all processes the reduced tensor.

        Args:
            tensor: Of the same shape everywhere.
            op: ``"sum"``, ``"mean"``, ``"min"``, ``"max"``, ``"product"``, or a ``ReduceOp``.

        Raises:
            ValueError: ``op`` is unknown.
        """
        is_mean, native = parse_reduce_op(op)
        dist.all_reduce(tensor, op=native, group=self.group)
        return tensor.div_(self.world_size) if is_mean else tensor

    @override
    def reduce(self, tensor: Tensor, dst: int, op: object = "sum") -> Tensor:
        is_mean, native = parse_reduce_op(op)
        dist.reduce(tensor, dst, op=native, group=self.group)
        return tensor.div_(self.world_size) if is_mean and dist.get_rank() == dst else tensor

    @override
    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        dist.all_gather(tensor_list, tensor, group=self.group)
        return tensor_list

    def gather(self, tensor: Tensor, gather_list: list[Tensor], dst: int = 0) -> list[Tensor]:
        """Give rank ``dst`` the tensors of all; in the others ``gather_list`` is empty."""
        dist.gather(tensor, gather_list or None, dst, group=self.group)
        return gather_list

    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], src: int = 0) -> Tensor:
        """Give each process its one of the tensors of rank ``src``; in the others ``scatter_list`` is empty."""
        dist.scatter(tensor, scatter_list or None, src, group=self.group)
        return tensor

    @override
    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: object = "sum") -> Tensor:
        is_mean, native = parse_reduce_op(op)
        dist.reduce_scatter(output, input_list, op=native, group=self.group)
        return output.div_(self.world_size) if is_mean else output

    @override
    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        dist.all_to_all(output_tensor_list, input_tensor_list, group=self.group)
        return output_tensor_list

    @override
    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        dist.send(tensor, dst, tag=tag, group=self.group)

    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        """Receive a tensor of one process; of any when ``src`` is None."""
        dist.recv(tensor, src, tag=tag, group=self.group)
        return tensor

    @override
    def barrier(self, device_ids: list[int] | None = None) -> None:
        dist.barrier(group=self.group, device_ids=device_ids)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Wait until all processes are here; Gloo says which is missing."""
        dist.monitored_barrier(group=self.group, timeout=timeout, wait_all_ranks=wait_all_ranks)

    def all_gather_object(self, object_list: list[object], obj: object) -> list[Any]:
        """Give all processes the objects of all."""
        dist.all_gather_object(object_list, obj, group=self.group)
        return object_list

    def broadcast_object_list(
        self, object_list: list[object], src: int, device: torch.device | None = None
    ) -> list[Any]:
        """Give all processes the objects of rank ``src``."""
        dist.broadcast_object_list(object_list, src, group=self.group, device=device)
        return object_list

    def gather_object(self, obj: object, object_gather_list: list[object], dst: int = 0) -> list[Any]:
        """Give rank ``dst`` the objects of all; in the others the list is empty."""
        dist.gather_object(obj, object_gather_list or None, dst, group=self.group)
        return object_gather_list

    def scatter_object_list(
        self, scatter_object_output_list: list[object], scatter_object_input_list: list[object], src: int = 0
    ) -> list[Any]:
        """Give each process its one of the objects of rank ``src``."""
        dist.scatter_object_list(scatter_object_output_list, scatter_object_input_list, src, group=self.group)
        return scatter_object_output_list


class SingleDeviceCollective(Collective):
    """The same with one process, which gets back what it gives.

    Example:
        >>> SingleDeviceCollective().all_reduce(torch.ones(1))
        tensor([1.])
    """

    rank = 0
    world_size = 1

    def setup(self, **kwargs: Any) -> Self:
        """Return this object."""
        return self

    def new_group(self, **kwargs: object) -> Any:
        """Return what stands for the group of one."""
        return object()

    def destroy_group(self, group: object) -> None:
        """Nothing to take down."""

    def broadcast(self, tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the tensor."""
        return tensor

    all_reduce = reduce = recv = broadcast

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor, **kwargs: object) -> list[Tensor]:
        """Return the tensor in a list."""
        return [tensor]

    def gather(self, tensor: Tensor, *args: object, **kwargs: object) -> list[Tensor]:
        """Return the tensor in a list."""
        return [tensor]

    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], *args: object, **kwargs: object) -> Tensor:
        """Return the one tensor of the list."""
        return scatter_list[0]

    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], *args: object, **kwargs: object) -> Tensor:
        """Return the one tensor of the list."""
        return input_list[0]

    def all_to_all(
        self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor], *args: object, **kwargs: object
    ) -> list[Tensor]:
        """Return the tensors given."""
        return input_tensor_list

    def send(self, *args: object, **kwargs: object) -> None:
        """Nobody to send to."""

    def barrier(self, *args: object, **kwargs: object) -> None:
        """Return at once."""
