"""PCX (https://github.com/liukidar/pcx): T steps of values and the gradients of the weights, all under one jit.

    python run_pcx.py input.npz output.npz

A script of its own: it imports nothing of pckernels, and runs in an environment that has pcx.
"""

import json
import sys
import time
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pcx.functional as pxf
import pcx.nn as pxnn
import pcx.predictive_coding as pxc
import pcx.utils as pxu

relu = jax.nn.relu


class Perceptron(pxc.EnergyModule):
    """ReLU layers; a vode after each, the last clamped to the target."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        super().__init__()
        self.layers = [pxnn.Linear(weight.shape[1], weight.shape[0]) for weight in weights[::2]]
        self.vodes = [pxc.Vode() for _ in self.layers]
        self.vodes[-1].h.frozen = True

    def __call__(self, x: Any, y: Any = None) -> Any:
        for layer, vode in zip(self.layers[:-1], self.vodes[:-1], strict=True):
            x = vode(relu(layer(x)))
        self.vodes[-1](self.layers[-1](x))
        if y is not None:
            self.vodes[-1].set("h", y)
        return self.vodes[-1].get("u")


class Convolutional(pxc.EnergyModule):
    """The CNN of Millidge et al. 2020 without biases: conv | pool | conv | three linear layers, a vode after each."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        super().__init__()
        convolutions = [pxnn.Conv2d(w.shape[1], w.shape[0], w.shape[2], use_bias=False) for w in weights[:2]]
        self.layers = [*convolutions, *(pxnn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights[2:])]
        self.pool = pxnn.MaxPool2d(2, 2)
        self.vodes = [pxc.Vode() for _ in range(6)]
        self.vodes[-1].h.frozen = True

    def __call__(self, x: Any, y: Any = None) -> Any:
        x = self.vodes[0](relu(self.layers[0](x)))
        x = self.vodes[1](self.pool(x))
        x = self.vodes[2](relu(self.layers[1](x)))
        x = self.vodes[3](relu(self.layers[2](x.reshape(-1))))
        x = self.vodes[4](relu(self.layers[3](x)))
        self.vodes[5](self.layers[4](x))
        if y is not None:
            self.vodes[5].set("h", y)
        return self.vodes[5].get("u")


MODELS = {"mlp": Perceptron, "convolutions": Convolutional}
STATE = pxu.M(pxc.VodeParam | pxc.VodeParam.Cache)


@pxf.vmap(STATE.to((None, 0)), in_axes=(0, 0), out_axes=0)
def forward(x: Any, y: Any, *, model: Any) -> Any:
    return model(x, y)


@pxf.vmap(STATE.to((None, 0)), in_axes=(0,), out_axes=(None, 0), axis_name="batch")
def energy(x: Any, *, model: Any) -> Any:
    u = model(x)
    return jax.lax.psum(model.energy(), "batch"), u


def step_for(steps: int, rate: float) -> Any:
    """A call: feed-forward start, T steps down the energy, the gradient of the weights."""
    moving = pxu.M_hasnot(pxc.VodeParam, frozen=True)

    @pxf.jit()
    def step(x: Any, y: Any, *, model: Any) -> Any:
        with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
            forward(x, y, model=model)
        for _ in range(steps):
            with pxu.step(model, clear_params=pxc.VodeParam.Cache):
                _, found = pxf.value_and_grad(moving.to([False, True]), has_aux=True)(energy)(x, model=model)
            for vode, gradient in zip(model.vodes[:-1], found["model"].vodes[:-1], strict=True):
                vode.h.set(vode.h.get() - rate * gradient.h.get())
        with pxu.step(model, clear_params=pxc.VodeParam.Cache):
            _, found = pxf.value_and_grad(pxu.M(pxnn.LayerParam).to([False, True]), has_aux=True)(energy)(x, model=model)
        return [parameter.get() for layer in found["model"].layers for parameter in parameters(layer)]

    return step


def parameters(layer: Any) -> list[Any]:
    """Weight, and bias where there is one."""
    return [layer.nn.weight, *([layer.nn.bias] if getattr(layer.nn, "bias", None) is not None else [])]


def load(model: Any, weights: list[np.ndarray]) -> None:
    """PCX keeps (outputs, inputs), as PyTorch does; the bias of a convolution is not used here."""
    slots = [parameter for layer in model.layers for parameter in parameters(layer)]
    for slot, weight in zip(slots, weights, strict=True):
        slot.set(jnp.asarray(weight).reshape(slot.get().shape))


def main(given: str, taken: str) -> None:
    data = np.load(given)
    task = json.loads(str(data["task"]))
    weights = [data[f"weight{k}"] for k in range(sum(name.startswith("weight") for name in data.files))]
    x, y = jnp.asarray(data["x"]), jnp.asarray(data["target"])
    model: Any = MODELS[task["model"]](weights)
    load(model, weights)
    model.train()
    step = step_for(task["steps"], task["rate"])

    def run() -> list[Any]:
        return jax.block_until_ready(step(x, y, model=model))

    gradients = run()
    run()
    times: list[float] = []
    deadline = time.monotonic() + task["seconds"]
    while len(times) < task["least"] or time.monotonic() < deadline:
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    found: dict[str, Any] = {
        f"gradient{k}": np.asarray(g).reshape(w.shape) for k, (g, w) in enumerate(zip(gradients, weights, strict=True))
    }
    versions = f"pcx {metadata.version('pcx')}, jax {jax.__version__}"
    np.savez(taken, times=np.array(times), versions=versions, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
