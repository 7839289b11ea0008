"""`pckernels train`: its arguments, what it prints and the files that it leaves.

`train` in training.py does the work; this file only turns the command line into settings and the results into text.
"""

import argparse
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from . import plot, settings
from .jsonfile import add_json_argument, write_json
from .rules import Nudge
from .settings import TrainConfig, complete
from .training import Diverged, Result, path_of, read_data, require_free, train

__all__ = ["Result", "TrainConfig", "add_arguments", "run", "train"]

DATA = tuple(dict.fromkeys(name for names in settings.DATA.values() for name in names))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `pckernels train` on `parser`."""
    parser.add_argument("model", choices=settings.MODELS, help="a perceptron, or the CNN, RNN or LSTM of Millidge et al. 2020")
    parser.add_argument("--learner", choices=(*settings.LEARNERS, "both"), default="pc", help="both: the two from one seed (default: pc)")
    _add_data(parser)
    _add_rule(parser)
    _add_network(parser)
    _add_course(parser)
    _add_output(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out `pckernels train`: 0 done, 1 the loss was no longer finite; other mistakes are raised, as sentences."""
    try:
        _run(args)
    except Diverged as error:
        print(f"pckernels train: {error}", file=sys.stderr)
        return 1
    return 0


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data", choices=DATA, help="default: digits (mlp, cnn), names (rnn), shakespeare (lstm)")
    group.add_argument("--data-dir", metavar="DIR", help="the folder of the data sets; default: PCKERNELS_DATA; digits need none")
    group.add_argument("--train-samples", type=int, metavar="N", help="train on N samples, evenly spaced over the data")
    group.add_argument("--test-samples", type=int, metavar="N", help="test on N samples, evenly spaced over the data")
    group.add_argument("--sequence", type=int, metavar="N", help="characters in a sequence (lstm; default: 50)")


def _add_rule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("predictive coding")
    group.add_argument("--rule", choices=tuple(settings.RULES), help="default: fixed, the paper's")
    group.add_argument(
        "--steps", type=int, metavar="T", help="inference steps (default: fixed 100, lstm 200; incremental mlp 6; others 20)"
    )
    group.add_argument("--rate", type=float, help="of inference (default: 0.1; incremental mlp 0.5)")
    group.add_argument("--solver", help="closed_form or iterate (fixed), sweep or iterate (zero)")
    group.add_argument("--order", choices=("global", "nested"), help="of fixed; default: nested for rnn and lstm")
    group.add_argument("--momentum", type=float, help="of values or errors (all but fixed and zero)")
    group.add_argument("--sweep", choices=("jacobi", "top_down", "red_black"), help="of all but fixed and zero; default: jacobi")
    group.add_argument("--nudge", nargs="+", metavar="BETA", help="of strict: BETA or centered BETA, how hard the loss pulls")
    group.add_argument("--over", choices=tuple(settings.RULES)[:-1], help="of relaxed: the rule that it relaxes; default: fixed")
    group.add_argument("--feedback", choices=("symmetric", "learned", "random"), help="of relaxed: backward weights (default: symmetric)")
    group.add_argument("--no-derivative", dest="derivative", action="store_const", const=False, help="of relaxed: no f' on the way back")
    group.add_argument("--error-weights", choices=("identity", "learned", "random"), help="of relaxed (default: identity)")
    group.add_argument("--precision", metavar="PI", help="of all hidden vertices (all rules but zero): a number, or learned")
    group.add_argument("--backend", help="default: auto; `pckernels info` lists them")


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network and loss")
    group.add_argument("--hidden", type=int, nargs="+", metavar="N", help="widths (mlp: 300 100) or width (rnn: 256, lstm: 1056)")
    group.add_argument("--loss", choices=settings.LOSSES, default="squared_error", help="default: squared_error, on one-hot targets")
    group.add_argument("--reduction", choices=settings.REDUCTIONS, help="of gradients over the batch; default: mean (mlp), sum (others)")
    group.add_argument("--dtype", choices=settings.DTYPES, default="float32", help="default: float32")
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads")


