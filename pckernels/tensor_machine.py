"""Code run over tensors by PyTorch's own operations: the graph tier, for networks too large to stay on a chip, and on any device.

An array is a tensor (B, n). State lies in device memory, and every operation is a launch or a few. The loop's hoisting, light cone
and merged products are in the code already; what is left to save is the launches' own cost: see replay.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pckernels import tensor_operations as operations
from pckernels.arena import Array, Draft
from pckernels.compiler import Compiled
from pckernels.formula import PARTS, Evaluate
from pckernels.instructions import ABSENT, Activation, Loss, Op
from pckernels.interpreter import ConvShape, PoolShape, activate
from pckernels.memory import Packed
from pckernels.products import multiply, outer_products
from pckernels.tensor_fusion import Fusion, Item
from pckernels.tensor_layout import Layout, Stage

conv_shape, pool_shape = lru_cache(maxsize=256)(ConvShape), lru_cache(maxsize=256)(PoolShape)  # the same at every step


@dataclass(frozen=True)
class Kernels:
    """What runs fused launches, as pckernels.triton has them.

    Attributes:
        evaluate: formulas.
        cross_entropy: of mu, change or None, target, error to be written, factor, parts of its energy.
        refuses: why there are too many classes for it, or None.
        max_pool: maxima_change and maxima_feedback of windows side by side, over MOST elements at most (max_pool.py); None: by PyTorch.
    """

    evaluate: Evaluate
    cross_entropy: Callable[[Tensor, Tensor | None, Tensor, Tensor, float, Tensor], None]
    refuses: Callable[[int], str | None]
    max_pool: Any = None

    def can_pool(self, shape: PoolShape, *tensors: Tensor) -> bool:
        return (
            self.max_pool is not None
            and shape.is_side_by_side
            and all(tensor.is_contiguous() and tensor.numel() <= self.max_pool.MOST for tensor in tensors)
        )


class Machine:
    """The tensors of a code's arrays for one batch size, and what each draft does to them.

    Held arrays keep their memory from call to call, so that recorded steps may be replayed: `bind` gives the machine another
    call's inputs and results.

    kernels: of a layout with fused launches, what runs them.
    """

    def __init__(self, compiled: Compiled, layout: Layout, memory: Packed, batch: int, kernels: Kernels | None = None):
        self.code, self.layout, self.batch, self.kernels = compiled.code, layout, batch, kernels
        self.shapes = [(info.outputs, info.inputs) for info in compiled.weights]
        like = memory.kept
        self.held = {
            array: torch.empty(batch, array.n, dtype=torch.int64 if array in layout.places else like.dtype, device=like.device)
            for array in layout.held
        }
        self.clock = torch.zeros(1, dtype=torch.int64, device=like.device)  # t, which a replayed step must find on the device
        self.energies = torch.zeros(self.code.steps + 1, self.code.energies, dtype=torch.float64, device=like.device)
        # What the programs of a formula add to each energy, one after the other.
        self.parts = torch.zeros(self.code.energies, PARTS if kernels else 0, dtype=torch.float64, device=like.device)
        self.constants: dict[int, tuple[Tensor, ...]] = {}  # of a draft, by its id: what it needs of arrays that the loop leaves alone
        places = {info.name: place for place, info in enumerate(compiled.weights)}
        self.learning = [places[name] for name in compiled.gradients] if compiled.moves_weights else []  # by gradient slot
        self.copies = [] if memory.update else [torch.empty_like(memory.weights[place]) for place in self.learning]
        self.totals = [torch.zeros_like(copy) for copy in self.copies]  # of their gradients
        self.bind(memory)

    def bind(self, memory: Packed) -> None:
        """Start a call: nothing has been computed."""
        self.memory = memory
        weights = list(memory.weights)
        for place, copy, total in zip(self.learning, self.copies, self.totals, strict=False):
            weights[place] = copy.copy_(weights[place])
            total.zero_()
        self.read(weights)
        self.io = [tensor.reshape(self.batch, -1) if self.batch else tensor for tensor in memory.io]
        self.tensors: dict[Array, Tensor] = dict(self.held)
        self.known: set[int] = set()  # constants of this call
        self.energies.zero_()
        self.parts.zero_()
        for gradient in memory.gradients:
            gradient.zero_()

    @property
    def state(self) -> list[Tensor]:
        """What steps change."""
        return [*self.held.values(), *self.copies, *self.totals, self.clock, self.energies, self.parts]

    def read(self, weights: Sequence[Tensor]) -> None:
        """Multiply by these from now on."""
        self.weights = [weight.view(shape) for weight, shape in zip(weights, self.shapes, strict=True)]

    def start(self, stage: Stage) -> None:
        """Set the clock to the stage's first step, and compute what holds for all of its steps."""
        self.clock.fill_(stage.first)
        for draft in stage.constant:
            if id(draft) in self.known:
                continue
            self.known.add(id(draft))
            found = _CONSTANTS[draft.op](self, draft)
            if id(draft) in self.constants:  # a recorded step reads it where it is
                for known, value in zip(self.constants[id(draft)], found, strict=True):
                    known.copy_(value)
            else:
                self.constants[id(draft)] = found

        for draft in stage.turned:
            self._run(draft)

    def step(self, stage: Stage) -> None:
        """One step of a stage."""
        self.has_parts = stage.repeats and self.kernels is not None
        self.sums: dict[int, Tensor] = {}  # by slot; of two in one step, as sweeps in groups have them, the later counts
        self.learnt: dict[int, Tensor] = {}  # by gradient slot, of weights that move at every step
        for item, dying in zip(stage.items, stage.deaths, strict=True):
            self._run(item)
            for array in dying:
                self.tensors.pop(array, None)
        if self.has_parts:
            self._put_parts()
        elif self.sums:
            self._put_sums()
        self.clock.add_(1)

    def left(self, stage: Stage) -> dict[Array, Tensor]:
        """What a step of a stage has just left to later stages, beside the arrays with memory of their own."""
        written = {array.root for item in stage.items for array in item.writes}
        return {array: tensor for array, tensor in self.tensors.items() if array in written and array not in self.held}

    def _run(self, item: Item) -> None:
        if isinstance(item, Fusion):
            self._launch(item)
        else:
            _RUN[item.op](self, item)

    def _launch(self, fusion: Fusion) -> None:
        assert self.kernels is not None
        loads = [self.get(array) for array in fusion.written.loads]
        stores = [self.memory_of(array) for array in fusion.written.stores]
        parts = [self.parts[slot] for slot in fusion.slots]
        self.kernels.evaluate(fusion.written, loads, stores, parts)

    def memory_of(self, array: Array) -> Tensor:
        """Where all of an array is to be written; of a held one, its own memory."""
        if array.root not in self.held:
            like = self.memory.kept
            dtype = torch.int64 if array in self.layout.places else like.dtype
            self.tensors[array] = torch.empty(self.batch, array.n, dtype=dtype, device=like.device)
        return self.get(array)

    @property
    def rests(self) -> bool:
        """Whether every sample does. A look that waits for the device."""
        rest = self.layout.rest
        return rest is not None and bool(self.get(rest)[:, 0].all())

    def stand_still(self) -> None:
        """The energies of the steps that are left out, as if they had run with every sample at rest. Not for a GPU: it looks."""
        left = int(self.clock)
        self.energies[left:] = self.energies[left - 1]

    def _put_sums(self) -> None:
        slots = sorted(self.sums)
        row = torch.zeros_like(self.energies[0])
        for slot in slots:
            row[slot].copy_(self.sums[slot])
        self.energies.index_add_(0, self.clock, row[None])

    def _put_parts(self) -> None:
        for slot, total in self.sums.items():
            self.parts[slot, 0].copy_(total)
        self.energies.index_copy_(0, self.clock, self.parts.sum(1)[None])

    def finish(self, factor: float) -> None:
        """Local updates that are outer products, the factor, and the energies: the end of a call."""
        self._learn()
        for gradient, total in zip(self.memory.gradients, self.totals, strict=False):
            gradient.copy_(total)
        for gradient in self.memory.gradients:
            gradient.mul_(factor)
        self.memory.energies.copy_(self.energies)
        del self.memory, self.io, self.weights, self.tensors  # a machine that is kept does not keep the call's tensors

    def _learn(self) -> None:
        for product in self.code.products:
            g = self.io[product.g_slot].reshape(self.batch * product.positions, product.outputs)
            part = self.io[product.x_slot][:, product.x_offset :][:, : product.positions * product.inputs]
            if product.weight != ABSENT:
                x = part.reshape(self.batch * product.positions, product.inputs)
                gradient = self.memory.gradients[product.weight].view(product.outputs, product.inputs)
                gradient.addmm_(g.t(), x, alpha=product.coefficient)
            if product.bias != ABSENT:
                self.memory.gradients[product.bias].view(-1).add_(g.sum(0), alpha=product.coefficient)

    def learn(self, slot: int, part: Tensor, factor: float = 1.0) -> None:
        """Add to a gradient, whose shape `part` takes; where weights move at every step, to that of this step."""
        gradient = self.memory.gradients[slot]
        if not self.learning:
            gradient.add_(part.view_as(gradient), alpha=factor)
        elif slot in self.learnt:
            self.learnt[slot].add_(part.view_as(gradient), alpha=factor)
        else:
            self.learnt[slot] = part.view_as(gradient) * factor if factor != 1.0 else part.view_as(gradient)

    # Arrays

    def get(self, array: Array) -> Tensor:
        """(B, n)"""
        root = self.tensors[array.root]
        return root if array.whole is None else root[:, array.start : array.start + array.n]

    def maybe(self, array: Array | None) -> Tensor | None:
        return None if array is None else self.get(array)

    def put(self, array: Array | None, value: Tensor, accumulate: bool = False) -> None:
        """What an array now is; of a held one, in its own memory."""
        assert array is not None
        if array.root in self.held:
            target = self.get(array)
            target.add_(value) if accumulate else target.copy_(value)
        else:
            self.tensors[array] = self.tensors[array] + value if accumulate else value


