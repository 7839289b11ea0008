"""Drafts of instructions, over arrays that have no place yet, become code: lifetimes give rows, conflicts give barriers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from pckernels.instructions import ABSENT, Instruction, Op, Phase, is_rowwise

ALIGNMENT = 16  # rows: a kernel may read and write whole vectors of rows, up to the next multiple
IN_PLACE = (Op.MOVE, Op.MOVE_OR_REST, Op.RELAX, Op.REST)  # they change what `out` holds


@dataclass(eq=False)
class Array:
    """n rows, wherever they will lie; or, with `whole`, those from `start` on of a larger array, which `parts` make up."""

    n: int
    name: str = ""
    whole: Array | None = None
    start: int = 0
    parts: tuple[Array, ...] = ()

    @property
    def root(self) -> Array:
        """The array that has rows of its own."""
        return self if self.whole is None else self.whole


def atoms(arrays: Iterable[Array]) -> list[Array]:
    """Arrays, taken apart where they have parts: two of them share rows only if they are the same."""
    return [atom for array in arrays for atom in (array.parts or (array,))]


@dataclass
class Draft:
    """An instruction whose operands are arrays. `out_at`, `a_at`: first rows inside `out` and `a`."""

    op: Op
    out: Array | None = None
    a: Array | None = None
    b: Array | None = None
    c: Array | None = None
    d: Array | None = None
    n: int = 0
    slot: int = ABSENT
    slot2: int = ABSENT
    p: tuple[int, ...] = ()
    f: tuple[float, ...] = ()
    accumulate: bool = False
    first: int = 0
    out_at: int = 0
    a_at: int = 0

    @property
    def reads(self) -> list[Array]:
        operands = [self.a, self.c] if self.op in (Op.MAXPOOL, Op.MOVE) else [self.a, self.b, self.c]
        operands += [self.b] if self.op is Op.MOVE else []
        operands += [self.d] if self.op is not Op.MAXPOOL_CHANGE else []
        operands += [self.out] if self.accumulate or self.op in IN_PLACE else []
        return [array for array in operands if array is not None]

    @property
    def writes(self) -> list[Array]:
        extra = {Op.MAXPOOL: [self.b], Op.MAXPOOL_CHANGE: [self.d], Op.MOVE: [self.c], Op.MOVE_OR_REST: [self.c, self.d]}
        return [array for array in (self.out, *extra.get(self.op, [])) if array is not None]

    @property
    def is_rowwise(self) -> bool:
        """It treats each of n rows by itself, in arrays of n rows."""
        return is_rowwise(self.op, self.p)

    @property
    def arrays(self) -> list[Array]:
        return [*self.reads, *self.writes]

    @property
    def roots(self) -> list[Array]:
        return [array.root for array in self.arrays]


@dataclass
class Section:
    """Drafts that run once for each t = first .. last."""

    first: int
    last: int
    drafts: list[Draft] = field(default_factory=list)

    @property
    def repeats(self) -> bool:
        return self.last > self.first


def prepare(sections: Sequence[Section]) -> list[Section]:
    """The sections that run, with everything that is read before it is written set to zero at the start."""
    sections = [section for section in sections if section.drafts and section.last >= section.first]
    _clear_what_is_read_early(sections)
    return sections


def assemble(sections: Sequence[Section]) -> tuple[tuple[Phase, ...], int]:
    """Phases with every array in its rows and a barrier before each instruction that needs one; and how many rows there are.

    sections: as `prepare` leaves them.
    """
    places, rows = _places(sections)
    phases = []
    for section in sections:
        placed = [_placed(draft, places) for draft in section.drafts]
        phases.append(Phase(tuple(_with_barriers(section, placed, places)), section.first, section.last))
    return tuple(phases), rows


def _placed(draft: Draft, places: dict[Array, int]) -> Instruction:
    def at(array: Array | None, inside: int = 0) -> int:
        return ABSENT if array is None else places[array.root] + array.start + inside

    return Instruction(
        draft.op,
        n=draft.n,
        out=at(draft.out, draft.out_at),
        a=at(draft.a, draft.a_at),
        b=at(draft.b),
        c=at(draft.c),
        d=at(draft.d),
        slot=draft.slot,
        slot2=draft.slot2,
        p=draft.p,
        f=draft.f,
        accumulate=draft.accumulate,
        first=draft.first,
    )


# Lifetimes


def _touched_by_rows(sections: Sequence[Section]) -> set[Array]:
    """Arrays, on their own, which rowwise drafts alone touch."""
    drafts = [draft for section in sections for draft in section.drafts]
    others = {array for draft in drafts if not draft.is_rowwise for array in draft.roots}
    parts = {array.root for draft in drafts for array in draft.arrays if array.whole is not None or array.parts}
    return {array for draft in drafts for array in draft.roots} - others - parts


def _clear_what_is_read_early(sections: Sequence[Section]) -> None:
    """Arrays that someone may read before the light cone lets their writer run start at zero."""
    written: dict[Array, float] = {}
    early: dict[Array, None] = {}
    for section in sections:
        for draft in section.drafts:
            start = draft.first if section.repeats else 0
            for array in atoms(draft.reads):
                if written.get(array, math.inf) > start:
                    early[array] = None
            for array in atoms(draft.writes):
                written[array] = min(written.get(array, math.inf), start)
    sections[0].drafts[:0] = [Draft(Op.FILL, out=array, n=array.n, f=(0.0,)) for array in early]


def _places(sections: Sequence[Section]) -> tuple[dict[Array, int], int]:
    """Rows for every array: first fit, in the order in which they are born.

    Rows change hands only across a barrier that is there anyway; or among arrays of the same n which rowwise drafts alone
    touch, since these need none.
    """
    lives, intervals, rowwise = _lives(sections), _intervals(sections), _touched_by_rows(sections)
    free = _FreeRows()
    places: dict[Array, int] = {}
    dying: list[tuple[int, int, int, int]] = []  # death, start, rows, kind
    resting: list[tuple[int, int, int]] = []  # start, rows, kind: of arrays that died since the last barrier
    now = 0
    for array, (birth, death) in sorted(lives.items(), key=lambda item: item[1][0]):
        if intervals[birth] > now:
            now = intervals[birth]
            for start, rows, _ in resting:
                free.give(start, rows)
            resting.clear()
        while dying and dying[0][0] < birth:
            died, start, rows, kind = heapq.heappop(dying)
            if intervals[died] < now:
                free.give(start, rows)
            else:
                resting.append((start, rows, kind))
        kind = array.n if array in rowwise else ABSENT
        again = next((gap for gap in resting if gap[2] == kind != ABSENT), None)
        if again is not None:
            resting.remove(again)
        places[array] = free.take(_aligned(array.n)) if again is None else again[0]
        heapq.heappush(dying, (death, places[array], _aligned(array.n), kind))
    return places, free.rows


def _aligned(n: int) -> int:
    return -(-max(n, 1) // ALIGNMENT) * ALIGNMENT


def _lives(sections: Sequence[Section]) -> dict[Array, tuple[int, int]]:
    """First and last moment of every array; what a loop carries from one turn to the next lives through all of it."""
    lives: dict[Array, tuple[int, int]] = {}
    moment = 0
    for section in sections:
        start, end = moment, moment + len(section.drafts) - 1
        throughout = carried(section) | set(lives) if section.repeats else set()
        for draft in section.drafts:
            for array in draft.roots:
                own = (start, end) if array in throughout else (moment, moment)
                before = lives.get(array, own)
                lives[array] = (min(before[0], own[0]), max(before[1], own[1]))
            moment += 1
    return _through_loops(sections, lives)


def carried(section: Section) -> set[Array]:
    """Arrays that a turn may read before it writes them: by their order, or since the light cone lets a reader run before any writer."""
    written: dict[Array, float] = {}  # the step from which on an earlier instruction of the turn writes the array
    found: set[Array] = set()
    for draft in section.drafts:
        found.update(array.root for array in atoms(draft.reads) if written.get(array, math.inf) > max(draft.first, section.first))
        for array in atoms(draft.writes):
            written[array] = min(written.get(array, math.inf), draft.first)
    return found


def _through_loops(sections: Sequence[Section], lives: dict[Array, tuple[int, int]]) -> dict[Array, tuple[int, int]]:
    """What lives on after a loop in which it is used must not share rows with anything of that loop."""
    moment = 0
    for section in sections:
        start, end = moment, moment + len(section.drafts) - 1
        moment = end + 1
        if section.repeats:
            used = {array for draft in section.drafts for array in draft.roots}
            for array in used:
                birth, death = lives[array]
                if birth < start or death > end:
                    lives[array] = (min(birth, start), max(death, end))
    return lives


class _FreeRows:
    """Gaps of an arena that grows where no gap is wide enough."""

    def __init__(self) -> None:
        self.rows = 0
        self.gaps: list[tuple[int, int]] = []  # start, size; in order

    def take(self, n: int) -> int:
        for k, (start, size) in enumerate(self.gaps):
            if size >= n:
                self.gaps[k : k + 1] = [(start + n, size - n)] if size > n else []
                return start
        start = self.rows
        if self.gaps and sum(self.gaps[-1]) == self.rows:
            start = self.gaps.pop()[0]
        self.rows = start + n
        return start

    def give(self, start: int, n: int) -> None:
        merged: list[tuple[int, int]] = []
        for gap in sorted([*self.gaps, (start, n)]):
            if merged and sum(merged[-1]) == gap[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + gap[1])
            else:
                merged.append(gap)
        self.gaps = merged


# Barriers


Touch = tuple[Hashable, object]  # a place and the share of it that a thread takes: equal shares give it to the same thread


class _Barriers:
    """Where a section needs barriers: the places that have been touched since the last one. It begins with one, since nobody knows
    what went before."""

    def __init__(self) -> None:
        self.begun = False
        self.written: dict[Hashable, object] = {}
        self.read: dict[Hashable, object] = {}

    def before(self, reads: Sequence[Touch], writes: Sequence[Touch]) -> bool:
        """Whether there must be one before an instruction that touches these; from then on it has touched them."""
        needed = not self.begun or self._meets(reads, writes)
        if needed:
            self.begun = True
            self.written.clear()
            self.read.clear()
        for place, share in reads:
            self.read[place] = share if self.read.get(place, share) == share else object()
        self.written.update(writes)
        return needed

    def _meets(self, reads: Sequence[Touch], writes: Sequence[Touch]) -> bool:
        """Whether another thread may have written one of these, or have read what is now written."""
        return any(self.written.get(place, share) != share for place, share in (*reads, *writes)) or any(
            self.read.get(place, share) != share for place, share in writes
        )


def _intervals(sections: Sequence[Section]) -> list[int]:
    """How many barriers there are up to each moment, if no two arrays shared rows."""
    found: list[int] = []
    for section in sections:
        barriers = _Barriers()
        for draft in section.drafts:
            share = draft.n if draft.is_rowwise else object()
            reads, writes = ([(array, share) for array in atoms(arrays)] for arrays in (draft.reads, draft.writes))
            found.append((found[-1] if found else 0) + barriers.before(reads, writes))
    return found


def _with_barriers(section: Section, placed: Sequence[Instruction], places: dict[Array, int]) -> list[Instruction]:
    """A barrier before each instruction that touches rows which another thread may have written, or writes rows which another may have
    read, since the last barrier."""
    result: list[Instruction] = []
    barriers = _Barriers()
    for draft, instruction in zip(section.drafts, placed, strict=True):
        token = None if draft.is_rowwise else object()
        reads, writes = (list(_blocks(arrays, places, token)) for arrays in (draft.reads, draft.writes))
        result.append(replace(instruction, barrier=barriers.before(reads, writes)))
    return result


def _blocks(arrays: Iterable[Array], places: dict[Array, int], token: object | None) -> Iterator[tuple[int, object]]:
    """Arrays cut at multiples of ALIGNMENT, where all begin, each with the share that goes with it: `token`, or the array's rows."""
    for array in arrays:
        start = places[array.root] + array.start
        for block in range(start // ALIGNMENT, -(-(start + max(array.n, 1)) // ALIGNMENT)):
            yield block, (start, array.n) if token is None else token
