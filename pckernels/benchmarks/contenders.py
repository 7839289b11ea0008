"""Who takes part in a case: our backends, and what a user would pick instead. Each is a call that ends in gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pckernels.backends import cuda, graph, host, triton
from pckernels.benchmarks import eager
from pckernels.benchmarks.cases import Case
from pckernels.benchmarks.timing import recorded
from pckernels.benchmarks.verification import Gradients, gradients_of
from pckernels.errors import Unsupported
from pckernels.network import PCNetwork
from pckernels.rules import Strict


@dataclass(frozen=True)
class Arena:
    """What all contenders of a case share: the module, its data, the device, the number of threads."""

    case: Case
    module: nn.Module
    x: Tensor
    target: Tensor
    threads: int

    @property
    def device(self) -> torch.device:
        return self.x.device

    @cached_property
    def network(self) -> PCNetwork:
        """Traced once for all of ours: each sets the backend before its call."""
        return PCNetwork(self.module, self.case.rule, **self.case.model.pc)

    def optimizer_step(self) -> Callable[[], object]:
        """What a training step ends with, where the case is one: SGD at the rate 0, which works and leaves the weights as they are."""
        if not self.case.trains:
            return lambda: None
        return torch.optim.SGD(self.module.parameters(), lr=0.0).step


@dataclass(frozen=True)
class Contender:
    """One way to compute the gradients of a case.

    Attributes:
        name: as it is printed.
        ours: whether it is pckernels.
        computes: "rule": the case's rule; "backprop": what autograd computes.
        limit: how far its gradients may be from their oracle. drift: how far float32 may take them where `proof` shows that they are right.
        proof: what shows it: "float64", "steps" (a short T) or "size" (see proof.py), or "".
        elsewhere: its gradients in another arena.
        run: one call; gradients: one call's, in the order of the module's parameters.
        threads: of PyTorch, where it is not the case's.
        plan: what ran, in words.
    """

    name: str
    ours: bool
    computes: str
    limit: float
    run: Callable[[], object]
    gradients: Callable[[], Gradients]
    threads: int
    plan: str = ""
    drift: float = 0.0
    proof: str = ""
    elsewhere: Callable[[Arena], Gradients] | None = None

    @contextmanager
    def threaded(self) -> Iterator[None]:
        """With its number of threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def contenders(arena: Arena) -> tuple[list[Contender], dict[str, str]]:
    """Those that can run the case here, and name -> why not of the others. A failure stops nobody else, but for the host engine's."""
    found: list[Contender] = []
    refused: dict[str, str] = {}
    for name, make in _makers(arena):
        try:
            found.append(_made(arena, name, make))
        except Unsupported as error:
            refused[name] = str(error)
        except Exception as error:
            if name in OURS_ON_CPU:
                raise
            refused[name] = f"it failed: {type(error).__name__}: {error}"
    if not any(contender.ours for contender in found):
        found.insert(0, _made(arena, "reference", _backend("reference")))
    return found, refused


Maker = Callable[[Arena, str], Contender]


def _made(arena: Arena, name: str, make: Maker) -> Contender:
    """Here, and as it would be made in another arena."""
    return replace(make(arena, name), elsewhere=lambda other: make(other, name).gradients())


def _makers(arena: Arena) -> Iterator[tuple[str, Maker]]:
    on_gpu, case = arena.device.type == "cuda", arena.case
    yield from (OURS_ON_GPU if on_gpu else OURS_ON_CPU).items()
    if case.tiers:
        yield from (OTHER_TIERS if on_gpu else OTHERS_ON_CPU).items()
    if case.reference:
        yield "reference", _backend("reference")
    for name in dict.fromkeys(("autograd", *case.rivals)):
        if name in RIVALS:
            yield name, RIVALS[name]
        if on_gpu and name in ("autograd", "loop"):
            yield f"{name}, CUDA graph", RIVALS[f"{name}, CUDA graph"]
        if not on_gpu and name == TWO_THREADS:
            yield name, _backend("host", threads=2)


# Captured in a CUDA graph


def _captured(make: Callable[..., Contender]) -> Maker:
    """The same work, recorded once as a CUDA graph and replayed."""

    def maker(arena: Arena, name: str) -> Contender:
        contender = make(arena, name)
        replay, found = captured(contender.run, arena)

        def gradients() -> Gradients:
            replay()
            return [tensor.clone() for tensor in found]

        return replace(contender, name=name, run=replay, gradients=gradients)

    return maker


def captured(run: Callable[[], object], arena: Arena) -> tuple[Callable[[], None], list[Tensor]]:
    """A replay of `run`, and the tensors in which it leaves its gradients."""
    replay, returned = recorded(run)
    if isinstance(returned, list):
        return replay, returned
    return replay, [p.grad for p in arena.module.parameters() if p.grad is not None]


# Ours


Options = Callable[[], AbstractContextManager[Any]]