# Between io and arrays


def _load(m: Machine, i: Draft) -> None:
    m.put(i.out, m.io[i.slot][:, i.p[1] : i.p[1] + i.n])


def _store(m: Machine, i: Draft) -> None:
    a, b = m.maybe(i.a), m.maybe(i.b)
    target = m.io[i.slot][:, i.p[1] : i.p[1] + i.n]
    if a is None and b is None:
        target.zero_()
    elif a is None or b is None:
        target.copy_(a if b is None else b)  # type: ignore[arg-type]
    else:
        torch.add(a, b, out=target)


def _fill(m: Machine, i: Draft) -> None:
    assert i.out is not None
    if i.out.root in m.held:
        m.get(i.out).fill_(i.f[0])
    else:
        m.tensors[i.out] = torch.full((m.batch, i.n), i.f[0], dtype=m.memory.kept.dtype, device=m.memory.kept.device)


def _copy(m: Machine, i: Draft) -> None:
    blocks, run, out_stride, stride = i.p[:4]
    assert i.out is not None and i.a is not None
    target, source = _blocks(m.get(i.out), i.out_at, blocks, run, out_stride), _blocks(m.get(i.a), i.a_at, blocks, run, stride)
    if i.accumulate:
        target.add_(source, alpha=i.f[0])
    elif i.f[0] == 1.0:
        target.copy_(source)
    else:
        torch.mul(source, i.f[0], out=target)


