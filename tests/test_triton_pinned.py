"""relax_mlp_pinned, which holds a chain in shared memory, against the float64 reference: its own source on numpy (gluon_emulated.py), since
Gluon has no interpreter. test_triton_build.py compiles it; test_triton_gpu.py runs it where there is a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import pytest
import rounded_case
import torch
from chain_case import ACTIVATIONS, Chosen, assert_as_good, code_of, memory_of, results
from torch import Tensor, nn
from triton_case import relative_error

import pckernels as pck
from pckernels import dispatch, interpreter, triton_pinned
from pckernels.backends import triton
from pckernels.compiler import Compiled
from pckernels.instructions import ABSENT, Loss, OuterProduct
from pckernels.planner import Limits

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from gluon_emulated import Edits, Emulated, Race
from pckernels.triton import relax_mlp_pinned
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ROOM = 227 * 1024
# 64 nodes are a block: layers of less than one, of one, and of several, the last of which is nearly empty.
CHAINS = ("narrow", "ragged", "wide output", "shallow", "deep")


def learned(
    products: Sequence[OuterProduct], io: Sequence[Tensor], gradients: Sequence[Tensor], batch: int, factor: float, precision: str
) -> None:
    """In the place of local_update.learn, which needs a GPU or Triton's interpreter, and has tests of its own."""
    for product in products:
        g = factor * product.coefficient * io[product.g_slot].reshape(batch, product.outputs)
        if product.weight != ABSENT:
            x = io[product.x_slot].reshape(batch, product.inputs)
            gradients[product.weight].copy_((g.t() @ x).reshape(gradients[product.weight].shape))
        if product.bias != ABSENT:
            gradients[product.bias].copy_(g.sum(0))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return emulate(monkeypatch)


def emulate(monkeypatch: pytest.MonkeyPatch, edits: Edits = ()) -> Emulated:
    kernel = Emulated(relax_mlp_pinned, "relax_mlp_pinned", edits)
    monkeypatch.setattr(relax_mlp_pinned, "relax_mlp_pinned", kernel)
    monkeypatch.setattr(relax_mlp_pinned.local_update, "learn", learned)
    return kernel


run = partial(relax_mlp_pinned.run, shared_bytes=ROOM)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, emulated: Emulated) -> Iterator[Chosen]:
    found = Chosen(run)
    monkeypatch.setattr(dispatch, "choose", found.choose)
    there = replace(dispatch._BACKENDS["triton"], support=dispatch.Support(True, "emulated"))
    monkeypatch.setitem(dispatch._BACKENDS, "triton", there)
    yield found
    assert emulated.runs > 0, "no kernel ran"


RULES = {
    "strict": lambda steps: pck.Strict(steps, 0.1),
    "momentum": lambda steps: pck.Strict(steps, 0.05, momentum=0.5),
    "fixed": lambda steps: pck.FixedPrediction(steps, 0.3, solver="iterate"),
}
STEPS = [("narrow", steps) for steps in (0, 1, 2, 8)] + [(name, 4) for name in CHAINS if name != "narrow"]


@pytest.mark.parametrize(("name", "steps"), STEPS)
@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule(name: str, rule: str, steps: int, chosen: Chosen) -> None:
    assert_as_good(name, "tanh" if name == "narrow" else "relu", RULES[rule](steps), 17)
    assert chosen.runs == 1


def test_many_steps(chosen: Chosen) -> None:
    assert_as_good("narrow", "sigmoid", pck.Strict(64, 0.1, momentum=0.3), 3)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("rule", ["strict", "fixed"])
def test_every_activation(activation: str, rule: str, chosen: Chosen) -> None:
    assert_as_good("narrow", activation, RULES[rule](3), 5)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_hidden_errors_start_at_zero_bit_for_bit(activation: str, emulated: Emulated) -> None:
    compiled, net = code_of("ragged", activation, pck.Strict(0, 0.1))
    memory = memory_of(compiled, net, 5, torch.float32)
    run(compiled, memory, 5, 1.0)
    errors = [tensor for place, tensor in zip(compiled.io, memory.io, strict=True) if place.kind == "error"]
    assert len(errors) == 5 and errors[-1].any()
    assert not any(error.any() for error in errors[:-1])


@pytest.mark.parametrize("batch", [1, 15, 16, 33])
@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_ragged_batches(batch: int, loss: str, chosen: Chosen) -> None:
    assert_as_good("narrow", "tanh", pck.Strict(3, 0.1), batch, loss)


