"""The ready-made networks: the paper's layers and numbers, and the gradients that their default rules predict."""

import copy
import pickle

import pytest
import torch

from pckernels import FixedPrediction, ZeroDivergence, nn
from pckernels.coefficients import coefficients
from pckernels.losses import per_sample

DIGITS = (1, 8, 8)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def autograd(network, x, target) -> dict[str, torch.Tensor]:
    """Backprop's gradients of the network's own module, under its own loss, summed over the batch."""
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    loss = per_sample(network.loss, network.module(x), target).sum()
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def cases(**pc):
    one_hot = torch.nn.functional.one_hot
    images, letters = torch.randn(3, *DIGITS), one_hot(torch.randint(9, (3, 5)), 9).float()
    labels = torch.randint(4, (3,))
    return {
        "mlp": (nn.MLP([6, 8, 7, 4], "tanh", reduction="sum", **pc), torch.randn(3, 6), one_hot(labels, 4)),
        "cnn": (nn.CNN(DIGITS, 4, std=None, **pc), images, one_hot(labels, 4)),
        "rnn": (nn.RNN(9, 6, 4, **pc), letters, one_hot(labels, 4)),
        "lstm": (nn.LSTM(5, 6, **pc), torch.randint(5, (3, 4)), one_hot(torch.randint(5, (3, 4)), 5)),
    }


def case(name: str, **pc):
    network, x, target = cases(**pc)[name]
    return network.double(), x.double() if x.is_floating_point() else x, target.double()


@pytest.mark.parametrize("name", ["mlp", "cnn", "rnn", "lstm"])
@pytest.mark.parametrize("rule", [ZeroDivergence(), FixedPrediction(40, 1.0, solver="iterate")], ids=["zero", "fixed"])
def test_exact_rules_give_backprop(name, rule):
    network, x, target = case(name, rule=rule)
    network.backward(x, target)
    for key, gradient in autograd(network, x, target).items():
        assert relative(network.get_parameter(key).grad, gradient) < 1e-12, key


def test_the_cnn_learns_backprop_times_the_coefficient_of_its_distance():
    network, x, target = case("cnn")
    network.backward(x, target)
    c = coefficients(100, 0.1, 5)
    distances = {"conv1": 5, "conv2": 3, "fc1": 2, "fc2": 1, "fc3": 0}
    for key, gradient in autograd(network, x, target).items():
        assert relative(network.get_parameter(key).grad, c[distances[key.split(".")[0]]] * gradient) < 1e-12, key


def test_the_pool_of_the_cnn_is_a_vertex_of_its_own():
    graph = case("cnn")[0].trace(torch.randn(2, *DIGITS).double())
    assert [(vertex.name, vertex.distance) for vertex in graph.vertices if vertex.distance] == [
        ("conv1", 5),
        ("pool", 4),
        ("conv2", 3),
        ("fc1", 2),
        ("fc2", 1),
    ]


def test_the_rnn_relaxes_one_time_step_after_the_other():
    """Each step delivers c_1(100) of what the step after it holds: backprop through time with that factor on every state."""
    network, x, target = case("rnn")
    network.backward(x, target)
    module, (_, c) = network.module, coefficients(100, 0.1, 1)
    h = module.h0.expand(3, -1)
    for letters in x.unbind(1):
        h = torch.tanh(letters @ module.rnn.weight_ih_l0.T + h @ module.rnn.weight_hh_l0.T)
        h.register_hook(lambda gradient: c * gradient)
    loss = per_sample("squared_error", module.readout(h), target).sum()
    for parameter, gradient in zip(module.parameters(), torch.autograd.grad(loss, list(module.parameters())), strict=True):
        assert relative(parameter.grad, gradient) < 1e-12
        assert relative(c * parameter.grad, gradient) > 1e-6  # one factor more or less would be seen


def test_the_lstm_is_near_backprop_and_its_embedding_rests():
    network, x, target = case("lstm")
    embedding = network.module.embedding.weight.clone()
    network.step(x, target, torch.optim.SGD(network.parameters(), lr=0.1))
    assert network.module.embedding.weight.grad is None
    assert torch.equal(network.module.embedding.weight, embedding)
    network, x, target = case("lstm")
    network.backward(x, target)
    for key, gradient in autograd(network, x, target).items():
        assert relative(network.get_parameter(key).grad, gradient) < 1e-5, key


