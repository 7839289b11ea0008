"""One case from data to numbers: draw, verify, time, count. What comes out is plain data for the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from pckernels.backends import cuda, selection
from pckernels.benchmarks import ceilings, peers, timing
from pckernels.benchmarks.cases import Case
from pckernels.benchmarks.contenders import Arena, Contender, contenders
from pckernels.benchmarks.ledger import ledger
from pckernels.benchmarks.proof import Court, Proof
from pckernels.benchmarks.record import in_float32
from pckernels.benchmarks.verification import Disagreement, Oracles, measure, oracles, require_agreement
from pckernels.compiler import Compiled
from pckernels.planner import Plan

Row = dict[str, Any]
DRAWS = 5  # of data: rounding puts a unit on the other side of its kink on some of them, a wrong kernel is wrong on all


@dataclass(frozen=True)
class Setting:
    """What holds for all cases of a run.

    Attributes:
        against: rivals to run; None: all that a case names. peers: name -> the Python that has it.
    """

    device: torch.device
    threads: int
    ceilings: ceilings.Ceilings
    against: tuple[str, ...] | None = None
    peers: Mapping[str, str] | None = None


def run(case: Case, setting: Setting) -> Row:
    """A case's row. Where anyone disagrees with its oracle, the row holds a sentence, and no time of anyone."""
    row: Row = {**about(case), "contenders": [], "ratios": [], "not_here": {}}
    try:
        arena, fit, refused, verified = _agreeing(case, setting)
    except Disagreement as error:
        return {**row, "refused": str(error)}
    row["not_here"] = refused
    times = _timed(case, fit, setting)
    row["contenders"] = [
        {
            "name": contender.name,
            "ours": contender.ours,
            "computes": contender.computes,
            "plan": contender.plan,
            "threads": contender.threads,
            "off": verified.off[contender.name],
            "limit": contender.limit,
            **({"proof": asdict(verified.proofs[contender.name])} if contender.name in verified.proofs else {}),
            "ms": timing.summary(times[contender.name]),
        }
        for contender in fit
    ]
    _add_peers(row, case, arena, verified, setting)
    row["oracle"] = verified.oracles.source
    row["ratios"] = ratios(case, row["contenders"], times)
    row["ledger"] = _ledger(case, arena, setting)
    if case.accuracy is not None:
        off = max(c["off"] for c in row["contenders"] if c["ours"])
        row["accuracy"] = {"off": off, "goal": case.accuracy, "met": off <= case.accuracy}
    return row


def about(case: Case) -> Row:
    """A case without its measurements."""
    return {
        "name": case.name,
        "model": case.model.name,
        "batch": case.batch,
        "rule": case.rule_name,
        "steps": case.steps,
        "width": case.model.width,
        "depth": case.model.depth,
        "axes": list(case.axes),
        "goals": case.goals,
    }


# Verification


@dataclass(frozen=True)
class Verified:
    """Who is how far from which oracle, and what shows that it is right where that is far."""

    oracles: Oracles
    off: dict[str, float]
    proofs: dict[str, Proof] = field(default_factory=dict)


def _agreeing(case: Case, setting: Setting) -> tuple[Arena, list[Contender], dict[str, str], Verified]:
    for seed in range(case.seed, case.seed + DRAWS):
        arena = _arena(case, setting, seed)
        found, refused = contenders(arena)
        fit = [c for c in found if c.ours or setting.against is None or c.name in setting.against]
        try:
            return arena, fit, refused, verify(case, arena, fit)
        except Disagreement as error:
            last = error
    raise last


def _arena(case: Case, setting: Setting, seed: int) -> Arena:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, (x, target) = case.model.build(), case.model.data(case.batch)
    return Arena(case, module.to(setting.device), x.to(setting.device), target.to(setting.device), setting.threads)


