"""A formula over tensors in one launch: everything that happens element by element between two products of a step of inference.

pckernels/formula.py says what a formula is, and is the reference. State is float32; a tensor may also be float16 or bfloat16, and is
converted where it is loaded and stored. All loads come before all stores, element by element, so that tensors may be updated in place.

Sums are those of a fixed number of programs, added up in their order by whoever wants them: two runs are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pckernels.formula import PARTS, SUMS, Formula, Operation, Sheet, Written

from .activations import act, act_change, act_grad, act_grad_of_value
from .ahead_of_time import Build

BLOCK = 1024  # elements that a program handles at once; half of them where rows are strided, since their addresses take registers too
WARPS = 4

FILL, SCALE, ADD, MUL, ACT, CHANGE, SLOPE, SLOPE_OF_VALUE = (tl.constexpr(int(operation)) for operation in Operation)


@triton.jit(do_not_specialize=["stride0", "stride1"])
def update_rows(
    loads,
    stores,
    strides,
    factors,
    scales,
    parts0,
    parts1,
    stride0,
    stride1,
    n,
    width,
    OPERATIONS: tl.constexpr,
    KINDS: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    ENDS: tl.constexpr,
    SUMS_A: tl.constexpr,
    SUMS_B: tl.constexpr,
    LOADED: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All n elements of rows of `width`.

    loads, stores: pointers; strides: of rows, those of the loads first, where STRIDED says that they are not side by side; factors: two
    for each term; scales: one for each sum. OPERATIONS, KINDS, A, B, C: the terms; ENDS: the value of each store; SUMS_A, SUMS_B: those
    of each sum. parts: float64, one for each program, so far apart.
    """
    total0 = tl.full([BLOCK], 0.0, tl.float64)
    total1 = tl.full([BLOCK], 0.0, tl.float64)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    for first in tl.range(begin, n, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        here = at < n
        values = ()
        for k in tl.static_range(LOADED):
            values = values + (tl.load(loads[k] + place(at, width, strides[k], STRIDED[k]), mask=here, other=0.0).to(tl.float32),)
        for k in tl.static_range(len(OPERATIONS)):
            values = values + (term(OPERATIONS[k], KINDS[k], values, A[k], B[k], C[k], factors[2 * k], factors[2 * k + 1], BLOCK),)
        for k in tl.static_range(len(ENDS)):
            tl.store(stores[k] + place(at, width, strides[LOADED + k], STRIDED[LOADED + k]), values[ENDS[k]], mask=here)
        if len(SUMS_A) > 0:
            total0 += product(values[SUMS_A[0]], values[SUMS_B[0]], here)
        if len(SUMS_A) > 1:
            total1 += product(values[SUMS_A[1]], values[SUMS_B[1]], here)
    if len(SUMS_A) > 0:
        tl.store(parts0 + tl.program_id(0) * stride0, tl.cast(scales[0], tl.float64) * tl.sum(total0, 0))
    if len(SUMS_A) > 1:
        tl.store(parts1 + tl.program_id(0) * stride1, tl.cast(scales[1], tl.float64) * tl.sum(total1, 0))


@triton.jit
def place(at, width, stride, STRIDED: tl.constexpr):
    """Where the elements of rows that are `stride` apart lie."""
    found = at
    if STRIDED:
        found = at // width * stride + at % width
    return found


@triton.jit
def product(a, b, here):
    return tl.where(here, a, 0.0).to(tl.float64) * tl.where(here, b, 0.0).to(tl.float64)


@triton.jit
def term(
    OPERATION: tl.constexpr,
    KIND: tl.constexpr,
    values,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    f0,
    f1,
    BLOCK: tl.constexpr,
):
    if OPERATION == FILL:
        result = tl.full([BLOCK], 0.0, tl.float32) + f0
    elif OPERATION == SCALE:
        result = f0 * values[A]
    elif OPERATION == ADD:
        result = f0 * values[A] + f1 * values[B]
    elif OPERATION == MUL:
        result = values[A] * values[B]
    elif OPERATION == ACT:
        result = act(KIND, values[A], f0, f1)
    elif OPERATION == CHANGE:
        if C >= 0:
            result = act_change(KIND, values[A], values[B], values[C], f0, f1)
        else:
            result = act_change(KIND, values[A], values[B], values[A], f0, f1)  # whose m nobody reads
    elif OPERATION == SLOPE:
        result = act_grad(KIND, values[A], f0, f1)
    else:
        result = act_grad_of_value(KIND, values[A])
    return result


def programs(elements: int) -> int:
    """How many there are, and how many parts a sum has: by the shape alone, so that no part of an earlier launch's sum is left."""
    return min(PARTS, triton.cdiv(elements, BLOCK))


def run(written: Written[Any], loads: Sequence[Tensor], stores: Sequence[Tensor], parts: Sequence[Tensor] = ()) -> None:
    """Compute a formula over the tensors of its places, on the current stream.

    Args:
        loads, stores: (B, n) each, rows of unit stride; of float32, float16 or bfloat16. A store may be one of the loads.
        parts: for each sum, where its parts go: (PARTS,) float64. Those of programs that there are not stay as they are.
    """
    tensors = [*loads, *stores]
    elements, width = tensors[0].numel(), tensors[0].shape[-1]
    if elements == 0:
        return
    some = tensors[0]
    addresses = [*parts, *[some] * (SUMS - len(parts))]
    update_rows[(programs(elements),)](
        tuple(loads),
        tuple(stores),
        tuple(tensor.stride(0) for tensor in tensors),
        written.factors,
        written.scales,
        *addresses,
        *(address.stride(0) for address in addresses),
        elements,
        width,
        **_constants(written.formula, tuple(not tensor.is_contiguous() for tensor in tensors)),
        num_warps=WARPS,
    )


def _constants(formula: Formula, strided: tuple[bool, ...]) -> dict[str, object]:
    terms = formula.terms
    return {
        "OPERATIONS": tuple(int(term.operation) for term in terms),
        "KINDS": tuple(int(term.kind) for term in terms),
        "A": tuple(term.a for term in terms),
        "B": tuple(term.b for term in terms),
        "C": tuple(term.c for term in terms),
        "ENDS": formula.stores,
        "SUMS_A": tuple(a for a, _ in formula.sums),
        "SUMS_B": tuple(b for _, b in formula.sums),
        "LOADED": formula.loads,
        "STRIDED": strided,
        "BLOCK": BLOCK // 2 if any(strided) else BLOCK,
    }


def build(name: str, formula: Formula, half: str = "fp32", halves: Sequence[int] = (), strided: bool = False) -> Build:
    """A launch of a formula, ahead of time. halves: which of its tensors, loads first, are of the type `half`."""
    count = formula.loads + len(formula.stores)
    pointers = tuple(f"*{half if k in halves else 'fp32'}" for k in range(count))
    signature = {
        "loads": pointers[: formula.loads],
        "stores": pointers[formula.loads :],
        "strides": ("i32",) * count,
        "factors": ("fp32",) * (2 * len(formula.terms)),
        "scales": ("fp32",) * len(formula.sums),
        **dict.fromkeys(("parts0", "parts1"), "*fp64"),
        **dict.fromkeys(("stride0", "stride1", "n", "width"), "i32"),
    }
    constants, whole = _constants(formula, (strided,) * count), () if strided else ("n", "width")
    return Build(name, update_rows, signature, constants, {"num_warps": WARPS}, apart=("parts0", "parts1"), multiples=whole)


def builds() -> Iterator[Build]:
    """The cell of an LSTM, c = f c' + i g, which reads and writes as much as any: it is observed, and sends to its four parents."""
    sheet: Sheet[str] = Sheet()
    values = {name: (sheet.load(name), sheet.load(f"d{name}")) for name in ("f", "c", "i", "g")}
    changes = [sheet.add(sheet.mul(values[a][0], values[b][1]), sheet.mul(values[a][1], sheet.add(*values[b]))) for a, b in ("fc", "ig")]
    error = sheet.add(sheet.load("d"), sheet.add(*changes), 1.0, -1.0)
    sheet.put("error", error)
    sheet.sum(error, error, 0.5)
    for parent, other in ("fc", "cf", "ig", "gi"):
        sheet.put(f"to {parent}", sheet.mul(error, sheet.add(*values[other])))
    formula = sheet.finished(["error", *(f"to {parent}" for parent in values)]).formula
    yield build("rows cell", formula)
    yield build("rows cell strided", formula, strided=True)
