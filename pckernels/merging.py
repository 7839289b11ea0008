"""Products with the same weight that do not wait for each other become one product over several positions.

All time steps of a recurrent layer relax at once, so that a step multiplies by its weight once, not once for each time
step: the weight is read once. The inputs of such a product lie one after the other in the arena, and so do its outputs.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from pckernels.arena import ALIGNMENT, Array, Draft, Section
from pckernels.instructions import ABSENT, Op
from pckernels.ordering import dependences


def merge_products(sections: Sequence[Section]) -> None:
    """Merge what can be merged in the sections that are run again and again. Arrays become parts of larger ones."""
    bundles = _Bundles()
    for section in sections:
        if section.repeats:
            for members in _candidates(section.drafts):
                _merge(section, members, bundles)


def _candidates(drafts: Sequence[Draft]) -> list[list[Draft]]:
    """Products with the same weight, shape and way of writing, each into an array of its own."""
    found: dict[tuple[object, ...], list[Draft]] = defaultdict(list)
    for draft in drafts:
        if draft.op in (Op.LINEAR, Op.LINEAR_T) and draft.slot2 == ABSENT and draft.p[1] % ALIGNMENT == draft.p[2] % ALIGNMENT == 0:
            found[draft.op, draft.slot, draft.p, draft.accumulate].append(draft)
    return [members for members in found.values() if len(members) > 1 and _are_apart(members)]


def _are_apart(members: Sequence[Draft]) -> bool:
    inputs, outputs = ({id(getattr(draft, operand)) for draft in members} for operand in ("a", "out"))
    return len(inputs) == len(outputs) == len(members)


def _merge(section: Section, members: list[Draft], bundles: _Bundles) -> None:
    members = bundles.arranged(members)
    inputs, outputs = ([getattr(draft, operand) for draft in members] for operand in ("a", "out"))
    if not bundles.may_join(inputs) or not bundles.may_join(outputs):
        return
    order = _order(section.drafts, members)
    if order is None:
        return
    positions, *shape = members[0].p
    merged = replace(
        members[0],
        out=bundles.join(outputs),
        a=bundles.join(inputs),
        p=(positions * len(members), *shape),
        first=min(draft.first for draft in members),
    )
    gone = {id(draft) for draft in members}
    section.drafts[:] = [merged if draft is members[0] else draft for draft in order if draft is members[0] or id(draft) not in gone]


class _Bundles:
    """Arrays that lie one after the other: each belongs to one bundle, in one order."""

    def __init__(self) -> None:
        self.of: dict[Array, tuple[Array, ...]] = {}
        self.whole: dict[tuple[Array, ...], Array] = {}

    def arranged(self, members: Sequence[Draft]) -> list[Draft]:
        """In the order that their outputs or inputs already have."""
        for operand in ("out", "a"):
            by_array = {getattr(draft, operand): draft for draft in members}
            known = self.of.get(next(iter(by_array)))
            if known is not None and set(known) == set(by_array):
                return [by_array[part] for part in known]
        return list(members)

    def may_join(self, parts: Sequence[Array]) -> bool:
        return all(part.n % ALIGNMENT == 0 for part in parts) and {self.of.get(part) for part in parts} in ({None}, {tuple(parts)})

    def join(self, parts: Sequence[Array]) -> Array:
        key = tuple(parts)
        if key not in self.whole:
            whole = self.whole[key] = Array(sum(part.n for part in parts), f"{parts[0].name} and {len(parts) - 1} more", parts=key)
            start = 0
            for part in parts:
                part.whole, part.start = whole, start
                start += part.n
            self.of.update(dict.fromkeys(parts, key))
        return self.whole[key]


def _order(drafts: Sequence[Draft], members: Sequence[Draft]) -> list[Draft] | None:
    """The drafts in an order in which all members may run at once, at the place of the first; None where there is none."""
    number = {id(draft): k for k, draft in enumerate(drafts)}
    first = number[id(members[0])]
    stand_in = {number[id(draft)]: first for draft in members}
    waits: list[set[int]] = [set() for _ in drafts]
    for k, before in enumerate(dependences(drafts)):
        waits[stand_in.get(k, k)].update(stand_in.get(j, j) for j in before)
    waits[first].discard(first)
    order = _sorted([k for k in range(len(drafts)) if stand_in.get(k, k) == k], waits)
    return None if order is None else [drafts[k] for k in order]


def _sorted(numbers: Sequence[int], waits: Sequence[set[int]]) -> list[int] | None:
    """A topological order, as close to the given one as can be; None where there is a cycle."""
    left = {k: len(waits[k]) for k in numbers}
    after: dict[int, list[int]] = defaultdict(list)
    for k in numbers:
        for j in waits[k]:
            after[j].append(k)
    ready = [k for k in numbers if not left[k]]
    order: list[int] = []
    while ready:
        order.append(heapq.heappop(ready))
        for k in after[order[-1]]:
            left[k] -= 1
            if not left[k]:
                heapq.heappush(ready, k)
    return order if len(order) == len(numbers) else None