def verify(case: Case, arena: Arena, fit: Sequence[Contender]) -> Verified:
    """Raise Disagreement unless every contender's gradients are those of its oracle, or proven where float32 takes them further off."""
    verified = Verified(oracles(case, arena.module, arena.x, arena.target), {})
    court = Court(arena, verified.oracles)
    for contender in fit:
        with contender.threaded():
            found = contender.gradients()
            off = measure(case)(found, verified.oracles.of(contender.computes))
            require_agreement(contender.name, off, max(contender.limit, contender.drift), case.name)
            if off > contender.limit:
                verified.proofs[contender.name] = court.prove(contender, found)
        verified.off[contender.name] = off
    return verified


# Times


def _timed(case: Case, fit: Sequence[Contender], setting: Setting) -> dict[str, list[float]]:
    return timing.rounds({contender.name: partial(_threaded, contender) for contender in fit}, case.seconds, setting.device, case.least)


def _threaded(contender: Contender) -> None:
    if torch.get_num_threads() == contender.threads:
        contender.run()
    else:
        with contender.threaded():
            contender.run()


def ratios(case: Case, rows: Sequence[Row], times: Mapping[str, Sequence[float]]) -> list[Row]:
    """Ours over everyone else's; below 1 is faster. Of the same rounds where they took turns, else of the medians."""
    found = []
    for ours in (row for row in rows if row["ours"]):
        for other in (row for row in rows if row is not ours and (not row["ours"] or f"{ours['name']} / {row['name']}" in case.goals)):
            found.append(_ratio(case, ours, other, times))
    for what, goal in case.goals.items():
        if what.startswith(f"{OURS} / "):
            _set_goal([r for r in found if in_float32(r["ours"]) and f"{OURS} / {r['other']}" == what], goal)
    return found


OURS = "ours"  # in a goal: whichever of ours is fastest in float32


def _set_goal(candidates: Sequence[Row], goal: float) -> None:
    best = min(candidates, key=lambda ratio: float(ratio["median"]), default=None)
    if best is not None:
        best.update(goal=goal, met=best["median"] <= goal)


def _ratio(case: Case, ours: Row, other: Row, times: Mapping[str, Sequence[float]]) -> Row:
    if other["name"] in times:
        value = timing.ratio(times[ours["name"]], times[other["name"]])
    else:
        value = {"median": ours["ms"]["median"] / other["ms"]["median"]}
    row = {"ours": ours["name"], "other": other["name"], **value}
    goal = case.goals.get(f"{ours['name']} / {other['name']}")
    return row if goal is None else {**row, "goal": goal, "met": value["median"] <= goal}


def _add_peers(row: Row, case: Case, arena: Arena, verified: Verified, setting: Setting) -> None:
    for name, python in (setting.peers or {}).items() if case.peers else ():
        try:
            row["contenders"].append(peers.run(name, python, case, arena.module, arena.x, arena.target, verified.oracles.rule))
        except (peers.Refused, Disagreement) as error:
            row["not_here"][name] = str(error)


# The ledger


def compiled_of(case: Case, arena: Arena) -> Compiled | str:
    """The code of a case, or why there is none."""
    return selection.code_for(arena.network.trace(arena.x), case.rule.dynamics, case.batch)


def _ledger(case: Case, arena: Arena, setting: Setting) -> Row | None:
    code = compiled_of(case, arena)
    if isinstance(code, str):
        return None
    tile, resident = tile_of(code, case.batch, setting.device)
    found = ceilings.report(ledger(code, case.batch, tile), setting.ceilings, resident)
    return {**found, "tile": tile, "resident": resident, "products_alone_ms": ceilings.products_alone(code, case.batch, setting.device)}


ON_CHIP = ("resident", "cluster")  # tiers that keep the loop's weights on the chip, as the arena
HOST_LANES = 16  # samples that the host engine puts into one row


def tile_of(code: Compiled, batch: int, device: torch.device) -> tuple[int, bool]:
    """Samples that share a reading of a weight, and whether weights stay on the chip."""
    if device.type != "cuda":
        return (1 if batch == 1 else HOST_LANES), False
    plan: Plan | str = cuda.plan_for(code, batch, device)
    return (plan.lanes, plan.tier in ON_CHIP) if isinstance(plan, Plan) else (batch, False)
