"""step_update, what happens to a vertex between two products: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from fast_interpreter import install
from torch import Tensor, nn
from triton_case import DEVICE, relative_error, require_a_way_to_run

import pckernels as pck
from pckernels.instructions import Activation

require_a_way_to_run()

from pckernels.triton import rows  # noqa: E402
from pckernels.triton.step_update import Pace, Vertex, energies_of, new_parts, plain_step_update, step_update  # noqa: E402

if DEVICE == "cpu":
    install()

SHAPE = (5, 210)  # not a multiple of a block
FACTORS = {Activation.AFFINE: (0.7, 0.3), Activation.LEAKY_RELU: (0.1, 0.0), Activation.HARDTANH: (-1.0, 0.8)}
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}


def made(kind: Activation, dtype: torch.dtype, values: bool = True, momentum: bool = False) -> Vertex:
    """Random state; what is only written is NaN."""
    state = [torch.randn(SHAPE) for _ in range(4)]
    written = [torch.full(SHAPE, float("nan"), dtype=dtype) for _ in range(2)]
    d, velocity = state[1] if values else None, state[3] if momentum else None
    return Vertex(state[0], d, state[2], velocity, written[0], written[1] if values else None, kind, FACTORS.get(kind, (0.0, 0.0)))


def on(vertex: Vertex, device: str, wide: bool) -> Vertex:
    tensors = {name: tensor for name, tensor in vars(vertex).items() if isinstance(tensor, Tensor)}
    return dataclasses.replace(vertex, **{name: (t.double() if wide else t).to(device).clone() for name, t in tensors.items()})


def assert_equal(vertex: Vertex, pace: Pace, feedback: list[Tensor], dz: Tensor | None, dtype: torch.dtype, observed: bool) -> None:
    """To float32's rounding in the state, to the products' dtype in what is written in it."""
    ours, exact = on(vertex, DEVICE, False), on(vertex, "cpu", True)
    parts, wanted = new_parts(0, 2, DEVICE), new_parts(0, 2, "cpu")
    step_update(ours, pace, [t.to(DEVICE) for t in feedback], None if dz is None else dz.to(DEVICE), parts[:, 0, 1] if observed else None)
    plain_step_update(
        exact, pace, [t.double() for t in feedback], None if dz is None else dz.double(), wanted[:, 0, 1] if observed else None
    )
    for name, value in vars(exact).items():
        written = name in ("g", "rounded")
        if isinstance(value, Tensor) and not (written and value.isnan().all()):
            assert relative_error(getattr(ours, name), value) < (4 * UNIT[dtype] if written else 1e-6), name
        elif written and value is not None:
            assert getattr(ours, name).isnan().all(), name  # nobody has asked for it
    assert relative_error(energies_of(parts), energies_of(wanted.to(DEVICE))) < 1e-6


def random(dtype: torch.dtype, size: float = 1.0) -> Tensor:
    return (size * torch.randn(SHAPE)).to(dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in Activation), *((kind, torch.float16) for kind in (Activation.TANH, Activation.GELU))],
)
def test_a_vertex_is_observed(kind: Activation, dtype: torch.dtype) -> None:
    for size in (1e-3, 1.0):
        assert_equal(made(kind, dtype), Pace(0.1, precision=1.7), [], random(dtype, size), dtype, True)


@pytest.mark.parametrize(
    ("momentum", "children", "dtype"), [(0.0, 1, torch.float32), (0.5, 2, torch.float32), (0.0, 2, torch.float16), (0.5, 1, torch.float16)]
)
def test_a_vertex_moves(momentum: float, children: int, dtype: torch.dtype) -> None:
    vertex = made(Activation.TANH, dtype, momentum=momentum != 0.0)
    feedback = [random(dtype) for _ in range(children)]
    assert_equal(vertex, Pace(0.1, momentum, 1.7), feedback, None, dtype, False)
    assert_equal(vertex, Pace(0.1, momentum, 1.7), feedback, None, dtype, True)  # its parents are clamped


@pytest.mark.parametrize(("children", "dtype"), [(0, torch.float32), (1, torch.float16), (2, torch.float32)])
def test_errors_relax(children: int, dtype: torch.dtype) -> None:
    feedback = [random(dtype) for _ in range(children)]
    assert_equal(made(Activation.GELU, dtype, values=False), Pace(0.3, precision=1.7), feedback, None, dtype, True)


def test_nobody_reads_g() -> None:
    vertex = dataclasses.replace(made(Activation.RELU, torch.float32), g=None, rounded=None)
    assert_equal(vertex, Pace(0.1), [], random(torch.float32), torch.float32, True)


def test_programs_take_more_than_a_block_each_and_energies_are_equal_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PARTS", 2)
    vertex, dz = made(Activation.SIGMOID, torch.float32), random(torch.float32)
    assert_equal(vertex, Pace(0.1), [], dz, torch.float32, True)
    parts = [new_parts(0, 1, DEVICE) for _ in range(2)]
    for each in parts:
        step_update(on(vertex, DEVICE, False), Pace(0.1), dz=dz.to(DEVICE), parts=each[:, 0, 0])
    assert torch.equal(*map(energies_of, parts)) and parts[0].count_nonzero() == 2


def test_nothing_is_done_for_an_empty_batch() -> None:
    empty = torch.empty(0, 3, device=DEVICE)
    parts = new_parts(0, 1, DEVICE)
    step_update(Vertex(empty, empty, empty), Pace(0.1), [empty], parts=parts[:, 0, 0])
    assert not parts.any()


# A whole inference, with PyTorch's products


class Residual(nn.Module):
    """x -> a -> b, a + b -> output: a has two children, and add no product."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 9), nn.Linear(9, 9), nn.Linear(9, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).tanh()
        return self.c(a + self.b(a).sigmoid())


