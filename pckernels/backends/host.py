"""The host backend: the native engine on the CPU, float32, all steps in one call."""

from __future__ import annotations

from pckernels import engine
from pckernels.backends import native, selection
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled
from pckernels.memory import Packed


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


def run(call: Call) -> Outcome:
    """One inference on the CPU, with as many threads as PyTorch uses."""
    return native.run(call, execute)


def execute(compiled: Compiled, memory: Packed, batch: int, factor: float) -> None:
    """Run code over float32 tensors on the CPU. (What torch.ops.pckernels.relax does, without the dispatcher on the way.)"""
    engine.execute(compiled, memory, batch, factor)
