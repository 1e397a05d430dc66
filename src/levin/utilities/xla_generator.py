"""Random numbers of XLA devices, in an order that saving does not change.

torch_xla draws a program's numbers from a seed that each program changes; how the work of a run is cut into programs depends on
who reads a value, and when. So each step is given a seed of its own, and what is saved is the last of them.
"""

from __future__ import annotations

_MULTIPLIER, _INCREMENT, _MODULUS = 6364136223846793005, 1442695040888963407, 2**63


class XlaGenerator:
    """Gives each step the seed of its random numbers; there is one for a process, like torch's own generators."""

    def __init__(self) -> None:
        self.state: int | None = None
        """What the next seed is made of; None as long as no XLA device is in use."""
        self._followed: int | None = None

    def follow(self, torch_seed: int) -> None:
        """Begin from torch's seed, if that is another one than before; called when a device is taken into use."""
        if torch_seed != self._followed:
            self.state = self._followed = torch_seed
            self.state %= _MODULUS

    def seed(self, seed: int) -> None:
        """Begin again from a seed, where an XLA device is in use."""
        if self.state is not None:
            self.state = self._followed = seed
            self.state %= _MODULUS

    def begin_step(self) -> None:
        """Give the device the seed of the next step."""
        import torch_xla.core.xla_model as xm

        assert self.state is not None
        self.state = (self.state * _MULTIPLIER + _INCREMENT) % _MODULUS
        xm.set_rng_state(self.state)


XLA_GENERATOR = XlaGenerator()
