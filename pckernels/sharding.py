"""Code for a cluster of blocks that execute one tile together: who computes which rows, and when the blocks exchange them.

Every block has all rows of the arena, and owns a share of each array of n rows: of each of its positions of `width` rows, those that
share(width, blocks) gives it. Row-by-row instructions, products and STORE compute, or store, the rows that a block owns; anything else is
executed by every block as a whole. What a product reads it needs whole, so a GATHER comes before it, and a MEET before that where an owner
may still be writing. A MEET also stands before an instruction that writes rows which other blocks may still be gathering.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pckernels.arena import ALIGNMENT
from pckernels.instructions import ABSENT, Code, Instruction, Loss, Op, Phase, is_rowwise

EVERYWHERE = -1  # the owner of rows that all blocks have
PIECES = 4  # that a loop is cut into, at most: see _pieces
ALONE = frozenset({Op.CONV, Op.CONV_T, Op.MAXPOOL, Op.MAXPOOL_CHANGE, Op.MAXPOOL_GRAD, Op.AVGPOOL, Op.AVGPOOL_T})
ALONE |= {Op.CONV_LEARN, Op.SUM_LEARN}


def share(width: int, blocks: int) -> int:
    """Rows of each block, of `width` rows; the last blocks may have fewer, or none. Block r begins at row r times this."""
    return -(-width // (ALIGNMENT * blocks)) * ALIGNMENT


def runs_whole(i: Instruction) -> bool:
    """Whether every block executes all of an instruction. A loss over rows of one block is that block's alone."""
    if i.op is Op.LOSS:
        return i.n > ALIGNMENT and (i.p[0] == Loss.CROSS_ENTROPY or i.slot2 != ABSENT)
    return i.op in (Op.LOAD, Op.COPY)


def refusal(code: Code) -> str | None:
    """Why no cluster can execute code, or None."""
    found = sorted({i.op.name for i in code.instructions} & {op.name for op in ALONE})
    if not found:
        return None
    return f"blocks of a cluster share products and row-by-row instructions alone; this program has {', '.join(found)}"


@lru_cache(maxsize=64)
def sharded(code: Code, blocks: int) -> Code:
    """The code as a cluster of so many blocks executes it; one that executes it alone has nothing to gather and gets the same results.

    Raises:
        ValueError: the code has a refusal.
    """
    reason = refusal(code)
    if reason is not None:
        raise ValueError(f"{reason}.")
    state = _State.at_start(code.rows)
    phases: list[Phase] = []
    for phase in code.phases:
        for piece in _pieces(phase):
            done, state = (_loop if piece.last > piece.first else _once)(piece, state, blocks)
            phases += done
    return replace(code, phases=tuple(phases))


# Where an instruction's rows lie


