"""Every parameter that autograd would give a gradient gets one, through whatever wraps the module, or the call is refused."""

import copy
import pickle
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import pckernels as pck

EXACT = pck.ZeroDivergence()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Scaled(nn.Module):
    """A layer whose result `how` combines with the parameter `w`, of which the module also keeps copies of many kinds."""

    def __init__(self, how: Callable[["Scaled", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.w, self.how = nn.Linear(4, 3), nn.Parameter(torch.randn(3)), how
        self.frozen = [nn.Parameter(torch.randn(3), requires_grad=False)]
        self.listed, self.view, self.detached = [self.w], self.w[:], self.w.detach()
        self.unregistered, self.layers = [nn.Parameter(torch.randn(3))], [nn.Linear(3, 3)]
        self.register_buffer("shared", self.w.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, self.a(x))


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Modules are made in float64: a cast afterwards would part a parameter from the views of it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 4), torch.randn(5, 3)


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def assert_learns_as_autograd(network: pck.PCNetwork, module: nn.Module) -> None:
    """`.grad` of every parameter of `module`, None included."""
    x, y = data()
    module.zero_grad()
    (0.5 * (module(x) - y).square().sum() / len(x)).backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    network.backward(x, y)
    assert any(gradient is not None for gradient in expected.values())
    for name, p in module.named_parameters():
        assert (p.grad is None) == (expected[name] is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-14)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


# torch.compile


def test_a_compiled_module_learns_as_the_module_itself() -> None:
    module = made(Mlp)
    network = pck.PCNetwork(compiled(module), EXACT)
    assert list(network.state_dict()) == list(module.state_dict())
    assert_learns_as_autograd(network, module)
    assert [vertex.name for vertex in network.graph.vertices] == ["a", "output"]


def test_training_lowers_the_loss_of_a_compiled_module() -> None:
    module = compiled(made(Mlp))
    network, optimizer = pck.PCNetwork(module, EXACT), torch.optim.SGD(module.parameters(), 0.1)
    losses = [float(network.step(*data(), optimizer).loss) for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("kind", [Mlp, sequential])
def test_a_module_compiled_in_place_stays_compiled_and_learns(kind: Callable[[], nn.Module]) -> None:
    module = made(kind)
    module.compile(backend="eager")
    call = module._compiled_call_impl
    assert_learns_as_autograd(pck.PCNetwork(module, EXACT), module)
    assert call is not None and module._compiled_call_impl is call


@pytest.mark.parametrize("wrap", [compiled, torch.compiler.disable])
def test_a_wrapped_submodule_keeps_its_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = made(Mlp)
    module.a = wrap(module.a)
    network = pck.PCNetwork(module, EXACT)
    assert_learns_as_autograd(network, module)
    assert network.graph["a"].parameters == ("a._orig_mod.weight", "a._orig_mod.bias")
    assert [v.name for v in pck.PCNetwork(module, EXACT, value_nodes=["a"]).trace(data()[0]).vertices] == ["a", "output"]


def test_a_submodule_compiled_in_place_learns() -> None:
    module = made(Mlp)
    module.a.compile(backend="eager")
    assert_learns_as_autograd(pck.PCNetwork(module, EXACT), module)


def test_a_compiled_recurrent_layer_is_unrolled_under_its_own_name() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = compiled(nn.LSTM(4, 5, batch_first=True)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0][:, -1])

    graph = pck.PCNetwork(made(Reader), EXACT).trace(torch.randn(5, 2, 4))
    assert "cell.l0.t1.h" in graph


def test_modes_and_copies_reach_through_a_compiled_module() -> None:
    module = made(Mlp)
    network = pck.PCNetwork(compiled(module), EXACT)
    assert not network.eval().training and not module.training and network.train().training and module.training
    for clone in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert clone.module is not network.module
        assert_learns_as_autograd(clone, clone.module)
    assert all(p.grad is None for p in module.parameters())


def test_hooks_on_a_compiled_wrapper_are_refused_and_on_its_module_are_traced() -> None:
    module = made(Mlp)
    module.register_forward_hook(lambda module, inputs, output: 3 * output)
    assert_learns_as_autograd(pck.PCNetwork(compiled(module), EXACT), module)
    wrapper = compiled(module)
    wrapper.register_forward_hook(lambda module, inputs, output: 3 * output)
    with pytest.raises(pck.Unsupported, match="Register them on the module itself"):
        pck.PCNetwork(wrapper, EXACT)


# What is set on a module


def test_a_forward_that_was_set_on_the_module_is_traced() -> None:
    def patched(self: Mlp, x: Tensor) -> Tensor:
        return self.b(self.a(2 * x))

    module = made(Mlp)
    module.forward = types.MethodType(patched, module)
    assert_learns_as_autograd(pck.PCNetwork(module, EXACT), module)


def test_a_graph_module_can_be_traced() -> None:
    module = torch.fx.symbolic_trace(made(Mlp))
    assert_learns_as_autograd(pck.PCNetwork(module, EXACT), module)


# What a trace can only hold constant

STRAYS: dict[str, Callable[[Scaled, Tensor], Tensor]] = {
    "a list of parameters": lambda m, h: h * m.listed[0],
    "a view made earlier": lambda m, h: h * m.view,
    "a function of it": lambda m, h: h * torch.exp(m.listed[0]),
    "a parameter that is not registered": lambda m, h: h * m.unregistered[0],
    "a layer that is not registered": lambda m, h: m.layers[0](h),
}
AS_AUTOGRAD: dict[str, Callable[[Scaled, Tensor], Tensor]] = {
    "a view made in forward": lambda m, h: h * m.w[:],
    "detached": lambda m, h: h * m.w.detach(),
    "detached out of a list": lambda m, h: h * m.listed[0].detach(),
    "detached before": lambda m, h: h * m.detached,
    "a buffer on its storage": lambda m, h: h * m.shared,
    "frozen": lambda m, h: h * m.frozen[0],
    "its size": lambda m, h: h * m.listed[0].shape[0],
    "where it is positive": lambda m, h: torch.where(m.listed[0] > 0, h, 2 * h),
    "detached and not": lambda m, h: h * m.w * m.w.detach(),
}


@pytest.mark.parametrize("rule", [EXACT, pck.Strict(2, 0.1)], ids=["exact", "strict"])
@pytest.mark.parametrize("name", STRAYS)
def test_a_parameter_that_the_trace_would_hold_constant_is_refused(name: str, rule: pck.Strict | pck.ZeroDivergence) -> None:
    module = made(lambda: Scaled(STRAYS[name]))
    before = copy.deepcopy(module.state_dict())
    network = pck.PCNetwork(module, rule)
    with pytest.raises(pck.Unsupported, match=r"would not learn.*(Read it from its module|Register it)"):
        network.backward(*data())
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", AS_AUTOGRAD)
def test_what_autograd_does_not_follow_is_a_constant(name: str) -> None:
    module = made(lambda: Scaled(AS_AUTOGRAD[name]))
    assert_learns_as_autograd(pck.PCNetwork(module, EXACT), module)


def weight_norm(module: Mlp) -> None:
    parametrizations.weight_norm(module.a)


def old_weight_norm(module: Mlp) -> None:
    nn.utils.weight_norm(module.a)  # type: ignore[no-untyped-call]


def orthogonal(module: Mlp) -> None:
    parametrizations.orthogonal(module.a)


def pruned(module: Mlp) -> None:
    prune.l1_unstructured(module.a, "weight", 0.5)  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore")  # torch.export's of attributes that hooks set, and the old weight_norm's own
@pytest.mark.parametrize("change", [weight_norm, old_weight_norm, orthogonal, pruned])
def test_a_parametrised_weight_learns(change: Callable[[Mlp], None]) -> None:
    module = made(Mlp)
    change(module)
    assert_learns_as_autograd(pck.PCNetwork(module, EXACT), module)
