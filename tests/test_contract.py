"""The PyTorch contract of PCNetwork, line by line: what a user may expect of a module and its gradients."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import start_processes

import pckernels as pck

EXACT = pck.ZeroDivergence()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)
        self.block = nn.Sequential(nn.Linear(7, 7), nn.Tanh())
        self.head = nn.Linear(7, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        return self.head(h + self.block(h))


@pytest.fixture
def case():
    torch.manual_seed(0)
    return Residual().double(), torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)


def autograd_gradients(module, inputs, target, divisor=1.0, loss=lambda y, t: 0.5 * (y - t).square().sum()):
    clone = copy.deepcopy(module)
    clone.zero_grad()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    (loss(clone(*inputs), target) / divisor).backward()
    return {name: p.grad for name, p in clone.named_parameters() if p.grad is not None}


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


def test_parameters_and_state_dict_are_the_modules_own(case):
    module, *_ = case
    network = pck.PCNetwork(module, EXACT)
    assert list(network.state_dict()) == list(module.state_dict())
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert all(a is b for a, b in zip(network.parameters(), module.parameters(), strict=True))
    saved = {name: value + 1 for name, value in network.state_dict().items()}
    network.load_state_dict(saved)
    assert torch.equal(module.head.weight, saved["head.weight"])


def test_forward_is_the_modules_own_and_records_gradients(case):
    module, x, _ = case
    network = pck.PCNetwork(module, EXACT)
    assert torch.equal(network(x), module(x)) and network(x).requires_grad


def test_reduction_scales_gradients_and_loss_only(case):
    module, x, target = case
    expected = autograd_gradients(module, x, target)
    for reduction, divisor in (("mean", 4.0), ("sum", 1.0)):
        module.zero_grad()
        inference = pck.PCNetwork(module, EXACT, reduction=reduction).backward(x, target)
        assert_same(gradients(module), {name: value / divisor for name, value in expected.items()})
        loss = 0.5 * (module(x) - target).square().sum()
        assert torch.allclose(inference.loss, loss / divisor, rtol=1e-12)
        assert torch.allclose(inference.energy[0], loss, rtol=1e-12)
        assert torch.allclose(inference.errors["output"], target - module(x), rtol=1e-12)


def test_to_train_eval_reach_the_module(case):
    module, x, target = case
    network = pck.PCNetwork(module, EXACT)
    network.eval()
    assert not module.training and not module.block.training
    network.train()
    assert module.training and module.block.training
    network.to(torch.float32)
    assert module.head.weight.dtype == torch.float32
    network.backward(x.float(), target.float())
    assert module.head.weight.grad.dtype == torch.float32


def test_deepcopy_and_pickle(case):
    module, x, target = case
    network = pck.PCNetwork(module, EXACT)
    network.backward(x, target)
    stream = io.BytesIO()
    torch.save(network, stream)
    stream.seek(0)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), torch.load(stream, weights_only=False)):
        assert other.module is not module
        assert all(a is b for a, b in zip(other.parameters(), other.module.parameters(), strict=True))
        other.zero_grad()
        other.backward(x, target)
        assert_same(gradients(other.module), gradients(module))


def test_parameters_are_read_live(case):
    module, x, target = case
    network = pck.PCNetwork(module, EXACT)
    network.backward(x, target)
    with torch.no_grad():
        module.inner.weight.mul_(2.0)
    module.block[0].weight = nn.Parameter(torch.randn(7, 7, dtype=torch.float64))
    module.zero_grad()
    network.backward(x, target)
    assert_same(gradients(module), autograd_gradients(module, x, target, 4.0))


def test_frozen_take_part_and_unused_keep_none(case):
    module, x, target = case
    module.block[0].weight.requires_grad_(False)
    network = pck.PCNetwork(module, EXACT)
    network.backward(x, target)
    assert module.block[0].weight.grad is None and module.unused.weight.grad is None
    assert_same(gradients(module), autograd_gradients(module, x, target, 4.0))
    module.block[0].weight.requires_grad_(True)
    module.zero_grad()
    network.backward(x, target)
    assert module.block[0].weight.grad is not None


def test_a_parameter_whose_error_has_not_arrived_gets_zeros(case):
    module, x, target = case
    for rule in (pck.FixedPrediction(0, 0.5), pck.Strict(1, 0.1), pck.FixedPrediction(1, 0.5, solver="iterate")):
        module.zero_grad()
        pck.PCNetwork(module, rule).backward(x, target)
        assert not module.inner.weight.grad.any() and module.head.weight.grad.any() and module.unused.weight.grad is None


def test_two_calls_add(case):
    module, x, target = case
    network = pck.PCNetwork(module, EXACT)
    network.backward(x, target)
    once = gradients(module)
    network.backward(x, target)
    assert_same(gradients(module), {name: 2 * value for name, value in once.items()})


@pytest.mark.parametrize("rule", [EXACT, pck.Strict(3, 0.1), pck.FixedPrediction(5, 0.5, solver="iterate")])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_same_under_no_grad_and_inference_mode(case, mode, rule):
    module, x, target = case
    network = pck.PCNetwork(module, rule)
    network.backward(x, target)
    expected = gradients(module)
    module.zero_grad()
    with mode():
        network.backward(x * 1.0, target * 1.0)
    assert_same(gradients(module), expected, 0.0)


def test_scale_with_grad_scaler(case):
    module, x, target = case
    expected = autograd_gradients(module, x, target, 4.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # GradScaler makes its scale at the first use
    pck.PCNetwork(module, EXACT).backward(x, target, scale=scaler.get_scale())
    assert_same(gradients(module), {name: 1024.0 * value for name, value in expected.items()})
    scaler.unscale_(optimizer)
    assert_same(gradients(module), expected)
    scaler.step(optimizer)
    scaler.update()
    module.zero_grad()
    pck.PCNetwork(module, EXACT).backward(x, target, scale=torch.tensor(8.0, dtype=torch.float64))
    assert_same(gradients(module), {name: 8.0 * value for name, value in expected.items()})


def test_autocast_keeps_state_and_gradients_in_the_parameters_dtype():
    torch.manual_seed(0)
    module, x, target = Residual(), torch.randn(8, 5), torch.randn(8, 3)
    exact = autograd_gradients(module, x, target, 8.0)
    for rule in (EXACT, pck.FixedPrediction(9, 1.0, solver="iterate"), pck.Strict(4, 0.1)):
        module.zero_grad()
        network = pck.PCNetwork(module, rule)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inference = network.backward(x, target)
        assert all(p.grad.dtype == torch.float32 for p in module.parameters() if p.grad is not None)
        assert all(value.dtype == torch.float32 for value in inference.values.values())
        if rule.exact:
            assert_same(gradients(module), exact, 0.05)
            assert any(not torch.equal(gradients(module)[name], exact[name]) for name in exact), "autocast was not in force"


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.a, self.b = nn.Embedding(6, 4), nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, batch, flip=False):
        tokens = self.embedding(batch["tokens"]).mean(1)
        y = self.a(tokens) * torch.sigmoid(self.b(batch["features"][0]))
        return {"score": y, "gate": -y if flip else y.relu(), "best": y.argmax(-1)}


def test_structures_match_and_integers_are_constants():
    torch.manual_seed(0)
    module = Dictionary().double()
    batch = {"tokens": torch.randint(0, 6, (4, 3)), "features": (torch.randn(4, 5, dtype=torch.float64),)}
    target = {"score": torch.randn(4, 3, dtype=torch.float64), "gate": torch.randn(4, 3, dtype=torch.float64), "best": None}

    def loss(y, t):
        return 0.5 * sum((y[k] - t[k]).square().sum() for k in ("score", "gate"))

    network = pck.PCNetwork(module, EXACT)
    for flip in (False, True):
        module.zero_grad()
        network.backward(batch, target=target, flip=flip)
        clone = copy.deepcopy(module)
        clone.zero_grad()
        (loss(clone(batch, flip=flip), target) / 4).backward()
        assert_same(gradients(module), {name: p.grad for name, p in clone.named_parameters()})
    partial = network.backward(batch, target={**target, "gate": None})
    assert torch.equal(partial.errors["output.1"], torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="structured"):
        network.backward(batch, target={"score": target["score"]})


def test_batch_dim_1():
    torch.manual_seed(0)
    module = nn.GRU(3, 4).double()
    x, target = torch.randn(5, 2, 3, dtype=torch.float64), (torch.randn(5, 2, 4, dtype=torch.float64), None)
    network = pck.PCNetwork(module, EXACT, batch_dim=1)
    network.backward(x, target)
    expected = autograd_gradients(module, x, target[0], 2.0, lambda y, t: 0.5 * (y[0] - t).square().sum())
    assert_same(gradients(module), expected)
    inference = network.infer(torch.randn(5, 7, 3, dtype=torch.float64), (torch.randn(5, 7, 4, dtype=torch.float64), None))
    assert inference._outcome.losses.shape == (7,)


def test_any_batch_size_with_one_trace(case):
    module, _, _ = case
    network = pck.PCNetwork(module, EXACT)
    for size in (4, 1, 15, 0, 17):
        module.zero_grad()
        x, target = torch.randn(size, 5, dtype=torch.float64), torch.randn(size, 3, dtype=torch.float64)
        network.backward(x, target)
        assert_same(gradients(module), autograd_gradients(module, x, target, max(size, 1)))
    assert len(network._traces) == 1


def test_a_new_sequence_length_traces_anew_from_a_bounded_cache():
    network = pck.PCNetwork(nn.RNN(2, 2, batch_first=True), EXACT)
    for length in range(1, 21):
        network.infer(torch.randn(2, length, 2))
    assert len(network._traces) == 16
    for rows in (3, 5):
        network.infer(torch.randn(rows, 20, 2))
    assert len(network._traces) == 16


def test_samples_do_not_mix(case):
    module, x, target = case
    for rule in (pck.Strict(6, 0.2), pck.FixedPrediction(6, 0.2), pck.Strict(50, 0.2, tolerance=1e-3)):
        network = pck.PCNetwork(module, rule)
        together = network.infer(x, target).errors
        alone = [network.infer(x[k : k + 1], target[k : k + 1]).errors for k in range(len(x))]
        for name, error in together.items():
            assert torch.allclose(error, torch.cat([one[name] for one in alone]), rtol=1e-12, atol=1e-14), (rule, name)


def test_infer_leaves_gradients_alone(case):
    module, x, target = case
    network = pck.PCNetwork(module, pck.Strict(4, 0.1))
    inference = network.infer(x, target, record=True)
    assert all(p.grad is None for p in module.parameters())
    assert len(inference.history) == 5 and inference.energy.shape == (5,)
    assert torch.equal(inference.values["output"], target)
    feed_forward = network.infer(x)
    assert torch.equal(feed_forward.values["output"], module(x).detach())
    with pytest.raises(RuntimeError, match="target"):
        _ = feed_forward.loss


def test_step_is_zero_grad_backward_and_optimizer_step(case):
    module, x, target = case
    twin = copy.deepcopy(module)
    network, optimizer = pck.PCNetwork(module, EXACT), torch.optim.Adam(module.parameters(), 0.01)
    other = torch.optim.Adam(twin.parameters(), 0.01)
    for _ in range(3):
        network.step(x, target, optimizer)
        other.zero_grad()
        (0.5 * (twin(x) - target).square().sum() / 4).backward()
        other.step()
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10)
    with pytest.raises(TypeError, match="optimizer"):
        network.step(x, target)


def test_parameter_hooks_run_once_and_count(case):
    module, x, target = case
    expected = autograd_gradients(module, x, target, 4.0)["head.weight"]
    calls = []
    module.head.weight.register_hook(lambda grad: calls.append("hook") or 2 * grad)
    module.head.bias.register_post_accumulate_grad_hook(lambda p: calls.append("after"))
    pck.PCNetwork(module, EXACT).backward(x, target)
    assert sorted(calls) == ["after", "hook"]
    assert torch.allclose(module.head.weight.grad, 2 * expected, rtol=1e-12)


def test_a_hook_that_raises_changes_no_gradient(case):
    module, x, target = case
    network = pck.PCNetwork(module, EXACT)
    network.backward(x, target)
    before = gradients(module)

    def fail(grad):
        raise ArithmeticError("no")

    handle = module.inner.bias.register_hook(fail)
    with pytest.raises(ArithmeticError):
        network.backward(x, target)
    handle.remove()
    assert_same(gradients(module), before, 0.0)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop, self.head = nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Dropout(0.4), nn.Linear(3 * 4, 2)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))


def test_batch_norm_and_dropout_semantics():
    torch.manual_seed(0)
    module = Normed().double()
    x, target = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    twin = copy.deepcopy(module)
    torch.manual_seed(7)
    (0.5 * (twin(x) - target).square().sum() / 6).backward()
    network = pck.PCNetwork(module, EXACT)
    network.trace(x)
    torch.manual_seed(7)
    network.backward(x, target)
    assert_same(gradients(module), gradients(twin))  # live statistics, full Jacobian, the same mask from the same seed
    for name, buffer in twin.named_buffers():
        assert torch.allclose(buffer.double(), module.get_buffer(name).double(), rtol=1e-12), name
    assert int(module.norm.num_batches_tracked) == 1
    module.eval()
    network.zero_grad()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    network.backward(x, target)
    assert_same(gradients(module), autograd_gradients(module, x, target, 6.0))
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())


def test_strict_holds_statistics_and_masks():
    torch.manual_seed(0)
    module = Normed().double()
    network = pck.PCNetwork(module, pck.Strict(4, 0.1))
    x, target = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    network.backward(x, target)
    assert int(module.norm.num_batches_tracked) == 1
    recorded = network.infer(x, target, record=True).history
    name = next(v.name for v in network.graph.vertices if "conv" in v.name)
    dropped = [(moment.values[name] == 0.0) for moment in recorded]
    assert dropped[0].any()
    mu = [moment.values[name] - moment.errors[name] for moment in recorded]
    assert all(torch.equal(m[dropped[0] & (mu[0] == 0)], mu[0][dropped[0] & (mu[0] == 0)]) for m in mu)  # the mask holds


def test_divergence_changes_nothing(case):
    module, x, target = case
    network, optimizer = pck.PCNetwork(module, pck.Strict(60, 40.0)), torch.optim.Adam(module.parameters(), 0.1)
    pck.PCNetwork(module, EXACT).backward(x, target)
    before = gradients(module), copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    for call in (lambda: network.backward(x, target), lambda: network.step(x, target, optimizer)):
        with pytest.raises(pck.InferenceDiverged, match="smaller rate"):
            call()
        assert_same(gradients(module), before[0], 0.0)
        assert all(torch.equal(value, before[1][name]) for name, value in module.state_dict().items())
        assert optimizer.state_dict() == before[2]


def test_deferred_check_adds_nothing_and_raises_on_reading(case):
    module, x, target = case
    good = pck.PCNetwork(module, pck.Strict(3, 0.1), check="deferred")
    good.backward(x, target)
    before = gradients(module)
    assert all(value.abs().sum() > 0 for value in before.values())
    bad = pck.PCNetwork(module, pck.Strict(60, 40.0), check="deferred").backward(x, target)
    assert_same(gradients(module), before, 0.0)
    for read in (lambda: bad.loss, lambda: bad.energy):
        with pytest.raises(pck.InferenceDiverged):
            read()


def test_energy_of_a_merged_sweep_asks_for_unmoved_parameters(case):
    module, x, target = case
    network = pck.PCNetwork(module, pck.FixedPrediction(9, 1.0))
    expected = pck.PCNetwork(module, pck.FixedPrediction(9, 1.0, solver="iterate")).infer(x, target).energy
    assert torch.allclose(network.infer(x, target).energy, expected, rtol=1e-12)
    moved = network.step(x, target, torch.optim.SGD(module.parameters(), 0.1))
    with pytest.raises(RuntimeError, match="iterate"):
        _ = moved.energy


def _distance_of_incremental_steps(module, x, target, half):
    """Between stepping on half of a batch in each process, and on the whole of it in one."""
    twin = copy.deepcopy(module)
    rule = pck.Incremental(3, 0.2)
    pck.PCNetwork(twin, rule).step(x, target, torch.optim.SGD(twin.parameters(), 0.1))
    parallel = pck.PCNetwork(torch.compile(nn.parallel.DistributedDataParallel(module), backend="eager"), rule)
    parallel.step(x[half], target[half], torch.optim.SGD(module.parameters(), 0.1))
    return max(float((a - b).abs().max()) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


def _data_parallel(rank: int, folder: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = Residual().double()
    module.unused.requires_grad_(False)
    x, target = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    network = pck.PCNetwork(nn.parallel.DistributedDataParallel(module), EXACT)
    half = slice(2 * rank, 2 * rank + 2)
    network.backward(x[half], target[half])
    expected = autograd_gradients(module, x, target, 4.0)
    errors = [
        float((p.grad - expected[name]).norm() / expected[name].norm()) for name, p in module.named_parameters() if p.grad is not None
    ]
    results[rank] = (len(errors), max(errors), _distance_of_incremental_steps(module, x, target, half))
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_averages(tmp_path):
    results = torch.multiprocessing.get_context("spawn").Manager().dict()
    start_processes(_data_parallel, args=(str(tmp_path), results), nprocs=2, start_method="spawn")
    assert all(count == 6 and error < 1e-12 and distance < 1e-14 for count, error, distance in (results[0], results[1]))
