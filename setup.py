"""Packaging. Never imports torch: an isolated build needs setuptools, CMake and pybind11 alone."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TRITON = "triton_kernels"  # installed as pckernels.triton: a top-level name would shadow another project's package

CLI = ["matplotlib>=3.8", "pillow>=10", "scikit-learn>=1.4"]
BENCH = ["jinja2>=3.1", "matplotlib>=3.8"]
# pcx asks for jax < 0.5 and fabricpc for jax >= 0.7: pcx needs an environment of its own, which `pckernels bench --peer` names.
PEERS = ['fabricpc>=0.6; python_version >= "3.11"']
DEV = [
    "hypothesis>=6.100",
    "mypy>=1.13",
    "pybind11>=2.12",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "ruff>=0.8",
]
# PyTorch for CUDA brings Triton along; PyTorch for the CPU does not.
TRITON_KERNELS = ['triton>=3.6; platform_system == "Linux" and platform_machine == "x86_64"']


def version() -> str:
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "pckernels" / "version.py").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError("pckernels/version.py does not define __version__.")
    return found.group(1)


def layout() -> tuple[list[str], dict[str, str]]:
    packages, package_dir = find_packages(include=["pckernels", "pckernels.*"]), {}
    if (ROOT / TRITON).is_dir():
        packages.append("pckernels.triton")
        package_dir["pckernels.triton"] = TRITON
    return packages, package_dir


class CMakeBuild(build_ext):
    """The native engine, by CMake. In a fresh folder each time: a cached one remembers paths of an isolated build that is gone."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="pckernels-build-") as folder:
            if self.cmake("-S", str(ROOT), "-B", folder, *self.options()) or self.build(folder, "_native"):
                raise RuntimeError(
                    "CMake could not build the native engine of pckernels; its messages are above. It needs a C++17 compiler "
                    "(g++ or clang++), on Debian and Ubuntu `apt install g++`. CXX names another compiler."
                )
            self.install(folder, "_native", target)
            self.build_cuda(folder, target)

    def build_cuda(self, folder: str, native: Path) -> None:
        """The CUDA engine where CMake has found an nvcc. Without it, or where it fails, the rest is installed all the same."""
        target = native.with_name(native.name.replace("_native", "_cuda"))
        if not (Path(folder) / "csrc" / "cuda" / "has_cuda").exists():
            target.unlink(missing_ok=True)  # of an earlier build: it would not fit the rest
        elif self.build(folder, "_cuda"):
            target.unlink(missing_ok=True)
            print("pckernels: nvcc could not compile the CUDA engine; its messages are above. Installing without it.", file=sys.stderr)
        else:
            self.install(folder, "_cuda", target)

    def build(self, folder: str, target: str) -> int:
        jobs = str(self.parallel or min(4, os.cpu_count() or 1))
        return self.cmake("--build", folder, "--config", "Release", "--target", target, "--parallel", jobs)

    def install(self, folder: str, name: str, target: Path) -> None:
        built = [path for path in Path(folder).rglob(f"{name}*") if path.suffix in (".so", ".pyd", ".dylib")]
        fresh = target.with_suffix(".new")
        shutil.copyfile(built[0], fresh)
        os.replace(fresh, target)  # not in place, under the feet of a process that has it loaded

    def options(self) -> list[str]:
        import pybind11  # a build requirement, see pyproject.toml: not there when setup.py is only asked for its version

        settings = {
            "PCK_VERSION": version(),
            "CMAKE_BUILD_TYPE": "Release",
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
            "PCK_CUDA": os.environ.get("PCKERNELS_CUDA", "ON"),
        }
        generator = ["-G", "Ninja"] if shutil.which("ninja") and "CMAKE_GENERATOR" not in os.environ else []
        return [*generator, *(f"-D{name}={value}" for name, value in settings.items())]

    def cmake(self, *arguments: str) -> int:
        program = shutil.which("cmake")
        if program is None:
            raise RuntimeError("Building pckernels needs CMake 3.18 or newer, which was not found: `pip install cmake`.")
        return subprocess.run([program, *arguments], check=False).returncode


packages, package_dir = layout()
setup(
    name="pckernels",
    version=version(),
    description="Train any PyTorch module by predictive coding",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="pckernels contributors",
    license="MIT",
    packages=packages,
    package_dir=package_dir,
    package_data={"pckernels": ["py.typed"], "pckernels.benchmarks": ["page.html"], "pckernels.triton": ["budget.json"]},
    ext_modules=[Extension("pckernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    python_requires=">=3.10",
    install_requires=["torch>=2.7", "numpy", "tqdm"],
    extras_require={"cli": CLI, "bench": BENCH, "peers": PEERS, "triton": TRITON_KERNELS, "dev": CLI + BENCH + DEV + TRITON_KERNELS},
    entry_points={"console_scripts": ["pckernels = pckernels.cli:main"]},
)