def _blocks(rows: Tensor, start: int, blocks: int, run: int, stride: int) -> Tensor:
    """(B, blocks, run): every `stride` columns from `start` on, `run` of them."""
    return rows.as_strided((len(rows), blocks, run), (rows.stride(0), stride, 1), rows.storage_offset() + start)


# Products


def _bias(m: Machine, i: Draft) -> Tensor | None:
    return None if i.slot2 == ABSENT else m.weights[i.slot2].view(-1)


def _linear(m: Machine, i: Draft) -> None:
    positions, inputs, outputs = i.p[:3]
    _product(m, i, inputs, outputs, positions, _bias(m, i), False)


def _linear_t(m: Machine, i: Draft) -> None:
    positions, inputs, outputs = i.p[:3]
    _product(m, i, outputs, inputs, positions, None, True)


def _product(m: Machine, i: Draft, depth: int, width: int, positions: int, bias: Tensor | None, transposed: bool) -> None:
    assert i.a is not None
    x = m.get(i.a)
    rows = x if positions == 1 else x.reshape(m.batch * positions, depth)
    m.put(i.out, multiply(rows, m.weights[i.slot], bias, transposed).view(m.batch, positions * width), i.accumulate)


def _conv(m: Machine, i: Draft) -> None:
    assert i.a is not None
    m.put(i.out, operations.convolution(conv_shape(i.p), m.get(i.a), m.weights[i.slot], _bias(m, i)), i.accumulate)


