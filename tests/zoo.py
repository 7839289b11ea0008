"""Small float64 models, one for each kind of graph, with an example input and target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """A module in the mode it is to be tested in, its inputs, its target and the loss of PCNetwork."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    target: Tensor
    loss: str = "squared_error"

    def summed_loss(self) -> Tensor:
        """The loss that the exact rules differentiate, summed over the batch, by plain autograd."""
        output = self.module(*self.inputs)
        if self.loss == "cross_entropy":
            return F.cross_entropy(output.flatten(0, -2), self.target.flatten(), reduction="sum")
        return 0.5 * ((output - self.target) ** 2).sum()


def mlp() -> Example:
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3))
    return Example(net.double(), (normal(4, 5),), classes(4, 3), "cross_entropy")


def cnn() -> Example:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(5, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )
    return Example(net.double(), (normal(3, 2, 8, 8),), classes(3, 3), "cross_entropy")


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + y)


def resnet() -> Example:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), ResidualBlock(3), ResidualBlock(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)
    )
    return Example(net.double(), (normal(3, 2, 5, 5),), normal(3, 4))


def resnet_eval() -> Example:
    example = resnet()
    for module in example.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    example.module.eval()
    return example


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(2 + 2 * k, 2, 3, padding=1) for k in range(3))
        self.head = nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, torch.tanh(layer(x))], 1)
        return self.head(x.flatten(1))


def densenet() -> Example:
    return Example(DenseBlock().double(), (normal(2, 2, 4, 4),), normal(2, 3))


class Highway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.gates, self.bodies = nn.ModuleList(nn.Linear(5, 5) for _ in range(2)), nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for gate, body in zip(self.gates, self.bodies, strict=True):
            t = torch.sigmoid(gate(x))
            x = t * torch.tanh(body(x)) + (1 - t) * x
        return self.head(x)


def highway() -> Example:
    return Example(Highway().double(), (normal(3, 4),), normal(3, 2))


class SqueezeExcitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(4, 2), nn.Linear(2, 4)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        s = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.head((x * s[:, :, None, None]).flatten(1))


def squeeze_excitation() -> Example:
    return Example(SqueezeExcitation().double(), (normal(2, 2, 4, 4),), normal(2, 3))


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 3)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T, self.bias)


def tied_autoencoder() -> Example:
    x = normal(3, 6)
    return Example(TiedAutoencoder().double(), (x,), x.clone())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.merge, self.out = nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        return self.out(F.relu(self.merge(torch.cat([a, self.up(b)], 1))))


def unet() -> Example:
    return Example(UNet().double(), (normal(2, 1, 6, 6),), normal(2, 1, 6, 6))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
        self.three = nn.Sequential(
            nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
        self.stem, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.cat([self.one(x), self.three(x), self.pool(x)], 1)
        return self.head(x.mean((2, 3)))


def inception() -> Example:
    return Example(Inception().double(), (normal(3, 1, 4, 4),), classes(3, 3), "cross_entropy")


class Recurrent(nn.Module):
    """Embedding, a recurrent stack and a linear read-out at every position."""

    def __init__(self, kind: type[nn.Module], **options: object):
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.rnn = kind(3, 4, batch_first=True, **options)
        self.head = nn.Linear(8 if options.get("bidirectional") else 4, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


def recurrent(kind: type[nn.Module], **options: object) -> Example:
    return Example(Recurrent(kind, **options).double(), (classes((2, 3), 6),), classes((2, 3), 6), "cross_entropy")


def lstm() -> Example:
    return recurrent(nn.LSTM)


def rnn() -> Example:
    return recurrent(nn.RNN)


def gru() -> Example:
    return recurrent(nn.GRU, num_layers=2)


def bidirectional_gru() -> Example:
    return recurrent(nn.GRU, num_layers=2, bidirectional=True)


class Attention(nn.Module):
    """Two heads written out, with a skip and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        B, S, D = x.shape
        q, k, v = (t.reshape(B, S, 2, D // 2).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-2, -1) / (D // 2) ** 0.5).softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).reshape(B, S, D))
        return self.head(self.norm(x + y).mean(1))


def attention() -> Example:
    return Example(Attention().double(), (normal(2, 3, 4),), normal(2, 3))


def transformer(dropout: float, training: bool) -> Example:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout, batch_first=True)
    net = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2)).double().train(training)
    return Example(net, (normal(2, 3, 3),), normal(2, 3, 2))


def transformer_eval() -> Example:
    return transformer(0.1, training=False)


def transformer_dropout() -> Example:
    return transformer(0.5, training=True)


class TwoInputs(nn.Module):
    """A float and an integer input, a shared layer, and a slice of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.shared, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(6, 2)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        a = torch.tanh(self.shared(x))
        b = torch.tanh(self.shared(a * self.words(words)))
        return self.head(torch.cat([a, b[:, :2]], 1))


def two_inputs() -> Example:
    return Example(TwoInputs().double(), (normal(3, 4), classes(3, 5)), normal(3, 2))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def classes(shape: int | tuple[int, ...], count: int) -> Tensor:
    return torch.randint(count, (shape,) if isinstance(shape, int) else shape)


BUILDERS: dict[str, Callable[[], Example]] = {
    build.__name__: build
    for build in (
        mlp,
        cnn,
        resnet,
        resnet_eval,
        densenet,
        highway,
        squeeze_excitation,
        tied_autoencoder,
        unet,
        inception,
        lstm,
        rnn,
        gru,
        bidirectional_gru,
        attention,
        transformer_eval,
        transformer_dropout,
        two_inputs,
    )
}


def build(name: str, seed: int = 0) -> Example:
    torch.manual_seed(seed)
    return BUILDERS[name]()
