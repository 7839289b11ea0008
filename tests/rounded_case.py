"""The reference of kernels whose products have operands of half precision: the interpreter, with operands rounded likewise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from pckernels import interpreter
from pckernels.instructions import ABSENT, Code, Instruction, Op
from pckernels.memory import Memory, Packed

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
UNIT = {"fp16": 2.0**-11, "tf32": 2.0**-11, "bf16": 2.0**-8}  # of roundoff


def execute(code: Code, memory: Memory | Packed, batch: int, factor: float = 1.0, precision: str = "fp32") -> None:
    """interpreter.execute with operands of `precision`; to TF32 it does not round."""
    if precision not in HALVES:
        return interpreter.execute(code, memory, batch, factor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "Machine", type("Rounding", (Rounding,), {"half": HALVES[precision]}))
        patch.setattr(
            interpreter, "_learn", lambda *arguments, learn=interpreter._learn: rounded_learn(learn, HALVES[precision], *arguments)
        )
        interpreter.execute(code, memory, batch, factor)


def tolerance(code: Code, batch: int, precision: str) -> float:
    """Relative error that a result may have: 4 units of roundoff times the root of the longest sum."""
    depths = [max(i.p[1:3]) for i in code.instructions if i.op in (Op.LINEAR, Op.LINEAR_T)]
    depths += [max(i.p[0], i.p[3]) // i.p[12] * i.p[4] * i.p[5] for i in code.instructions if i.op in (Op.CONV, Op.CONV_T)]
    depths += [i.p[13] * i.p[14] * batch for i in code.instructions if i.op is Op.CONV_LEARN]
    depths += [product.positions * batch for product in code.products]
    return 4 * UNIT[precision] * max(depths) ** 0.5


def rounded(value: Tensor, half: torch.dtype) -> Tensor:
    return value.to(half).to(value.dtype)


class Rounding(interpreter.Machine):
    """Products of rounded operands; biases are not rounded."""

    half: torch.dtype

    def _linear(self, i: Instruction, t: int) -> None:
        self._rounded("_linear", i, t)

    def _linear_t(self, i: Instruction, t: int) -> None:
        self._rounded("_linear_t", i, t)

    def _conv(self, i: Instruction, t: int) -> None:
        self._rounded("_conv", i, t)

    def _conv_t(self, i: Instruction, t: int) -> None:
        self._rounded("_conv_t", i, t)

    def _rounded(self, product: str, i: Instruction, t: int) -> None:
        memory, rows = self.memory, self.rows
        weights = [weight if weight.dim() == 1 else rounded(weight, self.half) for weight in memory.weights]
        self.memory = Memory(weights, memory.io, memory.gradients, memory.energies)
        self.rows = lambda start, n: rounded(rows(start, n), self.half)
        try:
            getattr(super(), product)(i, t)
        finally:
            self.memory = memory
            del self.rows

    def _conv_learn(self, i: Instruction, t: int) -> None:
        """Of the input and its change the sum is rounded."""
        shape, gradient = interpreter.ConvShape(i.p), self.memory.gradients[i.slot]
        x = rounded(self.samples(i.b, shape.input) + self.samples(i.c, shape.input), self.half)
        error = rounded(self.samples(i.a, shape.output), self.half)
        gradient.add_(i.f[0] * conv2d_weight(x, shape.weight, error, *shape.settings).reshape(gradient.shape))


def rounded_learn(learn, half: torch.dtype, code: Code, memory: Memory | Packed, batch: int) -> None:
    """The outer products of weights, then the sums of biases, which are not rounded."""
    weights = tuple(replace(product, bias=ABSENT) for product in code.products)
    biases = tuple(replace(product, weight=ABSENT) for product in code.products)
    io = [rounded(tensor, half) for tensor in memory.io]
    learn(replace(code, products=weights), Memory(memory.weights, io, memory.gradients, memory.energies), batch)
    learn(replace(code, products=biases), memory, batch)
