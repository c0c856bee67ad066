"""Data sets: the digits, smaller images, divisions by seed, and batches."""

import hashlib
import math

import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments.harness import data


def test_digits_are_split_once_and_for_all():
    dataset = data.load()
    images, labels = load_digits(return_X_y=True)
    both = np.concatenate([dataset.train_images, dataset.test_images]).reshape(-1, 64) * 16
    both = np.column_stack([both, np.concatenate([dataset.train_labels, dataset.test_labels])])
    assert sorted(map(tuple, both)) == sorted(map(tuple, np.column_stack([images, labels])))
    assert dataset.train_images.shape == (1437, 8, 8)
    assert (dataset.train_images.max(), dataset.classes) == (1, 10)
    np.testing.assert_array_equal(dataset.test_labels, data.load().test_labels)
    # Each class keeps its share of a fifth.
    np.testing.assert_allclose(np.bincount(dataset.test_labels), np.bincount(dataset.train_labels) / 4, atol=1)


def test_load_rejects_two_data_sets(tmp_path):
    with pytest.raises(data.InputError, match=rf"dataset=mnist, data_dir={tmp_path}: two data sets"):
        data.load("mnist", tmp_path)


def test_load_rejects_unknown_names():
    with pytest.raises(data.InputError, match="dataset=imagenet: expected one of digits, mnist, fashion-mnist, cifar1"):
        data.load("imagenet")


def test_checksum_is_of_images_and_labels_alone():
    digits = data.digits()
    arrays = (digits.train_images, digits.train_labels, digits.test_images, digits.test_labels)
    expected = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert digits.sha256() == digits._replace(fixed_test=True, name="other").sha256() == expected


def of_images(images):
    labels = np.zeros(len(images), np.int32)
    return data.Dataset("random", images, labels, images[:1] / 2, labels[:1])


