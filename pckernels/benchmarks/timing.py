"""Contenders take turns, so that a busy machine slows all of them; medians, quartiles, and ratios of the same round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

LEAST, MOST = 5, 200  # rounds


Clock = Callable[[], float]  # seconds


def rounds(
    runs: Mapping[str, Callable[[], object]],
    seconds: float,
    device: torch.device,
    least: int = LEAST,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round, for about so many seconds, at least so many rounds.

    A round that is slow for everyone, as at the start, still counts: spread is part of the result.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.monotonic() + seconds
    for turn in range(MOST):
        if turn >= least and time.monotonic() > deadline:
            break
        for name, run in runs.items():
            times[name].append(milliseconds(run, device, clock))
    return times


def processor_clock(device: torch.device) -> Clock:
    """For what runs on the CPU, the time that this process has had of it, whoever else was there; otherwise the time of day."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def milliseconds(run: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Of one call, with everything that it has put on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (clock() - start)


def recorded(run: Callable[[], object]) -> tuple[Callable[[], None], object]:
    """A replay of `run` as one CUDA graph, and what `run` returned when it was recorded. Where that fails, the stream is what it was."""
    before, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(before)
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    before.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            returned = run()
    finally:
        torch.cuda.set_stream(before)
    return graph.replay, returned


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles, extremes."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low": low, "high": high, "min": min(values), "max": max(values), "rounds": len(values)}


def ratio(ours: Sequence[float], rival: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of ours / rival, each of one round."""
    found = summary([a / b for a, b in zip(ours, rival, strict=True)])
    return {name: float(found[name]) for name in ("median", "low", "high")}
