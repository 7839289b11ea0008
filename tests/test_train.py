"""Training: both learners on the same batches, exact rules against backprop, kill and resume, bad arguments.

PCKERNELS_TRAIN_BATCHES=200 pytest tests/test_train.py -k exact   compares the losses over 200 batches; the default is 12.
"""

import csv
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pckernels import checkpoint, cli, data, plot, training
from pckernels.settings import TrainConfig, complete
from pckernels.train import train

REAL = os.environ.get("PCKERNELS_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="PCKERNELS_DATA is not set: the real data sets are not here")
BATCHES = int(os.environ.get("PCKERNELS_TRAIN_BATCHES", "12"))
ROOT = Path(__file__).parents[1]
SMALL = ["--train-samples", "96", "--test-samples", "32", "--batch-size", "16"]


def silent(_: str) -> None:
    pass


def run(*arguments: object) -> int:
    return cli.main(["train", *map(str, arguments)])


def rows(path: Path) -> list[dict[str, str]]:
    return plot.read_metrics(path)


def losses(config: TrainConfig) -> list[float]:
    return [row[4] for row in train(config, report=silent).rows if row[3] == "train"]


SMALL_MODELS = [
    pytest.param({"model": "mlp", "hidden": (20, 15)}, id="mlp"),
    pytest.param({"model": "mlp", "hidden": (20,), "loss": "cross_entropy", "optimizer": "adam", "lr": 0.01}, id="mlp-adam"),
    pytest.param({"model": "cnn", "train_samples": 400}, id="cnn"),
    pytest.param({"model": "rnn", "hidden": (12,), "train_samples": 300, "batch_size": 4}, id="rnn", marks=needs_data),
    pytest.param({"model": "lstm", "hidden": (8,), "sequence": 6, "batch_size": 4}, id="lstm", marks=needs_data),
]


@pytest.mark.parametrize("options", SMALL_MODELS)
def test_an_exact_rule_has_backprop_s_losses(options):
    config = TrainConfig(**options, dtype="float64", epochs=BATCHES, batches=BATCHES, test_samples=20)
    backprop = losses(dataclasses.replace(config, learner="backprop"))
    assert len(backprop) == BATCHES and min(backprop) < backprop[0]
    for pc in ({"rule": "zero"}, {"rule": "fixed", "rate": 1.0, "steps": 10}):
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses(dataclasses.replace(config, **pc)), backprop, strict=True))
        assert worst < 1e-9, pc


@pytest.mark.parametrize(
    "rule",
    [{"rule": "strict"}, {"rule": "strict", "nudge": 0.5}, {"rule": "error_optimization"}, {"rule": "incremental"}, {"rule": "fixed"}],
    ids=str,
)
def test_a_rule_that_is_not_exact_is_seen(rule):
    config = TrainConfig("mlp", hidden=(20, 15), dtype="float64", batches=5)
    backprop = losses(dataclasses.replace(config, learner="backprop"))
    assert abs(losses(dataclasses.replace(config, **rule, steps=3))[-1] / backprop[-1] - 1) > 1e-6


@pytest.mark.parametrize(("words", "nudge"), [(["-0.2"], -0.2), (["centered", "0.5"], ("centered", 0.5))])
def test_the_nudge_of_the_command_line_is_the_rule_s_and_resumes(words, nudge, tmp_path):
    options = ["mlp", "--rule", "strict", "--steps", 3, "--nudge", *words, "--hidden", 8, *SMALL, "--out", tmp_path]
    assert run(*options, "--batches", 2) == 0
    assert run(*options, "--resume") == 0
    config = TrainConfig("mlp", rule="strict", steps=3, nudge=nudge, hidden=(8,), train_samples=96, test_samples=32, batch_size=16)
    result = train(config, report=silent)
    assert result.network.rule.nudge == nudge
    assert float(rows(tmp_path / "pc.csv")[-1]["loss"]) == result.loss


