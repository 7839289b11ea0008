"""Code executed in plain PyTorch: the executable specification of the native engine.

One tile holds the whole batch, so a row is a tensor (B,). Any floating dtype: in float64 it stands between the reference
backend and the engine. Slow, and meant to be read beside instructions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from pckernels.instructions import ABSENT, Activation, Code, Instruction, Loss, Op
from pckernels.memory import Memory, Packed


def execute(
    code: Code, memory: Memory | Packed, batch: int, factor: float = 1.0, watch: Callable[[Instruction, int], None] | None = None
) -> None:
    """Run code on a batch: results go into `memory.io`, `.gradients` (times `factor`) and `.energies`.

    Args:
        code: what to run.
        memory: its tensors; `gradients` and `energies` are overwritten.
        batch: B.
        factor: what every gradient is multiplied by.
        watch: called after each instruction with it and t.
    """
    if any(instruction.op is Op.MOVE_WEIGHTS for instruction in code.instructions):
        memory = replace(memory, weights=[weight.clone() for weight in memory.weights])
    machine = Machine(code, memory, batch)
    for tensor in (*memory.gradients, memory.energies):
        tensor.zero_()
    for phase in code.phases:
        for t in range(phase.first, phase.last + 1):
            for instruction in phase.instructions:
                if t >= instruction.first:
                    machine.run(instruction, t)
                    if watch is not None:
                        watch(instruction, t)
    _learn(code, memory, batch)
    for gradient in memory.gradients:
        gradient.mul_(factor)


def _learn(code: Code, memory: Memory | Packed, batch: int) -> None:
    for product in code.products:
        g = memory.io[product.g_slot].reshape(batch * product.positions, product.outputs)
        part = memory.io[product.x_slot].reshape(batch, product.x_stride)[:, product.x_offset :][:, : product.positions * product.inputs]
        x = part.reshape(batch * product.positions, product.inputs)
        if product.weight != ABSENT:
            memory.gradients[product.weight].add_(product.coefficient * (g.t() @ x))
        if product.bias != ABSENT:
            memory.gradients[product.bias].add_(product.coefficient * g.sum(0))


class Machine:
    """The arena, (rows, B), and what each operation does to it."""

    def __init__(self, code: Code, memory: Memory | Packed, batch: int):
        self.memory, self.batch = memory, batch
        self.dtype = next((tensor.dtype for tensor in memory.io if tensor.is_floating_point()), torch.float32)
        self.arena = torch.full((code.rows, batch), float("nan"), dtype=self.dtype)
        self.where = torch.zeros(code.rows, batch, dtype=torch.int64)  # int32 rows of a kernel: positions of maxima
        self.learnt = [torch.zeros_like(gradient) for gradient in memory.gradients]  # what MOVE_WEIGHTS has seen of them

    def run(self, i: Instruction, t: int) -> None:
        getattr(self, f"_{i.op.name.lower()}")(i, t)

    def rows(self, start: int, n: int) -> Tensor:
        """n rows of the arena, (n, B); zeros where the operand is absent."""
        return self.arena[start : start + n] if start != ABSENT else self.arena.new_zeros(n, self.batch)

    def put(self, i: Instruction, value: Tensor) -> None:
        rows = self.arena[i.out : i.out + len(value)]
        rows.copy_(rows + value if i.accumulate else value)

    # io

    def _load(self, i: Instruction, t: int) -> None:
        width, start = i.p[0], i.p[1]
        self.put(i, self.memory.io[i.slot].reshape(self.batch, width)[:, start : start + i.n].t())

    def _store(self, i: Instruction, t: int) -> None:
        width, start = i.p[0], i.p[1]
        self.memory.io[i.slot].view(self.batch, width)[:, start : start + i.n] = (self.rows(i.a, i.n) + self.rows(i.b, i.n)).t()

    def _fill(self, i: Instruction, t: int) -> None:
        self.rows(i.out, i.n).fill_(i.f[0])

    def _copy(self, i: Instruction, t: int) -> None:
        blocks, run, out_stride, stride = i.p[:4]
        for block in range(blocks):
            target, source = self.rows(i.out + block * out_stride, run), self.rows(i.a + block * stride, run)
            target.copy_(i.f[0] * source + (target if i.accumulate else 0.0))

    # Between blocks, which share this one arena

    def _meet(self, i: Instruction, t: int) -> None:
        pass

    def _gather(self, i: Instruction, t: int) -> None:
        pass

    # Products

    def _linear(self, i: Instruction, t: int) -> None:
        positions, inputs, outputs = i.p[:3]
        x = self.rows(i.a, positions * inputs).reshape(positions, inputs, self.batch)
        result = torch.einsum("nk,pkb->pnb", self.memory.weights[i.slot].reshape(outputs, inputs), x)
        if i.slot2 != ABSENT:
            result = result + self.memory.weights[i.slot2].reshape(outputs, 1)
        self.put(i, result.reshape(positions * outputs, self.batch))

    def _linear_t(self, i: Instruction, t: int) -> None:
        positions, inputs, outputs = i.p[:3]
        g = self.rows(i.a, positions * outputs).reshape(positions, outputs, self.batch)
        result = torch.einsum("nk,pnb->pkb", self.memory.weights[i.slot].reshape(outputs, inputs), g)
        self.put(i, result.reshape(positions * inputs, self.batch))

    def _conv(self, i: Instruction, t: int) -> None:
        shape = ConvShape(i.p)
        bias = None if i.slot2 == ABSENT else self.memory.weights[i.slot2]
        x = self.samples(i.a, shape.input)
        self.put(i, _rows(F.conv2d(x, self.memory.weights[i.slot].reshape(shape.weight), bias, *shape.settings)))

    def _conv_t(self, i: Instruction, t: int) -> None:
        shape = ConvShape(i.p)
        self.put(i, _rows(shape.transposed(self.samples(i.a, shape.output), self.memory.weights[i.slot].reshape(shape.weight))))

    def samples(self, start: int, shape: tuple[int, ...]) -> Tensor:
        """An array of the arena as (B, *shape)."""
        n = 1
        for size in shape:
            n *= size
        return self.rows(start, n).t().reshape(self.batch, *shape)

    # Activations

    def _act(self, i: Instruction, t: int) -> None:
        self.put(i, activate(Activation(i.p[0]), i.f, self.rows(i.a, i.n)))

    def _act_change(self, i: Instruction, t: int) -> None:
        self.put(i, change(Activation(i.p[0]), i.f, self.rows(i.a, i.n), self.rows(i.b, i.n)))

    def _act_grad(self, i: Instruction, t: int) -> None:
        at = self.rows(i.b, i.n) + self.rows(i.c, i.n)
        kind, by_value = Activation(i.p[0]), len(i.p) > 1 and i.p[1]
        self.put(i, self.rows(i.a, i.n) * (slope_of_value(kind, at) if by_value else slope(kind, i.f, at)))

    # Element by element

    def _add(self, i: Instruction, t: int) -> None:
        self.put(i, i.f[0] * self.rows(i.a, i.n) + i.f[1] * self.rows(i.b, i.n))

    def _mul(self, i: Instruction, t: int) -> None:
        self.put(i, self.rows(i.a, i.n) * self.rows(i.b, i.n))

    def _mul_change(self, i: Instruction, t: int) -> None:
        a, da, c, dc = (self.rows(start, i.n) for start in (i.a, i.b, i.c, i.d))
        self.put(i, a * dc + da * c + da * dc)

    def _mul_grad(self, i: Instruction, t: int) -> None:
        self.put(i, self.rows(i.a, i.n) * (self.rows(i.b, i.n) + self.rows(i.c, i.n)))

    # Pooling

    def _maxpool(self, i: Instruction, t: int) -> None:
        self._take_maxima(i, i.b, PoolShape(i.p).windows(self.samples(i.a, PoolShape(i.p).input)))

    def _maxpool_change(self, i: Instruction, t: int) -> None:
        shape = PoolShape(i.p)
        x, dx = shape.windows(self.samples(i.a, shape.input)), shape.windows(self.samples(i.b, shape.input), 0.0)
        maxima = self.samples(i.c, shape.output).flatten(2).unsqueeze(2)
        self._take_maxima(i, i.d, (x - maxima) + dx)

    def _take_maxima(self, i: Instruction, where: int, windows: Tensor) -> None:
        shape = PoolShape(i.p)
        values, places = windows.max(2)
        self.put(i, _rows(values))
        self.where[where : where + values[0].numel()] = _rows(shape.elements(places))

    def _maxpool_grad(self, i: Instruction, t: int) -> None:
        shape = PoolShape(i.p)
        count = len(shape.of_output)
        g, where = self.rows(i.a, count), self.where[i.b : i.b + count]
        self.put(i, g.new_zeros(len(shape.of_input), self.batch).scatter_add_(0, where, g))

    def _avgpool(self, i: Instruction, t: int) -> None:
        shape = PoolShape(i.p)
        self.put(i, _rows(shape.average(self.samples(i.a, shape.input))))

    def _avgpool_t(self, i: Instruction, t: int) -> None:
        shape = PoolShape(i.p)
        leaf = self.arena.new_zeros(self.batch, *shape.input, requires_grad=True)
        with torch.enable_grad():
            (result,) = torch.autograd.grad(shape.average(leaf), leaf, self.samples(i.a, shape.output))
        self.put(i, _rows(result))

    # Dynamics

    def _loss(self, i: Instruction, t: int) -> None:
        mu = self.rows(i.a, i.n) + self.rows(i.b, i.n)
        squared = Loss(i.p[0]) is Loss.SQUARED_ERROR
        losses, error = self._squared_error(i) if squared else self._cross_entropy(mu, i)
        self.put(i, i.f[0] * error)
        self.memory.energies[t, i.slot] = i.f[0] * losses.sum()
        if i.slot2 != ABSENT:
            self.memory.io[i.slot2].view(self.batch).copy_(losses)

    def _squared_error(self, i: Instruction) -> tuple[Tensor, Tensor]:
        error = (self.rows(i.c, i.n) - self.rows(i.a, i.n)) - self.rows(i.b, i.n)
        return 0.5 * error.square().sum(0), error

    def _cross_entropy(self, mu: Tensor, i: Instruction) -> tuple[Tensor, Tensor]:
        classes = i.p[1]
        logits = mu.reshape(-1, classes, self.batch)
        target = self.rows(i.c, i.n // classes).long()
        chosen = target.clamp_min(0)
        read = (target >= 0).to(mu.dtype)
        losses = -logits.log_softmax(1).gather(1, chosen[:, None])[:, 0] * read
        one_hot = torch.zeros_like(logits).scatter_(1, chosen[:, None], 1.0)
        return losses.sum(0), ((one_hot - logits.softmax(1)) * read[:, None]).reshape(i.n, self.batch)

    def _error(self, i: Instruction, t: int) -> None:
        self.put(i, self.rows(i.a, i.n) - self.rows(i.b, i.n))

    def _move(self, i: Instruction, t: int) -> None:
        self.rows(i.out, i.n).add_(i.f[0] * self._velocity(i))

    def _velocity(self, i: Instruction) -> Tensor:
        _, momentum, precision = i.f
        velocity = self.rows(i.b, i.n) - precision * self.rows(i.a, i.n)
        if i.c != ABSENT:
            velocity = momentum * self.rows(i.c, i.n) + velocity
            self.rows(i.c, i.n).copy_(velocity)
        return velocity

    def _relax(self, i: Instruction, t: int) -> None:
        error = self.rows(i.out, i.n)
        error.copy_((1.0 - i.f[0]) * error + i.f[0] * self.rows(i.a, i.n))

    def _norm(self, i: Instruction, t: int) -> None:
        other = i.a if i.b == ABSENT else i.b
        self.memory.energies[t, i.slot] = i.f[0] * (self.rows(i.a, i.n).double() * self.rows(other, i.n).double()).sum()

    # Local updates

    def _conv_learn(self, i: Instruction, t: int) -> None:
        shape = ConvShape(i.p)
        x = self.samples(i.b, shape.input) + self.samples(i.c, shape.input)
        gradient = self.memory.gradients[i.slot]
        leaf = x.new_zeros(shape.weight, requires_grad=True)
        with torch.enable_grad():
            (part,) = torch.autograd.grad(F.conv2d(x, leaf, None, *shape.settings), leaf, self.samples(i.a, shape.output))
        gradient.add_(i.f[0] * part.reshape(gradient.shape))

    def _linear_learn(self, i: Instruction, t: int) -> None:
        positions, inputs, outputs = i.p[:3]
        g, x = self.rows(i.a, positions * outputs), self.rows(i.b, positions * inputs)
        part = torch.einsum("pnb,pkb->nk", g.reshape(positions, outputs, -1), x.reshape(positions, inputs, -1))
        gradient = self.memory.gradients[i.slot]
        gradient.add_(i.f[0] * part.reshape(gradient.shape))

    def _move_weights(self, i: Instruction, t: int) -> None:
        assert isinstance(self.memory, Packed)
        weights = dict(zip((info.name for info in self.memory.code.weights), self.memory.weights, strict=True))
        for name, gradient, known in zip(self.memory.code.gradients, self.memory.gradients, self.learnt, strict=True):
            weights[name].add_((gradient - known).view_as(weights[name]), alpha=i.f[0] / self.memory.divisor)
            known.copy_(gradient)

    # Samples that rest

    def _move_or_rest(self, i: Instruction, t: int) -> None:
        rests, farthest, _ = self.rows(i.d, 3)
        step = torch.where(rests == 0, i.f[0] * self._velocity(i), 0.0)
        self.put(i, self.rows(i.out, i.n) + step)
        farthest.copy_(torch.maximum(farthest, step.abs().amax(0)))

    def _rest(self, i: Instruction, t: int) -> None:
        rests, farthest, steps = self.rows(i.out, 3)
        steps.add_(1 - rests)
        rests.copy_(~(farthest > i.f[0]))
        farthest.zero_()

    def _sum_learn(self, i: Instruction, t: int) -> None:
        before, size, after = i.p[:3]
        self.memory.gradients[i.slot].add_(i.f[0] * self.rows(i.a, before * size * after).reshape(before, size, -1).sum((0, 2)))


def _rows(samples: Tensor) -> Tensor:
    """(B, ...) -> (elements, B)."""
    return samples.flatten(1).t()


class ConvShape:
    """The geometry of a convolution."""

    def __init__(self, p: Sequence[int]):
        channels, height, width, out, kernel_h, kernel_w, *rest = p[:15]
        stride, padding, dilation, groups = rest[0:2], rest[2:4], rest[4:6], rest[6]
        self.input, self.output = (channels, height, width), (out, *rest[7:9])
        self.weight = (out, channels // groups, kernel_h, kernel_w)
        self.settings = (tuple(stride), tuple(padding), tuple(dilation), groups)

    def transposed(self, g: Tensor, weight: Tensor) -> Tensor:
        """(d conv / d x)^T g: (B, C_out, OH, OW) -> (B, C, H, W)."""
        return conv2d_input([len(g), *self.input], weight, g, *self.settings)


class PoolShape:
    """The geometry of pooling."""

    def __init__(self, p: Sequence[int]):
        self.channels, self.height, self.width = p[0:3]
        self.kernel, self.stride, self.padding, self.dilation = (tuple(p[k : k + 2]) for k in (4, 6, 8, 10))
        self.out_h, self.out_w = p[13:15]
        self.inside_only = bool(p[15])
        self.input, self.output = (self.channels, self.height, self.width), (self.channels, self.out_h, self.out_w)

    @property
    def is_side_by_side(self) -> bool:
        """Whether no element is in two windows, nor any window outside the image."""
        return self.kernel == self.stride and self.padding == (0, 0) and self.dilation == (1, 1)

    @property
    def of_input(self) -> range:
        return range(self.channels * self.height * self.width)

    @property
    def of_output(self) -> range:
        return range(self.channels * self.out_h * self.out_w)

    def windows(self, x: Tensor, outside: float = float("-inf")) -> Tensor:
        """(B, C, H, W) -> (B, C, kernel, OH * OW), with `outside` beyond the image."""
        padded = F.pad(x, (self.padding[1], self._right, self.padding[0], self._below), value=outside)
        rows = [padded[:, :, h : h + self._span(0) : self.stride[0]] for h in self._offsets(0)]
        return torch.stack([row[..., w : w + self._span(1) : self.stride[1]] for row in rows for w in self._offsets(1)], 2).flatten(3)

    def elements(self, places: Tensor) -> Tensor:
        """Places in a window, (B, C, OH * OW), as elements of the input."""
        index = torch.arange(len(self.of_input), dtype=torch.float64).reshape(1, *self.input)
        return self.windows(index).expand(len(places), -1, -1, -1).gather(2, places[:, :, None]).long()

    def average(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, OH, OW)."""
        return F.avg_pool2d(x, self.kernel, self.stride, self.padding, False, not self.inside_only)

    def spread(self, share: Callable[[int], Tensor], like: Tensor) -> Tensor:
        """The transpose of `windows`: share(place), (B, C, OH, OW), added to the element at that place of each window; rows (B, n)."""
        height = self.padding[0] + self.height + self._below
        width = self.padding[1] + self.width + self._right
        total = like.new_zeros(len(like), self.channels, height, width)
        offsets = [(h, w) for h in self._offsets(0) for w in self._offsets(1)]
        for place, (h, w) in enumerate(offsets):
            total[:, :, h : h + self._span(0) : self.stride[0], w : w + self._span(1) : self.stride[1]] += share(place)
        (top, left), (below, right) = self.padding, (self.padding[0] + self.height, self.padding[1] + self.width)
        return total[:, :, top:below, left:right].flatten(1)

    def _offsets(self, axis: int) -> list[int]:
        return [k * self.dilation[axis] for k in range(self.kernel[axis])]

    def _span(self, axis: int) -> int:
        return (self.output[1 + axis] - 1) * self.stride[axis] + 1

    def _beyond(self, axis: int) -> int:
        reached = self._span(axis) + self._offsets(axis)[-1]
        return max(0, reached - self.input[1 + axis] - self.padding[axis])

    @property
    def _below(self) -> int:
        return self._beyond(0)

    @property
    def _right(self) -> int:
        return self._beyond(1)


