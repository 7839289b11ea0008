"""All T steps of inference for a chain of linear layers of any width in one program a batch tile: node state pinned in shared memory.

What is computed is what relax_mlp.py computes; its head has the equations. There a layer is one tile in registers, which limits the widths;
here it is a row of blocks of COLUMNS nodes in shared memory, which run-time loops index, so that code does not grow with the widths. The
weights stream from L1 and L2 in every step, each part read while the one before it is multiplied. In Gluon, the language below Triton's,
because plain Triton cannot index what it holds on the chip.

Reference: the code that compile_steps makes of the same program, executed by pckernels/interpreter.py. Gluon has no interpreter:
tests/gluon_emulated.py executes this source. pckernels/triton_pinned.py says what fits.

Arrays in shared memory, float32, in blocks of (LANES, COLUMNS), layer after layer, counted from 0; STARTS has each layer's first block:

    d         hidden layers: displacements, or errors where errors move; before the first step the values that the next product reads
    z         all but layer 0: pre-activations, or slopes f'(z) where errors move
    g         all but layer 0: errors times slopes, which the feedback reads
    eps       hidden layers but layer 0, where values move: errors; those of layer 0 are its displacements
    velocity  hidden layers, where there is momentum
    out       the output layer: target - f(z), its error before it changes; of the cross-entropy logits, then errors

Pre-activations of layer 0 are read at the end alone, and lie in values[0] until then. A step has two barriers, one after the products of
each direction, whatever the depth; everything else that a thread reads from these arrays it has written itself. Weights and targets
beyond the last row or column read as zero, so that padded nodes never move.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from pckernels.compiler import Compiled
from pckernels.errors import Unsupported
from pckernels.memory import Memory, Packed
from pckernels.triton_chain import chain_of_code
from pckernels.triton_pinned import CHUNK, WARP_COLUMNS, Plan, arrays, moves, plan_of_code, plan_pinned

from . import chain_launch, local_update
from .activations import SIGMOID, TANH, act, act_change, act_grad, act_grad_of_value
from .ahead_of_time import SHARED_BYTES, Build
from .functions import exponential, logarithm


@gluon.jit(do_not_specialize=["batch", "steps"])
def relax_mlp_pinned(
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
    INPUTS: gl.constexpr,
    WIDTHS: gl.constexpr,
    STARTS: gl.constexpr,
    KINDS: gl.constexpr,
    F0: gl.constexpr,
    F1: gl.constexpr,
    BIASED: gl.constexpr,
    SENT: gl.constexpr,
    CROSS_ENTROPY: gl.constexpr,
    VALUES_MOVE: gl.constexpr,
    MOMENTUM: gl.constexpr,
    PRECISION: gl.constexpr,
    LANES: gl.constexpr,
    COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr,
    HIDDEN: gl.constexpr,
    ABOVE: gl.constexpr,
    BETWEEN: gl.constexpr,
    OUTPUT: gl.constexpr,
    TILE: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    SHARED: gl.constexpr,
):
    """Relax the tile of samples number program_id. Arguments as of relax_mlp; those that are new:

    STARTS: of each layer its first block, and one more: how many blocks there are. HIDDEN, ABOVE, BETWEEN, OUTPUT: how many blocks the
    arrays have: of hidden layers, all layers but the first, hidden layers but the first, the output; at least 1. CHUNK: columns that are
    multiplied at a time. TILE, LEFT, RIGHT: layouts of a block in registers, and of a product's operands. SHARED: of a block's memory.
    """
    LAST: gl.constexpr = len(WIDTHS) - 1
    lane = gl.program_id(0) * LANES + gl.arange(0, LANES, gl.SliceLayout(1, TILE))
    energies += gl.program_id(0).to(gl.int64) * (steps + 1) * (LAST + 1)
    d = gl.allocate_shared_memory(gl.float32, [HIDDEN, LANES, COLUMNS], SHARED)
    z = gl.allocate_shared_memory(gl.float32, [ABOVE, LANES, COLUMNS], SHARED)
    g = gl.allocate_shared_memory(gl.float32, [ABOVE, LANES, COLUMNS], SHARED)
    out = gl.allocate_shared_memory(gl.float32, [OUTPUT, LANES, COLUMNS], SHARED)
    eps, velocity = d, d
    if VALUES_MOVE:
        eps = gl.allocate_shared_memory(gl.float32, [BETWEEN, LANES, COLUMNS], SHARED)
    if MOMENTUM:
        velocity = gl.allocate_shared_memory(gl.float32, [HIDDEN, LANES, COLUMNS], SHARED)

    feed_forward(
        x, target, weights, biases, values, d, z, out, lane, batch,
        INPUTS, WIDTHS, STARTS, KINDS, F0, F1, BIASED, CROSS_ENTROPY, PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT,
    )  # fmt: skip
    clear(d, HIDDEN, LANES, COLUMNS, TILE)
    if VALUES_MOVE:
        relax_values(
            target, weights, losses, energies, d, z, g, out, eps, velocity, lane, batch, steps, rate, momentum,
            WIDTHS, STARTS, KINDS, F0, F1, CROSS_ENTROPY, MOMENTUM, PRECISION, LANES, COLUMNS, CHUNK, HIDDEN, BETWEEN, TILE, LEFT, RIGHT,
        )  # fmt: skip
        store_output(
            weights, values, errors, gradients, d, z, g, out, lane, batch,
            WIDTHS, STARTS, KINDS, F0, F1, SENT, CROSS_ENTROPY, PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT,
        )  # fmt: skip
    else:
        tl.debug_barrier()
        observe_output(
            target, weights, losses, energies, d, z, g, out, lane, batch, 0,
            WIDTHS, STARTS, KINDS, F0, F1, CROSS_ENTROPY, PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT,
        )  # fmt: skip
        store_output(
            weights, values, errors, gradients, d, z, g, out, lane, batch,
            WIDTHS, STARTS, KINDS, F0, F1, SENT, CROSS_ENTROPY, PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT,
        )  # fmt: skip
        relax_errors(
            weights, values, energies, d, z, g, lane, batch, steps, rate,
            WIDTHS, STARTS, KINDS, F0, F1, PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT,
        )  # fmt: skip
    for l in gl.static_range(0, LAST):
        store_hidden(
            values[l], errors[l], gradients[l], d, z, g, eps, lane, batch, l,
            WIDTHS, STARTS, KINDS[l], F0[l], F1[l], SENT[l], VALUES_MOVE, COLUMNS, TILE,
        )  # fmt: skip


@gluon.jit
def feed_forward(
    x, target, weights, biases, values, d, z, out, lane, batch,
    INPUTS: gl.constexpr, WIDTHS: gl.constexpr, STARTS: gl.constexpr, KINDS: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr,
    BIASED: gl.constexpr, CROSS_ENTROPY: gl.constexpr, PRECISION: gl.constexpr, LANES: gl.constexpr, COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr, TILE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """z of all layers, and of the output what its error starts from."""
    LAST: gl.constexpr = len(WIDTHS) - 1
    for l in gl.static_range(0, LAST + 1):
        for j in range(0, STARTS[l + 1] - STARTS[l]):
            if l == 0:
                h = first_product(x, weights[0], j, lane, batch, INPUTS, WIDTHS[0], PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT)
            else:
                h = forward(d, STARTS[l - 1], weights[l], j, WIDTHS[l], WIDTHS[l - 1], PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT)
            n = j * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE))
            if BIASED[l]:
                h += gl.load(biases[l] + n, mask=n < WIDTHS[l], other=0.0)[None, :]
            if l < LAST:
                d.index(STARTS[l] + j).store(act(KINDS[l], h, F0[l], F1[l]))
            elif not CROSS_ENTROPY:
                wanted = load_rows(target, lane, batch, j, WIDTHS[l], COLUMNS, TILE)
                out.index(j).store(wanted - act(KINDS[l], h, F0[l], F1[l]))
            if l == 0 and LAST > 0:
                store_rows(values[0], h, lane, batch, j, WIDTHS[0], COLUMNS, TILE)
            else:
                z.index(place(l, STARTS) + j).store(h)
        tl.debug_barrier()


@gluon.jit
def relax_values(
    target, weights, losses, energies, d, z, g, out, eps, velocity, lane, batch, steps, rate, momentum,
    WIDTHS: gl.constexpr, STARTS: gl.constexpr, KINDS: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, CROSS_ENTROPY: gl.constexpr,
    MOMENTUM: gl.constexpr, PRECISION: gl.constexpr, LANES: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr,
    HIDDEN: gl.constexpr, BETWEEN: gl.constexpr, TILE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Strict. Round 0 observes alone: nothing has moved yet, so that hidden errors are 0 and the loss is that of the feed-forward pass."""
    LAST: gl.constexpr = len(WIDTHS) - 1
    clear(eps, BETWEEN, LANES, COLUMNS, TILE)
    if MOMENTUM:
        clear(velocity, HIDDEN, LANES, COLUMNS, TILE)
    tl.debug_barrier()
    for t in range(0, steps + 1 if LAST > 0 else 1):
        of_step = energies + t * (LAST + 1)
        if t > 0:
            for l in gl.static_range(0, LAST):
                move(
                    of_step, d, g, eps, velocity, weights[l + 1], rate, momentum, l,
                    WIDTHS, STARTS, MOMENTUM, PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT,
                )  # fmt: skip
            tl.debug_barrier()
        for l in gl.static_range(1, LAST):
            observe(
                of_step, d, z, g, eps, weights[l], l,
                WIDTHS, STARTS, KINDS[l], F0[l], F1[l], PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT,
            )  # fmt: skip
        observe_output(
            target, weights, losses, of_step, d, z, g, out, lane, batch, t,
            WIDTHS, STARTS, KINDS, F0, F1, CROSS_ENTROPY, PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT,
        )  # fmt: skip
        tl.debug_barrier()


