"""What was to be reached and whether it was: of one case, across cases, and in T. From a record alone; what was not measured says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pckernels.benchmarks.record import Record, contender, fastest_of_ours, in_float32, memories, timed

SLOPE, BEND = 0.2, 0.05  # of the predicted time a step; of a point's time, off the straight line
NOISE = 1 << 20  # bytes that a peak of memory may differ by
CAPTURED_LOOP = "loop, CUDA graph"
DEPTHS, DEEPER = (4, 32), 2.0
ROOFLINE = 0.5


@dataclass(frozen=True)
class Reached:
    """A goal and what was found.

    Attributes:
        case, what: in words. found, goal: as they are printed.
        met: None where it was not measured; `why` then says why not.
        ours, floor, alone: milliseconds of ours, of the floor, of the products by themselves, where these are known.
        spread: the middle half of the rounds' ratios, of which `found` is the median; "" where these are not of the same rounds.
    """

    case: str
    what: str
    found: str
    goal: str
    met: bool | None
    ours: float | None = None
    floor: float | None = None
    alone: float | None = None
    why: str = ""
    spread: str = ""

    @property
    def verdict(self) -> str:
        return f"not measured: {self.why}" if self.met is None else "met" if self.met else "not met"


def reached(record: Record) -> list[Reached]:
    """Every goal of the run's suite, in order."""
    return [goal for source in SOURCES for goal in source(record)]


def _not_measured(case: str, what: str, goal: str, why: str) -> Reached:
    return Reached(case, what, "", goal, None, why=why)


# Of a case


def registered(record: Record) -> list[Record]:
    """Name, model, batch, axes and goals of all cases that the run was to have."""
    found: list[Record] = record["registered"] if "registered" in record else record["cases"]
    return found


def why_not(record: Record, name: str) -> str:
    """Why a case has no times."""
    case = next((case for case in record["cases"] if case["name"] == name), None)
    if case is None:
        return "no time was left" if name in record["left_out"] else "the case was not run"
    return "refused" if "refused" in case else "who would be compared did not run"


def _cases(record: Record) -> Iterator[Reached]:
    measured = {case["name"]: case for case in timed(record)}
    for entry in registered(record):
        for what, goal in entry["goals"].items():
            if what.startswith("cuda") and record["suite"] != "gpu":  # in records of before each suite had its own
                continue
            case = measured.get(entry["name"])
            ratio = None if case is None else _ratio(case, what)
            if case is None or ratio is None:
                yield _not_measured(entry["name"], what, f"{goal:.2f}", why_not(record, entry["name"]))
            else:
                yield _of_ratio(case, ratio, ratio["median"], goal)


def _ratio(case: Record, what: str) -> Record | None:
    """The ratio that a goal is about; where it says "ours", that of whichever of ours was fastest."""
    ours, _, other = what.partition(" / ")
    found = [r for r in case["ratios"] if r["other"] == other and (r["ours"] == ours or (ours == "ours" and "goal" in r))]
    return found[0] if found else None


def _of_ratio(case: Record, ratio: Record, found: float, goal: float, what: str | None = None) -> Reached:
    ours, book = contender(case, ratio["ours"]), case["ledger"] or {}
    assert ours is not None
    shown = what or f"{ratio['ours']} / {ratio['other']}"
    times = (float(ours["ms"]["median"]), book.get("floor_ms"), book.get("products_alone_ms"))
    return Reached(case["name"], shown, f"{found:.2f}", f"{goal:.2f}", found <= goal, *times, spread=_spread(ratio))


def _spread(ratio: Record) -> str:
    return f"{ratio['low']:.2f} - {ratio['high']:.2f}" if "low" in ratio else ""


def _accuracies(record: Record) -> Iterator[Reached]:
    for case in timed(record):
        if "accuracy" in case:
            off = case["accuracy"]
            yield Reached(case["name"], "distance from float64", f"{off['off']:.1e}", f"{off['goal']:.0e}", bool(off["met"]))


# Across cases, on a GPU


def _batches(record: Record) -> Iterator[Reached]:
    """Slower than the captured loop at no batch: the worst of all, which counts only if all were measured."""
    entries = [entry for entry in registered(record) if "batch" in entry["axes"]]
    what, measured = f"ours / {CAPTURED_LOOP}, the worst batch", {case["name"]: case for case in timed(record)}
    cases = [measured[entry["name"]] for entry in entries if entry["name"] in measured]
    pairs = [(case, ratio) for case in cases if (ratio := _best(case, CAPTURED_LOOP)) is not None]
    if not entries or len(pairs) < len(entries):
        name = entries[0]["model"] if entries else "MLP"
        yield _not_measured(f"{name}, all batches", what, "1.00", f"{len(pairs)} of {len(entries)} batches were")
        return
    batches = [entry["batch"] for entry in entries]
    case, ratio = max(pairs, key=lambda pair: float(pair[1]["median"]))
    yield _of_ratio(case, ratio, float(ratio["median"]), 1.0, f"{what} of {len(batches)} from {min(batches)} to {max(batches)}")