@dataclass(frozen=True)
class _Rows:
    """`count` positions of `width` rows, one every `step` rows from `start` on. `own`: a block touches those alone that it owns."""

    start: int
    count: int
    width: int
    step: int
    own: bool

    @property
    def index(self) -> NDArray[np.int64]:
        return (self.start + self.step * np.arange(self.count)[:, None] + np.arange(self.width)).reshape(-1)

    def owners(self, blocks: int) -> NDArray[np.int64]:
        return np.tile(np.arange(self.width) // share(max(self.width, 1), blocks), self.count)


def _reads(i: Instruction) -> list[_Rows]:
    found = [_operand(i, start, n) for start, n in _row_operands(i)]
    if i.op in (Op.LINEAR, Op.LINEAR_T):
        inputs = i.p[1] if i.op is Op.LINEAR else i.p[2]
        found = [_Rows(i.a, i.p[0], inputs, inputs, own=False)]
    if i.op is Op.COPY:
        found = [_Rows(i.a, i.p[0], i.p[1], i.p[3], own=False)]
    return found + (_writes(i) if i.accumulate or i.op in (Op.MOVE, Op.RELAX) else [])


def _row_operands(i: Instruction) -> list[tuple[int, int]]:
    """First rows and numbers of rows of what is read row by row, but for `out`."""
    if i.op is Op.LOSS:
        targets = i.n if i.p[0] == Loss.SQUARED_ERROR else i.n // i.p[1]
        found = [(i.a, i.n), (i.b, i.n), (i.c, targets)]
    elif is_rowwise(i.op, i.p) or i.op is Op.STORE:
        found = [(start, i.n) for start in (i.a, i.b, i.c, i.d)]
    else:
        found = []
    return [(start, n) for start, n in found if start != ABSENT]


def _writes(i: Instruction) -> list[_Rows]:
    if i.op in (Op.LINEAR, Op.LINEAR_T):
        outputs = i.p[2] if i.op is Op.LINEAR else i.p[1]
        return [_Rows(i.out, i.p[0], outputs, outputs, own=True)]
    if i.op is Op.COPY:
        return [_Rows(i.out, i.p[0], i.p[1], i.p[2], own=False)]
    starts = [i.out, i.c] if i.op is Op.MOVE else [i.out]
    return [_operand(i, start, i.n) for start in starts if start != ABSENT]


def _operand(i: Instruction, start: int, n: int) -> _Rows:
    return _Rows(start, 1, n, n, own=not runs_whole(i))


# What the blocks have


@dataclass
class _State:
    """Of each row: `owner`, who has what was written last; `array`, first row and width of the positions it was written with; whether it
    was written (`fresh`) or gathered (`taken`) since all blocks met."""

    owner: NDArray[np.int64]
    array: NDArray[np.int64]
    fresh: NDArray[np.bool_]
    taken: NDArray[np.bool_]

    @staticmethod
    def at_start(rows: int) -> _State:
        """Rows that hold anything may be anywhere."""
        nothing = np.zeros(rows, dtype=np.bool_)
        return _State(np.full(rows, EVERYWHERE), np.zeros((rows, 2), dtype=np.int64), nothing, nothing.copy())

    def copy(self) -> _State:
        return _State(self.owner.copy(), self.array.copy(), self.fresh.copy(), self.taken.copy())

    def joined(self, other: _State) -> _State:
        """What is so in both. Of rows that all blocks have in one of them, the owner in the other has them in both."""
        known = self.owner != EVERYWHERE
        owner, array = np.where(known, self.owner, other.owner), np.where(known[:, None], self.array, other.array)
        return _State(owner, array, self.fresh | other.fresh, self.taken | other.taken)

    def is_as(self, other: _State) -> bool:
        """Where the rows of arrays are named does not matter as long as their owners are the same."""
        pairs = ((self.owner, other.owner), (self.fresh, other.fresh), (self.taken, other.taken))
        return all(np.array_equal(mine, theirs) for mine, theirs in pairs)

    def conflicts(self, other: _State) -> NDArray[np.bool_]:
        """Rows that one block owns here, and another there."""
        return (self.owner != other.owner) & (self.owner != EVERYWHERE) & (other.owner != EVERYWHERE)


class _Turn:
    """A phase's instructions, with what goes between them; `state` follows."""

    def __init__(self, state: _State, blocks: int):
        self.state, self.blocks = state, blocks
        self.done: list[Instruction | list[Instruction]] = []  # a list: the gathers behind a MEET
        self.gathers: list[Instruction] | None = None  # behind the last MEET of this turn

    def run(self, i: Instruction) -> None:
        wanted = [self._missing(rows) for rows in _reads(i)]
        if any(len(rows) for rows in wanted):
            self.gather(np.unique(np.concatenate(wanted)))
        written = _writes(i)
        if any(self.state.taken[rows.index].any() for rows in written):
            self.meet()
        self.done.append(i)
        for rows in written:
            index = rows.index
            self.state.owner[index] = rows.owners(self.blocks) if rows.own else EVERYWHERE
            self.state.array[index] = np.stack(
                [rows.start + np.arange(len(index)) // max(rows.width, 1) * rows.step, index * 0 + rows.width], 1
            )
            self.state.fresh[index] = True

    def _missing(self, rows: _Rows) -> NDArray[np.int64]:
        """The rows that have to be gathered before a block can read these: all that have an owner, if it lacks any."""
        index = rows.index
        owned = self.state.owner[index] != EVERYWHERE
        lacking = owned & (self.state.owner[index] != rows.owners(self.blocks)) if rows.own else owned
        return index[owned] if lacking.any() else index[:0]

    def gather(self, index: NDArray[np.int64]) -> None:
        """As early as the rows are there: behind the last MEET, if nobody has written them since."""
        if self.gathers is None or self.state.fresh[index].any():
            self.meet()
        assert self.gathers is not None
        self.gathers += _gathers(index, self.state.array[index])
        self.state.owner[index] = EVERYWHERE
        self.state.taken[index] = True

    def meet(self) -> None:
        self.gathers = []
        self.done.append(self.gathers)
        self.state.fresh[:] = self.state.taken[:] = False

    def instructions(self) -> tuple[Instruction, ...]:
        """With a barrier of the block behind gathers, and none behind a MEET, where all threads have met."""
        found: list[Instruction] = []
        barrier: bool | None = True  # of the instruction to come; None: as it is
        for each in self.done:
            if isinstance(each, list):
                found += [Instruction(Op.MEET), *each]
                barrier = bool(each)
            else:
                found.append(each if barrier is None else replace(each, barrier=barrier))
                barrier = None
        return tuple(found)


def _gathers(index: NDArray[np.int64], array: NDArray[np.int64]) -> Iterator[Instruction]:
    """One GATHER for each run of rows of one position of an array."""
    starts = np.flatnonzero((np.diff(index, prepend=-2) != 1) | (np.diff(array, axis=0, prepend=-2) != 0).any(1))
    for first, last in zip(starts, [*starts[1:], len(index)], strict=True):
        row, width = (int(number) for number in array[first])
        yield Instruction(Op.GATHER, n=int(last - first), out=int(index[first]), a=row, p=(width,))


# Phases


def _pieces(phase: Phase) -> Iterator[Phase]:
    """A loop, cut where the light cone lets an instruction in, so that in each piece all instructions run at every step.

    Behind the last cut some may run earlier than they would have: what they compute is zero until then.
    """
    starts = sorted({phase.first, *(i.first for i in phase.instructions if phase.first < i.first <= phase.last)})[:PIECES]
    for first, after in zip(starts, [*starts[1:], None], strict=True):
        until = phase.last if after is None else first
        yield Phase(tuple(_running(phase.instructions, until)), first, phase.last if after is None else after - 1)


def _running(instructions: Sequence[Instruction], t: int) -> Iterator[Instruction]:
    """Those that run at t; a barrier of one that does not passes to the next."""
    barrier = False
    for i in instructions:
        barrier |= i.barrier
        if i.first <= t:
            yield replace(i, first=0, barrier=barrier)
            barrier = False


def _once(phase: Phase, state: _State, blocks: int) -> tuple[list[Phase], _State]:
    turn = _turn(phase, state, blocks)
    return [replace(phase, instructions=turn.instructions())], turn.state


def _turn(phase: Phase, state: _State, blocks: int) -> _Turn:
    turn = _Turn(state.copy(), blocks)
    for i in phase.instructions:
        turn.run(i)
    return turn


def _loop(phase: Phase, state: _State, blocks: int) -> tuple[list[Phase], _State]:
    """A turn that is right as the first and as any other. Rows whose owner depends on which it is are gathered in front of the loop."""
    before: list[Phase] = []
    entry = state
    while True:
        turn = _turn(phase, entry, blocks)
        conflicts = np.flatnonzero(entry.conflicts(turn.state) & _read_first(phase, len(entry.owner)))
        if len(conflicts):
            prelude = _Turn(state.copy(), blocks)
            prelude.gather(conflicts)
            before.append(Phase(prelude.instructions(), phase.first, phase.first))
            entry = state = prelude.state
            continue
        joined = entry.joined(turn.state)
        if joined.is_as(entry):
            return [*before, replace(phase, instructions=turn.instructions())], turn.state
        entry = joined


def _read_first(phase: Phase, rows: int) -> NDArray[np.bool_]:
    """Rows that a turn reads before it writes them."""
    found, written = np.zeros(rows, dtype=np.bool_), np.zeros(rows, dtype=np.bool_)
    for i in phase.instructions:
        for operand in _reads(i):
            found[operand.index] |= ~written[operand.index]
        for operand in _writes(i):
            written[operand.index] = True
    return found
