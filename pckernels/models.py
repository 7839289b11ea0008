"""Small deterministic models, one for each kind of graph: what `pckernels verify` checks the rules on.

Plain nn.Modules, written as anyone would write them. Float64, a few hundred parameters each, so that the literal
dynamics of every rule run in seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """A model with the data and the loss it is checked on. A tuple `x` is several inputs, a dict keyword arguments."""

    name: str
    module: nn.Module
    x: Any
    target: Any
    loss: Any = "squared_error"


class ResidualBlock(nn.Module):
    """(B, C, H, W) -> (B, C, H, W): a skip round two convolutions, with BatchNorm in training mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))


class DenseBlock(nn.Module):
    """(B, C, H, W) -> (B, C + layers * growth, H, W): every layer reads all the maps before it."""

    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], dim=1)
        return x


class Recurrent(nn.Module):
    """(B, S, D_in) -> (B, D_out): a recurrent layer, batch first, and a linear read-out of its last time step."""

    def __init__(self, layer: nn.RNNBase, outputs: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.layer(x)
        return self.head(h[:, -1])


class Transformer(nn.Module):
    """Tokens (B, S) -> next-token logits (B, S, V): embedding, one encoder layer, read-out."""

    def __init__(self, vocabulary: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.encoder = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)))


def mlp() -> Case:
    module = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3))
    return Case("mlp", module, torch.randn(5, 6), torch.randn(5, 3))


def cnn() -> Case:
    convolutions = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2), nn.ReLU(), nn.Flatten()]
    module = nn.Sequential(*convolutions, nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 4))
    return Case("cnn", module, torch.randn(4, 2, 8, 8), torch.randint(4, (4,)), "cross_entropy")


def rnn() -> Case:
    return Case("rnn", Recurrent(nn.RNN(4, 6, batch_first=True), 3), torch.randn(3, 5, 4), torch.randn(3, 3))


def lstm() -> Case:
    return Case("lstm", Recurrent(nn.LSTM(4, 5, batch_first=True), 3), torch.randn(3, 4, 4), torch.randn(3, 3))


def gru() -> Case:
    return Case("gru", Recurrent(nn.GRU(4, 5, batch_first=True), 3), torch.randn(3, 4, 4), torch.randn(3, 3))


def resnet() -> Case:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), ResidualBlock(4), ResidualBlock(4), *head)
    return Case("resnet", module, torch.randn(4, 2, 5, 5), torch.randint(3, (4,)), "cross_entropy")


def densenet() -> Case:
    head = [nn.Conv2d(9, 4, 1), nn.ReLU(), nn.AvgPool2d(5), nn.Flatten(), nn.Linear(4, 3)]
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), DenseBlock(3, 2, 3), *head)
    return Case("densenet", module, torch.randn(3, 2, 5, 5), torch.randn(3, 3))


def transformer() -> Case:
    tokens = torch.randint(7, (3, 6))
    return Case("transformer", Transformer(7, 8, 2), tokens[:, :-1], tokens[:, 1:], "cross_entropy")


BUILDERS: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "cnn": cnn,
    "rnn": rnn,
    "lstm": lstm,
    "gru": gru,
    "resnet": resnet,
    "densenet": densenet,
    "transformer": transformer,
}


def build(name: str) -> Case:
    """The named model and its data, in float64, the same at every call; the caller's random state is left alone."""
    if name not in BUILDERS:
        raise ValueError(f"There is no model {name!r}; choose from {', '.join(BUILDERS)}, or name your own as module:function.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return converted(BUILDERS[name](), torch.float64)


def converted(case: Case, dtype: torch.dtype) -> Case:
    """The case with its module's floating-point parameters, inputs and targets in `dtype`."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    x, target = torch.utils._pytree.tree_map(cast, (case.x, case.target))
    return Case(case.name, case.module.to(dtype), x, target, case.loss)