@pytest.mark.parametrize("name", ["wide output", "shallow"])
@pytest.mark.parametrize("rule", ["momentum", "fixed"])
def test_cross_entropy_over_several_blocks(name: str, rule: str, chosen: Chosen) -> None:
    assert_as_good(name, "tanh", RULES[rule](3), 5, "cross_entropy")


@pytest.mark.parametrize(("lanes", "warps"), [(32, 8), (16, 4), (32, 4)])
def test_other_tiles_and_warps(lanes: int, warps: int, chosen: Chosen) -> None:
    chosen.run = partial(run, lanes=lanes, warps=warps)
    assert_as_good("wide output", "tanh", pck.Strict(2, 0.1, momentum=0.5), 33)


@pytest.mark.parametrize("rule", ["momentum", "fixed"])
@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_rounded_operands(rule: str, precision: str, emulated: Emulated) -> None:
    compiled, net = code_of("ragged", "tanh", RULES[rule](8))
    memory, exact = memory_of(compiled, net, 17, torch.float32), memory_of(compiled, net, 17, torch.float64)
    run(compiled, memory, 17, -0.5, precision=precision)
    rounded_case.execute(compiled.code, exact, 17, -0.5, precision)
    allowed = rounded_case.tolerance(compiled.code, 17, precision)
    for ours, expected in zip(results(compiled, memory), results(compiled, exact), strict=True):
        assert relative_error(ours, expected.reshape(ours.shape)) <= allowed


def test_a_call_that_does_not_learn_stores_errors_alone(emulated: Emulated) -> None:
    compiled, net = code_of("narrow", "tanh", pck.Strict(2, 0.1), learn=False)
    memory, exact = memory_of(compiled, net, 5, torch.float32), memory_of(compiled, net, 5, torch.float64)
    run(compiled, memory, 5, 1.0)
    interpreter.execute(compiled.code, exact, 5)
    for ours, expected in zip(results(compiled, memory), results(compiled, exact), strict=True):
        assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("name", CHAINS)
def test_the_plan_counts_what_the_kernel_takes(name: str, rule: str, emulated: Emulated) -> None:
    compiled, net = code_of(name, "tanh", RULES[rule](1))
    plan = triton_pinned.plan_of_code(compiled, ROOM)
    assert isinstance(plan, triton_pinned.Plan)
    run(compiled, memory_of(compiled, net, 3, torch.float32), 3, 1.0)
    assert emulated.program.shared_bytes == plan.shared_bytes - triton_pinned.SUM_BYTES


