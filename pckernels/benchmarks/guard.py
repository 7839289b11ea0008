"""The regression guard: ratios of a run against committed ones. Never absolute times, which say what machine it was."""

from __future__ import annotations

from dataclasses import dataclass

from pckernels.benchmarks.record import Record, refused, timed

LOSS = 0.25  # a ratio may be worse by this much


@dataclass(frozen=True)
class Change:
    """One ratio, ours over another's, then and now."""

    case: str
    ours: str
    other: str
    before: float
    now: float

    @property
    def loss(self) -> float:
        """By what part we have become slower beside the other; negative: faster."""
        return self.now / self.before - 1.0

    @property
    def lost(self) -> bool:
        return not self.loss <= LOSS

    def __str__(self) -> str:
        verdict = "LOST" if self.lost else "ok"
        return f"{verdict:4}  {self.before:7.3f} -> {self.now:7.3f}  {self.loss:+6.0%}  {self.case}: {self.ours} / {self.other}"


def compare(committed: Record, fresh: Record) -> list[Change]:
    """Every ratio that both have, the worst first.

    Raises:
        ValueError: they have none in common, so nothing would be guarded.
    """
    before = _ratios(committed)
    changes = [Change(*key, before[key], now) for key, now in _ratios(fresh).items() if key in before]
    if not changes:
        raise ValueError(
            "The two records have no ratio in common; commit one of the suite that is run, or run the suite of the one committed."
        )
    return sorted(changes, key=lambda change: -change.loss)


def missing(committed: Record, fresh: Record) -> list[str]:
    """Backends of ours that timed a case then, and time it no more though it was run. (Rivals differ from suite to suite.)"""
    names = {case["name"] for case in fresh["cases"]}
    now = {(case, ours) for case, ours, _ in _ratios(fresh)}
    before = dict.fromkeys((case, ours) for case, ours, _ in _ratios(committed))
    return [f"{case}: {ours}" for case, ours in before if case in names and (case, ours) not in now]


def verdict(committed: Record, fresh: Record) -> tuple[bool, list[str]]:
    """Whether all is well, and in lines why or why not.

    Raises:
        ValueError: as compare.
    """
    if refused(fresh) and not timed(fresh):
        return False, [f"REFUSED  {case['refused']}" for case in refused(fresh)]
    changes = compare(committed, fresh)
    gone = missing(committed, fresh)
    lines = [str(change) for change in changes]
    lines += [f"GONE  {name}" for name in gone] + [f"REFUSED  {case['refused']}" for case in refused(fresh)]
    there, here = (record["machine"]["processor"] for record in (committed, fresh))
    if there != here:
        lines.append(f"note: committed on {there}, run on {here}: ratios differ between processors, though less than times.")
    lost = [change for change in changes if change.lost]
    lines.append(f"{len(lost)} of {len(changes)} ratios lost more than {LOSS:.0%}; {len(gone)} gone; {len(refused(fresh))} refused.")
    return not (lost or gone or refused(fresh)), lines


def _ratios(record: Record) -> dict[tuple[str, str, str], float]:
    return {(case["name"], r["ours"], r["other"]): float(r["median"]) for case in timed(record) for r in case["ratios"]}
