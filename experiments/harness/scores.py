"""What a network is scored by: accuracy, cross-entropy and test error."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array


def scored(logits: Array, labels: Array) -> tuple[Array, Array]:
    """For each image, whether the prediction is right, as 1 or 0, and the cross-entropy. Both are nan for all images if
    the network has diverged, that is, if any logit is not finite."""
    # The argmax of nan is 0, so a diverged network would otherwise score the share of class 0.
    finite = jnp.isfinite(logits).all()
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(finite, right, jnp.nan), jnp.where(finite, loss, jnp.nan)


def error(apply: Callable[..., tuple[Array, Any]], params: Any, state: Any, images: Array, labels: Array) -> Array:
    """The share of wrong answers, with half a mistake more: (wrong + 1/2) / (images + 1).

    So ratios exist for a run without a mistake. A diverged network answers with the first class.
    """
    wrong = (apply(params, state, images, False)[0].argmax(-1) != labels).sum()
    return (wrong.astype(jnp.float32) + 0.5) / (len(labels) + 1)


def cross_entropy(
    apply: Callable[..., tuple[Array, Any]], params: Any, state: Any, images: Array, labels: Array
) -> Array:
    """The mean cross-entropy over a batch, in training."""
    logits, _ = apply(params, state, images, True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def probe_training(apply: Callable[..., tuple[Array, Any]]) -> Callable[..., dict[str, Array]]:
    """A probe that measures accuracy and loss, in evaluation, on the training images that it sees."""

    def probe(params, state, view):
        logits, _ = apply(params, state, view.images, False)
        right, loss = scored(logits, view.labels)
        return {"train_accuracy": right.mean(), "train_loss": loss.mean()}

    return probe
