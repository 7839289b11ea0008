"""What relaxing the constraints of backprop costs: MNIST, a perceptron 784-300-100-10, one short pass over part of the data.

For each way to relax a rule the learning rate is the one with the lowest training loss on seed 0; test accuracies are of seeds 1 to 3.
MNIST is read from --data-dir, or PCKERNELS_DATA.

    python examples/relaxed.py --json docs/relaxed.json
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from pckernels.jsonfile import add_json_argument, write_json
from pckernels.settings import TrainConfig
from pckernels.train import train
from pckernels.training import Diverged

LEARNING_RATES = (0.2, 0.05, 0.01, 2e-3, 4e-4)
LAST = 20  # batches whose mean loss chooses the learning rate
RELAXATIONS: dict[str, dict[str, Any]] = {
    "the rule itself": {},
    "learned feedback": {"feedback": "learned"},
    "random feedback": {"feedback": "random"},
    "no f'": {"derivative": False},
    "learned feedback, no f'": {"feedback": "learned", "derivative": False},
    "learned error weights": {"error_weights": "learned"},
    "random error weights": {"error_weights": "random"},
    "all three learned": {"feedback": "learned", "derivative": False, "error_weights": "learned"},
}


def accuracy_and_loss(
    rule: str, relaxation: dict[str, Any], learning_rate: float, seed: int, args: argparse.Namespace
) -> tuple[float, float]:
    """Test accuracy, and the mean of the last training losses; a run that diverges has none."""
    relaxed = {"rule": "relaxed", "over": rule, **relaxation} if relaxation else {"rule": rule}
    sizes = {"train_samples": args.train_samples, "test_samples": args.test_samples, "data_dir": args.data_dir}
    config = TrainConfig("mlp", data="mnist", seed=seed, lr=learning_rate, **relaxed, **sizes)
    try:
        result = train(config, report=lambda line: None)
    except Diverged:
        return math.nan, math.inf
    losses = [row[4] for row in result.rows if row[3] == "train"][-LAST:]
    return result.accuracy, sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=["zero", "strict"])
    parser.add_argument("--relaxations", nargs="+", choices=list(RELAXATIONS), default=list(RELAXATIONS))
    parser.add_argument("--train-samples", type=int, default=6400)
    parser.add_argument("--test-samples", type=int, default=2000)
    parser.add_argument("--data-dir")
    add_json_argument(parser)
    args = parser.parse_args()
    rows = []
    for rule in args.rules:
        for name in args.relaxations:
            relaxation = RELAXATIONS[name]
            found = {rate: accuracy_and_loss(rule, relaxation, rate, 0, args)[1] for rate in LEARNING_RATES}
            rate = min(found, key=found.__getitem__)
            accuracies = [accuracy_and_loss(rule, relaxation, rate, seed, args)[0] for seed in (1, 2, 3)]
            rows.append(
                {"rule": rule, "relaxed": name, "lr": rate, "diverged": [k for k in found if found[k] == math.inf], "accuracy": accuracies}
            )
            print(
                f"{rule:>7} | {name:<24} | lr {rate:<6g} | {' '.join(f'{100 * a:.1f}' for a in accuracies)} | {rows[-1]['diverged']}",
                flush=True,
            )
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
