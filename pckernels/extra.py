"""What a network learns beside its module's parameters: backward weights, error weights and precisions, made at the first trace.

Their names say whose they are: `feedback.<parameter>`, `error_weights.<vertex>`, `log_precision.<vertex>`; in the network's
state_dict with `pc.` before.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pckernels.call import Extra
from pckernels.errors import Unsupported
from pckernels.graph import Trace, Vertex, feature_axis
from pckernels.precision import Precision, check_closed_form, check_rule, is_learned, precisions_on
from pckernels.routes import parameters_with_feedback
from pckernels.rules import Dynamics

PREFIX = "pc."


class ExtraParameters(nn.Module):
    """The extra parameters of one network. Names have dots in them, as the names of what they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: dict[str, str] = {}

    def extra(self, trace: Trace, dynamics: Dynamics, precision: Precision, weights: Mapping[str, Tensor], device: torch.device) -> Extra:
        """The names of the tensors that a rule and precisions need on a graph; those that are missing are made.

        Args:
            weights: the module's parameters by their name in the graph.
            device: where the call runs.

        Raises:
            Unsupported: a weight or a vertex that there can be none for.
            ValueError: a tensor that was loaded does not have the shape of what it belongs to; or precisions that do not fit.
        """
        found = precisions_on(trace.graph, precision)
        check_rule(dynamics, found)
        check_closed_form(trace, dynamics, found)
        return Extra(
            self._feedback(trace, dynamics.feedback, weights),
            self._error_weights(trace, dynamics.error_weights, device),
            self._log_precisions(trace, [name for name, value in found.items() if isinstance(value, str)], device),
            {name: _fixed(value, trace.graph[name], device) for name, value in found.items() if not isinstance(value, str)},
        )

    def tensors(self, extra: Extra) -> dict[str, Tensor]:
        """Those of one call, by name."""
        return {name: self._parameters[name.removeprefix(PREFIX)] for name in extra.names}  # type: ignore[misc]

    def adopt(self, state: Mapping[str, Tensor], prefix: str, dynamics: Dynamics, precision: Precision) -> list[str]:
        """Make what a state_dict has and this rule may need. Returns the keys that are known here."""
        kinds = {
            "feedback": dynamics.feedback != "symmetric",
            "error_weights": dynamics.has_error_weights,
            "log_precision": is_learned(precision),
        }
        start = prefix + PREFIX
        found = [key for key in state if key.startswith(start) and kinds.get(key[len(start) :].split(".")[0], False)]
        for key in found:
            name = key[len(start) :]
            if name not in self._parameters:
                self._parameters[name] = nn.Parameter(torch.empty_like(state[key]))
        self._set_modes(dynamics)
        return found

    def _feedback(self, trace: Trace, mode: str, weights: Mapping[str, Tensor]) -> dict[str, str]:
        if mode == "symmetric":
            return {}
        keys = parameters_with_feedback(trace)
        names = {key: f"feedback.{trace.parameters[key]}" for key in keys}
        for key, name in names.items():
            self._require(name, weights[key].shape, weights[key], mode, _size_of(weights[key]) if name not in self._parameters else 0.0)
        self._set_mode("feedback", mode)
        return {key: PREFIX + name for key, name in names.items()}

    def _error_weights(self, trace: Trace, mode: str, device: torch.device) -> dict[str, str]:
        if mode == "identity":
            return {}
        for vertex in trace.graph.hidden:
            features = _features(vertex)
            self._require(f"error_weights.{vertex.name}", (features, features), _like(vertex, device), mode, 1.0 / math.sqrt(features))
        self._set_mode("error_weights", mode)
        return {vertex.name: f"{PREFIX}error_weights.{vertex.name}" for vertex in trace.graph.hidden}

    def _log_precisions(self, trace: Trace, names: list[str], device: torch.device) -> dict[str, str]:
        for name in names:
            self._require(f"log_precision.{name}", (), _like(trace.graph[name], device), "learned", 0.0)
        return {name: f"{PREFIX}log_precision.{name}" for name in names}

    def _require(self, name: str, shape: tuple[int, ...], like: Tensor, mode: str, size: float) -> None:
        """Make a parameter N(0, size^2), if there is none, from a seed of its name."""
        known = self._parameters.get(name)
        if known is None:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * size
            self._parameters[name] = nn.Parameter(drawn.to(like.device, like.dtype), requires_grad=mode == "learned")
        elif tuple(known.shape) != tuple(shape):
            raise ValueError(
                f"{PREFIX}{name} has shape {tuple(known.shape)}, and must have {tuple(shape)}. Load the state of such a network."
            )

    def _set_modes(self, dynamics: Dynamics) -> None:
        self._set_mode("feedback", dynamics.feedback)
        self._set_mode("error_weights", dynamics.error_weights)

    def _set_mode(self, kind: str, mode: str) -> None:
        """Let the parameters of a kind learn, or not, when the rule says so anew; who froze one of them keeps it frozen."""
        if self.modes.get(kind) != mode:
            self.modes[kind] = mode
            for name, parameter in self._parameters.items():
                if name.startswith(f"{kind}.") and parameter is not None:
                    parameter.requires_grad_(mode == "learned")


def _size_of(weight: Tensor) -> float:
    """The root mean square of a weight's entries; of one that is all 0, 1 / sqrt(its inputs)."""
    size = float(weight.detach().double().square().mean().sqrt())
    return size if size > 0 else 1.0 / math.sqrt(max(1, weight[0].numel()))


def _like(vertex: Vertex, device: torch.device) -> Tensor:
    return torch.empty((), dtype=vertex.dtype or torch.get_default_dtype(), device=device)


def _fixed(value: float | Tensor, vertex: Vertex, device: torch.device) -> float | Tensor:
    return value.detach().to(_like(vertex, device)) if isinstance(value, Tensor) else float(value)


def _features(vertex: Vertex) -> int:
    size: Any = vertex.shape[feature_axis(len(vertex.shape))] if len(vertex.shape) > 1 else None
    if not isinstance(size, int):
        shape = "x".join(map(str, vertex.shape))
        raise Unsupported(f'{vertex.name!r} has no axis of features to mix ({shape}). Use error_weights="identity", or other value_nodes.')
    return size