@gluon.jit
def move(
    energies, d, g, eps, velocity, weight, rate, momentum, l: gl.constexpr,
    WIDTHS: gl.constexpr, STARTS: gl.constexpr, MOMENTUM: gl.constexpr, PRECISION: gl.constexpr, LANES: gl.constexpr,
    COLUMNS: gl.constexpr, CHUNK: gl.constexpr, TILE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """d of hidden layer l, one step on; of layer 0 it is the error too."""
    squares = gl.zeros([LANES, COLUMNS], gl.float32, TILE)
    for j in range(0, STARTS[l + 1] - STARTS[l]):
        here = d.index(STARTS[l] + j)
        old = here.load(TILE)
        drive = backward(g, place(l + 1, STARTS), weight, j, WIDTHS[l + 1], WIDTHS[l], PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT)
        if l == 0:
            drive -= old
        else:
            drive -= eps.index(place(l, STARTS) + j).load(TILE)
        if MOMENTUM:
            speed = velocity.index(STARTS[l] + j)
            drive += momentum * speed.load(TILE)
            speed.store(drive)
        new = old + rate * drive
        here.store(new)
        squares += new * new
    if l == 0:
        gl.store(energies, half_sum(squares))


@gluon.jit
def observe(
    energies, d, z, g, eps, weight, l: gl.constexpr,
    WIDTHS: gl.constexpr, STARTS: gl.constexpr, KIND: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, PRECISION: gl.constexpr,
    LANES: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr, TILE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """eps and g of hidden layer l > 0, from its own d and that of the layer before it."""
    squares = gl.zeros([LANES, COLUMNS], gl.float32, TILE)
    for j in range(0, STARTS[l + 1] - STARTS[l]):
        dz = forward(d, STARTS[l - 1], weight, j, WIDTHS[l], WIDTHS[l - 1], PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT)
        at = place(l, STARTS) + j
        before = z.index(at).load(TILE)
        mu = act(KIND, before, F0, F1)
        dmu = act_change(KIND, before, dz, mu, F0, F1)
        error = d.index(STARTS[l] + j).load(TILE) - dmu
        eps.index(at).store(error)
        g.index(at).store(error * slope(KIND, before, dz, mu, dmu, F0, F1))
        squares += error * error
    gl.store(energies + l, half_sum(squares))


@gluon.jit
def observe_output(
    target, weights, losses, energies, d, z, g, out, lane, batch, t,
    WIDTHS: gl.constexpr, STARTS: gl.constexpr, KINDS: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, CROSS_ENTROPY: gl.constexpr,
    PRECISION: gl.constexpr, LANES: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr, TILE: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
):  # fmt: skip
    """g of the output, and the loss: its energy, and at t = 0 that of the feed-forward pass."""
    LAST: gl.constexpr = len(WIDTHS) - 1
    top = gl.full([LANES, COLUMNS], float("-inf"), gl.float32, TILE)
    squares = gl.zeros([LANES, COLUMNS], gl.float32, TILE)
    for j in range(0, STARTS[LAST + 1] - STARTS[LAST]):
        at = place(LAST, STARTS) + j
        before = z.index(at).load(TILE)
        mu = act(KINDS[LAST], before, F0[LAST], F1[LAST])
        dz = output_change(d, weights, j, WIDTHS, STARTS, PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT)
        dmu = act_change(KINDS[LAST], before, dz, mu, F0[LAST], F1[LAST])
        by = slope(KINDS[LAST], before, dz, mu, dmu, F0[LAST], F1[LAST])
        n = j * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE))
        if CROSS_ENTROPY:
            logit = gl.where((n < WIDTHS[LAST])[None, :], mu + dmu, float("-inf"))
            out.index(j).store(logit)
            g.index(at).store(by)
            top = gl.where(logit <= top, top, logit)
        else:
            here = (lane[:, None] < batch) & (n[None, :] < WIDTHS[LAST])
            error = gl.where(here, out.index(j).load(TILE) - dmu, 0.0)
            g.index(at).store(error * by)
            squares += error * error
    if CROSS_ENTROPY:
        loss = cross_entropy(target, g, out, gl.max(top, 1), lane, batch, STARTS, LAST, LANES, COLUMNS, TILE)
    else:
        loss = 0.5 * gl.sum(squares, 1)
    loss = gl.where(lane < batch, loss, 0.0)
    gl.store(losses + lane, loss, mask=(lane < batch) & (t == 0))
    gl.store(energies + LAST, gl.sum(loss.to(gl.float64), 0))


