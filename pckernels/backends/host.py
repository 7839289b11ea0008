"""The host backend: the native engine on the CPU, float32, all steps in one call."""

from __future__ import annotations

from functools import lru_cache

from pckernels import engine
from pckernels.backends import native, selection
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled
from pckernels.instructions import CONVOLUTIONS, convolution_multiply_adds
from pckernels.memory import Packed

_LANES = 16  # samples of a tile: convolutions compute all of them, whether or not there is a sample
# Against the engine's time for a lane's multiply-add: that of PyTorch's convolutions for a sample's, and all that PyTorch does beside
# them in a step. Fitted to whole calls of VGG5, of the same with 1/4 and 1/8 of the channels, and of the paper's CNN, at batches 1 to 16.
_PYTORCHS, _BESIDE = 1.9, 80e6


def availability() -> tuple[bool, str]:
    """Whether the engine was built, and for what."""
    try:
        info = engine.extension().info()
    except ImportError as error:
        return False, f"the compiled extension is missing ({error}); install pckernels with a C++17 compiler at hand"
    except ValueError as error:
        return False, f"PCKERNELS_INSTRUCTIONS asks for what is not there: {error}"
    return True, f"native engine for the CPU, float32, {info['chosen']} instructions ({info['why']})"


def refusal(call: Call) -> str | None:
    """Why the engine cannot run a call, or None."""
    other = selection.misfit(call.tensors.values(), "cpu")
    if other is not None:
        return f"it runs float32 on the CPU; this call has {other.dtype} on {other.device}"
    return selection.refusal_in_float32(call)


def reluctance(call: Call) -> str | None:
    """Why the reference would be faster, or None: few samples and large convolutions."""
    code, batch = selection.code_of(call), call.size or 0
    assert isinstance(code, Compiled), code
    work, lanes = _convolving(code), -(-batch // _LANES) * _LANES
    if _PYTORCHS * batch * work + _BESIDE >= lanes * work:
        return None
    return (
        f"its convolutions, {work / 1e6:,.0f} million multiply-adds a sample and step, compute {lanes} lanes, of which this batch "
        f"fills {batch}, and PyTorch's are faster then"
    )


@lru_cache(maxsize=256)
def _convolving(compiled: Compiled) -> int:
    """Multiply-adds of convolutions, of one sample, in the phase that has most of them: a step, or a sweep."""
    phases = ([i.p for i in phase.instructions if i.op in CONVOLUTIONS] for phase in compiled.code.phases)
    return max((sum(map(convolution_multiply_adds, parameters)) for parameters in phases), default=0)


def run(call: Call) -> Outcome:
    """One inference on the CPU, with as many threads as PyTorch uses."""
    return native.run(call, execute)


def execute(compiled: Compiled, memory: Packed, batch: int, factor: float) -> None:
    """Run code over float32 tensors on the CPU. (What torch.ops.pckernels.relax does, without the dispatcher on the way.)"""
    engine.execute(compiled, memory, batch, factor)
