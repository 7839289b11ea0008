"""Ready-made predictive coding networks: a perceptron, and the CNN, RNN and LSTM of Millidge et al. 2020 (arXiv 2006.04182).

Each is a `PCNetwork` over a plain module of the same name (`MLPModule`, `CNNModule`, ..), which knows nothing of
predictive coding: backprop trains the very same module, `network.module`.

The networks of the paper learn as its experiments do unless told otherwise: fixed predictions at rate 0.1, squared error
against one-hot targets, gradients summed over the batch (`reduction="sum"`). `MLP` is not of that paper, and keeps the
batch mean. Every keyword of `PCNetwork` may be given to change that. The published code also multiplies its gradients by 4 to 8,
clamps them, and learns from errors one step old; none of that is done here.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .network import PCNetwork
from .rules import FixedPrediction, Strict

STD = 0.05  # of every initial weight in the paper
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}


class MLPModule(nn.Sequential):
    """(B, sizes[0]) -> (B, sizes[-1]): linear layers with an activation between them, none after the last."""

    def __init__(self, sizes: Sequence[int], activation: str = "relu", bias: bool = True) -> None:
        _require_sizes(sizes, 2, "sizes")
        if activation not in ACTIVATIONS:
            raise ValueError(f"There is no activation {activation!r}; choose from {', '.join(ACTIVATIONS)}.")
        super().__init__()
        for index, (inputs, outputs) in enumerate(pairwise(sizes)):
            if index:
                self.append(ACTIVATIONS[activation]())
            self.append(nn.Linear(inputs, outputs, bias=bias))


class CNNModule(nn.Module):
    """(B, C, H, W) -> (B, classes): conv to 6 maps | maxpool 2 | conv to 16 | linear 200 | 150 | classes, ReLU, no biases.

    Args:
        image: (C, H, W) of one input; (3, 32, 32) gives the paper's 1600 features after the second convolution.
        kernel: of both convolutions; None takes the paper's 5, and 3 for images under 28 pixels.
        std: of the initial weights, N(0, std^2); None takes 1 / sqrt(fan_in) (LeCun et al. 1998), which small
            images need: with 0.05 their signal dies out on the way.
    """

    def __init__(self, image: Sequence[int] = (3, 32, 32), classes: int = 10, kernel: int | None = None, std: float | None = STD) -> None:
        if len(image) != 3:
            raise ValueError(f"image must be (C, H, W), the shape of one input; got {tuple(image)}.")
        _require_sizes(image, 3, "image")
        _require_sizes([classes], 1, "classes")
        super().__init__()
        channels, height, width = image
        kernel = kernel or (5 if min(height, width) >= 28 else 3)
        rows, columns = (_after_convolutions(size, kernel) for size in (height, width))
        self.conv1 = nn.Sequential(nn.Conv2d(channels, 6, kernel, bias=False), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Sequential(nn.Conv2d(6, 16, kernel, bias=False), nn.ReLU())
        self.fc1 = nn.Sequential(nn.Flatten(), nn.Linear(16 * rows * columns, 200, bias=False), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(200, 150, bias=False), nn.ReLU())
        self.fc3 = nn.Linear(150, classes, bias=False)
        initialise(self, std)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(self.conv2(self.pool(self.conv1(x))))))


class RNNModule(nn.Module):
    """(B, S, inputs) -> (B, classes): a tanh layer over the sequence, and a linear readout of its last state; no biases.

    The initial state `h0` (hidden,) is drawn once and is not trained.
    """

    def __init__(self, inputs: int = 57, hidden: int = 256, classes: int = 18) -> None:
        _require_sizes([inputs, hidden, classes], 3, "inputs, hidden and classes")
        super().__init__()
        self.rnn = nn.RNN(inputs, hidden, bias=False, batch_first=True)
        self.readout = nn.Linear(hidden, classes, bias=False)
        self.h0: Tensor
        self.register_buffer("h0", STD * torch.randn(hidden))
        initialise(self, STD)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x, _batched(self.h0, x))
        return self.readout(states[:, -1])


class LSTMModule(nn.Module):
    """Characters (B, S) int64 -> (B, S, vocabulary): a fixed embedding, an LSTM, a linear readout at every step.

    The embedding, as wide as the vocabulary, is drawn from N(0, 1) and is not trained, nor are the initial states `h0`
    and `c0` (hidden,). Biases start at 0; a gate has two, as in every nn.LSTM, which move alike.
    """

    def __init__(self, vocabulary: int = 65, hidden: int = 1056) -> None:
        _require_sizes([vocabulary, hidden], 2, "vocabulary and hidden")
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, vocabulary)
        self.embedding.weight.requires_grad_(False)
        self.lstm = nn.LSTM(vocabulary, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, vocabulary)
        self.h0: Tensor
        self.c0: Tensor
        self.register_buffer("h0", STD * torch.randn(hidden))
        self.register_buffer("c0", STD * torch.randn(hidden))
        initialise(self.lstm, STD)
        initialise(self.readout, STD)

    def forward(self, characters: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(characters), self._start(characters))
        return self.readout(states)

    @torch.no_grad()
    def generate(self, start: Tensor, length: int, temperature: float, generator: torch.Generator | None = None) -> Tensor:
        """Continue the characters `start` (S,) by `length` more, (length,) int64.

        Each is drawn from softmax(output / temperature). Outputs trained on the squared error lie between 0 and 1 and want
        a temperature of about 0.05, the paper's factor of 20; logits want about 1.
        """
        characters, state = start[None], self._start(start[None])
        written = []
        for _ in range(length):
            states, state = self.lstm(self.embedding(characters), state)
            chances = torch.softmax(self.readout(states[:, -1]) / temperature, dim=-1)
            characters = torch.multinomial(chances.cpu(), 1, generator=generator).to(start.device)
            written.append(characters[0])
        return torch.cat(written) if written else start[:0]

    def _start(self, characters: Tensor) -> tuple[Tensor, Tensor]:
        return _batched(self.h0, characters), _batched(self.c0, characters)


class MLP(PCNetwork):
    """A perceptron (B, sizes[0]) -> (B, sizes[-1]): strict, T = 20, rate 0.1; see `MLPModule`."""

    def __init__(self, sizes: Sequence[int], activation: str = "relu", bias: bool = True, **pc: Any) -> None:
        super().__init__(MLPModule(sizes, activation, bias), **{"rule": Strict(20, 0.1), **pc})


class CNN(PCNetwork):
    """The paper's CNN, by default for CIFAR-10: T = 100, rate 0.1; see `CNNModule`. Pooling is a vertex of its own."""

    def __init__(
        self,
        image: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        kernel: int | None = None,
        std: float | None = STD,
        **pc: Any,
    ) -> None:
        nodes = {"value_nodes": ["conv1", "pool", "conv2", "fc1", "fc2", "fc3"]}
        super().__init__(CNNModule(image, classes, kernel, std), **_paper(FixedPrediction(100, 0.1), {**nodes, **pc}))


