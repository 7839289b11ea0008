"""All T steps of inference for a chain of linear layers in one program a batch tile: node state in registers from start to end.

What is computed: section 2 of the design. Layer l predicts mu_l = f_l(W_l v_(l-1) + b_l); v_0 is the clamped input. State is a
displacement d_l = v_l - (its feed-forward value), and eps_l = d_l - dmu_l with dmu_l from the feed-forward pre-activation z_l and its
change dz_l = W_l d_(l-1), so that nothing cancels (activations.py). One Jacobi step, strict:

    drive_l = W_(l+1)^T g_(l+1) - eps_l,  velocity_l <- momentum velocity_l + drive_l,  d_l <- d_l + rate velocity_l,
    dz_l = W_l d_(l-1),  eps_l = d_l - dmu_l,  g_l = eps_l f_l'(z_l + dz_l).

Fixed prediction: eps_l <- (1 - rate) eps_l + rate W_(l+1)^T (eps_(l+1) f_(l+1)'(z_(l+1))). The first layer's product is hoisted: it runs
once, over an input of any width.

Reference: the code that compile_steps makes of the same program, executed by pckernels/interpreter.py. chain.py says what fits.

A tuple has one entry for each layer; layers are unrolled, since registers cannot be indexed by a run-time loop. Tiles are
(LANES, width), widths padded to powers of two: padded columns of weights are zero, so that padded nodes never move.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from pckernels.compiler import Compiled
from pckernels.errors import Unsupported
from pckernels.memory import Memory, Packed
from pckernels.triton_chain import WARPS, chain_of_code, held, misfit, padded_widths, plan_chain

from . import chain_launch, local_update
from .activations import SIGMOID, TANH, act, act_change, act_grad, act_grad_of_value
from .ahead_of_time import Build
from .functions import exponential, logarithm
from .products import multiply

CHUNK = 16  # columns that a run-time loop multiplies at a time


@triton.jit(do_not_specialize=["batch", "steps"])
def relax_mlp(
    x,
    target,
    weights,
    biases,
    values,
    errors,
    gradients,
    losses,
    energies,
    batch,
    steps,
    rate,
    momentum,
    INPUTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    KINDS: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    BIASED: tl.constexpr,
    SENT: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    VALUES_MOVE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    HELD: tl.constexpr,
    PRECISION: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Relax the tile of samples number program_id.

    x (B, INPUTS); target (B, width) or class indices (B,); of each layer: weights (N, K), of all but the first already
    rounded to half precision where that is wanted, biases (N,), and what is written: values (B, N) (of moving errors: predictions),
    errors (B, N), and where SENT gradients (B, N): the error at the product's output. losses (B,) of the feed-forward pass; energies
    (tiles, steps + 1, layers) in float64, zero where nothing is written.
    """
    LAST: tl.constexpr = len(WIDTHS) - 1
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    energies += tl.program_id(0).to(tl.int64) * (steps + 1) * (LAST + 1)
    z = (first_product(x, weights[0], biases[0], lane, batch, INPUTS, WIDTHS[0], PADDED[0], BIASED[0], PRECISION, LANES, CHUNK),)
    w = (weights[0],)
    for l in tl.static_range(1, LAST + 1):
        w = w + (between(weights[l], WIDTHS[l], WIDTHS[l - 1], PADDED[l], PADDED[l - 1], HELD),)
        mu = act(KINDS[l - 1], z[l - 1], F0[l - 1], F1[l - 1])
        h = forward(mu, w[l], WIDTHS[l], WIDTHS[l - 1], PADDED[l], PADDED[l - 1], HELD, PRECISION, LANES, CHUNK)
        if BIASED[l]:
            n = tl.arange(0, PADDED[l])
            h += tl.load(biases[l] + n, mask=n < WIDTHS[l], other=0.0)[None, :]
        z = z + (h,)
    mu = act(KINDS[LAST], z[LAST], F0[LAST], F1[LAST])
    wanted = load_target(target, lane, batch, WIDTHS[LAST], PADDED[LAST], CROSS_ENTROPY)
    still = blank(LANES, PADDED[LAST])
    out_error, loss = output_error(mu, still, wanted, lane, batch, WIDTHS[LAST], PADDED[LAST], CROSS_ENTROPY)
    tl.store(losses + lane, loss, mask=lane < batch)
    tl.store(energies + LAST, tl.sum(loss.to(tl.float64), 0))

    if VALUES_MOVE:
        d, eps, g, change = relax_values(
            z, w, out_error, wanted, energies, lane, batch, steps, rate, momentum,
            WIDTHS, PADDED, KINDS, F0, F1, CROSS_ENTROPY, MOMENTUM, HELD, PRECISION, LANES, CHUNK,
        )  # fmt: skip
    else:
        eps = relax_errors(z, w, out_error, energies, steps, rate, WIDTHS, PADDED, KINDS, F0, F1, HELD, PRECISION, LANES, CHUNK)

    for l in tl.static_range(0, LAST + 1):
        mu = act(KINDS[l], z[l], F0[l], F1[l])
        if VALUES_MOVE:
            if l < LAST:
                mu += d[l]
            else:
                mu += change
        store_rows(values[l], mu, lane, batch, WIDTHS[l], PADDED[l])
        store_rows(errors[l], eps[l], lane, batch, WIDTHS[l], PADDED[l])
        if SENT[l]:
            if VALUES_MOVE and l > 0:
                store_rows(gradients[l], g[l - 1], lane, batch, WIDTHS[l], PADDED[l])
            else:
                slope = act_grad(KINDS[l], z[l], F0[l], F1[l])
                store_rows(gradients[l], eps[l] * slope, lane, batch, WIDTHS[l], PADDED[l])


