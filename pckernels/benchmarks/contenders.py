"""Who takes part in a case: our backends, and what a user would pick instead. Each is a call that ends in gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pckernels.backends import cuda, host, triton
from pckernels.benchmarks import eager
from pckernels.benchmarks.cases import Case
from pckernels.benchmarks.timing import recorded
from pckernels.benchmarks.verification import Gradients, gradients_of
from pckernels.errors import Unsupported
from pckernels.network import PCNetwork


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
        limit: how far its gradients may be from their oracle.
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
            found.append(make(arena, name))
        except Unsupported as error:
            refused[name] = str(error)
        except Exception as error:
            if name in OURS_ON_CPU:
                raise
            refused[name] = f"it failed: {type(error).__name__}: {error}"
    if not any(contender.ours for contender in found):
        found.insert(0, _backend("reference")(arena, "reference"))
    return found, refused


Maker = Callable[[Arena, str], Contender]


def _makers(arena: Arena) -> Iterator[tuple[str, Maker]]:
    on_gpu, case = arena.device.type == "cuda", arena.case
    yield from (OURS_ON_GPU if on_gpu else OURS_ON_CPU).items()
    if on_gpu and case.tiers:
        yield from OTHER_TIERS.items()
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

        return Contender(name, contender.ours, contender.computes, contender.limit, replay, gradients, contender.threads, contender.plan)

    return maker


def captured(run: Callable[[], object], arena: Arena) -> tuple[Callable[[], None], list[Tensor]]:
    """A replay of `run`, and the tensors in which it leaves its gradients."""
    replay, returned = recorded(run)
    if isinstance(returned, list):
        return replay, returned
    return replay, [p.grad for p in arena.module.parameters() if p.grad is not None]


# Ours


def _backend(backend: str, options: Callable[[], AbstractContextManager[Any]] = nullcontext, limit: float = 0.0, threads: int = 0) -> Maker:
    """A call of a backend; `check` is as the network's default, which reads one flag from the device."""

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
            plan = network.infer(arena.x, arena.target).plan
        own = case.limit_of_values if backend == "reference" else case.limit  # in float32 it keeps values as values
        return Contender(name, True, "rule", max(limit, own), run, _left_in(arena, run), threads or arena.threads, plan)

    return make


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
HALF = 5e-2  # what products in bf16 may cost
OURS_ON_CPU: dict[str, Maker] = {"host": _backend("host")}
OURS_ON_GPU: dict[str, Maker] = {
    "cuda": _backend("cuda"),
    "cuda, CUDA graph": _captured(_deferred(_backend("cuda"))),
    "graph": _backend("graph"),
    "graph, CUDA graph": _captured(_deferred(_backend("graph"))),
    "triton": _backend("triton"),
}
OTHER_TIERS: dict[str, Maker] = {
    "cuda, stream": _backend("cuda", lambda: cuda.options(tier="stream")),
    "cuda, resident": _backend("cuda", lambda: cuda.options(tier="resident")),
    "cuda, tf32": _backend("cuda", lambda: cuda.options("tf32"), 5e-3),
    "cuda, bf16": _backend("cuda", lambda: cuda.options("bf16"), HALF),
}


# Rivals


def _autograd(arena: Arena, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda module: module) -> Contender:
    forward, finish = wrap(arena.module), arena.optimizer_step()

    def run() -> None:
        arena.module.zero_grad(set_to_none=True)
        (0.5 * (arena.target - forward(arena.x)).square().sum()).backward()
        finish()

    return Contender(name, False, "backprop", arena.case.limit, run, _left_in(arena, run), arena.threads, "loss.backward()")


def _loop(arena: Arena, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda loop: loop) -> Contender:
    case, dynamics = arena.case, arena.case.rule.dynamics
    if case.trains or case.model.loop is None or dynamics.moves != "values" or dynamics.learn_at_each_step:
        raise Unsupported("no loop by hand computes this rule on this model, or takes an optimizer's step")
    function = wrap(eager.LOOPS[case.model.loop])
    options = {"momentum": dynamics.momentum} if dynamics.momentum else {}

    def run() -> Gradients:
        return function(arena.module, arena.x, arena.target, dynamics.steps, dynamics.rate, **options)

    words = "the energy's gradient by autograd, step by step" if case.model.loop == "chain" else "every product and derivative by hand"
    return Contender(name, False, "rule", case.limit_of_values, run, run, arena.threads, words)


def _compiled(make: Callable[..., Contender]) -> Maker:
    def maker(arena: Arena, name: str) -> Contender:
        torch.compiler.reset()
        return make(arena, name, torch.compile)

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
