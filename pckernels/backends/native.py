"""What all native backends share: a call's code, run over its memory, and what comes out of it.

A backend hands in `execute`: it runs code over weights, io, gradients and energies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from pckernels.backends import closed_form, energies
from pckernels.backends.binding import Binding, Execute
from pckernels.backends.feedforward import learning_parameters
from pckernels.backends.learning import LocalUpdates, with_backward_weights
from pckernels.backends.path_lengths import make_plan
from pckernels.backends.results import Lazy, complaint, feed_forward_outcome, relaxation, together
from pckernels.backends.selection import PlanFor, code_of, phases
from pckernels.backends.weighing import Weighing
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled
from pckernels.memory import Packed, part_of
from pckernels.rules import Dynamics

Result = TypeVar("Result")


def run(call: Call, execute: Execute) -> Outcome:
    """One inference: a run of code, or one for each nudge, each from the feed-forward start; what they learn is added up."""
    outcomes = [_run(phase, execute) for phase in phases(call)]
    return outcomes[0] if len(outcomes) == 1 else together(outcomes)


def _run(call: Call, execute: Execute) -> Outcome:
    code = code_of(call)
    assert not isinstance(code, str), code
    with torch.no_grad():
        binding = Binding(call, code, execute)
        memory = binding.run()
        return _Results(binding, memory).outcome(memory.gradients)


def run_on(device: torch.device | str, call: Call, execute: Execute, plan_for: PlanFor) -> Outcome:
    """One inference as a backend plans it, whose tensors, those computed later too, are made on the device of the call's tensors."""
    assert isinstance(device, torch.device), device
    plan = plan_for(code_of(call), call.size, device) if call.size else ""
    reason = getattr(plan, "reason", "an empty batch")

    def there(compute: Callable[[], Result]) -> Callable[[], Result]:
        def later() -> Result:
            with torch.device(device):
                return compute()

        return later

    with torch.device(device):
        found = run(call, execute)
    values, errors, energy, complain = there(found.values), there(found.errors), there(found.energy), there(found.complaint)
    return replace(found, values=values, errors=errors, energy=energy, complaint=complain, plan=f"{found.plan}; {reason}")