def activate(kind: Activation, f: Sequence[float], z: Tensor) -> Tensor:
    """f(z)."""
    table: dict[Activation, Callable[[], Tensor]] = {
        Activation.AFFINE: lambda: f[0] * z + f[1],
        Activation.RELU: lambda: z.clamp_min(0.0),
        Activation.LEAKY_RELU: lambda: torch.where(z > 0, z, f[0] * z),
        Activation.TANH: lambda: z.tanh(),
        Activation.SIGMOID: lambda: z.sigmoid(),
        Activation.GELU: lambda: F.gelu(z),
        Activation.GELU_TANH: lambda: F.gelu(z, approximate="tanh"),
        Activation.HARDTANH: lambda: z.clamp(f[0], f[1]),
        Activation.SILU: lambda: F.silu(z),
    }
    return table[kind]()


def change(kind: Activation, f: Sequence[float], z: Tensor, dz: Tensor) -> Tensor:
    """f(z + dz) - f(z), without the cancellation of the difference."""
    table: dict[Activation, Callable[[], Tensor]] = {
        Activation.AFFINE: lambda: f[0] * dz,
        Activation.RELU: lambda: torch.where(z > 0, torch.where(z + dz > 0, dz, -z), (z + dz).clamp_min(0.0)),
        Activation.LEAKY_RELU: lambda: _leaky_change(z, dz, f[0]),
        Activation.TANH: lambda: _tanh_change(z, dz),
        Activation.SIGMOID: lambda: 0.5 * _tanh_change(0.5 * z, 0.5 * dz),
        Activation.GELU: lambda: _in_double(kind, f, z, dz),
        Activation.GELU_TANH: lambda: _in_double(kind, f, z, dz),
        Activation.HARDTANH: lambda: _hardtanh_change(z, dz, f[0], f[1]),
        Activation.SILU: lambda: dz * (z + dz).sigmoid() + z * change(Activation.SIGMOID, f, z, dz),
    }
    return table[kind]()