@gluon.jit
def cross_entropy(
    target, g, out, top, lane, batch,
    STARTS: gl.constexpr, LAST: gl.constexpr, LANES: gl.constexpr, COLUMNS: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """The loss of each sample. out: logits, then errors; g: slopes, then errors times slopes. csrc/engine/loss.h."""
    wanted = gl.load(target + lane, mask=lane < batch, other=-1.0)
    read = wanted >= 0.0  # a negative class is ignored
    total = gl.zeros([LANES, COLUMNS], gl.float32, TILE)
    of_class = gl.zeros([LANES, COLUMNS], gl.float32, TILE)
    for j in range(0, STARTS[LAST + 1] - STARTS[LAST]):
        above = out.index(j).load(TILE) - top[:, None]
        n = j * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE))
        total += gl.where(above == float("-inf"), 0.0, exponential(above))  # beyond the last class
        of_class = gl.where(n[None, :] == wanted[:, None].to(gl.int32), above, of_class)
    sum_of_all = gl.sum(total, 1)
    for j in range(0, STARTS[LAST + 1] - STARTS[LAST]):
        above = out.index(j).load(TILE) - top[:, None]
        softmax = gl.where(above == float("-inf"), 0.0, exponential(above)) / sum_of_all[:, None]
        n = j * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE))
        chosen = n[None, :] == wanted[:, None].to(gl.int32)
        error = gl.where((read & (lane < batch))[:, None], gl.where(chosen, 1.0 - softmax, -softmax), 0.0)
        here = g.index(place(LAST, STARTS) + j)
        here.store(error * here.load(TILE))
        out.index(j).store(error)
    return gl.where(read, logarithm(sum_of_all) - gl.sum(of_class, 1), 0.0)


