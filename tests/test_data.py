"""The loaders: what they read, how they split and batch it, and what they say of missing and damaged files."""

import gzip
import io
import os
import string
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pckernels import data

REAL = os.environ.get("PCKERNELS_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="PCKERNELS_DATA is not set: the real data sets are not here")


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    (tmp_path / "mnist").mkdir()
    for part, count in (("train", 6), ("t10k", 4)):
        write_idx(tmp_path / "mnist" / f"{part}-images-idx3-ubyte.gz", np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28))
        write_idx(tmp_path / "mnist" / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    return tmp_path


@pytest.fixture
def names_folder(tmp_path: Path) -> Path:
    (tmp_path / "names").mkdir()
    for language, letter in (("Dutch", "a"), ("Czech", "b")):
        lines = [letter * (1 + i % 3) + string.ascii_lowercase[i] for i in range(20)]
        (tmp_path / "names" / f"{language}.txt").write_text("\n".join([*lines, lines[0]]), encoding="utf-8")
    return tmp_path


@pytest.fixture
def jpeg_folder(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    (tmp_path / "cifar10_jpeg").mkdir()
    with tarfile.open(tmp_path / "cifar10_jpeg" / "CIFAR-10-images.tar.gz", "w:gz") as archive:
        for part in ("train", "test"):
            for label, shade in (("cat", 255), ("truck", 0)):
                content = io.BytesIO()
                image.new("RGB", (32, 32), (shade, 0, 0)).save(content, "JPEG", quality=95)
                member = tarfile.TarInfo(f"CIFAR/{part}/{label}/0001.jpg")
                member.size = content.getbuffer().nbytes
                archive.addfile(member, io.BytesIO(content.getvalue()))
    return tmp_path


def test_digits_need_no_folder(monkeypatch):
    monkeypatch.delenv("PCKERNELS_DATA", raising=False)
    digits = data.load("digits")
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    x, labels = digits.train.fetch(torch.arange(len(digits.train)))
    assert x.shape == (1438, 1, 8, 8) and (x.min(), x.max()) == (-1, 1)
    assert labels.unique().tolist() == list(range(10))


def test_mnist_reads_pixels_labels_and_scale(mnist_folder):
    mnist = data.load("mnist", mnist_folder)
    x, labels = mnist.train.fetch(torch.tensor([0, 5]))
    assert labels.tolist() == [0, 5]
    assert x[0, 0, 0, :3].tolist() == pytest.approx([-1, 1 / 127.5 - 1, 2 / 127.5 - 1])
    assert x[1, 0, 0, 0] == pytest.approx((5 * 784 % 256) / 127.5 - 1)
    assert len(mnist.test) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:40],
        lambda content: b"not gzip at all",
        lambda content: gzip.compress(gzip.decompress(content)[:-5]),
        lambda content: gzip.compress(gzip.decompress(content) + b"more"),
        lambda content: gzip.compress(b"\x00\x00\x0d" + gzip.decompress(content)[3:]),
        lambda content: gzip.compress(b"\x00"),
        lambda content: b"",
    ],
)
def test_a_damaged_idx_file_is_named(mnist_folder, damage):
    path = mnist_folder / "mnist" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz cannot be read .* get the file again"):
        data.load("mnist", mnist_folder)


