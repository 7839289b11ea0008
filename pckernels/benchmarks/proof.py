"""Who is right, where float32 alone takes the timed call far from float64: wrong by 1 % must not pass as rounding.

Strict dynamics may be chaotic, and values that are kept as values lose digits, so that a limit wide enough for float32 at the timed T
would let wrong gradients pass. Whoever is farther off than its limit has to be right somewhere else as well: "float64", the same call
in float64; "steps", of what runs in float32 alone, the same case at a T at which float32 is accurate; "size", of products whose operands
are rounded, the part of the gradient that is along the oracle's, in which rounding cancels and a wrong factor does not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pckernels.benchmarks.cases import Case
from pckernels.benchmarks.contenders import Arena, Contender
from pckernels.benchmarks.verification import Gradients, Oracles, flat, measure, oracles, require_agreement
from pckernels.rules import Incremental, Strict

STEPS = 8  # T of "steps"
LIMITS = {"float64": 1e-6, "steps": 1e-3, "size": 5e-3}


@dataclass(frozen=True)
class Proof:
    """How it was shown, and how far off what was shown is."""

    how: str
    off: float
    limit: float


@dataclass(frozen=True)
class Court:
    """Where the contenders of an arena are proven right: the arena and its oracles, and others, made where someone needs them."""

    arena: Arena
    known: Oracles

    def prove(self, contender: Contender, found: Gradients) -> Proof:
        """The proof of a contender, whose gradients in the arena are `found`.

        Raises:
            Disagreement: it is wrong there too.
        """
        how, limit = contender.proof, LIMITS[contender.proof]
        proof = Proof(self._words(how), self._off(contender, found), limit)
        require_agreement(f"{contender.name}, {proof.how},", proof.off, limit, self.arena.case.name)
        return proof

    def _words(self, how: str) -> str:
        return {"float64": "in float64", "steps": f"at T={STEPS}", "size": "along float64"}[how]

    def _off(self, contender: Contender, found: Gradients) -> float:
        if contender.proof == "size":
            return size_off(found, self.known.of(contender.computes))
        assert contender.elsewhere is not None
        arena, known = (self._double, self.known) if contender.proof == "float64" else self._short
        return measure(arena.case)(contender.elsewhere(arena), known.of(contender.computes))

    @cached_property
    def _double(self) -> Arena:
        arena = self.arena
        return replace(arena, module=copy.deepcopy(arena.module).double(), x=arena.x.double(), target=arena.target.double())

    @cached_property
    def _short(self) -> tuple[Arena, Oracles]:
        arena = replace(self.arena, case=shortened(self.arena.case))
        return arena, oracles(arena.case, arena.module, arena.x, arena.target)


def shortened(case: Case) -> Case:
    """The same at T=STEPS, or at its own T where that is less."""
    assert isinstance(case.rule, Strict | Incremental), case.name
    return replace(case, rule=replace(case.rule, steps=min(STEPS, case.rule.steps)))


def size_off(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """|<found, wanted> / <wanted, wanted> - 1| of all parameters as one vector."""
    a, b = flat(found), flat(wanted)
    return abs(float(torch.dot(a, b) / torch.dot(b, b)) - 1.0)
