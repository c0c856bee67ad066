"""The named tuples that functions take and return. All of them are pytrees, and `jax.export` serializes them."""

from typing import NamedTuple, TypeVar

import jax
import jax.export
from jax import Array

T = TypeVar("T")


def serializable(record: type[T]) -> type[T]:
    """Let `jax.export` serialize functions that take or return this named tuple."""
    return jax.export.register_namedtuple_serialization(record, serialized_name=f"bnjax.{record.__name__}")


@serializable
class BNParams(NamedTuple):
    """Learned scale (gamma) and bias (beta), of the shape of the features; None where the layer has none."""

    scale: Array | None  # (*features,), or conditional: x's rank with each size 1 or x's
    bias: Array | None  # likewise


@serializable
class BNState(NamedTuple):
    """Running mean and variance, and how many updates each feature absorbed; of the shape of the features."""

    mean: Array  # (*features,), complex for complex x
    var: Array  # (*features,), real
    count: Array  # (*features,) or (), integer  # pyright: ignore[reportIncompatibleMethodOverride]  a tuple counts too


@serializable
class Moments(NamedTuple):
    """Weight, mean and variance per feature; all three have the shape of the features.

    `weight` is the number of elements, or the sum of the mask where one is given. `var` is divided by `weight`. Where
    `weight` is 0, `mean` and `var` are 0.
    """

    weight: Array  # (*features,), real
    mean: Array  # (*features,), complex for complex x
    var: Array  # (*features,), real


@serializable
class Support(NamedTuple):
    """How many elements the moments come from: the number of weights > 0, and the mean weight sum(w^2) / sum(w).

    The effective number of elements is weight / mean_weight (Kish, 1965). The sum of squares itself would leave the
    floating range for weights far from 1.
    """

    valid: Array  # (*features,), real, the number of weights > 0
    mean_weight: Array  # (*features,), real, sum(w^2) / sum(w)


@serializable
class Collected(NamedTuple):
    """The moments of a batch, and their support, which is None where every valid element has weight 1.

    The support then follows from the moments: `weight` valid elements, of mean weight 1.
    """

    moments: Moments
    support: Support | None
