"""Batch normalization and its variants as Flax Linen layers, which only hold variables."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import Array

from bnjax.core import checks, frozen
from bnjax.core.records import BNParams, BNState, Collected
from bnjax.core.schedules import Momentum
from bnjax.flax_shared.bridge import collects
from bnjax.flax_shared.conventions import Variables, call_layer, complete, counts, promoting
from bnjax.variants import adaptive, ghost, indexed, renorm


class BatchNorm(nn.BatchNorm):
    """Batch normalization (Ioffe & Szegedy, 2015), a replacement for `flax.linen.BatchNorm`.

        y = scale * (x - mean) / sqrt(var + epsilon) + bias
        running = momentum * running + (1 - momentum) * batch          for mean and var, in training

    Arguments, defaults, variables, dtypes and initialization are Flax's, and each layer reads the other's checkpoints.
    It differs from Flax on purpose in these points:

    * The variance is exact: it is taken around the running mean or the batch's mean, never as E[x^2] - E[x]^2, in
      float32 or wider. `use_fast_variance` therefore has no effect, and `force_float32_reductions=False` affects only
      the dtype in which statistics are stored.
    * A feature with fewer than two valid values, or whose batch statistics are not finite, keeps its running
      statistics. A feature without a valid value is normalized by the running statistics; Flax returns NaN.
    * Devices are merged by weight, so that unequal and empty shards are exact. Flax takes the mean of means.
    * A mask that is not boolean holds weights >= 0. Flax treats every number but 0 as True.
    * A mask of lower rank than `x` that could mask features is an error: Flax aligns one value per example with the
      features where a batch has as many examples as features.
    * Running statistics normalize in the dtype in which they are stored. With `force_float32_reductions=False` Flax
      first casts them to `param_dtype`, which may be narrower.
    * With `use_running_average=False`, `apply` without `mutable=["batch_stats"]` normalizes by the batch and writes
      nothing. Flax raises an error.
    * Bad arguments are errors while tracing: a momentum outside [0, 1], an epsilon that is not positive in float32, an
      axis out of range.

    Args:
      momentum: weight of the OLD value, or a function of the number of updates, such as `bnjax.cumulative_average` or
        `bnjax.debiased(0.99)`. Only a function adds a variable `count`, of the shape of the features, to `batch_stats`;
        statistics that come to `apply` without one start at 0. An existing count, of this shape or one number for all
        features, continues with any momentum.
      axis: the feature axis, or several.
      axis_name: mapped axis, or several, whose devices or examples share statistics.
      unbiased_var: whether the running variance is divided by n - 1, as in PyTorch; the output is normalized by the
        biased variance.
      frozen: whether to normalize by the running statistics in training too, and to leave them unchanged.
      frozen_params: whether scale and bias have no gradient. `bnjax.training.train_step` leaves them unchanged; in
        another training loop weight decay changes them, unless it is masked (`bnjax.training.decay_mask`).
      use_fast_variance: has no effect, because the variance is always exact.
      force_float32_reductions: whether the running statistics are stored in float32, or else in `param_dtype`.
        Reductions are in float32 or wider in both cases.
      **others: as in `flax.linen.BatchNorm`.

    In training, if `mutable` names the collection `batch_moments`, the layer writes the batch's moments there:
    `moments` is a `bnjax.Moments`, and `support` holds the number of valid values and the mean weight
    sum(w^2) / sum(w). If the collection already has moments, the batch's moments are merged into them, and the running
    statistics absorb the merged moments. Gradient accumulation needs this (`bnjax.training.train_step`).
    `mutable=True` does not name the collection, so that the result has only Flax's collections; a lifted transform such
    as `nn.scan` has to list it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnjax.linen
      >>> layer = bnjax.linen.BatchNorm(momentum=0.9)
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> y.round(3).tolist(), updates["batch_stats"]["mean"].round(3).tolist()
      ([[-1.0, -1.0], [1.0, 1.0]], [0.2..., 2.0])
    """

    axis: int | tuple[int, ...] = -1  # pyright: ignore[reportIncompatibleVariableOverride]
    momentum: Momentum = 0.99  # pyright: ignore[reportIncompatibleVariableOverride]
    axis_name: checks.AxisName | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    unbiased_var: bool = False
    frozen: bool = False
    frozen_params: bool = False

    @nn.compact
    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Array:
        """Normalize `x`.

        Args:
          x: floating, complex or integer, any shape.
          use_running_average: True normalizes by the running statistics, False by the batch's, which the running
            statistics absorb unless the module is initializing. Given here or to the constructor.
          mask: broadcastable to `x`, boolean or weights >= 0. Masked elements (weight 0), even NaN, do not affect any
            other element, nor the statistics. Sizes are aligned from the last axis; a mask of lower rank than `x` may
            not reach the features, nor fit the first axes of `x` as well.

        Returns:
          The normalized array, of x's shape. Its dtype is `dtype`; if that is None, the dtype to which
            x, scale and bias promote.
        """
        return batch_norm(self, x, use_running_average, mask=mask)


class GhostBatchNorm(BatchNorm, kw_only=True):
    """Ghost batch normalization: `bnjax.ghost_bn_apply` as a layer.

    Args:
      ghost_size: number of examples in a group, > 0.
      **others: as in `BatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnjax.linen
      >>> layer = bnjax.linen.GhostBatchNorm(ghost_size=2, use_running_average=False)
      >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [3.0], [10.0], [30.0]]))
      >>> y[:, 0].round(3).tolist()
      [-1.0, 1.0, -1.0, 1.0]
    """

    ghost_size: int

    @nn.compact
    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Array:
        """As `BatchNorm`."""
        return batch_norm(self, x, use_running_average, mask=mask, kind=ghost.GhostBatchNorm)


class RenormBatchNorm(BatchNorm, kw_only=True):
    """Batch renormalization: `bnjax.renorm_bn_apply` as a layer.

    Args:
      r_max, d_max: bounds of the correction, numbers or functions of the number of updates; by default the paper's
        schedule. A function adds the variable `count`.
      average: "std" averages standard deviations, as in the paper, and "var" variances.
      **others: as in `BatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnjax.linen
      >>> layer = bnjax.linen.RenormBatchNorm(r_max=3.0, d_max=0.5, use_running_average=False)
      >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [3.0]]))
      >>> y[:, 0].round(3).tolist()  # d = 2 is clipped to 0.5
      [-0.5, 1.5...]
    """

    r_max: renorm.Limit = renorm.RENORM_R_MAX
    d_max: renorm.Limit = renorm.RENORM_D_MAX
    average: str = "std"

    @nn.compact
    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Array:
        """As `BatchNorm`."""
        return batch_norm(self, x, use_running_average, mask=mask, kind=renorm.RenormBatchNorm)


class IndexedBatchNorm(BatchNorm, kw_only=True):
    """Statistics for each timestep, domain or kind of data: `bnjax.indexed_bn_apply` as a layer.

    Args:
      num_indices: number of indices; the statistics have a leading axis of that size.
      indexed_params: whether each index has its own scale and bias.
      **others: as in `BatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnjax.linen
      >>> layer = bnjax.linen.IndexedBatchNorm(num_indices=3, momentum=0.0, use_running_average=False)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = layer.init(jax.random.key(0), x, index=1)
      >>> y, updates = layer.apply(variables, x, index=1, mutable=["batch_stats"])
      >>> updates["batch_stats"]["mean"].tolist()
      [[0.0], [2.0], [0.0]]
    """

    num_indices: int
    indexed_params: bool = False

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  a call needs an index
        self, x: Any, use_running_average: bool | None = None, *, index: Any, mask: Any = None
    ) -> Array:
        """As `BatchNorm`, with the statistics of `index`: an integer, or an integer array, which is clamped.

        An array is a scalar, or has shape (batch,), with an index for each example.
        """
        checks.positive_integer("IndexedBatchNorm", "num_indices", self.num_indices)
        checks.boolean("IndexedBatchNorm", "indexed_params", self.indexed_params)
        return batch_norm(
            self,
            x,
            use_running_average,
            mask=mask,
            kind=indexed.IndexedBatchNorm,
            index=index,
            stacked_stats=(self.num_indices,),
            stacked_params=(self.num_indices,) if self.indexed_params else (),
        )


class ConditionalBatchNorm(BatchNorm, kw_only=True):
    """A scale and a bias for each class, embedded from its label: `bnjax.conditional_params` as a layer.

    Args:
      num_classes: number of classes; scale and bias have a leading axis of that size.
      **others: as in `BatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnjax.linen
      >>> layer = bnjax.linen.ConditionalBatchNorm(num_classes=10, use_running_average=False)
      >>> x, label = jnp.array([[1.0], [3.0]]), jnp.array([4, 7])
      >>> y, variables = layer.init_with_output(jax.random.key(0), x, label=label)
      >>> y.shape, variables["params"]["scale"].shape
      ((2, 1), (10, 1))
    """

    num_classes: int

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  a call needs a label
        self, x: Any, use_running_average: bool | None = None, *, label: Any, mask: Any = None
    ) -> Array:
        """As `BatchNorm`, with `label`, the class of each example: integers of shape (batch,)."""
        checks.positive_integer("ConditionalBatchNorm", "num_classes", self.num_classes)
        stacked = (self.num_classes,)
        return batch_norm(self, x, use_running_average, mask=mask, label=label, stacked_params=stacked)


class AdaptiveBatchNorm(BatchNorm, kw_only=True):
    """Batch normalization that adapts to the batch in evaluation: `bnjax.adaptive_bn_apply` as a layer.

    In training it is `BatchNorm`. In evaluation the running statistics count as `source_weight` examples, in addition
    to the examples of the batch, and stay unchanged. A frozen layer (`frozen=True`) normalizes by only the running
    statistics in training, and adapts in evaluation like any other.

    Args:
      source_weight: how many examples the running statistics count as, >= 0.
      **others: as in `BatchNorm`. `axis_name` is used in evaluation too.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnjax.linen
      >>> layer = bnjax.linen.AdaptiveBatchNorm(source_weight=2, use_running_average=True)
      >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.array([[3.0], [5.0]]))
      >>> y[:, 0].round(3).tolist()
      [1.0, 3.0...]
    """

    source_weight: float | Array

    @nn.compact
    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Array:
        """As `BatchNorm`."""
        return batch_norm(self, x, use_running_average, mask=mask, kind=adaptive.AdaptiveBatchNorm)


def batch_norm(
    layer: Any,
    x: Any,
    use_running_average: bool | None = None,
    *,
    mask: Any = None,
    stacked_stats: tuple[int, ...] = (),
    stacked_params: tuple[int, ...] = (),
    **others: Any,
) -> Array:
    """The call of `layer`, a BatchNorm of Flax or of bnjax, in its scope; others as in `call_layer`.

    Statistics and parameters may lead with an axis of indices or classes.
    """
    return call_layer(
        layer,
        _Storage(layer, stacked_stats, stacked_params),
        x,
        nn.merge_param("use_running_average", layer.use_running_average, use_running_average),
        axis_name=None if layer.is_initializing() else layer.axis_name,
        mask=mask,
        **others,
    )


@dataclass
class _Storage:
    """Flax Linen's collections, in the scope of a layer."""

    layer: Any
    stacked_stats: tuple[int, ...]
    stacked_params: tuple[int, ...]
    remedy = "Pass an x with the features of these variables, or initialize the layer with this x."

    def moving(self) -> bool:
        """Whether the running statistics may be written: an update needs `mutable=["batch_stats"]`."""
        return self.layer.is_mutable_collection("batch_stats")

    def read(self, x: Array, features: list[int], train: bool) -> Variables:
        layer, shape = self.layer, [*self.stacked_stats, *features]
        frozen.say("/".join(layer.scope.path), getattr(layer, "frozen_params", False))
        stored = jnp.float32 if layer.force_float32_reductions else layer.param_dtype
        self.mean = layer.variable("batch_stats", "mean", jnp.zeros, shape, stored)
        self.var = layer.variable("batch_stats", "var", jnp.ones, shape, stored)
        # An existing count continues in any case, or it would be wrong once an option becomes a function of it.
        counting = layer.has_variable("batch_stats", "count") or (counts(layer) and self.moving())
        counting &= train or layer.is_initializing()
        self.count = layer.variable("batch_stats", "count", jnp.zeros, shape, jnp.int32) if counting else None
        shape = [*self.stacked_params, *features]
        scale = layer.param("scale", layer.scale_init, shape, layer.param_dtype) if layer.use_scale else None
        bias = layer.param("bias", layer.bias_init, shape, layer.param_dtype) if layer.use_bias else None
        mean, var = self.mean.value, self.var.value
        if train:  # Flax stores the dtype to which the average of old and new promotes
            new = x.dtype if layer.dtype is None else layer.dtype
            with promoting():
                new = jnp.promote_types(new if jnp.issubdtype(new, jnp.inexact) else jnp.float32, stored)
                mean = mean.astype(jnp.promote_types(mean.dtype, new))
                var = var.astype(jnp.promote_types(var.dtype, jnp.finfo(new).dtype))
        self.collects = collects(layer)
        earlier = None
        if self.collects and layer.has_variable("batch_moments", "moments"):
            earlier = Collected(*(layer.get_variable("batch_moments", name) for name in Collected._fields))
        count = None if self.count is None else self.count.value
        return Variables(BNParams(scale, bias), mean, var, count, earlier)

    def promoted(self, x: Array, variables: Variables) -> tuple[Array, BNParams, Any]:
        with promoting():
            return x, variables.params, canonicalize_dtype(x, *variables.params, dtype=self.layer.dtype)

    def write(self, state: BNState, batch: Collected | None, train: bool) -> None:
        if train and self.moving() and not self.layer.is_initializing():
            self.mean.value, self.var.value = state.mean, state.var
            if self.count is not None:
                self.count.value = state.count
        if self.collects:
            for name, value in complete(batch, state.mean, state.var)._asdict().items():
                self.layer.put_variable("batch_moments", name, value)
