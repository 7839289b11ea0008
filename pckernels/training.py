"""Training by predictive coding and by backprop, from the same seed on the same batches.

A run can be killed at any moment. Everything that decides its future lies in one checkpoint, and the batches of an epoch
follow from the seed, so a resumed run writes the metrics and ends in the weights of the unbroken one (bit for bit on a
CPU with the same number of threads).
"""

import csv
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from . import checkpoint, data, nn, settings
from .errors import InferenceDiverged
from .losses import per_sample
from .network import PCNetwork
from .settings import TrainConfig, complete

COLUMNS = ("step", "epoch", "batch", "split", "loss", "accuracy")
SPLITS = ("train", "test")
EVALUATION_BATCH = 256
SUFFIXES = (".json", ".csv", ".pt", ".txt")

Row = tuple[int, int, int, str, float, float]  # the columns of the metrics file; accuracy is NaN for a training batch


class Diverged(RuntimeError):
    """The loss or the inference of a batch was no longer finite. The last checkpoint and the metrics are kept."""


@dataclass
class Run:
    """A learner on its way: what a checkpoint holds, and what that is made of."""

    config: TrainConfig
    dataset: data.Dataset
    network: PCNetwork
    optimizer: torch.optim.Optimizer
    step: int = 0
    epoch: int = 0
    batch: int = 0
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What a run ended with; `loss` and `accuracy` are of the test set, `rows` the lines of the metrics file."""

    config: TrainConfig
    network: PCNetwork
    rows: list[Row]
    loss: float
    accuracy: float
    seconds: float
    text: str | None = None


def train(config: TrainConfig, dataset: data.Dataset | None = None, report: Callable[[str], None] = print) -> Result:
    """Train one learner.

    Args:
        config: the settings; None in them stands for the model's default.
        dataset: the data, if read already.
        report: is given one line for each epoch.

    Raises:
        ValueError, TypeError, FileNotFoundError, Unsupported: something in the settings or the data, before anything is written.
        Diverged: the learning rate, or the rate of inference, is too large. What was written is kept.
    """
    config = complete(config)
    _set_threads(config)
    require_free(config)
    run = _start(config, dataset or read_data(config))
    _resume(run)
    begun = time.perf_counter()
    with Metrics(config, run.rows) as metrics:
        _learn(run, metrics, report)
        loss, accuracy = _finish(run, metrics, report)
    seconds = time.perf_counter() - begun
    return Result(config, run.network, run.rows, loss, accuracy, seconds, _write_sample(run))


class Metrics:
    """The metrics: kept in the run, and appended to its CSV line by line where there is one."""

    def __init__(self, config: TrainConfig, rows: list[Row]) -> None:
        self.rows = rows
        self.path = path_of(config, ".csv")

    def __enter__(self) -> "Metrics":
        self.file = None
        if self.path:
            # a killed run leaves lines, whole or torn, that came after its last checkpoint: they are written again
            lines = _csv([COLUMNS, *self.rows])
            checkpoint.replace_file(self.path, lambda file: file.write(lines.encode()))
            self.file = open(self.path, "a", newline="", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        if self.file:
            self.file.close()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.file:
            self.file.write(_csv([row]))
            self.file.flush()


def require_free(config: TrainConfig) -> None:
    """Raise ValueError if the run would write over another, unless it was told to."""
    if config.resume or config.overwrite:
        return
    for suffix in SUFFIXES:
        path = path_of(config, suffix)
        if path and path.exists():
            raise ValueError(f"{path} is there already: give --resume to continue that run, --overwrite to discard it, or another --out.")


def path_of(config: TrainConfig, suffix: str) -> Path | None:
    """The file of this learner in the folder of the run, if there is a folder."""
    return Path(config.out) / f"{config.learner}{suffix}" if config.out else None


def read_data(config: TrainConfig) -> data.Dataset:
    """The data of a complete configuration, cut to the number of samples wanted."""
    dataset = data.load(config.data or "", config.data_dir, config.sequence or 1)
    train, test = data.limited(dataset.train, config.train_samples), data.limited(dataset.test, config.test_samples)
    return replace(dataset, train=train, test=test)


def build_network(config: TrainConfig, dataset: data.Dataset) -> PCNetwork:
    """The network of a complete configuration, drawn from its seed."""
    torch.manual_seed(config.seed)
    pc: dict[str, Any] = {"loss": config.loss, "reduction": config.reduction}
    if config.learner == "pc":
        pc |= {"rule": settings.build_rule(config), "backend": config.backend, "precision": config.precision}
    hidden, classes = config.hidden or (), len(dataset.classes)
    if config.model == "mlp":
        network: PCNetwork = nn.MLP([math.prod(dataset.shape), *hidden, classes], **pc)
    elif config.model == "cnn":
        network = nn.CNN(dataset.shape, classes, std=nn.STD if min(dataset.shape[1:]) >= 28 else None, **pc)
    elif config.model == "rnn":
        network = nn.RNN(dataset.shape[-1], hidden[0], classes, **pc)
    else:
        network = nn.LSTM(classes, hidden[0], **pc)
    return network.to(_device(config), _dtype(config))


def build_optimizer(config: TrainConfig, network: PCNetwork) -> torch.optim.Optimizer:
    """The optimizer of a complete configuration, over the parameters that are trained."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert config.lr is not None
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.lr)
    return torch.optim.SGD(parameters, lr=config.lr, momentum=config.optimizer_momentum or 0.0)