@gluon.jit
def relax_errors(
    weights, values, energies, d, z, g, lane, batch, steps, rate,
    WIDTHS: gl.constexpr, STARTS: gl.constexpr, KINDS: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, PRECISION: gl.constexpr,
    LANES: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr, TILE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Fixed prediction. Values are those of the feed-forward pass, and z holds slopes from here on."""
    LAST: gl.constexpr = len(WIDTHS) - 1
    for l in gl.static_range(1, LAST):
        for j in range(0, STARTS[l + 1] - STARTS[l]):
            at = place(l, STARTS) + j
            before = z.index(at).load(TILE)
            store_rows(values[l], act(KINDS[l], before, F0[l], F1[l]), lane, batch, j, WIDTHS[l], COLUMNS, TILE)
            z.index(at).store(act_grad(KINDS[l], before, F0[l], F1[l]))
            g.index(at).store(gl.zeros([LANES, COLUMNS], gl.float32, TILE))
    tl.debug_barrier()
    keep = 1.0 - rate
    for t in range(1, steps + 1 if LAST > 0 else 1):
        for l in gl.static_range(0, LAST):
            squares = gl.zeros([LANES, COLUMNS], gl.float32, TILE)
            for j in range(0, STARTS[l + 1] - STARTS[l]):
                fed = backward(
                    g, place(l + 1, STARTS), weights[l + 1], j,
                    WIDTHS[l + 1], WIDTHS[l], PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT,
                )  # fmt: skip
                here = d.index(STARTS[l] + j)
                error = keep * here.load(TILE) + rate * fed
                here.store(error)
                squares += error * error
            gl.store(energies + t * (LAST + 1) + l, half_sum(squares))
        tl.debug_barrier()
        for l in gl.static_range(1, LAST):
            for j in range(0, STARTS[l + 1] - STARTS[l]):
                at = place(l, STARTS) + j
                g.index(at).store(d.index(STARTS[l] + j).load(TILE) * z.index(at).load(TILE))
        tl.debug_barrier()


@gluon.jit
def store_output(
    weights, values, errors, gradients, d, z, g, out, lane, batch,
    WIDTHS: gl.constexpr, STARTS: gl.constexpr, KINDS: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, SENT: gl.constexpr,
    CROSS_ENTROPY: gl.constexpr, PRECISION: gl.constexpr, LANES: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr,
    TILE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """The output's value and error: its change is computed once more, since nothing else needs it kept."""
    LAST: gl.constexpr = len(WIDTHS) - 1
    for j in range(0, STARTS[LAST + 1] - STARTS[LAST]):
        at = place(LAST, STARTS) + j
        before = z.index(at).load(TILE)
        mu = act(KINDS[LAST], before, F0[LAST], F1[LAST])
        dz = output_change(d, weights, j, WIDTHS, STARTS, PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT)
        dmu = act_change(KINDS[LAST], before, dz, mu, F0[LAST], F1[LAST])
        error = out.index(j).load(TILE)
        if not CROSS_ENTROPY:
            error -= dmu
        store_rows(values[LAST], mu + dmu, lane, batch, j, WIDTHS[LAST], COLUMNS, TILE)
        store_rows(errors[LAST], error, lane, batch, j, WIDTHS[LAST], COLUMNS, TILE)
        if SENT[LAST]:
            store_rows(gradients[LAST], g.index(at).load(TILE), lane, batch, j, WIDTHS[LAST], COLUMNS, TILE)


@gluon.jit
def store_hidden(
    value, errors, gradient, d, z, g, eps, lane, batch, l: gl.constexpr,
    WIDTHS: gl.constexpr, STARTS: gl.constexpr, KIND: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, SENT: gl.constexpr,
    VALUES_MOVE: gl.constexpr, COLUMNS: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Value, error and gradient of hidden layer l; where errors move, values above layer 0 are stored already."""
    for j in range(0, STARTS[l + 1] - STARTS[l]):
        moved = d.index(STARTS[l] + j).load(TILE)
        if l == 0:
            before = load_rows(value, lane, batch, j, WIDTHS[0], COLUMNS, TILE)
            mu = act(KIND, before, F0, F1)
            if VALUES_MOVE:
                mu += moved
            store_rows(value, mu, lane, batch, j, WIDTHS[0], COLUMNS, TILE)
            error, sent = moved, moved * act_grad(KIND, before, F0, F1)
        else:
            at = place(l, STARTS) + j
            error, sent = moved, g.index(at).load(TILE)
            if VALUES_MOVE:
                mu = act(KIND, z.index(at).load(TILE), F0, F1) + moved
                store_rows(value, mu, lane, batch, j, WIDTHS[l], COLUMNS, TILE)
                error = eps.index(at).load(TILE)
        store_rows(errors, error, lane, batch, j, WIDTHS[l], COLUMNS, TILE)
        if SENT:
            store_rows(gradient, sent, lane, batch, j, WIDTHS[l], COLUMNS, TILE)


@gluon.constexpr_function
def place(l, STARTS):
    """The first block of layer l in an array that leaves out layer 0; of an output alone, which is layer 0, the first."""
    return STARTS[l] - STARTS[1] if l > 0 else 0


@gluon.jit
def clear(array, COUNT: gl.constexpr, LANES: gl.constexpr, COLUMNS: gl.constexpr, TILE: gl.constexpr):
    for j in range(0, COUNT):
        array.index(j).store(gl.zeros([LANES, COLUMNS], gl.float32, TILE))


@gluon.jit
def half_sum(squares):
    """1/2 the sum: over a sample's nodes in float32, over the samples in float64."""
    return 0.5 * gl.sum(gl.sum(squares, 1).to(gl.float64), 0)


@gluon.jit
def slope(KIND: gl.constexpr, z, dz, mu, dmu, F0: gl.constexpr, F1: gl.constexpr):
    """f'(z + dz), from the value where that is cheaper."""
    if KIND == TANH or KIND == SIGMOID:
        by = act_grad_of_value(KIND, mu + dmu)
    else:
        by = act_grad(KIND, z + dz, F0, F1)
    return by


@gluon.jit
def load_rows(rows, lane, batch, j, WIDTH: gl.constexpr, COLUMNS: gl.constexpr, TILE: gl.constexpr):
    n = j * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE))
    return gl.load(rows + lane.to(gl.int64)[:, None] * WIDTH + n[None, :], mask=(lane[:, None] < batch) & (n[None, :] < WIDTH), other=0.0)