def _backend(backend: str, options: Options = nullcontext, threads: int = 0, rounded: bool = False) -> Maker:
    """A call of a backend; `check` is as the network's default, which reads one flag from the device. rounded: operands of products are."""

    def make(arena: Arena, name: str, check: str = "sync") -> Contender:
        case, network, finish = arena.case, arena.network, arena.optimizer_step()

        def run() -> None:
            network.backend, network.check = backend, check
            arena.module.zero_grad(set_to_none=True)
            with options():
                network.backward(arena.x, arena.target)
            finish()

        network.backend, network.check = backend, check
        with options():
            found = network.infer(arena.x, arena.target)
        plan = f"{found.backend}: {found.plan}" if backend == "auto" else found.plan
        own = {"proof": "size", "drift": ROUNDED} if rounded else _own_limits(case, found.backend)
        return replace(Contender(name, True, "rule", case.limit, run, _left_in(arena, run), threads or arena.threads, plan), **own)

    return make


def _own_limits(case: Case, backend: str) -> dict[str, Any]:
    """How a backend in float32 is held against float64: the reference keeps values as values, and runs in float64 too."""
    if backend == "reference":
        return {"limit": case.limit_of_values, "drift": DRIFT, "proof": "float64"}
    return {"drift": case.drift, "proof": "steps"} if case.drift else {}


def _left_in(arena: Arena, run: Callable[[], object]) -> Callable[[], Gradients]:
    """The gradients that a run leaves in the module's parameters."""

    def gradients() -> Gradients:
        arena.module.zero_grad(set_to_none=True)
        run()
        return gradients_of(arena.module)

    return gradients


def _deferred(make: Callable[..., Contender]) -> Callable[..., Contender]:
    """As calls are made while a CUDA graph is captured: nothing reads the device."""
    return partial(make, check="deferred")


TWO_THREADS = "host, two threads"
ROUNDED = 5e-2  # what products in tf32 or bf16 may cost
DRIFT = 0.5  # of float32, where float64 has shown that it is float32 alone
OURS_ON_CPU: dict[str, Maker] = {"host": _backend("host")}
OTHERS_ON_CPU: dict[str, Maker] = {"auto": _backend("auto"), "graph": _backend("graph")}
OURS_ON_GPU: dict[str, Maker] = {
    "cuda": _backend("cuda"),
    "cuda, CUDA graph": _captured(_deferred(_backend("cuda"))),
    "graph": _backend("graph"),
    "graph, CUDA graph": _captured(_deferred(_backend("graph"))),
    "graph, unfused": _backend("graph", lambda: graph.options(fused=False)),
    "triton": _backend("triton"),
}
OTHER_TIERS: dict[str, Maker] = {
    "cuda, stream": _backend("cuda", lambda: cuda.options(tier="stream")),
    "cuda, resident": _backend("cuda", lambda: cuda.options(tier="resident")),
    "cuda, tf32": _backend("cuda", lambda: cuda.options("tf32"), rounded=True),
    "cuda, bf16": _backend("cuda", lambda: cuda.options("bf16"), rounded=True),
}


# Rivals


def _autograd(arena: Arena, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda module: module) -> Contender:
    forward, finish = wrap(arena.module), arena.optimizer_step()

    def run() -> None:
        arena.module.zero_grad(set_to_none=True)
        (0.5 * (arena.target - forward(arena.x)).square().sum()).backward()
        finish()

    found = Contender(name, False, "backprop", arena.case.limit, run, _left_in(arena, run), arena.threads, "loss.backward()")
    return replace(found, drift=DRIFT, proof="float64")


def _loop(arena: Arena, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda loop: loop) -> Contender:
    case, rule = arena.case, arena.case.rule
    plain = isinstance(rule, Strict) and rule == Strict(rule.steps, rule.rate, rule.momentum)
    if case.trains or case.model.loop is None or case.model.precision or not plain:
        raise Unsupported("no loop by hand computes this rule on this model, or takes an optimizer's step")
    dynamics = rule.dynamics
    function = wrap(eager.LOOPS[case.model.loop])
    options = {"momentum": dynamics.momentum} if dynamics.momentum else {}

    def run() -> Gradients:
        return function(arena.module, arena.x, arena.target, dynamics.steps, dynamics.rate, **options)

    found = Contender(name, False, "rule", case.limit_of_values, run, run, arena.threads, "every product and derivative by hand")
    return replace(found, drift=DRIFT, proof="float64")


def _compiled(make: Callable[..., Contender]) -> Maker:
    """The same by `torch.compile`. In float64 it would be another program: what it computes in float32 has to be right."""

    def maker(arena: Arena, name: str) -> Contender:
        torch.compiler.reset()
        return replace(make(arena, name, torch.compile), drift=0.0, proof="")

    return maker


RIVALS: dict[str, Maker] = {
    "autograd": _autograd,
    "autograd, compiled": _compiled(_autograd),
    "autograd, CUDA graph": _captured(_autograd),
    "loop": _loop,
    "loop, compiled": _compiled(_loop),
    "loop, CUDA graph": _captured(_loop),
}


def engines() -> dict[str, str]:
    """What is compiled in and chosen, in words."""
    return {"host": host.availability()[1], "cuda": cuda.availability()[1], "triton": triton.availability()[1]}
