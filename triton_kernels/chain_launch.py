"""What the two kernels of a chain, relax_mlp.py and relax_mlp_pinned.py, share on the host: arguments out of the slots of code, and
those of the chains that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

import torch
import triton

from pckernels.compiler import Compiled
from pckernels.instructions import ABSENT, Activation, Loss
from pckernels.memory import Memory, Packed
from pckernels.triton_chain import Chain, loss_of

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def constants(compiled: Compiled, chain: Chain, precision: str, lanes: int) -> dict[str, object]:
    """The constexpr arguments that both kernels have."""
    dynamics, places = compiled.dynamics, {(place.kind, place.name) for place in compiled.io}
    assert dynamics is not None
    return {
        "INPUTS": chain.layers[0].inputs,
        "WIDTHS": chain.widths,
        "KINDS": tuple(int(layer.activation) for layer in chain.layers),
        "F0": tuple(layer.factors[0] for layer in chain.layers),
        "F1": tuple(layer.factors[1] for layer in chain.layers),
        "BIASED": tuple(layer.bias != ABSENT for layer in chain.layers),
        "SENT": tuple(("g", f"{layer.name}/0") in places for layer in chain.layers),
        "CROSS_ENTROPY": loss_of(compiled)[0] is Loss.CROSS_ENTROPY,
        "VALUES_MOVE": dynamics.moves == "values",
        "MOMENTUM": dynamics.momentum != 0.0,
        "PRECISION": precision,
        "LANES": lanes,
    }


def constants_of_table(widths: tuple[int, ...], inputs: int, lanes: int, precision: str, strict: bool) -> dict[str, object]:
    """The same of a chain of the table: tanh, biases, squared error; strict with momentum, or fixed prediction."""
    depth = len(widths)
    return {
        "INPUTS": inputs,
        "WIDTHS": widths,
        "KINDS": (int(Activation.TANH),) * (depth - 1) + (int(Activation.AFFINE),),
        "F0": (1.0,) * depth,
        "F1": (0.0,) * depth,
        "BIASED": (True,) * depth,
        "SENT": (True,) * depth,
        "CROSS_ENTROPY": False,
        "VALUES_MOVE": strict,
        "MOMENTUM": strict,
        "PRECISION": precision,
        "LANES": lanes,
    }


def signature_of_table(depth: int, precision: str) -> dict[str, Any]:
    """Types of the other arguments."""
    half = {"fp16": "*fp16", "bf16": "*bf16"}.get(precision, "*fp32")
    rows = ("*fp32",) * depth
    signature: dict[str, Any] = {"x": "*fp32", "target": "*fp32", "weights": ("*fp32", *(half,) * (depth - 1)), "biases": rows}
    signature |= {"values": rows, "errors": rows, "gradients": rows, "losses": "*fp32", "energies": "*fp64"}
    return signature | {"batch": "i32", "steps": "i32", "rate": "fp32", "momentum": "fp32"}


def relax(
    kernel: Any,
    constants: dict[str, object],
    options: dict[str, int],
    compiled: Compiled,
    chain: Chain,
    memory: Memory | Packed,
    batch: int,
) -> None:
    """Launch a kernel of a chain over memory, then add up the energies of tiles.

    Args:
        kernel: relax_mlp or relax_mlp_pinned.
        constants: its constexpr arguments; a program for each tile of constants["LANES"] samples.
        options: of Triton's compiler.
        compiled, chain: the code, and the chain that it relaxes.
        memory: float32 tensors, contiguous.
        batch: B, at least 1.
    """
    assert compiled.dynamics is not None
    dynamics, code, names = compiled.dynamics, compiled.code, [layer.name for layer in chain.layers]
    io = {(place.kind, place.name): tensor for place, tensor in zip(compiled.io, memory.io, strict=True)}
    tiles = triton.cdiv(batch, constants["LANES"])
    energies = torch.zeros(tiles, code.steps + 1, code.energies, dtype=torch.float64, device=memory.energies.device)
    kernel[(tiles,)](
        next(tensor for (kind, _), tensor in io.items() if kind == "input"),
        io["target", names[-1]],
        _weights(chain, memory, str(constants["PRECISION"])),
        tuple(memory.weights[layer.bias if layer.bias != ABSENT else layer.weight] for layer in chain.layers),
        tuple(io["value", name] for name in names),
        tuple(io["error", name] for name in names),
        tuple(io.get(("g", f"{name}/0"), io["error", name]) for name in names),  # not written where it has none
        io["losses", names[-1]],
        energies,
        batch,
        code.steps,
        dynamics.rate,
        dynamics.momentum,
        **constants,
        **options,
    )
    torch.sum(energies, 0, out=memory.energies)


def _weights(chain: Chain, memory: Memory | Packed, precision: str) -> tuple[torch.Tensor, ...]:
    first, *others = (memory.weights[layer.weight] for layer in chain.layers)
    half = HALVES.get(precision)
    return (first, *(weight if half is None else weight.to(half) for weight in others))