@gluon.jit
def store_rows(rows, tile, lane, batch, j, WIDTH: gl.constexpr, COLUMNS: gl.constexpr, TILE: gl.constexpr):
    n = j * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE))
    gl.store(rows + lane.to(gl.int64)[:, None] * WIDTH + n[None, :], tile, mask=(lane[:, None] < batch) & (n[None, :] < WIDTH))


@gluon.jit
def output_change(
    d, weights, j, WIDTHS: gl.constexpr, STARTS: gl.constexpr, PRECISION: gl.constexpr, LANES: gl.constexpr, COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr, TILE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """dz of block j of the output; of an output alone nothing moves."""
    LAST: gl.constexpr = len(WIDTHS) - 1
    if LAST > 0:
        dz = forward(
            d, STARTS[LAST - 1], weights[LAST], j, WIDTHS[LAST], WIDTHS[LAST - 1], PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT
        )
    else:
        dz = gl.zeros([LANES, COLUMNS], gl.float32, TILE)
    return dz


@gluon.jit
def first_product(
    x, weight, j, lane, batch, INPUTS: gl.constexpr, WIDTH: gl.constexpr, PRECISION: gl.constexpr, LANES: gl.constexpr,
    COLUMNS: gl.constexpr, CHUNK: gl.constexpr, TILE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Block j of x W^T, over an input of any width."""
    row = gl.convert_layout(lane, gl.SliceLayout(1, LEFT))
    total = gl.zeros([LANES, COLUMNS], gl.float32, TILE)
    for first in range(0, INPUTS, CHUNK):
        k = first + gl.arange(0, CHUNK, gl.SliceLayout(0, LEFT))
        part = gl.load(x + row.to(gl.int64)[:, None] * INPUTS + k[None, :], mask=(row[:, None] < batch) & (k[None, :] < INPUTS), other=0.0)
        total = multiply(part, weight_part(weight, first, j, INPUTS, WIDTH, 1, INPUTS, COLUMNS, CHUNK, RIGHT), total, PRECISION)
    return total


@gluon.jit
def forward(
    d, start, weight, j, N: gl.constexpr, K: gl.constexpr, PRECISION: gl.constexpr, LANES: gl.constexpr, COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr, TILE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Block j of d W^T, W (N, K), of the K nodes in blocks start.. of d."""
    return product(d, start, weight, j, K, N, 1, K, PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT)


@gluon.jit
def backward(
    g, start, weight, j, N: gl.constexpr, K: gl.constexpr, PRECISION: gl.constexpr, LANES: gl.constexpr, COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr, TILE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Block j of g W, W (N, K), of the N nodes in blocks start.. of g."""
    return product(g, start, weight, j, N, K, K, 1, PRECISION, LANES, COLUMNS, CHUNK, TILE, LEFT, RIGHT)


@gluon.jit
def product(
    source, start, weight, j, DEPTH: gl.constexpr, WIDTH: gl.constexpr, DEPTH_STEP: gl.constexpr, WIDTH_STEP: gl.constexpr,
    PRECISION: gl.constexpr, LANES: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr, TILE: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
):  # fmt: skip
    """Block j of the DEPTH nodes in blocks start.. of source times a weight, whose rows and columns are so far apart."""
    total = gl.zeros([LANES, COLUMNS], gl.float32, TILE)
    part = weight_part(weight, 0, j, DEPTH, WIDTH, DEPTH_STEP, WIDTH_STEP, COLUMNS, CHUNK, RIGHT)
    for first in range(0, DEPTH, COLUMNS):
        nodes = source.index(start + first // COLUMNS)
        for s in gl.static_range(COLUMNS // CHUNK):
            ahead = weight_part(weight, first + (s + 1) * CHUNK, j, DEPTH, WIDTH, DEPTH_STEP, WIDTH_STEP, COLUMNS, CHUNK, RIGHT)
            total = multiply(nodes.slice(s * CHUNK, CHUNK, dim=1).load(LEFT), part, total, PRECISION)
            part = ahead
    return total


@gluon.jit
def weight_part(
    weight, first, j, DEPTH: gl.constexpr, WIDTH: gl.constexpr, DEPTH_STEP: gl.constexpr, WIDTH_STEP: gl.constexpr, COLUMNS: gl.constexpr,
    CHUNK: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """CHUNK rows from `first` on of block j of the columns, as they lie in global memory: straight into the operand's registers."""
    k = first + gl.arange(0, CHUNK, gl.SliceLayout(1, RIGHT))
    n = j * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, RIGHT))
    there = (k < DEPTH)[:, None] & (n < WIDTH)[None, :]
    return gl.load(weight + k[:, None] * DEPTH_STEP + n[None, :] * WIDTH_STEP, mask=there, other=0.0)


@gluon.jit
def multiply(a, b, total, PRECISION: gl.constexpr):
    """total + a b, with operands rounded to PRECISION: "fp32", "tf32", "fp16" or "bf16"."""
    if PRECISION == "fp16":
        total = mma_v2(a.to(gl.float16), b.to(gl.float16), total)
    elif PRECISION == "bf16":
        total = mma_v2(a.to(gl.bfloat16), b.to(gl.bfloat16), total)
    elif PRECISION == "tf32":
        total = mma_v2(a, b, total, input_precision="tf32")
    else:
        total = gl.dot_fma(a, b, total)
    return total


def layouts(precision: str, warps: int) -> dict[str, object]:
    """How blocks lie. Each warp has WARP_COLUMNS columns of one, so that no two read the same weight."""
    if precision == "fp32":
        tile: Any = gl.BlockedLayout([2, 2], [8, 4], [1, warps], [1, 0])
        width = 0
    else:
        tile = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, warps], instr_shape=[16, WARP_COLUMNS])
        width = 1 if precision == "tf32" else 2
    left, right = (gl.DotOperandLayout(operand, tile, width) for operand in (0, 1))
    return {"TILE": tile, "LEFT": left, "RIGHT": right, "SHARED": gl.SwizzledSharedLayout(4, 1, 8, [1, 0])}