class RNN(PCNetwork):
    """The paper's RNN for names, (B, S, inputs) -> (B, classes): T = 100, rate 0.1, nested; see `RNNModule`."""

    def __init__(self, inputs: int = 57, hidden: int = 256, classes: int = 18, **pc: Any) -> None:
        super().__init__(RNNModule(inputs, hidden, classes), **_paper(FixedPrediction(100, 0.1, order="nested"), pc))


class LSTM(PCNetwork):
    """The paper's LSTM for text, (B, S) -> (B, S, vocabulary): T = 200, rate 0.1, nested; see `LSTMModule`."""

    def __init__(self, vocabulary: int = 65, hidden: int = 1056, **pc: Any) -> None:
        super().__init__(LSTMModule(vocabulary, hidden), **_paper(FixedPrediction(200, 0.1, order="nested"), pc))


def initialise(module: nn.Module, std: float | None) -> None:
    """Draw every weight from N(0, std^2), or N(0, 1 / fan_in) for None, and set every bias to 0."""
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if std is None else std)


def _batched(state: Tensor, x: Tensor) -> Tensor:
    # cuDNN wants the initial state (layers, B, hidden) in memory of its own
    return state.expand(1, x.shape[0], -1).contiguous()


def _after_convolutions(size: int, kernel: int) -> int:
    left = (size - kernel + 1) // 2 - kernel + 1
    if left < 1:
        raise ValueError(f"An image of {size} pixels is too small for two convolutions of kernel {kernel}; give a smaller kernel.")
    return left


def _require_sizes(sizes: Sequence[int], at_least: int, name: str) -> None:
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(f"{name} must be whole numbers; got {list(sizes)}.")
    if len(sizes) < at_least or any(size < 1 for size in sizes):
        raise ValueError(f"{name} must be at least {at_least} numbers of 1 or more; got {list(sizes)}.")


def _paper(rule: FixedPrediction, pc: dict[str, Any]) -> dict[str, Any]:
    return {"rule": rule, "loss": "squared_error", "reduction": "sum", **pc}