def evaluate(run: Run) -> tuple[float, float]:
    """Loss a sample, and the share of right classes, on the test set; the network is left in training mode."""
    split = run.dataset.test
    total, right, positions = 0.0, 0, 0
    run.network.eval()
    with torch.no_grad():
        for indices in split.batches(EVALUATION_BATCH):
            x, labels = _fetch(run, split, indices)
            output = run.network(x)
            total += float(per_sample(run.config.loss, output, _target(run, labels)).sum())
            right += int((output.argmax(-1) == labels).sum())
            positions += labels.numel()
    run.network.train()
    return total / len(split), right / positions


def _start(config: TrainConfig, dataset: data.Dataset) -> Run:
    network = build_network(config, dataset)
    run = Run(config, dataset, network, build_optimizer(config, network))
    if config.rule == "relaxed" or config.precision is not None:  # what that adds to the module is made at the first trace
        x, _ = _fetch(run, dataset.train, next(iter(dataset.train.batches(config.batch_size or 1))))
        network.trace(x)
        run.optimizer = build_optimizer(config, network)
    return run


def _learn(run: Run, metrics: Metrics, report: Callable[[str], None]) -> None:
    """Train from where the run stands to the last epoch or batch wanted."""
    if run.step == 0:
        _add_test(run, metrics)
        _save(run)
    while run.epoch < run.config.epochs and not _stopped(run):
        for indices in _remaining(run):
            loss = _learn_batch(run, indices)
            metrics.add((run.step, run.epoch, run.batch, "train", loss, math.nan))
            if run.step % run.config.checkpoint_every == 0:
                _save(run)
        if not _stopped(run):
            _end_epoch(run, metrics, report)


def _remaining(run: Run) -> Iterator[Tensor]:
    """The index batches that are left in this epoch; the position moves on before each is handed out."""
    batches = _plan(run)
    with _progress(run, len(batches)) as bar:
        for indices in batches[run.batch :]:
            if _enough(run):
                return
            run.batch += 1
            run.step += 1
            yield indices
            bar.update()


def _learn_batch(run: Run, indices: Tensor) -> float:
    """One update of the weights; returns the loss a sample before it."""
    x, labels = _fetch(run, run.dataset.train, indices)
    target = _target(run, labels)
    loss = _step_pc(run, x, target) if run.config.learner == "pc" else _step_backprop(run, x, target)
    if not math.isfinite(loss):
        raise Diverged(f"The loss is {loss} at batch {run.step} of the learner {run.config.learner}; choose a smaller --lr.")
    return loss / len(indices) if run.config.reduction == "sum" else loss


def _step_pc(run: Run, x: Tensor, target: Tensor) -> float:
    try:
        return float(run.network.step(x, target, run.optimizer).loss)
    except InferenceDiverged as error:
        raise Diverged(f"Batch {run.step} of the learner pc: {error} Or choose a smaller --lr or --rate.") from error


def _step_backprop(run: Run, x: Tensor, target: Tensor) -> float:
    run.optimizer.zero_grad()
    losses = per_sample(run.config.loss, run.network(x), target)
    loss = losses.sum() if run.config.reduction == "sum" else losses.mean()
    loss.backward()
    run.optimizer.step()
    return float(loss.detach())


def _end_epoch(run: Run, metrics: Metrics, report: Callable[[str], None]) -> None:
    run.epoch, run.batch = run.epoch + 1, 0
    _add_test(run, metrics)
    _save(run)
    report(_epoch_line(run, run.epoch - 1))


def _finish(run: Run, metrics: Metrics, report: Callable[[str], None]) -> tuple[float, float]:
    """The test loss and accuracy at the end.

    In the middle of an epoch the checkpoint comes before the test, so that the run can go on as if it had not stopped.
    """
    if run.batch:
        _save(run)
        _add_test(run, metrics)
        report(_epoch_line(run, run.epoch))
    return run.rows[-1][4], run.rows[-1][5]


def _epoch_line(run: Run, epoch: int) -> str:
    losses = [row[4] for row in run.rows if row[3] == "train" and row[1] == epoch]
    train_loss, (*_, test_loss, accuracy) = sum(losses) / len(losses), run.rows[-1]
    done = f"{run.config.learner:8} epoch {epoch + 1}, batch {run.step}"
    return f"{done}: training loss {train_loss:.4f}, test loss {test_loss:.4f}, test accuracy {accuracy:.2%}"


