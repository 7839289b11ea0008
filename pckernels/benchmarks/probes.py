"""What one of each kind of work (work.py) costs, measured: single instructions, executed alone by the engine itself, over and over.

Nothing here is fitted to the loop whose time is predicted. A product or pooling runs at its own shape and place, since a rate at one
shape says little about another; elements, functions, instructions and barriers are measured on arrays of the probe's own, behind the
arena of the code. How many units a probe executes is stated here and not taken from the ledger, so that a wrong count there shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from pckernels.arena import ALIGNMENT
from pckernels.backends import cuda, host
from pckernels.benchmarks.ledger import LINEAR
from pckernels.benchmarks.work import BARRIER, INSTRUCTION, MOVED, SHAPED, Kind, kind_of
from pckernels.compiler import Compiled
from pckernels.errors import Unsupported
from pckernels.instructions import ABSENT, CONVOLUTIONS, Code, Instruction, Op, Phase
from pckernels.memory import Packed
from pckernels.planner import Plan

PRODUCTS = (*LINEAR, *CONVOLUTIONS)
ROWS = 256  # of the arrays that row-by-row instructions are measured on
ARRAYS = 5  # as many as one of them has operands
STEPS = (2, 10)  # a probe runs twice: what their difference takes is free of what a call costs
WORTH = 40e6  # multiply-adds of a batch, about, that a step of a probe is worth; an element or an element of a window counts as many as
AS_MANY = 20  # products are that much faster
MOST = 64  # times that a step has the instruction
EMPTY, MET = "an instruction", "an instruction behind a barrier"

Times = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Probe:
    """An instruction to be executed alone.

    Attributes:
        kind: what it is measured for.
        units: of the kind, in one execution for one sample. moves: elements that it reads and writes beside that.
        before: what is executed before it each time, for the blocks of a cluster to have something to exchange.
    """

    name: str
    kind: Kind
    instruction: Instruction
    units: float = 1.0
    moves: float = 0.0
    before: tuple[Instruction, ...] = ()

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        return (*self.before, self.instruction)

    def repeated(self, batch: int) -> int:
        """How often a step has the instruction: enough to be measured, and no more."""
        factor = 1 if self.instruction.op in PRODUCTS else AS_MANY
        return max(1, min(MOST, round(WORTH / (batch * self.units * factor))))


@dataclass(frozen=True)
class Probes:
    """Those of a code on a batch and a device.

    Attributes:
        plan: how a GPU runs the code, and so each probe of it; None on the host.
    """

    compiled: Compiled
    batch: int
    device: torch.device
    plan: Plan | None = None

    @staticmethod
    def of(compiled: Compiled, batch: int, device: torch.device) -> Probes:
        """Raises Unsupported where the loop learns, which no probe does, or where no engine runs it."""
        plan = cuda.plan_for(compiled, batch, device) if device.type == cuda.DEVICE else None
        if isinstance(plan, str):
            raise Unsupported(plan)
        return Probes(compiled, batch, device, plan)

    @cached_property
    def probes(self) -> list[Probe]:
        """One for each kind of work in the code's loop."""
        rows = _aligned(self.compiled.code.rows)
        arrays = [rows + k * ROWS for k in range(ARRAYS)]
        fill = Instruction(Op.FILL, ALIGNMENT, rows + ARRAYS * ROWS, f=(0.5,))
        error = Instruction(Op.ERROR, ROWS, arrays[0], arrays[1], arrays[2], barrier=True)
        found = {INSTRUCTION: Probe(EMPTY, INSTRUCTION, fill), BARRIER: Probe(MET, BARRIER, replace(fill, barrier=True))}
        found[MOVED] = Probe(str(MOVED), MOVED, error, 3.0 * ROWS)
        for i in _loop(self.compiled):
            kind = kind_of(i)
            if kind is not None and kind not in found:
                found[kind] = self._shaped(kind, i) if i.op in SHAPED else _function(kind, i, arrays)
        return list(found.values())

    def _shaped(self, kind: Kind, i: Instruction) -> Probe:
        if i.op is Op.CONV_LEARN:
            raise Unsupported("the loop learns, and a probe has no gradients")
        alone = replace(i, first=0, barrier=True)
        if self.plan is None or self.plan.tier != "cluster":
            return Probe(str(kind), kind, alone, _units(i))
        read = i.p[0] * (i.p[1] if i.op is Op.LINEAR else i.p[2])
        return Probe(str(kind), kind, alone, _units(i), read, (Instruction(Op.FILL, read, i.a, f=(0.5,), barrier=True),))

    # Running them

    def runs(self) -> dict[str, Callable[[], object]]:
        """Name -> a call of the engine, of every probe at both numbers of steps, to take turns with others in timing.rounds."""
        return {f"{probe.name}: {steps}": self._run(self.code(probe, steps)) for probe in self.probes for steps in STEPS}

    def code(self, probe: Probe, steps: int) -> Compiled:
        """The code's feed-forward pass, then the probe alone, as often as it is repeated, in place of the loop; nothing is learned."""
        code, arrays = self.compiled.code, ARRAYS * ROWS
        start = _aligned(code.rows)
        before = Phase((Instruction(Op.FILL, arrays, start, f=(0.5,), barrier=True),), 0, 0)
        loop = Phase(probe.instructions * probe.repeated(self.batch), 1, steps)
        phases = (*(phase for phase in code.phases if phase.last == 0), before, loop)
        alone = Code(phases, start + arrays + ALIGNMENT, code.weights, code.io, 0, steps, code.energies)
        return replace(self.compiled, code=alone, gradients=(), sections=())

    def _run(self, alone: Compiled) -> Callable[[], object]:
        memory = self._memory(alone)
        if self.plan is None:
            return partial(host.execute, alone, memory, self.batch, 1.0)
        plan = self.plan
        cluster = plan.cluster if plan.tier == "cluster" else None

        def run() -> None:
            with cuda.options(plan.precision, plan.tier, plan.lanes, plan.product or None, cluster):
                cuda.execute(alone, memory, self.batch, 1.0)

        return run

    def _memory(self, alone: Compiled) -> Packed:
        def drawn(size: int) -> Tensor:
            return 0.1 * torch.randn(size, device=self.device)

        weights = [drawn(info.outputs * info.inputs) for info in alone.weights]
        inputs = [drawn(self.batch * place.n) for place in alone.inputs]
        kept, scratch = (torch.empty(self.batch * size, device=self.device) for size in (alone.kept_size, alone.scratch_size))
        energies = torch.empty(alone.code.steps + 1, alone.code.energies, dtype=torch.float64, device=self.device)
        return Packed(alone, self.batch, weights, inputs, kept, scratch, [], energies)

    # From times to costs

    def costs(self, times: Times) -> dict[Kind, float]:
        """Kind -> milliseconds of one unit, from the times of `runs`."""
        alone = {probe.kind: self._once(probe, times) for probe in self.probes}
        found = {INSTRUCTION: alone[INSTRUCTION], BARRIER: alone[BARRIER] - alone[INSTRUCTION]}
        for probe in self.probes:
            if probe.kind not in found:
                rest = alone[probe.kind] - found[BARRIER] * len(probe.instructions)
                if probe.kind.op not in SHAPED or probe.before:
                    rest -= found[INSTRUCTION] + self.batch * probe.moves * found.get(MOVED, 0.0)
                found[probe.kind] = max(rest, 0.0) / (self.batch * probe.units)
        return found

    def _once(self, probe: Probe, times: Times) -> float:
        """Milliseconds of one execution, of the same rounds."""
        few, many = STEPS
        differences = [b - a for a, b in zip(times[f"{probe.name}: {few}"], times[f"{probe.name}: {many}"], strict=True)]
        return max(statistics.median(differences), 0.0) / ((many - few) * probe.repeated(self.batch))