RELAXED = ["--rule", "relaxed", "--over", "zero", "--feedback", "learned", "--no-derivative"]


def test_the_relaxed_rule_of_the_command_line_learns_what_it_adds_and_resumes(tmp_path):
    options = ["mlp", *RELAXED, "--error-weights", "learned", "--lr", "1e-3", "--hidden", 8, *SMALL]
    assert run(*options, "--out", tmp_path / "parts", "--batches", 2) == 0
    assert run(*options, "--out", tmp_path / "parts", "--resume") == 0
    assert run(*options, "--out", tmp_path / "whole") == 0
    first, second = (checkpoint.load(tmp_path / name / "pc.pt")["run"]["model"] for name in ("parts", "whole"))
    assert {name for name in first if name.startswith("pc.")} == {"pc.feedback.2.weight", "pc.error_weights.0"}
    assert all(torch.equal(first[name], second[name]) for name in second)
    config = TrainConfig("mlp", rule="relaxed", over="zero", feedback="learned", derivative=False, hidden=(8,), batches=1, train_samples=96)
    rule = train(config, report=silent).network.rule
    assert (rule.feedback, rule.derivative, rule.error_weights, type(rule.rule).__name__) == (
        "learned",
        False,
        "identity",
        "ZeroDivergence",
    )


def test_the_precision_of_the_command_line_is_the_network_s():
    learned = train(TrainConfig("mlp", rule="strict", precision="learned", lr=1e-3, hidden=(8,), batches=2, steps=2), report=silent)
    assert all(value.item() != 0.0 for value in learned.network.extra_parameters().values()) and learned.network.extra_parameters()
    assert train(TrainConfig("mlp", precision=0.5, hidden=(8,), batches=1), report=silent).network.precision == 0.5


def test_the_default_learning_rate_of_incremental_is_shared_among_its_steps():
    assert complete(TrainConfig("mlp", rule="incremental", steps=8)).lr == complete(TrainConfig("mlp")).lr / 8
    assert complete(TrainConfig("mlp", rule="incremental", lr=0.3)).lr == 0.3


def test_incremental_takes_fewer_and_larger_steps_on_a_perceptron():
    found = {model: complete(TrainConfig(model, rule="incremental")) for model in ("mlp", "cnn")}
    assert {model: (config.steps, config.rate) for model, config in found.items()} == {"mlp": (6, 0.5), "cnn": (20, 0.1)}
    assert complete(TrainConfig("mlp", rule="incremental", rate=0.2)).rate == 0.2


def test_both_learners_leave_metrics_curves_settings_and_json(tmp_path, capsys):
    out, results = tmp_path / "out", tmp_path / "results.json"
    assert run("mlp", "--learner", "both", "--hidden", 8, "--epochs", 2, *SMALL, "--out", out, "--json", results) == 0
    assert sorted(os.listdir(out)) == sorted(["backprop.csv", "backprop.json", "backprop.pt", "curves.png", "pc.csv", "pc.json", "pc.pt"])
    for learner in ("pc", "backprop"):
        table = rows(out / f"{learner}.csv")
        assert [row["split"] for row in table] == ["test"] + 2 * (["train"] * 6 + ["test"])
        assert [int(row["step"]) for row in table if row["split"] == "test"] == [0, 6, 12]
    printed = capsys.readouterr().out
    summary = json.loads(results.read_text())
    for entry, learner in zip(summary["learners"], ("pc", "backprop"), strict=True):
        assert entry["learner"] == learner and len(entry["tests"]) == 3
        assert f"{learner}: test accuracy {entry['test_accuracy']:.2%}" in printed
        assert float(rows(out / f"{learner}.csv")[-1]["loss"]) == entry["test_loss"]
    assert json.loads((out / "pc.json").read_text())["rule"] == "fixed"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_test_row_is_the_loss_and_accuracy_of_the_network():
    result = train(TrainConfig("cnn", train_samples=64, test_samples=40, learner="backprop"), report=silent)
    test = data.limited(data.load("digits").test, 40)
    x, labels = test.fetch(torch.arange(40))
    output = result.network(x).detach()
    target = torch.nn.functional.one_hot(labels, 10)
    assert result.loss == pytest.approx(float(0.5 * ((output - target) ** 2).sum()) / 40, rel=1e-5)
    assert result.accuracy == float((output.argmax(1) == labels).sum()) / 40


