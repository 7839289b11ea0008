"""The command line: exit codes, sentences in place of tracebacks, and JSON of what was printed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pckernels as pck
from pckernels.cli import main


def exit_code(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


def test_info_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert pck.__version__ in printed
    for name, support in pck.backends().items():
        assert f"{name:<10} {'available' if support.ok else 'not available'}: {support.reason}" in printed


def test_info_writes_what_it_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "info.json"
    assert main(["info", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    printed = capsys.readouterr().out
    assert found["backends"]["reference"]["ok"] is True
    for version in found["versions"].values():
        assert version in printed


def test_info_works_without_matplotlib_and_without_training() -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'sklearn', 'PIL'])); from pckernels.cli import main; "
    code = block + "code = main(['info']); assert 'pckernels.train' not in sys.modules; sys.exit(code)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "pckernels", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"pckernels {pck.__version__}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required"),
        (["fly"], "invalid choice"),
        (["verify", "--rate", "fast"], "invalid float"),
        (["verify", "mlp", "--rate", "2"], "(0, 2)"),
        (["verify", "mlp", "--rate", "nan"], "finite"),
        (["verify", "mlp", "--steps", "-1"], "0 or more"),
        (["verify", "perceptron"], "choose from mlp"),
        (["verify", "no_such_module:build"], "no_such_module"),
        (["verify", "math:build"], "build"),
        (["verify", "math:"], "math:"),
        (["verify", ":build"], ":build"),
        (["verify", "os:getcwd"], "must return (module, x, target)"),
        (["verify", "mlp", "--dtype", "int8"], "invalid choice"),
        (["train", "tree"], "tree"),
    ],
)
def test_bad_arguments_are_a_sentence_and_exit_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for flag in ("--json", "--plot"):
        assert exit_code("verify", "mlp", flag, str(tmp_path / "file" / "x")) == 2
        assert exit_code("verify", "mlp", flag, str(tmp_path)) == 2
    assert capsys.readouterr().out == ""


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: object) -> int:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")

    monkeypatch.setattr("pckernels.info.run", run)
    assert main(["info"]) == 2
    assert "pip install 'pckernels[cli]'" in capsys.readouterr().err


def test_divergence_is_a_failure_not_a_mistake_of_the_caller(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: object) -> int:
        raise pck.InferenceDiverged("It grew; choose a smaller rate.")

    monkeypatch.setattr("pckernels.info.run", run)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "pckernels info: It grew; choose a smaller rate.\n"


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: object) -> int:
        raise ModuleNotFoundError("No module named 'pckernels.absent'", name="pckernels.absent")

    monkeypatch.setattr("pckernels.info.run", run)
    with pytest.raises(ModuleNotFoundError):
        main(["info"])
