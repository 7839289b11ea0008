"""Small torch modules, each beside its vertices written out by hand for the numpy loop in the precision `real`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from oracle.layers import (
    Add,
    Array,
    Cell,
    Conv,
    Flatten,
    FrozenBatchNorm,
    Function,
    Hidden,
    Layer,
    Linear,
    LinearSum,
    MaxPool,
    ReLU,
    Sigmoid,
    Tanh,
)
from oracle.strict import StrictLoop, Vertex, cross_entropy, squared_error


@dataclass
class Case:
    """A module and its oracle on the same numbers; `value_nodes` as PCNetwork takes it."""

    module: nn.Module
    x: torch.Tensor
    target: torch.Tensor
    loss: str
    value_nodes: str | list[str]
    oracle: StrictLoop


def parameters(module: nn.Module, real: type) -> dict[str, Array]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: to_numpy(p, real) for name, p in tensors.items()}


def to_numpy(tensor: torch.Tensor, real: type) -> Array:
    array = tensor.detach().numpy()
    return array.astype(real) if array.dtype.kind == "f" else array


def mlp(real: type, activation: str = "tanh") -> Case:
    torch.manual_seed(1)
    act: type[nn.Module] = {"tanh": nn.Tanh, "relu": nn.ReLU}[activation]
    module = nn.Sequential(nn.Linear(4, 6), act(), nn.Linear(6, 5), act(), nn.Linear(5, 3), act(), nn.Linear(3, 2)).double()
    x, target = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    p = parameters(module, real)
    layer: Callable[[], Layer] = {"tanh": Tanh, "relu": ReLU}[activation]
    linear = [Linear(str(k), p[f"{k}.weight"], p[f"{k}.bias"]) for k in (0, 2, 4, 6)]
    vertices = [
        Vertex("0", ("x",), Function(linear[0], layer())),
        Vertex("2", ("0",), Function(linear[1], layer())),
        Vertex("4", ("2",), Function(linear[2], layer())),
        Vertex("output", ("4",), Function(linear[3])),
    ]
    return Case(
        module, x, target, "squared_error", "layer", StrictLoop({"x": to_numpy(x, real)}, vertices, to_numpy(target, real), squared_error())
    )


class PaperCNN(nn.Module):
    """conv, pool, conv, three linears; ReLU inside each stage, pooling a stage of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Sequential(nn.Conv2d(4, 5, 3, bias=False), nn.ReLU())
        self.fc1 = nn.Sequential(nn.Flatten(), nn.Linear(20, 8, bias=False), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU())
        self.fc3 = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(self.fc2(self.fc1(self.conv2(self.pool(self.conv1(x))))))


def cnn(real: type) -> Case:
    torch.manual_seed(2)
    module = PaperCNN().double()
    x, target = torch.randn(2, 3, 10, 10).double(), torch.tensor([1, 3])
    p = parameters(module, real)
    vertices = [
        Vertex("conv1", ("x",), Function(Conv("conv1.0", p["conv1.0.weight"], None), ReLU())),
        Vertex("pool", ("conv1",), Function(MaxPool())),
        Vertex("conv2", ("pool",), Function(Conv("conv2.0", p["conv2.0.weight"], None), ReLU())),
        Vertex("fc1", ("conv2",), Function(Flatten(), Linear("fc1.1", p["fc1.1.weight"], None), ReLU())),
        Vertex("fc2", ("fc1",), Function(Linear("fc2.0", p["fc2.0.weight"], None), ReLU())),
        Vertex("output", ("fc2",), Function(Linear("fc3", p["fc3.weight"], None))),
    ]
    nodes = ["conv1", "pool", "conv2", "fc1", "fc2", "fc3"]
    return Case(
        module, x, target, "cross_entropy", nodes, StrictLoop({"x": to_numpy(x, real)}, vertices, to_numpy(target, real), cross_entropy())
    )


class ResidualNet(nn.Module):
    """stem, relu(x + bn(conv(relu(bn(conv x))))), linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.head = nn.Linear(48, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.head(F.relu(x + y).flatten(1))


def resnet(real: type) -> Case:
    torch.manual_seed(3)
    module = ResidualNet().double().eval()
    for bn in (module.bn1, module.bn2):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias)
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2.0)
    x, target = torch.randn(2, 2, 4, 4).double(), torch.randn(2, 3).double()
    p = parameters(module, real)
    norm = [
        FrozenBatchNorm(b, p[f"{b}.weight"], p[f"{b}.bias"], p[f"{b}.running_mean"], p[f"{b}.running_var"], 1e-5) for b in ("bn1", "bn2")
    ]
    vertices = [
        Vertex("stem", ("x",), Function(Conv("stem", p["stem.weight"], p["stem.bias"], padding=1), ReLU())),
        Vertex("conv1", ("stem",), Function(Conv("conv1", p["conv1.weight"], None, padding=1), norm[0], ReLU())),
        Vertex("conv2", ("conv1",), Function(Conv("conv2", p["conv2.weight"], None, padding=1), norm[1])),
        Vertex("add", ("stem", "conv2"), Add(ReLU(), Flatten())),
        Vertex("output", ("add",), Function(Linear("head", p["head.weight"], p["head.bias"]))),
    ]
    return Case(
        module, x, target, "squared_error", "layer", StrictLoop({"x": to_numpy(x, real)}, vertices, to_numpy(target, real), squared_error())
    )


class LastStepLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[1][0][-1])


def lstm(real: type, steps: int = 3) -> Case:
    torch.manual_seed(4)
    module = LastStepLSTM().double()
    x, target = torch.randn(2, steps, 3).double(), torch.randn(2, 2).double()
    p = parameters(module, real)
    clamped = {f"x{t}": to_numpy(x[:, t], real) for t in range(steps)} | {
        "h-1": to_numpy(torch.zeros(2, 4), real),
        "c-1": to_numpy(torch.zeros(2, 4), real),
    }
    vertices = [v for t in range(steps) for v in lstm_cell(p, t)]
    vertices.append(Vertex("output", (name_of("h", steps - 1),), Function(Linear("head", p["head.weight"], p["head.bias"]))))
    return Case(module, x, target, "squared_error", "layer", StrictLoop(clamped, vertices, to_numpy(target, real), squared_error()))


def name_of(part: str, t: int) -> str:
    return f"lstm.l0.t{t}.{part}" if t >= 0 else f"{part}-1"


def lstm_cell(p: dict[str, Array], t: int) -> list[Vertex]:
    """The six value nodes of one cell; torch packs the gates as rows i, f, g, o."""
    h, c = name_of("h", t - 1), name_of("c", t - 1)
    gates = [Vertex(name_of(part, t), (f"x{t}", h), lstm_gate(p, row, part)) for row, part in enumerate("ifgo")]
    parents = tuple(name_of(part, t) for part in "fig")
    return [*gates, Vertex(name_of("c", t), (*parents, c), Cell()), Vertex(name_of("h", t), (name_of("o", t), name_of("c", t)), Hidden())]


def lstm_gate(p: dict[str, Array], row: int, part: str) -> LinearSum:
    rows = slice(4 * row, 4 * row + 4)
    maps = [
        Linear("", p[f"lstm.weight_{k}_l0"], p[f"lstm.bias_{k}_l0"], f"lstm.weight_{k}_l0", f"lstm.bias_{k}_l0", rows) for k in ("ih", "hh")
    ]
    return LinearSum(maps, Tanh() if part == "g" else Sigmoid())