def test_reduction_changes_the_gradient_and_not_the_loss_that_is_reported():
    config = TrainConfig("mlp", hidden=(8,), train_samples=64, test_samples=32, learner="backprop", batch_size=16, dtype="float64")
    by_mean, by_sum = (dataclasses.replace(config, reduction=reduction) for reduction in ("mean", "sum"))
    first = losses(by_mean)
    assert losses(by_sum)[0] == pytest.approx(first[0], rel=1e-12)
    assert losses(by_sum)[-1] != pytest.approx(first[-1], rel=1e-3)
    assert losses(dataclasses.replace(by_sum, lr=0.2 / 16)) == pytest.approx(losses(dataclasses.replace(by_mean, lr=0.2)), rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"learner": "backprop"}, {"rule": "zero"}, {"rule": "error_optimization", "steps": 8}, {"rule": "incremental", "steps": 8}],
    ids=str,
)
def test_training_learns_digits(options):
    assert train(TrainConfig("mlp", hidden=(30,), epochs=4, **options), report=silent).accuracy > 0.85


LONG = [
    "cnn",
    "--epochs",
    "3",
    "--train-samples",
    "320",
    "--test-samples",
    "32",
    "--batch-size",
    "8",
    "--steps",
    "10",
    "--checkpoint-every",
    "7",
]


def start(*arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pckernels", "train", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def assert_same_run(ours: Path, theirs: Path) -> None:
    for suffix in (".csv", ".json"):
        assert ours.with_suffix(suffix).read_bytes() == theirs.with_suffix(suffix).read_bytes()
    a, b = checkpoint.load(ours.with_suffix(".pt"))["run"], checkpoint.load(theirs.with_suffix(".pt"))["run"]
    assert a["position"] == b["position"] and a["model"].keys() == b["model"].keys()
    assert torch.equal(a["rng"]["torch"], b["rng"]["torch"])
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in b["model"])
    for index, state in b["optimizer"]["state"].items():
        assert torch.equal(a["optimizer"]["state"][index]["momentum_buffer"], state["momentum_buffer"])


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    options = [*LONG, "--optimizer-momentum", "0.5", "--lr", "1e-3", "--threads", "1"]
    unbroken = start(*options, "--out", tmp_path / "unbroken")
    process = start(*options, "--out", tmp_path / "killed")
    kills = 0
    while True:
        delay = random.SystemRandom().uniform(0.0, 0.4)
        wait_for_progress(process, tmp_path / "killed" / "pc.csv")
        time.sleep(delay)
        if process.poll() is None and kills < 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            process = start(*options, "--out", tmp_path / "killed", "--resume")
            continue
        assert process.wait(timeout=200) == 0, process.stderr.read()
        break
    assert unbroken.wait(timeout=200) == 0, unbroken.stderr.read()
    assert kills > 0
    assert len(rows(tmp_path / "unbroken" / "pc.csv")) == 1 + 3 * 41
    assert_same_run(tmp_path / "killed" / "pc", tmp_path / "unbroken" / "pc")


def wait_for_progress(process: subprocess.Popen, table: Path) -> None:
    """Until the process has gone past a checkpoint in the middle of an epoch, or ended."""
    seen = len(table.read_bytes()) if table.exists() else 0
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if table.exists() and len(table.read_bytes().splitlines()) > 10 and len(table.read_bytes()) > seen:
            return
        time.sleep(0.01)
    assert process.poll() is not None, "the run did not come on in two minutes"


QUICK = {"model": "mlp", "hidden": (8,), "train_samples": 96, "test_samples": 32, "batch_size": 16, "checkpoint_every": 4, "steps": 5}


