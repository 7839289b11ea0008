"""cross_entropy, the loss of an output between two products: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from fast_interpreter import install
from torch import Tensor
from torch.nn import functional as F
from triton_case import DEVICE, relative_error, require_a_way_to_run

from pckernels import tensor_operations
from pckernels.instructions import Loss

require_a_way_to_run()

from pckernels.triton import cross_entropy as module  # noqa: E402
from pckernels.triton.cross_entropy import MOST_CLASSES, TILE, cross_entropy, plain_cross_entropy, refusal  # noqa: E402

if DEVICE == "cpu":
    install()

NAN = float("nan")


def labels(batch: int, positions: int, classes: int, ignored: float = 0.3) -> Tensor:
    """Random classes, (batch, positions); of about so many positions none."""
    found = torch.randint(classes, (batch, positions)).float()
    return torch.where(torch.rand(batch, positions) < ignored, -1.0, found)


def new_parts() -> Tensor:
    """A place among others, as `step_update.new_parts` gives it; NaN, so that what is not written shows."""
    return torch.full((module.PARTS, 2, 3), NAN, dtype=torch.float64, device=DEVICE)[:, 1, 2]


def found(mu: Tensor, change: Tensor | None, target: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """The error and the parts of the loss."""
    error, parts = torch.full(mu.shape, NAN, device=DEVICE), new_parts()
    cross_entropy(mu.to(DEVICE), None if change is None else change.to(DEVICE), target.to(DEVICE), error, factor, parts)
    return error, parts


def exact(mu: Tensor, change: Tensor | None, target: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same in float64; the loss in the first part alone."""
    error, parts = torch.full(mu.shape, NAN, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    plain_cross_entropy(mu.double(), None if change is None else change.double(), target.double(), error, factor, parts)
    return error, parts


def programs(target: Tensor, classes: int) -> int:
    """How many a launch has."""
    rows = max(1, TILE // (1 << (classes - 1).bit_length()))
    return min(module.PARTS, -(-target.numel() // rows))


def assert_equal(mu: Tensor, change: Tensor | None, target: Tensor, factor: float = 1.0) -> None:
    """To float32's rounding; each program leaves its part, and nobody else any."""
    error, parts = found(mu, change, target, factor)
    wanted, loss = exact(mu, change, target, factor)
    assert relative_error(error, wanted) < 1e-6
    written = programs(target, mu.shape[1] // target.shape[1])
    assert parts[written:].isnan().all()
    assert relative_error(parts[:written].sum(), loss.sum()) < 1e-6


@pytest.mark.parametrize(
    ("batch", "positions", "classes"),
    [(1, 1, 1), (5, 1, 2), (5, 1, 10), (130, 1, 10), (17, 3, 7), (3, 50, 16), (2, 5, 1000), (3, 1, 1025), (2, 2, MOST_CLASSES)],
)
def test_an_output_is_observed(batch: int, positions: int, classes: int) -> None:
    shape = (batch, positions * classes)
    target = labels(batch, positions, classes)
    for size in (1.0, 8.0):
        assert_equal(size * torch.randn(shape), torch.randn(shape), target)
    assert_equal(torch.randn(shape), None, target, 0.37)
    assert_equal(torch.randn(shape), torch.randn(shape), target, -1.7)


def test_the_reference_is_the_gradient_of_cross_entropy() -> None:
    mu, change, target = torch.randn(6, 3 * 5).double(), torch.randn(6, 3 * 5).double(), labels(6, 3, 5)
    logits = (mu + change).requires_grad_()
    loss = 0.7 * F.cross_entropy(logits.view(-1, 5), target.view(-1).long(), ignore_index=-1, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    error, parts = exact(mu, change, target, 0.7)
    assert relative_error(error, -gradient) < 1e-14
    assert relative_error(parts.sum(), loss) < 1e-14


@pytest.mark.parametrize("size", [0.1, 1.0, 8.0, 30.0])
def test_small_probabilities_are_as_exact_as_those_of_pytorch(size: float) -> None:
    """In their own digits, where a norm shows those of the large ones alone."""
    mu, target = size * torch.randn(40, 1000), labels(40, 1, 1000, ignored=0.0)
    wanted = exact(mu, None, target)[0]
    seen = wanted < -1e-30  # not of the class itself, nor below what `exponential` has

    def worst(error: Tensor) -> float:
        return ((error.cpu().double() - wanted) / wanted)[seen].abs().max().item()

    assert worst(found(mu, None, target)[0]) <= worst(tensor_operations.loss(Loss.CROSS_ENTROPY, 1000, mu, None, target)[1])


def test_huge_logits() -> None:
    """Sums are exact in float32, so that the float64 reference sees the same logits."""
    mu, change = 1e4 * torch.randint(-1, 2, (40, 10)).float(), torch.randint(-3, 4, (40, 10)).float()
    target = labels(40, 1, 10)
    assert_equal(mu, None, target)
    assert_equal(mu, change, target)
    assert_equal(torch.full((4, 10), -1e4), None, labels(4, 1, 10))
    assert_equal(torch.full((4, 10), 1e4), None, labels(4, 1, 10))


def test_a_class_that_cannot_be() -> None:
    mu, target = torch.randn(8, 6), torch.tensor([0.0, 1.0, 3.0, 4.0, 5.0, -1.0, 0.0, 1.0])[:, None]
    mu[:, 2] = -torch.inf
    assert_equal(mu, None, target)


def test_what_is_ignored_is_not_read() -> None:
    mu, change, target = torch.randn(5, 3 * 7), torch.randn(5, 3 * 7), labels(5, 3, 7)
    assert (target < 0.0).any() and (target >= 0.0).any()
    for tensor in (mu, change):
        tensor.view(5, 3, 7)[target < 0.0] = NAN
    assert_equal(mu, change, target)
    error, _ = found(mu, change, target)
    assert not error.view(5, 3, 7)[(target < 0.0).to(DEVICE)].any()


def test_all_may_be_ignored() -> None:
    error, parts = found(torch.randn(5, 3 * 7), torch.randn(5, 3 * 7), torch.full((5, 3), -100.0), 2.0)
    assert not error.any() and parts[0] == 0.0


def test_a_label_without_a_class_spoils_no_other_position() -> None:
    mu, target = torch.randn(6, 2 * 5), labels(6, 2, 5, ignored=0.0)
    wanted, _ = found(mu, None, target)
    target[3, 1] = 5.0  # which would be the next position's first class, if it were read there
    error, _ = found(mu, None, target)
    good = torch.ones(6, 2, dtype=torch.bool).index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(False)).to(DEVICE)
    assert torch.equal(error.view(6, 2, 5)[good], wanted.view(6, 2, 5)[good])


@pytest.mark.parametrize(("positions", "classes"), [(1, 10), (3, 7)])
def test_rows_may_lie_apart(positions: int, classes: int) -> None:
    """Each tensor a part of another one, wider by a width of its own and longer by a sample; what is around the error stays."""
    n, batch = positions * classes, 150
    of_mu, of_change = torch.randn(batch + 1, n + 3, device=DEVICE), torch.randn(batch + 1, n + 5, device=DEVICE)
    of_target, of_error = torch.ones(batch + 1, positions + 2, device=DEVICE), torch.full((batch + 1, n + 4), NAN, device=DEVICE)
    mu, change, target = of_mu[:batch, 2 : 2 + n], of_change[:batch, 1 : 1 + n], of_target[:batch, :positions]
    target.copy_(labels(batch, positions, classes))
    error, parts = of_error[:batch, 3 : 3 + n], new_parts()
    cross_entropy(mu, change, target, error, 1.3, parts)
    reference, loss = exact(mu.cpu(), change.cpu(), target.cpu(), 1.3)
    assert relative_error(error, reference) < 1e-6
    assert relative_error(parts[: programs(target, classes)].sum(), loss.sum()) < 1e-6
    error.fill_(NAN)
    assert of_error.isnan().all()


def test_programs_take_more_than_a_tile_each_and_two_runs_are_equal_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARTS", 2)
    mu, change, target = torch.randn(123, 3 * 10), torch.randn(123, 3 * 10), labels(123, 3, 10)
    assert target.numel() > 2 * 2 * (TILE // 16)  # several tiles for either program, the last of them ragged
    assert_equal(mu, change, target, 0.7)
    (error, parts), (again, more) = (found(mu, change, target, 0.7) for _ in range(2))
    assert torch.equal(error, again) and torch.equal(parts, more)
    assert parts.count_nonzero() == 2 and not parts.isnan().any()


def test_the_loss_is_not_asked_for() -> None:
    mu, change, target = torch.randn(9, 2 * 4), torch.randn(9, 2 * 4), labels(9, 2, 4)
    error = torch.full((9, 8), NAN, device=DEVICE)
    cross_entropy(mu.to(DEVICE), change.to(DEVICE), target.to(DEVICE), error, 0.5)
    assert torch.equal(error, found(mu, change, target, 0.5)[0])


def test_nothing_is_done_for_an_empty_batch() -> None:
    error, parts = found(torch.empty(0, 6), torch.empty(0, 6), torch.empty(0, 2))
    assert error.shape == (0, 6) and parts.isnan().all()
    assert exact(torch.empty(0, 6), None, torch.empty(0, 2))[1].sum() == 0.0


def test_refusals_are_sentences() -> None:
    mu, target, error, parts = (torch.zeros(shape, device=DEVICE) for shape in ((4, 6), (4, 2), (4, 6), (module.PARTS,)))
    good = {"mu": mu, "change": mu, "target": target, "error": error, "factor": 1.0, "parts": parts.double()}
    cross_entropy(**good)
    many = torch.zeros(1, MOST_CLASSES + 1, device=DEVICE)
    fit, side, overlap = r"must be \(B, P \* C\), and target \(B, P\); got", r"stride\(1\) must be 1", "Samples of error must not overlap"
    for wrong, kind, text in (
        ({"mu": mu.double()}, TypeError, "must be float32; got torch.float64"),
        ({"target": target.long()}, TypeError, "must be float32"),
        ({"error": error.half()}, TypeError, "must be float32"),
        ({"change": mu[:, :3]}, ValueError, fit),
        ({"error": error[:3]}, ValueError, fit),
        ({"target": target[:3]}, ValueError, fit),
        ({"target": target[:, 0]}, ValueError, fit),
        ({"target": target[:, :0]}, ValueError, fit),
        ({"target": torch.zeros(4, 4, device=DEVICE)}, ValueError, fit),
        ({"mu": torch.zeros(6, 4, device=DEVICE).t()}, ValueError, side),
        ({"target": torch.zeros(2, 4, device=DEVICE).t()}, ValueError, side),
        ({"error": error[0].expand(4, 6)}, ValueError, overlap),
        ({"parts": parts.double()[:3]}, ValueError, r"parts must be one place of new_parts, \(528,\) in float64; got \(3,\)"),
        ({"parts": parts}, ValueError, "parts must be one place of new_parts"),
        ({"mu": many, "change": None, "error": many, "target": target[:1, :1]}, ValueError, "8192 at most; got 8193 classes. Let PyTorch"),
    ):
        with pytest.raises(kind, match=text):
            cross_entropy(**{**good, **wrong})


def test_the_most_classes_are_not_refused() -> None:
    assert refusal(1) is None and refusal(MOST_CLASSES) is None
    reason = refusal(MOST_CLASSES + 1)
    assert reason is not None and reason.endswith(".")
