"""nn.RNN, nn.LSTM and nn.GRU (and their single cells) unrolled over time, with every gate marked as a value node.

Only the trace runs these: a shadow of the user's module takes one of the classes below and shares the user's
parameters. `mark` leaves the name of a value node in the captured graph and computes nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library, nn

from pckernels.errors import Unsupported

_library = library.Library("pckernels", "FRAGMENT")
_library.define("mark(Tensor x, str name, int time) -> Tensor")
_library.impl("mark", lambda x, name, time: x.clone(), "CompositeExplicitAutograd")
MARK = torch.ops.pckernels.mark.default


def mark(x: Tensor, name: str, time: int) -> Tensor:
    """`x`, remembered by the trace as the prediction of the value node `name` at time step `time` (-1: no time)."""
    return torch.ops.pckernels.mark(x, name, time)


Weights = tuple[Tensor, Tensor | None]  # a gate's (weight, bias)


def _products(weight: Tensor, bias: Tensor | None, gates: int) -> list[Weights]:
    # Gates as slices of one weight: each gate is a vertex with parameters of its own.
    if gates == 1:
        return [(weight, bias)]
    biases: Sequence[Tensor | None] = [None] * gates if bias is None else bias.chunk(gates)
    return list(zip(weight.chunk(gates), biases, strict=True))


def _apply(weights: Weights, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weights[0], weights[1])


class _Cell:
    """One recurrent cell: gates' weights for input and hidden state, and a step that names its value nodes."""

    gates: int

    def __init__(self, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None = None):
        self.input = _products(w_ih, b_ih, self.gates)
        self.hidden = _products(w_hh, b_hh, self.gates)
        self.projection = w_hr

    def step(self, x: Tensor, state: tuple[Tensor, ...], name: str, time: int) -> tuple[Tensor, ...]:
        """The state after a time step, (h,) or (h, c), with its value nodes marked."""
        raise NotImplementedError

    def drive(self, gate: int, x: Tensor, h: Tensor) -> Tensor:
        """The pre-activation of a gate: input and hidden products summed inside the gate."""
        return _apply(self.input[gate], x) + _apply(self.hidden[gate], h)


class _Elman(_Cell):
    gates = 1
    activation: Callable[[Tensor], Tensor] = staticmethod(torch.tanh)

    def step(self, x: Tensor, state: tuple[Tensor, ...], name: str, time: int) -> tuple[Tensor, ...]:
        return (mark(self.activation(self.drive(0, x, state[0])), f"{name}.h", time),)


class _ElmanReLU(_Elman):
    activation = staticmethod(torch.relu)


class _LSTM(_Cell):
    gates = 4

    def step(self, x: Tensor, state: tuple[Tensor, ...], name: str, time: int) -> tuple[Tensor, ...]:
        h, c = state
        i = mark(torch.sigmoid(self.drive(0, x, h)), f"{name}.i", time)
        f = mark(torch.sigmoid(self.drive(1, x, h)), f"{name}.f", time)
        g = mark(torch.tanh(self.drive(2, x, h)), f"{name}.g", time)
        o = mark(torch.sigmoid(self.drive(3, x, h)), f"{name}.o", time)
        c = mark(f * c + i * g, f"{name}.c", time)
        h = o * torch.tanh(c)
        if self.projection is not None:
            h = torch.nn.functional.linear(h, self.projection)
        return mark(h, f"{name}.h", time), c


class _GRU(_Cell):
    gates = 3

    def step(self, x: Tensor, state: tuple[Tensor, ...], name: str, time: int) -> tuple[Tensor, ...]:
        h = state[0]
        r = mark(torch.sigmoid(self.drive(0, x, h)), f"{name}.r", time)
        z = mark(torch.sigmoid(self.drive(1, x, h)), f"{name}.z", time)
        n = mark(torch.tanh(_apply(self.input[2], x) + r * _apply(self.hidden[2], h)), f"{name}.n", time)
        return (mark((1 - z) * n + z * h, f"{name}.h", time),)


def _cell_class(module: nn.Module) -> type[_Cell]:
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return _LSTM
    if isinstance(module, nn.GRU | nn.GRUCell):
        return _GRU
    relu = getattr(module, "nonlinearity", "tanh") == "relu"
    return _ElmanReLU if relu else _Elman


def _layer_cell(module: nn.RNNBase, suffix: str) -> _Cell:
    def part(kind: str) -> Any:
        return getattr(module, f"{kind}_{suffix}", None)

    return _cell_class(module)(part("weight_ih"), part("weight_hh"), part("bias_ih"), part("bias_hh"), part("weight_hr"))