def _loop(compiled: Compiled) -> Iterator[Instruction]:
    for phase in compiled.code.phases:
        if phase.last > phase.first:
            yield from phase.instructions


def _units(i: Instruction) -> float:
    """Multiply-adds of a product, or elements in the windows of a pooling, of one sample, counted from the outputs."""
    if i.op in LINEAR:
        positions, inputs, outputs = i.p[:3]
        return float(positions * outputs * inputs)
    channels, groups = i.p[0], i.p[12] if i.op in CONVOLUTIONS else i.p[0]
    outputs = (i.p[3] if i.op in CONVOLUTIONS else channels) * i.p[13] * i.p[14]
    return float(outputs * (channels // groups) * i.p[4] * i.p[5])


def _function(kind: Kind, i: Instruction, arrays: Sequence[int]) -> Probe:
    """The instruction with as many operands, over the probe's arrays; an energy keeps its slot."""
    free = iter(arrays)
    out, a, b, c, d = (next(free) if place != ABSENT else ABSENT for place in (i.out, i.a, i.b, i.c, i.d))
    moves = sum(place != ABSENT for place in (out, a, b, c, d)) + i.accumulate
    alone = replace(i, n=ROWS, out=out, a=a, b=b, c=c, d=d, slot2=ABSENT, first=0, barrier=True)
    return Probe(str(kind), kind, alone, float(ROWS), float(moves * ROWS))


def _aligned(rows: int) -> int:
    return -(-rows // ALIGNMENT) * ALIGNMENT