def _best(case: Record, other: str) -> Record | None:
    """The smallest ratio of ours in float32 to another."""
    found = [ratio for ratio in case["ratios"] if ratio["other"] == other and in_float32(ratio["ours"])]
    return min(found, key=lambda ratio: float(ratio["median"]), default=None)


def _depths(record: Record) -> Iterator[Reached]:
    shallow, deep = DEPTHS
    what, goal = f"time a step, {deep} layers / {shallow}", f"{DEEPER:.2f}"
    found = record["curves"].get("depths")
    if not found:
        yield _not_measured("MLP of width 128, batch 64, strict", what, goal, _why_no_curve(record, "depths"))
        return
    name = f"{found['model']}, batch {found['batch']}, strict"
    if "not_measured" in found:
        yield _not_measured(name, what, goal, found["not_measured"])
        return
    times, floors = found["ms_a_step"], found["floor_ms_a_step"]
    ratio = times[str(deep)] / times[str(shallow)]
    yield Reached(name, what, f"{ratio:.2f}", goal, ratio <= DEEPER, times[str(deep)], floors[str(deep)])


def _rooflines(record: Record) -> Iterator[Reached]:
    """Of the roof that applies, that is of the floor's slowest level, at least half where state and weights stay on the chip."""
    cases = [case for case in timed(record) if case["ledger"] and case["ledger"]["resident"]]
    if not cases:
        yield _not_measured(
            "all resident cases", "floor / ours, the worst", f"{ROOFLINE:.2f}", "no case ran with state and weights on the chip"
        )
        return
    case = min(cases, key=_part_of_roof)
    book, ours, found = case["ledger"], fastest_of_ours(case), _part_of_roof(case)
    what = f"floor / ours, the worst of {len(cases)} resident cases"
    times = (float(ours["ms"]["median"]), book["floor_ms"], book["products_alone_ms"])
    yield Reached(case["name"], what, f"{found:.2f}", f"{ROOFLINE:.2f}", found >= ROOFLINE, *times)


def _part_of_roof(case: Record) -> float:
    return float(case["ledger"]["floor_ms"]) / float(fastest_of_ours(case)["ms"]["median"])


def _on_gpu(source: Callable[[Record], Iterator[Reached]]) -> Callable[[Record], Iterator[Reached]]:
    def those(record: Record) -> Iterator[Reached]:
        return source(record) if record["suite"] == "gpu" else iter(())

    return those


def _why_no_curve(record: Record, name: str) -> str:
    refused: str | None = record["curves"].get("refused", {}).get(name)
    return refused or ("no time was left" if name in record["left_out"] else "it was not run")


# In T


def _slopes(record: Record) -> Iterator[Reached]:
    """Time is linear in T, and a step takes what the ledger's counts predict."""
    if "slopes" in record["left_out"] or "slopes" in record["curves"].get("refused", {}):
        yield _not_measured("time in T", "time a step / predicted", f"1 +- {SLOPE:.2f}", _why_no_curve(record, "slopes"))
    for found in record["curves"].get("slopes", []):
        name, what, goal = f"{found['model']}, batch {found['batch']}, {found['rule']}", "time a step / predicted", f"1 +- {SLOPE:.2f}"
        if "not_measured" in found:
            yield _not_measured(name, what, goal, found["not_measured"])
            continue
        ratio = found["ms_a_step"] / found["predicted_ms_a_step"]
        met = abs(ratio - 1.0) <= SLOPE and found["bend"] <= BEND
        shown = f"{ratio:.2f}, straight to {100 * found['bend']:.1f}%"
        yield Reached(name, what, shown, goal, met, found["ms_a_step"], found["floor_ms_a_step"])


def _memory(record: Record) -> Iterator[Reached]:
    """Peaks differ by noise; an engine's state is the same from T = 10 on, and at T = 1, where some is not yet needed, no larger."""
    rows = memories(record)
    if not rows and "memory" in record["left_out"]:
        yield _not_measured("memory in T", "memory", "flat", _why_no_curve(record, "memory"))
    for found in rows:
        peaks, states = list(found["bytes"].values()), found.get("state_bytes")
        spread = max(peaks) - min(peaks)
        flat = states is None or _is_flat([states[T] for T in sorted(states, key=int)])
        words = "" if states is None else f"state {'the same' if flat else 'grows'}, "
        span, by = ", ".join(sorted(found["bytes"], key=int)), f", {found['backend']}" if "backend" in found else ""
        what = f"memory at T = {span}"
        shown = f"{words}peaks within {spread / 2**10:.0f} KiB"
        yield Reached(f"{found['model']}, batch {found['batch']}, strict{by}", what, shown, "flat", flat and spread <= NOISE)


def _is_flat(state: list[int]) -> bool:
    return len(set(state[1:])) <= 1 and state[0] <= state[-1]


SOURCES: tuple[Callable[[Record], Iterator[Reached]], ...] = (
    _cases,
    _on_gpu(_batches),
    _on_gpu(_depths),
    _on_gpu(_rooflines),
    _accuracies,
    _slopes,
    _memory,
)
