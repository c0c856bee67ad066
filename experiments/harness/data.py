"""Data sets: scikit-learn's handwritten digits, or MNIST, Fashion-MNIST and CIFAR-10, downloaded or from a folder.

The digits (1797 images of 8 x 8, 10 classes; from Alpaydin & Kaynak, 1998) ship with scikit-learn. `load` reads a
data set, `shrink` makes its images smaller, `splits` divides it anew for each seed, and `batches` orders the training
images.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.harness import download, files
from experiments.harness.files import InputError

Name = Literal["digits", "mnist", "fashion-mnist", "cifar10"]
TITLES: dict[str, str] = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}

TEST_SHARE = 0.2  # of a data set without a test part of its own
# Tags of the random generators of a seed. `batches` uses (seed, epoch), and no run has so many epochs.
SPLIT_TAG, NOISE_TAG = 2**32 - 1, 2**32 - 2


def flat(images: np.ndarray) -> np.ndarray:
    """Images as rows of pixels."""
    return images.reshape(len(images), -1)


class Dataset(NamedTuple):
    """Images, float32 in [0, 1] of shape (number, height, width[, channels]), and labels, int32 of shape (number,)."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    fixed_test: bool = True  # whether the publisher set these test images apart; if not, `splits` pools all images

    @property
    def classes(self) -> int:
        return 1 + int(max(self.train_labels.max(), self.test_labels.max()))

    def sha256(self) -> str:
        """A checksum of all images and labels."""
        return hashlib.sha256(b"".join(array.tobytes() for array in self[1:5])).hexdigest()


def load(dataset: Name = "digits", data_dir: Path | None = None) -> Dataset:
    """The digits of scikit-learn, a data set that is downloaded on its first use, or the one in `data_dir`.

    Args:
      dataset: name of the data set; with `data_dir` only the default.
      data_dir: None, or a folder as for `files.read`.

    Raises:
      InputError: for both a data set and a folder, or for an unknown name; otherwise as `files.read` and
        `download.fetch`.
      FileNotFoundError: as `files.read`.
    """
    if dataset not in get_args(Name):
        raise InputError(f"dataset={dataset}: expected one of {', '.join(get_args(Name))}.")
    if data_dir is not None:
        if dataset != "digits":
            raise InputError(
                f"dataset={dataset}, data_dir={data_dir}: two data sets. Pass --dataset, which downloads one, or "
                "--data-dir, which reads the one in a folder."
            )
        name, arrays = files.read(data_dir)
        return Dataset(name, *arrays)
    if dataset == "digits":
        return digits()
    return Dataset(TITLES[dataset], *files.read(download.fetch(dataset))[1])


def digits() -> Dataset:
    """The digits of scikit-learn. A fifth of each class, always the same images, is the test set."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=labels)
    labels = labels.astype(np.int32)
    return Dataset("scikit-learn digits", images[train], labels[train], images[test], labels[test], False)


def shrink(dataset: Dataset, side: int) -> Dataset:
    """The data set with images of at most `side` pixels in height and width, each the mean of a square block of pixels.

    The side of the blocks is ceil(longest side / `side`). If it does not divide height or width, the images are first
    extended by repeating their edges, as evenly as possible on both sides, which keeps the brightness at the border.
    Images that are small enough stay the same.

    Raises:
      InputError: if `side` is not positive.
    """
    if side < 1:
        raise InputError(f"shrink(side={side}): expected a positive number of pixels.")
    height, width = dataset.train_images.shape[1:3]
    block = -(-max(height, width) // side)
    if block == 1:
        return dataset
    train, test = (_block_means(images, block) for images in (dataset.train_images, dataset.test_images))
    name = f"{dataset.name} ({train.shape[1]} x {train.shape[2]})"
    return dataset._replace(name=name, train_images=train, test_images=test)


def _block_means(images: np.ndarray, block: int) -> np.ndarray:
    missing = [-size % block for size in images.shape[1:3]]
    around = [(0, 0), *((n // 2, n - n // 2) for n in missing), *[(0, 0)] * (images.ndim - 3)]
    images = np.pad(images, around, mode="edge") if any(missing) else images
    number, height, width, *channels = images.shape
    blocks = images.reshape(number, height // block, block, width // block, block, *channels)
    return blocks.mean((2, 4), dtype=np.float32)


class Splits(NamedTuple):
    """Images and labels of a data set, and the parts of it that each seed trains, validates and tests on.

    The parts are indices into `images`, int32 of shape (seeds, size of the part), in random order, so that the first
    ones are a random sample as well.
    """

    name: str
    images: np.ndarray  # float32 in [0, 1] of shape (number, height, width[, channels]): all images of the data set
    labels: np.ndarray  # int32 of shape (seeds, number); seeds differ in their label noise
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def classes(self) -> int:
        return 1 + int(self.labels.max())


def splits(
    dataset: Dataset,
    seeds: Sequence[int],
    *,
    train: int | None = None,
    validation_share: float = 0.2,
    most: int = 1000,
    noise: float = 0.0,
) -> Splits:
    """Divide a data set anew for each seed, stratified by class.

    Without a test part of the publisher's own, all images are pooled and divided at random: a share of `TEST_SHARE` for
    testing, `validation_share` for validation, and the rest for training. Otherwise test images are drawn from the
    publisher's test part, and `validation_share` refers to the training part.

    Test and validation images of a seed depend on neither `train` nor `noise`. With fewer training images, they are a
    subset of those with more.

    Args:
      dataset: the data set.
      seeds: seeds of the divisions, one for each run.
      train: number of training images, balanced over classes if possible; default: all that remain.
      validation_share: share of the images for validation.
      most: the most images for validation, and for testing. Images beyond it are not used.
      noise: share of the training images whose label is replaced by another class, each of the others being equally
        likely. Labels of validation and test images stay the same.

    Raises:
      InputError: for a number of training images below the number of classes, or above what remains; for a share
        outside its range.
    """
    limit = 1.0 if dataset.fixed_test else 1 - TEST_SHARE
    if not 0 < validation_share < limit:
        raise InputError(f"splits(validation_share={validation_share}): expected a number between 0 and {limit}.")
    if not 0 <= noise <= 1:
        raise InputError(f"splits(noise={noise}): expected a number in [0, 1].")
    if most < 1:
        raise InputError(f"splits(most={most}): expected a positive number of images.")
    images = np.concatenate([dataset.train_images, dataset.test_images])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    parts = [_split(dataset, labels, seed, train, validation_share, most) for seed in seeds]
    noisy = [_noisy(labels, dataset.classes, part[0], seed, noise) for part, seed in zip(parts, seeds, strict=True)]
    stacked = [np.stack(part).astype(np.int32) for part in zip(*parts, strict=True)]
    return Splits(dataset.name, images, np.stack(noisy), *stacked)


def filling(dataset: Dataset, batch_size: int) -> int:
    """The largest number of training images that fills all batches, so that none is padded."""
    return splits(dataset, [0]).train.shape[1] // batch_size * batch_size


def _split(
    dataset: Dataset, labels: np.ndarray, seed: int, train: int | None, validation_share: float, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the training, validation and test images of a seed."""
    rng = np.random.default_rng((seed, SPLIT_TAG))
    pool, tests = np.split(np.arange(len(labels)), [len(dataset.train_labels)])
    if not dataset.fixed_test:
        pool = np.concatenate([pool, tests])
        tests, pool = _draw(rng, pool, labels, round(TEST_SHARE * len(labels)))
    divided = len(dataset.train_labels) if dataset.fixed_test else len(labels)
    validation, pool = _draw(rng, pool, labels, max(1, round(validation_share * divided)))
    tests, validation = (_draw(rng, part, labels, min(most, len(part)))[0] for part in (tests, validation))
    number = len(pool) if train is None else train
    if not dataset.classes <= number <= len(pool):
        raise InputError(
            f"splits(train={number}): expected {dataset.classes} to {len(pool)}: one image of each class at the least, "
            f"and at most the images of {dataset.name} that are for training."
        )
    pool = rng.permutation(pool)
    balanced = np.argsort(_ranks(labels[pool]), kind="stable")
    return rng.permutation(pool[balanced[:number]]), validation, tests


