"""An endless stream of images: the same ones, each time shifted, rotated and scaled at random.

A network that never sees the same image twice cannot memorize it, so the speed of optimization and the gap between
training and test error can be told apart. `motions` draws the random numbers on the host, and `moved` is a pure
function of arrays on the device. Output pixel p shows the input at

    q = c + R(-angle) (p - c - shift) / scale,    c the centre of the image, R a rotation,

interpolated bilinearly, with zeros outside the image.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

MOTION_TAG = 2**32 - 3  # after seed and step, so that no generator of `harness.data` draws the same numbers

# The ranges of the uniform distributions. They are as large as they can be without changing a digit's class, or moving
# much of it out of the image.
SHIFT = 1 / 8  # of the side: a pixel of 8 x 8, two of 16 x 16. The margins of MNIST are a seventh of its side.
ANGLE = math.radians(15)  # about the slant of handwriting, and too little to turn one digit into another
SCALE = (0.85, 1.15)  # at the most, 8 pixels become 9.2: less than a pixel is lost on each side


def motions(seed: int, first: int, steps: int, batch_size: int) -> np.ndarray:
    """The random motions of the images of some steps. A step's motions depend only on seed and step.

    Args:
      seed: seed of the stream.
      first: the first step, counted from 0.
      steps: number of steps.
      batch_size: number of images per step. A smaller batch has the first motions of a larger one.

    Returns:
      Float32 of shape (steps, batch_size, 4): the shift to the right, as a share of the width, and down, as a share of
      the height; the angle in radians, from the axis to the right towards the axis down, which is clockwise as images
      are shown; and the logarithm of the scale, above 0 for enlargement.
    """
    low = [-SHIFT, -SHIFT, -ANGLE, math.log(SCALE[0])]
    high = [SHIFT, SHIFT, ANGLE, math.log(SCALE[1])]
    drawn = [
        np.random.default_rng((seed, step, MOTION_TAG)).uniform(low, high, (batch_size, 4))
        for step in range(first, first + steps)
    ]
    return np.array(drawn, np.float32).reshape(steps, batch_size, 4)


def moved(images: jax.Array, motions: jax.Array) -> jax.Array:
    """Images after their motions. A motion of zeros leaves an image as it is, to the last bit.

    Args:
      images: floating-point images of shape (batch, height, width[, channels]).
      motions: motions of shape (batch, 4), as from `motions`, of the same dtype.

    Returns:
      Images of the shape and dtype of `images`.
    """
    return jax.vmap(_moved)(images, motions)


def copies(rows: jax.Array, shape: tuple[int, ...], number: int) -> jax.Array:
    """Each image moved `number` times, by motions that are the same in every call: many images for a test of what was
    trained with moved images.

    Args:
      rows: images as rows of pixels.
      shape: the shape of an image, (height, width[, channels]).
      number: number of copies of each image.

    Returns:
      Rows of pixels: all images once, then all of them again, and so on.
    """
    drawn = jnp.asarray(motions(0, 0, number, len(rows)).reshape(-1, 4))
    images = jnp.tile(rows.reshape(len(rows), *shape), (number, *[1] * len(shape)))
    return moved(images, drawn).reshape(len(drawn), -1)


def _moved(image: jax.Array, motion: jax.Array) -> jax.Array:
    height, width = image.shape[:2]
    right, down, angle, log_scale = motion
    middle = (height - 1) / 2, (width - 1) / 2
    y = (jnp.arange(height, dtype=motion.dtype) - middle[0] - down * height)[:, None]
    x = (jnp.arange(width, dtype=motion.dtype) - middle[1] - right * width)[None, :]
    cos, sin = jnp.cos(angle) / jnp.exp(log_scale), jnp.sin(angle) / jnp.exp(log_scale)
    rows, columns = cos * y - sin * x + middle[0], cos * x + sin * y + middle[1]

    def channel(plane: jax.Array) -> jax.Array:
        return map_coordinates(plane, [rows, columns], order=1, mode="constant")

    return channel(image) if image.ndim == 2 else jax.vmap(channel, in_axes=-1, out_axes=-1)(image)
