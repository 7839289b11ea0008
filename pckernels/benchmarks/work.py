"""What one inference step executes, counted by kind, so that a time for one of each kind (probes.py) becomes a time for the step.

Kinds: products and pooling, each at its own shape; the functions that instructions evaluate; the elements that row-by-row instructions
move; and what an instruction and a barrier cost by themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from pckernels.benchmarks import ledger
from pckernels.compiler import Compiled
from pckernels.instructions import CONVOLUTIONS, Activation, Instruction, Loss, Op

FUNCTIONS = frozenset({Op.ACT, Op.ACT_CHANGE, Op.ACT_GRAD, Op.LOSS, Op.NORM})
SHAPED = frozenset({*ledger.LINEAR, *CONVOLUTIONS, *ledger.POOLS})


@dataclass(frozen=True)
class Kind:
    """What is counted.

    Attributes:
        op: whose; None: of row-by-row instructions in general.
        p: of a product or pooling its shape, of a function which one. accumulate: whether a product adds to what is there.
        word: what it is, where there is no op.
    """

    op: Op | None
    p: tuple[int, ...] = ()
    accumulate: bool = False
    word: str = ""

    def __str__(self) -> str:
        if self.op is None:
            return self.word
        name, p = self.op.name.lower().replace("_t", ", transposed"), self.p
        if self.op in (Op.ACT, Op.ACT_CHANGE, Op.ACT_GRAD):
            return f"{self.op.name.lower()}, {Activation(p[0]).name.lower()}" + (", from its value" if p[1:] == (1,) else "")
        if self.op is Op.LOSS:
            return f"loss, {Loss(p[0]).name.lower()}"
        if self.op in SHAPED:
            shape = f"{p[0]} x {p[1]} x {p[2]}" + ("" if self.op in ledger.LINEAR else f", window {p[4]} x {p[5]}")
            return f"{name}, {shape}" + (", added" if self.accumulate else "")
        return name


MOVED, INSTRUCTION, BARRIER = (Kind(None, word=word) for word in ("elements moved", "instructions", "barriers"))


def kind_of(i: Instruction) -> Kind | None:
    """The product, pooling or function that an instruction is, or None: what it computes hides behind the elements that it moves."""
    if i.op in SHAPED:
        return Kind(i.op, i.p, i.accumulate)
    if i.op in FUNCTIONS:
        return Kind(i.op, i.p)
    return None


def work(compiled: Compiled, batch: int) -> Mapping[Kind, float]:
    """Kind -> how many of it one step has, for a batch and once the light cone has passed: multiply-adds of a product, elements that a
    pooling's windows hold, evaluations of a function."""
    counted: defaultdict[Kind, float] = defaultdict(float)
    for phase in compiled.code.phases:
        if phase.last > phase.first:
            for i in phase.instructions:
                for kind, count in _of(i, batch):
                    counted[kind] += count
    return counted


def _of(i: Instruction, batch: int) -> list[tuple[Kind, float]]:
    kind, barrier = kind_of(i), [(BARRIER, 1.0)] if i.barrier else []
    if i.op in SHAPED:
        assert kind is not None
        return [(kind, batch * operations(i)), *barrier]
    own = [] if kind is None else [(kind, float(batch * i.n))]
    return [*own, (MOVED, float(batch * ledger.arena_elements(i))), (INSTRUCTION, 1.0), *barrier]


def operations(i: Instruction) -> float:
    """Of one sample: multiply-adds of a product, or elements that the windows of a pooling hold."""
    if i.op in ledger.POOLS:
        return float(i.p[0] * i.p[13] * i.p[14] * i.p[4] * i.p[5])
    return float(ledger.multiply_adds(i))
