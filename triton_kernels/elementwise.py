"""Everything that happens element by element: activations, arithmetic and the moves of the dynamics. Reference: interpreter.py.

n rows of the arena are one run of n * LANES numbers. One loop serves all these operations: it reads what the instruction has, in one
go, and branches in between. `out` may be an operand, since every element is read before it is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import SIGMOID, TANH, act, act_change, act_grad, act_grad_of_value
from .instruction import (
    ACCUMULATE,
    ACT,
    ACT_CHANGE,
    ACT_GRAD,
    ADD,
    ERROR,
    MOVE,
    MUL,
    MUL_CHANGE,
    MUL_GRAD,
    OUT,
    RELAX,
    A,
    B,
    C,
    D,
    N,
    P,
    factor,
)


@triton.jit
def elementwise(op, i, arena, LANES: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.load(i + N) * LANES
    out, a, b, c, d = tl.load(i + OUT), tl.load(i + A), tl.load(i + B), tl.load(i + C), tl.load(i + D)
    f0, f1, f2 = factor(i, 0), factor(i, 1), factor(i, 2)
    accumulate = tl.load(i + ACCUMULATE) != 0
    reads_out = accumulate | (op == MOVE) | (op == RELAX)
    for first in tl.range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        here = at < n
        of_a, of_b = read(arena, a, at, here, LANES, BLOCK), read(arena, b, at, here, LANES, BLOCK)
        of_c, of_d = read(arena, c, at, here, LANES, BLOCK), read(arena, d, at, here, LANES, BLOCK)
        before = read(arena, tl.where(reads_out, out, -1), at, here, LANES, BLOCK)
        value = of_a
        if op == MOVE:
            speed = of_b - f2 * of_a
            if c >= 0:
                speed = f1 * of_c + speed
                tl.store(arena + c * LANES + at, speed, mask=here)
            value = before + f0 * speed
        elif op == RELAX:
            value = (1.0 - f0) * before + f0 * of_a
        elif op == ERROR:
            value = of_a - of_b
        elif op == ADD:
            value = f0 * of_a + f1 * of_b
        elif op == MUL:
            value = of_a * of_b
        elif op == MUL_CHANGE:
            value = of_a * of_d + of_b * (of_c + of_d)
        elif op == MUL_GRAD:
            value = of_a * (of_b + of_c)
        else:
            value = activation(op, tl.load(i + P), tl.load(i + P + 1), of_a, of_b, of_c, of_d, c, d, f0, f1)
        if accumulate:
            value += before
        tl.store(arena + out * LANES + at, value, mask=here)


@triton.jit
def read(arena, row, at, here, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros where the operand is absent."""
    value = tl.full([BLOCK], 0.0, tl.float32)
    if row >= 0:
        value = tl.load(arena + row * LANES + at, mask=here, other=0.0)
    return value


@triton.jit
def activation(op, kind, by_value, of_a, of_b, of_c, of_d, c, d, f0, f1):
    """ACT of a, ACT_CHANGE of z = a by dz = b with m = c, ACT_GRAD: a times the slope at z = b moved by dz = c, with m = d."""
    value = of_a
    if op == ACT_GRAD:
        has_value = (kind == TANH) | (kind == SIGMOID)
        moved = of_b + of_c
        if by_value != 0:
            value *= act_grad_of_value(kind, moved)
        elif has_value and c < 0 and d >= 0:  # z has not moved, and its value is there
            value *= act_grad_of_value(kind, of_d)
        else:
            value *= act_grad(kind, moved, f0, f1)
    else:
        m = of_c
        if op == ACT or c < 0:
            m = act(kind, of_a, f0, f1)
        value = m
        if op == ACT_CHANGE:
            value = act_change(kind, of_a, of_b, m, f0, f1)
    return value
