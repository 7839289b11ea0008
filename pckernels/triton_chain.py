"""Chains: programs that are one linear layer after the other, each with at most one activation. What relax_mlp.py can run, and how.

Needs no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from pckernels.compiler import Compiled
from pckernels.instructions import Activation, Loss, Op
from pckernels.program import Kind, Node, Program
from pckernels.rules import Dynamics

WARPS, LANES = 8, 16  # of a program, and samples of a tile unless others are asked for
IDENTITY = (Activation.AFFINE, (1.0, 0.0))


@dataclass(frozen=True)
class Layer:
    """mu = f(x W^T + b): its vertex, places of W and b among the weights (ABSENT: no bias), and f with its parameters."""

    name: str
    inputs: int
    outputs: int
    weight: int
    bias: int
    activation: Activation
    factors: tuple[float, float]


@dataclass(frozen=True)
class Chain:
    """Layers from the input to the output; the last one is the output, the others hold value nodes."""

    layers: tuple[Layer, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(layer.outputs for layer in self.layers)


@dataclass(frozen=True)
class Plan:
    """How a chain runs.

    Attributes:
        lanes: samples of a tile, which one program relaxes.
        warps: of a program.
        held: whether the weights between value nodes stay in registers for all steps; otherwise every step reads them again, from L1 or L2.
        padded: the widths that the program computes with.
        registers: an estimate for each thread.
    """

    lanes: int
    warps: int
    held: bool
    padded: tuple[int, ...]
    registers: int


def chain_of(program: Program, dynamics: Dynamics) -> Chain | str:
    """The chain that a program is, or why it is none that relax_mlp can relax under these dynamics."""
    reason = _dynamics_refusal(dynamics)
    if reason is not None:
        return reason
    if len(program.inputs) != 1:
        return f"a chain reads one input; this program reads {len(program.inputs)}"
    source, layers = program.inputs[0][0], []
    for node in program.nodes:
        layer = _layer(program, node, source)
        if isinstance(layer, str):
            return layer
        layers.append(layer)
        source = node.prediction
    if program.outputs != (program.nodes[-1].name,):
        return f"a chain has one output, its last vertex; this program returns {', '.join(program.outputs)}"
    return Chain(tuple(layers))


def _dynamics_refusal(dynamics: Dynamics) -> str | None:
    if dynamics.is_nudged or dynamics.moves == "free_errors":
        return "a chain relaxes values or errors under the plain loss; this rule nudges, or lets values follow errors"
    if dynamics.has_own_feedback:
        return "errors come back through a chain by the transposed weights and with f'; this rule is relaxed"
    if dynamics.closed_form:
        return "a sweep of the closed form is no relaxation"
    if dynamics.sweep != "jacobi":
        return f"the nodes of a chain move at once; this rule sweeps {dynamics.sweep}"
    if dynamics.nested or dynamics.learn_on_arrival or dynamics.tolerance is not None:
        return "a chain relaxes all its vertices for all steps; this rule is nested, learns on arrival, or has a tolerance"
    return None


def _layer(program: Program, node: Node, source: int) -> Layer | str:
    kinds = [stage.kind for stage in node.stages]
    if kinds not in ([Kind.LINEAR], [Kind.LINEAR, Kind.ACTIVATION]):
        found = ", ".join(kind.value for kind in kinds) or "what is computed outside"
        return f"a layer of a chain is linear with at most one activation behind it; vertex {node.name!r} is {found}"
    product = node.stages[0]
    positions, inputs, outputs = product.p
    if positions != 1:
        return f"vertex {node.name!r} applies its weight at {positions} positions; a layer of a chain has one"
    if product.inputs != (source,) or any(stage.inputs != (product.output,) for stage in node.stages[1:]):
        return f"vertex {node.name!r} reads something else than the vertex before it"
    activation, factors = IDENTITY
    if len(node.stages) == 2:
        f0, f1, *_ = (*node.stages[1].f, 0.0, 0.0)
        activation, factors = Activation(node.stages[1].p[0]), (f0, f1)
    return Layer(node.name, inputs, outputs, product.weight, product.bias, activation, factors)


@lru_cache(maxsize=256)
def chain_of_code(compiled: Compiled) -> Chain | str:
    """The chain whose relaxation code is, or why it is none."""
    if compiled.program is None or compiled.dynamics is None:
        return "the code is not that of steps of a program"
    if compiled.weighed:
        return "the errors of a chain have precision 1; here vertices have others"
    chain = chain_of(compiled.program, compiled.dynamics)
    if isinstance(chain, str):
        return chain
    kind, classes = loss_of(compiled)
    if kind is Loss.CROSS_ENTROPY and classes != chain.widths[-1]:
        return f"the cross-entropy of a chain has one position; here are {chain.widths[-1] // classes}"
    return chain


def loss_of(compiled: Compiled) -> tuple[Loss, int]:
    """Of the output: its kind, and the classes of a cross-entropy."""
    instruction = next(i for i in compiled.code.instructions if i.op is Op.LOSS)
    return Loss(instruction.p[0]), instruction.p[1]


def padded_widths(widths: tuple[int, ...], lanes: int) -> tuple[int, ...]:
    """Powers of two, at least 16 for a product, and above the lanes: Triton splits a product between warps along its longer side, and all
    products of a chain along the same one, so that one narrow layer would have every warp compute everything."""
    return tuple(max(2 * lanes, 1 << (width - 1).bit_length()) for width in widths)


# Registers of a thread that a chain may take, and the widest layer, by precision. Above, ahead_of_time finds spills on sm_80 or sm_90:
# without tensor cores a product needs many registers beside the state.
REGISTERS = {"fp32": 100, "tf32": 165, "fp16": 170, "bf16": 170}
WIDEST = {"fp32": 64, "tf32": 128, "fp16": 128, "bf16": 128}
STRICT, FIXED = 7, 4  # arrays of a layer that are alive at once


def held(precision: str) -> bool:
    """Whether the weights between value nodes stay in registers: in fp32 there is no room for them."""
    return precision != "fp32"


def registers(padded: tuple[int, ...], lanes: int, precision: str, strict: bool) -> int:
    """An estimate for each thread: the state of all layers, and the weights where they are held."""
    state = (STRICT if strict else FIXED) * lanes * sum(padded)
    weights = sum(n * k for k, n in pairwise(padded)) * (1.0 if precision == "tf32" else 0.5) if held(precision) else 0.0
    return round((state + weights) / (32 * WARPS))


def misfit(widths: tuple[int, ...], lanes: int, precision: str, strict: bool) -> str | None:
    """Why a chain of these widths does not fit in registers, or None."""
    padded = padded_widths(widths, lanes)
    if max(padded) > WIDEST[precision]:
        return f"a layer of {max(widths)} nodes does not fit in registers; with {precision} operands {WIDEST[precision]} nodes do"
    needed = registers(padded, lanes, precision, strict)
    if needed > REGISTERS[precision]:
        return f"it needs about {needed} registers a thread beside its products; with {precision} operands there are {REGISTERS[precision]}"
    return None


def plan_chain(chain: Chain, dynamics: Dynamics, precision: str, lanes: int | None = None) -> Plan | str:
    """How a chain runs, or why it does not fit in registers."""
    lanes, strict = lanes or LANES, dynamics.moves == "values"
    reason = misfit(chain.widths, lanes, precision, strict)
    if reason is not None:
        return reason
    padded = padded_widths(chain.widths, lanes)
    return Plan(lanes, WARPS, held(precision), padded, registers(padded, lanes, precision, strict))


def supports(compiled: Compiled, precision: str = "fp32", lanes: int | None = None) -> str | None:
    """Why relax_mlp cannot run code, or None."""
    chain = chain_of_code(compiled)
    if isinstance(chain, str):
        return chain
    assert compiled.dynamics is not None
    plan = plan_chain(chain, compiled.dynamics, precision, lanes)
    return plan if isinstance(plan, str) else None
