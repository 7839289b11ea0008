"""Vertex functions in plain numpy, with every Jacobian transpose derived by hand (float64, batch first)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray
Gradients = dict[str, Array]


class Layer:
    """A function of one array; `feedback` is its transposed Jacobian, `learn` that with respect to its parameters."""

    def forward(self, x: Array) -> Array:
        raise NotImplementedError

    def feedback(self, x: Array, g: Array) -> Array:
        """(d forward(x) / d x)^T g."""
        raise NotImplementedError

    def learn(self, x: Array, g: Array) -> Gradients:
        """(d forward(x) / d theta)^T g, by parameter name."""
        return {}

    def parameters(self) -> Gradients:
        """The arrays that it reads and learns, by parameter name; what is written into them is what it computes with."""
        return {}


class Linear(Layer):
    """y = x W^T + b over the last dimension; rows of a larger parameter when `rows` is given."""

    def __init__(self, name: str, weight: Array, bias: Array | None, weight_name: str = "", bias_name: str = "", rows: slice | None = None):
        self.weight, self.bias = weight, bias
        self.weight_name = weight_name or f"{name}.weight"
        self.bias_name = bias_name or f"{name}.bias"
        self.rows = rows or slice(0, weight.shape[0])

    def parameters(self) -> Gradients:
        return {self.weight_name: self.weight} | ({} if self.bias is None else {self.bias_name: self.bias})

    def forward(self, x: Array) -> Array:
        y = x @ self.weight[self.rows].T
        return y if self.bias is None else y + self.bias[self.rows]

    def feedback(self, x: Array, g: Array) -> Array:
        return g @ self.weight[self.rows]

    def learn(self, x: Array, g: Array) -> Gradients:
        weight = np.zeros_like(self.weight)
        weight[self.rows] = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        if self.bias is None:
            return {self.weight_name: weight}
        bias = np.zeros_like(self.bias)
        bias[self.rows] = g.reshape(-1, g.shape[-1]).sum(0)
        return {self.weight_name: weight, self.bias_name: bias}


class Conv(Layer):
    """Square cross-correlation, stride 1: y[n,o,i,j] = b[o] + sum W[o,c,a,b] x[n,c,i+a,j+b]."""

    def __init__(self, name: str, weight: Array, bias: Array | None, padding: int = 0):
        self.name, self.weight, self.bias, self.padding = name, weight, bias, padding
        self.taps = [(a, b) for a in range(weight.shape[2]) for b in range(weight.shape[3])]

    def parameters(self) -> Gradients:
        return {f"{self.name}.weight": self.weight} | ({} if self.bias is None else {f"{self.name}.bias": self.bias})

    def _pad(self, x: Array) -> Array:
        p = self.padding
        return np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))

    def _size(self, x: Array) -> tuple[int, int]:
        return x.shape[2] + 2 * self.padding - self.weight.shape[2] + 1, x.shape[3] + 2 * self.padding - self.weight.shape[3] + 1

    def forward(self, x: Array) -> Array:
        (h, w), padded = self._size(x), self._pad(x)
        y = sum(np.einsum("oc,nchw->nohw", self.weight[:, :, a, b], padded[:, :, a : a + h, b : b + w]) for a, b in self.taps)
        return y if self.bias is None else y + self.bias[:, None, None]

    def feedback(self, x: Array, g: Array) -> Array:
        (h, w), back = self._size(x), np.zeros_like(self._pad(x))
        for a, b in self.taps:
            back[:, :, a : a + h, b : b + w] += np.einsum("oc,nohw->nchw", self.weight[:, :, a, b], g)
        p = self.padding
        return back[:, :, p : back.shape[2] - p, p : back.shape[3] - p]

    def learn(self, x: Array, g: Array) -> Gradients:
        (h, w), padded, weight = self._size(x), self._pad(x), np.zeros_like(self.weight)
        for a, b in self.taps:
            weight[:, :, a, b] = np.einsum("nohw,nchw->oc", g, padded[:, :, a : a + h, b : b + w])
        gradients = {f"{self.name}.weight": weight}
        if self.bias is not None:
            gradients[f"{self.name}.bias"] = g.sum((0, 2, 3))
        return gradients


class MaxPool(Layer):
    """Maximum over 2x2 windows, stride 2; the first maximum takes the whole feedback."""

    def _windows(self, x: Array) -> Array:
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h // 2, w // 2, 4)

    def forward(self, x: Array) -> Array:
        return self._windows(x).max(-1)

    def feedback(self, x: Array, g: Array) -> Array:
        n, c, h, w = x.shape
        winner = np.eye(4)[self._windows(x).argmax(-1)] * g[..., None]
        return winner.reshape(n, c, h // 2, w // 2, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(x.shape)


class FrozenBatchNorm(Layer):
    """BatchNorm in eval mode: an affine map per channel from running statistics."""

    def __init__(self, name: str, weight: Array, bias: Array, mean: Array, var: Array, eps: float):
        self.name, self.bias, self.mean = name, bias, mean
        self.inverse = 1.0 / np.sqrt(var + eps)
        self.weight = weight

    def parameters(self) -> Gradients:
        return {f"{self.name}.weight": self.weight, f"{self.name}.bias": self.bias}

    def _normalised(self, x: Array) -> Array:
        return (x - self.mean[:, None, None]) * self.inverse[:, None, None]

    def forward(self, x: Array) -> Array:
        return self.weight[:, None, None] * self._normalised(x) + self.bias[:, None, None]

    def feedback(self, x: Array, g: Array) -> Array:
        return g * (self.weight * self.inverse)[:, None, None]

    def learn(self, x: Array, g: Array) -> Gradients:
        return {f"{self.name}.weight": (g * self._normalised(x)).sum((0, 2, 3)), f"{self.name}.bias": g.sum((0, 2, 3))}


class ReLU(Layer):
    def forward(self, x: Array) -> Array:
        return np.maximum(x, 0.0)

    def feedback(self, x: Array, g: Array) -> Array:
        return g * (x > 0.0)


class Tanh(Layer):
    def forward(self, x: Array) -> Array:
        return np.tanh(x)

    def feedback(self, x: Array, g: Array) -> Array:
        return g * (1.0 - np.tanh(x) ** 2)


class Sigmoid(Layer):
    def forward(self, x: Array) -> Array:
        return 1.0 / (1.0 + np.exp(-x))

    def feedback(self, x: Array, g: Array) -> Array:
        s = self.forward(x)
        return g * s * (1.0 - s)


class Flatten(Layer):
    def forward(self, x: Array) -> Array:
        return x.reshape(x.shape[0], -1)

    def feedback(self, x: Array, g: Array) -> Array:
        return g.reshape(x.shape)


class Function:
    """mu = f(parents): a join of the parents, then a chain of layers. Subclasses say how parents join."""

    def __init__(self, *chain: Layer):
        self.chain = chain

    def join(self, parents: Sequence[Array]) -> Array:
        (only,) = parents
        return only

    def split(self, parents: Sequence[Array], g: Array) -> list[Array]:
        """The feedback of `join` to each parent."""
        return [g]

    def learn_join(self, parents: Sequence[Array], g: Array) -> Gradients:
        return {}

    def parameters(self) -> Gradients:
        """Of all its layers."""
        return {name: array for layer in self.chain for name, array in layer.parameters().items()}

    def forward(self, parents: Sequence[Array]) -> Array:
        return self._inputs(parents)[-1]

    def pull_back(self, parents: Sequence[Array], g: Array) -> tuple[list[Array], Gradients]:
        """(d mu / d parent)^T g for every parent, and (d mu / d theta)^T g by name."""
        inputs, gradients = self._inputs(parents), {}
        for layer, x in zip(reversed(self.chain), reversed(inputs[:-1]), strict=True):
            accumulate(gradients, layer.learn(x, g))
            g = layer.feedback(x, g)
        accumulate(gradients, self.learn_join(parents, g))
        return self.split(parents, g), gradients

    def _inputs(self, parents: Sequence[Array]) -> list[Array]:
        trail = [self.join(parents)]
        for layer in self.chain:
            trail.append(layer.forward(trail[-1]))
        return trail


class Add(Function):
    def join(self, parents: Sequence[Array]) -> Array:
        return sum(parents[1:], parents[0])

    def split(self, parents: Sequence[Array], g: Array) -> list[Array]:
        return [g for _ in parents]


class LinearSum(Function):
    """The sum of one linear map per parent, as in a gate: W x + U h."""

    def __init__(self, maps: Sequence[Linear], *chain: Layer):
        super().__init__(*chain)
        self.maps = maps

    def parameters(self) -> Gradients:
        return super().parameters() | {name: array for m in self.maps for name, array in m.parameters().items()}

    def join(self, parents: Sequence[Array]) -> Array:
        return sum(m.forward(x) for m, x in zip(self.maps, parents, strict=True))

    def split(self, parents: Sequence[Array], g: Array) -> list[Array]:
        return [m.feedback(x, g) for m, x in zip(self.maps, parents, strict=True)]

    def learn_join(self, parents: Sequence[Array], g: Array) -> Gradients:
        gradients: Gradients = {}
        for m, x in zip(self.maps, parents, strict=True):
            accumulate(gradients, m.learn(x, g))
        return gradients


class Cell(Function):
    """c_t = f c_{t-1} + i g, parents (f, i, g, c_{t-1})."""

    def join(self, parents: Sequence[Array]) -> Array:
        f, i, g, c = parents
        return f * c + i * g

    def split(self, parents: Sequence[Array], e: Array) -> list[Array]:
        f, i, g, c = parents
        return [e * c, e * g, e * i, e * f]


class Hidden(Function):
    """h_t = o tanh(c_t), parents (o, c_t)."""

    def join(self, parents: Sequence[Array]) -> Array:
        o, c = parents
        return o * np.tanh(c)

    def split(self, parents: Sequence[Array], e: Array) -> list[Array]:
        o, c = parents
        return [e * np.tanh(c), e * o * (1.0 - np.tanh(c) ** 2)]


def accumulate(into: Gradients, gradients: Gradients) -> None:
    for name, value in gradients.items():
        into[name] = into[name] + value if name in into else value
