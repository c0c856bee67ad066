"""The variants of batch normalization as Flax NNX layers, which only hold variables."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from bnjax.core import checks
from bnjax.nnx.norm import BatchNorm, add_count
from bnjax.variants import adaptive, ghost, indexed, renorm
from bnjax.variants.renorm import RENORM_D_MAX, RENORM_R_MAX, Limit


class GhostBatchNorm(BatchNorm):
    """Ghost batch normalization: `bnjax.ghost_bn_apply` as a layer.

    Args:
      num_features: number of features.
      ghost_size: number of examples in a group, > 0.
      **options: as in `BatchNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> layer = bnjax.nnx.GhostBatchNorm(1, ghost_size=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0], [3.0], [10.0], [30.0]]))[:, 0].round(3).tolist()
      [-1.0, 1.0, -1.0, 1.0]
    """

    def __init__(self, num_features: int, *, ghost_size: int, **options: Any):
        super().__init__(num_features, **options)
        self.ghost_size = ghost_size

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Array:
        """As `BatchNorm`."""
        return self._call(x, use_running_average, mask, kind=ghost.GhostBatchNorm)


class RenormBatchNorm(BatchNorm):
    """Batch renormalization: `bnjax.renorm_bn_apply` as a layer.

    Args:
      num_features: number of features.
      r_max, d_max: bounds of the correction, numbers or functions of the number of updates; by default the paper's
        schedule. A function adds the `BatchStat` `count`.
      average: "std" averages standard deviations, as in the paper, and "var" variances.
      **options: as in `BatchNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> layer = bnjax.nnx.RenormBatchNorm(1, r_max=3.0, d_max=0.5, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0], [3.0]]))[:, 0].round(3).tolist()  # d = 2 is clipped to 0.5
      [-0.5, 1.5...]
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: Limit = RENORM_R_MAX,
        d_max: Limit = RENORM_D_MAX,
        average: str = "std",
        **options: Any,
    ):
        super().__init__(num_features, **options)
        self.r_max: Limit = r_max
        self.d_max: Limit = d_max
        self.average = average
        if callable(r_max) or callable(d_max):
            add_count(self)

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Array:
        """As `BatchNorm`."""
        return self._call(x, use_running_average, mask, kind=renorm.RenormBatchNorm)


class IndexedBatchNorm(BatchNorm):
    """Statistics for each timestep, domain or kind of data: `bnjax.indexed_bn_apply` as a layer.

    Args:
      num_features: number of features.
      num_indices: number of indices; the statistics have a leading axis of that size.
      indexed_params: whether each index has its own scale and bias.
      **options: as in `BatchNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> layer = bnjax.nnx.IndexedBatchNorm(1, num_indices=3, momentum=0.0, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0], [3.0]]), index=1)
      >>> layer.mean[...].tolist()
      [[0.0], [2.0], [0.0]]
    """

    def __init__(self, num_features: int, *, num_indices: int, indexed_params: bool = False, **options: Any):
        checks.positive_integer("IndexedBatchNorm", "num_indices", num_indices)
        checks.boolean("IndexedBatchNorm", "indexed_params", indexed_params)
        super().__init__(num_features, **options)
        self.num_indices, self.indexed_params = num_indices, indexed_params
        _stack(self, num_indices, ["mean", "var", "count"] + ["scale", "bias"] * indexed_params)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  a call needs an index
        self, x: Any, use_running_average: bool | None = None, *, index: Any, mask: Any = None
    ) -> Array:
        """As `BatchNorm`, with the statistics of `index`: an integer, or an integer array, which is clamped.

        An array is a scalar, or has shape (batch,), with an index for each example.
        """
        return self._call(x, use_running_average, mask, kind=indexed.IndexedBatchNorm, index=index)


class ConditionalBatchNorm(BatchNorm):
    """A scale and a bias for each class, embedded from its label: `bnjax.conditional_params` as a layer.

    Args:
      num_features: number of features.
      num_classes: number of classes; scale and bias have a leading axis of that size.
      **options: as in `BatchNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> layer = bnjax.nnx.ConditionalBatchNorm(1, num_classes=10, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0], [3.0]]), label=jnp.array([4, 7]))
      >>> y.shape, layer.scale.shape
      ((2, 1), (10, 1))
    """

    def __init__(self, num_features: int, *, num_classes: int, **options: Any):
        checks.positive_integer("ConditionalBatchNorm", "num_classes", num_classes)
        super().__init__(num_features, **options)
        _stack(self, num_classes, ["scale", "bias"])

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  a call needs a label
        self, x: Any, use_running_average: bool | None = None, *, label: Any, mask: Any = None
    ) -> Array:
        """As `BatchNorm`, with `label`, the class of each example: integers of shape (batch,)."""
        return self._call(x, use_running_average, mask, label=label)


class AdaptiveBatchNorm(BatchNorm):
    """Batch normalization that adapts to the batch in evaluation: `bnjax.adaptive_bn_apply` as a layer.

    In training it is `BatchNorm`. In evaluation the running statistics count as `source_weight` examples, in addition
    to the examples of the batch, and stay unchanged. A frozen layer (`frozen=True`) normalizes by only the running
    statistics in training, and adapts in evaluation like any other.

    Args:
      num_features: number of features.
      source_weight: how many examples the running statistics count as, >= 0.
      **options: as in `BatchNorm`. `axis_name` is used in evaluation too.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> layer = bnjax.nnx.AdaptiveBatchNorm(1, source_weight=2, use_running_average=True, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[3.0], [5.0]]))[:, 0].round(3).tolist()
      [1.0, 3.0...]
    """

    def __init__(self, num_features: int, *, source_weight: float | Array, **options: Any):
        super().__init__(num_features, **options)
        self.source_weight = source_weight

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Array:
        """As `BatchNorm`."""
        return self._call(x, use_running_average, mask, kind=adaptive.AdaptiveBatchNorm)


def _stack(layer, number, names):
    """Give the variables of these names, where the layer has them, a leading axis of equal rows."""
    for name in names:
        variable = getattr(layer, name, None)
        if variable is not None:
            variable.set_value(jnp.repeat(variable[...][None], number, 0))
