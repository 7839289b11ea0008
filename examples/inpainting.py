"""In-painting and associative memory on digits, by predictive coding with part of an image clamped.

    python examples/inpainting.py [--epochs N] [--out FOLDER]

A generative model, latent -> hidden -> image, learns without labels: the image is clamped at the output, the latent input is free. Then
images that it has not seen are shown in part (`target_mask`), the latent relaxes, and what the model predicts for the rest is the
in-painting. The same with few stored images is an associative memory: part of a stored image recalls all of it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pckernels as pck
from pckernels import data, plot
from pckernels.jsonfile import write_json

LATENT, HIDDEN = 16, 64
STORED = 20
SHOWN = 8
WEIGHT_DECAY = 1e-3  # without it weights grow, latents shrink, and the prior says nothing
PRIOR = pck.Free(precision=1.0)  # of the latent: Gaussian about 0
LEARNING, RECALL = pck.Strict(20, 0.1, momentum=0.6), pck.Strict(200, 0.1, momentum=0.9)


@dataclass(frozen=True)
class Recall:
    """Images, which of their pixels were shown, what came back, and the mean squared error over the hidden pixels.

    blind: that error for the mean image of training in place of what came back.
    """

    name: str
    images: Tensor
    mask: Tensor
    recalled: Tensor
    error: float
    blind: float


def digits() -> tuple[Tensor, Tensor]:
    """Training and test images, (N, 64), pixels in [-1, 1]."""
    source = data.digits()
    return tuple(split.fetch(torch.arange(len(split)))[0].flatten(1) for split in (source.train, source.test))  # type: ignore[return-value]


def learned(images: Tensor, epochs: int, batch: int = 64, seed: int = 0) -> pck.PCNetwork:
    """A generative model of the images."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, images.shape[1]))
    pcn, optimizer = pck.PCNetwork(module, LEARNING), torch.optim.Adam(module.parameters(), 5e-3, weight_decay=WEIGHT_DECAY)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            pcn.step(torch.zeros(len(rows), LATENT), images[rows], optimizer, free={"input": PRIOR})
    return pcn


def recall(name: str, pcn: pck.PCNetwork, images: Tensor, mask: Tensor, mean: Tensor) -> Recall:
    """Show the pixels where `mask` is true; the rest is as the model predicts it once the latent has relaxed."""
    pcn.rule = RECALL
    inference = pcn.infer(torch.zeros(len(images), LATENT), images, free={"input": PRIOR}, target_mask=mask)
    recalled = inference.values["output"]
    error, blind = (float((images - made)[:, ~mask].square().mean()) for made in (recalled, mean))
    return Recall(name, images, mask, recalled, error, blind)


def masks() -> dict[str, Tensor]:
    """Which of the 8 x 8 pixels are shown."""
    upper, left = torch.zeros(8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)
    upper[:4], left[:, :4] = True, True
    return {"upper half": upper.flatten(), "left half": left.flatten(), "one in two": torch.arange(64) % 2 == torch.arange(64) // 8 % 2}


def run(epochs: int, memory_epochs: int, count: int | None = None) -> list[Recall]:
    """In-painting of test images, then recall of stored ones."""
    train, test = digits()
    train, mean = train[:count], train[:count].mean(0)
    generative = learned(train, epochs)
    found = [recall(f"unseen, {name}", generative, test, mask, mean) for name, mask in masks().items()]
    stored = train[:STORED]
    memory = learned(stored, memory_epochs, batch=STORED)
    return [*found, recall("stored, upper half", memory, stored, masks()["upper half"], stored.mean(0))]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="over the training digits")
    parser.add_argument("--memory-epochs", type=int, default=300, help=f"over the {STORED} stored digits")
    parser.add_argument("--samples", type=int, help="train on so many digits alone")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args(arguments)
    found = run(args.epochs, args.memory_epochs, args.samples)
    for each in found:
        print(f"{each.name:20} mean squared error of hidden pixels {each.error:.4f}; of the mean image {each.blind:.4f}")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "inpainting.json", [{"name": each.name, "error": each.error, "mean image": each.blind} for each in found])
    plot.image_rows(args.out / "inpainting.png", rows(found), "digits: whole, as shown (the rest grey), and as recalled")


def rows(found: list[Recall]) -> dict[str, list[Any]]:
    """Name of each row of the figure -> its pictures."""
    pictures: dict[str, list[Any]] = {}
    for each in found:
        first = slice(0, SHOWN)
        shown = torch.where(each.mask, each.images, 0.0)
        for what, images in (("whole", each.images), ("shown", shown), ("recalled", each.recalled.clamp(-1, 1))):
            pictures[f"{each.name}: {what}"] = [image.view(8, 8).numpy() for image in images[first]]
    return pictures


if __name__ == "__main__":
    main()
