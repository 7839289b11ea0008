"""The models that are timed, each with the shapes of one sample of its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pckernels.nn import CNNModule, MLPModule


class RNN(nn.Module):
    """(B, S, inputs) -> (B, classes): a tanh layer from the state 0, and a linear readout of its last state; no biases."""

    def __init__(self, inputs: int = 57, hidden: int = 256, classes: int = 18):
        super().__init__()
        self.rnn = nn.RNN(inputs, hidden, bias=False, batch_first=True)
        self.readout = nn.Linear(hidden, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.rnn(x)[0][:, -1])


class LSTM(nn.Module):
    """(B, S, inputs) -> (B, S, classes): an LSTM from the state 0, and a linear readout of every state."""

    def __init__(self, inputs: int = 65, hidden: int = 256, classes: int = 65):
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.lstm(x)[0])


class VGG5(nn.Module):
    """(B, 3, 32, 32) -> (B, classes): four 3x3 convolutions with ReLU and max-pooling, then a linear layer (PCX's VGG5)."""

    def __init__(self, classes: int = 10, channels: Sequence[int] = (128, 256, 512, 512)):
        super().__init__()
        widths = [3, *channels]
        blocks = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)) for a, b in pairwise(widths)]
        self.blocks = nn.ModuleList(blocks)
        self.readout = nn.Linear(widths[-1] * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.readout(x.flatten(1))


class TransformerBlock(nn.Module):
    """(B, S, width) -> (B, S, classes): one encoder layer and a linear readout of every position."""

    def __init__(self, width: int = 64, heads: int = 4, classes: int = 32):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.readout = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.encoder(x))


@dataclass(frozen=True)
class Model:
    """A model and its data.

    Attributes:
        name: of the model alone, as it is printed.
        build: makes the module, float32, on the CPU.
        x, target: shapes of one sample.
        loop: the careful loop by hand of eager.LOOPS that runs it, or None.
        value_nodes: as PCNetwork takes them. precision: its vertices that have one.
        width, depth: of the axes of plots; 0 where there is no such axis.
    """

    name: str
    build: Callable[[], nn.Module]
    x: tuple[int, ...]
    target: tuple[int, ...]
    loop: str | None = None
    value_nodes: str | tuple[str, ...] = "layer"
    precision: tuple[tuple[str, float], ...] = ()
    width: int = 0
    depth: int = 0

    @property
    def pc(self) -> dict[str, Any]:
        """Arguments of PCNetwork: gradients are those of the summed loss, so that nobody divides by the batch."""
        nodes = self.value_nodes
        options = {"precision": dict(self.precision)} if self.precision else {}
        return {"value_nodes": nodes if isinstance(nodes, str) else list(nodes), "reduction": "sum", **options}

    def data(self, batch: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """x (B, ..) and target (B, ..), normally distributed."""
        return torch.randn(batch, *self.x, device=device), torch.randn(batch, *self.target, device=device)


def mlp(sizes: Sequence[int] = (784, 300, 300, 10)) -> Model:
    """A perceptron with ReLU."""
    name = "MLP " + "-".join(map(str, sizes)) if len(sizes) <= 5 else f"MLP of {len(sizes) - 1} layers, width {sizes[1]}"
    return Model(name, lambda: MLPModule(sizes), (sizes[0],), (sizes[-1],), "mlp", width=sizes[1], depth=len(sizes) - 1)


def deep_mlp(layers: int, width: int) -> Model:
    """784 inputs, layers of one width, 10 outputs; drawn so that a signal neither fades nor grows on its way (He et al. 2015)."""
    sizes = (784, *[width] * (layers - 1), 10)

    def build() -> nn.Module:
        module = MLPModule(sizes)
        for layer in module:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return module

    return Model(f"MLP of {layers} layers, width {width}", build, (784,), (10,), "mlp", width=width, depth=layers)


CNN_NODES = ("conv1", "pool", "conv2", "fc1", "fc2", "fc3")
CNN = Model("the paper's CNN", CNNModule, (3, 32, 32), (10,), "convolutions", CNN_NODES)
VGG = Model("VGG5", VGG5, (3, 32, 32), (10,), "convolutions", ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "readout"))
NAMES_RNN = Model("RNN 256, 8 letters", RNN, (8, 57), (18,), "rnn")
TRANSFORMER = Model("transformer block, width 64, 16 positions", TransformerBlock, (16, 64), (16, 32))


def lstm(hidden: int, length: int) -> Model:
    """A character LSTM over `length` letters."""
    return Model(f"LSTM {hidden}, {length} letters", lambda: LSTM(hidden=hidden), (length, 65), (length, 65), "lstm")
