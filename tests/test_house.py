"""What a fresh clone promises: the commands of the README, one version, a licence, and files that speak of the project alone."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

OUTSIDE = re.compile(r"(?<![\w.~])/(?:home|root|tmp|work|opt|mnt|Users)/")
HOST = re.compile(r"https?://|index-url|find-links|trusted-host")


def project_files() -> list[Path]:
    kept = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if kept.returncode:
        pytest.skip("this is not a git checkout, so its files cannot be told from others")
    return [ROOT / line for line in kept.stdout.splitlines() if (ROOT / line).is_file()]


def test_every_make_target_of_the_readme_is_in_the_makefile() -> None:
    named = set(re.findall(r"^make (\w+)|`make (\w+)`", README, flags=re.MULTILINE))
    named = {name for pair in named for name in pair if name}
    assert {"demo", "test"} <= named
    assert named <= set(re.findall(r"^(\w+):", MAKEFILE, flags=re.MULTILINE))


def test_the_commands_of_the_readme_are_commands() -> None:
    from pckernels.cli import COMMANDS

    blocks = "".join(README.split("```")[1::2])
    assert set(re.findall(r"^pckernels (\w+)", blocks, flags=re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("page", ["README.md", "docs/clamping.md"])
def test_the_python_of_a_page_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_every_page_with_python_is_run() -> None:
    pages = {str(path.relative_to(ROOT)) for path in project_files() if path.suffix == ".md" and "```python" in path.read_text("utf-8")}
    assert pages == {"README.md", "docs/clamping.md"}


def test_links_between_pages_lead_somewhere() -> None:
    pages = [path for path in project_files() if path.suffix == ".md"]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8"))]
    local = [(page, link) for page, link in links if not link.startswith("http")]
    assert local
    assert not [f"{page.relative_to(ROOT)}: {link}" for page, link in local if not (page.parent / link).exists()]


def test_the_version_is_written_once() -> None:
    import pckernels
    from pckernels.version import __version__

    assert pckernels.__version__ == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    literal = f'"{__version__}"'
    assert [path.name for path in project_files() if path.suffix in (".py", ".toml") and literal in path.read_text()] == ["version.py"]


def test_setup_knows_the_version_and_imports_no_torch() -> None:
    code = "import runpy, sys; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py'); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    from pckernels.version import __version__

    assert done.stdout.split()[-1] == __version__


def test_the_licence_is_mit() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.startswith("MIT License")
    assert "pckernels contributors" in text


def test_ci_is_executable_and_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["Makefile", ".ci/run", "setup.py", "pyproject.toml", "constraints.txt"])
def test_the_build_names_no_host(name: str) -> None:
    assert not HOST.search((ROOT / name).read_text(encoding="utf-8"))


def test_ci_pins_what_the_extras_ask_for() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    lists = "\n".join(re.findall(r"(?:CLI|BENCH|DEV|TRITON_KERNELS|install_requires) ?= ?\[.*?\]", _setup(), flags=re.DOTALL))
    asked = set(re.findall(r"[\"']([\w-]+)(?:>=[\d.]+)?(?:;.*?)?[\"'][,\]]", lists))
    assert {"torch", "ruff", "matplotlib", "triton"} <= asked <= pinned


def test_scripts_for_a_gpu_find_what_they_import() -> None:
    """Nothing else runs them where there is no GPU."""
    scripts = sorted(path.stem for path in (ROOT / "bench").glob("gpu_*.py"))
    assert scripts
    command = [sys.executable, "-c", f"import {', '.join(scripts)}"]
    subprocess.run(command, cwd=ROOT / "bench", env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_files_name_no_path_outside_the_project() -> None:
    found = [f"{path.relative_to(ROOT)}:{n}: {line}" for path in project_files() for n, line in _lines(path) if OUTSIDE.search(line)]
    assert not [entry for entry in found if not entry.startswith("tests/test_house.py")]


def test_imports_go_one_way() -> None:
    """No module needs one that needs it, in functions either: what is below can be read without what is above."""
    below = {path: _imported(path) for path in (ROOT / "pckernels").rglob("*.py")}
    while below:
        ground = [path for path, others in below.items() if not others & below.keys()]
        assert ground, f"these import each other: {sorted(str(path.relative_to(ROOT)) for path in below)}"
        for path in ground:
            del below[path]


def _imported(path: Path) -> set[Path]:
    """The files of the package that a module imports by name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join((*parts, *([node.module] if node.module else [])))
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    files = {ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names if name.startswith("pckernels.")}
    return {file for file in files if file.exists() and file != path}


def _setup() -> str:
    return (ROOT / "setup.py").read_text(encoding="utf-8")


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        return list(enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
    except UnicodeDecodeError:
        return []