class Loop:
    """What a planner would make of Residual: the order of products and updates of one step."""

    def __init__(self, net: Residual, x: Tensor, target: Tensor, steps: int, values: bool):
        self.w, self.c, self.steps, self.values = net.b.weight, net.c.weight, steps, values
        z = {"a": net.a(x)}
        z["b"] = net.b(z["a"].tanh())
        z["add"] = z["a"].tanh() + z["b"].sigmoid()
        z["output"] = net.c(z["add"])
        kinds = {"a": Activation.TANH, "b": Activation.SIGMOID}
        factors = {name: (0.0, 0.0) if name in kinds else (1.0, 0.0) for name in z}
        start = {name: torch.zeros_like(at) if name != "output" else target - at for name, at in z.items()}
        self.vertices = {
            name: Vertex(
                at,
                start[name].clone() if values else None,
                start[name].clone(),
                torch.zeros_like(at) if values else None,
                torch.empty_like(at),
                activation=kinds.get(name, Activation.AFFINE),
                factors=factors[name],
            )
            for name, at in z.items()
        }
        self.parts = new_parts(steps, len(z), x.device)

    def run(self, pace: Pace) -> dict[str, Tensor]:
        for name in self.vertices:
            self.observe(name, 0)
        for t in range(1, self.steps + 1):
            g = {name: vertex.g for name, vertex in self.vertices.items()}
            of_add = g["add"].clone()  # Jacobi: of the old state, whatever is written meanwhile
            feedback = {"a": [g["b"] @ self.w, of_add], "b": [of_add], "add": [g["output"] @ self.c]}
            for name, fed in feedback.items():
                step_update(self.vertices[name], pace, fed, parts=None if self.values else self.place(name, t))
            for name in self.vertices if self.values else ["output"]:
                self.observe(name, t)
        return {name: vertex.error for name, vertex in self.vertices.items()} | {"energy": energies_of(self.parts).sum(1)}

    def observe(self, name: str, t: int) -> None:
        dz = None
        if self.values and name != "a":
            d = {name: vertex.d for name, vertex in self.vertices.items()}
            dz = {"b": d["a"] @ self.w.t(), "add": d["a"] + d["b"], "output": d["add"] @ self.c.t()}[name]
        step_update(self.vertices[name], Pace(0.0), dz=dz, parts=self.place(name, t))

    def place(self, name: str, t: int) -> Tensor:
        return self.parts[:, t, list(self.vertices).index(name)]


@torch.no_grad()
@pytest.mark.parametrize("rule", [pck.Strict(8, 0.1, momentum=0.5), pck.FixedPrediction(8, 0.3, solver="iterate")], ids=["strict", "fixed"])
def test_an_inference(rule: pck.rules.Rule) -> None:
    """Against the float64 reference."""
    net, x, target = Residual(), torch.randn(6, 4), torch.randn(6, 3)
    exact = pck.PCNetwork(copy.deepcopy(net).double(), rule, backend="reference").infer(x.double(), target.double())
    dynamics = rule.dynamics
    loop = Loop(net.to(DEVICE), x.to(DEVICE), target.to(DEVICE), 8, dynamics.moves == "values")
    found = loop.run(Pace(dynamics.rate, dynamics.momentum))
    assert found.keys() == exact.errors.keys() | {"energy"}
    for name, wanted in {**exact.errors, "energy": exact.energy}.items():
        assert relative_error(found[name], wanted) < 2e-6, name


def test_refusals_are_sentences() -> None:
    vertex = on(made(Activation.RELU, torch.float32), DEVICE, False)
    fed, parts = vertex.z.clone(), new_parts(0, 1, DEVICE)[:, 0, 0]
    still = dataclasses.replace(vertex, d=None)
    for refused, arguments, error, text in (
        (vertex, {"feedback": [fed] * 3}, ValueError, "takes the feedback of two children at most; got 3"),
        (vertex, {"feedback": [fed], "dz": fed, "parts": parts}, ValueError, "move it in one call, and observe it in another"),
        (still, {"dz": fed, "parts": parts}, ValueError, "predictions stand still"),
        (vertex, {"pace": Pace(0.1, 0.5), "feedback": [fed]}, ValueError, "momentum needs a velocity"),
        (vertex, {"feedback": [fed.t()]}, ValueError, "must be contiguous and have its error's shape"),
        (vertex, {"parts": parts[:3]}, ValueError, r"parts must be one place of new_parts, \(528,\) in float64"),
        (dataclasses.replace(vertex, z=fed.double()), {"parts": parts}, TypeError, "The state of a vertex .* is float32"),
    ):
        with pytest.raises(error, match=text):
            step_update(refused, **{"pace": Pace(0.1), **arguments})
