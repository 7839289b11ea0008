"""PCNetwork: any PyTorch module, trained by predictive coding; and Inference, what one call found."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pckernels import dispatch
from pckernels.arguments import Arguments, check_inputs, check_module, clamped
from pckernels.call import Call, Extra, Outcome, Snapshot, Update
from pckernels.capture import first_line, speaks_of_dtypes
from pckernels.clamps import Held, Wish
from pckernels.deposit import deposit
from pckernels.dispatch import Run
from pckernels.errors import InferenceDiverged, Unsupported
from pckernels.extra import PREFIX, ExtraParameters
from pckernels.graph import ComputationGraph, Trace
from pckernels.losses import Loss
from pckernels.match import Matched
from pckernels.module_key import module_key
from pckernels.objective import Objective
from pckernels.optimizers import check_holds, check_optimizer
from pckernels.options import Option, changed
from pckernels.precision import Precision, is_learned
from pckernels.rollback import Rollback
from pckernels.rules import Rule
from pckernels.tracing import trace
from pckernels.wrappers import is_distributed, unwrapped

_TRACES = 16  # per network; a new training mode, dtype, device or sequence length takes one
_MANY_TRACES = (
    f"This network has been traced for more than {_TRACES} kinds of call, which takes seconds each time. Keep lengths and sizes few, and "
    "let a number that changes often be a buffer, which is read at each call, in place of a plain member of a module."
)
_MISSING = object()
_OWN = ("_options", "_extra", "_traces", "_latest", "training")  # attributes of a network, beside its options and properties


class PCNetwork(nn.Module):
    """A PyTorch module that learns by predictive coding. It has the module's own parameters and state_dict keys.

    Where the rule has weights of its own (Relaxed), or precisions are learned, those are parameters too, made at the first trace:
    `extra_parameters()`, with keys `pc.*` in the state_dict. Call `trace(x)` before you make an optimizer over `parameters()`.

    All but the module can be set between calls, as in `network.rule = ..`, and are checked then as here. The names of the network's
    own attributes and methods are its own: where the module has a member `loss`, `network.loss` is the network's and
    `network.module.loss` the module's, in its place as it was.

    Args:
        module: any nn.Module that torch.export can capture.
        rule: Strict, ErrorOptimization, Incremental, FixedPrediction or ZeroDivergence, or Relaxed over one of these.
        loss: "squared_error" (1/2 sum over features), "cross_entropy" (logits with classes last, int64 targets, -100
            ignored, summed over positions), or f(output, target) -> (B,); per sample, batch first. A loss that is an nn.Module moves
            with the network's `.to()`, and is no part of it otherwise: parameters of its own do not learn here.
        reduction: "mean" divides `.grad` and `inference.loss` by the batch size alone, "sum" leaves them.
        value_nodes: "layer", "op", or names of submodules (see placement.py).
        batch_dim: where the batch lies in the inputs; in an output it is found by itself.
        backend: "auto" or one of `pckernels.backends()`.
        check: "sync" reads one device flag at the end of a call and raises at once; "deferred" never waits for the device:
            it adds nothing where the flag is bad, and raises when `.energy` or `.loss` is read.
        precision: how much the error of a hidden vertex weighs in F, 1/2 pi_i ||eps_i||^2; 1 where nothing is said. A number for all, or
            a dict from names of hidden vertices to numbers or tensors (broadcast over a sample), each > 0. "learned", for all or in the
            dict: one number for the vertex, kept as its logarithm, which learns as F has -1/2 log pi_i for each of its elements.
            From a feed-forward start with few steps errors are small, and learned precisions grow without bound: fix them then.
        match: "millidge2020", "torch2pc", "pcx" or "whittington2017": do as that code does where it differs from the equations
            (match.py says how).

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
        Unsupported: the backend is not available, or the module comes from torch.jit.
    """

    rule, loss, reduction = Option[Rule](), Option[Loss](), Option[str]()
    value_nodes, batch_dim = Option[str | tuple[str, ...]](), Option[int]()
    backend, check = Option[str](), Option[str]()
    precision, match = Option[Precision](), Option[str | None]()
    _extra: ExtraParameters
    _traces: OrderedDict[Any, Trace]
    _latest: tuple[Any, Trace] | None

    def __init__(
        self,
        module: nn.Module,
        rule: Rule,
        loss: Loss = "squared_error",
        reduction: str = "mean",
        value_nodes: str | Sequence[str] = "layer",
        batch_dim: int = 0,
        backend: str = "auto",
        check: str = "sync",
        precision: Precision = None,
        match: str | None = None,
    ):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module; got {type(module).__name__}.")
        options: dict[str, Any] = {"rule": rule, "loss": loss, "reduction": reduction, "value_nodes": value_nodes, "batch_dim": batch_dim}
        options |= {"backend": backend, "check": check, "precision": precision, "match": match}
        inner = unwrapped(module)
        check_module(inner)
        options = changed({}, options, inner)
        self._adopt(module)
        # Not by nn.Module's __setattr__, which looks into the registries, and they are the module's.
        self.__dict__.update(_options=options, _extra=ExtraParameters(), _traces=OrderedDict(), _latest=None)

    def _adopt(self, module: nn.Module) -> None:
        # Sharing the registries gives this network the module's own parameters and state_dict keys, without a prefix.
        inner = unwrapped(module)
        self.__dict__["module"] = module
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = inner.__dict__[registry]
        self.__dict__["training"] = module.training

    def __setattr__(self, name: str, value: Any) -> None:
        """Set one of the network's own attributes, or, by any other name, what nn.Module sets: members of the module among it."""
        if name not in _OWN and not isinstance(getattr(type(self), name, None), Option | property):
            super().__setattr__(name, value)
        elif isinstance(value, Tensor) and (name in self._parameters or name in self._buffers):
            setattr(unwrapped(self.module), name, value)  # no option is a tensor; load_state_dict(assign=True) sets members so
        else:
            object.__setattr__(self, name, value)

    def _change_option(self, name: str, value: Any) -> None:
        self.__dict__["_options"] = changed(self.__dict__["_options"], {name: value}, unwrapped(self.module))
        if name == "value_nodes":  # of all options the one that traces depend on and are not kept under
            self.retrace()

    @property
    def module(self) -> nn.Module:
        """The module that was given."""
        module: nn.Module = self.__dict__["module"]
        return module

    def train(self, mode: bool = True) -> PCNetwork:
        """Set the training mode of the network and its module."""
        self.module.train(mode)
        self.training = mode
        return self

    def extra_parameters(self) -> dict[str, nn.Parameter]:
        """What is learned beside the module's parameters, by name: backward weights `feedback.<parameter>`, of the weight's shape; error
        weights `error_weights.<vertex>` (features, features); and `log_precision.<vertex>` (). They are among `parameters()`; those
        that are random do not require grad. `step` refuses an optimizer that lacks one that learns.

        Raises RuntimeError before the first trace, if there will be any.
        """
        dynamics = self.rule.dynamics
        needed = dynamics.feedback != "symmetric" or dynamics.has_error_weights or is_learned(self.precision)
        if needed and not self._traces and not self._extra._parameters:
            raise RuntimeError("The extra parameters are made for a graph. Call trace(x) with an example input first.")
        return dict(self._extra.named_parameters())

    def named_modules(self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        """The module's, and "pc", which holds the extra parameters, if there are any."""
        yield from super().named_modules(memo, prefix, remove_duplicate)
        if self._extra._parameters:
            yield f"{prefix}.{PREFIX[:-1]}" if prefix else PREFIX[:-1], self._extra

    def get_submodule(self, target: str) -> nn.Module:
        """The module's, and itself for ""."""
        return unwrapped(self.module).get_submodule(target) if target else self

    def get_parameter(self, target: str) -> nn.Parameter:
        """The module's."""
        return unwrapped(self.module).get_parameter(target)

    def get_buffer(self, target: str) -> Tensor:
        """The module's."""
        return unwrapped(self.module).get_buffer(target)

    def _apply(self, fn: Any, recurse: bool = True) -> PCNetwork:
        self._extra._apply(fn, recurse)
        if isinstance(self.loss, nn.Module):
            self.loss._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._extra._save_to_state_dict(destination, prefix + PREFIX, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *reports: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *reports)
        missing, unexpected, errors = reports
        known = self._extra.adopt(state_dict, prefix, self.rule.dynamics, self.precision)
        self._extra._load_from_state_dict(state_dict, prefix + PREFIX, metadata, strict, missing, [], errors)
        unexpected[:] = [key for key in unexpected if key not in known]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward: it records gradients and moves running statistics as any forward does."""
        return self.module(*args, **kwargs)

    def backward(
        self,
        *args: Any,
        target: Any = _MISSING,
        scale: float | Tensor = 1.0,
        clamp: Any = None,
        free: Any = (),
        target_mask: Any = None,
        **kwargs: Any,
    ) -> Inference:
        """Relax for T steps, then add the local updates to `.grad` of the module's parameters: backward(x, target).

        Incremental moves a copy of the parameters at each step, and adds the sum of its T gradients.

        Args:
            args: the module's inputs, and the target as the last one unless `target=` is given.
            target: structured as the module's output; None in place of an output that carries no loss.
            scale: multiplies what goes into `.grad`, as GradScaler.get_scale().
            clamp: value node -> a tensor of its shape, or (tensor, mask): held there, where the mask is true, for the whole call. What
                follows a held value in the feed-forward start follows from that value; its own error is there from the start.
            free: the name of an input, several, or a dict, name -> pckernels.Free: these move, from where the arguments put them, as
                value nodes without a prediction; `inference.values` has where they end. `trace(x).inputs` has the names.
            target_mask: bool, structured as the target and broadcast to it; the loss is over what is true, and what is not is
                predicted (squared error). None in place of a mask is all.
            kwargs: keyword inputs of the module.

        Raises:
            ValueError, TypeError: inputs, target or scale of the wrong shape, type, dtype, range or structure.
            InferenceDiverged: a value is not finite, or the energy grew without bound (with check="sync").
            Unsupported: the module cannot be traced, or the rule does not apply to it: the exact rules neither clamp nor free.
            Whatever is raised, `.grad`, parameters and buffers are as they were.
        """
        inputs, target = _with_target(args, target, "backward")
        _check_scale(scale)
        wish = Wish(clamp, free, target_mask)
        return self._run(inputs, kwargs, target, scale, learn=True, record=False, wish=wish)

    def step(
        self,
        *args: Any,
        target: Any = _MISSING,
        optimizer: torch.optim.Optimizer | None = None,
        scale: float | Tensor = 1.0,
        clamp: Any = None,
        free: Any = (),
        target_mask: Any = None,
        **kwargs: Any,
    ) -> Inference:
        """zero_grad, backward, optimizer.step: step(x, target, optimizer).

        Incremental does this at each of its T steps, so that `.grad` is that of the last; if anything is raised, as InferenceDiverged
        is after the T steps, parameters, `.grad` and the optimizer's state are as they were before the first.

        Raises, beside what `backward` raises:
            ValueError: the optimizer holds no parameter of the network, or lacks one of `extra_parameters()` that learns.
            Unsupported: the optimizer needs a closure (LBFGS).
        """
        if optimizer is None and args and isinstance(args[-1], torch.optim.Optimizer):
            *rest, optimizer = args
            args = tuple(rest)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError("step needs an optimizer over the network's parameters: step(x, target, optimizer).")
        check_optimizer(optimizer, self.parameters())
        inputs, target = _with_target(args, target, "step")
        _check_scale(scale)
        wish = Wish(clamp, free, target_mask)
        if self.rule.dynamics.learn_at_each_step:
            return self._step_at_each_step(inputs, kwargs, target, scale, optimizer, wish)
        inference = self._run(inputs, kwargs, target, scale, learn=True, record=False, optimizer=optimizer, wish=wish)
        with torch.inference_mode(False):  # the optimizer's state could not be written to later
            optimizer.step()
        return inference

    def _step_at_each_step(
        self,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: Any,
        scale: float | Tensor,
        optimizer: torch.optim.Optimizer,
        wish: Wish,
    ) -> Inference:
        if self.check == "deferred":
            raise Unsupported(
                'Incremental steps the optimizer before check="deferred" can know whether all is well. Use check="sync", or backward.'
            )

        def update(parameters: list[Tensor], gradients: list[Tensor]) -> None:
            optimizer.zero_grad()
            deposit(self.module, parameters, gradients)
            optimizer.step()

        with Rollback(self, optimizer):
            return self._run(inputs, kwargs, target, scale, learn=True, record=False, optimizer=optimizer, update=update, wish=wish)

    def infer(
        self,
        *args: Any,
        target: Any = _MISSING,
        record: bool = False,
        clamp: Any = None,
        free: Any = (),
        target_mask: Any = None,
        **kwargs: Any,
    ) -> Inference:
        """As `backward`, without touching `.grad`; without a target, the feed-forward values.

        The last positional argument is the target when there are more of them than forward requires; say target=None to
        pass optional inputs by position without a target.
        """
        if not isinstance(record, bool):
            raise TypeError(f"record must be True or False; got {type(record).__name__}.")
        if target is _MISSING:
            required = max(1, _required(unwrapped(self.module)))
            inputs, target = (args[:-1], args[-1]) if len(args) > required else (args, None)
        else:
            inputs = args
        return self._run(inputs, kwargs, target, 1.0, learn=False, record=record, wish=Wish(clamp, free, target_mask))

    def trace(self, *args: Any, **kwargs: Any) -> ComputationGraph:
        """The computation graph for these inputs in the present training mode, from the cache or traced anew."""
        with torch.inference_mode(False):
            arguments = Arguments(args, kwargs, self.batch_dim)
            traced = self._trace(arguments)
            self._bind_extra(traced, arguments)
        return traced.graph

    def retrace(self) -> None:
        """Forget every trace, so that the next call traces anew: for changes to the module that no key sees, as in a list that it holds."""
        self._traces.clear()
        self._latest = None

    def _bind_extra(self, traced: Trace, arguments: Arguments) -> Extra:
        """The extra parameters and the precisions of this network on a graph."""
        dynamics = self.rule.dynamics
        if dynamics.feedback == "symmetric" and not dynamics.has_error_weights and self.precision is None:
            return Extra()
        inner = unwrapped(self.module)
        adds = dynamics.feedback != "symmetric" or dynamics.has_error_weights or is_learned(self.precision)
        if adds and is_distributed(self.module):
            raise Unsupported(
                "DistributedDataParallel does not average what a network adds to its module. Use no Relaxed and no precision= with it."
            )
        if adds and hasattr(inner, PREFIX[:-1]):
            raise ValueError("The module has a member named 'pc', which is where the network's own parameters go. Give it another name.")
        weights = {key: _member(inner, name, "_parameters") for key, name in traced.parameters.items()}
        return self._extra.extra(traced, dynamics, self.precision, weights, arguments.device)

    @property
    def graph(self) -> ComputationGraph:
        """The graph of the latest call. Raises RuntimeError before the first."""
        if not self._traces:
            raise RuntimeError("The network has no graph before its first call. Call trace(x) with an example input.")
        return self._traces[next(reversed(self._traces))].graph

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_traces": OrderedDict(), "_latest": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> PCNetwork:
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return clone

    def _trace(self, arguments: Arguments) -> Trace:
        module = unwrapped(self.module)
        key = (arguments.key, module_key(module), self.rule.exact)
        if self._latest is not None and self._latest[0] == key:  # to compare is cheaper than to hash
            return self._latest[1]
        found = self._traces.get(key) or self._traces.get((key, arguments.size))
        if found is None:
            check_inputs(module, arguments)
            args, kwargs = arguments.args, arguments.kwargs
            found = trace(module, *args, value_nodes=self.value_nodes, batch_dim=self.batch_dim, live_statistics=self.rule.exact, **kwargs)
            # A graph that holds for one batch size alone is kept under that size.
            self._traces[key if found.batched else (key, arguments.size)] = found
            if len(self._traces) > _TRACES:
                self._traces.popitem(last=False)
                warnings.warn(_MANY_TRACES, RuntimeWarning, stacklevel=2)
        self._traces.move_to_end(key if found.batched else (key, arguments.size))
        self._latest = (key, found) if found.batched else None
        return found

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: Any,
        scale: float | Tensor,
        learn: bool,
        record: bool,
        optimizer: torch.optim.Optimizer | None = None,
        update: Update | None = None,
        wish: Wish | None = None,
    ) -> Inference:
        wish = wish or Wish()
        if target is not None:
            _check_weight_rate(self.rule, update)
        elif wish:
            raise ValueError(
                "clamp=, free= and target_mask= need a target; give one, with a target_mask that is false where it is not known."
            )
        if wish and self.match is not None:
            raise Unsupported(
                f"match={self.match!r} does as another code does, which has no clamp=, free= or target_mask=. Leave match= out."
            )
        module = unwrapped(self.module)
        with torch.inference_mode(False):
            arguments = Arguments(args, kwargs, self.batch_dim)
            traced = self._trace(arguments)
            known = wish.target_mask
            objective = None if target is None else Objective(self.loss, traced, target, arguments, self.check == "sync", known)
            matched = Matched(self.match, self.rule, self.reduction, arguments.size, self.loss)
            pull, divisor = matched.objective(objective), matched.divisor
            extra, clamps = self._bind_extra(traced, arguments), wish.clamps(traced, arguments, self.rule)
            tensors, factor = _tensors(traced, module, arguments) | self._extra.tensors(extra), scale * matched.factor / divisor
            if optimizer is not None:
                check_holds(optimizer, _learned(extra, tensors))
            call = Call(traced, tensors, pull, matched.rule, learn, record, factor, arguments.size, divisor, update, extra, clamps)
            name, run, why = dispatch.choose(self.backend, call)
            outcome = _explaining(module, run, call)
            self._check(outcome)
            if optimizer is not None and update is None:
                optimizer.zero_grad()
            self._commit(module, call, outcome)
            clamped_outputs = {} if objective is None or self.rule.dynamics.is_nudged else objective.clamped
        return Inference(outcome, name, why, clamped_outputs, matched.reported, self.check)

    def _check(self, outcome: Outcome) -> None:
        if self.check == "sync" and not bool(outcome.good):
            raise InferenceDiverged(outcome.complaint())

    def _commit(self, module: nn.Module, call: Call, outcome: Outcome) -> None:
        """Everything that a call changes: nothing before this has touched the module."""
        good = None if self.check == "sync" else outcome.good
        parameters, gradients = [call.tensors[name] for name in outcome.gradients], list(outcome.gradients.values())
        outcome.gradients.clear()
        deposit(self.module, parameters, gradients, good)
        with torch.no_grad():
            for name, value in outcome.updates.items():
                buffer = module.get_buffer(name)
                buffer.copy_(value if good is None else torch.where(good, value, buffer))


class Inference:
    """What one call of PCNetwork found.

    Attributes:
        backend: what ran. plan: how, and why.
        history: with record=True, `.values` and `.errors` at every step t = 0 .. T; otherwise None.
    """

    def __init__(self, outcome: Outcome, backend: str, why: str, clamped: Mapping[str, Held], divisor: float, check: str):
        self._outcome, self._outputs, self._divisor, self._check = outcome, clamped, divisor, check
        self.backend, self.plan = backend, f"{outcome.plan} ({why})" if why else outcome.plan
        self._values: dict[str, Tensor] | None = None

    @property
    def loss(self) -> Tensor:
        """The feed-forward loss (through what is clamped), reduced as the network reduces. A scalar."""
        if self._outcome.losses is None:
            raise RuntimeError("There is no loss without a target. Call infer(x, target).")
        self._raise_deferred()
        return self._outcome.losses.sum() / self._divisor

    @property
    def energy(self) -> Tensor:
        """(steps + 1,): F at t = 0 .. T, summed over the batch; of a nudged rule F_beta, hidden energy + beta * loss."""
        if self._outcome.losses is None:
            raise RuntimeError("There is no energy without a target. Call infer(x, target).")
        self._raise_deferred()
        return self._outcome.energy()

    @property
    def values(self) -> dict[str, Tensor]:
        """Vertex -> its value node, freed inputs included; of an output the target where it is known (squared error, not nudged) or
        its prediction."""
        if self._values is None:
            self._values = self._clamped(self._outcome.values())
        return self._values

    @property
    def errors(self) -> dict[str, Tensor]:
        """Vertex -> its error; of an output -dloss/dprediction, with the loss summed over the batch (nudged: times beta)."""
        return self._outcome.errors()

    @property
    def history(self) -> list[Snapshot] | None:
        history = self._outcome.history
        return None if history is None else [Snapshot(self._clamped(moment.values), moment.errors) for moment in history]

    def _clamped(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**values, **{name: held.over(values[name]) for name, held in self._outputs.items()}}

    def _raise_deferred(self) -> None:
        if self._check == "deferred" and not bool(self._outcome.good):
            raise InferenceDiverged(self._outcome.complaint() + " Nothing was added to .grad.")

    def __repr__(self) -> str:
        return f"Inference(backend={self.backend!r}, plan={self.plan!r})"


def _check_scale(scale: Any) -> None:
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or not scale.is_floating_point():
            raise ValueError(
                f"scale must be a number or a floating-point tensor with one element; got shape {tuple(scale.shape)}, {scale.dtype}."
            )
    elif isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number or a tensor with one element; got {type(scale).__name__}.")
    elif scale != scale or scale in (float("inf"), float("-inf")):
        raise ValueError(f"scale must be finite; got {scale}.")


def _check_weight_rate(rule: Rule, update: Update | None) -> None:
    dynamics = rule.dynamics
    if dynamics.learn_at_each_step and dynamics.weight_rate is None and update is None:
        raise ValueError(
            f"{type(rule).__name__} moves the weights at every step, and has no weight_rate to move them by. "
            "Give it one, or call step(x, target, optimizer)."
        )


def _with_target(args: tuple[Any, ...], target: Any, method: str) -> tuple[tuple[Any, ...], Any]:
    if target is _MISSING:
        if len(args) < 2:
            raise TypeError(f"{method} needs inputs and a target: {method}(x, target) or {method}(x, target=target).")
        args, target = args[:-1], args[-1]
    if target is None:
        raise TypeError(f"{method} needs a target; infer(x) gives the feed-forward values without one.")
    return args, target


def _required(module: nn.Module) -> int:
    """How many positional arguments the module's forward cannot do without."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def _explaining(module: nn.Module, run: Run, call: Call) -> Outcome:
    """Run a call; where torch refuses the inputs only now, by their dtype or by an index, say so as a trace would."""
    try:
        return run(call)
    except IndexError as error:
        raise ValueError(
            f"{type(module).__name__} rejects these inputs: {first_line(error)}. Look for an index that is out of range."
        ) from error
    except RuntimeError as error:
        if type(error) is RuntimeError and speaks_of_dtypes(error):
            text = f"{type(module).__name__} rejects these inputs: {first_line(error)}."
            raise TypeError(f"{text} Pass inputs of the dtype that its forward takes.") from error
        raise


def _tensors(traced: Trace, module: nn.Module, arguments: Arguments) -> dict[str, Tensor]:
    """Everything that the graph reads, by its name in the graph."""
    tensors = {key: _member(module, name, "_parameters") for key, name in traced.parameters.items()}
    tensors.update({key: _member(module, name, "_buffers") for key, name in traced.buffers.items()})
    tensors.update(traced.tensors)
    for key, leaf in zip(traced.inputs, arguments.leaves, strict=True):
        if key is not None:
            tensors[key] = clamped(leaf)
    return tensors


def _learned(extra: Extra, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The extra parameters of a call that learn: of the backward weights those whose weight learns."""
    idle = {name for key, name in extra.feedback.items() if not tensors[key].requires_grad}
    return {name: tensors[name] for name in extra.names if tensors[name].requires_grad and name not in idle}


def _member(module: nn.Module, name: str, registry: str) -> Tensor:
    *path, last = name.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    return getattr(module, registry)[last]