def _conv_t(m: Machine, i: Draft) -> None:
    assert i.a is not None
    m.put(i.out, operations.convolution_feedback(conv_shape(i.p), m.get(i.a), m.weights[i.slot]), i.accumulate)


# Activations


def _act(m: Machine, i: Draft) -> None:
    assert i.a is not None
    m.put(i.out, activate(Activation(i.p[0]), i.f, m.get(i.a)))


def _act_change(m: Machine, i: Draft) -> None:
    assert i.a is not None and i.b is not None and i.c is not None
    known = m.constants.get(id(i))
    m.put(i.out, operations.activation_change(Activation(i.p[0]), i.f, m.get(i.a), m.get(i.b), m.get(i.c), known))


def _act_constants(m: Machine, i: Draft) -> tuple[Tensor, ...]:
    assert i.a is not None
    return operations.activation_constants(Activation(i.p[0]), m.get(i.a))


def _act_grad(m: Machine, i: Draft) -> None:
    assert i.a is not None and i.b is not None
    at = m.get(i.b) if i.c is None else m.get(i.b) + m.get(i.c)
    by_value = len(i.p) > 1 and bool(i.p[1])
    m.put(i.out, operations.activation_feedback(Activation(i.p[0]), i.f, m.get(i.a), at, by_value), i.accumulate)


# Element by element. An absent operand is zero.


def _add(m: Machine, i: Draft) -> None:
    a, b = m.maybe(i.a), m.maybe(i.b)
    assert a is not None or b is not None
    if a is None or b is None:
        only, factor = (b, i.f[1]) if a is None else (a, i.f[0])
        assert only is not None
        m.put(i.out, only * factor if factor != 1.0 else only.clone(), i.accumulate)
    else:
        scaled = a if i.f[0] == 1.0 else a * i.f[0]
        m.put(i.out, torch.add(scaled, b, alpha=i.f[1]), i.accumulate)


def _mul(m: Machine, i: Draft) -> None:
    assert i.a is not None and i.b is not None
    m.put(i.out, m.get(i.a) * m.get(i.b))


def _mul_change(m: Machine, i: Draft) -> None:
    """a d + b c + b d."""
    assert i.a is not None and i.c is not None
    a, b, c, d = m.get(i.a), m.maybe(i.b), m.get(i.c), m.maybe(i.d)
    if b is None or d is None:
        assert b is not None or d is not None
        m.put(i.out, a * d if b is None else b * c)  # type: ignore[operator]
    else:
        m.put(i.out, torch.addcmul(a * d, b, c + d))


def _mul_grad(m: Machine, i: Draft) -> None:
    assert i.a is not None and i.b is not None
    other = m.get(i.b) if i.c is None else m.get(i.b) + m.get(i.c)
    m.put(i.out, m.get(i.a) * other, i.accumulate)


# Pooling


def _maxpool(m: Machine, i: Draft) -> None:
    assert i.a is not None
    values, places = operations.maxima(pool_shape(i.p), m.get(i.a))
    m.put(i.out, values)
    m.put(i.b, places)


def _maxpool_change(m: Machine, i: Draft) -> None:
    assert i.a is not None and i.b is not None and i.c is not None and i.out is not None and i.d is not None
    shape, inputs = pool_shape(i.p), (m.get(i.a), m.get(i.b), m.get(i.c))
    if m.kernels is not None and m.kernels.can_pool(shape, *inputs):
        m.kernels.max_pool.maxima_change(*_sizes(shape), *inputs, m.memory_of(i.out), m.memory_of(i.d))
        return
    known = m.constants.get(id(i)) or (None,)
    values, places = operations.maxima_change(shape, *inputs, known[0])
    m.put(i.out, values)
    m.put(i.d, places)


