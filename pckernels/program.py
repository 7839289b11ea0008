"""Program: a computation graph as flat stages over buffers, each of one sample's size. All that a native backend sees of a model.

Nothing here depends on the batch size, on a learning rule or on a device. compiler.py turns a program and a rule into code.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from pckernels.instructions import ABSENT

Shape = tuple[int, ...]


class Kind(enum.Enum):
    """What a stage computes from its inputs. Parameters are those of the instruction of the same name."""

    LINEAR = "linear"
    CONV = "conv"
    ACTIVATION = "activation"
    ADD = "add"  # f0 a + f1 b
    MULTIPLY = "multiply"
    COPY = "copy"  # a strided part of the input to a strided part of the output: slices, concatenations
    MAXPOOL = "maxpool"
    AVGPOOL = "avgpool"


PRODUCTS = (Kind.LINEAR, Kind.CONV)


@dataclass(frozen=True)
class Buffer:
    """A quantity of `size` numbers for each sample.

    Attributes:
        name: for people.
        size: elements of one sample.
        source: "input", "sample" (a constant with a row for each sample), or "" for what stages compute.
    """

    name: str
    size: int
    source: str = ""


@dataclass(frozen=True)
class Stage:
    """One operation. Several stages may add up in one output buffer; copies fill parts of one.

    Attributes:
        inputs, output: buffers. An input that is a value node is read at the node's value, not at its prediction.
        weight, bias: places in Program.weights, or ABSENT.
        p, f: parameters of the instruction; for COPY: blocks, run, output stride, input stride, output start, input start.
    """

    kind: Kind
    inputs: tuple[int, ...]
    output: int
    weight: int = ABSENT
    bias: int = ABSENT
    p: tuple[int, ...] = ()
    f: tuple[float, ...] = ()


@dataclass(frozen=True)
class Node:
    """A vertex: its stages compute the buffer `prediction`; children read its value through the same buffer.

    `external`: its parents are all clamped and its prediction is computed outside and loaded; it has no stages.
    """

    name: str
    prediction: int
    stages: tuple[Stage, ...]
    external: bool = False


@dataclass(frozen=True)
class WeightInfo:
    """A tensor that stages read: its name in the graph, and its shape as (outputs, everything else).

    `gram`: not the weight W (outputs, K) itself but W W^T, (outputs, outputs). `backward`: its backward weight psi, of the shape of W.
    """

    name: str
    outputs: int
    inputs: int
    gram: bool = False
    backward: bool = False


@dataclass(frozen=True)
class Program:
    """A lowered graph: nodes in topological order.

    Attributes:
        buffers: all buffers; inputs: (buffer, name in the graph) of what is read from outside, inputs and per-sample constants.
        batch_axes: of each such name and each node, where the batch lies in the tensor outside.
        shapes: of each node's value, without the batch.
    """

    nodes: tuple[Node, ...]
    buffers: tuple[Buffer, ...]
    inputs: tuple[tuple[int, str], ...]
    weights: tuple[WeightInfo, ...]
    outputs: tuple[str, ...]
    batch_axes: dict[str, int]
    shapes: dict[str, Shape]

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __str__(self) -> str:
        lines = []
        for node in self.nodes:
            lines.append(f"{node.name} -> {self.buffers[node.prediction].size}" + (" (computed outside)" if node.external else ""))
            lines += [f"  {self._in_words(stage)}" for stage in node.stages]
        return "\n".join(lines)

    def _in_words(self, stage: Stage) -> str:
        sources = ", ".join(self.buffers[buffer].name for buffer in stage.inputs)
        weight = f" with {self.weights[stage.weight].name}" if stage.weight != ABSENT else ""
        return f"{self.buffers[stage.output].name} = {stage.kind.value}({sources}){weight} {list(stage.p)} {list(stage.f)}".rstrip(" []")


def numel(shape: Sequence[int]) -> int:
    """Elements of a shape."""
    total = 1
    for size in shape:
        total *= size
    return total
