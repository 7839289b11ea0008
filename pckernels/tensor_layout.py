"""Code for arrays that are tensors of their own: which of them keep their memory, and which drafts run at which step.

A kernel has an arena and an instruction counter. Here every draft becomes calls of PyTorch's operations: an array is whatever
tensor was computed last, unless others rely on its address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from pckernels.arena import IN_PLACE, Array, Draft, Section, carried
from pckernels.compiler import Compiled
from pckernels.instructions import Op
from pckernels.tensor_fusion import Fusion, Item, fuse, turn

_IN_PLACE = (Op.COPY, *IN_PLACE)  # they write parts of an array, or change what is there
_CHANGES = (Op.ACT_CHANGE, Op.MAXPOOL_CHANGE)


@dataclass(frozen=True, eq=False)
class Stage:
    """Steps first .. last, at each of which the same drafts run.

    Attributes:
        repeats: whether it is part of a loop.
        items: what a step runs, in order: drafts, or several of them as one.
        deaths: for each item, the arrays that nobody reads any more afterwards.
        constant: drafts that change an input which the loop itself leaves alone, and that may compute what they need of it once.
        turned: drafts that each step runs for the step after it; before the first step they run once.
    """

    first: int
    last: int
    repeats: bool
    items: tuple[Item, ...]
    deaths: tuple[tuple[Array, ...], ...]
    constant: tuple[Draft, ...]
    turned: tuple[Draft, ...] = ()


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
        """Items of a step of the longest stage."""
        return len(max(self.stages, key=lambda stage: stage.last - stage.first, default=Stage(0, 0, False, (), (), ())).items)


@dataclass(frozen=True, eq=False)
class _Cut:
    """Steps first .. last of a section, and the drafts that run at each of them."""

    section: Section
    first: int
    last: int
    drafts: tuple[Draft, ...]
    turned: tuple[Draft, ...] = ()


@lru_cache(maxsize=256)
def layout(compiled: Compiled, fused: bool = False) -> Layout:
    """The layout of compiled code; fused: with rowwise drafts together (tensor_fusion.py)."""
    sections = compiled.sections
    drafts = [draft for section in sections for draft in section.drafts]
    held = _held(sections)
    places = {array for draft in drafts for array in (_places(draft),) if array is not None}
    cuts = [(cut, _roots(sections[k + 1 :])) for k, section in enumerate(sections) for cut in _cuts(section)]
    if fused:
        cuts = [(_turned(cut, held), later) for cut, later in cuts]
        held |= {array for cut, _ in cuts for draft in cut.turned for array in draft.writes}
    stages = [_stage(cut, held | later, fused) for cut, later in cuts]
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


def _cuts(section: Section) -> list[_Cut]:
    """The section's steps cut where drafts join in."""
    starts = sorted({max(section.first, draft.first) for draft in section.drafts} | {section.first})
    ends = [start - 1 for start in starts[1:]] + [section.last]
    return [
        _Cut(section, first, min(last, section.last), tuple(draft for draft in section.drafts if draft.first <= first))
        for first, last in zip(starts, ends, strict=True)
        if first <= last and first <= section.last
    ]


def _turned(cut: _Cut, held: set[Array]) -> _Cut:
    """With the slopes of its steps' beginnings at their ends, if there are several."""
    if not cut.section.repeats or cut.first == cut.last:
        return cut
    turned, others = turn(cut.drafts, held)
    return replace(cut, drafts=(*others, *turned), turned=tuple(turned))


def _stage(cut: _Cut, kept: set[Array], fused: bool) -> Stage:
    items: Sequence[Item] = fuse(cut.drafts, kept) if fused and cut.section.repeats else cut.drafts
    seen: set[Array] = set(kept)
    deaths: list[tuple[Array, ...]] = []
    for item in reversed(items):
        dying = dict.fromkeys(root for root in item.roots if root not in seen)
        seen.update(dying)
        deaths.append(tuple(dying))
    return Stage(cut.first, cut.last, cut.section.repeats, tuple(items), tuple(reversed(deaths)), _constant(cut.section, items), cut.turned)


def _constant(section: Section, items: Sequence[Item]) -> tuple[Draft, ...]:
    written = {array.root for draft in section.drafts for array in draft.writes}
    changes = [item for item in items if not isinstance(item, Fusion) and item.op in _CHANGES]
    return tuple(draft for draft in changes if section.repeats and not _inputs(draft) & written)


def _inputs(draft: Draft) -> set[Array]:
    """Input and output of the feed-forward pass, whose change the draft computes."""
    return {array.root for array in (draft.a, draft.c) if array is not None}