def slope(kind: Activation, f: Sequence[float], z: Tensor) -> Tensor:
    """f'(z), with PyTorch's choice where there is a kink."""
    leaf = z.detach().requires_grad_()
    functions: dict[Activation, Callable[[Tensor], Tensor]] = {
        Activation.RELU: F.relu,
        Activation.LEAKY_RELU: lambda x: F.leaky_relu(x, f[0]),
        Activation.HARDTANH: lambda x: F.hardtanh(x, f[0], f[1]),
    }
    with torch.enable_grad():
        value = functions[kind](leaf) if kind in functions else activate(kind, f, leaf)
        (result,) = torch.autograd.grad(value.sum(), leaf)
    return result


def slope_of_value(kind: Activation, m: Tensor) -> Tensor:
    """f'(z) from m = f(z), where that is possible."""
    return 1.0 - m * m if kind is Activation.TANH else m * (1.0 - m)


def _tanh_change(z: Tensor, dz: Tensor) -> Tensor:
    t, s = z.tanh(), dz.tanh()
    return s * (1.0 - t * t) / (1.0 + t * s)


def _leaky_change(z: Tensor, dz: Tensor, slope: float) -> Tensor:
    moved = z + dz
    stays = torch.where(z > 0, dz, slope * dz)
    crosses = torch.where(z > 0, slope * moved - z, moved - slope * z)
    return torch.where((z > 0) == (moved > 0), stays, crosses)


def _hardtanh_change(z: Tensor, dz: Tensor, low: float, high: float) -> Tensor:
    moved = z + dz
    inside = (z > low) & (z < high) & (moved > low) & (moved < high)
    return torch.where(inside, dz, moved.clamp(low, high) - z.clamp(low, high))


def _in_double(kind: Activation, f: Sequence[float], z: Tensor, dz: Tensor) -> Tensor:
    # Twice the digits, where there is no short form. In float64 the difference itself.
    wide, step = z.double(), dz.double()
    return (activate(kind, f, wide + step) - activate(kind, f, wide)).to(z.dtype)