def test_the_backend_runs_what_the_plan_says(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the shared memory of sm_90; options reach the kernel."""
    monkeypatch.setattr(triton, "limits", lambda device: Limits.of(90))
    compiled, net, exact = expected("narrow", "momentum")
    memory = memory_of(compiled, net, 17, torch.float32)
    with triton.options(variant="pinned", lanes=32, warps=4):
        triton.launch(compiled, memory, 17, 1.0)
    assert emulated.runs == 1 and emulated.warps == 4
    for ours, wanted in zip(parted(results(compiled, memory)), exact, strict=True):
        assert relative_error(ours, wanted.reshape(ours.shape)) < 1e-5


class Driver:
    """As much of a GPU's driver as compiling for a launch asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.skipif(triton.interpreted(), reason="TRITON_INTERPRET=1 is set, and the interpreter compiles nothing")
def test_a_launch_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the very arguments of a call, all but the launch itself. With the loss that the table of builds does not have."""
    kernel, compiled_for = relax_mlp_pinned.relax_mlp_pinned, []

    class Compiling:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *arguments, **options: compiled_for.append(kernel.warmup(*arguments, grid=grid, **options))

    monkeypatch.setattr(relax_mlp_pinned, "relax_mlp_pinned", Compiling())
    monkeypatch.setattr(relax_mlp_pinned.local_update, "learn", learned)
    compiled, net = code_of("two", "gelu", RULES["momentum"](2), loss=Loss.CROSS_ENTROPY)
    monkeypatch.setattr(driver, "_active", Driver())
    run(compiled, memory_of(compiled, net, 17, torch.float32), 17, 1.0, precision="bf16")
    plan = triton_pinned.plan_of_code(compiled, ROOM)
    assert isinstance(plan, triton_pinned.Plan)
    assert plan.shared_bytes - triton_pinned.SUM_BYTES <= compiled_for[0].metadata.shared <= plan.shared_bytes


# What must be noticed

BARRIER = "tl.debug_barrier()"


@lru_cache
def expected(name: str, rule: str) -> tuple[Compiled, nn.Module, list[Tensor]]:
    compiled, net = code_of(name, "tanh", RULES[rule](3))
    exact = memory_of(compiled, net, 17, torch.float64)
    interpreter.execute(compiled.code, exact, 17, 1.0)
    return compiled, net, parted(results(compiled, exact))


def parted(found: list[Tensor]) -> list[Tensor]:
    """Energies, which come last, layer by layer: some are small beside others."""
    return [*found[:-1], *found[-1].unbind(1)]


def changed(monkeypatch: pytest.MonkeyPatch, name: str, rule: str, edits: Edits) -> float:
    """How far results are off after edits of the kernel's text, relative to each tensor."""
    emulate(monkeypatch, edits)
    compiled, net, exact = expected(name, rule)
    memory = memory_of(compiled, net, 17, torch.float32)
    run(compiled, memory, 17, 1.0)
    errors = [relative_error(a, b.reshape(a.shape)) for a, b in zip(parted(results(compiled, memory)), exact, strict=True)]
    return max(math.inf if math.isnan(error) else error for error in errors)


def barriers() -> list[str]:
    """The text around each barrier of the kernel."""
    lines = Path(str(relax_mlp_pinned.__file__)).read_text(encoding="utf-8").splitlines(keepends=True)
    return ["".join(lines[k - 2 : k + 3]) for k, line in enumerate(lines) if line.strip() == BARRIER]


@pytest.mark.parametrize("rule", ["momentum", "fixed"])
def test_nothing_changed_is_right(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert changed(monkeypatch, "ragged", rule, ()) < 1e-5


@pytest.mark.parametrize("place", barriers())
def test_each_barrier_is_needed(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one rule or the other."""
    assert barriers().count(place) == 1
    found = []
    for rule in ("momentum", "fixed"):
        try:
            changed(monkeypatch, "narrow", rule, [(place, place.replace(BARRIER, "pass"))])
        except Race:
            found.append(rule)
    assert found


WRONG = {
    "momentum that is dropped": ("drive += momentum * speed.load(TILE)", "pass"),
    "speed that is not kept": ("speed.store(drive)", "pass"),
    "errors of a layer that is not this one": ("eps.index(at).store(error)", "eps.index(0).store(error)"),
    "the layer before the one that feeds back": ("g, place(l + 1, STARTS), weight", "g, place(l, STARTS), weight"),
    "the weight of another direction": ("weight, j, N, K, K, 1, PRECISION", "weight, j, N, K, 1, N, PRECISION"),
    "values of another layer": ("d, STARTS[l - 1], weight, j, WIDTHS[l]", "d, STARTS[0], weight, j, WIDTHS[l]"),
    "a part of the weight that is read too late": ("part = ahead", "pass"),
    "the slope where nothing has moved": ("slope(KIND, before, dz, mu, dmu, F0, F1)", "act_grad(KIND, before, F0, F1)"),
    "a change that is added": ("load(TILE) - dmu\n        eps", "load(TILE) + dmu\n        eps"),
    "a step too few": ("range(0, steps + 1 if", "range(0, steps if"),
    "displacements that start as values": ("    clear(d, HIDDEN, LANES, COLUMNS, TILE)", "    pass"),
    "padded samples that move": ("here = (lane[:, None] < batch) & (n", "here = (lane[:, None] < batch + 1) & (n"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert changed(monkeypatch, "ragged", "momentum", [WRONG[name]]) > 1e-4


WRONG_FIXED = {
    "errors that are all kept": ("keep = 1.0 - rate", "keep = 1.0"),
    "slopes that are left out": ("here.load(TILE) + rate", "here.load(TILE) - rate"),
    "errors of one step before": ("g.index(at).store(d.index(STARTS[l] + j).load(TILE) * z.index(at).load(TILE))", "pass"),
    "pre-activations for slopes": ("z.index(at).store(act_grad(KINDS[l], before, F0[l], F1[l]))", "pass"),
}


@pytest.mark.parametrize("name", list(WRONG_FIXED))
def test_what_is_wrong_is_noticed_where_errors_move(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert changed(monkeypatch, "ragged", "fixed", [WRONG_FIXED[name]]) > 1e-4