def _add_test(run: Run, metrics: Metrics) -> None:
    metrics.add((run.step, run.epoch, run.batch, "test", *evaluate(run)))


def _plan(run: Run) -> list[Tensor]:
    assert run.config.batch_size is not None
    return run.dataset.train.batches(run.config.batch_size, data.epoch_generator(run.config.seed, run.epoch))


def _enough(run: Run) -> bool:
    return run.config.batches is not None and run.step >= run.config.batches


def _stopped(run: Run) -> bool:
    """Whether the last batch wanted came before the end of its epoch."""
    return _enough(run) and run.batch < len(_plan(run))


def _fetch(run: Run, split: data.Split, indices: Tensor) -> tuple[Tensor, Tensor]:
    x, labels = split.fetch(indices)
    x = x.flatten(1) if run.config.model == "mlp" else x
    x = x.to(_dtype(run.config)) if x.is_floating_point() else x
    return x.to(run.config.device), labels.to(run.config.device)


def _target(run: Run, labels: Tensor) -> Tensor:
    if run.config.loss == "cross_entropy":
        return labels
    return one_hot(labels, len(run.dataset.classes)).to(_dtype(run.config))


def _save(run: Run) -> None:
    path = path_of(run.config, ".pt")
    if path:
        checkpoint.save(path, {"identity": _identity(run), "run": _state(run)})


def _state(run: Run) -> dict[str, Any]:
    numbers = [(*row[:3], SPLITS.index(row[3]), *row[4:]) for row in run.rows]
    return {
        "model": run.network.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "rng": checkpoint.rng_state(),
        "position": {"step": run.step, "epoch": run.epoch, "batch": run.batch},
        "rows": torch.tensor(numbers, dtype=torch.float64).reshape(-1, len(COLUMNS)),
    }


def _resume(run: Run) -> None:
    """Create the folder of the run; continue from its checkpoint if that was asked for and there is one."""
    path, description = path_of(run.config, ".pt"), path_of(run.config, ".json")
    if path is None or description is None:
        return
    if run.config.resume and path.exists():
        saved = checkpoint.load(path, run.config.device)
        checkpoint.require_same(saved["identity"], _identity(run), path)
        _restore(run, saved["run"])
    path.parent.mkdir(parents=True, exist_ok=True)
    if run.config.overwrite:
        for suffix in SUFFIXES:
            path.with_suffix(suffix).unlink(missing_ok=True)
    checkpoint.replace_file(description, lambda file: file.write(_json(_identity(run) | {"epochs": run.config.epochs})))


def _restore(run: Run, state: dict[str, Any]) -> None:
    run.network.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    checkpoint.restore_rng(state["rng"])
    run.step, run.epoch, run.batch = (state["position"][name] for name in ("step", "epoch", "batch"))
    for *position, split, loss, accuracy in state["rows"].tolist():
        step, epoch, batch = map(int, position)
        run.rows.append((step, epoch, batch, SPLITS[int(split)], loss, accuracy))


def _identity(run: Run) -> dict[str, Any]:
    sizes = {"training samples": len(run.dataset.train), "test samples": len(run.dataset.test)}
    return settings.identity(run.config) | sizes


def _write_sample(run: Run) -> str | None:
    if not run.config.sample:
        return None
    assert run.config.temperature is not None
    vocabulary = run.dataset.classes
    start = run.dataset.test.fetch(torch.tensor([0]))[0][0].to(run.config.device)
    generator = torch.Generator().manual_seed(run.config.seed)
    module: Any = run.network.module
    written = module.generate(start, run.config.sample, run.config.temperature, generator)
    text = "".join(vocabulary[i] for i in written.tolist())
    path = path_of(run.config, ".txt")
    if path:
        checkpoint.replace_file(path, lambda file: file.write(text.encode()))
    return text


def _progress(run: Run, total: int) -> Any:
    from tqdm import tqdm

    label = f"{run.config.learner} epoch {run.epoch + 1}"
    return tqdm(total=total, initial=run.batch, desc=label, unit="batch", leave=False, disable=not sys.stderr.isatty())


def _set_threads(config: TrainConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def _device(config: TrainConfig) -> torch.device:
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(f"There is no device {config.device!r}; choose cpu, cuda or cuda:<number>.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Training runs on cpu and cuda; got {config.device!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"This machine has {torch.cuda.device_count()} CUDA devices, so there is no {config.device}; try --device cpu.")
    return device


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.float64 if config.dtype == "float64" else torch.float32


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    shown = [["" if value != value else value for value in row] for row in rows]  # NaN: there was nothing to measure
    csv.writer(text, lineterminator="\n").writerows(shown)
    return text.getvalue()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
