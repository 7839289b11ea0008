"""Checkpoints: complete or absent whenever the process dies, and refused when damaged or of another run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pckernels import checkpoint

WRITER = """
import sys, torch
from pckernels import checkpoint
count = 0
while True:
    count += 1
    checkpoint.save(sys.argv[1], {"count": count, "weights": torch.full((200_000,), float(count))})
"""


def test_what_is_saved_comes_back(tmp_path):
    state = {"weights": torch.randn(3, dtype=torch.float64), "nested": {"rows": [1, 2.5, "x", None], "pair": (True, 2)}}
    checkpoint.save(tmp_path / "a.pt", state)
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert torch.equal(loaded.pop("weights"), state["weights"])
    assert loaded == {"nested": state["nested"], "format": checkpoint.FORMAT}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(2).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    draw()  # leaves the second half of a pair of Gaussian numbers waiting in both generators
    checkpoint.save(tmp_path / "a.pt", {"rng": checkpoint.rng_state()})
    expected = draw()
    assert draw() != expected
    checkpoint.restore_rng(checkpoint.load(tmp_path / "a.pt")["rng"])
    assert draw() == expected


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_failure_at_any_moment_keeps_the_old_one(tmp_path, monkeypatch, moment):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"count": 1})

    def fail(*_):
        raise OSError("No space left on device")

    target = {"write": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[moment]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"count": 2})
    monkeypatch.undo()
    assert checkpoint.load(path)["count"] == 1
    assert os.listdir(tmp_path) == ["a.pt"]


def test_the_new_one_is_on_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    calls = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    checkpoint.save(tmp_path / "a.pt", {"count": 1})
    assert calls == ["fsync", "replace", "fsync"]  # the file, the rename, the folder


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    seen = set()
    for moment in (0.0, 0.013, 0.031, 0.057):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=Path(__file__).parents[1])
        try:
            before = path.stat().st_mtime_ns if path.exists() else None
            deadline = time.monotonic() + 120
            while not path.exists() or path.stat().st_mtime_ns == before:
                assert process.poll() is None and time.monotonic() < deadline, "the writer wrote nothing"
                time.sleep(0.001)
            time.sleep(moment)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        state = checkpoint.load(path)
        assert bool((state["weights"] == state["count"]).all())
        seen.add(state["count"])
        assert set(os.listdir(tmp_path)) <= {"a.pt", "a.pt.tmp"}
    assert max(seen) > 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", None])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    with pytest.raises(ValueError, match=r"a\.pt cannot be read .*; delete it and train again"):
        checkpoint.load(path)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*a\.pt"):
        checkpoint.load(tmp_path / "a.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is not a checkpoint that this version of pckernels wrote"):
        checkpoint.load(tmp_path / "a.pt")


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": checkpoint.FORMAT, "weights": Hostile()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_other_settings_are_named():
    checkpoint.require_same({"lr": 0.1, "hidden": [3]}, {"lr": 0.1, "hidden": [3]}, "run")
    with pytest.raises(ValueError, match=r"lr was 0\.1 and is now 0\.2; seed was None and is now 1\. Use the old ones"):
        checkpoint.require_same({"lr": 0.1, "loss": "a"}, {"lr": 0.2, "loss": "a", "seed": 1}, "run")
