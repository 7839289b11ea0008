"""Shared by all tests: seeds, hypothesis profiles, and a count of what was skipped."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import cuda_emulated
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from pckernels.backends import binding

# "ci" draws the same examples at every run, and leaves the minutes of shrinking to HYPOTHESIS_PROFILE=explore, which looks for new ones.
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
PHASES = [Phase.explicit, Phase.generate]
settings.register_profile("ci", derandomize=True, database=None, deadline=None, phases=PHASES, suppress_health_check=QUIET)
settings.register_profile("explore", deadline=None, print_blob=True, suppress_health_check=QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> object:
    """New floating-point tensors and modules are float64 inside the test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of native backends start as NaN: nothing unwritten can pass."""

    def poison(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(binding, "allocate", poison)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The emulated CUDA engine. Tests of it stay in one process (xdist_group "emulator"): the first of them compiles it."""
    return cuda_emulated.module(Path(tmp_path_factory.mktemp("cuda")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """Tests of a file marked with xdist_group go to one process, so that what they compile is compiled once.

    pytest-xdist 3.8 would do it, but gives the group's name to an attribute of tests that pytest 9.2 no longer reads.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group_of(nodeid.partition("::")[0]) or nodeid

    return ByGroup(config, log)


@lru_cache
def _group_of(file: str) -> str | None:
    path = Path(__file__).parent / Path(file).name
    found = re.search(r'xdist_group\("([^"]+)"\)', path.read_text(encoding="utf-8")) if path.is_file() else None
    return found and found[1]


SHOWN = "shown"


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Puts a text into the summary of the run, from whichever process runs the test."""
    return lambda text: request.node.user_properties.append((SHOWN, text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]:
        for name, text in getattr(report, "user_properties", []):
            if name == SHOWN and report.when == "call":
                terminalreporter.write_line(f"\n{text}")
    skipped = Counter(reason(report) for report in terminalreporter.stats.get("skipped", []))
    terminalreporter.write_line(f"{sum(skipped.values())} skipped")
    for text, count in sorted(skipped.items()):
        terminalreporter.write_line(f"  {count} x {text}")


def reason(report: pytest.TestReport) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
