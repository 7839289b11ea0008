"""FabricPC (https://github.com/trueagi-io/FabricPC): its inference loop and its local weight gradients, under one jit; perceptrons.

    python run_fabricpc.py input.npz output.npz

A script of its own: it imports nothing of pckernels, and runs in an environment that has fabricpc.
"""

import json
import sys
import time
from importlib import metadata
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fabricpc.core.activations import IdentityActivation, ReLUActivation
from fabricpc.core.inference import InferenceSGD, run_inference
from fabricpc.core.learning import compute_local_weight_gradients
from fabricpc.core.topology import Edge
from fabricpc.graph_assembly import TaskMap, graph
from fabricpc.graph_initialization import initialize_params
from fabricpc.graph_initialization.state_initializer import initialize_graph_state
from fabricpc.nodes import Linear


def perceptron(weights: list[np.ndarray], steps: int, rate: float) -> Any:
    """The graph: an input node, and a node with ReLU for each layer but the last."""
    sizes = [weights[0].shape[1], *(weight.shape[0] for weight in weights[::2])]
    nodes = [
        Linear(shape=(size,), name=f"node{k:03d}", activation=ReLUActivation() if 0 < k < len(sizes) - 1 else IdentityActivation())
        for k, size in enumerate(sizes)
    ]
    edges = [Edge(source=a, target=b.slot("in")) for a, b in pairwise(nodes)]
    inference = InferenceSGD(eta_infer=rate, infer_steps=steps)
    return nodes, graph(nodes=nodes, edges=edges, task_map=TaskMap(x=nodes[0], y=nodes[-1]), inference=inference)


def loaded(params: Any, nodes: list[Any], weights: list[np.ndarray]) -> Any:
    """The parameters with the given weights; FabricPC keeps (inputs, outputs)."""
    found = dict(params.nodes)
    for node, weight, bias in zip(nodes[1:], weights[::2], weights[1::2], strict=True):
        own = found[node.name]
        (edge,) = own.weights
        found[node.name] = own._replace(
            weights={edge: jnp.asarray(weight.T)}, biases={"b": jnp.asarray(bias).reshape(own.biases["b"].shape)}
        )
    return params._replace(nodes=found)


def main(given: str, taken: str) -> None:
    data = np.load(given)
    task = json.loads(str(data["task"]))
    if task["model"] != "mlp":
        sys.exit("this script has perceptrons alone")
    weights = [data[f"weight{k}"] for k in range(sum(name.startswith("weight") for name in data.files))]
    nodes, structure = perceptron(weights, task["steps"], task["rate"])
    key = jax.random.PRNGKey(0)
    params = loaded(initialize_params(structure, key), nodes, weights)
    x, y = jnp.asarray(data["x"]), jnp.asarray(data["target"])

    @jax.jit
    def step(params: Any, x: Any, y: Any) -> Any:
        clamps = {nodes[0].name: x, nodes[-1].name: y}
        state = initialize_graph_state(structure, x.shape[0], key, clamps=clamps, params=params)
        state = run_inference(params, state, clamps, structure)
        return compute_local_weight_gradients(params, state, structure)

    def run() -> Any:
        return jax.block_until_ready(step(params, x, y))

    found = run().nodes
    run()
    times: list[float] = []
    deadline = time.monotonic() + task["seconds"]
    while len(times) < task["least"] or time.monotonic() < deadline:
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    gradients: dict[str, Any] = {}
    for k, node in enumerate(nodes[1:]):
        (weight,), (bias,) = found[node.name].weights.values(), found[node.name].biases.values()
        gradients[f"gradient{2 * k}"], gradients[f"gradient{2 * k + 1}"] = np.asarray(weight).T, np.asarray(bias).reshape(-1)
    versions = f"fabricpc {metadata.version('fabricpc')}, jax {jax.__version__}"
    np.savez(taken, times=np.array(times), versions=versions, **gradients)


if __name__ == "__main__":
    main(*sys.argv[1:])
