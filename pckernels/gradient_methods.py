"""Ways of learning beside predictive coding that approximate the gradient: feedback alignment, evolution strategies, BP-STDP.

Each returns parameter -> its estimate of the gradient of the loss summed over the batch, and changes nothing.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import Unsupported

Gradients = dict[str, Tensor]
SummedLoss = Callable[[nn.Module], Tensor]

WEIGHTED = (nn.Linear, nn.Conv2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def feedback_alignment(module: nn.Module, loss: SummedLoss, generator: torch.Generator) -> Gradients:
    """Backprop with fixed random weights, of the size of the forward ones, in place of their transposes on the way back.

    Source: Lillicrap et al. 2016. Raises Unsupported for a module whose parameters are not those of nn.Linear and nn.Conv2d.
    """
    twin = copy.deepcopy(module)
    layers = [layer for layer in twin.modules() if isinstance(layer, WEIGHTED)]
    owned = {id(parameter) for layer in layers for parameter in layer.parameters()}
    if any(id(parameter) not in owned for parameter in twin.parameters()):
        raise Unsupported("feedback alignment is for networks of nn.Linear and nn.Conv2d alone")
    for layer in layers:
        layer.register_forward_hook(_with_random_feedback(layer, generator))
    for parameter in twin.parameters():
        parameter.grad = None
    with torch.enable_grad():
        loss(twin).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in twin.named_parameters()}


def _with_random_feedback(layer: nn.Module, generator: torch.Generator) -> Callable[..., Tensor]:
    back = _randomised(layer, generator)

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        ahead = layer.forward(x.detach())  # not layer(x): that would call this hook again
        if not x.requires_grad:
            return ahead
        behind = back(x)
        return ahead + (behind - behind.detach())

    return hook


def _randomised(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """The same layer with other weights, of the same size, and no bias: nothing of it learns."""
    back = copy.deepcopy(layer).requires_grad_(False)
    weight: Tensor = back.weight  # type: ignore[assignment]
    weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * weight.std())
    if isinstance(back.bias, Tensor):
        back.bias.zero_()
    return back


def evolution_strategies(module: nn.Module, loss: SummedLoss, pairs: int, sigma: float, generator: torch.Generator) -> Gradients:
    """The mean over antithetic pairs of (L(theta + sigma e) - L(theta - sigma e)) / (2 sigma) * e, e standard normal.

    Source: Salimans et al. 2017 (arXiv 1703.03864).
    """
    twin = copy.deepcopy(module)
    parameters = dict(twin.named_parameters())
    centre = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    total = {name: torch.zeros_like(value) for name, value in centre.items()}
    with torch.no_grad():
        for _ in range(pairs):
            noise = {name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in centre.items()}
            slopes = []
            for sign in (1.0, -1.0):
                for name, parameter in parameters.items():
                    parameter.copy_(centre[name] + sign * sigma * noise[name])
                slopes.append(sign * loss(twin))
            slope = sum(slopes) / (2.0 * sigma * pairs)
            for name in total:
                total[name] += slope * noise[name]
    return total


@dataclass
class _Population:
    """A layer of integrate-and-fire neurons, and what leads to its products: pooling and flattening of the spikes before it."""

    before: nn.Sequential
    layer: nn.Module
    names: tuple[str, ...]

    def current(self, spikes: Tensor) -> Tensor:
        return self.layer(self.before(spikes))


def bp_stdp(module: nn.Module, x: Tensor, target: Tensor, steps: int, window: int, generator: torch.Generator) -> Gradients:
    """BP-STDP: minus what the weights of the spiking network change by over `steps` time steps, at learning rate 1.

    Input spikes are drawn with the pixels as probabilities. A neuron adds up its current, and at 1 fires and loses 1, so that its rate
    follows a ReLU. Output i has xi_i = 1 where it should fire and has not within the window, -1 where it fired and should not;
    xi of a neuron before is W^T xi where that neuron fired within the window, 0 elsewhere. dW = xi times the spikes of the inputs
    within the window. Where the target is 1 an output should fire all the time, where it is 0 never.

    Source: Tavanaei & Maida 2019 (arXiv 1711.04214), after its summary; with convolutions and pooling by the same rule, and reset by
    subtraction, as our own reading of it.

    Raises:
        Unsupported: not an nn.Sequential of Linear, Conv2d, ReLU, pooling and Flatten, on pixels in [0, 1] with targets of 0 and 1.
    """
    populations = _populations(module)
    if not 0.0 <= float(x.min()) <= float(x.max()) <= 1.0 or not bool(((target == 0) | (target == 1)).all()):
        raise Unsupported("BP-STDP is for inputs in [0, 1] and targets of 0 and 1")
    total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    potentials: list[Tensor] = []
    history: list[list[Tensor]] = []
    for _ in range(steps):
        history = [*history, _fire(populations, potentials, _draw(x, generator))][-window:]
        traces = [sum(moments[1:], start=moments[0]) for moments in zip(*history, strict=True)]
        _change(populations, traces, target, total)
    return {name: -value for name, value in total.items()}


def _draw(x: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(x.shape, generator=generator, dtype=x.dtype) < x).to(x.dtype)


def _populations(module: nn.Module) -> list[_Population]:
    if not isinstance(module, nn.Sequential):
        raise Unsupported("BP-STDP is for an nn.Sequential")
    populations: list[_Population] = []
    before: list[nn.Module] = []
    for name, layer in module.named_children():
        if isinstance(layer, WEIGHTED):
            names = tuple(f"{name}.{key}" for key, _ in layer.named_parameters())
            populations.append(_Population(nn.Sequential(*before), layer, names))
            before = []
        elif isinstance(layer, nn.Flatten | POOLS[0] | POOLS[1]):
            before.append(layer)
        elif not isinstance(layer, nn.ReLU):
            raise Unsupported("BP-STDP is for layers of Linear, Conv2d, ReLU, pooling and Flatten")
    return populations


@torch.no_grad()
def _fire(populations: Sequence[_Population], potentials: list[Tensor], spikes: Tensor) -> list[Tensor]:
    """One time step: the spikes of the input and of every population. `potentials` move on."""
    found = [spikes]
    for k, population in enumerate(populations):
        current = population.current(found[-1])
        if k == len(potentials):
            potentials.append(torch.zeros_like(current))
        potential = potentials[k] + current
        found.append((potential >= 1.0).to(spikes.dtype))
        potentials[k] = potential - found[-1]
    return found


def _change(populations: Sequence[_Population], traces: Sequence[Tensor], target: Tensor, total: Gradients) -> None:
    """Add dW of one time step; `traces`: spikes within the window, of the input and of every population."""
    fired = (traces[-1] > 0).to(traces[-1].dtype)
    xi = target * (1.0 - fired) - (1.0 - target) * fired
    for k in range(len(populations) - 1, -1, -1):
        population, trace = populations[k], traces[k].detach().requires_grad_()
        parameters = list(population.layer.parameters())
        with torch.enable_grad():
            *changes, back = torch.autograd.grad(population.current(trace), [*parameters, trace], xi)
        for name, change in zip(population.names, changes, strict=True):
            total[name] += change
        xi = back * (traces[k] > 0)