@pytest.mark.parametrize("stop", [1, 4, 6, 7, 12, 15])
def test_stopping_after_some_batches_and_going_on_changes_nothing(tmp_path, stop):
    config = TrainConfig(**QUICK, epochs=3)
    whole = train(dataclasses.replace(config, out=str(tmp_path / "whole")), report=silent)
    parts = dataclasses.replace(config, out=str(tmp_path / "parts"))
    train(dataclasses.replace(parts, batches=stop), report=silent)
    result = train(dataclasses.replace(parts, resume=True), report=silent)
    assert [row[:4] for row in result.rows] == [row[:4] for row in whole.rows]
    assert (result.loss, result.accuracy) == (whole.loss, whole.accuracy)
    assert_same_run(tmp_path / "parts" / "pc", tmp_path / "whole" / "pc")


def test_a_limit_at_the_end_of_an_epoch_ends_the_epoch(tmp_path):
    config = TrainConfig(**QUICK)
    train(dataclasses.replace(config, out=str(tmp_path / "epoch")), report=silent)
    train(dataclasses.replace(config, out=str(tmp_path / "limit"), batches=6), report=silent)
    assert_same_run(tmp_path / "limit" / "pc", tmp_path / "epoch" / "pc")


def test_a_run_that_died_between_the_last_batch_of_an_epoch_and_its_end(tmp_path, monkeypatch):
    config = TrainConfig(**{**QUICK, "checkpoint_every": 6}, epochs=1, batches=6)
    train(dataclasses.replace(config, out=str(tmp_path / "whole")), report=silent)

    def die(*_):
        raise KeyboardInterrupt

    died = dataclasses.replace(config, out=str(tmp_path / "died"), resume=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "_end_epoch", die)
        train(died, report=silent)
    assert checkpoint.load(tmp_path / "died" / "pc.pt")["run"]["position"] == {"step": 6, "epoch": 0, "batch": 6}
    train(died, report=silent)
    assert_same_run(tmp_path / "died" / "pc", tmp_path / "whole" / "pc")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    for batches in (None, 8):
        config = TrainConfig(**QUICK, epochs=2, batches=batches, out=str(tmp_path / str(batches)))
        first = train(config, report=silent)
        content = {path.name: path.read_bytes() for path in (tmp_path / str(batches)).glob("*.csv")}
        again = train(dataclasses.replace(config, resume=True), report=silent)
        assert (again.loss, again.accuracy) == (first.loss, first.accuracy)
        assert content == {path.name: path.read_bytes() for path in (tmp_path / str(batches)).glob("*.csv")}


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(tmp_path):
    config = TrainConfig(**QUICK, out=str(tmp_path / "whole"))
    train(config, report=silent)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "pc.csv").write_text("step,epo")
    train(dataclasses.replace(config, out=str(tmp_path / "torn"), resume=True), report=silent)
    assert_same_run(tmp_path / "torn" / "pc", tmp_path / "whole" / "pc")


