"""What code reads and writes beside the arena, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from pckernels.compiler import Compiled


@dataclass
class Memory:
    """The tensors of one run, one for each of the code's slots: see instructions.py."""

    weights: Sequence[Tensor]
    io: Sequence[Tensor]
    gradients: Sequence[Tensor]
    energies: Tensor


@dataclass
class Packed:
    """Memory of a run of compiled code as `relax` takes it: all results that somebody may ask for in one tensor, those that
    only the run itself needs in another. Few tensors make a call cheap; a view of a slot is made when it is wanted.

    Attributes:
        inputs: what the code reads beside the weights, in the order of its io slots.
        kept, scratch: of `batch * code.kept_size` and `batch * code.scratch_size` elements; see Compiled.places.
        divisor: of the rate of weights that move at every step.
        update: moves the parameters themselves, in place of a copy of the weights: takes what each gradient slot has gained in a step and
            returns the weights as they are then.
    """

    code: Compiled
    batch: int
    weights: Sequence[Tensor]
    inputs: Sequence[Tensor]
    kept: Tensor
    scratch: Tensor
    gradients: Sequence[Tensor]
    energies: Tensor
    divisor: int = 1
    update: Callable[[Sequence[Tensor]], list[Tensor]] | None = None

    @property
    def written(self) -> list[Tensor]:
        """What `relax` returns."""
        return [self.kept, self.scratch, *self.gradients, self.energies]

    @staticmethod
    def of(code: Compiled, batch: int, weights: Sequence[Tensor], inputs: Sequence[Tensor], written: Sequence[Tensor]) -> Packed:
        """From what `relax` is given and returns."""
        kept, scratch, *gradients, energies = written
        return Packed(code, batch, weights, inputs, kept, scratch, gradients, energies)

    @cached_property
    def io(self) -> list[Tensor]:
        """A flat tensor for each slot."""
        return [self.slot(slot) for slot in range(len(self.code.io))]

    def slot(self, slot: int) -> Tensor:
        where, start = self.code.places[slot]
        if where == "input":
            return self.inputs[start]
        return part_of(self.code, self.batch, self.kept if where == "kept" else self.scratch, slot)

    @property
    def io_addresses(self) -> list[int]:
        """Of each slot, without a view of it."""
        row = self.batch * self.kept.element_size()
        bases = {"kept": self.kept.data_ptr(), "scratch": self.scratch.data_ptr()}
        places = self.code.places
        return [self.inputs[start].data_ptr() if where == "input" else bases[where] + row * start for where, start in places]


def part_of(code: Compiled, batch: int, part: Tensor, slot: int) -> Tensor:
    """A slot's numbers in the tensor `kept` or `scratch`, wherever it lies."""
    _, start = code.places[slot]
    return part.narrow(0, batch * start, batch * code.io[slot].n)
