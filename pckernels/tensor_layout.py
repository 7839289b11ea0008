"""Code for arrays that are tensors of their own: which of them keep their memory, and which drafts run at which step.

A kernel has an arena and an instruction counter. Here every draft becomes calls of PyTorch's operations: an array is whatever
tensor was computed last, unless others rely on its address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pckernels.arena import IN_PLACE, Array, Draft, Section, carried
from pckernels.compiler import Compiled
from pckernels.instructions import Op

_IN_PLACE = (Op.COPY, *IN_PLACE)  # they write parts of an array, or change what is there
_CHANGES = (Op.ACT_CHANGE, Op.MAXPOOL_CHANGE)


@dataclass(frozen=True, eq=False)
class Stage:
    """Steps first .. last, at each of which the same drafts run.

    Attributes:
        repeats: whether it is part of a loop.
        drafts: in order.
        deaths: for each draft, the arrays that nobody reads any more afterwards.
        constant: drafts that change an input which the loop itself leaves alone, and that may compute what they need of it once.
    """

    first: int
    last: int
    repeats: bool
    drafts: tuple[Draft, ...]
    deaths: tuple[tuple[Array, ...], ...]
    constant: tuple[Draft, ...]


@dataclass(frozen=True)
class Layout:
    """How code runs over tensors.

    Attributes:
        held: arrays (roots) with memory of their own for the whole run, changed in place: what a step hands to the next, what a loop
            reads from outside of it, and what is written part by part.
        places: those of them that hold places of maxima, which are small integers.
        stages: in order.
        rest: which samples rest, where they do so by themselves.
    """

    held: frozenset[Array]
    places: frozenset[Array]
    stages: tuple[Stage, ...]
    rest: Array | None = None

    @property
    def launches(self) -> int:
        """Drafts of a step of the longest stage."""
        return len(max(self.stages, key=lambda stage: stage.last - stage.first, default=Stage(0, 0, False, (), (), ())).drafts)


@lru_cache(maxsize=256)
def layout(compiled: Compiled) -> Layout:
    """The layout of compiled code."""
    sections = compiled.sections
    drafts = [draft for section in sections for draft in section.drafts]
    held = _held(sections)
    places = {array for draft in drafts for array in (_places(draft),) if array is not None}
    stages = [stage for k, section in enumerate(sections) for stage in _stages(section, held, _roots(sections[k + 1 :]))]
    rest = next((draft.out for draft in drafts if draft.op is Op.REST), None)
    return Layout(frozenset(held), frozenset(places), tuple(stages), rest)


def _places(draft: Draft) -> Array | None:
    """The array of places of maxima that a draft writes."""
    return draft.b if draft.op is Op.MAXPOOL else draft.d if draft.op is Op.MAXPOOL_CHANGE else None


def _roots(sections: Sequence[Section]) -> set[Array]:
    return {root for section in sections for draft in section.drafts for root in draft.roots}


def _held(sections: Sequence[Section]) -> set[Array]:
    held: set[Array] = set()
    for section in sections:
        for draft in section.drafts:
            held.update(array.root for array in draft.arrays if array.whole is not None or array.parts)
            if draft.op in _IN_PLACE:
                held.update(array.root for array in draft.writes)
        if section.repeats:
            held |= carried(section)  # what it reads and never writes among it
    return held


def _stages(section: Section, held: set[Array], later: set[Array]) -> list[Stage]:
    """The section's steps cut where drafts join in."""
    starts = sorted({max(section.first, draft.first) for draft in section.drafts} | {section.first})
    ends = [start - 1 for start in starts[1:]] + [section.last]
    return [
        _stage(first, last, section, [draft for draft in section.drafts if draft.first <= first], held | later)
        for first, last in zip(starts, ends, strict=True)
        if first <= last and first <= section.last
    ]


def _stage(first: int, last: int, section: Section, drafts: Sequence[Draft], kept: set[Array]) -> Stage:
    seen: set[Array] = set(kept)
    deaths: list[tuple[Array, ...]] = []
    for draft in reversed(drafts):
        dying = dict.fromkeys(root for root in draft.roots if root not in seen)
        seen.update(dying)
        deaths.append(tuple(dying))
    written = {array.root for draft in section.drafts for array in draft.writes}
    constant = tuple(draft for draft in drafts if section.repeats and draft.op in _CHANGES and not _inputs(draft) & written)
    return Stage(first, min(last, section.last), section.repeats, tuple(drafts), tuple(reversed(deaths)), constant)


def _inputs(draft: Draft) -> set[Array]:
    """Input and output of the feed-forward pass, whose change the draft computes."""
    return {array.root for array in (draft.a, draft.c) if array is not None}
