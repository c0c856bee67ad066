"""Readers of data sets in files: MNIST and Fashion-MNIST from IDX files, and CIFAR-10 from its own.

The IDX format is LeCun's: two zero bytes, a byte for the type of the elements (8: unsigned bytes), a byte for the
number of dimensions, each dimension as a big-endian 32-bit integer, then the elements. CIFAR-10 (Krizhevsky, 2009) is
read in its binary version: records of a byte for the label and 3072 for the image, of 32 x 32, row by row, first all
red, then green, then blue. Its python version is a pickle, which could run any code, so it is rejected.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR_CLASSES = 10
CIFAR_SHAPE = (3, 32, 32)
EXPECTED = f"{', '.join(IDX_FILES)} (gzipped or not), or CIFAR-10's {', '.join(CIFAR_FILES)}"


class InputError(ValueError):
    """Invalid input of an experiment. The message names it, and says what was found and what to do."""


class Arrays(NamedTuple):
    """Images, float32 in [0, 1], and labels, int32, for training and for testing."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def read(folder: Path) -> tuple[str, Arrays]:
    """The name and the arrays of the data set in a folder.

    Args:
      folder: folder of the four IDX files of MNIST or Fashion-MNIST, gzipped or not, or of the binary files of
        CIFAR-10, which may also be in its subfolder `cifar-10-batches-bin`, where the archive unpacks them.

    Raises:
      FileNotFoundError, InputError: as `idx` and `cifar10`; InputError also for a missing folder and for pickles.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Pass the one that holds {EXPECTED}.")
    if any((folder / f"{name}{suffix}").is_file() for name in IDX_FILES for suffix in ("", ".gz")):
        return folder.resolve().name, idx(folder)
    for place in (folder, folder / "cifar-10-batches-bin"):
        if any((place / name).is_file() for name in CIFAR_FILES):
            return "CIFAR-10", cifar10(place)
    for place in (folder, folder / "cifar-10-batches-py"):
        for name in ("batches.meta", "data_batch_1", "test_batch"):
            if (place / name).is_file():
                raise InputError(
                    f"{place / name}: CIFAR-10's python version, a pickle, which can run any code when it is read. "
                    "Fetch the binary version, cifar-10-binary.tar.gz, and unpack it."
                )
    return folder.resolve().name, idx(folder)


def idx(folder: Path) -> Arrays:
    """MNIST, Fashion-MNIST, or another data set in four files of the same names and format, of any number of images.

    Args:
      folder: folder of the files, gzipped or not.

    Raises:
      FileNotFoundError: if one of the files is missing.
      InputError: if a file is truncated, is not IDX, does not contain images or labels of unsigned bytes, is empty, or
        if the numbers of images and labels differ.
    """
    paths = []
    for name in IDX_FILES:
        found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        if not found:
            raise FileNotFoundError(f"{folder / name}: no such file, gzipped (.gz) or not. Expected {EXPECTED}.")
        paths.append(found[0])
    arrays = [read_idx(path, dimensions) for path, dimensions in zip(paths, (3, 1, 3, 1), strict=True)]
    for i in (0, 2):
        images, labels = arrays[i], arrays[i + 1]
        if images.size == 0:
            raise InputError(f"{paths[i]}: no pixels, its shape is {images.shape}. Expected one image at the least.")
        if len(images) != len(labels):
            raise InputError(
                f"{paths[i]} has {len(images)} images and {paths[i + 1].name} {len(labels)} labels. Expected as many "
                "of one as of the other: the files belong to different data sets."
            )
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise InputError(
            f"{paths[0]} has images of {arrays[0].shape[1:]} and {paths[2].name} of {arrays[2].shape[1:]}. "
            "Expected one size: the files belong to different data sets."
        )
    train_images, test_images = ((arrays[i] / np.float32(255)).astype(np.float32) for i in (0, 2))
    train_labels, test_labels = (arrays[i].astype(np.int32) for i in (1, 3))
    return Arrays(train_images, train_labels, test_images, test_labels)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, gzipped or not."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(f"{path}: truncated or damaged gzip file ({error}). Fetch it again.") from error
    if content[:3] != b"\0\0\x08" or len(content) < 4 or content[3] != dimensions:
        raise InputError(
            f"{path}: not an IDX file of unsigned bytes in {dimensions} dimension(s): it begins with "
            f"{content[:4].hex(' ') or 'nothing'}, expected 00 00 08 {dimensions:02x}."
        )
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    if len(content) < header or len(content) != header + math.prod(shape):
        raise InputError(
            f"{path}: {len(content)} bytes, but a header that asks for {header + math.prod(shape)} (shape {shape}). "
            "The file is truncated or has something appended: fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def cifar10(folder: Path) -> Arrays:
    """CIFAR-10 from the six files of its binary version, with any number of images in each.

    Raises:
      FileNotFoundError: if one of the files is missing.
      InputError: if one is empty, truncated, or has a label above 9.
    """
    parts = [read_cifar(folder / name) for name in CIFAR_FILES]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    test_images, test_labels = parts[-1]
    images, test_images = images / np.float32(255), test_images / np.float32(255)
    return Arrays(images, labels.astype(np.int32), test_images, test_labels.astype(np.int32))


def read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images of shape (number, 32, 32, 3) and labels, both unsigned bytes, in a file of CIFAR-10's binary version."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Expected {', '.join(CIFAR_FILES)}: unpack the archive again.")
    content, record = np.fromfile(path, np.uint8), 1 + math.prod(CIFAR_SHAPE)
    if content.size == 0 or content.size % record:
        raise InputError(
            f"{path}: {content.size} bytes, expected a multiple of {record} (a label and an image of 32 x 32 in three "
            "colours), one record at the least. The file is truncated or not CIFAR-10's: fetch it again."
        )
    labels, images = np.split(content.reshape(-1, record), [1], axis=1)
    if labels.max() >= CIFAR_CLASSES:
        worst = int(labels.argmax())
        raise InputError(
            f"{path}: record {worst} has the label {labels[worst, 0]}, expected 0 to {CIFAR_CLASSES - 1}. "
            "The file is damaged or not CIFAR-10's: fetch it again."
        )
    # Bytes are transposed here, because transposing the floats later would copy four times as much memory.
    return np.ascontiguousarray(images.reshape(-1, *CIFAR_SHAPE).transpose(0, 2, 3, 1)), labels[:, 0]
