"""What is put around a module without changing what it computes: torch.compile and DistributedDataParallel."""

import sys
from typing import Any

from torch import nn

from pckernels.errors import Unsupported

ORIGINAL = "_orig_mod"  # the name that torch.compile gives to the module it wraps


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what torch.compile, or torch.compiler.disable, made of another."""
    eval_frame: Any = sys.modules.get("torch._dynamo.eval_frame")  # it takes a second to import, and who compiles has done so
    return eval_frame is not None and isinstance(module, eval_frame.OptimizedModule)


def is_distributed(module: nn.Module) -> bool:
    """Whether a module averages gradients over processes."""
    return isinstance(uncompiled(module), nn.parallel.DistributedDataParallel)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that was compiled; any other as it is. Raises Unsupported where the wrapper would do more than that module."""
    while is_compiled(module):
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unsupported("There are hooks on what torch.compile returned, which no trace sees. Register them on the module itself.")
        module = module._modules[ORIGINAL]  # type: ignore[assignment]
    return module


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that computes, inside of all wrappers."""
    inner = uncompiled(module)
    while isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = uncompiled(inner.module)
    return inner
