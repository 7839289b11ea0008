"""Rao & Ballard 1999: a two-level generative model of image patches, learned without labels by predictive coding.

    python examples/rao_ballard.py [--data photographs | mnist] [--epochs N] [--out FOLDER]

Three patches of 16 x 16 pixels lie 5 pixels apart in a window of 16 x 26. Level 1 explains each by 32 causes, I = U r + noise; level 2
explains these 3 x 32 by 128 causes of its own, r = U_h r_h + noise. The image is clamped at the output and the top input r_h is free:
inference finds r and r_h, learning then moves U and U_h. docs/rao_ballard.md tells the story, and where this differs from the paper.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pckernels as pck
from pckernels import data, plot

SIDE, OFFSET, MODULES = 16, 5, 3
WINDOW = SIDE, SIDE + (MODULES - 1) * OFFSET
CAUSES, TOP = 32, 128
SIGMA2, SIGMA2_TD = 1.0, 10.0  # noise of the image, and of r about its top-down prediction
ALPHA, ALPHA_TOP = 2.0, 0.5  # priors: alpha log(1 + r^2) on r, alpha r_h^2 on r_h
STEPS, SETTLING = 30, 200  # of inference: in learning, and to near equilibrium
WINDOWS = 2375
BAR = 2  # pixels


class TwoLevels(nn.Module):
    """r_h (B, 128) -> the three patches (B, 3, 256), and r itself (B, 3, 32), so that the loss can hold its prior."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.top = nn.Linear(TOP, MODULES * CAUSES, bias=False)
        self.bottom = nn.Linear(CAUSES, SIDE * SIDE, bias=False)
        with torch.no_grad():
            for layer in (self.top, self.bottom):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        self.normalise()

    def normalise(self) -> None:
        """Make every cause's column of U and U_h as long as 1: otherwise they grow until the priors cost nothing."""
        with torch.no_grad():
            for layer in (self.top, self.bottom):
                layer.weight /= layer.weight.norm(dim=0)

    def forward(self, r_h: Tensor) -> tuple[Tensor, Tensor]:
        r = self.top(r_h).view(-1, MODULES, CAUSES)
        return self.bottom(r), r


def cost(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """(B,): the paper's E but for ||r - r_td||^2 / sigma_td^2, times sigma_td^2 / 2: so F, with its 1/2 ||r - r_td||^2, is all of it."""
    (image, r), (wanted, _) = output, target
    squares = (wanted - image).square().sum((1, 2)) / SIGMA2
    return SIGMA2_TD / 2 * (squares + ALPHA * torch.log1p(r.square()).sum((1, 2)))


@dataclass
class Model:
    """The network and how it infers: with what comes from level 2, or without."""

    network: pck.PCNetwork
    module: TwoLevels

    @classmethod
    def new(cls, seed: int = 0) -> "Model":
        module = TwoLevels(torch.Generator().manual_seed(seed))
        return cls(pck.PCNetwork(module, pck.Strict(STEPS, 0.01, momentum=0.8), loss=cost), module)

    def options(self, patches: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, object]]:
        start, nothing = torch.zeros(len(patches), TOP), torch.zeros(len(patches), MODULES, CAUSES)
        return start, (patches, nothing), {"free": {"r_h": pck.Free(precision=SIGMA2_TD * ALPHA_TOP)}}

    def learn(self, patches: Tensor, optimizer: torch.optim.Optimizer) -> pck.Inference:
        start, target, options = self.options(patches)
        inference = self.network.step(start, target, optimizer, **options)
        self.module.normalise()
        return inference

    def infer(self, patches: Tensor, steps: int | None = None, feedback: bool = True) -> pck.Inference:
        """To near equilibrium. Without feedback r_h stays clamped at 0, and so does the prediction of r."""
        start, target, options = self.options(patches)
        self.network.rule = pck.Strict(SETTLING if steps is None else steps, 0.01, momentum=0.8)
        return self.network.infer(start, target=target, **(options if feedback else {}))


def photographs() -> list[Tensor]:
    """The two sample photographs of scikit-learn, in grey, (H, W)."""
    from sklearn.datasets import load_sample_images

    return [torch.tensor(image).float().mean(-1) for image in load_sample_images().images]


def digits(count: int = 2000) -> list[Tensor]:
    """MNIST digits, (28, 28)."""
    pixels, _ = data.load("mnist").train.fetch(torch.arange(count))
    return list(pixels[:, 0])


def filtered(image: Tensor) -> Tensor:
    """A difference of Gaussians, as of the retina and LGN, (H, W)."""
    return _blurred(image, 1.0) - _blurred(image, 3.0)


