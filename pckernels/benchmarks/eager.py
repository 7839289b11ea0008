"""Strict predictive coding written by hand, as carefully as plain PyTorch allows: what the engine is measured against.

All time steps of a layer in one product, addmm for biases, derivatives from the predictions, and the first product, whose
input is clamped, computed once. Values are kept as they are, not as displacements, as anyone would write it. Each function
returns the gradients of the summed loss in the order of the module's parameters. `chain` leaves derivatives to PyTorch, for models in
which nobody writes them down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


def chain(module: nn.Module, x: Tensor, target: Tensor, steps: int, rate: float, momentum: float = 0.0) -> Gradients:
    """Any chain of blocks, convolutions too: each step descends F by automatic differentiation, which reads each block once forwards and
    once backwards. The blocks are cut where `blocks_of` says; x (B, ..), target (B, D_out)."""
    blocks = blocks_of(module)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.no_grad():
        values = [blocks[0](x)]
        first = values[0].clone()
        for block in blocks[1:-1]:
            values.append(block(values[-1]))
    velocities = [torch.zeros_like(value) for value in values]
    for _ in range(steps):
        moving = [value.requires_grad_() for value in values]
        slopes = torch.autograd.grad(_chain_energy(blocks, first, moving, target), moving)
        with torch.no_grad():
            for velocity, slope in zip(velocities, slopes, strict=True):
                velocity.mul_(momentum).sub_(slope)
            values = [value.detach().add_(velocity, alpha=rate) for value, velocity in zip(values, velocities, strict=True)]
    fixed = [value.detach() for value in values]
    with torch.enable_grad():
        return list(torch.autograd.grad(_chain_energy(blocks, blocks[0](x), fixed, target), parameters))


def blocks_of(module: Any) -> list[Callable[[Tensor], Tensor]]:
    """The blocks of a CNN or VGG of models.py, each up to and with its value node."""
    if hasattr(module, "blocks"):
        readout = module.readout
        return [*module.blocks, lambda v: readout(v.flatten(1))]
    return list(module.children())


def _chain_energy(blocks: list[Callable[[Tensor], Tensor]], first: Tensor, values: list[Tensor], target: Tensor) -> Tensor:
    mu = [first, *(block(value) for block, value in zip(blocks[1:], values, strict=True))]
    return 0.5 * torch.stack([(v - m).square().sum() for v, m in zip([*values, target], mu, strict=True)]).sum()


LOOPS: dict[str, Callable[..., Gradients]] = {"mlp": mlp, "rnn": rnn, "lstm": lstm, "chain": chain}
