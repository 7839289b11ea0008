"""The settings of a training run, as data: what may be chosen, what is taken otherwise, and what does not go together."""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .rules import ErrorOptimization, FixedPrediction, Incremental, Nudge, Relaxed, Rule, Strict, ZeroDivergence

RULES: dict[str, type[Rule]] = {
    "fixed": FixedPrediction,
    "strict": Strict,
    "zero": ZeroDivergence,
    "error_optimization": ErrorOptimization,
    "incremental": Incremental,
    "relaxed": Relaxed,
}
RELAXATIONS = ("over", "feedback", "derivative", "error_weights")
RULE_OPTIONS = ("steps", "rate", "solver", "order", "momentum", "sweep", "nudge", *RELAXATIONS)
LEARNERS = ("pc", "backprop")
LOSSES = ("squared_error", "cross_entropy")
REDUCTIONS = ("sum", "mean")
OPTIMIZERS = ("sgd", "adam")
DTYPES = ("float32", "float64")
IMAGES = ("digits", "mnist", "cifar10", "cifar10-jpeg")
DATA = {"mlp": IMAGES, "cnn": IMAGES, "rnn": ("names",), "lstm": ("shakespeare",)}
MODELS = tuple(DATA)

# Chosen so that backprop learns fast without diverging. The paper's CNN, RNN and LSTM sum gradients over the batch.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": {"reduction": "mean", "batch_size": 64, "lr": 0.2, "hidden": (300, 100)},
    "cnn": {"reduction": "sum", "batch_size": 64, "lr": 2e-3},
    "rnn": {"reduction": "sum", "batch_size": 1, "lr": 3e-3, "hidden": (256,)},
    "lstm": {"reduction": "sum", "batch_size": 64, "lr": 5e-5, "hidden": (1056,), "sequence": 50},
}
STEPS = {
    "fixed": {"mlp": 100, "cnn": 100, "rnn": 100, "lstm": 200},
    "strict": dict.fromkeys(MODELS, 20),
    "error_optimization": dict.fromkeys(MODELS, 20),
    "incremental": {**dict.fromkeys(MODELS, 20), "mlp": 6},
}
RATE = 0.1
RATES = {("incremental", "mlp"): 0.5}  # where RATE learns more slowly: fewer and larger steps, in half the time
TEMPERATURES = {"squared_error": 0.05, "cross_entropy": 1.0}

# A run may resume with other values of these: they say where it runs and how far, not what it computes.
FREE = ("data_dir", "epochs", "batches", "device", "threads", "out", "resume", "overwrite", "checkpoint_every", "sample", "temperature")


@dataclass(frozen=True)
class TrainConfig:
    """One run of one learner. None stands for the default of the model, which `complete` fills in.

    Attributes:
        learner: "pc" or "backprop"; the options of the rule and `backend` belong to "pc" alone.
        nudge: beta, or ("centered", beta), as in rules.Strict.
        over, feedback, derivative, error_weights: of the rule "relaxed": the rule that it relaxes, and as in rules.Relaxed.
        precision: of every hidden vertex, a number or "learned", as in network.PCNetwork.
        batches: stop after so many batches, wherever in an epoch that is.
        train_samples, test_samples: use so many, evenly spaced over the data.
        hidden: the widths of the hidden layers (mlp), or the one width (rnn, lstm).
        out: the folder for metrics, checkpoints and text; None writes nothing.
        checkpoint_every: batches between checkpoints; there is one at the end of each epoch besides.
        sample: characters of text to write after training (lstm).
    """

    model: str
    data: str | None = None
    data_dir: str | None = None
    learner: str = "pc"
    rule: str | None = None
    steps: int | None = None
    rate: float | None = None
    solver: str | None = None
    order: str | None = None
    momentum: float | None = None
    sweep: str | None = None
    nudge: Nudge | None = None
    over: str | None = None
    feedback: str | None = None
    derivative: bool | None = None
    error_weights: str | None = None
    precision: float | str | None = None
    backend: str | None = None
    loss: str = "squared_error"
    reduction: str | None = None
    hidden: tuple[int, ...] | None = None
    sequence: int | None = None
    epochs: int = 1
    batches: int | None = None
    batch_size: int | None = None
    train_samples: int | None = None
    test_samples: int | None = None
    optimizer: str = "sgd"
    lr: float | None = None
    optimizer_momentum: float | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    checkpoint_every: int = 500
    sample: int | None = None
    temperature: float | None = None


def complete(config: TrainConfig) -> TrainConfig:
    """The settings with every default filled in.

    Raises:
        ValueError: a value out of its range, or an option that this model, learner or rule does not have.
    """
    _require_choices(config)
    _require_ranges(config)
    _require_belonging(config)
    filled = {name: value for name, value in DEFAULTS[config.model].items() if getattr(config, name) is None}
    filled["data"] = config.data or DATA[config.model][0]
    if config.sample and config.temperature is None:
        filled["temperature"] = TEMPERATURES[config.loss]
    if config.learner == "pc":
        filled |= _rule_defaults(config)
    config = replace(config, **filled)
    if config.learner == "pc":
        build_rule(config)  # checks its options
    return config


def build_rule(config: TrainConfig) -> Rule:
    """The rule of a complete configuration."""
    given = {name: getattr(config, name) for name in RULE_OPTIONS if getattr(config, name) is not None}
    own = {name: given.pop(name) for name in RELAXATIONS if name in given}
    own.pop("over", None)
    rule = RULES[_relaxed_rule(config)](**given)
    return Relaxed(rule, **own) if config.rule == "relaxed" else rule


