"""Other PC libraries, each run in a process of its own, since their requirements exclude each other.

A peer is a script beside this file, without any import of pckernels: `python NAME.py input.npz output.npz`. It reads the task as JSON
("task": model, steps, rate, seconds), the weights, x and target, and writes its gradients, its times in milliseconds and its versions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pckernels.benchmarks import timing
from pckernels.benchmarks.cases import Case
from pckernels.benchmarks.verification import Gradients, measure, require_agreement
from pckernels.rules import Strict

PEERS = {"pcx": "pcx", "fabricpc": "fabricpc"}  # name -> the module that must be importable
SCRIPTS = Path(__file__).parent
TIMEOUT = 300  # seconds


class Refused(RuntimeError):
    """A peer does not run a case, for a reason in words."""


def installed(named: dict[str, str]) -> dict[str, str]:
    """Name -> the Python that runs it: those named, and those that this Python has."""
    unknown = set(named) - set(PEERS)
    if unknown:
        raise ValueError(f"There is no peer {sorted(unknown)[0]!r}; choose from {', '.join(PEERS)}.")
    here = {name: sys.executable for name, module in PEERS.items() if util.find_spec(module) is not None}
    return {**here, **named}


def run(name: str, python: str, case: Case, module: nn.Module, x: Tensor, target: Tensor, wanted: Gradients) -> dict[str, Any]:
    """A peer's row: its gradients are held against the rule's oracle before its times are read.

    Raises:
        Refused: it cannot run this case, or failed.
        Disagreement: it computes something else.
    """
    if not isinstance(case.rule, Strict) or case.model.loop not in ("mlp", "convolutions") or case.rule.momentum:
        raise Refused("the peer's script has strict inference without momentum on perceptrons and the paper's CNN")
    with tempfile.TemporaryDirectory(prefix="pckernels-peer-") as folder:
        answer = _answer(name, python, Path(folder), _task(case, module, x, target))
    found = [torch.from_numpy(answer[f"gradient{k}"]) for k in range(len(wanted))]
    off = measure(case)(found, wanted)
    require_agreement(name, off, case.limit_of_values, case.name)
    return {
        "name": name,
        "ours": False,
        "computes": "rule",
        "plan": f"in a process of its own: {answer['versions']}",
        "threads": 1,
        "off": off,
        "limit": case.limit_of_values,
        "ms": timing.summary(answer["times"].tolist()),
    }


def _task(case: Case, module: nn.Module, x: Tensor, target: Tensor) -> dict[str, Any]:
    dynamics = case.rule.dynamics
    task = {"model": case.model.loop, "steps": dynamics.steps, "rate": dynamics.rate, "seconds": case.seconds, "least": timing.LEAST}
    arrays = {f"weight{k}": parameter.detach().cpu().numpy() for k, parameter in enumerate(module.parameters())}
    return {"task": json.dumps(task), "x": x.cpu().numpy(), "target": target.cpu().numpy(), **arrays}


def _answer(name: str, python: str, folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    given, taken = folder / "input.npz", folder / "output.npz"
    np.savez(given, **task)
    script = SCRIPTS / f"run_{name}.py"
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            [python, str(script), str(given), str(taken)], env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"it did not answer: {error}") from error
    if done.returncode:
        raise Refused(f"its script failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    with np.load(taken) as answer:
        return {key: answer[key] for key in answer.files}