def _of_plan(plan: Plan, precision: str, strict: bool, momentum: bool) -> dict[str, object]:
    """The constexpr arguments of this kernel alone."""
    blocks = arrays(plan.starts, strict, momentum)
    sizes = {"HIDDEN": blocks["d"], "ABOVE": blocks["z"], "BETWEEN": blocks.get("eps", 1), "OUTPUT": blocks["out"]}
    return {"STARTS": plan.starts, "COLUMNS": plan.columns, "CHUNK": CHUNK[precision], **sizes, **layouts(precision, plan.warps)}


# Chains of the table: widths, input width. The first is the benchmarks', and nearly all that fits on sm_80.
MLP, AUTOENCODER = ((300, 300, 10), 784), ((128, 32, 128, 256), 256)
REGISTERS = 255  # a thread may have, since shared memory lets one or two programs run at once; left to itself ptxas would rather spill


def builds() -> Iterator[Build]:
    """Every precision and both rules, each once or twice: a build takes seconds."""
    yield _build("mlp", *MLP, "fp32", strict=True)
    yield _build("mlp", *MLP, "tf32", strict=True)
    yield _build("mlp", *MLP, "bf16", strict=True)
    yield _build("mlp", *MLP, "fp16", strict=False)
    yield _build("autoencoder", *AUTOENCODER, "fp16", strict=True)


