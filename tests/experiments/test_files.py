"""Reading IDX and CIFAR-10 files, whole and broken."""

import gzip

import numpy as np
import pytest

from experiments.harness import data, files


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays(rng):
    return [
        rng.integers(0, 256, (7, 5, 4), np.uint8),
        rng.integers(0, 3, 7, np.uint8),
        rng.integers(0, 256, (2, 5, 4), np.uint8),
        np.array([2, 0], np.uint8),
    ]


@pytest.fixture
def folder(tmp_path, arrays):
    for i, (name, array) in enumerate(zip(files.IDX_FILES, arrays, strict=True)):
        content = idx_bytes(array)
        path = tmp_path / (f"{name}.gz" if i % 2 else name)
        path.write_bytes(gzip.compress(content) if i % 2 else content)
    return tmp_path


def test_idx_files_gzipped_or_not_give_their_arrays(folder, arrays):
    dataset = data.load(data_dir=folder)
    np.testing.assert_allclose(dataset.train_images * 255, arrays[0], rtol=1e-6)
    np.testing.assert_array_equal(dataset.train_labels, arrays[1])
    np.testing.assert_allclose(dataset.test_images * 255, arrays[2], rtol=1e-6)
    np.testing.assert_array_equal(dataset.test_labels, arrays[3])
    assert (dataset.train_images.dtype, dataset.train_labels.dtype) == (np.float32, np.int32)
    assert (dataset.name, dataset.classes) == (folder.name, 3)


def rewrite(name, change):
    def apply(folder):
        path = next(folder.glob(f"{name}*"))
        content = path.read_bytes()
        path.write_bytes(change(gzip.decompress(content) if path.suffix == ".gz" else content))

    return apply


IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = files.IDX_FILES
BROKEN = {
    "missing": (lambda folder: (folder / IMAGES).unlink(), FileNotFoundError, f"{IMAGES}: no such file"),
    "truncated": (rewrite(IMAGES, lambda b: b[:-1]), ValueError, r"155 bytes, but a header that asks for 156 \(shape"),
    "appended": (rewrite(LABELS, lambda b: b + b"\0"), ValueError, "16 bytes, but a header that asks for 15"),
    "header_cut": (rewrite(TEST_IMAGES, lambda b: b[:9]), ValueError, "truncated"),
    "empty": (rewrite(TEST_LABELS, lambda b: b""), ValueError, "it begins with nothing, expected 00 00 08 01"),
    "foreign": (
        rewrite(IMAGES, lambda b: b"\x89PNG" + b),
        ValueError,
        "it begins with 89 50 4e 47, expected 00 00 08 03",
    ),
    "floats": (rewrite(IMAGES, lambda b: b"\0\0\x0d" + b[3:]), ValueError, "not an IDX file of unsigned bytes"),
    "swapped": (rewrite(IMAGES, lambda b: idx_bytes(np.zeros(7))), ValueError, "begins with 00 00 08 01"),
    "gzip_cut": (rewrite(LABELS, lambda b: gzip.compress(b)[:-9]), ValueError, "truncated or damaged gzip file"),
    "gzip_damaged": (
        rewrite(LABELS, lambda b: gzip.compress(b)[:12] + b"\xff" * 12),
        ValueError,
        "truncated or damaged gzip file",
    ),
    "counts": (rewrite(LABELS, lambda b: idx_bytes(np.zeros(6))), ValueError, "7 images and .* 6 labels"),
    "test_counts": (
        rewrite(TEST_LABELS, lambda b: idx_bytes(np.zeros(3))),
        ValueError,
        "2 images and .* 3 labels",
    ),
    "no_images": (rewrite(IMAGES, lambda b: idx_bytes(np.zeros((0, 5, 4)))), ValueError, r"no pixels, .* \(0, 5, 4\)"),
    "no_pixels": (rewrite(IMAGES, lambda b: idx_bytes(np.zeros((7, 0, 0)))), ValueError, r"no pixels, .* \(7, 0, 0\)"),
    "no_folder": (
        lambda folder: folder.rename(folder.with_name("elsewhere")),
        ValueError,
        f"no such folder. Pass the one that holds {IMAGES}, .*, or CIFAR-10's data_batch_1.bin",
    ),
    "sizes": (rewrite(TEST_IMAGES, lambda b: idx_bytes(np.zeros((2, 4, 4)))), ValueError, r"\(5, 4\) and .* \(4, 4\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_with_what_is_wrong(case, folder):
    damage, kind, message = BROKEN[case]
    damage(folder)
    with pytest.raises(kind, match=message):
        data.load(data_dir=folder)


def pixel(image, row, column, colour):
    """By its place in the file: an image of all colours is red, then green, then blue, row by row."""
    return image * 7 + row * 5 + column * 3 + colour * 11


@pytest.fixture
def cifar(tmp_path):
    """Six files of one or two records, in the folder in which they are unpacked."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    numbers = iter(range(8))
    for name, records in zip(files.CIFAR_FILES, (1, 2, 1, 1, 1, 2), strict=True):
        content = b""
        for image in (next(numbers) for _ in range(records)):
            places = ((r, c, k) for k in range(3) for r in range(32) for c in range(32))
            content += bytes([image + 2, *(pixel(image, *place) % 256 for place in places)])
        (folder / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("inside", [True, False])
def test_cifar_files_give_images_of_three_channels(cifar, inside):
    dataset = data.load(data_dir=cifar / "cifar-10-batches-bin" if inside else cifar)
    images = pixel(*np.ogrid[:8, :32, :32, :3]) % 256
    np.testing.assert_allclose(dataset.train_images, images[:6] / 255, rtol=1e-6)
    np.testing.assert_allclose(dataset.test_images, images[6:] / 255, rtol=1e-6)
    np.testing.assert_array_equal(dataset.train_labels, [2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(dataset.test_labels, [8, 9])
    assert (dataset.train_images.dtype, dataset.train_labels.dtype) == (np.float32, np.int32)
    assert (dataset.name, dataset.classes) == ("CIFAR-10", 10)


CIFAR_BROKEN = {
    "missing": (
        lambda folder: (folder / "data_batch_4.bin").unlink(),
        FileNotFoundError,
        "data_batch_4.bin: no such file. Expected data_batch_1.bin",
    ),
    "no_test": (
        lambda folder: (folder / "test_batch.bin").unlink(),
        FileNotFoundError,
        "test_batch.bin: no such file",
    ),
    "truncated": (
        rewrite("data_batch_2.bin", lambda b: b[:-1]),
        ValueError,
        "data_batch_2.bin: 6145 bytes, expected a multiple of 3073",
    ),
    "empty": (rewrite("test_batch.bin", lambda b: b""), ValueError, "test_batch.bin: 0 bytes, expected a multiple"),
    "label": (
        rewrite("data_batch_2.bin", lambda b: b[:3073] + b"\x0a" + b[3074:]),
        ValueError,
        "data_batch_2.bin: record 1 has the label 10, expected 0 to 9",
    ),
}


@pytest.mark.parametrize("case", CIFAR_BROKEN)
def test_broken_cifar_files_are_named_with_what_is_wrong(case, cifar):
    damage, kind, message = CIFAR_BROKEN[case]
    damage(cifar / "cifar-10-batches-bin")
    with pytest.raises(kind, match=message):
        data.load(data_dir=cifar)


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta", "cifar-10-batches-py/data_batch_1"])
def test_pickles_are_refused_unread(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(
        data.InputError, match=f"{name}: .* a pickle, which can run any code .* Fetch the binary version"
    ):
        data.load(data_dir=tmp_path)


def test_a_folder_of_neither_says_what_is_accepted(tmp_path):
    (tmp_path / "data_batch_1.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(
        FileNotFoundError, match=rf"{IMAGES}: no such file.*{TEST_LABELS}.* or CIFAR-10's .*test_batch.bin"
    ):
        data.load(data_dir=tmp_path)


def test_idx_files_go_before_cifar(folder, cifar):
    assert folder == cifar
    assert data.load(data_dir=folder).train_images.shape == (7, 5, 4)
