"""What code reads and writes beside the arena, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pckernels.compiler import Compiled


@dataclass
class Memory:
    """The tensors of one run, in the order of the code's slots: see instructions.py."""

    weights: Sequence[Tensor]
    io: Sequence[Tensor]
    gradients: Sequence[Tensor]
    energies: Tensor

    def split(self, code: Compiled) -> tuple[list[Tensor], list[Tensor]]:
        """What the code reads beside the weights, and what it writes: results, gradients, energies."""
        read = [tensor for place, tensor in zip(code.io, self.io, strict=True) if not place.is_result]
        written = [tensor for place, tensor in zip(code.io, self.io, strict=True) if place.is_result]
        return read, [*written, *self.gradients, self.energies]

    @staticmethod
    def joined(code: Compiled, weights: Sequence[Tensor], read: Sequence[Tensor], written: Sequence[Tensor]) -> Memory:
        """The opposite of `split`."""
        both = [*read, *written]
        return Memory(weights, [both[k] for k in code.io_order], both[len(code.io) : -1], both[-1])
