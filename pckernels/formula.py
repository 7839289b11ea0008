"""What one launch computes element by element: a formula over tensors of one shape, of which each is read and written once.

Between two products of a step lie several rowwise instructions (instructions.py), each of which would read and write memory. A formula is
their composition: values are numbered, first those that are loaded, then the results of terms in order. Factors are no part of it, so that
one compiled kernel serves every rate. `evaluate` is the reference of pckernels.triton.update_rows, in plain PyTorch and any dtype.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pckernels import interpreter
from pckernels.instructions import Activation

Place = TypeVar("Place", bound=Hashable)
NONE = -1
SUMS = 2  # a formula has at most so many
PARTS = (
    528  # of a sum: one for each program, of which there are four for each multiprocessor of an H100, everywhere, for the sake of the sums
)


class Operation(enum.IntEnum):
    """What a term does to values a, b, c, with its two factors f."""

    FILL = 0  #             f0
    SCALE = 1  #            f0 a
    ADD = 2  #              f0 a + f1 b
    MUL = 3  #              a b
    # Of an activation, whose parameters f are.
    ACT = 4  #              f(a)
    CHANGE = 5  #           f(a + b) - f(a) without cancellation, c = f(a) where TANH or SIGMOID is asked for
    SLOPE = 6  #            f'(a)
    SLOPE_OF_VALUE = 7  #   f' from a = f(z): TANH and SIGMOID


BY_VALUE = (Activation.TANH, Activation.SIGMOID)  # their value gives the slope, and helps with the change


@dataclass(frozen=True)
class Term:
    """One operation; a, b, c are numbers of values, or NONE."""

    operation: Operation
    kind: Activation = Activation.AFFINE
    a: int = NONE
    b: int = NONE
    c: int = NONE

    @property
    def operands(self) -> tuple[int, int, int]:
        return self.a, self.b, self.c


@dataclass(frozen=True)
class Formula:
    """A composition of terms.

    Attributes:
        loads: how many tensors are read: values 0 .. loads - 1.
        terms: values loads, loads + 1, ..
        stores: the value of each tensor that is written.
        sums: pairs of values whose products are summed over all elements, SUMS at most.
    """

    loads: int
    terms: tuple[Term, ...]
    stores: tuple[int, ...]
    sums: tuple[tuple[int, int], ...] = ()


@dataclass
class Sheet(Generic[Place]):
    """A formula while it is written. Places are what loads and stores are called by: arrays, or names."""

    values: dict[Place, int] = field(default_factory=dict)  # what a place holds by now
    loaded: dict[Place, int] = field(default_factory=dict)
    terms: dict[int, tuple[Term, tuple[float, float]]] = field(default_factory=dict)
    known: dict[tuple[Term, tuple[float, float]], int] = field(default_factory=dict)
    sums: list[tuple[int, int, float]] = field(default_factory=list)

    def load(self, place: Place) -> int:
        """What a place holds: what was put there, or what its tensor held before."""
        if place not in self.values:
            self.values[place] = self.loaded[place] = self._count
        return self.values[place]

    def put(self, place: Place, value: int) -> None:
        self.values[place] = value

    def term(
        self,
        operation: Operation,
        a: int = NONE,
        b: int = NONE,
        c: int = NONE,
        kind: Activation = Activation.AFFINE,
        f: Sequence[float] = (),
    ) -> int:
        """The value of a term; the same term twice is one."""
        factors = (*f, 0.0, 0.0)[:2]
        entry = Term(operation, kind, a, b, c), (factors[0], factors[1])
        if entry not in self.known:
            self.known[entry] = self._count
            self.terms[self._count] = entry
        return self.known[entry]

    def add(self, a: int, b: int, fa: float = 1.0, fb: float = 1.0) -> int:
        return self.term(Operation.ADD, a, b, f=(fa, fb))

    def scale(self, a: int, factor: float) -> int:
        return a if factor == 1.0 else self.term(Operation.SCALE, a, f=(factor,))

    def mul(self, a: int, b: int) -> int:
        return self.term(Operation.MUL, a, b)

    def sum(self, a: int, b: int, factor: float) -> None:
        """factor times the sum of a b."""
        self.sums.append((a, b, factor))

    @property
    def _count(self) -> int:
        return len(self.loaded) + len(self.terms)

    def finished(self, stores: Sequence[Place]) -> Written[Place]:
        """The formula that ends in these places, without what none of them needs."""
        ends = [self.values[place] for place in stores]
        needed = self._needed([*ends, *(value for a, b, _ in self.sums for value in (a, b))])
        loads = [place for place, value in self.loaded.items() if value in needed]
        terms = [value for value in self.terms if value in needed]
        number = {value: k for k, value in enumerate([*(self.loaded[place] for place in loads), *terms])} | {NONE: NONE}
        renumbered = [replace(term, a=number[term.a], b=number[term.b], c=number[term.c]) for term, _ in map(self.terms.__getitem__, terms)]
        formula = Formula(
            len(loads), tuple(renumbered), tuple(number[value] for value in ends), tuple((number[a], number[b]) for a, b, _ in self.sums)
        )
        factors = tuple(factor for value in terms for factor in self.terms[value][1])
        return Written(formula, factors, tuple(factor for *_, factor in self.sums), tuple(loads), tuple(stores))

    def _needed(self, ends: Sequence[int]) -> set[int]:
        found: set[int] = set()
        waiting = list(ends)
        while waiting:
            value = waiting.pop()
            if value != NONE and value not in found:
                found.add(value)
                waiting.extend(self.terms[value][0].operands if value in self.terms else ())
        return found


@dataclass(frozen=True)
class Written(Generic[Place]):
    """A formula, two factors for each of its terms and one for each of its sums, and which places it loads and stores."""

    formula: Formula
    factors: tuple[float, ...]
    scales: tuple[float, ...]
    loads: tuple[Place, ...]
    stores: tuple[Place, ...]


Evaluate = Callable[[Written[Any], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]


def evaluate(written: Written[Any], loads: Sequence[Tensor], stores: Sequence[Tensor], parts: Sequence[Tensor] = ()) -> None:
    """Compute a formula over the tensors of its places.

    Args:
        loads: of one shape; stores: of the same, and any of them may be one of `loads`.
        parts: for each sum, where it goes: (PARTS,) float64, of which the first takes all.
    """
    formula, factors = written.formula, written.factors
    values = list(loads)
    like = (*stores, *loads)[0]
    for k, term in enumerate(formula.terms):
        values.append(_evaluated(term, factors[2 * k : 2 * k + 2], values, like))
    sums = [scale * (values[a] * values[b]).sum(dtype=torch.float64) for (a, b), scale in zip(formula.sums, written.scales, strict=True)]
    found = [values[value].clone() if value < formula.loads else values[value] for value in formula.stores]  # a load may be overwritten
    for target, result in zip(stores, found, strict=True):
        target.copy_(result)
    for part, total in zip(parts, sums, strict=True):
        part[0].copy_(total)


def _evaluated(term: Term, f: Sequence[float], values: Sequence[Tensor], like: Tensor) -> Tensor:
    a, b, _ = (values[operand] if operand != NONE else like for operand in term.operands)
    kind = term.kind
    table = {
        Operation.FILL: lambda: torch.full_like(like, f[0]),
        Operation.SCALE: lambda: f[0] * a,
        Operation.ADD: lambda: f[0] * a + f[1] * b,
        Operation.MUL: lambda: a * b,
        Operation.ACT: lambda: interpreter.activate(kind, f, a),
        Operation.CHANGE: lambda: interpreter.change(kind, f, a, b),
        Operation.SLOPE: lambda: interpreter.slope(kind, f, a),
        Operation.SLOPE_OF_VALUE: lambda: interpreter.slope_of_value(kind, a),
    }
    return table[term.operation]()
