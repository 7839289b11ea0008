"""Tracing: which vertices there are, what they are called, how far they are from the output, and what is refused."""

import pytest
import torch
from torch import nn

import pckernels as pck
from pckernels.schedule import light_cone, sweep_groups, time_groups
from pckernels.tracing import trace


def graph_of(module, *inputs, value_nodes="layer", **keywords):
    return trace(module, *inputs, value_nodes=value_nodes, **keywords).graph


def distances(graph):
    return {vertex.name: vertex.distance for vertex in graph.vertices}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.fc = nn.Linear(3 * 16, 2)

    def forward(self, x):
        x = torch.relu(x)
        h = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.relu(h + x).flatten(1))


def test_layers_take_in_what_follows_and_forks_cut():
    graph = graph_of(Block(), torch.randn(2, 3, 4, 4))
    assert distances(graph) == {"relu": 4, "conv1": 3, "conv2": 2, "add": 1, "output": 0}
    assert graph["conv1"].operations == ("conv2d", "batch_norm", "relu")
    assert graph["conv1"].parameters == ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias")
    assert graph["add"].parents == ("relu", "conv2") and graph["add"].shortest == 1 and graph["relu"].shortest == 2
    assert graph.inputs == ("x",) and not graph.is_level


def test_levelling_pads_every_skipping_edge():
    level = graph_of(Block(), torch.randn(2, 3, 4, 4)).levelled()
    assert level.is_level and level["add"].parents == ("relu@2", "conv2")
    assert distances(level)["relu@2"] == 2 and distances(level)["relu@3"] == 3


def test_one_vertex_an_operation():
    graph = graph_of(Block().eval(), torch.randn(2, 3, 4, 4), value_nodes="op")
    assert [v.operations for v in graph.vertices][:3] == [("relu",), ("conv2d",), ("batch_norm",)]
    assert {"conv1", "bn1", "relu#2", "add", "flatten"} <= {v.name for v in graph.vertices}


def test_a_list_puts_the_node_exactly_at_the_output_of_a_container():
    module = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    graph = graph_of(module, torch.randn(2, 3), value_nodes=["0", "1.1"])
    assert distances(graph) == {"0": 2, "1.1": 1, "output": 0}
    assert graph["0"].operations == ("linear", "relu")


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.fc(torch.tanh(self.fc(x)))) * 2.0 + torch.tanh(self.fc(x))


def test_a_second_call_is_counted():
    graph = graph_of(Twice(), torch.randn(2, 3))
    assert list(distances(graph)) == ["fc", "fc#2", "fc#3", "output"]
    named = graph_of(Twice(), torch.randn(2, 3), value_nodes=["fc"])
    assert list(distances(named)) == ["fc", "fc#2", "fc#3", "output"]


class Slices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 6)

    def forward(self, x):
        a, b = self.fc(x).chunk(2, -1)
        return {"product": a * torch.sigmoid(b), "tapped": b}


def test_slices_are_edges_and_a_tapped_result_gets_an_identity_vertex():
    graph = graph_of(Slices(), torch.randn(2, 3))
    assert distances(graph) == {"fc": 2, "sigmoid": 1, "output.0": 0, "output.1": 0}
    assert graph["output.0"].parents == ("fc", "sigmoid")


class Tapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return h, self.b(h)


def test_a_result_that_feeds_others_stays_a_value_node():
    graph = graph_of(Tapped(), torch.randn(2, 3))
    assert distances(graph) == {"a": 1, "output.0": 0, "output.1": 0}
    assert graph["output.0"].parents == ("a",) and graph["output.0"].operations == ("identity",)


