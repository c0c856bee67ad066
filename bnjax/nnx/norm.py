"""Batch normalization as a Flax NNX layer, which only holds variables."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from jax import Array

from bnjax.core import checks
from bnjax.core.moments import wider
from bnjax.core.records import BNParams, BNState, Collected
from bnjax.core.schedules import Momentum
from bnjax.flax_shared.bridge import linen_collects
from bnjax.flax_shared.conventions import Variables, call_layer, complete, counts, promoting

_zeros, _ones = initializers.zeros_init(), initializers.ones_init()


class BatchMoments(nnx.Variable[Any]):
    """The moments of the batch, in a layer that collects them."""


# The name of the collection in a Linen model, to and from which `flax.nnx.bridge` moves variables of this type.
nnx.register_variable_name("batch_moments", BatchMoments, overwrite=True)


class BatchNorm(nnx.BatchNorm):
    """Batch normalization (Ioffe & Szegedy, 2015), a replacement for `flax.nnx.BatchNorm`.

        y = scale * (x - mean) / sqrt(var + epsilon) + bias
        running = momentum * running + (1 - momentum) * batch          for mean and var, in training

    Arguments, defaults, variables, dtypes and initialization are Flax's, and each layer reads the other's checkpoints.
    It differs from Flax on purpose in these points:

    * The variance is exact: it is taken around the running mean or the batch's mean, never as E[x^2] - E[x]^2, so that
      `use_fast_variance` has no effect.
    * A feature with fewer than two valid values, or whose batch statistics are not finite, keeps its running
      statistics. A feature without a valid value is normalized by the running statistics; Flax returns NaN.
    * Devices are merged by weight, so that unequal and empty shards are exact. Flax takes the mean of means.
    * A mask that is not boolean holds weights >= 0. In Flax it is an error.
    * A mask of lower rank than `x` that could mask features is an error: Flax aligns one value per example with the
      features where a batch has as many examples as features.
    * With a half-precision `dtype` the running statistics normalize in the dtype in which they are stored. Flax rounds
      them to `dtype`.
    * The mean of complex `x` is stored as complex, so that the first call changes its dtype. Flax stores its real part.
    * Bad arguments are errors while tracing: a momentum outside [0, 1], an epsilon that is not positive in float32, an
      axis out of range.

    Args:
      num_features: number of features.
      momentum: weight of the OLD value, or a function of the number of updates, such as `bnjax.cumulative_average` or
        `bnjax.debiased(0.99)`. Only a function adds a `BatchStat` `count`, of shape (num_features,), which starts at 0;
        if the function is set on an existing layer, the next call in training adds the count. An existing count
        continues with any momentum.
      axis_name: mapped axis, or several, whose devices or examples share statistics.
      unbiased_var: whether the running variance is divided by n - 1, as in PyTorch; the output is normalized by the
        biased variance.
      frozen: whether to normalize by the running statistics in training mode too, and to leave them unchanged.
      frozen_params: whether scale and bias have no gradient. `bnjax.training.train_step` leaves them unchanged; in
        another training loop weight decay changes them, unless it is masked (`bnjax.training.decay_mask`).
      use_fast_variance: has no effect, because the variance is always exact.
      **others: as in `flax.nnx.BatchNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> layer = bnjax.nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
      >>> y.round(3).tolist(), layer.mean[...].round(3).tolist()
      ([[-1.0, -1.0], [1.0, 1.0]], [0.2..., 2.0])
    """

    # A layer with these variables writes its `Collected` to them; `collect` adds them.
    moments: BatchMoments | None = None
    support: BatchMoments | None = None
    unbiased_var: bool = False
    frozen: bool = False
    frozen_params: bool = False
    # Only a layer with an option that is a function of the number of updates has it.
    count: nnx.BatchStat[Any]

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Any = _zeros,
        scale_init: Any = _ones,
        axis_name: checks.AxisName | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        unbiased_var: bool = False,
        frozen: bool = False,
        frozen_params: bool = False,
    ):
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,  # pyright: ignore[reportArgumentType]  Flax only keeps it
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,  # pyright: ignore[reportArgumentType]  likewise
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.unbiased_var, self.frozen, self.frozen_params = unbiased_var, frozen, frozen_params
        if callable(momentum):
            add_count(self)
        collect_for_linen(self)

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Array:
        """Normalize `x`.

        Args:
          x: floating, complex or integer, any shape.
          use_running_average: True normalizes by the running statistics, False by the batch's, which the running
            statistics absorb. The argument of the call takes precedence over that of the constructor.
          mask: broadcastable to `x`, boolean or weights >= 0. Masked elements (weight 0), even NaN, do not affect any
            other element, nor the statistics. Sizes are aligned from the last axis; a mask of lower rank than `x` may
            not reach the features, nor fit the first axes of `x` as well.

        Returns:
          The normalized array, of x's shape. Its dtype is `dtype`; if that is None, the dtype to which
            x, scale, bias and float32 promote.
        """
        return self._call(x, use_running_average, mask)

    def _call(self, x, use_running_average, mask, **others):
        """The call; others as in `call_layer`."""
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        if evaluate is None:
            raise ValueError(
                f"{type(self).__name__}(use_running_average=None): neither the layer nor the call says which "
                "statistics to use. Call model.train() or model.eval(), or pass use_running_average to the call or to "
                "the constructor."
            )
        storage = _Storage(self)
        return call_layer(self, storage, x, evaluate, axis_name=self.axis_name, mask=mask, **others)


@dataclass
class _Storage:
    """The variables of an NNX layer."""

    layer: BatchNorm
    remedy = "Pass an x with the features of the layer on that axis, or make the layer with num_features={}."

    def read(self, x: Array, features: list[int], train: bool) -> Variables:
        layer = self.layer
        if train and counts(layer) and not hasattr(layer, "count"):
            add_count(layer)
        # An existing count continues in any case, or it would be wrong once an option becomes a function of it.
        counting = train and hasattr(layer, "count")
        params = BNParams(*(None if v is None else v[...] for v in (layer.scale, layer.bias)))
        count = layer.count[...] if counting else None
        return Variables(params, layer.mean[...], layer.var[...], count, _earlier(layer))

    def promoted(self, x: Array, variables: Variables) -> tuple[Array, BNParams, Any]:
        layer = self.layer
        everything = x, variables.mean, variables.var, *variables.params
        # The running statistics keep the dtype in which they are stored: in half precision they would lose accuracy.
        with promoting():
            promoted, _, _, *params = layer.promote_dtype(everything, dtype=layer.dtype)
            dtype = dtypes.canonicalize_dtype(promoted, *params, dtype=layer.dtype)
        if not jnp.issubdtype(x.dtype, jnp.floating) or promoted.dtype != wider(x.dtype):
            # Complex parameters leave the mean of real data real.
            x = promoted if jnp.iscomplexobj(x) else promoted.real
        return x, BNParams(*params), dtype

    def write(self, state: BNState, batch: Collected | None, train: bool) -> None:
        layer = self.layer
        if train:
            _store(layer.mean, state.mean)
            _store(layer.var, state.var)
            if hasattr(layer, "count"):
                _store(layer.count, state.count)
        if layer.moments is not None:
            moments, support = complete(batch, state.mean, state.var)
            layer.moments.set_value(moments)
            layer.support.set_value(support)  # pyright: ignore[reportOptionalMemberAccess]  both or none


def collect(layer: Any, earlier: Collected | None = None) -> None:
    """Let the layer collect the moments of the batch, merged into these."""
    layer.moments, layer.support = (BatchMoments(part) for part in earlier or (None, None))


def collect_for_linen(layer: Any) -> None:
    """Let a layer that is made in the call of a Linen model collect moments if the model asks for them.

    The bridge puts the model's values into the variables of a new layer, so the variables must exist from the start.
    """
    if linen_collects():
        collect(layer)


def _earlier(layer):
    """The moments that a layer has collected already."""
    if layer.moments is None or layer.moments.get_value() is None:
        return None
    return Collected(layer.moments.get_value(), layer.support.get_value())


def add_count(layer: BatchNorm) -> None:
    """Give the layer the variable that counts its updates, at 0."""
    layer.count = nnx.BatchStat(jnp.zeros(layer.mean[...].shape, jnp.int32))


def _store(variable, value):
    value = jax.lax.stop_gradient(value)  # as in Flax: NNX does not follow derivatives through its variables
    if value.dtype == variable[...].dtype:
        variable[...] = value
    else:  # complex for the first time
        variable.set_value(value)