@triton.jit
def relax_values(
    z, w, out_error, wanted, energies, lane, batch, steps, rate, momentum,
    WIDTHS: tl.constexpr, PADDED: tl.constexpr, KINDS: tl.constexpr, F0: tl.constexpr, F1: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
    MOMENTUM: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Strict: displacements of the hidden layers, errors of all, g of all but the first, and the change of the output."""
    LAST: tl.constexpr = len(WIDTHS) - 1
    d, eps, velocity, g = (), (), (), ()
    for l in tl.static_range(0, LAST):
        d = d + (blank(LANES, PADDED[l]),)
        eps = eps + (blank(LANES, PADDED[l]),)
        if MOMENTUM:
            velocity = velocity + (blank(LANES, PADDED[l]),)
        if l > 0:
            g = g + (blank(LANES, PADDED[l]),)
    eps = eps + (out_error,)
    change = blank(LANES, PADDED[LAST])
    if LAST > 0:
        g = g + (out_error * act_grad(KINDS[LAST], z[LAST], F0[LAST], F1[LAST]),)
        for t in tl.range(1, steps + 1):
            moved, speeds = (), ()
            for l in tl.static_range(0, LAST):
                fed = backward(g[l], w[l + 1], WIDTHS[l + 1], WIDTHS[l], PADDED[l + 1], PADDED[l], HELD, PRECISION, LANES, CHUNK)
                drive = fed - eps[l]
                if MOMENTUM:
                    drive += momentum * velocity[l]
                    speeds = speeds + (drive,)
                moved = moved + (d[l] + rate * drive,)
            d = moved
            if MOMENTUM:
                velocity = speeds
            fresh, sent = (d[0],), ()
            energy(energies + t * (LAST + 1), d[0])
            for l in tl.static_range(1, LAST + 1):
                dz = forward(d[l - 1], w[l], WIDTHS[l], WIDTHS[l - 1], PADDED[l], PADDED[l - 1], HELD, PRECISION, LANES, CHUNK)
                mu = act(KINDS[l], z[l], F0[l], F1[l])
                dmu = act_change(KINDS[l], z[l], dz, mu, F0[l], F1[l])
                if l < LAST:
                    error = d[l] - dmu
                    energy(energies + t * (LAST + 1) + l, error)
                else:
                    error, loss = output_error(mu, dmu, wanted, lane, batch, WIDTHS[l], PADDED[l], CROSS_ENTROPY)
                    tl.store(energies + t * (LAST + 1) + l, tl.sum(loss.to(tl.float64), 0))
                    change = dmu
                if KINDS[l] == TANH or KINDS[l] == SIGMOID:
                    slope = act_grad_of_value(KINDS[l], mu + dmu)
                else:
                    slope = act_grad(KINDS[l], z[l] + dz, F0[l], F1[l])
                fresh = fresh + (error,)
                sent = sent + (error * slope,)
            eps, g = fresh, sent
    return d, eps, g, change


@triton.jit
def relax_errors(
    z, w, out_error, energies, steps, rate,
    WIDTHS: tl.constexpr, PADDED: tl.constexpr, KINDS: tl.constexpr, F0: tl.constexpr, F1: tl.constexpr,
    HELD: tl.constexpr, PRECISION: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Fixed prediction: the errors of all layers."""
    LAST: tl.constexpr = len(WIDTHS) - 1
    eps = ()
    for l in tl.static_range(0, LAST):
        eps = eps + (blank(LANES, PADDED[l]),)
    if LAST > 0:
        from_output = out_error * act_grad(KINDS[LAST], z[LAST], F0[LAST], F1[LAST])
        keep = 1.0 - rate
        for t in tl.range(1, steps + 1):
            fresh = ()
            for l in tl.static_range(0, LAST):
                if l + 1 < LAST:
                    sent = eps[l + 1] * act_grad(KINDS[l + 1], z[l + 1], F0[l + 1], F1[l + 1])
                else:
                    sent = from_output
                fed = backward(sent, w[l + 1], WIDTHS[l + 1], WIDTHS[l], PADDED[l + 1], PADDED[l], HELD, PRECISION, LANES, CHUNK)
                fresh = fresh + (keep * eps[l] + rate * fed,)
                energy(energies + t * (LAST + 1) + l, fresh[l])
            eps = fresh
    return eps + (out_error,)


@triton.jit
def blank(LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Zeros (LANES, WIDTH). A function, because what is taken out of a tuple is a plain int in Triton 3.6, and no part of a shape."""
    return tl.zeros((LANES, WIDTH), tl.float32)


@triton.jit
def energy(to, error):
    """1/2 the sum of squares: over a sample's nodes in float32, over the samples in float64."""
    tl.store(to, 0.5 * tl.sum(tl.sum(error * error, 1).to(tl.float64), 0))


@triton.jit
def output_error(mu, dmu, wanted, lane, batch, WIDTH: tl.constexpr, PADDED: tl.constexpr, CROSS_ENTROPY: tl.constexpr):
    """-dL/dmu (LANES, PADDED) at mu + dmu, zero where there is no sample or node, and L (LANES,). csrc/engine/loss.h."""
    n = tl.arange(0, PADDED)[None, :]
    here = (lane[:, None] < batch) & (n < WIDTH)
    if CROSS_ENTROPY:
        logit = tl.where(n < WIDTH, mu + dmu, float("-inf"))
        above = logit - tl.max(logit, 1)[:, None]
        power = tl.where(n < WIDTH, exponential(above), 0.0)
        total = tl.sum(power, 1)
        softmax = power / total[:, None]
        chosen = n == wanted[:, None].to(tl.int32)
        read = wanted >= 0.0  # a negative class is ignored
        error = tl.where(read[:, None], tl.where(chosen, 1.0 - softmax, -softmax), 0.0)
        loss = tl.where(read, logarithm(total) - tl.sum(tl.where(chosen, above, 0.0), 1), 0.0)
        error = tl.where(here, error, 0.0)
    else:
        error = tl.where(here, (wanted - mu) - dmu, 0.0)  # one after the other: a small change keeps its digits
        loss = 0.5 * tl.sum(error * error, 1)
    return error, tl.where(lane < batch, loss, 0.0)


@triton.jit
def load_target(target, lane, batch, WIDTH: tl.constexpr, PADDED: tl.constexpr, CROSS_ENTROPY: tl.constexpr):
    if CROSS_ENTROPY:
        wanted = tl.load(target + lane, mask=lane < batch, other=-1.0)
    else:
        n = tl.arange(0, PADDED)[None, :]
        wanted = tl.load(target + lane.to(tl.int64)[:, None] * WIDTH + n, mask=(lane[:, None] < batch) & (n < WIDTH), other=0.0)
    return wanted


@triton.jit
def store_rows(to, tile, lane, batch, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    n = tl.arange(0, PADDED)[None, :]
    tl.store(to + lane.to(tl.int64)[:, None] * WIDTH + n, tile, mask=(lane[:, None] < batch) & (n < WIDTH))


@triton.jit
def first_product(
    x, weight, bias, lane, batch,
    INPUTS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """x W^T + b, (LANES, PADDED), over an input of any width."""
    n = tl.arange(0, PADDED)
    total = tl.zeros((LANES, PADDED), tl.float32)
    for first in tl.range(0, INPUTS, CHUNK):
        k = first + tl.arange(0, CHUNK)
        part = tl.load(
            x + lane.to(tl.int64)[:, None] * INPUTS + k[None, :], mask=(lane[:, None] < batch) & (k[None, :] < INPUTS), other=0.0
        )
        tile = tl.load(weight + n[None, :] * INPUTS + k[:, None], mask=(n[None, :] < WIDTH) & (k[:, None] < INPUTS), other=0.0)
        total = multiply(part, tile, total, PRECISION)
    if BIASED:
        total += tl.load(bias + n, mask=n < WIDTH, other=0.0)[None, :]
    return total


@triton.jit
def between(weight, N: tl.constexpr, K: tl.constexpr, N_PADDED: tl.constexpr, K_PADDED: tl.constexpr, HELD: tl.constexpr):
    """The weight between two layers as products want it: the tile (N, K) where it is held, otherwise where it lies."""
    found = weight
    if HELD:
        n, k = tl.arange(0, N_PADDED)[:, None], tl.arange(0, K_PADDED)[None, :]
        found = tl.load(weight + n * K + k, mask=(n < N) & (k < K), other=0.0)
    return found


@triton.jit
def forward(
    d, w, N: tl.constexpr, K: tl.constexpr, N_PADDED: tl.constexpr, K_PADDED: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
    LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """d W^T: (LANES, K) -> (LANES, N)."""
    total = tl.zeros((LANES, N_PADDED), tl.float32)
    if HELD:
        total = multiply(d, tl.trans(w), total, PRECISION)
    else:
        n = tl.arange(0, N_PADDED)[None, :]
        for first in tl.range(0, K_PADDED, CHUNK):
            k = first + tl.arange(0, CHUNK)
            tile = tl.load(w + n * K + k[:, None], mask=(n < N) & (k[:, None] < K), other=0.0)
            total = multiply(columns(d, k, LANES, CHUNK), tile, total, PRECISION)
    return total


@triton.jit
def backward(
    g, w, N: tl.constexpr, K: tl.constexpr, N_PADDED: tl.constexpr, K_PADDED: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
    LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """g W: (LANES, N) -> (LANES, K)."""
    total = tl.zeros((LANES, K_PADDED), tl.float32)
    if HELD:
        total = multiply(g, w, total, PRECISION)
    else:
        k = tl.arange(0, K_PADDED)[None, :]
        for first in tl.range(0, N_PADDED, CHUNK):
            n = first + tl.arange(0, CHUNK)
            tile = tl.load(w + n[:, None] * K + k, mask=(n[:, None] < N) & (k < K), other=0.0)
            total = multiply(columns(g, n, LANES, CHUNK), tile, total, PRECISION)
    return total


@triton.jit
def columns(tile, k, LANES: tl.constexpr, CHUNK: tl.constexpr):
    """Some columns of a tile: the one way to index what lies in registers by a number of the run time."""
    return tl.gather(tile, tl.broadcast_to(k[None, :], (LANES, CHUNK)), 1)


# Chains of the table: widths, input width, lanes. The widest is as wide as plan_chain lets a chain be.
CHAINS = {"narrow": ((64, 64, 10), 784, 16), "wide": ((128, 128, 10), 784, 16), "deep": ((64, 64, 64, 64, 64, 10), 64, 16)}


def builds() -> Iterator[Build]:
    """A few chains in each precision in which they fit, strict with momentum and fixed prediction; the narrow one stands for bf16, which
    compiles as fp16 does."""
    for name, (widths, inputs, lanes) in CHAINS.items():
        for precision in ("fp32", "tf32", "fp16", "bf16") if name == "narrow" else ("fp32", "tf32", "fp16"):
            for strict in (True, False):
                if misfit(widths, lanes, precision, strict) is not None:
                    continue  # the plan refuses it
                yield _build(f"relax_mlp {name} {precision} {'strict' if strict else 'fixed'}", widths, inputs, lanes, precision, strict)


def _build(name: str, widths: tuple[int, ...], inputs: int, lanes: int, precision: str, strict: bool) -> Build:
    constants = chain_launch.constants_of_table(widths, inputs, lanes, precision, strict)
    constants |= _of_plan(padded_widths(widths, lanes), held(precision))
    signature = chain_launch.signature_of_table(len(widths), precision)
    return Build(name, relax_mlp, signature, constants, {"num_warps": WARPS}, mma=precision != "fp32")


def _of_plan(padded: tuple[int, ...], held: bool) -> dict[str, object]:
    """The constexpr arguments of this kernel alone."""
    return {"PADDED": padded, "HELD": held, "CHUNK": CHUNK}


def run(compiled: Compiled, memory: Memory | Packed, batch: int, factor: float, precision: str = "fp32", lanes: int | None = None) -> None:
    """All that code does, on the current stream: inference by relax_mlp, then the local updates.

    Args:
        compiled: the code of steps of a chain. W W^T among its weights, if it is in the Gram form, is not read.
        memory: float32 tensors, contiguous.
        batch: B, at least 1.
        factor: what gradients are multiplied by.
        precision: of the operands of products: "fp32", "tf32", "bf16" or "fp16".
        lanes: samples of a tile; None: as the plan has it.

    Raises:
        Unsupported: the code is no chain, or does not fit.
    """
    chain = chain_of_code(compiled)
    if isinstance(chain, str):
        raise Unsupported(chain)
    assert compiled.dynamics is not None
    plan = plan_chain(chain, compiled.dynamics, precision, lanes)
    if isinstance(plan, str):
        raise Unsupported(plan)
    constants = chain_launch.constants(compiled, chain, precision, plan.lanes) | _of_plan(plan.padded, plan.held)
    chain_launch.relax(relax_mlp, constants, {"num_warps": plan.warps}, compiled, chain, memory, batch)
    local_update.learn(compiled.code.products, memory.io, memory.gradients, batch, factor, precision)