def test_mnist_labels_out_of_range_and_of_another_number(mnist_folder):
    path = mnist_folder / "mnist" / "train-labels-idx1-ubyte.gz"
    write_idx(path, np.full(6, 11, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz .* outside 0 \.\. 9"):
        data.load("mnist", mnist_folder)
    write_idx(path, np.zeros(5, dtype=np.uint8))
    with pytest.raises(ValueError, match="6 images but 5 labels for train"):
        data.load("mnist", mnist_folder)


def test_cifar_is_channels_first_and_says_how_much_it_is(tmp_path):
    pixels = np.zeros((3, 32, 32, 3), dtype=np.uint8)
    pixels[1, 4, 7, 2] = 255
    arrays = {"x_train": pixels, "y_train": np.array([1, 2, 3]), "x_test": pixels[:1], "y_test": np.array([9])}
    np.savez(tmp_path / "cifar10_lossless.npz", **arrays)
    cifar = data.load("cifar10", tmp_path)
    x, labels = cifar.train.fetch(torch.tensor([1]))
    assert x.shape == (1, 3, 32, 32) and x[0, 2, 4, 7] == 1 and x.sum() == 2 - 3 * 32 * 32
    assert labels.tolist() == [2] and "3 training images and 1 test" in cifar.note


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", "missing", "shape"])
def test_a_damaged_cifar_file_is_named(tmp_path, content):
    path = tmp_path / "cifar10_lossless.npz"
    if content == "missing":
        np.savez(path, x_train=np.zeros(1))
    elif content == "shape":
        flat = np.zeros((2, 3072), dtype=np.uint8)
        np.savez(path, x_train=flat, y_train=np.zeros(2), x_test=flat, y_test=np.zeros(2))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar10_lossless\.npz cannot be read"):
        data.load("cifar10", tmp_path)


def test_jpegs_are_decoded_labelled_and_called_lossy(jpeg_folder):
    cifar = data.load("cifar10-jpeg", jpeg_folder)
    x, labels = cifar.test.fetch(torch.tensor([0, 1]))
    assert [cifar.classes[label] for label in labels] == ["cat", "truck"]
    assert x.shape == (2, 3, 32, 32) and x[0, 0].mean() > 0.95 and x[1].mean() < -0.95
    assert "lossy" in cifar.note


def test_a_torn_archive_is_named(jpeg_folder):
    path = jpeg_folder / "cifar10_jpeg" / "CIFAR-10-images.tar.gz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"CIFAR-10-images\.tar\.gz cannot be read"):
        data.load("cifar10-jpeg", jpeg_folder)


def test_names_are_ascii_distinct_and_split(names_folder):
    names = data.load("names", names_folder)
    assert names.classes == ["Czech", "Dutch"]
    assert (len(names.train), len(names.test)) == (36, 4)  # the repeated name counts once
    assert data.to_ascii("Ślusàrski") == "Slusarski" and data.to_ascii("O'Néàl, 李") == "O'Neal, "


def test_a_batch_of_names_has_one_length_and_the_right_letters(names_folder):
    names = data.load("names", names_folder)
    batches = names.train.batches(4, data.epoch_generator(0, 0))
    for indices in batches:
        x, labels = names.train.fetch(indices)
        assert x.shape[:1] == labels.shape and x.shape[2] == 57 and bool((x.sum(-1) == 1).all())
        first = [data.LETTERS[i] for i in x[:, 0].argmax(-1)]
        assert first == ["ba"[label] for label in labels.tolist()]
    assert sum(len(indices) for indices in batches) == len(names.train)
    assert max(len(indices) for indices in batches) == 4


def test_names_are_drawn_evenly_over_languages():
    letters = [torch.tensor([1])] * 100
    names = data.Names(letters, torch.tensor([0] * 95 + [1] * 5))
    drawn = torch.cat([i for epoch in range(20) for i in names.batches(8, data.epoch_generator(0, epoch))])
    assert (names.labels[drawn] == 1).float().mean() == pytest.approx(0.5, abs=0.05)


def test_text_targets_are_the_next_characters(tmp_path):
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "input.txt").write_text("abcde" * 20)
    text = data.load("shakespeare", tmp_path, sequence=4)
    assert text.classes == list("abcde") and len(text.train) == 22 and len(text.test) == 2
    x, following = text.train.fetch(torch.tensor([0, 1]))
    assert x.tolist() == [[0, 1, 2, 3], [4, 0, 1, 2]] and following.tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match="too few for sequences of 50; choose a shorter --sequence"):
        data.load("shakespeare", tmp_path)


def test_the_order_depends_on_seed_and_epoch_alone():
    split = data.load("digits").train

    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(split.batches(64, data.epoch_generator(seed, epoch))).tolist()

    torch.manual_seed(1)
    first = order(0, 3)
    torch.manual_seed(2)
    assert order(0, 3) == first and sorted(first) == list(range(1438))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert torch.cat(split.batches(64)).tolist() == list(range(1438))


def test_limited_takes_evenly_and_refuses_none():
    split = data.load("digits").train
    part = data.limited(split, 100)
    assert len(part) == 100 and torch.cat(part.batches(7)).tolist() == list(range(100))
    x, labels = part.fetch(torch.tensor([99]))
    assert torch.equal(x, split.fetch(torch.tensor([99 * 1438 // 100]))[0]) and labels.shape == (1,)
    assert data.limited(split, 5000) is split
    with pytest.raises(ValueError, match="at least 1; got 0"):
        data.limited(split, 0)


def test_limited_names_still_come_in_batches_of_one_length(names_folder):
    part = data.limited(data.load("names", names_folder).train, 20)
    for indices in part.batches(5, data.epoch_generator(0, 0)):
        part.fetch(indices)  # stacking names of different lengths would raise


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar10-jpeg", "names", "shakespeare"])
def test_missing_files_and_folders_are_named_with_a_remedy(name, tmp_path, monkeypatch):
    monkeypatch.delenv("PCKERNELS_DATA", raising=False)
    with pytest.raises(ValueError, match="give --data-dir, or set PCKERNELS_DATA"):
        data.load(name)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        data.load(name, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"--data-dir"):
        data.load(name, tmp_path)


def test_unknown_data_and_text_that_is_not_utf8(tmp_path):
    with pytest.raises(ValueError, match="no data set 'svhn'; choose from digits, mnist"):
        data.load("svhn")
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "Czech.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"Czech\.txt cannot be read \(it is not UTF-8\)"):
        data.load("names", tmp_path)


@needs_data
def test_real_data_has_its_known_sizes():
    mnist = data.load("mnist", REAL)
    assert (len(mnist.train), len(mnist.test)) == (60000, 10000)
    assert torch.bincount(mnist.test.fetch(torch.arange(10000))[1]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    cifar = data.load("cifar10", REAL)
    assert (len(cifar.train), len(cifar.test)) == (4000, 1000)
    names = data.load("names", REAL)
    assert len(names.classes) == 18 and len(data.LETTERS) == 57 and len(names.train) + len(names.test) == 17994
    text = data.load("shakespeare", REAL)
    assert len(text.classes) == 65 and len(text.train.characters) + len(text.test.characters) == 1115394
