"""Random motions of images, against SciPy and against what a motion is."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from experiments.harness import stream


def scipy_moved(image, motion):
    """In float64, from the forward map of a pixel, which SciPy wants inverted."""
    height, width = image.shape
    right, down, angle, log_scale = np.float64(motion)
    cos, sin = math.cos(angle), math.sin(angle)
    forward = math.exp(log_scale) * np.array([[cos, sin], [-sin, cos]])  # of (row, column)
    middle = np.array([height - 1, width - 1]) / 2
    inverse = np.linalg.inv(forward)
    offset = middle - inverse @ (middle + np.array([down * height, right * width]))
    return scipy.ndimage.affine_transform(np.float64(image), inverse, offset, order=1, mode="grid-constant")


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (9, 14)])
def test_moved_matches_scipy(shape, rng):
    images = rng.uniform(size=(20, *shape)).astype(np.float32)
    motions = stream.motions(0, 0, 1, 20)[0]
    motions[10:] *= 4  # beyond the ranges of the stream: upside down, half of the image outside
    expected = [scipy_moved(*each) for each in zip(images, motions, strict=True)]
    np.testing.assert_allclose(jax.jit(stream.moved)(images, motions), expected, atol=1e-5)


def test_moved_treats_channels_alike(rng):
    images = rng.uniform(size=(5, 8, 8, 3)).astype(np.float32)
    motions = stream.motions(3, 0, 1, 5)[0]
    moved = stream.moved(jnp.asarray(images), jnp.asarray(motions))
    assert (moved.shape, moved.dtype) == (images.shape, jnp.float32)
    for channel in range(3):
        expected = [scipy_moved(*each) for each in zip(images[..., channel], motions, strict=True)]
        np.testing.assert_allclose(moved[..., channel], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (7, 28), (32, 32, 3)])
def test_moved_by_nothing_is_the_image(shape, rng):
    images = rng.uniform(size=(4, *shape)).astype(np.float32)
    np.testing.assert_array_equal(stream.moved(jnp.asarray(images), jnp.zeros((4, 4))), images)


@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, 3), (-1, 2), (-8, 0), (1, -20)])
def test_moved_by_whole_pixels_shifts_zeros_in(right, down, rng):
    images = rng.uniform(size=(2, 16, 8)).astype(np.float32)
    expected = np.zeros_like(images)
    for row in range(16):
        for column in range(8):
            if 0 <= row + down < 16 and 0 <= column + right < 8:
                expected[:, row + down, column + right] = images[:, row, column]
    motions = jnp.tile(jnp.array([right / 8, down / 16, 0, 0], jnp.float32), (2, 1))
    np.testing.assert_array_equal(stream.moved(jnp.asarray(images), motions), expected)


def test_moved_by_a_right_angle_turns_clockwise(rng):
    images = rng.uniform(size=(3, 9, 9)).astype(np.float32)
    motions = jnp.tile(jnp.array([0, 0, math.pi / 2, 0], jnp.float32), (3, 1))
    expected = np.rot90(images, -1, axes=(1, 2))
    np.testing.assert_allclose(stream.moved(jnp.asarray(images), motions), expected, atol=1e-5)


def test_moved_to_half_the_size_keeps_the_middle():
    image = jnp.zeros((1, 9, 9)).at[0, 4, 6].set(1)  # two pixels right of the middle
    moved = stream.moved(image, jnp.array([[0, 0, 0, math.log(0.5)]], jnp.float32))
    np.testing.assert_allclose(moved, jnp.zeros((1, 9, 9)).at[0, 4, 5].set(1), atol=1e-5)


def test_moved_runs_over_seeds_in_one_vmap(rng):
    images = rng.uniform(size=(2, 6, 8, 8)).astype(np.float32)
    motions = np.stack([stream.motions(seed, 4, 1, 6)[0] for seed in range(2)])
    both = jax.jit(jax.vmap(stream.moved))(images, motions)
    for seed in range(2):
        # XLA fuses the two programs differently.
        np.testing.assert_allclose(both[seed], stream.moved(images[seed], motions[seed]), atol=1e-5)


@pytest.mark.parametrize(("first", "steps"), [(0, 1), (3, 1), (2, 6), (11, 1), (5, 0)])
def test_motions_of_a_step_are_the_same_whatever_was_asked_before(first, steps):
    part = stream.motions(7, first, steps, 10)
    assert (part.shape, part.dtype) == ((steps, 10, 4), np.float32)
    np.testing.assert_array_equal(part, stream.motions(7, 0, 12, 10)[first : first + steps])
    np.testing.assert_array_equal(part[:, :3], stream.motions(7, first, steps, 3))


def test_motions_differ_by_seed_step_and_image():
    drawn = np.stack([stream.motions(seed, 0, 5, 10) for seed in range(3)])
    assert len(np.unique(drawn)) == drawn.size


def test_motions_are_uniform_over_their_ranges():
    drawn = stream.motions(0, 0, 100, 100).reshape(-1, 4)
    drawn[:, 2] *= 180 / math.pi
    drawn[:, 3] = np.exp(drawn[:, 3])
    np.testing.assert_allclose(drawn.min(0), [-0.125, -0.125, -15, 0.85], rtol=2e-3)
    np.testing.assert_allclose(drawn.max(0), [0.125, 0.125, 15, 1.15], rtol=2e-3)
    # The median of a uniform distribution, in units of its width, has a standard error of 1 / (2 sqrt(10,000)).
    median = np.median(drawn, axis=0) - [0, 0, 0, math.sqrt(0.85 * 1.15)]
    np.testing.assert_array_less(np.abs(median / [0.25, 0.25, 30, 0.3]), 0.02)