class _Results:
    """What a run has found. It holds what somebody may ask for: not the scratch memory, nor the gradients, which would then be copied."""

    def __init__(self, binding: Binding, memory: Packed):
        self.binding, self.call, self.code, self.program = binding, binding.call, binding.code, binding.program
        self.graph, self.kept, self.energies = binding.call.trace.graph, memory.kept, memory.energies
        self.names = [node.name for node in self.program.nodes]  # in the order of the energies' slots
        self.weighing = binding.weighing
        self.halves: dict[str, Tensor] = {}
        if self.weighing is not None:
            self._weigh(self.weighing)

    def _weigh(self, weighing: Weighing) -> None:
        """Take down the squares that precisions learn from, and add what precisions add to F."""
        slots = {name: slot for slot, name in enumerate(self.names)}
        if self.call.learn:
            last = self.energies[-1]
            self.halves = weighing.halves({name: last[slots[name]].clone() for name in weighing.logs})
        if self.code.carried:
            for name, volume in weighing.log_volumes.items():
                self.energies[:, slots[name]] += volume

    def outcome(self, gradients: Sequence[Tensor]) -> Outcome:
        """`gradients`: what the code has learned, in the order of its slots."""
        if self.call.objective is None:
            return feed_forward_outcome({name: self._value(name) for name in self.names}, {})
        losses = self._losses()
        may_diverge = self.call.dynamics.moves != "errors"
        good, divergence = energies.verdict(self.energies, self.code.still, may_diverge)
        return Outcome(
            losses=losses,
            values=Lazy(self._values),
            errors=Lazy(self._errors),
            energy=Lazy(lambda: self._course(self._trajectory()).to(losses.dtype))
            if self.code.carried
            else Lazy(self._energy_of_sweep(losses)),
            good=good,
            complaint=lambda: complaint(self._feed_forward(), self.call.dynamics, self._trajectory(), self._errors(), divergence()),
            plan=_plan(self.code, self.call.dynamics, self.call.update is not None),
            gradients=self._gradients(gradients) if self.call.learn and self.call.update is None else {},  # an optimizer has had them
        )

    def _losses(self) -> Tensor:
        """(B,): summed over the outputs."""
        found = [self._result("losses", name) for name in self.program.outputs if ("losses", name) in self.code.slots]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def _trajectory(self) -> Tensor:
        return energies.trajectory(self.energies, self.code.still)

    def _course(self, trajectory: Tensor) -> Tensor:
        """(steps + 1,), of the steps up to that after which every sample rested. To look is to wait for the device."""
        if ("rest", "") not in self.code.slots:
            return trajectory
        steps = self._result("rest", "").view(-1, 3)[:, 2]
        last = int(steps.max()) if self.binding.batch else 1  # no samples rest after a step
        return trajectory[: last + 1]

    def _feed_forward(self) -> dict[str, Tensor]:
        """The feed-forward predictions, which the call has not kept; none where its optimizer has moved the parameters since."""
        if self.call.update is not None:
            return {}
        return run(replace(self.call, objective=None, learn=False, memo={}), self.binding.execute).values()

    def _result(self, kind: str, name: str) -> Tensor:
        """What the code has kept, flat."""
        return part_of(self.code, self.binding.batch, self.kept, self.code.slots[kind, name])

    def _value(self, name: str) -> Tensor:
        return self.binding.shaped(self._result("value", name), name)

    def _errors(self) -> dict[str, Tensor]:
        found = {}
        for name in self.names:
            coefficient = self.code.coefficients.get(name, 0.0)
            if coefficient == 0.0:
                found[name] = torch.zeros_like(self._value(name))
            else:
                error = self.binding.shaped(self._result("error", name), name)
                found[name] = error if coefficient == 1.0 else coefficient * error
            if name in self.code.weighed:
                assert self.weighing is not None
                found[name] = self.weighing.error(name, found[name])
        return found

    def _values(self) -> dict[str, Tensor]:
        """Moved values as they are; otherwise mu + eps, and of an output mu."""
        values = {name: self._value(name) for name in self.names}
        if self.call.dynamics.moves == "errors":
            errors = self._errors()
            values = {name: mu if name in self.program.outputs else mu + errors[name] for name, mu in values.items()}
        return values

    def _energy_of_sweep(self, losses: Tensor) -> Callable[[], Tensor]:
        """F at t = 0 .. T from the squares of the sweep's errors; where several path lengths make one up, by the reference."""
        squares = {name: self.energies[0, slot] for slot, name in enumerate(self.names) if name not in self.program.outputs}
        weighing = self.weighing
        if weighing is not None:
            return lambda: weighing.energy_of_sweep(squares, losses)
        plan = make_plan(self.graph, self.call.dynamics, closed_form.plan_dtype(self.graph))
        if self.call.dynamics.learn_on_arrival:
            return lambda: energies.arrival_energy(self.graph, squares, losses)
        if any(len(lengths) > 1 for lengths in self.code.lengths.values()):
            return closed_form.energy_later(self.call)
        return lambda: energies.sweep_energy(plan, self.code, squares, losses)

    def _gradients(self, learned: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parameter in the graph -> dF/dtheta times the factor, also through functions of parameters and of vertices outside."""
        bound = self.binding.bound
        found = dict(zip(self.code.gradients, learned, strict=True))
        if isinstance(self.call.factor, Tensor):
            found = {name: gradient * self.call.factor for name, gradient in found.items()}
        if self.weighing is not None:
            found |= self.weighing.gradients(self.halves)
        if bound is None:
            learning = learning_parameters(self.call)
            found |= {name: torch.zeros_like(self.call.tensors[name]) for name in learning if name not in found}
            return with_backward_weights(self.call.extra, learning, found)
        updates = LocalUpdates(bound, self.call.factor)
        errors = self._errors() if bound.locals else {}
        for name, local in bound.locals.items():
            updates.learn(local, errors[name])
        return updates.gradients(found)


@lru_cache(maxsize=256)
def _plan(code: Compiled, dynamics: Dynamics, by_optimizer: bool) -> str:
    kind = {"values": "strict dynamics", "errors": "fixed prediction", "free_errors": "error optimisation"}[dynamics.moves]
    if dynamics.is_nudged:
        kind = f"{kind}, nudged by {dynamics.nudges[0]:+g}"
    if dynamics.learn_at_each_step:
        who = "the weights, by the optimizer," if by_optimizer else "a copy of the weights"
        kind = f"incremental, values and {who} together"
    how = (" with precisions" if code.weighed else "") + relaxation(dynamics)
    if dynamics.learn_on_arrival:
        what = f"zero divergence{how} in one backward sweep"
    elif dynamics.closed_form:
        what = f"{kind} in closed form{how}, one backward sweep"
    else:
        what = f"{kind}{how}, {code.code.steps} steps{'' if dynamics.tolerance is None else ' at most'}"
    order = ", one time step after the other" if dynamics.nested else ""
    return (
        f"{what}{order}: {len(code.code.instructions)} instructions over {code.code.energies} vertices, {code.code.rows} numbers a sample"
    )