@pytest.mark.parametrize(
    ("kind", "gates"),
    [(nn.LSTM, ("i", "f", "g", "o", "c", "h")), (nn.GRU, ("r", "z", "n", "h")), (nn.RNN, ("h",))],
    ids=["lstm", "gru", "rnn"],
)
def test_cells_are_named_by_layer_step_and_gate(kind, gates):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = kind(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    graph = graph_of(Recurrent(), torch.randn(2, 3, 3))
    assert {f"cell.l0.t1.{gate}" for gate in gates} <= {v.name for v in graph.vertices}
    assert graph["output"].parents == ("cell.l1.t2.h",)
    assert graph["cell.l1.t1.h"].time == 1
    assert len(graph.hidden) == 2 * 3 * len(gates)


@pytest.mark.parametrize("module", [nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2), nn.GRU(3, 4, 2), nn.RNN(3, 4, nonlinearity="relu")])
def test_unrolled_cells_compute_what_torch_computes(module):
    module = module.double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    values = pck.PCNetwork(module, pck.ZeroDivergence(), batch_dim=1).infer(x).values
    expected = torch.utils._pytree.tree_leaves(module(x))
    found = [values[name] for name in sorted(name for name in values if name.startswith("output"))]
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cell", [nn.LSTMCell(3, 4), nn.GRUCell(3, 4), nn.RNNCell(3, 4)])
def test_single_cells_count_their_calls_as_time(cell):
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x):
            state = None
            for step in range(x.shape[1]):
                state = self.cell(x[:, step], state)
            return state[0] if isinstance(state, tuple) else state

    graph = graph_of(Loop(), torch.randn(2, 3, 3))
    assert graph["cell#2.h"].time == 1 and set(time_groups(graph).values()) == {0, 1, 2}


def test_bidirectional_networks_have_no_nested_order():
    network = pck.PCNetwork(nn.LSTM(2, 2, bidirectional=True), pck.FixedPrediction(3, 0.5, order="nested"), batch_dim=1)
    with pytest.raises(pck.Unsupported, match="global"):
        network.infer(torch.randn(3, 2, 2), (torch.randn(3, 2, 4), (None, None)))
    chain = pck.PCNetwork(nn.Linear(2, 2), pck.FixedPrediction(3, 0.5, order="nested"))
    with pytest.raises(pck.Unsupported, match="recurrent"):
        chain.infer(torch.randn(3, 2), torch.randn(3, 2))


def test_the_table_names_every_vertex():
    network = pck.PCNetwork(Block(), pck.ZeroDivergence())
    with pytest.raises(RuntimeError, match="trace"):
        _ = network.graph
    network.trace(torch.randn(2, 3, 4, 4))
    text = str(network.graph)
    assert all(name in text for name in ("vertex", "distance", "conv1", "Bx3x4x4", "conv1.weight", "4 value nodes"))


def test_sweep_groups():
    graph = graph_of(Block(), torch.randn(2, 3, 4, 4))
    assert sweep_groups(graph, "jacobi") == [["relu", "conv1", "conv2", "add"]]
    assert sweep_groups(graph, "top_down") == [["add"], ["conv2"], ["conv1"], ["relu"]]
    assert sweep_groups(graph, "red_black") == [["conv1", "add"], ["relu", "conv2"]]


def test_light_cone_is_when_errors_first_leave_zero():
    torch.manual_seed(0)
    module, x, target = Block().double().eval(), torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2).double()
    network = pck.PCNetwork(module, pck.Strict(6, 0.1))
    history = network.infer(x, target, record=True).history
    for name, first in light_cone(network.graph).items():
        moved = [bool(moment.errors[name].abs().sum() > 0) for moment in history]
        assert moved == [t >= first for t in range(7)], name


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return torch.cat([self.fc(x), self.fc(x)[:, :2].reshape(5, -1)])


def test_what_cannot_be_traced_gets_a_sentence():
    with pytest.raises(pck.Unsupported, match=r"pck\.backward"):
        graph_of(Branching(), torch.randn(2, 3))
    with pytest.raises(ValueError, match="rejects these inputs"):
        graph_of(Broken(), torch.randn(2, 3))
    with pytest.raises(ValueError, match="Did you mean 'conv"):
        pck.PCNetwork(Block(), pck.ZeroDivergence(), value_nodes=["conv"])
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 2, 2), [3, 2])
    with pytest.raises((pck.Unsupported, TypeError), match=r"PackedSequence|tensor"):
        pck.PCNetwork(nn.LSTM(2, 2), pck.ZeroDivergence(), batch_dim=1).infer(packed)


def test_the_users_module_is_left_alone():
    module = nn.Sequential(nn.LSTM(3, 4), Block())
    before = [(type(layer), dict(layer.__dict__)) for layer in module.modules()]
    pck.PCNetwork(module[0], pck.ZeroDivergence(), batch_dim=1).trace(torch.randn(3, 2, 3))
    for layer, (kind, state) in zip(module.modules(), before, strict=True):
        assert type(layer) is kind and layer.__dict__.keys() == state.keys()
