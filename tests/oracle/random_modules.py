"""Random modules from a description, and the same description read as a predictive-coding graph by its own interpreter.

Tensors are (B, 3, D). The interpreter places vertices by the rules of `value_nodes="layer"`: one starts at every op that
reads a parameter and at every join; one-input ops go along until a tensor has two consumers; on an input or after a fork
they start a vertex, but slices there belong to the edge; a returned tensor in use elsewhere gets an identity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import torch
import torch.nn as nn
from hypothesis import strategies as st
from torch import Tensor

from oracle.graph import Graph, Vertex

ROWS = 3
WORDS = 5
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
    "scale": lambda x: x * 0.7,
    "shift": lambda x: x + 0.3,
    "transpose": lambda x: x.transpose(1, 2),
}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": lambda a, b: torch.sub(a, b, alpha=0.6),
    "mul": torch.mul,
    "cat": lambda a, b: torch.cat([a, b], -1),
    "matmul": torch.matmul,
}
OWNED = ("linear", "embedding", "gain", "norm")


@dataclass(frozen=True)
class Op:
    """One operation on earlier tensors; `layer` names the parameters it reads, `span` the columns of a slice."""

    kind: str
    sources: tuple[int, ...]
    width: int
    layer: str = ""
    span: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Description:
    """Tensors 0 .. len(inputs) - 1 are the inputs (width 0: integers), then one per op."""

    inputs: tuple[int, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    container: str
    layers: tuple[tuple[str, str, int, int], ...] = field(default=())

    def op(self, tensor: int) -> Op | None:
        return self.ops[tensor - len(self.inputs)] if tensor >= len(self.inputs) else None

    def width(self, tensor: int) -> int:
        op = self.op(tensor)
        return op.width if op else self.inputs[tensor]


class RandomModule(nn.Module):
    def __init__(self, description: Description):
        super().__init__()
        self.description = description
        self.layers, self.gains = nn.ModuleDict(), nn.ParameterDict()
        for name, kind, width_in, width_out in description.layers:
            if kind == "gain":
                self.gains[name] = nn.Parameter(torch.randn(width_in))
            else:
                self.layers[name] = new_layer(kind, width_in, width_out)

    def forward(self, *inputs: Tensor) -> object:
        tensors, chunks = list(inputs), {}
        for op in self.description.ops:
            if op.kind == "chunk":
                source = op.sources[0]
                if source not in chunks:
                    chunks[source] = tensors[source].chunk(2, -1)
                tensors.append(chunks[source][0 if op.span[0] == 0 else 1])
            else:
                tensors.append(self.apply_op(op, [tensors[s] for s in op.sources]))
        found = [tensors[t] for t in self.description.outputs]
        return pack(found, self.description.container)

    def apply_op(self, op: Op, arguments: list[Tensor]) -> Tensor:
        if op.kind in ("linear", "embedding", "norm"):
            return self.layers[op.layer](arguments[0])
        if op.kind == "gain":
            return arguments[0] * self.gains[op.layer]
        if op.kind in ("slice", "chunk"):
            return arguments[0][..., op.span[0] : op.span[1]]
        return UNARY[op.kind](arguments[0]) if op.kind in UNARY else JOINS[op.kind](*arguments)


def new_layer(kind: str, width_in: int, width_out: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width_in, width_out)
    return nn.Embedding(WORDS, width_out) if kind == "embedding" else nn.LayerNorm(width_in)


def pack(found: list[Tensor], container: str) -> object:
    if container == "single":
        return found[0]
    return tuple(found) if container == "tuple" else {f"y{k}": y for k, y in enumerate(found)}


def unpack(packed: object) -> list[Tensor]:
    if isinstance(packed, Tensor):
        return [packed]
    return list(packed.values()) if isinstance(packed, dict) else list(packed)  # type: ignore[call-overload]


def random_inputs(description: Description, batch: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def one(width: int) -> Tensor:
        if width == 0:
            return torch.randint(WORDS, (batch, ROWS), generator=generator)
        return torch.randn(batch, ROWS, width, generator=generator, dtype=torch.float64)

    return tuple(one(width) for width in description.inputs)


# The interpreter.


@dataclass
class Draft:
    """A vertex while it grows: where it starts, and the one-input ops that have joined."""

    sources: tuple[int, ...]
    ops: list[Op]


def interpret(module: RandomModule, inputs: tuple[Tensor, ...], targets: list[Tensor]) -> Graph:
    d = module.description
    consumers = Counter(s for op in d.ops for s in op.sources) + Counter(d.outputs)
    drafts, ends = place(d, consumers)
    vertices, names, outputs = [], {}, {}
    for end, draft in ends.items():
        sole = end in d.outputs and consumers[end] == 1
        names[end] = f"out{d.outputs.index(end)}" if sole else f"v{end}"
        vertices.append(build_vertex(module, names, end, drafts[draft], consumers))
    for k, (end, target) in enumerate(zip(d.outputs, targets, strict=True)):
        outputs[f"out{k}"] = target
        if consumers[end] > 1:
            vertices.append(Vertex(f"out{k}", (names[end],), lambda v: v.clone()))
    return Graph({f"x{k}": x for k, x in enumerate(inputs)}, tuple(vertices), outputs)


def place(d: Description, consumers: Counter[int]) -> tuple[dict[int, Draft], dict[int, int]]:
    """Drafts by their first tensor; and, in topological order, the tensor a vertex ends at -> its draft."""
    drafts: dict[int, Draft] = {}
    draft_of: dict[int, int] = {}
    for t, op in enumerate(d.ops, start=len(d.inputs)):
        source = op.sources[0]
        if is_edge(d, t, consumers):
            continue
        if joins_its_source(d, op, source, consumers):
            draft_of[t] = draft_of[source]
            drafts[draft_of[t]].ops.append(op)
        else:
            draft_of[t] = t
            drafts[t] = Draft(op.sources, [op])
    last = {draft: t for t, draft in draft_of.items()}
    return drafts, {t: draft for draft, t in sorted(last.items(), key=lambda pair: pair[1])}


def joins_its_source(d: Description, op: Op, source: int, consumers: Counter[int]) -> bool:
    if op.kind in JOINS or op.kind in ("linear", "embedding", "gain"):
        return False
    return d.op(source) is not None and not is_edge(d, source, consumers) and consumers[source] == 1


def is_edge(d: Description, tensor: int, consumers: Counter[int]) -> bool:
    """Whether the tensor is a slice of an input, of a forked tensor or of another such slice."""
    op = d.op(tensor)
    if op is None or op.kind not in ("slice", "chunk"):
        return False
    source = op.sources[0]
    return d.op(source) is None or consumers[source] > 1 or is_edge(d, source, consumers)


def build_vertex(module: RandomModule, names: dict[int, str], end: int, draft: Draft, consumers: Counter[int]) -> Vertex:
    d = module.description
    edges = [through_slices(d, s, consumers) for s in draft.sources]
    parents = tuple(f"x{base}" if base < len(d.inputs) else names[base] for base, _ in edges)

    def function(*values: Tensor) -> Tensor:
        cut = [v if span is None else v[..., span[0] : span[1]] for v, (_, span) in zip(values, edges, strict=True)]
        y = module.apply_op(draft.ops[0], cut)
        for op in draft.ops[1:]:
            y = module.apply_op(op, [y])
        return y

    return Vertex(names[end], parents, function, parameters_of(module, draft.ops))


def through_slices(d: Description, tensor: int, consumers: Counter[int]) -> tuple[int, tuple[int, int] | None]:
    """The tensor behind a chain of slices that belong to the edge, and the columns that the chain keeps."""
    span: tuple[int, int] | None = None
    while is_edge(d, tensor, consumers):
        op = d.ops[tensor - len(d.inputs)]
        span = op.span if span is None else (op.span[0] + span[0], op.span[0] + span[1])
        tensor = op.sources[0]
    return tensor, span


def parameters_of(module: RandomModule, ops: list[Op]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for op in ops:
        if op.kind == "gain":
            found[f"gains.{op.layer}"] = module.gains[op.layer]
        elif op.kind in OWNED:
            found |= {f"layers.{op.layer}.{name}": p for name, p in module.layers[op.layer].named_parameters()}
    return found


# The generator.


class Writer:
    """Draws one op after the other, keeping widths consistent."""

    def __init__(self, dice: Random, inputs: tuple[int, ...]):
        self.dice, self.inputs = dice, inputs
        self.ops: list[Op] = []
        self.layers: dict[str, tuple[str, int, int]] = {}

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """(tensor, width) of everything that floats."""
        known = [*enumerate(self.inputs), *((len(self.inputs) + k, op.width) for k, op in enumerate(self.ops))]
        return [(t, width) for t, width in known if width > 0]

    def pick(self, fits: Callable[[int], bool] = lambda width: True, other: int | None = None) -> tuple[int, int] | None:
        """A tensor whose width fits; unused and new ones are the likeliest, so that graphs grow deep and join again."""
        choices = [(t, w) for t, w in reversed(self.tensors) if fits(w) and t != other]
        if not choices:
            return None
        used = {s for op in self.ops for s in op.sources}
        if self.dice.random() < 0.6:
            choices = [c for c in choices if c[0] not in used] or choices
        return choices[int(len(choices) * self.dice.random() ** 2)]

    def layer(self, kind: str, width_in: int, width_out: int) -> tuple[str, int]:
        """A new layer, or one used before that fits: shared weights."""
        fitting = [(n, o) for n, (k, i, o) in self.layers.items() if k == kind and i == width_in]
        if fitting and self.dice.random() < 0.3:
            return self.dice.choice(fitting)
        name = f"{kind}{len(self.layers)}"
        self.layers[name] = (kind, width_in, width_out)
        return name, width_out

    def write(self, kind: str) -> None:
        if kind in JOINS:
            self.write_join(kind)
        elif kind in ("slice", "chunk"):
            self.write_slice(kind)
        elif kind in OWNED:
            self.write_owned(kind)
        elif (source := self.pick(lambda w: fits_unary(kind, w))) is not None:
            self.ops.append(Op(kind, (source[0],), source[1]))

    def write_owned(self, kind: str) -> None:
        if kind == "embedding":
            words = [t for t, width in enumerate(self.inputs) if width == 0]
            if words:
                name, width = self.layer(kind, 0, self.dice.randint(1, 4))
                self.ops.append(Op(kind, (self.dice.choice(words),), width, name))
            return
        source = self.pick(lambda w: kind != "norm" or w > 2)
        if source is not None:
            wanted = self.dice.randint(1, 4) if kind == "linear" else source[1]
            name, width = self.layer(kind, source[1], wanted)
            self.ops.append(Op(kind, (source[0],), width, name))

    def write_join(self, kind: str) -> None:
        left = self.pick(lambda w: kind != "matmul" or w == ROWS)
        if left is None:
            return
        right = self.pick(lambda w: fits_join(kind, left[1], w), other=left[0])
        if right is not None:
            width = {"cat": left[1] + right[1], "matmul": right[1]}.get(kind, max(left[1], right[1]))
            self.ops.append(Op(kind, (left[0], right[0]), width))

    def write_slice(self, kind: str) -> None:
        source = self.pick(lambda w: w > 1)
        if source is None:
            return
        half = (source[1] + 1) // 2
        span = self.dice.choice([(0, half), (half, source[1])])
        self.ops.append(Op(kind, (source[0],), span[1] - span[0], span=span))


def fits_unary(kind: str, width: int) -> bool:
    """Softmax of one entry is constant; gradients that are nothing but rounding can be compared with nothing."""
    return width == ROWS if kind == "transpose" else kind != "softmax" or width > 1


def fits_join(kind: str, left: int, right: int) -> bool:
    if kind == "cat":
        return left + right <= 6
    return kind == "matmul" or left == right or (kind == "mul" and 1 in (left, right))


KINDS = [*JOINS, *JOINS, *UNARY, "linear", "linear", "linear", "gain", "norm", "slice", "chunk"]


def descriptions() -> st.SearchStrategy[Description]:
    """Seed and size are drawn; the rest follows from them, so that graphs stay rich and a failure shrinks in size."""
    return st.builds(describe, st.integers(0, 2**32 - 1), st.integers(4, 14))


def describe(seed: int, size: int) -> Description:
    dice = Random(seed)
    inputs = dice.choice([(3,), (2,), (3, 2), (4, 0), (3, 3, 0)])
    writer = Writer(dice, inputs)
    writer.write("linear")
    if 0 in inputs:
        writer.write("embedding")
    for kind in dice.choices(KINDS, k=size):
        writer.write(kind)
    writer.write("linear")
    last = len(inputs) + len(writer.ops) - 1
    taps = [len(inputs) + k for k, op in enumerate(writer.ops[:-1]) if op.kind not in ("slice", "chunk")]
    extra = dice.sample(taps, min(len(taps), dice.choice([0, 0, 1, 2])))
    container = dice.choice(["tuple", "dict"] if extra else ["single", "tuple", "dict"])
    return prune(Description(inputs, tuple(writer.ops), (last, *extra), container), writer.layers)


def prune(d: Description, layers: dict[str, tuple[str, int, int]]) -> Description:
    """Drop every op and input that no output depends on, and renumber."""
    needed, queue = set(), list(d.outputs)
    while queue:
        t = queue.pop()
        op = d.op(t)
        if t not in needed:
            needed.add(t)
            queue.extend(op.sources if op else ())
    kept = sorted(needed)
    rank = {t: k for k, t in enumerate(kept)}
    ops = [d.op(t) for t in kept if t >= len(d.inputs)]
    moved = tuple(Op(op.kind, tuple(rank[s] for s in op.sources), op.width, op.layer, op.span) for op in ops if op)
    used = {op.layer for op in moved}
    return Description(
        tuple(d.inputs[t] for t in kept if t < len(d.inputs)),
        moved,
        tuple(rank[t] for t in d.outputs),
        d.container,
        tuple((name, *layer) for name, layer in layers.items() if name in used),
    )