def _sizes(shape: PoolShape) -> tuple[tuple[int, int], tuple[int, int], tuple[int, ...]]:
    return (shape.height, shape.width), (shape.out_h, shape.out_w), shape.kernel


def _maxpool_constants(m: Machine, i: Draft) -> tuple[Tensor, ...]:
    assert i.a is not None and i.c is not None
    shape, inputs = pool_shape(i.p), (m.get(i.a), m.get(i.c))
    if m.kernels is not None and m.kernels.can_pool(shape, *inputs):
        return ()  # it subtracts as it reads
    return (operations.maxima_constants(shape, *inputs),)


def _maxpool_grad(m: Machine, i: Draft) -> None:
    assert i.a is not None and i.b is not None and i.out is not None
    shape, inputs = pool_shape(i.p), (m.get(i.a), m.get(i.b))
    if m.kernels is not None and m.kernels.can_pool(shape, *inputs):
        adds = i.accumulate
        m.kernels.max_pool.maxima_feedback(*_sizes(shape), *inputs, m.get(i.out) if adds else m.memory_of(i.out), adds)
        return
    m.put(i.out, operations.maxima_feedback(shape, *inputs), i.accumulate)


def _avgpool(m: Machine, i: Draft) -> None:
    assert i.a is not None
    m.put(i.out, operations.average(pool_shape(i.p), m.get(i.a)), i.accumulate)


def _avgpool_t(m: Machine, i: Draft) -> None:
    assert i.a is not None
    m.put(i.out, operations.average_feedback(pool_shape(i.p), m.get(i.a)), i.accumulate)


# The dynamics


def _loss(m: Machine, i: Draft) -> None:
    assert i.a is not None and i.c is not None and i.out is not None
    mu, change, target = m.get(i.a), m.maybe(i.b), m.get(i.c)
    if m.kernels is not None and m.has_parts and _is_fused_loss(m.kernels, i):
        m.kernels.cross_entropy(mu, change, target, m.memory_of(i.out), i.f[0], m.parts[i.slot])
        return
    losses, error = operations.loss(Loss(i.p[0]), i.p[1], mu, change, target)
    m.put(i.out, error if i.f[0] == 1.0 else i.f[0] * error)
    m.sums[i.slot] = i.f[0] * losses.sum(dtype=torch.float64)
    if i.slot2 != ABSENT:
        m.io[i.slot2].view(m.batch).copy_(losses)


def _is_fused_loss(kernels: Kernels, i: Draft) -> bool:
    """Whether the kernel takes it. Losses of single samples, which the feed-forward pass is asked for, it does not write."""
    return i.p[0] == Loss.CROSS_ENTROPY and i.slot2 == ABSENT and kernels.refuses(i.p[1]) is None


def _error(m: Machine, i: Draft) -> None:
    a, b = m.maybe(i.a), m.maybe(i.b)
    assert a is not None or b is not None
    m.put(i.out, a - b if a is not None and b is not None else a.clone() if a is not None else -b)  # type: ignore[operator]


def _move(m: Machine, i: Draft) -> None:
    """value += rate velocity."""
    assert i.out is not None
    m.get(i.out).add_(_velocity(m, i), alpha=i.f[0])


def _velocity(m: Machine, i: Draft) -> Tensor:
    """velocity = momentum velocity + (feedback - precision error)."""
    _, momentum, precision = i.f
    assert i.a is not None
    error, feedback = m.get(i.a), m.maybe(i.b)
    drive = error * -precision if feedback is None else torch.sub(feedback, error, alpha=precision)
    return drive if i.c is None else m.get(i.c).mul_(momentum).add_(drive)


