"""`pckernels info`: what is installed, and which backends can run here."""

import argparse
import platform
from importlib import metadata
from typing import Any

import torch

from .backends import device_op
from .dispatch import backends
from .jsonfile import add_json_argument, write_json
from .version import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    installed, supported = versions(), supports()
    print("\n".join(f"{name:<10} {version}" for name, version in installed.items()))
    print("\nbackends")
    for name, support in supported.items():
        print(f"  {name:<10} {'available' if support['ok'] else 'not available'}: {support['reason']}")
    print(f"torch.ops.pckernels.relax on CUDA tensors: {device_op.choice().reason}")
    if args.json:
        write_json(args.json, {"versions": installed, "backends": supported})
    return 0


def versions() -> dict[str, str]:
    """Name -> version, or in words why there is none."""
    return {
        "pckernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": cuda(),
        "triton": triton(),
    }


def supports() -> dict[str, dict[str, Any]]:
    """Backend -> {"ok": whether it can run here, "reason": why or why not}."""
    return {name: {"ok": support.ok, "reason": support.reason} for name, support in backends().items()}


def cuda() -> str:
    if torch.version.cuda is None:
        return "none (this PyTorch is built without CUDA)"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda} (no device that it can use)"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda} ({', '.join(devices)})"


def triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none (not installed)"