def _add_course(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("course of training")
    group.add_argument("--epochs", type=int, default=1, metavar="N", help="default: 1")
    group.add_argument("--batches", type=int, metavar="N", help="stop after N batches in all")
    group.add_argument("--batch-size", type=int, metavar="B", help="default: 64; rnn 1")
    group.add_argument("--optimizer", choices=settings.OPTIMIZERS, default="sgd", help="default: sgd")
    group.add_argument("--optimizer-momentum", type=float, metavar="M", help="of sgd (default: 0)")
    rates = ", ".join(f"{name} {defaults['lr']:g}" for name, defaults in settings.DEFAULTS.items())
    group.add_argument("--lr", type=float, help=f"learning rate (default: {rates}; incremental: divided by its steps)")
    group.add_argument("--seed", type=int, default=0, help="default: 0")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", help="write metrics, curves, settings and checkpoints here")
    group.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    group.add_argument("--overwrite", action="store_true", help="discard the run in --out, if there is one")
    group.add_argument("--checkpoint-every", type=int, default=500, metavar="N", help="batches between checkpoints (default: 500)")
    group.add_argument("--sample", type=int, metavar="N", help="write N characters of text after training (lstm)")
    group.add_argument("--temperature", type=float, help="of the text (default: 0.05 for squared_error, 1 for cross_entropy)")


def _run(args: argparse.Namespace) -> None:
    configs = configurations(args)
    for config in configs:
        require_free(config)
    dataset = read_data(configs[0])
    samples = f"{len(dataset.train):,} training and {len(dataset.test):,} test samples."
    print(f"{configs[0].model} on {dataset.name}: {samples} {dataset.note}".strip())
    results = [train(config, dataset) for config in configs]
    _print_results(results)
    _write(args, results, dataset.note)


def configurations(args: argparse.Namespace) -> list[TrainConfig]:
    """The complete settings of each learner asked for, in the order in which they are trained."""
    chosen = {option.name: getattr(args, option.name) for option in fields(TrainConfig)}
    chosen["hidden"] = tuple(args.hidden) if args.hidden else None
    chosen["nudge"] = _nudge(args.nudge) if args.nudge else None
    chosen["precision"] = _precision(args.precision) if args.precision else None
    if args.learner != "both":
        return [complete(TrainConfig(**chosen))]
    pc = TrainConfig(**{**chosen, "learner": "pc"})
    foreign: dict[str, Any] = dict.fromkeys(("rule", *settings.RULE_OPTIONS, "precision", "backend"))
    return [complete(pc), complete(replace(pc, learner="backprop", **foreign))]


def _nudge(words: list[str]) -> Nudge:
    """BETA, or centered BETA."""
    *kind, beta = words
    try:
        number = float(beta)
    except ValueError:
        kind = ["not a number"]
    if kind not in ([], ["centered"]):
        raise ValueError(f"--nudge takes a number, or the word centered and a number; got {' '.join(words)}.")
    return ("centered", number) if kind else number


def _precision(word: str) -> float | str:
    """A number, or learned."""
    try:
        return float(word)
    except ValueError:
        return word  # PCNetwork says what it may be


def _print_results(results: list[Result]) -> None:
    for result in results:
        numbers = f"test accuracy {result.accuracy:.2%}, test loss {result.loss:.6g}"
        print(f"{result.config.learner}: {numbers}, {result.rows[-1][0]} batches, {result.seconds:.1f} s in this process")
        if result.text is not None:
            print(f"--- text by {result.config.learner} ---\n{result.text}\n---")


def _write(args: argparse.Namespace, results: list[Result], note: str) -> None:
    title = f"{results[0].config.model} on {results[0].config.data}"
    if args.out:
        tables = {result.config.learner: path for result in results if (path := path_of(result.config, ".csv"))}
        curves = Path(args.out) / "curves.png"
        plot.curves(tables, curves, title)
        print(f"Curves: {curves}")
    if args.json:
        write_json(args.json, {"note": note, "learners": [_summary(result) for result in results]})


def _summary(result: Result) -> dict[str, Any]:
    tests = [{"step": row[0], "loss": row[4], "accuracy": row[5]} for row in result.rows if row[3] == "test"]
    numbers = {"test_loss": result.loss, "test_accuracy": result.accuracy, "seconds": result.seconds, "tests": tests}
    return {"learner": result.config.learner, **numbers, "text": result.text, "settings": asdict(result.config)}
