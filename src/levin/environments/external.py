"""What environments have in common whose processes something outside has started, and numbered."""

from __future__ import annotations

import os
from abc import ABC
from typing import ClassVar, NamedTuple

from typing_extensions import override

from levin.environments.environment import ClusterEnvironment, read_int


class Variables(NamedTuple):
    """The environment variables that say where a process stands; the numbers of a lone process where none is named."""

    world_size: str = ""
    global_rank: str = ""
    local_rank: str = ""
    node_rank: str = ""


class ExternalEnvironment(ClusterEnvironment, ABC):
    """Processes that something outside starts, and numbers: by environment variables, unless a subclass knows better.

    Subclasses name the variables in :attr:`variables`.
    """

    variables: ClassVar[Variables] = Variables()

    is_lone_without_variables: ClassVar[bool] = False
    """Whether a process without any of the variables is the only one; an error otherwise."""

    creates_processes_externally = True

    @override
    def world_size(self) -> int:
        return self._read(self.variables.world_size, 1)

    @override
    def set_world_size(self, size: int) -> None:
        pass

    @override
    def global_rank(self) -> int:
        return self._read(self.variables.global_rank, 0)

    @override
    def set_global_rank(self, rank: int) -> None:
        pass

    @override
    def local_rank(self) -> int:
        return self._read(self.variables.local_rank, 0)

    @override
    def node_rank(self) -> int:
        return self._read(self.variables.node_rank, 0)

    def _read(self, name: str, lone: int) -> int:
        is_lone = self.is_lone_without_variables and not {*self.variables} & os.environ.keys()
        return read_int(name, lone if is_lone else None) if name else lone