def _build(name: str, widths: tuple[int, ...], inputs: int, precision: str, strict: bool) -> Build:
    plan = plan_pinned(widths, strict, strict, min(SHARED_BYTES.values()))
    assert isinstance(plan, Plan), plan
    constants = chain_launch.constants_of_table(widths, inputs, plan.lanes, precision, strict)
    constants |= _of_plan(plan, precision, strict, strict)
    signature, name = chain_launch.signature_of_table(len(widths), precision), f"{name} {precision} {'strict' if strict else 'fixed'}"
    options = {"num_warps": plan.warps, "maxnreg": REGISTERS}
    return Build(f"relax_mlp_pinned {name}", relax_mlp_pinned, signature, constants, options, mma=precision != "fp32")


def run(
    compiled: Compiled, memory: Memory | Packed, batch: int, factor: float, shared_bytes: int, precision: str = "fp32",
    lanes: int | None = None, warps: int | None = None,
) -> None:  # fmt: skip
    """All that code does, on the current stream: inference by relax_mlp_pinned, then the local updates.

    Args:
        compiled: the code of steps of a chain. W W^T among its weights, if it is in the Gram form, is not read.
        memory: float32 tensors, contiguous.
        batch: B, at least 1.
        factor: what gradients are multiplied by.
        shared_bytes: shared memory that a program may ask for.
        precision: of the operands of products: "fp32", "tf32", "bf16" or "fp16".
        lanes, warps: samples of a tile, and warps of a program; None: as the plan has it.

    Raises:
        Unsupported: the code is no chain, or does not fit.
    """
    chain, plan = chain_of_code(compiled), plan_of_code(compiled, shared_bytes, lanes, warps)
    if isinstance(chain, str) or isinstance(plan, str):
        raise Unsupported(str(plan))
    assert compiled.dynamics is not None
    constants = chain_launch.constants(compiled, chain, precision, plan.lanes) | _of_plan(plan, precision, *moves(compiled.dynamics))
    options = {"num_warps": plan.warps, "maxnreg": REGISTERS}
    chain_launch.relax(relax_mlp_pinned, constants, options, compiled, chain, memory, batch)
    local_update.learn(compiled.code.products, memory.io, memory.gradients, batch, factor, precision)