@pytest.mark.parametrize(
    ("shape", "side", "small"),
    [
        ((28, 28), 16, (14, 14)),
        ((28, 28), 8, (7, 7)),
        ((28, 28), 10, (10, 10)),
        ((32, 32, 3), 16, (16, 16, 3)),
        ((32, 32, 3), 8, (8, 8, 3)),
        ((5, 4), 2, (2, 2)),
        ((4, 9), 1, (1, 1)),
    ],
)
def test_shrink_matches_a_loop_over_blocks(shape, side, small, rng):
    images = rng.uniform(size=(3, *shape)).astype(np.float32)
    dataset = data.shrink(of_images(images), side)
    block = math.ceil(max(shape[:2]) / side)
    before = [(size * block - old) // 2 for size, old in zip(small, shape[:2], strict=False)]
    expected = np.zeros((3, *small))
    for row in range(small[0]):
        for column in range(small[1]):
            for i in range(block):
                for j in range(block):
                    y = np.clip(row * block + i - before[0], 0, shape[0] - 1)
                    x = np.clip(column * block + j - before[1], 0, shape[1] - 1)
                    expected[:, row, column] += images[:, y, x] / block**2
    np.testing.assert_allclose(dataset.train_images, expected, rtol=1e-5)
    np.testing.assert_allclose(dataset.test_images, expected[:1] / 2, rtol=1e-5)
    assert dataset.train_images.dtype == np.float32
    assert dataset.name == f"random ({small[0]} x {small[1]})"


@pytest.mark.parametrize("side", [8, 16])
def test_shrink_leaves_small_images_as_they_are(side):
    assert data.shrink(data.digits(), side).sha256() == data.digits().sha256()
    assert data.shrink(data.digits(), side).name == "scikit-learn digits"


def test_shrink_rejects_no_pixels():
    with pytest.raises(data.InputError, match=r"shrink\(side=0\): expected a positive number"):
        data.shrink(data.digits(), 0)


def published(train, test):
    """A data set with a test part of its own, of classes in proportion 1 : 2 : 3; each image is its index."""
    labels = np.int32([0, 1, 1, 2, 2, 2] * (train + test))[: train + test]
    images = np.arange(train + test, dtype=np.float32).reshape(-1, 1, 1)
    return data.Dataset("published", images[:train], labels[:train], images[train:], labels[train:])


def assert_apart(splits):
    for parts in zip(splits.train, splits.validation, splits.test, strict=True):
        together = np.concatenate(parts)
        assert len(np.unique(together)) == len(together)


def test_splits_of_the_digits_are_60_20_20_of_all():
    digits = data.digits()
    splits = data.splits(digits, range(5))
    assert [part.shape for part in splits[3:]] == [(5, 1079), (5, 359), (5, 359)]
    assert {part.dtype for part in splits[2:]} == {np.dtype(np.int32)}
    assert_apart(splits)
    images, labels = load_digits(return_X_y=True)
    found = np.column_stack([splits.images.reshape(-1, 64) * 16, splits.labels[0]])
    assert sorted(map(tuple, found)) == sorted(map(tuple, np.column_stack([images, labels])))
    assert (splits.name, splits.classes) == ("scikit-learn digits", 10)
    for part in splits[3:]:
        for seed in range(5):
            counts = np.bincount(splits.labels[seed][part[seed]])
            np.testing.assert_allclose(counts, np.bincount(labels) * part.shape[1] / 1797, atol=1)


def test_splits_of_a_published_test_part_test_on_it():
    splits = data.splits(published(600, 300), [4, 5], validation_share=0.25)
    assert [part.shape for part in splits[3:]] == [(2, 450), (2, 150), (2, 300)]
    assert_apart(splits)
    np.testing.assert_array_equal(splits.images.ravel(), np.arange(900))
    assert splits.test.min() == 600
    assert max(splits.train.max(), splits.validation.max()) == 599
    for part, counts in zip(splits[3:], ([75, 150, 225], [25, 50, 75], [50, 100, 150]), strict=True):
        np.testing.assert_array_equal(np.bincount(splits.labels[1][part[1]]), counts)


def test_splits_have_at_most_so_many_for_validation_and_testing():
    splits = data.splits(published(600, 300), [0], most=60)
    assert [part.shape for part in splits[3:]] == [(1, 480), (1, 60), (1, 60)]
    assert_apart(splits)
    for part in (splits.validation, splits.test):
        np.testing.assert_array_equal(np.bincount(splits.labels[0][part[0]]), [10, 20, 30])


def test_splits_depend_on_the_seed_alone():
    dataset = published(600, 300)
    splits, again = data.splits(dataset, [3, 8], noise=0.5), data.splits(dataset, [8], noise=0.5)
    for part, same in zip(splits[2:], again[2:], strict=True):
        np.testing.assert_array_equal(part[1], same[0])
        assert not np.array_equal(part[0], part[1])
    # The order is random, too: the images of the test part are all drawn, in different orders.
    assert set(splits.test[0]) == set(splits.test[1]) == set(range(600, 900))


def test_splits_of_chance_overlap_as_chance_has_it():
    splits = data.splits(data.digits(), range(20))
    shared = [len(np.intersect1d(splits.test[i], splits.test[j])) for i in range(20) for j in range(i)]
    assert abs(np.mean(shared) - 359 * 359 / 1797) < 2  # the standard error is about 0.55


@pytest.mark.parametrize(("number", "counts"), [(3, [1, 1, 1]), (90, [30, 30, 30]), (380, [80, 150, 150])])
def test_splits_with_fewer_training_images_balance_them(number, counts):
    dataset = published(600, 300)
    splits, whole = data.splits(dataset, [0, 1], train=number), data.splits(dataset, [0, 1])
    assert splits.train.shape == (2, number)
    for seed in range(2):
        found = np.bincount(splits.labels[seed][splits.train[seed]])
        np.testing.assert_array_equal(found, counts)
        assert set(splits.train[seed]) <= set(whole.train[seed])
    np.testing.assert_array_equal(splits.validation, whole.validation)
    np.testing.assert_array_equal(splits.test, whole.test)


def test_splits_with_fewer_training_images_are_part_of_those_with_more():
    few, more = (data.splits(data.digits(), [6], train=n).train[0] for n in (100, 250))
    assert set(few) < set(more)


def test_splits_replace_labels_of_training_images_alone():
    clean, noisy = (data.splits(published(6000, 300), [0, 1], noise=noise) for noise in (0, 0.3))
    for part, same in zip(clean[3:], noisy[3:], strict=True):
        np.testing.assert_array_equal(part, same)
    changed = clean.labels != noisy.labels
    for seed in range(2):
        trained = np.isin(np.arange(6300), clean.train[seed])
        assert not changed[seed][~trained].any()
        assert changed[seed].sum() == round(0.3 * 4800)
        for label in range(3):
            replaced = noisy.labels[seed][changed[seed] & (clean.labels[seed] == label)]
            # Each of the two other classes is as likely: within four standard errors of a half.
            others = np.bincount(replaced, minlength=3)[np.arange(3) != label]
            assert abs(others[0] / others.sum() - 0.5) < 2 / np.sqrt(others.sum())
    assert not np.array_equal(changed[0], changed[1])


def test_splits_replace_all_labels_if_asked_to():
    clean, noisy = (data.splits(data.digits(), [0], noise=noise) for noise in (0, 1))
    np.testing.assert_array_equal(np.flatnonzero(clean.labels != noisy.labels), np.sort(clean.train[0]))
    assert (noisy.labels.min(), noisy.labels.max(), noisy.labels.dtype) == (0, 9, np.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": 9}, r"splits\(train=9\): expected 10 to 1079: one image of each class .* scikit-learn digits"),
        ({"train": 1080}, r"splits\(train=1080\): expected 10 to 1079"),
        ({"validation_share": 0.8}, r"splits\(validation_share=0.8\): expected a number between 0 and 0.8"),
        ({"validation_share": 0.0}, r"splits\(validation_share=0.0\)"),
        ({"noise": 1.5}, r"splits\(noise=1.5\): expected a number in \[0, 1\]"),
        ({"most": 0}, r"splits\(most=0\): expected a positive number"),
    ],
)
def test_splits_rejects(arguments, message):
    with pytest.raises(data.InputError, match=message):
        data.splits(data.digits(), [0], **arguments)


def test_batches_hold_every_index_once_an_epoch_and_the_last_is_padded():
    indices, weights = data.batches(10, 3, seed=0, first=0, steps=12, size=4)
    assert indices.shape == weights.shape == (12, 4)
    epochs = [indices[i : i + 4][weights[i : i + 4] > 0] for i in (0, 4, 8)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(10))
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(weights[:4], np.float32([[1 / 3] * 3 + [0]] * 3 + [[1, 0, 0, 0]]))
    np.testing.assert_array_equal(indices[weights == 0], np.repeat(indices[:, 0], (weights == 0).sum(1)))
    assert not np.array_equal(indices, data.batches(10, 3, seed=1, first=0, steps=12, size=4)[0])


@pytest.mark.parametrize(("first", "steps"), [(0, 1), (3, 1), (3, 6), (8, 4)])
def test_batches_of_a_step_are_the_same_whatever_was_asked_before(first, steps):
    for part, whole in zip(data.batches(10, 3, 7, first, steps), data.batches(10, 3, 7, 0, 12), strict=True):
        np.testing.assert_array_equal(part, whole[first : first + steps])