def _move_or_rest(m: Machine, i: Draft) -> None:
    assert i.out is not None and i.d is not None
    rests, farthest, _ = m.get(i.d).split(1, 1)
    step = torch.where(rests == 0.0, _velocity(m, i) * i.f[0], 0.0)
    m.get(i.out).add_(step)
    farthest.copy_(torch.maximum(farthest, step.abs().amax(1, keepdim=True)))


def _rest(m: Machine, i: Draft) -> None:
    assert i.out is not None
    rests, farthest, steps = m.get(i.out).split(1, 1)
    steps.add_(1.0 - rests)
    rests.copy_(~(farthest > i.f[0]))
    farthest.zero_()


def _relax(m: Machine, i: Draft) -> None:
    assert i.out is not None
    error, feedback = m.get(i.out), m.maybe(i.a)
    error.mul_(1.0 - i.f[0])
    if feedback is not None:
        error.add_(feedback, alpha=i.f[0])


def _norm(m: Machine, i: Draft) -> None:
    assert i.a is not None
    a, b = m.get(i.a), m.maybe(i.b)
    squares = torch.linalg.vector_norm(a, dim=1).double().square() if b is None else (a * b).sum(1, dtype=torch.float64)
    m.sums[i.slot] = i.f[0] * squares.sum()


# Local updates inside of the code


def _conv_learn(m: Machine, i: Draft) -> None:
    assert i.a is not None and i.b is not None
    x = m.get(i.b) if i.c is None else m.get(i.b) + m.get(i.c)
    m.learn(i.slot, operations.convolution_update(conv_shape(i.p), m.get(i.a), x), i.f[0])


def _sum_learn(m: Machine, i: Draft) -> None:
    assert i.a is not None
    m.learn(i.slot, m.get(i.a).reshape(m.batch, i.p[0], i.p[1], i.p[2]).sum((0, 1, 3)), i.f[0])


def _linear_learn(m: Machine, i: Draft) -> None:
    assert i.a is not None and i.b is not None
    positions, inputs, outputs = i.p[:3]
    g, x = m.get(i.a).reshape(m.batch * positions, outputs), m.get(i.b).reshape(m.batch * positions, inputs)
    m.learn(i.slot, outer_products(g, x, i.f[0]))


def _move_weights(m: Machine, i: Draft) -> None:
    learnt = [m.learnt[slot] for slot in range(i.n)]
    if m.memory.update is not None:
        m.read(m.memory.update(learnt))
    elif learnt:
        torch._foreach_add_(m.totals, learnt)
        torch._foreach_add_(m.copies, learnt, alpha=i.f[0] / m.memory.divisor)


_RUN: dict[Op, Callable[[Machine, Draft], None]] = {
    Op.LOAD: _load,
    Op.STORE: _store,
    Op.FILL: _fill,
    Op.COPY: _copy,
    Op.LINEAR: _linear,
    Op.LINEAR_T: _linear_t,
    Op.CONV: _conv,
    Op.CONV_T: _conv_t,
    Op.ACT: _act,
    Op.ACT_CHANGE: _act_change,
    Op.ACT_GRAD: _act_grad,
    Op.ADD: _add,
    Op.MUL: _mul,
    Op.MUL_CHANGE: _mul_change,
    Op.MUL_GRAD: _mul_grad,
    Op.MAXPOOL: _maxpool,
    Op.MAXPOOL_CHANGE: _maxpool_change,
    Op.MAXPOOL_GRAD: _maxpool_grad,
    Op.AVGPOOL: _avgpool,
    Op.AVGPOOL_T: _avgpool_t,
    Op.LOSS: _loss,
    Op.ERROR: _error,
    Op.MOVE: _move,
    Op.MOVE_OR_REST: _move_or_rest,
    Op.REST: _rest,
    Op.RELAX: _relax,
    Op.NORM: _norm,
    Op.CONV_LEARN: _conv_learn,
    Op.SUM_LEARN: _sum_learn,
    Op.LINEAR_LEARN: _linear_learn,
    Op.MOVE_WEIGHTS: _move_weights,
}

_CONSTANTS: dict[Op, Callable[[Machine, Draft], tuple[Tensor, ...]]] = {
    Op.ACT_CHANGE: _act_constants,
    Op.MAXPOOL_CHANGE: _maxpool_constants,
}
