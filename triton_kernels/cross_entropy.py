"""The cross-entropy of an output vertex at every step, in one pass over its logits: what step_update.py is to hidden vertices.

Of each position of each sample, with z its logits and c its class,

    L = log sum_k e^(z_k - max z) - (z_c - max z),    error = factor * -dL/dz = factor * (one_hot(c) - softmax(z)).

A position with a negative class is not read: it loses nothing, and its error is 0. Losses are summed in float64 over a fixed number of
programs, whose parts are added up in their order: two runs are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pckernels.formula import PARTS

from .ahead_of_time import Build
from .functions import exponential, logarithm
from .rows import WARPS

TILE = 1024  # logits that a program handles at once: of whole positions, so of one at least
MOST_CLASSES = 8192  # of one position, in the registers of one program
THREAD = 16  # logits that a thread holds at most


@triton.jit(do_not_specialize=["rows", "parts_stride"])
def cross_entropy_rows(
    mu,
    change,
    target,
    error,
    parts,
    mu_stride,
    change_stride,
    target_stride,
    error_stride,
    parts_stride,
    rows,
    positions,
    classes,
    factor,
    CHANGES: tl.constexpr,
    OBSERVES: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """All rows, one for each position of each sample, in tiles (ROWS, PADDED). Pointers whose part is not asked for are not read."""
    total = tl.cast(0.0, tl.float64)
    k = tl.arange(0, PADDED)[None, :]
    # Places in tensors take 64 bits. Rows take the 32 of their number: divided in 64 they cost twice the registers.
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        sample, position = (row // positions).to(tl.int64), row % positions
        wanted = tl.load(target + sample * target_stride + position, mask=row < rows, other=-1.0)
        read = wanted >= 0.0
        here = (row < rows)[:, None] & (k < classes)
        at = position[:, None] * classes + k
        logit = tl.load(mu + sample[:, None] * mu_stride + at, mask=here, other=0.0)
        if CHANGES:
            logit += tl.load(change + sample[:, None] * change_stride + at, mask=here, other=0.0)
        logit = tl.where(k < classes, logit, float("-inf"))
        above = logit - tl.max(logit, 1)[:, None]
        # Not tl.exp, 2^(x log2 e) on a GPU, which loses six bits where x is -87; `exponential` is within 1.4 units of 2^-24 everywhere.
        power = exponential(above)  # of what is padded e^-87, which is nothing beside the largest logit's 1
        sum_of_all = tl.sum(power, 1)
        softmax = power / sum_of_all[:, None]
        chosen = k == wanted[:, None].to(tl.int32)
        gap = tl.where(chosen, 1.0 - softmax, -softmax)
        tl.store(error + sample[:, None] * error_stride + at, factor * tl.where(read[:, None], gap, 0.0), mask=here)
        if OBSERVES:
            above_of_class = tl.sum(tl.where(chosen, above, 0.0), 1)
            losses = tl.where(read, logarithm(sum_of_all) - above_of_class, 0.0)
            total += tl.sum(losses.to(tl.float64), 0)  # tile by tile: a total for each row would take registers
    if OBSERVES:
        tl.store(parts + tl.program_id(0) * parts_stride, tl.cast(factor, tl.float64) * total)


def cross_entropy(mu: Tensor, change: Tensor | None, target: Tensor, error: Tensor, factor: float, parts: Tensor | None = None) -> None:
    """Write the error of an output, and with `parts` its energy, on the current stream.

    Rows may lie apart: of each tensor, stride(1) is 1. P positions and C classes follow from the shapes.

    Args:
        mu: feed-forward logits, (B, P * C) in float32.
        change: what has been added to them since, (B, P * C); None: nothing.
        target: the class of each position, (B, P), as float32; negative: the position is ignored.
        error: written, (B, P * C): factor * -dL/dlogits.
        factor: what the loss weighs.
        parts: where factor * the sum of L over the batch goes, (PARTS,) float64, a place of `new_parts`; None: it is not computed.

    Raises:
        ValueError: the tensors do not fit each other, or `refusal` has a reason; the text says what does.
        TypeError: a tensor is not float32.
    """
    _check(mu, change, target, error, parts)
    positions, rows = target.shape[1], target.numel()
    classes = mu.shape[1] // positions
    if rows == 0:
        return
    other = error if change is None else change
    padded = triton.next_power_of_2(classes)
    tile = _rows_of_a_tile(padded)
    cross_entropy_rows[(min(PARTS, triton.cdiv(rows, tile)),)](
        mu,
        other,
        target,
        error,
        error if parts is None else parts,
        mu.stride(0),
        other.stride(0),
        target.stride(0),
        error.stride(0),
        1 if parts is None else parts.stride(0),
        rows,
        positions,
        classes,
        factor,
        CHANGES=change is not None,
        OBSERVES=parts is not None,
        ROWS=tile,
        PADDED=padded,
        num_warps=_warps(padded),
    )


def refusal(classes: int) -> str | None:
    """Why this kernel cannot take so many classes; None: it can."""
    if classes <= MOST_CLASSES:
        return None
    return (
        f"The logits of a position stay in the registers of one program, {MOST_CLASSES} at most; got {classes} classes. "
        f"Let PyTorch's log_softmax compute this loss."
    )


def _rows_of_a_tile(padded: int) -> int:
    return max(1, TILE // padded)


def _warps(padded: int) -> int:
    return max(WARPS, padded // (32 * THREAD))


def _check(mu: Tensor, change: Tensor | None, target: Tensor, error: Tensor, parts: Tensor | None) -> None:
    tensors = [tensor for tensor in (mu, change, target, error) if tensor is not None]
    if any(tensor.dtype is not torch.float32 for tensor in tensors):
        raise TypeError(f"mu, change, target and error must be float32; got {', '.join(str(tensor.dtype) for tensor in tensors)}.")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    logits = [tuple(tensor.shape) for tensor in tensors if tensor is not target]
    if any(len(shape) != 2 for shape in shapes) or any(shape != logits[0] for shape in logits) or not _divides(target, mu):
        raise ValueError(f"mu, change and error must be (B, P * C), and target (B, P); got {', '.join(map(str, shapes))}.")
    if any(tensor.shape[1] > 1 and tensor.stride(1) != 1 for tensor in tensors):
        raise ValueError("The elements of a sample must lie side by side: stride(1) must be 1 for mu, change, target and error.")
    if len(error) > 1 and error.stride(0) < error.shape[1]:
        raise ValueError(f"Samples of error must not overlap, for it is written; got {error.shape[1]} elements, {error.stride(0)} apart.")
    if parts is not None and (parts.shape != (PARTS,) or parts.dtype is not torch.float64):
        raise ValueError(f"parts must be one place of new_parts, ({PARTS},) in float64; got {tuple(parts.shape)} in {parts.dtype}.")
    reason = refusal(mu.shape[1] // target.shape[1])
    if reason is not None:
        raise ValueError(reason)


def _divides(target: Tensor, mu: Tensor) -> bool:
    """Whether (B, P) and (B, n) have the same B, and n is P * C with P and C at least 1."""
    return len(target) == len(mu) and target.shape[1] > 0 and mu.shape[1] > 0 and mu.shape[1] % target.shape[1] == 0


def plain_cross_entropy(
    mu: Tensor, change: Tensor | None, target: Tensor, error: Tensor, factor: float, parts: Tensor | None = None
) -> None:
    """The reference: the same in plain PyTorch, in any floating dtype; all of the loss in parts[0]."""
    logits = mu if change is None else mu + change
    logs = logits.reshape(*target.shape, mu.shape[1] // target.shape[1]).log_softmax(2)
    read = (target >= 0.0).unsqueeze(2)
    label = target.long().clamp_min(0).unsqueeze(2)
    gap = torch.zeros_like(logs).scatter_(2, label, 1.0) - logs.exp()
    error.copy_(factor * torch.where(read, gap, 0.0).flatten(1))
    if parts is not None:
        parts[0] = -factor * torch.where(read, logs.gather(2, label), 0.0).sum(dtype=torch.float64)


def builds() -> Iterator[Build]:
    """Few classes and many, at steps with a change; and without, as fixed prediction has it."""
    numbers = ("mu_stride", "change_stride", "target_stride", "error_stride", "parts_stride", "rows", "positions", "classes")
    tensors = dict.fromkeys(("mu", "change", "target", "error"), "*fp32")
    signature = {**tensors, "parts": "*fp64", **dict.fromkeys(numbers, "i32"), "factor": "fp32"}
    for padded in (2, 16, 64, 1024, MOST_CLASSES):
        for changes in (False, True):
            constants = {"CHANGES": changes, "OBSERVES": True, "ROWS": _rows_of_a_tile(padded), "PADDED": padded}
            name = f"cross_entropy {padded}{' changed' if changes else ''}"
            options = {"num_warps": _warps(padded)}
            yield Build(name, cross_entropy_rows, signature, constants, options, apart=("parts",))
