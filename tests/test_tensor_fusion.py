"""Fused launches of the graph tier: the same results in fewer of them. Here PyTorch evaluates formulas; in test_triton_rows.py, Triton."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import extra_case
import pytest
import torch
from test_backends import MODELS, data
from test_graph_tier import Recorded, assert_is_the_reference, found, recording  # noqa: F401
from torch import Tensor

import pckernels as pck
from pckernels import tensor_operations as operations
from pckernels.arena import Draft, atoms
from pckernels.backends import graph
from pckernels.compiler import Compiled
from pckernels.formula import SUMS, evaluate
from pckernels.instructions import Loss, Op
from pckernels.ordering import dependences
from pckernels.tensor_fusion import MOST_TENSORS, Fusion
from pckernels.tensor_layout import Stage, layout
from pckernels.tensor_machine import Kernels


def cross_entropy(mu: Tensor, change: Tensor | None, target: Tensor, error: Tensor, factor: float, parts: Tensor) -> None:
    """By PyTorch, in any dtype."""
    losses, gap = operations.loss(Loss.CROSS_ENTROPY, mu.shape[1] // target.shape[1], mu, change, target)
    error.copy_(factor * gap)
    parts[0].copy_(factor * losses.sum(dtype=torch.float64))


RULES = [
    pck.Strict(7, 0.1, momentum=0.5),
    pck.Strict(3, 0.1, sweep="top_down"),
    pck.Strict(6, 0.1, nudge=0.5),
    pck.Strict(30, 0.1, tolerance=1e-2),
    pck.FixedPrediction(5, 0.3, solver="iterate"),
    pck.ErrorOptimization(5, 0.1, momentum=0.3),
    pck.Incremental(4, 0.1, 0.05),
]
IDS = ["momentum", "top_down", "nudged", "tolerance", "fixed", "error_optimization", "incremental"]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compiled]]:
    """The graph tier fuses launches in any dtype; a list of the codes that it has run."""
    ran: list[Compiled] = []
    kernels = Kernels(evaluate, cross_entropy, lambda classes: None if classes < 1000 else "too many")
    execute = graph.execute

    def watched(compiled: Compiled, *rest: Any) -> None:
        ran.append(compiled)
        execute(compiled, *rest)

    monkeypatch.setattr(graph, "_kernels", lambda device, dtype: kernels)
    monkeypatch.setattr(graph, "execute", watched)
    yield ran


# An LSTM's weights are functions of parameters, which Incremental cannot move here.
EVERY = [(name, rule) for name in ("mlp", "skip", "cnn") for rule in RULES]
EVERY += [("residual", rule) for rule in (RULES[0], RULES[4])] + [("lstm", rule) for rule in (RULES[0], RULES[1], RULES[4], RULES[5])]


@pytest.mark.parametrize(("name", "rule"), EVERY, ids=lambda value: value if isinstance(value, str) else IDS[RULES.index(value)])
def test_it_is_the_reference_in_float64(fused: list[Compiled], name: str, rule: pck.rules.Rule) -> None:
    assert_is_the_reference(name, rule)
    assert fusions(fused[-1])


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_cross_entropy(fused: list[Compiled], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With positions, of which some are ignored; each step's is one launch, the feed-forward pass's, which has losses, is not."""
    calls: list[str] = []
    loss = operations.loss
    monkeypatch.setattr(operations, "loss", lambda *arguments: calls.append("loss") or loss(*arguments))  # type: ignore[func-returns-value]
    assert_is_the_reference(name, RULES[0], "cross_entropy")
    assert len(calls) == 1 + 7  # the latter by the stand-in for the kernel


@pytest.mark.parametrize(("name", "precision"), [("cnn", "elements"), ("skip", "learned"), ("mlp", None)])
def test_precisions_and_backward_weights(fused: list[Compiled], name: str, precision: str | None) -> None:
    """In float32, as accurate as the reference."""
    extra_case.assert_as_good("graph", name, pck.Relaxed(pck.Strict(4, 0.1), "learned", False), 5, precision)
    assert fusions(fused[-1])


def drafts_of(stage: Stage) -> list[Draft]:
    return [draft for item in stage.items for draft in (item.drafts if isinstance(item, Fusion) else (item,))]


def fusions(compiled: Compiled) -> list[Fusion]:
    return [item for stage in layout(compiled, True).stages for item in stage.items if isinstance(item, Fusion)]


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm"])
@pytest.mark.parametrize("rule", [RULES[0], RULES[2], RULES[4]], ids=[IDS[0], IDS[2], IDS[4]])
def test_replayed_steps_are_the_steps(fused: list[Compiled], recording: list[Recorded], name: str, rule: pck.rules.Rule) -> None:  # noqa: F811
    """What has been turned reaches a replay where the recording has read it."""
    module = MODELS[name].build().double()
    network, plain = pck.PCNetwork(module, rule, backend="graph"), pck.PCNetwork(module, rule, backend="reference")
    for call in range(4):
        torch.manual_seed(call)
        x, target = torch.randn(5, *MODELS[name].shape).double(), torch.randn(5, *MODELS[name].target).double()
        ours, expected = found(network, x, target), found(plain, x, target)
        for key, value in expected.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-10, atol=1e-11, msg=f"{key} of call {call}")
    assert recording and fusions(fused[-1])