def _blurred(image: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma + 1)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    kernel = kernel / kernel.sum()
    padded = F.pad(image[None, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[0, 0]


def windows(images: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """(count, 16, 26): random windows of the images that are not blank, with a mean square of 1 over all."""
    images = [filtered(image) for image in images]
    found = []
    while len(found) < count:
        image = images[int(torch.randint(len(images), (1,), generator=generator))]
        y, x = (int(torch.randint(size - side + 1, (1,), generator=generator)) for size, side in zip(image.shape, WINDOW, strict=True))
        window = image[y : y + WINDOW[0], x : x + WINDOW[1]]
        if window.std() > 0.2 * image.std():
            found.append(window - window.mean())
    stacked = torch.stack(found)
    return stacked / stacked.square().mean().sqrt()


def patches(windows: Tensor) -> Tensor:
    """(B, 16, 26) -> (B, 3, 256), each patch under a Gaussian window."""
    line = torch.exp(-0.5 * ((torch.arange(SIDE) - (SIDE - 1) / 2) / 4.8).square())
    cut = windows.unfold(2, SIDE, OFFSET).permute(0, 2, 1, 3)
    return (cut * line[:, None] * line).flatten(2)


def train(model: Model, data: Tensor, epochs: int, seed: int = 0) -> list[float]:
    """Learn U and U_h; the mean energy of a window at the end of inference, epoch by epoch."""
    model.network.rule = pck.Strict(STEPS, 0.01, momentum=0.8)
    optimizer = torch.optim.Adam(model.module.parameters(), lr=0.006)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / max(1, epochs)))
    generator, energies = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        total = sum(
            float(model.learn(data[rows], optimizer).energy[-1]) for rows in torch.randperm(len(data), generator=generator).split(64)
        )
        energies.append(total / len(data))
        schedule.step()
    return energies


def reconstruction(model: Model, data: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """What level 1 makes of the patches, what level 2 alone makes of them, and the share of their power that each misses."""
    inference = model.infer(data)
    one = model.module.bottom(inference.values["top"]).detach()
    two = model.module(inference.values["r_h"])[0].detach()
    return (
        one,
        two,
        {name: float((data - made).square().sum() / data.square().sum()) for name, made in (("level 1", one), ("level 2", two))},
    )


def bars(lengths: list[int]) -> Tensor:
    """(lengths, 16, 26): horizontal bars about the centre, filtered as the photographs are, of one contrast."""
    images = torch.zeros(len(lengths), *(side + 40 for side in WINDOW))
    for image, length in zip(images, lengths, strict=True):
        y, x = (side // 2 for side in image.shape)
        image[y - BAR // 2 : y + BAR // 2, x - length // 2 : x - length // 2 + length] = 1.0
    found = torch.stack([filtered(image) for image in images])[:, 20:-20, 20:-20]
    return found / found[-1].square().mean().sqrt()


def end_stopping(model: Model, lengths: list[int]) -> tuple[list[float], list[float]]:
    """Response of the middle module's error units, ||r - r_td||, to bars of growing length: with feedback from level 2, and without."""
    shown = patches(bars(lengths))
    found = [model.infer(shown, feedback=feedback).errors["top"] for feedback in (True, False)]
    with_feedback, without = (errors.view(-1, MODULES, CAUSES)[:, MODULES // 2].norm(dim=1).tolist() for errors in found)
    return with_feedback, without


def draw(model: Model, shown: Tensor, curves: tuple[list[float], list[float]], lengths: list[int], folder: Path, name: str) -> None:
    """Three figures: receptive fields, reconstructions, and responses to bars."""
    fields = [column.view(SIDE, SIDE).detach().numpy() for column in model.module.bottom.weight.T]
    rows = {f"{k + 1} to {k + 8}": fields[k : k + 8] for k in range(0, CAUSES, 8)}
    plot.image_rows(folder / f"rao-ballard-fields-{name}.png", rows, f"receptive fields: the columns of U, {name}", signed=True)
    one, two, _ = reconstruction(model, shown)
    middle = {
        what: [patch[MODULES // 2].view(SIDE, SIDE).numpy() for patch in made]
        for what, made in (("patch", shown), ("level 1", one), ("level 2", two))
    }
    plot.image_rows(
        folder / f"rao-ballard-reconstruction-{name}.png", middle, f"patches not seen before, and what each level makes of them, {name}"
    )
    labelled = dict(zip(("with feedback from level 2", "without"), curves, strict=True))
    labels = "length of the bar, pixels", "response of error units, share of the largest"
    plot.lines(folder / f"rao-ballard-bars-{name}.png", lengths, labelled, labels, f"a bar through the middle patch, {name}")


def relative(curve: list[float]) -> list[float]:
    return [value / max(curve) for value in curve]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("photographs", "mnist"), default="photographs")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args(arguments)
    images = photographs() if args.data == "photographs" else digits()
    generator = torch.Generator().manual_seed(0)
    learning, unseen = (patches(windows(images, count, generator)) for count in (args.windows, min(200, args.windows)))
    model = Model.new()
    energies = train(model, learning, args.epochs)
    print(f"energy of a window at the end of inference: {energies[0]:.1f} in the first epoch, {energies[-1]:.1f} in the last")
    *_, missed = reconstruction(model, unseen)
    print("share of the power of unseen patches that is missed: " + ", ".join(f"{name} {share:.1%}" for name, share in missed.items()))
    lengths = list(range(2, WINDOW[1] + 1, 2))
    curves = tuple(map(relative, end_stopping(model, lengths)))
    for name, curve in zip(("with feedback", "without"), curves, strict=True):
        print(f"response to a bar {name}: largest at {lengths[curve.index(1.0)]} pixels, at {lengths[-1]} pixels {curve[-1]:.0%} of that")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(model, unseen[:8], curves, lengths, args.out, args.data)


if __name__ == "__main__":
    main()