@pytest.mark.parametrize(("image", "kernel", "features"), [((3, 32, 32), 5, 1600), ((1, 28, 28), 5, 1024), (DIGITS, 3, 16)])
def test_the_cnn_fits_its_image(image, kernel, features):
    module = nn.CNNModule(image)
    assert module.conv1[0].kernel_size == module.conv2[0].kernel_size == (kernel, kernel)
    assert module.fc1[1].weight.shape == (200, features)
    assert module(torch.randn(2, *image)).shape == (2, 10)


def test_the_paper_s_parameters():
    torch.manual_seed(0)
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in (("cnn", nn.CNNModule()), ("rnn", nn.RNNModule()))}
    assert count == {"cnn": 354_350, "rnn": 57 * 256 + 256 * 256 + 256 * 18}
    lstm = nn.LSTMModule()
    assert lstm.embedding.weight.shape == (65, 65) and lstm.lstm.weight_hh_l0.shape == (4 * 1056, 1056)
    assert all(bool((bias == 0).all()) for name, bias in lstm.named_parameters() if "bias" in name)
    for module in (nn.CNNModule(), nn.RNNModule(), lstm):
        for name, weight in [*module.named_parameters(), *module.named_buffers()]:
            if "bias" not in name and "embedding" not in name:
                assert float(weight.detach().std()) == pytest.approx(0.05, rel=0.15), name
                assert abs(weight.detach().mean()) < 0.006, name
    assert set(dict(lstm.named_buffers())) == {"h0", "c0"} <= set(lstm.state_dict())


def test_the_paper_s_settings_are_the_defaults_and_can_be_changed():
    assert nn.CNN().rule == FixedPrediction(100, 0.1) and nn.CNN().reduction == "sum"
    assert nn.RNN().rule == FixedPrediction(100, 0.1, order="nested")
    assert nn.LSTM(5, 6).rule == FixedPrediction(200, 0.1, order="nested")
    changed = nn.CNN(rule=ZeroDivergence(), reduction="mean", loss="cross_entropy", value_nodes="layer")
    assert (changed.rule, changed.reduction, changed.loss, changed.value_nodes) == (ZeroDivergence(), "mean", "cross_entropy", "layer")


@pytest.mark.parametrize("name", ["mlp", "cnn", "rnn", "lstm"])
def test_copies_and_pickles_learn_alike(name):
    network, x, target = case(name)
    gradients = []
    for one in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        one.backward(x, target)
        gradients.append([parameter.grad for parameter in one.parameters() if parameter.requires_grad])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def test_generated_text_follows_the_module():
    torch.manual_seed(3)
    module = nn.LSTMModule(5, 6).double()
    torch.nn.init.normal_(module.readout.weight, std=3)
    start = torch.tensor([1, 4, 2])
    text = start
    for _ in range(12):
        text = torch.cat([text, module(text[None])[0, -1].argmax()[None]])
    assert module.generate(start, 12, 1e-6).tolist() == text[3:].tolist()
    drawn = [module.generate(start, 12, 5.0, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert module.generate(start, 0, 1.0).shape == (0,)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: nn.MLP([4]), ValueError, "sizes must be at least 2 numbers"),
        (lambda: nn.MLP([4, 0]), ValueError, "sizes must be at least 2 numbers of 1 or more"),
        (lambda: nn.MLP([4, 2.5]), TypeError, "sizes must be whole numbers"),
        (lambda: nn.MLP([4, 2], "swish!"), ValueError, "no activation 'swish!'; choose from relu"),
        (lambda: nn.CNN((3, 32)), ValueError, r"image must be \(C, H, W\)"),
        (lambda: nn.CNN((1, 4, 4)), ValueError, "4 pixels is too small for two convolutions of kernel 3"),
        (lambda: nn.RNN(hidden=0), ValueError, "hidden"),
        (lambda: nn.LSTM("65"), TypeError, "vocabulary"),
        (lambda: nn.CNN(reduction="median"), ValueError, "median"),
    ],
)
def test_bad_arguments(build, error, match):
    with pytest.raises(error, match=match):
        build()
