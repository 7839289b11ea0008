"""Which tile and how many warps suit the Triton kernels on this GPU: `python bench/gpu_tune.py --out tune.json [--variant pinned]`.

Times every choice that the planner can be asked for, in each precision, on a few models, and prints what was fastest on the whole: of the
scratch variant the rows of TABLE in pckernels/triton_planner.py, of the pinned variant, on the chains among the models that fit, LANES and
WARPS in pckernels/triton_pinned.py. To change them: put them there, then `python -m pckernels.triton.ahead_of_time --write relax` with each
Triton that has a budget. Compiling takes most of the time, minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_step import MODELS, captured, kernels_of, milliseconds

import pckernels as pck
from pckernels.backends import triton
from pckernels.triton_planner import LANES, PRECISIONS, TABLE, WARPS

Choice = tuple[int, int]  # lanes, warps
BATCHES = (64, 4096)
RULE = pck.Strict(20, 0.1)


def measured(model: str, batch: int, precision: str, variant: str, choice: Choice, seconds: float) -> dict[str, Any]:
    """Milliseconds, or a refusal in words."""
    build, shape = MODELS[model]
    torch.manual_seed(0)
    network = pck.PCNetwork(build().cuda(), RULE, backend="triton")
    x, target = torch.randn(batch, *shape).cuda(), torch.randn(batch, 10).cuda()
    row = {"model": model, "batch": batch, "precision": precision, "variant": variant, "lanes": choice[0], "warps": choice[1]}
    with triton.options(precision, variant, *choice):
        try:
            kernels = kernels_of(triton, network, x, target)
        except pck.Unsupported as refusal:
            return row | {"refused": str(refusal)}
        return row | milliseconds(captured(kernels), seconds)


def rows(precisions: Sequence[str], variant: str, seconds: float) -> Iterator[dict[str, Any]]:
    for precision, choice in itertools.product(precisions, itertools.product(LANES, WARPS)):
        for model, batch in itertools.product(MODELS, BATCHES):
            row = measured(model, batch, precision, variant, choice, seconds)
            found = row["refused"] if "refused" in row else f"{row['median']:10.4f} ms"
            print(f"{precision} lanes={choice[0]} warps={choice[1]} {model:20} {batch:5} {found}", flush=True)
            yield row


def fastest(found: Sequence[dict[str, Any]], precision: str) -> Choice:
    """Of the choices, the one with the least product of its times: no model outweighs another. One that something does not fit is none, but
    for what no choice fits."""
    logs: dict[Choice, dict[tuple[str, int], float]] = {}
    for row in found:
        if row["precision"] == precision and "median" in row:
            logs.setdefault((row["lanes"], row["warps"]), {})[row["model"], row["batch"]] = math.log(row["median"])
    most = max(map(len, logs.values()))
    return min((choice for choice in logs if len(logs[choice]) == most), key=lambda choice: sum(logs[choice].values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_tune.json"))
    parser.add_argument("--precision", choices=PRECISIONS, nargs="*", default=list(PRECISIONS))
    parser.add_argument("--variant", choices=("scratch", "pinned"), default="scratch")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each measurement")
    arguments = parser.parse_args()
    found = list(rows(arguments.precision, arguments.variant, arguments.seconds))
    table = {precision: dict(zip(("lanes", "warps"), fastest(found, precision), strict=True)) for precision in arguments.precision}
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "table": table, "rows": found}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for precision, row in table.items():
        print(f'"{precision}": {replace(TABLE[precision], **row) if arguments.variant == "scratch" else row},')
    return 0


if __name__ == "__main__":
    sys.exit(main())
