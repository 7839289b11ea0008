"""Predictive coding for PyTorch: any nn.Module learns by local updates, and every claim of exactness is a test."""

from pckernels import nn, testing
from pckernels.autograd import backward
from pckernels.clamps import Free
from pckernels.dispatch import Support, backends
from pckernels.errors import InferenceDiverged, Unsupported
from pckernels.mupc import mupc
from pckernels.network import Inference, PCNetwork
from pckernels.rules import ErrorOptimization, FixedPrediction, Incremental, Relaxed, Strict, ZeroDivergence
from pckernels.version import __version__

__all__ = [
    "ErrorOptimization",
    "FixedPrediction",
    "Free",
    "Incremental",
    "Inference",
    "InferenceDiverged",
    "PCNetwork",
    "Relaxed",
    "Strict",
    "Support",
    "Unsupported",
    "ZeroDivergence",
    "__version__",
    "backends",
    "backward",
    "mupc",
    "nn",
    "testing",
]