def identity(config: TrainConfig) -> dict[str, Any]:
    """What two runs must share for one to continue the other, as plain data."""
    settings = asdict(config)
    settings["hidden"] = list(config.hidden or ())
    return {name: value for name, value in settings.items() if name not in FREE}


def _relaxed_rule(config: TrainConfig) -> str:
    """The name of the rule, or of the rule that it relaxes."""
    return (config.over if config.rule == "relaxed" else config.rule) or "fixed"


def _rule_defaults(config: TrainConfig) -> dict[str, Any]:
    rule = _relaxed_rule(config)
    options = _options_of(rule) | (set(RELAXATIONS) if config.rule == "relaxed" else set())
    _refuse_foreign_options(config, config.rule or rule, options)
    defaults: dict[str, Any] = {"rule": config.rule or rule, "backend": config.backend or "auto"}
    if config.rule == "relaxed":
        defaults["over"] = rule
    if "steps" in options:
        defaults["steps"] = STEPS[rule][config.model] if config.steps is None else config.steps
        defaults["rate"] = RATES.get((rule, config.model), RATE) if config.rate is None else config.rate
    if rule == "incremental" and config.lr is None:
        defaults["lr"] = DEFAULTS[config.model]["lr"] / max(1, defaults["steps"])  # the optimizer takes so many steps a batch
    if "order" in options and config.model in ("rnn", "lstm"):
        defaults["order"] = config.order or "nested"
    return defaults


def _options_of(rule: str) -> set[str]:
    return {option.name for option in fields(RULES[rule])}


def _refuse_foreign_options(config: TrainConfig, rule: str, options: set[str]) -> None:
    for name in RULE_OPTIONS:
        if name not in options and getattr(config, name) is not None:
            owners = " and ".join(other for other in RULES if name in _options_of(other) or (other == "relaxed" and name in RELAXATIONS))
            raise ValueError(f"--{_flag(name)} is not an option of the rule {rule}, but of {owners}; drop it, or choose such a rule.")


def _require_choices(config: TrainConfig) -> None:
    _choose("model", config.model, MODELS)
    _choose("learner", config.learner, LEARNERS)
    _choose("loss", config.loss, LOSSES)
    _choose("optimizer", config.optimizer, OPTIMIZERS)
    _choose("dtype", config.dtype, DTYPES)
    for name, choices in (("rule", tuple(RULES)), ("over", tuple(RULES)[:-1]), ("reduction", REDUCTIONS)):
        if getattr(config, name) is not None:
            _choose(name, getattr(config, name), choices)
    if config.data is not None and config.data not in DATA[config.model]:
        known = ", ".join(DATA[config.model])
        raise ValueError(f"The model {config.model} does not learn from the data {config.data}; choose from {known}.")


def _require_ranges(config: TrainConfig) -> None:
    for name in ("batches", "batch_size", "train_samples", "test_samples", "sequence", "threads", "epochs", "checkpoint_every", "sample"):
        _require_at_least(name, getattr(config, name), 1)
    _require_at_least("seed", config.seed, 0)
    for name in ("lr", "temperature"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{_flag(name)} must be greater than 0 and finite; got {value}.")
    if config.optimizer_momentum is not None and not 0 <= config.optimizer_momentum < 1:
        raise ValueError(f"--optimizer-momentum must be at least 0 and below 1; got {config.optimizer_momentum}.")


def _require_belonging(config: TrainConfig) -> None:
    if config.learner == "backprop":
        _refuse(config, ("rule", *RULE_OPTIONS, "precision", "backend"), "the learner backprop, but of pc")
    if config.model != "lstm":
        _refuse(config, ("sequence", "sample", "temperature"), f"the model {config.model}, but of lstm")
    if config.model == "cnn":
        _refuse(config, ("hidden",), "the model cnn, whose layers are those of the paper")
    if config.order == "nested" and config.model in ("mlp", "cnn"):
        raise ValueError(f"--order nested goes by time steps, and the model {config.model} has none; drop it.")
    if config.model == "rnn" and (config.error_weights not in (None, "identity") or isinstance(config.precision, str)):
        raise ValueError("The names have no common length, and each time step has error weights and precisions of its own; drop them.")
    if config.optimizer != "sgd":
        _refuse(config, ("optimizer_momentum",), f"the optimizer {config.optimizer}, but of sgd")
    if config.hidden is not None and (min(config.hidden, default=0) < 1 or (config.model != "mlp" and len(config.hidden) != 1)):
        wanted = "one width or more" if config.model == "mlp" else "one width"
        raise ValueError(f"--hidden takes {wanted}, each at least 1; got {list(config.hidden)}.")
    if config.temperature is not None and not config.sample:
        raise ValueError("--temperature is for sampled text: add --sample with the number of characters.")
    if config.resume and config.overwrite:
        raise ValueError("--resume continues a run and --overwrite discards it: give one of them.")
    if (config.resume or config.overwrite) and config.out is None:
        raise ValueError(f"--{'resume' if config.resume else 'overwrite'} needs the folder of the run: add --out.")
    if config.out is not None and Path(config.out).exists() and not Path(config.out).is_dir():
        raise ValueError(f"--out must be a folder, and {config.out} is a file; choose another.")


def _refuse(config: TrainConfig, names: tuple[str, ...], owner: str) -> None:
    for name in names:
        if getattr(config, name) is not None:
            raise ValueError(f"--{_flag(name)} is not an option of {owner}; drop it.")


def _choose(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"There is no {name} {value!r}; choose from {', '.join(choices)}.")


def _require_at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"--{_flag(name)} must be at least {least}; got {value}.")


def _flag(name: str) -> str:
    return "no-derivative" if name == "derivative" else name.replace("_", "-")
