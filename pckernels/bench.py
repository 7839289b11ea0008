"""`pckernels bench`: ours beside what one would use instead, after the numbers agree; a table, JSON, figures, and one page of HTML."""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pckernels.benchmarks import ceilings, curves, guard, machine, peers, record, tables
from pckernels.benchmarks.cases import SUITES, Case, device_of, suite
from pckernels.benchmarks.contenders import RIVALS, TWO_THREADS
from pckernels.benchmarks.runner import Setting, about
from pckernels.benchmarks.runner import run as run_case
from pckernels.benchmarks.verification import Disagreement
from pckernels.jsonfile import add_json_argument, output_path, write_json

CURVE_SECONDS = {"quick": 6.0, "cpu": 20.0, "gpu": 6.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Each case verifies the gradients of everyone who takes part against float64 before anyone is timed; where one\n"
        "disagrees, no time is printed and the exit code is 1. Figures and the page are drawn from the JSON alone:\n"
        "`pckernels bench --from FILE --out DIR` draws them again.\n"
        "rivals: " + ", ".join(RIVALS) + "\n"
        "peers, each in a process of its own: " + ", ".join(peers.PEERS) + " (those that this Python has, and those named by --peer)"
    )
    parser.add_argument("--suite", choices=SUITES, default="quick", help="quick: minutes; cpu: all that a CPU can; gpu (default: quick)")
    parser.add_argument("--case", action="append", default=[], metavar="TEXT", help="only cases whose name has TEXT in it; may be repeated")
    parser.add_argument("--against", nargs="+", metavar="RIVAL", help="only these rivals and peers (default: all of each case)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="a peer, and the Python that has it installed")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and of ours (default: 1)")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="after which no new case or curve begins; those left out are named")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare ratios with those of FILE; exit 1 if one has lost over 25%%")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing: take FILE, written by --json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="figures and report.html, with bench.json beside them")
    parser.add_argument(
        "--tables", type=Path, nargs="+", default=[], metavar="FILE", help="rewrite the tables between marks in these files"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    if args.threads < 1:
        raise ValueError(f"--threads must be 1 or more; got {args.threads}.")
    committed = record.read(args.check) if args.check else None
    if args.out:
        output_path(str(args.out / "bench.json"))
    found = record.read(args.source) if args.source else measured(args)
    print(tables.summary(found))
    print(f"\n{tables.provenance(found)}")
    _write(args, found)
    good = not record.refused(found)
    if committed is not None:
        good, lines = guard.verdict(committed, found)
        print("\n".join(lines))
    return 0 if good else 1


def measured(args: argparse.Namespace) -> record.Record:
    """Run a suite, as the arguments say."""
    known = {*RIVALS, *peers.PEERS, TWO_THREADS}
    strange = [name for name in args.against or [] if name not in known]
    if strange:
        raise ValueError(f"There is no rival {strange[0]!r}; choose from {', '.join(sorted(known))}.")
    device = device_of(args.suite)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("The suite gpu needs a CUDA device, and PyTorch finds none; `--suite cpu` needs none.")
    cases = [case for case in suite(args.suite) if not args.case or any(text in case.name for text in args.case)]
    if not cases:
        raise ValueError(f"No case of the suite {args.suite} has {' or '.join(map(repr, args.case))} in its name.")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # everyone in float32, as products are by default
            return _suite(args, cases, device)
    finally:
        torch.set_num_threads(before)


def _suite(args: argparse.Namespace, cases: list[Case], device: torch.device) -> record.Record:
    began, load = time.monotonic(), machine.load()
    limit = float("inf") if args.limit is None else args.limit
    chosen = _peers(args)
    setting = Setting(device, args.threads, ceilings.measure(device), tuple(args.against) if args.against else None, chosen)
    parts = _parts(cases, setting, args.suite, whole=not args.case)
    found: record.Record = {
        "schema": record.SCHEMA,
        "suite": args.suite,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine.describe(args.threads),
        "ceilings": vars(setting.ceilings),
        "registered": [about(case) for case in cases],
        "cases": [],
        "left_out": [part.name for part in parts],
        "curves": {},
    }
    with tqdm(parts, unit="part", disable=None, dynamic_ncols=True) as bar:
        for part in bar:
            bar.set_description(part.name[:48])
            if time.monotonic() - began <= limit:
                part.run(found)
                found["left_out"].remove(part.name)
            after = machine.load()
            found["load"] = {"before": load, "after": after, "other_work": machine.other_work(load, after, args.threads)}
            found["seconds"] = round(time.monotonic() - began, 1)
            if args.json:  # as it stands: whoever ends this run early has what was measured until then
                write_json(args.json, found)
    return found


@dataclass(frozen=True)
class Part:
    """Something to be measured, which adds itself to the record."""

    name: str
    run: Callable[[record.Record], None]


def _parts(cases: Sequence[Case], setting: Setting, name: str, whole: bool) -> list[Part]:
    """Cases and curves. On a GPU, where time is short, those first that the table of goals is made of."""
    case_parts = [Part(case.name, partial(_add_case, case, setting)) for case in cases]
    curve_parts = [Part(key, partial(_add_curve, key, measure)) for key, measure in _curves(setting, name).items()] if whole else []
    if name != "gpu":
        return case_parts + curve_parts
    goals = sum(bool(case.goals) or "batch" in case.axes for case in cases)
    return case_parts[:goals] + curve_parts + case_parts[goals:]


def _add_case(case: Case, setting: Setting, found: record.Record) -> None:
    try:
        row = run_case(case, setting)
    except RuntimeError as error:  # of a driver, or of memory: the cases that are left are worth more than this one
        if setting.device.type != "cuda":
            raise
        row = {**about(case), "contenders": [], "ratios": [], "not_here": {}, "refused": f"{case.name}: {type(error).__name__}: {error}"}
    found["cases"].append(row)


def _add_curve(key: str, measure: Callable[[], Any], found: record.Record) -> None:
    try:
        found["curves"][key] = measure()
    except Disagreement as error:
        found["curves"].setdefault("refused", {})[key] = str(error)


def _curves(setting: Setting, name: str) -> dict[str, Callable[[], Any]]:
    """Those of a suite, in order of importance."""
    seconds = CURVE_SECONDS[name]
    depths = {"depths": lambda: curves.depths(setting, seconds / 2)} if name == "gpu" else {}
    return {
        **depths,
        "slopes": lambda: curves.slopes(setting, seconds / 2),
        "memory": lambda: curves.memory(setting.device),
        "errors": lambda: curves.errors(setting, seconds),
    }


def _peers(args: argparse.Namespace) -> dict[str, str]:
    pairs = [text.partition("=") for text in args.peer]
    if any(not python for _, _, python in pairs):
        raise ValueError("--peer takes NAME=PYTHON, such as pcx=/path/to/venv/bin/python.")
    found = peers.installed({name: python for name, _, python in pairs})
    return {name: python for name, python in found.items() if not args.against or name in args.against}


def _write(args: argparse.Namespace, found: record.Record) -> None:
    if args.json:
        write_json(args.json, found)
    for file in args.tables:
        tables.rewrite(file, found)
    if args.out:
        from pckernels.benchmarks import page

        write_json(args.out / "bench.json", found)
        print(f"report: {page.write(found, args.out)}")
