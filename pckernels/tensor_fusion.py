"""Rowwise drafts of a step as few launches: what lies between two products, element by element, becomes one formula.

Drafts over the same n that share an array run together, in registers: an array that nobody else reads has no memory at all. Two things
decide how much that saves. The order: products that can run do so first, so that all that waits for them comes together. And the turn:
a step begins with the slopes of errors that the step before has left, which only products read; they run at that step's end instead,
beside the errors themselves, and before the first step once (`turn`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pckernels.arena import IN_PLACE, Array, Draft
from pckernels.formula import BY_VALUE, NONE, SUMS, Operation, Sheet, Written
from pckernels.instructions import ABSENT, Activation, Loss, Op
from pckernels.ordering import dependences

MOST_TENSORS = 16  # that a launch reads and writes: its registers hold all that it reads
MOST_DRAFTS = 12


@dataclass(frozen=True, eq=False)
class Fusion:
    """Rowwise drafts that run as one formula.

    Attributes:
        written: the formula; it loads and stores arrays (B, n).
        slots: of energies, one for each of its sums.
    """

    drafts: tuple[Draft, ...]
    written: Written[Array]
    slots: tuple[int, ...]

    @property
    def arrays(self) -> list[Array]:
        """Those that are in memory."""
        return [*self.written.loads, *self.written.stores]

    @property
    def writes(self) -> list[Array]:
        return list(self.written.stores)

    @cached_property
    def roots(self) -> list[Array]:
        return [array.root for array in self.arrays]


Item = Draft | Fusion


def can_fuse(draft: Draft) -> bool:
    """Whether a formula can have it."""
    if draft.op is Op.LOSS:
        return draft.p[0] == Loss.SQUARED_ERROR and draft.slot2 == ABSENT
    return draft.op in _LOWERED


def turn(drafts: Sequence[Draft], held: set[Array]) -> tuple[list[Draft], list[Draft]]:
    """Drafts at whose results only products look, and that only need what the step before has left: to run at its end; and all others.

    held: arrays that a step hands to the next. What has been turned is one of them from then on.
    """
    turned = {k for k, draft in enumerate(drafts) if _may_turn(draft, held)}
    while True:
        kept = {k for k in turned if not _stays(k, drafts, turned)}
        if kept == turned:
            break
        turned = kept
    return [draft for k, draft in enumerate(drafts) if k in turned], [draft for k, draft in enumerate(drafts) if k not in turned]


def _may_turn(draft: Draft, held: set[Array]) -> bool:
    changes = draft.accumulate or draft.op in IN_PLACE or draft.out is None
    return not changes and draft.is_rowwise and can_fuse(draft) and draft.out not in held and draft.out.whole is None  # type: ignore[union-attr]


def _stays(k: int, drafts: Sequence[Draft], turned: set[int]) -> bool:
    """It reads what an earlier draft writes in this step, somebody else writes its result, or a rowwise draft reads it."""
    draft, out = drafts[k], drafts[k].out
    reads = {array.root for array in draft.reads}
    for j, other in enumerate(drafts):
        if j == k:
            continue
        writes = {array.root for array in other.writes}
        if out in writes or (j < k and j not in turned and writes & reads):
            return True
        if out in other.roots and other.is_rowwise and j not in turned:
            return True
    return False


def fuse(drafts: Sequence[Draft], kept: set[Array]) -> list[Item]:
    """The drafts of a step in an order that depends on nothing else, those that can be fused in launches.

    kept: arrays (roots) that must be in memory after the step.
    """
    items: list[Item] = []
    needed = set(kept)
    for group in reversed(_Schedule(drafts).groups()):
        items.append(_fused(group, needed) if can_fuse(group[0]) else group[0])
        needed.update(array.root for draft in group for array in draft.reads)
    return items[::-1]


class _Schedule:
    """Which drafts run next: each after all that it depends on, those that cannot be fused as soon as they can, the others together."""

    def __init__(self, drafts: Sequence[Draft]):
        self.drafts = drafts
        self.before = dependences(drafts)
        self.waiting = dict.fromkeys(range(len(drafts)))
        self.done: set[int] = set()
        self.users: dict[Array, list[int]] = {}
        for k, draft in enumerate(drafts):
            for array in dict.fromkeys(draft.arrays):
                self.users.setdefault(array, []).append(k)

    def groups(self) -> list[list[Draft]]:
        """In order; what cannot be fused is a group by itself."""
        found = []
        while self.waiting:
            members = self._next()
            found.append([self.drafts[k] for k in members])
            self.done.update(members)
            for k in members:
                del self.waiting[k]
        return found

    def _next(self) -> list[int]:
        ready = [k for k in self.waiting if self.before[k] <= self.done]
        alone = [k for k in ready if not can_fuse(self.drafts[k])]
        if alone:
            return alone[:1]
        # What fills a sink waits for those that add to it, if anything else can go on.
        return self._together(next((k for k in ready if self.drafts[k].op is not Op.FILL), ready[0]))

    def _together(self, first: int) -> list[int]:
        """The draft and what can run with it: over the same n, connected by an array, and ready once the others have run."""
        members = [first]
        near = dict.fromkeys(self._neighbours(first))
        while True:
            k = next((k for k in near if self._joins(k, members)), None)
            if k is None:
                return members
            members.append(k)
            near |= dict.fromkeys(self._neighbours(k))

    def _neighbours(self, k: int) -> list[int]:
        return sorted(j for array in self.drafts[k].arrays for j in self.users[array])

    def _joins(self, k: int, members: Sequence[int]) -> bool:
        draft = self.drafts[k]
        if k not in self.waiting or k in members or not can_fuse(draft) or draft.n != self.drafts[members[0]].n:
            return False
        return self.before[k] <= self.done.union(members) and _fits([*(self.drafts[j] for j in members), draft])


def _fits(drafts: Sequence[Draft]) -> bool:
    """An estimate from above: arrays that only the launch itself needs count too."""
    arrays = {array for draft in drafts for array in draft.arrays}
    sums = sum(draft.op in (Op.NORM, Op.LOSS) for draft in drafts)
    return len(drafts) <= MOST_DRAFTS and len(arrays) <= MOST_TENSORS and sums <= SUMS


# Lowering


def _fused(drafts: Sequence[Draft], kept: set[Array]) -> Fusion:
    sheet: Sheet[Array] = Sheet()
    for draft in drafts:
        _LOWERED[draft.op](sheet, draft)
    stores = dict.fromkeys(array for draft in drafts for array in draft.writes if array.root in kept)
    slots = tuple(draft.slot for draft in drafts if draft.op in (Op.NORM, Op.LOSS))
    return Fusion(tuple(drafts), sheet.finished(list(stores)), slots)


def _maybe(sheet: Sheet[Array], array: Array | None) -> int:
    return NONE if array is None else sheet.load(array)


def _put(sheet: Sheet[Array], draft: Draft, value: int) -> None:
    assert draft.out is not None
    sheet.put(draft.out, sheet.add(sheet.load(draft.out), value) if draft.accumulate else value)


def _of(sheet: Sheet[Array], array: Array | None) -> int:
    assert array is not None
    return sheet.load(array)


def _combined(sheet: Sheet[Array], a: int, b: int, fa: float = 1.0, fb: float = 1.0) -> int:
    """fa a + fb b, where one of them may be absent."""
    if a == NONE or b == NONE:
        return sheet.scale(b, fb) if a == NONE else sheet.scale(a, fa)
    return sheet.add(a, b, fa, fb)


def _fill(sheet: Sheet[Array], draft: Draft) -> None:
    _put(sheet, draft, sheet.term(Operation.FILL, f=draft.f))


def _act(sheet: Sheet[Array], draft: Draft) -> None:
    _put(sheet, draft, sheet.term(Operation.ACT, _of(sheet, draft.a), kind=Activation(draft.p[0]), f=draft.f))


def _act_change(sheet: Sheet[Array], draft: Draft) -> None:
    kind, z = Activation(draft.p[0]), _of(sheet, draft.a)
    m = NONE
    if kind in BY_VALUE:
        m = sheet.term(Operation.ACT, z, kind=kind, f=draft.f) if draft.c is None else _of(sheet, draft.c)
    _put(sheet, draft, sheet.term(Operation.CHANGE, z, _of(sheet, draft.b), m, kind, draft.f))


def _act_grad(sheet: Sheet[Array], draft: Draft) -> None:
    kind = Activation(draft.p[0])
    at = _combined(sheet, _of(sheet, draft.b), _maybe(sheet, draft.c))
    by_value = len(draft.p) > 1 and bool(draft.p[1])
    operation = Operation.SLOPE_OF_VALUE if by_value else Operation.SLOPE
    if kind in BY_VALUE and not by_value and draft.c is None and draft.d is not None:  # z has not moved, and its value is there
        operation, at = Operation.SLOPE_OF_VALUE, _of(sheet, draft.d)
    slope = sheet.term(operation, at, kind=kind, f=draft.f)
    _put(sheet, draft, sheet.mul(_of(sheet, draft.a), slope))


def _add(sheet: Sheet[Array], draft: Draft) -> None:
    _put(sheet, draft, _combined(sheet, _maybe(sheet, draft.a), _maybe(sheet, draft.b), *draft.f))


def _mul(sheet: Sheet[Array], draft: Draft) -> None:
    _put(sheet, draft, sheet.mul(_of(sheet, draft.a), _of(sheet, draft.b)))


def _mul_change(sheet: Sheet[Array], draft: Draft) -> None:
    """a d + b (c + d)."""
    a, b, c, d = _of(sheet, draft.a), _maybe(sheet, draft.b), _of(sheet, draft.c), _maybe(sheet, draft.d)
    first = NONE if d == NONE else sheet.mul(a, d)
    second = NONE if b == NONE else sheet.mul(b, _combined(sheet, c, d))
    _put(sheet, draft, _combined(sheet, first, second))


def _mul_grad(sheet: Sheet[Array], draft: Draft) -> None:
    _put(sheet, draft, sheet.mul(_of(sheet, draft.a), _combined(sheet, _of(sheet, draft.b), _maybe(sheet, draft.c))))


def _error(sheet: Sheet[Array], draft: Draft) -> None:
    _put(sheet, draft, _combined(sheet, _maybe(sheet, draft.a), _maybe(sheet, draft.b), 1.0, -1.0))


def _move(sheet: Sheet[Array], draft: Draft) -> None:
    """velocity = momentum velocity + (feedback - precision error); value += rate velocity."""
    rate, momentum, precision = draft.f
    assert draft.out is not None
    speed = _combined(sheet, _maybe(sheet, draft.b), _of(sheet, draft.a), 1.0, -precision)
    if draft.c is not None:
        speed = sheet.add(sheet.load(draft.c), speed, momentum)
        sheet.put(draft.c, speed)
    sheet.put(draft.out, sheet.add(sheet.load(draft.out), speed, 1.0, rate))


def _relax(sheet: Sheet[Array], draft: Draft) -> None:
    (rate,) = draft.f
    assert draft.out is not None
    sheet.put(draft.out, _combined(sheet, sheet.load(draft.out), _maybe(sheet, draft.a), 1.0 - rate, rate))


def _norm(sheet: Sheet[Array], draft: Draft) -> None:
    a = _of(sheet, draft.a)
    sheet.sum(a, a if draft.b is None else _of(sheet, draft.b), draft.f[0])


def _loss(sheet: Sheet[Array], draft: Draft) -> None:
    """The squared error: target - (mu + change), times f0."""
    error = _combined(sheet, sheet.add(_of(sheet, draft.c), _of(sheet, draft.a), 1.0, -1.0), _maybe(sheet, draft.b), 1.0, -1.0)
    sheet.sum(error, error, 0.5 * draft.f[0])
    _put(sheet, draft, sheet.scale(error, draft.f[0]))


_LOWERED: dict[Op, Callable[[Sheet[Array], Draft], None]] = {
    Op.FILL: _fill,
    Op.ACT: _act,
    Op.ACT_CHANGE: _act_change,
    Op.ACT_GRAD: _act_grad,
    Op.ADD: _add,
    Op.MUL: _mul,
    Op.MUL_CHANGE: _mul_change,
    Op.MUL_GRAD: _mul_grad,
    Op.ERROR: _error,
    Op.MOVE: _move,
    Op.RELAX: _relax,
    Op.NORM: _norm,
    Op.LOSS: _loss,
}