def _draw(rng: np.random.Generator, pool: np.ndarray, labels: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Some images of a pool, of each class in proportion to its share, and the others; both in random order."""
    pool = rng.permutation(pool)
    of_pool = labels[pool]
    # A class with twice as many images has its ranks twice as dense, so the first of all have the classes' proportions.
    order = np.argsort((_ranks(of_pool) + 0.5) / np.bincount(of_pool)[of_pool], kind="stable")
    return rng.permutation(pool[order[:number]]), rng.permutation(pool[order[number:]])


def _ranks(labels: np.ndarray) -> np.ndarray:
    """By image, its place among the images of its class."""
    ranks = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        of_class = labels == label
        ranks[of_class] = np.arange(of_class.sum())
    return ranks


def _noisy(labels: np.ndarray, classes: int, train: np.ndarray, seed: int, noise: float) -> np.ndarray:
    """The labels, a share of those of the training images replaced by another class."""
    rng = np.random.default_rng((seed, NOISE_TAG))
    labels, chosen = labels.copy(), rng.permutation(train)[: round(noise * len(train))]
    labels[chosen] = (labels[chosen] + rng.integers(1, classes, len(chosen), np.int32)) % classes
    return labels


def batches(
    number: int, batch_size: int, seed: int, first: int, steps: int, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The batches of some steps. Every epoch has a new order. A step's batch depends only on seed and step.

    The last batch of an epoch has the remaining examples. Batches are padded to one size by repeating an index.

    Args:
      number: number of examples in the training set.
      batch_size: number of examples per batch.
      seed: seed of the order; the permutation of an epoch is drawn from (seed, epoch).
      first: the first step, counted from 0.
      steps: number of steps.
      size: size of the padded batches, at least `batch_size`, which is the default.

    Returns:
      Indices, int32, and weights, float32, both of shape (steps, size). The weight of an example is 1 / number of
      examples in its batch, so that a weighted sum is the mean. The weight of padding is 0.
    """
    size = batch_size if size is None else size
    per_epoch = -(-number // batch_size)
    column = np.arange(size)
    place = batch_size * np.arange(per_epoch)[:, None] + column
    valid = (column < batch_size) & (place < number)
    place = np.where(valid, place, place[:, :1])
    weights = (valid / valid.sum(1, keepdims=True)).astype(np.float32)
    epochs = range(first // per_epoch, -(-(first + steps) // per_epoch))
    orders = [np.random.default_rng((seed, epoch)).permutation(number).astype(np.int32) for epoch in epochs]
    rows = np.arange(first, first + steps)
    indices = np.concatenate([order[place] for order in orders])[rows - epochs.start * per_epoch]
    return indices, weights[rows % per_epoch]