def _unroll(cell: _Cell, xs: list[Tensor], state: tuple[Tensor, ...], name: str, reverse: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    outputs: list[Tensor] = []
    for time in reversed(range(len(xs))) if reverse else range(len(xs)):
        state = cell.step(xs[time], state, f"{name}.t{time}", time)
        outputs.append(state[0])
    return (outputs[::-1] if reverse else outputs), state


def _check_input(module: nn.RNNBase, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise Unsupported(f"{type(module).__name__} on a PackedSequence cannot be traced. Pass padded tensors, or use pck.backward(loss).")
    if x.dim() not in (2, 3):
        raise ValueError(f"{type(module).__name__} takes (sequence, features) or a batch of such; got {x.dim()} dimensions.")
    if x.shape[-1] != module.input_size:
        raise ValueError(f"{type(module).__name__} takes {module.input_size} features; got {x.shape[-1]}.")


class _Unrolled:
    """What the shadows of nn.RNN, nn.LSTM and nn.GRU share: layers and directions in turn, one step at a time."""

    calls: int  # set by the trace
    path: str

    def forward(self, x: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None):  # type: ignore[no-untyped-def]
        _check_input(self, x)  # type: ignore[arg-type]
        batched = x.dim() == 3
        dim = 1 if self.batch_first and batched else 0  # type: ignore[attr-defined]
        xs = [x.select(dim, time) for time in range(x.shape[dim])]
        outputs, finals = self._layers(xs, self._initial(xs[0], hx), call_name(self))
        output = torch.stack(outputs, dim)
        state = tuple(torch.stack([final[k] for final in finals]) for k in range(len(finals[0])))
        return output, (state if isinstance(self, nn.LSTM) else state[0])

    def _initial(self, x: Tensor, hx: Tensor | tuple[Tensor, ...] | None) -> list[tuple[Tensor, ...]]:
        directions = 2 if self.bidirectional else 1  # type: ignore[attr-defined]
        count = self.num_layers * directions  # type: ignore[attr-defined]
        sizes = [self.proj_size or self.hidden_size]  # type: ignore[attr-defined]
        if isinstance(self, nn.LSTM):
            sizes.append(self.hidden_size)
        if hx is None:
            return [tuple(x.new_zeros(*x.shape[:-1], size) for size in sizes) for _ in range(count)]
        parts = hx if isinstance(hx, tuple | list) else (hx,)
        return [tuple(part[k] for part in parts) for k in range(count)]

    def _layers(self, xs: list[Tensor], states: list[tuple[Tensor, ...]], name: str) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):  # type: ignore[attr-defined]
            if layer > 0 and self.dropout:  # type: ignore[attr-defined]
                xs = _dropout(xs, self.dropout, self.training)  # type: ignore[attr-defined]
            xs = self._directions(xs, layer, states, finals, name)
        return xs, finals

    def _directions(
        self, xs: list[Tensor], layer: int, states: list[tuple[Tensor, ...]], finals: list[tuple[Tensor, ...]], name: str
    ) -> list[Tensor]:
        sides = []
        for suffix in [f"l{layer}", f"l{layer}_reverse"][: 2 if self.bidirectional else 1]:  # type: ignore[attr-defined]
            cell = _layer_cell(self, suffix)  # type: ignore[arg-type]
            outputs, final = _unroll(cell, xs, states[len(finals)], f"{name}.{suffix}", suffix.endswith("reverse"))
            sides.append(outputs)
            finals.append(final)
        return [torch.cat(parts, -1) if len(parts) > 1 else parts[0] for parts in zip(*sides, strict=True)]


def _dropout(xs: list[Tensor], p: float, training: bool) -> list[Tensor]:
    # One mask for the whole sequence, drawn from shapes alone: no step then depends on another step's value.
    mask = torch.nn.functional.dropout(xs[0].new_ones(len(xs), *xs[0].shape), p, training)
    return [x * mask[time] for time, x in enumerate(xs)]


def call_name(shadow) -> str:  # type: ignore[no-untyped-def]
    """The module's path, with `#2` for its second call; counts the call."""
    shadow.calls += 1
    path = shadow.path or type(shadow).__name__.lower()
    return path if shadow.calls == 1 else f"{path}#{shadow.calls}"


class _UnrolledRNN(_Unrolled, nn.RNN):  # type: ignore[misc]
    pass


class _UnrolledLSTM(_Unrolled, nn.LSTM):  # type: ignore[misc]
    pass


class _UnrolledGRU(_Unrolled, nn.GRU):  # type: ignore[misc]
    pass


class _Single:
    """What the shadows of nn.RNNCell, nn.LSTMCell and nn.GRUCell share: the n-th call is time step n - 1."""

    calls: int
    path: str

    def forward(self, x: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None):  # type: ignore[no-untyped-def]
        time = self.calls
        name = call_name(self)
        lstm = isinstance(self, nn.LSTMCell)
        if hx is None:
            zeros = x.new_zeros(*x.shape[:-1], self.hidden_size)  # type: ignore[attr-defined]
            hx = (zeros, zeros) if lstm else zeros
        module: Any = self
        cell = _cell_class(module)(module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
        state = cell.step(x, hx if isinstance(hx, tuple) else (hx,), name, time)
        return state if lstm else state[0]


class _SingleRNN(_Single, nn.RNNCell):
    pass


class _SingleLSTM(_Single, nn.LSTMCell):
    pass


class _SingleGRU(_Single, nn.GRUCell):
    pass


UNROLLED: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: _UnrolledRNN,
    nn.LSTM: _UnrolledLSTM,
    nn.GRU: _UnrolledGRU,
    nn.RNNCell: _SingleRNN,
    nn.LSTMCell: _SingleLSTM,
    nn.GRUCell: _SingleGRU,
}
