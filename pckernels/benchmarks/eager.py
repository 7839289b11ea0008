"""Strict predictive coding written by hand, as carefully as plain PyTorch allows: what the engine is measured against.

All time steps of a layer in one product, addmm for biases, derivatives from the predictions, and the first product, whose
input is clamped, computed once. Values are kept as they are, not as displacements, as anyone would write it. Each function
returns the gradients of the summed loss in the order of the module's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad

Gradients = list[Tensor]


@torch.no_grad()
def mlp(module: nn.Sequential, x: Tensor, target: Tensor, steps: int, rate: float) -> Gradients:
    """ReLU layers; x (B, D_in), target (B, D_out)."""
    layers = [layer for layer in module if isinstance(layer, nn.Linear)]
    first = layers[0](x).relu_()
    values = [first.clone()]
    for layer in layers[1:-1]:
        values.append(layer(values[-1]).relu_())
    for _ in range(steps):
        mu = _predictions(layers, first, values)
        errors = [v - m for v, m in zip([*values, target], mu, strict=True)]
        for k, layer in enumerate(layers[1:]):
            above = errors[k + 1] if k + 1 == len(layers) - 1 else errors[k + 1] * (mu[k + 1] > 0)
            values[k] += rate * (torch.mm(above, layer.weight) - errors[k])
    mu = _predictions(layers, first, values)
    errors = [v - m for v, m in zip([*values, target], mu, strict=True)]
    deltas = [error * (m > 0) for error, m in zip(errors[:-1], mu[:-1], strict=True)] + [errors[-1]]
    inputs = [x, *values]
    return [part for delta, v in zip(deltas, inputs, strict=True) for part in (-torch.mm(delta.t(), v), -delta.sum(0))]


def _predictions(layers: list[nn.Linear], first: Tensor, values: list[Tensor]) -> list[Tensor]:
    mu = [torch.addmm(layer.bias, v, layer.weight.t()) for layer, v in zip(layers[1:], values, strict=True)]
    return [first, *(m.relu_() for m in mu[:-1]), mu[-1]]


@torch.no_grad()
def rnn(module: Any, x: Tensor, target: Tensor, steps: int, rate: float) -> Gradients:
    """A tanh layer over x (B, S, D_in) from the state 0, no biases, and a linear readout of the last state; target (B, D_out)."""
    w_in, w, readout = module.rnn.weight_ih_l0, module.rnn.weight_hh_l0, module.readout.weight
    batch, length, hidden = x.shape[0], x.shape[1], w.shape[0]
    drive = torch.matmul(x, w_in.t()).transpose(0, 1).contiguous()  # (S, B, H), hoisted
    values = x.new_zeros(length + 1, batch, hidden)  # values[0] is the clamped initial state
    for t in range(length):
        values[t + 1] = torch.addmm(drive[t], values[t], w.t()).tanh_()
    mu = values[1:].clone()
    previous = values[1:length].view(-1, hidden)
    for _ in range(steps):
        torch.addmm(drive[1:].view(-1, hidden), previous, w.t(), out=mu[1:].view(-1, hidden)).tanh_()
        errors, output = values[1:] - mu, target - torch.mm(values[-1], readout.t())
        feedback = torch.mm((errors[1:] * (1 - mu[1:] ** 2)).view(-1, hidden), w).view(length - 1, batch, hidden)
        values[1:].sub_(errors, alpha=rate)
        values[1:length].add_(feedback, alpha=rate)
        values[-1].addmm_(output, readout, alpha=rate)
    mu[1:] = torch.addmm(drive[1:].view(-1, hidden), previous, w.t()).tanh_().view(length - 1, batch, hidden)
    delta, output = (values[1:] - mu) * (1 - mu**2), target - torch.mm(values[-1], readout.t())
    flat = delta.view(-1, hidden)
    inputs = x.transpose(0, 1).reshape(-1, x.shape[2])
    return [-flat.t() @ inputs, -flat.t() @ values[:length].view(-1, hidden), -output.t() @ values[-1]]


@torch.no_grad()
def lstm(module: Any, x: Tensor, target: Tensor, steps: int, rate: float) -> Gradients:
    """An LSTM over x (B, S, D_in) from the state 0, and a linear readout of every state; target (B, S, D_out)."""
    cell, readout = module.lstm, module.readout
    batch, length, hidden = x.shape[0], x.shape[1], cell.hidden_size
    w = cell.weight_hh_l0
    inputs, y = x.transpose(0, 1).reshape(length * batch, -1), target.transpose(0, 1).reshape(length * batch, -1)
    drive = torch.addmm(cell.bias_ih_l0 + cell.bias_hh_l0, inputs, cell.weight_ih_l0.t())  # (S * B, 4 H), hoisted
    gates = x.new_empty(length, batch, 4 * hidden)
    c, h = x.new_zeros(2, length + 1, batch, hidden)
    for t in range(length):
        z = torch.addmm(drive.view(length, batch, -1)[t], h[t], w.t())
        gates[t] = _activate(z, hidden)
        i, f, g, o = gates[t].split(hidden, -1)
        c[t + 1] = f * c[t] + i * g
        h[t + 1] = o * c[t + 1].tanh()
    for _ in range(steps):
        e_gates, mu_gates, e_c, e_h, e_out, tanh_c = _lstm_errors(drive, gates, c, h, w, readout, y, hidden)
        i, f, g, o = gates.split(hidden, -1)
        move = torch.cat([e_c * g, e_c * c[:-1], e_c * i, e_h * tanh_c], -1) - e_gates
        back = torch.mm((e_gates * _slope(mu_gates, hidden)).view(length * batch, -1)[batch:], w).view(length - 1, batch, hidden)
        move_c = e_h * o * (1 - tanh_c**2) - e_c
        move_c[:-1] += e_c[1:] * f[1:]
        move_h = torch.mm(e_out, readout.weight).view(length, batch, hidden) - e_h
        move_h[:-1] += back
        gates.add_(move, alpha=rate)
        c[1:].add_(move_c, alpha=rate)
        h[1:].add_(move_h, alpha=rate)
    e_gates, mu_gates, _, _, e_out, _ = _lstm_errors(drive, gates, c, h, w, readout, y, hidden)
    delta = (e_gates * _slope(mu_gates, hidden)).view(length * batch, -1)
    bias = -delta.sum(0)
    recurrent = [-delta.t() @ inputs, -delta.t() @ h[:-1].view(length * batch, -1), bias, bias]
    return [*recurrent, -e_out.t() @ h[1:].view(length * batch, -1), -e_out.sum(0)]


def _lstm_errors(
    drive: Tensor, gates: Tensor, c: Tensor, h: Tensor, w: Tensor, readout: nn.Linear, y: Tensor, hidden: int
) -> tuple[Tensor, ...]:
    mu = _activate(torch.addmm(drive, h[:-1].reshape(-1, hidden), w.t()), hidden).view_as(gates)
    i, f, g, o = gates.split(hidden, -1)
    tanh_c = c[1:].tanh()
    e_c, e_h = c[1:] - (f * c[:-1] + i * g), h[1:] - o * tanh_c
    e_out = y - torch.addmm(readout.bias, h[1:].reshape(-1, hidden), readout.weight.t())
    return gates - mu, mu, e_c, e_h, e_out, tanh_c


def _activate(z: Tensor, hidden: int) -> Tensor:
    z[:, : 2 * hidden].sigmoid_()
    z[:, 2 * hidden : 3 * hidden].tanh_()
    z[:, 3 * hidden :].sigmoid_()
    return z


def _slope(mu: Tensor, hidden: int) -> Tensor:
    slope = mu * (1 - mu)
    slope[..., 2 * hidden : 3 * hidden] = 1 - mu[..., 2 * hidden : 3 * hidden] ** 2
    return slope


@dataclass(frozen=True)
class Block:
    """One vertex of a network of convolutions: a product and ReLU, where these are, and max-pooling, where that is.

    Attributes:
        product: the layer with the weights, or None. relu: whether ReLU follows it.
        pool: the side of the pooling's windows, which tile the image, or 0.
    """

    product: nn.Conv2d | nn.Linear | None
    relu: bool
    pool: int

    @staticmethod
    def of(layers: Iterable[nn.Module]) -> Block:
        """Of the layers of a block in their order; a flattening is the product's own affair."""
        found: list[Any] = list(layers)
        product = next((layer for layer in found if isinstance(layer, nn.Conv2d | nn.Linear)), None)
        pool = next((layer for layer in found if isinstance(layer, nn.MaxPool2d)), None)
        side: Any = 0 if pool is None else pool.kernel_size
        return Block(product, product is not None and any(isinstance(layer, nn.ReLU) for layer in found), side)

    def predict(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """mu (B, ..) from the parent's v, and where each maximum of the pooling was found, or None."""
        if isinstance(self.product, nn.Conv2d):
            v = self.product(v)
        elif self.product is not None:
            v = self.product(v.flatten(1))
        if self.relu:
            v = v.relu_()
        return F.max_pool2d(v, self.pool, return_indices=True) if self.pool else (v, None)

    def delta(self, error: Tensor, mu: Tensor, where: Tensor | None) -> Tensor:
        """The error before pooling and ReLU. A pooled ReLU is 0 only where all of its window is: mu alone tells f' there too."""
        if self.relu:
            error = error * (mu > 0)
        if where is None:
            return error
        return F.max_unpool2d(error, where, (self.pool, self.pool))

    def feedback(self, delta: Tensor, parent: Tensor) -> Tensor:
        """(d mu / d v)^T error, of the parent's shape."""
        if isinstance(self.product, nn.Conv2d):
            return grad.conv2d_input(parent.shape, self.product.weight, delta, self.product.stride, self.product.padding)
        return delta if self.product is None else torch.mm(delta, self.product.weight).view_as(parent)

    def learn(self, delta: Tensor, parent: Tensor) -> list[Tensor]:
        """The gradients of the weight and of the bias, where there is one."""
        layer = self.product
        if layer is None:
            return []
        if isinstance(layer, nn.Conv2d):
            weight = grad.conv2d_weight(parent, layer.weight.shape, delta, layer.stride, layer.padding)
        else:
            weight = torch.mm(delta.t(), parent.flatten(1))
        bias = [] if layer.bias is None else [-delta.flatten(2).sum((0, 2)) if delta.dim() == 4 else -delta.sum(0)]
        return [-weight, *bias]


@torch.no_grad()
def convolutions(module: nn.Module, x: Tensor, target: Tensor, steps: int, rate: float, momentum: float = 0.0) -> Gradients:
    """A chain of the blocks that `blocks_of` finds; x (B, C, H, W), target (B, D_out)."""
    blocks = blocks_of(module)
    first, first_where = blocks[0].predict(x)
    values = [first.clone()]
    for block in blocks[1:-1]:
        values.append(block.predict(values[-1])[0])
    velocities = [torch.zeros_like(v) for v in values] if momentum else None
    for _ in range(steps):
        mu, where = _predicted(blocks, values, first, first_where)
        errors = [v - m for v, m in zip([*values, target], mu, strict=True)]
        for k, block in enumerate(blocks[1:]):
            delta = block.delta(errors[k + 1], mu[k + 1], where[k + 1])
            drive = block.feedback(delta, values[k]).sub_(errors[k])
            if velocities is not None:
                drive = velocities[k].mul_(momentum).add_(drive)
            values[k] = values[k].add_(drive, alpha=rate)
    mu, where = _predicted(blocks, values, first, first_where)
    gradients: Gradients = []
    for block, v, m, place, parent in zip(blocks, [*values, target], mu, where, [x, *values], strict=True):
        gradients += block.learn(block.delta(v - m, m, place), parent)
    return gradients


def _predicted(
    blocks: list[Block], values: list[Tensor], first: Tensor, first_where: Tensor | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    found = [(first, first_where), *(block.predict(v) for block, v in zip(blocks[1:], values, strict=True))]
    return [mu for mu, _ in found], [where for _, where in found]


def blocks_of(module: Any) -> list[Block]:
    """The blocks of a CNN or VGG of models.py, each up to and with its value node."""
    parts = [*module.blocks, module.readout] if hasattr(module, "blocks") else list(module.children())
    return [Block.of(part if isinstance(part, nn.Sequential) else [part]) for part in parts]


LOOPS: dict[str, Callable[..., Gradients]] = {"mlp": mlp, "rnn": rnn, "lstm": lstm, "convolutions": convolutions}