def test_resume_refuses_other_settings_and_a_damaged_checkpoint(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("mlp", "--hidden", 8, *SMALL, "--steps", 5, "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run("mlp", "--hidden", 9, *SMALL, "--steps", 5, "--out", out, "--resume", "--lr", 0.3) == 2
    assert "hidden was [8] and is now [9]; lr was 0.2 and is now 0.3" in capsys.readouterr().err
    assert run("mlp", "--hidden", 8, *SMALL, "--steps", 5, "--out", out) == 2
    assert "give --resume to continue that run" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "pc.pt").write_bytes(b"damaged")
    assert run("mlp", "--hidden", 8, *SMALL, "--steps", 5, "--out", out, "--resume") == 2
    assert "pc.pt cannot be read" in capsys.readouterr().err
    assert (out / "pc.csv").read_bytes() == before["pc.csv"]
    assert run("mlp", "--hidden", 8, *SMALL, "--steps", 5, "--out", out, "--overwrite") == 0
    assert (out / "pc.csv").read_bytes() == before["pc.csv"]


def test_the_loss_that_diverges_ends_the_run_and_keeps_its_files(tmp_path, capsys):
    for learner in ("backprop", "pc"):
        out = tmp_path / learner
        options = ["mlp", "--hidden", 8, *SMALL, "--learner", learner, "--epochs", 40, "--out", out]
        assert run(*options, "--lr", 1e4) == 1
        message = capsys.readouterr().err
        assert message.startswith("pckernels train: ") and message.count("\n") == 1 and "smaller" in message
        assert len(rows(out / f"{learner}.csv")) > 1
        saved = checkpoint.load(out / f"{learner}.pt")["run"]
        assert all(bool(value.isfinite().all()) for value in saved["model"].values())


BAD = [
    (["mlp", "--data", "names"], "does not learn from the data names; choose from digits"),
    (["mlp", "--data", "mnist"], "give --data-dir, or set PCKERNELS_DATA"),
    (["rnn"], "give --data-dir, or set PCKERNELS_DATA"),
    (["lstm"], "give --data-dir, or set PCKERNELS_DATA"),
    (["mlp", "--data", "mnist", "--data-dir", "nowhere"], "nowhere does not exist"),
    (["mlp", "--epochs", "0"], "--epochs must be at least 1; got 0"),
    (["mlp", "--batch-size", "-3"], "--batch-size must be at least 1"),
    (["mlp", "--lr", "nan"], "--lr must be greater than 0 and finite"),
    (["mlp", "--lr", "0"], "--lr must be greater than 0"),
    (["mlp", "--rate", "2.5"], r"rate must lie in (0, 2)"),
    (["mlp", "--steps", "-1"], "steps must be 0 or more"),
    (["mlp", "--solver", "magic"], "solver must be one of 'closed_form'"),
    (["mlp", "--sweep", "top_down"], "--sweep is not an option of the rule fixed, but of strict"),
    (["mlp", "--rule", "error_optimization", "--solver", "sweep"], "--solver is not an option of the rule error_optimization"),
    (["mlp", "--rule", "error_optimization", "--momentum", "1"], "momentum must be"),
    (["mlp", "--rule", "incremental", "--nudge", "0.1"], "--nudge is not an option of the rule incremental, but of strict"),
    (["mlp", "--rule", "incremental", "--solver", "closed_form"], "--solver is not an option of the rule incremental, but of fixed"),
    (["mlp", "--nudge", "0.1"], "--nudge is not an option of the rule fixed, but of strict"),
    (["mlp", "--rule", "strict", "--nudge", "0"], "nudge must be finite and not 0"),
    (["mlp", "--rule", "strict", "--nudge", "left", "0.1"], "--nudge takes a number, or the word centered and a number; got left 0.1"),
    (["mlp", "--rule", "strict", "--nudge", "centered"], "--nudge takes a number, or the word centered and a number"),
    (["mlp", "--rule", "strict", "--nudge", "centered", "-1"], "beta of a centered nudge must be"),
    (["mlp", "--feedback", "learned"], "--feedback is not an option of the rule fixed, but of relaxed"),
    (["mlp", "--rule", "strict", "--no-derivative"], "--no-derivative is not an option of the rule strict, but of relaxed"),
    (["mlp", "--rule", "relaxed", "--momentum", "0.5"], "--momentum is not an option of the rule relaxed"),
    (["mlp", "--rule", "relaxed", "--over", "error_optimization", "--error-weights", "random"], "ErrorOptimization compares none"),
    (["mlp", "--precision", "-1"], "precision must be finite and greater than 0"),
    (["mlp", "--precision", "high"], 'precision must be a number, or "learned"'),
    (["mlp", "--rule", "zero", "--precision", "2"], "ZeroDivergence is a statement about precision 1"),
    (["mlp", "--learner", "backprop", "--precision", "2"], "--precision is not an option of the learner backprop"),
    (["rnn", "--rule", "relaxed", "--error-weights", "learned"], "each time step has error weights and precisions of its own"),
    (["rnn", "--rule", "strict", "--order", "nested"], "--order is not an option of the rule strict, but of fixed"),
    (["mlp", "--rule", "zero", "--steps", "3"], "--steps is not an option of the rule zero"),
    (["mlp", "--order", "nested"], "the model mlp has none; drop it"),
    (["mlp", "--learner", "backprop", "--rate", "0.1"], "--rate is not an option of the learner backprop"),
    (["mlp", "--learner", "backprop", "--backend", "reference"], "--backend is not an option of the learner backprop"),
    (["mlp", "--backend", "abacus"], "abacus"),
    (["cnn", "--hidden", "8"], "--hidden is not an option of the model cnn"),
    (["rnn", "--hidden", "8", "9"], "--hidden takes one width"),
    (["mlp", "--sequence", "8"], "--sequence is not an option of the model mlp, but of lstm"),
    (["mlp", "--sample", "8"], "--sample is not an option of the model mlp"),
    (["lstm", "--temperature", "8"], "add --sample"),
    (["mlp", "--optimizer", "adam", "--optimizer-momentum", "0.5"], "--optimizer-momentum is not an option of the optimizer adam"),
    (["mlp", "--optimizer-momentum", "1"], "below 1; got 1.0"),
    (["mlp", "--device", "abacus"], "no device 'abacus'"),
    (["mlp", "--device", "cuda:99"], "there is no cuda:99; try --device cpu"),
    (["mlp", "--resume"], "--resume needs the folder of the run: add --out"),
    (["mlp", "--train-samples", "0"], "--train-samples must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_arguments_are_sentences_and_write_nothing(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PCKERNELS_DATA", raising=False)
    out = [] if "--resume" in arguments else ["--out", tmp_path / "out"]
    assert run(*arguments, *out) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_choices_are_refused_by_the_parser(capsys):
    for arguments in (["perceptron"], ["mlp", "--data", "svhn"], ["mlp", "--rule", "magic"], ["mlp", "--epochs", "many"]):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2
    with pytest.raises(ValueError, match="no rule 'magic'; choose from fixed, strict, zero"):
        complete(TrainConfig("mlp", rule="magic"))


@needs_data
def test_the_lstm_writes_text(tmp_path, capsys):
    options = ["lstm", "--hidden", 8, "--sequence", 6, "--batch-size", 8, "--batches", 2, "--test-samples", 8, "--data-dir", REAL]
    texts = []
    for name in ("a", "b"):
        assert run(*options, "--learner", "both", "--sample", 40, "--temperature", 0.5, "--out", tmp_path / name) == 0
        texts.append((tmp_path / name / "pc.txt").read_text())
    assert texts[0] == texts[1] and len(texts[0]) == 40 and set(texts[0]) <= set(data.load("shakespeare", REAL).classes)
    assert texts[0] in capsys.readouterr().out


@needs_data
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_cnn_trains_on_real_images(name):
    config = TrainConfig("cnn", name, train_samples=32, test_samples=16, batch_size=16, batches=2)
    result = train(config, report=silent)
    assert math.isfinite(result.loss) and result.rows[-1][0] == 2


def test_plots_refuse_what_they_cannot_draw(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a metrics file"):
        plot.curves({"pc": tmp_path / "other.csv"}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="2 values for 3 numbers of steps"):
        plot.convergence(tmp_path / "a.png", [0, 1, 2], {"x": [1.0, 0.5]}, {})
    with pytest.raises(ValueError, match="at least one vertex"):
        plot.convergence(tmp_path / "a.png", [0], {}, {})
    assert os.listdir(tmp_path) == ["other.csv"]


def test_the_metrics_are_exact_in_text(tmp_path):
    result = train(TrainConfig(**QUICK, out=str(tmp_path)), report=silent)
    with open(tmp_path / "pc.csv", newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row[4] for row in result.rows]
