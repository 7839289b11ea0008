"""Data sets for training: digits, MNIST, CIFAR-10, surnames of 18 languages, and the plays of Shakespeare.

Each is read from a folder, but for the digits, which come with scikit-learn. The batches of an epoch are a function of
the seed, the epoch and the batch size alone, so that a run that resumes sees what the unbroken run would have seen.
"""

import gzip
import importlib
import io
import os
import string
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import Unsupported

LETTERS = string.ascii_letters + " .,;'"  # 57
TEST_NAMES = 10  # every tenth name of a language is for testing
TEST_DIGITS = 5
TRAIN_TEXT = 0.9  # the first nine tenths of a text are for training


class Split(Protocol):
    """One part of a data set, read by index."""

    def __len__(self) -> int: ...

    def batches(self, size: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """The index batches of one epoch; in a fixed order without a generator."""

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and int64 class labels of the given samples, batch first."""


@dataclass(frozen=True)
class Dataset:
    """Both parts of a data set, and what a network needs to know of it.

    Attributes:
        kind: "images", "names" or "text".
        shape: of one input: (C, H, W) for images, (S, letters) with S varying for names, (S,) for text.
        classes: what a label stands for, in the order of the labels.
        note: what must be said beside any result obtained with it; empty for most.
    """

    name: str
    kind: str
    train: Split
    test: Split
    shape: tuple[int, ...]
    classes: list[str]
    note: str = ""


@dataclass(frozen=True)
class Images:
    """Pixels in [-1, 1], (N, C, H, W) float32, and labels (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, generator: torch.Generator | None = None) -> list[Tensor]:
        return list(_order(len(self), generator).split(size))

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.pixels[indices], self.labels[indices]


@dataclass(frozen=True)
class Names:
    """Names as letter indices, with the language of each; a batch holds names of one length, so that none is padded."""

    letters: list[Tensor]
    labels: Tensor
    _lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_lengths", torch.tensor([len(name) for name in self.letters]))

    def __len__(self) -> int:
        return len(self.letters)

    def batches(self, size: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """With a generator: as many draws as there are names, each of a random language and a random name of it."""
        drawn = torch.arange(len(self)) if generator is None else self._draw(generator)
        batches = [batch for length in self._lengths[drawn].unique() for batch in drawn[self._lengths[drawn] == length].split(size)]
        return [batches[i] for i in _order(len(batches), generator).tolist()]

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """One-hot letters (B, S, 57) float32 and labels (B,)."""
        letters = torch.stack([self.letters[i] for i in indices.tolist()])
        return torch.nn.functional.one_hot(letters, len(LETTERS)).float(), self.labels[indices]

    def _draw(self, generator: torch.Generator) -> Tensor:
        counts = torch.bincount(self.labels).double()
        return torch.multinomial(1 / counts[self.labels], len(self), replacement=True, generator=generator)


@dataclass(frozen=True)
class Text:
    """Characters (N,) int64, cut into sequences; the labels of a sequence are its characters moved on by one."""

    characters: Tensor
    sequence: int

    def __len__(self) -> int:
        return (len(self.characters) - 1) // self.sequence

    def batches(self, size: int, generator: torch.Generator | None = None) -> list[Tensor]:
        return list(_order(len(self), generator).split(size))

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Characters (B, S) and the next characters (B, S)."""
        at = indices[:, None] * self.sequence + torch.arange(self.sequence)
        return self.characters[at], self.characters[at + 1]


@dataclass(frozen=True)
class Part:
    """Some samples of a split, evenly spaced."""

    whole: Split
    chosen: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def batches(self, size: int, generator: torch.Generator | None = None) -> list[Tensor]:
        return list(_order(len(self), generator).split(size))

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.whole.fetch(self.chosen[indices])


def load(name: str, data_dir: str | Path | None = None, sequence: int = 50) -> Dataset:
    """Read a data set.

    Args:
        name: "digits", "mnist", "cifar10", "cifar10-jpeg", "names" or "shakespeare".
        data_dir: the folder that holds it; PCKERNELS_DATA names it otherwise. The digits need none.
        sequence: the length of the sequences that a text is cut into.

    Raises:
        ValueError: an unknown name, no folder given, or a damaged file, which is named.
        FileNotFoundError: the folder or a file in it is missing.
        Unsupported: a package that reads the files is not installed.
    """
    if name not in LOADERS:
        raise ValueError(f"There is no data set {name!r}; choose from {', '.join(LOADERS)}.")
    if name == "digits":
        return digits()
    folder = find_folder(data_dir, name)
    return shakespeare(folder, sequence) if name == "shakespeare" else LOADERS[name](folder)


def find_folder(data_dir: str | Path | None, name: str) -> Path:
    """`data_dir`, or the folder that PCKERNELS_DATA names."""
    chosen = data_dir or os.environ.get("PCKERNELS_DATA")
    if not chosen:
        raise ValueError(f"The data set {name} is read from a folder: give --data-dir, or set PCKERNELS_DATA. `--data digits` needs none.")
    folder = Path(chosen)
    if not folder.is_dir():
        raise FileNotFoundError(f"The data folder {folder} does not exist; give an existing one with --data-dir or PCKERNELS_DATA.")
    return folder


def limited(split: Split, samples: int | None) -> Split:
    """At most `samples` of a split, evenly spaced over it, so that sorted classes stay balanced."""
    if samples is None or samples >= len(split):
        return split
    if samples < 1:
        raise ValueError(f"The number of samples must be at least 1; got {samples}.")
    chosen = torch.arange(samples) * len(split) // samples
    if isinstance(split, Names):
        return Names([split.letters[i] for i in chosen.tolist()], split.labels[chosen])
    return Part(split, chosen)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The random generator of one epoch's order, whatever ran before it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def digits() -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels from scikit-learn; every fifth is for testing.

    Source: Optical Recognition of Handwritten Digits, Alpaydin & Kaynak 1998 (UCI), as shipped with scikit-learn.
    """
    source = _require("sklearn.datasets", "scikit-learn").load_digits()
    pixels = torch.as_tensor(source.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.as_tensor(source.target, dtype=torch.int64)
    for_test = torch.arange(len(labels)) % TEST_DIGITS == TEST_DIGITS - 1
    train, test = (Images(pixels[chosen], labels[chosen]) for chosen in (~for_test, for_test))
    return Dataset("digits", "images", train, test, (1, 8, 8), list(string.digits))


def mnist(folder: Path) -> Dataset:
    """60,000 + 10,000 handwritten digits of 28 x 28 pixels, from `mnist/*-ubyte.gz` (LeCun, Cortes & Burges)."""
    train, test = (
        Images(
            _scaled(_read_idx(folder / "mnist" / f"{part}-images-idx3-ubyte.gz", 3)[:, None]),
            _labels(folder / "mnist" / f"{part}-labels-idx1-ubyte.gz", _read_idx(folder / "mnist" / f"{part}-labels-idx1-ubyte.gz", 1)),
        )
        for part in ("train", "t10k")
    )
    for part, split in (("train", train), ("t10k", test)):
        if len(split.pixels) != len(split.labels):
            raise ValueError(
                f"{folder / 'mnist'} holds {len(split.pixels)} images but {len(split.labels)} labels for {part}; get both again."
            )
    return Dataset("mnist", "images", train, test, (1, 28, 28), list(string.digits))


def cifar10(folder: Path) -> Dataset:
    """4,000 + 1,000 lossless CIFAR-10 images of 32 x 32 pixels, from `cifar10_lossless.npz` (Krizhevsky 2009).

    The file holds uint8 arrays x_train (N, 32, 32, 3), y_train (N,), x_test and y_test.
    """
    path = _existing(folder / "cifar10_lossless.npz")
    numpy = _require("numpy", "numpy")
    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in ("x_train", "y_train", "x_test", "y_test")}
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, error) from error
    train, test = (_cifar_split(path, arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test"))
    note = f"{len(train):,} training images and {len(test):,} test images only, not the full 50,000 and 10,000."
    return Dataset("cifar10", "images", train, test, (3, 32, 32), CIFAR_CLASSES, note)


def cifar10_jpeg(folder: Path) -> Dataset:
    """All 50,000 + 10,000 CIFAR-10 images, from lossy JPEGs in `cifar10_jpeg/CIFAR-10-images.tar.gz`.

    The archive holds {train,test}/class/NNNN.jpg.
    """
    path = _existing(folder / "cifar10_jpeg" / "CIFAR-10-images.tar.gz")
    parts: dict[str, list[tuple[str, Tensor]]] = {"train": [], "test": []}
    for name, content in _members(path):
        pieces = name.split("/")
        if name.endswith(".jpg") and len(pieces) >= 3 and pieces[-3] in parts:
            parts[pieces[-3]].append((pieces[-2], _decode(path, name, content)))
    train, test = (_labelled(path, part, samples) for part, samples in parts.items())
    note = "The images are JPEGs, which are lossy (median 30 dB): an accuracy on them is not one on CIFAR-10 itself."
    return Dataset("cifar10-jpeg", "images", train, test, (3, 32, 32), CIFAR_CLASSES, note)


def names(folder: Path) -> Dataset:
    """Surnames of 18 languages, from `names/<Language>.txt`, one a line, reduced to 57 ASCII letters and marks.

    A name counts once in a language. Every tenth is for testing. Source: the PyTorch tutorial of S. Robertson.
    """
    files = sorted((folder / "names").glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"{folder / 'names'} has no <Language>.txt; put the files of surnames there, or choose another --data-dir.")
    train, test = (_names_split(files, testing) for testing in (False, True))
    return Dataset("names", "names", train, test, (0, len(LETTERS)), [file.stem for file in files])


def shakespeare(folder: Path, sequence: int = 50) -> Dataset:
    """1,115,394 characters of Shakespeare, 65 distinct, from `shakespeare/input.txt`; the last tenth is for testing.

    Source: the tinyshakespeare file of A. Karpathy's char-rnn.
    """
    path = folder / "shakespeare" / "input.txt"
    text = _read_text(path)
    vocabulary = sorted(set(text))
    index = {character: i for i, character in enumerate(vocabulary)}
    characters = torch.tensor([index[character] for character in text])
    border = int(len(characters) * TRAIN_TEXT)
    train, test = Text(characters[:border], sequence), Text(characters[border:], sequence)
    if not len(test):
        raise ValueError(f"{path} has {len(text)} characters, too few for sequences of {sequence}; choose a shorter --sequence.")
    return Dataset("shakespeare", "text", train, test, (sequence,), vocabulary)


LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar10-jpeg": cifar10_jpeg,
    "names": names,
    "shakespeare": shakespeare,
}
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def to_ascii(name: str) -> str:
    """A name in the 57 letters: accents are dropped, and so is whatever has no such letter."""
    plain = unicodedata.normalize("NFD", name)
    return "".join(letter for letter in plain if letter in LETTERS)


def _names_split(files: list[Path], testing: bool) -> Names:
    letters, labels = [], []
    for label, file in enumerate(files):
        distinct = dict.fromkeys(to_ascii(line.strip()) for line in _read_text(file).splitlines())
        for position, name in enumerate(name for name in distinct if name):
            if (position % TEST_NAMES == TEST_NAMES - 1) == testing:
                letters.append(torch.tensor([LETTERS.index(letter) for letter in name]))
                labels.append(label)
    if not letters:
        raise ValueError(f"{files[0].parent} holds too few names to split; every language needs {TEST_NAMES} or more.")
    return Names(letters, torch.tensor(labels))


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 array of an idx file: two zero bytes, the type 8, the number of dimensions, the sizes, the data."""
    try:
        content = gzip.decompress(_existing(path).read_bytes())
        zeros, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
        if (zeros, kind, rank) != (0, 8, dimensions):
            raise ValueError("its header is not that of an idx file")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * rank).reshape(shape)
    except (gzip.BadGzipFile, EOFError, zlib.error, struct.error, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _cifar_split(path: Path, pixels: Tensor, labels: Tensor) -> Images:
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (32, 32, 3) or labels.shape != pixels.shape[:1]:
        raise _damaged(path, f"its images have shape {tuple(pixels.shape)} and its labels {tuple(labels.shape)}")
    return Images(_scaled(pixels.permute(0, 3, 1, 2).contiguous()), _labels(path, labels))


def _labels(path: Path, labels: Tensor, classes: int = 10) -> Tensor:
    labels = labels.long()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise _damaged(path, f"a label is outside 0 .. {classes - 1}")
    return labels


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield member.name, file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise _damaged(path, error) from error


def _decode(path: Path, name: str, content: bytes) -> Tensor:
    numpy, image = _require("numpy", "numpy"), _require("PIL.Image", "pillow")
    try:
        pixels = torch.from_numpy(numpy.array(image.open(io.BytesIO(content)).convert("RGB")))
    except (OSError, SyntaxError) as error:
        raise _damaged(path, f"{name} is no JPEG") from error
    if pixels.shape != (32, 32, 3):
        raise _damaged(path, f"{name} has {pixels.shape[1]} x {pixels.shape[0]} pixels instead of 32 x 32")
    return pixels.permute(2, 0, 1)


def _labelled(path: Path, part: str, samples: list[tuple[str, Tensor]]) -> Images:
    unknown = {label for label, _ in samples} - set(CIFAR_CLASSES)
    if unknown or not samples:
        raise _damaged(path, f"its folder {part}/ has {'classes unknown to CIFAR-10' if unknown else 'no images'}")
    labels = torch.tensor([CIFAR_CLASSES.index(label) for label, _ in samples])
    return Images(_scaled(torch.stack([pixels for _, pixels in samples])), labels)


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _order(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.arange(count) if generator is None else torch.randperm(count, generator=generator)


def _read_text(path: Path) -> str:
    try:
        return _existing(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, "it is not UTF-8") from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; put it there, or choose another folder with --data-dir or PCKERNELS_DATA.")
    return path


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(f"{path} cannot be read ({str(reason).rstrip('.')}); get the file again.")


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unsupported(f"This data set is read with {package}, which is not installed: `pip install {package}`.") from error
