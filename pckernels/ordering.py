"""The order of a loop's drafts: as few barriers as dependences allow, and rowwise drafts that share arrays next to each other.

Nothing changes what any draft reads: of two that touch the same array, one of them writing, the order stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from pckernels.arena import Draft, Section, atoms
from pckernels.instructions import ABSENT, Op

_WEIGHTS = "weights"
_READ_WEIGHTS = (Op.LINEAR, Op.LINEAR_T, Op.CONV, Op.CONV_T)


def order_loops(sections: Sequence[Section]) -> None:
    """Put the drafts of the sections that are run again and again into a better order."""
    for section in sections:
        if section.repeats:
            section.drafts[:] = ordered(section.drafts)


def ordered(drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts interval by interval. An interval is what lies between two barriers.

    In each, rowwise drafts come first, by n. After a draft come those that waited for it, while the rows are in cache.
    """
    before = dependences(drafts)
    after: list[list[int]] = [[] for _ in drafts]
    for k, earlier in enumerate(before):
        for j in earlier:
            after[j].append(k)
    intervals = _intervals(drafts, before, after)
    return [drafts[k] for members in _by_interval(drafts, intervals) for k in _within(members, before, after)]


def _within(members: Sequence[int], before: Sequence[set[int]], after: Sequence[list[int]]) -> list[int]:
    """The members of an interval: each before those that wait for it, which come at once; what waits for nothing, when it is wanted."""
    here = set(members)
    sources = {k for k in members if not before[k] and here.intersection(after[k])}
    waits = {k: len(before[k] & here - sources) for k in members}
    stack = [k for k in reversed(members) if not waits[k] and k not in sources]
    order: dict[int, None] = {}
    while stack:
        k = stack.pop()
        order.update(dict.fromkeys(sorted(before[k] & sources)))
        order[k] = None
        for j in reversed(after[k]):
            if j in here:
                waits[j] -= 1
                if not waits[j]:
                    stack.append(j)
    return list(order)


def _by_interval(drafts: Sequence[Draft], intervals: Sequence[int]) -> list[list[int]]:
    members: list[list[int]] = [[] for _ in range(max(intervals, default=-1) + 1)]
    first: dict[tuple[int, int], int] = {}  # of the rowwise drafts over n in an interval
    for k, draft in enumerate(drafts):
        members[intervals[k]].append(k)
        first.setdefault((intervals[k], draft.n), k)
    for group in members:
        group.sort(key=lambda k: (not drafts[k].is_rowwise, first[intervals[k], drafts[k].n] if drafts[k].is_rowwise else k, k))
    return members


def _intervals(drafts: Sequence[Draft], before: Sequence[set[int]], after: Sequence[list[int]]) -> list[int]:
    """Each draft as early as it can be; those that wait for nothing, as late as those after them allow."""
    found = [0] * len(drafts)
    for k in range(len(drafts)):
        found[k] = max((found[j] + _barrier_between(drafts[j], drafts[k]) for j in before[k]), default=0)
    for k in reversed(range(len(drafts))):
        if not before[k]:
            found[k] = min((found[j] - _barrier_between(drafts[k], drafts[j]) for j in after[k]), default=0)
    return found


def _barrier_between(first: Draft, second: Draft) -> bool:
    return not (first.is_rowwise and second.is_rowwise and first.n == second.n)


def dependences(drafts: Sequence[Draft]) -> list[set[int]]:
    """For each draft, the earlier ones that it must come after: it reads what they wrote, or writes what they read or wrote."""
    found: list[set[int]] = []
    writer: dict[Hashable, int] = {}
    readers: dict[Hashable, list[int]] = defaultdict(list)
    for k, draft in enumerate(drafts):
        reads: list[Hashable] = [*atoms(draft.reads), *([_WEIGHTS] if draft.op in _READ_WEIGHTS else [])]
        writes: list[Hashable] = [*atoms(draft.writes), *_outside(draft)]
        before = {writer[place] for place in (*reads, *writes) if place in writer}
        before.update(j for place in writes for j in readers[place])
        found.append(before - {k})
        for place in reads:
            readers[place].append(k)
        for place in writes:
            writer[place], readers[place] = k, []
    return found


def _outside(draft: Draft) -> list[Hashable]:
    """What a draft writes outside the arena."""
    if draft.op in (Op.LOSS, Op.NORM):
        return [("energy", draft.slot), *([("io", draft.slot2)] if draft.slot2 != ABSENT else [])]
    if draft.op in (Op.CONV_LEARN, Op.SUM_LEARN, Op.LINEAR_LEARN):
        return [("gradient", draft.slot)]
    if draft.op is Op.MOVE_WEIGHTS:
        return [_WEIGHTS, *(("gradient", slot) for slot in range(draft.n))]
    return [("io", draft.slot)] if draft.op is Op.STORE else []
