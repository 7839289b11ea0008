"""Packaging. Never imports torch, so that an isolated build needs setuptools alone."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
TRITON = "triton_kernels"  # installed as pckernels.triton: a top-level name would shadow another project's package

CLI = ["matplotlib>=3.8", "pillow>=10", "scikit-learn>=1.4"]
DEV = ["hypothesis>=6.100", "mypy>=1.13", "pytest>=8", "pytest-timeout>=2.3", "ruff>=0.8"]


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
    package_data={"pckernels": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.7", "numpy", "tqdm"],
    extras_require={"cli": CLI, "dev": CLI + DEV},
    entry_points={"console_scripts": ["pckernels = pckernels.cli:main"]},
)