@pytest.mark.parametrize("name", ["mlp", "skip", "cnn", "lstm"])
@pytest.mark.parametrize("rule", RULES[:3], ids=IDS[:3])
def test_every_draft_runs_once_and_after_what_it_depends_on(fused: list[Compiled], name: str, rule: pck.rules.Rule) -> None:
    network = pck.PCNetwork(MODELS[name].build(), rule, backend="graph")
    network.infer(*data(name, 3, "squared_error"))
    plain, ours = (layout(fused[-1], is_fused) for is_fused in (False, True))
    for before, after in zip(plain.stages, ours.stages, strict=True):
        assert (before.first, before.last, before.repeats) == (after.first, after.last, after.repeats)
        drafts = drafts_of(after)
        # Turned drafts run after all others, and otherwise nothing has changed.
        wanted = [draft for draft in before.items if draft not in after.turned] + list(after.turned)
        assert len(drafts) == len(wanted) and set(map(id, drafts)) == set(map(id, wanted))
        place = {id(draft): k for k, draft in enumerate(drafts)}
        for draft, earlier in zip(wanted, dependences(wanted), strict=True):
            assert all(place[id(wanted[j])] < place[id(draft)] for j in earlier)


def test_a_launch_is_over_one_shape_and_keeps_to_its_limits(fused: list[Compiled]) -> None:
    for name in ("skip", "lstm", "cnn"):
        pck.PCNetwork(MODELS[name].build(), RULES[0], backend="graph").infer(*data(name, 3, "squared_error"))
        for fusion in fusions(fused[-1]):
            assert len({draft.n for draft in fusion.drafts}) == 1
            assert len(set(fusion.arrays)) <= MOST_TENSORS and len(fusion.slots) == len(fusion.written.formula.sums) <= SUMS
            in_memory = set(atoms(fusion.arrays))
            assert all(set(atoms([array])) <= {atom for draft in fusion.drafts for atom in atoms(draft.arrays)} for array in in_memory)


def items(compiled: Compiled) -> list[Any]:
    """Of a step of the last stage of the loop."""
    return list([stage for stage in layout(compiled, True).stages if stage.repeats][-1].items)


def test_between_two_products_of_a_chain_lies_one_launch(fused: list[Compiled]) -> None:
    """By hand, three hidden layers of which the first sends nothing: each moves, each of the others is observed, and the output is."""
    pck.PCNetwork(MODELS["mlp"].build(), RULES[0], backend="graph").infer(*data("mlp", 3, "squared_error"))
    found = items(fused[-1])
    launches = [item for item in found if isinstance(item, Fusion)]
    products = [item.op for item in found if isinstance(item, Draft)]
    assert sorted(products) == sorted([Op.LINEAR] * 3 + [Op.LINEAR_T] * 3)
    kinds = sorted(tuple(sorted(draft.op.name for draft in item.drafts)) for item in launches)
    observed = ("ACT_CHANGE", "ACT_GRAD", "ERROR", "NORM")
    assert kinds == sorted([("MOVE",), ("MOVE",), ("MOVE", "NORM"), observed, observed, ("LOSS",)])


def test_what_only_a_launch_needs_has_no_memory(fused: list[Compiled]) -> None:
    """Fixed prediction: of the slope and the squares nothing is written but g."""
    pck.PCNetwork(MODELS["mlp"].build(), RULES[4], backend="graph").infer(*data("mlp", 3, "squared_error"))
    launches = [item for item in items(fused[-1]) if isinstance(item, Fusion)]
    assert sorted(len(item.written.stores) for item in launches) == [1, 2, 2]  # eps; where it is sent on, g too
    assert all(item.drafts[0].op is Op.RELAX for item in launches)


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_only_what_products_read_is_turned(fused: list[Compiled], name: str) -> None:
    """Else it would have to be in memory from one step to the next, where it now lives in a register."""
    pck.PCNetwork(MODELS[name].build(), RULES[0], backend="graph").infer(*data(name, 3, "squared_error"))
    (stage,) = [stage for stage in layout(fused[-1], True).stages if stage.repeats and stage.last > stage.first]
    assert stage.turned
    results = {draft.out for draft in stage.turned}
    others = [draft for draft in drafts_of(stage) if draft not in stage.turned]
    assert not [draft for draft in others if draft.is_rowwise and results.intersection(draft.reads)]


def test_options() -> None:
    network = pck.PCNetwork(MODELS["mlp"].build(), pck.Strict(3, 0.1), backend="graph")
    x, target = data("mlp", 3, "squared_error")
    with graph.options(fused=False):
        assert "operations a step, operation by operation" in network.infer(x, target).plan
    with graph.options(fused=True):
        with pytest.raises(pck.Unsupported, match=r"launches are fused (by Triton|on a CUDA device)"):
            network.infer(x, target)
        double = pck.PCNetwork(MODELS["mlp"].build().double(), pck.Strict(3, 0.1), backend="graph")
        with pytest.raises(pck.Unsupported, match=r"launches are fused in float32; this call has torch\.float64"):
            double.infer(x.double(), target.double())
