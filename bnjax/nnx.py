"""Flax NNX layers. They hold variables; the mathematics is in `functional.py`.

`BatchNorm` takes the place of `flax.nnx.BatchNorm` by a changed import, and `convert` puts it into a model that exists.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from jax import Array

from bnjax import checks, layers
from bnjax.functional import BNParams
from bnjax.momentum import Momentum

Model = TypeVar("Model")
_zeros, _ones = initializers.zeros_init(), initializers.ones_init()


class BatchMoments(nnx.Variable):
    """The moments of the batch, where someone asks for them."""


class BatchNorm(nnx.BatchNorm):
    """Batch normalization (Ioffe & Szegedy, 2015), in place of `flax.nnx.BatchNorm`.

        y = scale * (x - mean) / sqrt(var + epsilon) + bias
        running = momentum * running + (1 - momentum) * batch          for mean and var, in training

    Arguments, defaults, variables, dtypes and initialization are Flax's, and checkpoints serve both, either way.
    Where it departs from Flax, on purpose:

    * The variance is exact: taken around the mean, never as E[x^2] - E[x]^2. `use_fast_variance` is accepted and makes
      no difference.
    * Running statistics stay as they are for a feature with fewer than two valid values, or whose batch statistics are
      not finite. Without a valid value `x` is normalized by the running statistics, where Flax gives NaN.
    * Devices and masks are merged by weight: unequal and empty shards are exact. Flax takes the mean of means.
    * A mask that is not boolean holds weights, 0 or more.
    * With a half-precision `dtype` the running statistics normalize as they are stored. Flax rounds them to `dtype`.
    * The mean of complex `x` is stored as complex, so that the first call changes its dtype. Flax keeps its real part.
    * Bad arguments are errors while tracing: a momentum outside [0, 1], an epsilon that is not positive in float32, an
      axis out of range.

    Args:
      num_features: number of features.
      momentum: weight of the OLD value, or a function of the number of updates, such as `bnjax.cumulative_average` or
        `bnjax.debiased(0.99)`. Only a function adds a `BatchStat` `count`, of shape (num_features,), which starts at 0;
        if it is set later, on a layer that exists, the first call adds it.
      axis_name: mapped axis, or several, whose devices or examples share statistics.
      unbiased_var: the running variance is that of n - 1, as in PyTorch; the output is normalized by the biased one.
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

    # An instance that has one writes its moments there; `functional` gives it one.
    batch_moments: BatchMoments | None = None
    unbiased_var: bool = False

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
        self.unbiased_var = unbiased_var
        if callable(momentum):
            self._add_count()

    def _add_count(self):
        self.count = nnx.BatchStat(jnp.zeros(self.mean[...].shape, jnp.int32))

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Array:
        """Normalize `x`.

        Args:
          x: floating, complex or integer, any shape.
          use_running_average: True normalizes by the running statistics, False by the batch's, which the running
            statistics absorb. What is given here goes before what the constructor was given.
          mask: broadcastable to `x`, boolean or weights >= 0. Places of weight 0 do not enter the statistics,
            whatever stands there.

        Returns:
          Of x's shape, and of `dtype`, or without one of the dtype to which x, scale, bias and float32 promote.
        """
        frozen = self.use_running_average if use_running_average is None else use_running_average
        if frozen is None:
            raise ValueError(
                "BatchNorm(use_running_average=None): neither the layer nor the call says which statistics to use. "
                "Call model.train() or model.eval(), or pass use_running_average to the call or to the constructor."
            )
        train = not frozen
        mean, var = self.mean[...], self.var[...]
        stored = (None if v is None else v[...] for v in (self.scale, self.bias))
        # The running statistics stay as they are stored: in half precision they would lose what they are kept for.
        promoted, _, _, scale, bias = self.promote_dtype((x, mean, var, *stored), dtype=self.dtype)
        x = promoted if jnp.iscomplexobj(x) else promoted.real  # complex parameters leave the mean of real data real
        counting = train and callable(self.momentum)
        if counting and not hasattr(self, "count"):
            self._add_count()
        count = self.count if counting else None
        y, state, collected = layers.batch_norm(
            BNParams(scale, bias),
            mean,
            var,
            None if count is None else count[...],
            x,
            train,
            dtype=dtypes.canonicalize_dtype(promoted, scale, bias, dtype=self.dtype),
            axis=layers.feature_axes(x, self.axis),
            momentum=self.momentum,
            epsilon=self.epsilon,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            unbiased_var=self.unbiased_var,
            collect=train and self.batch_moments is not None,
            earlier=None if self.batch_moments is None else self.batch_moments.get_value(),
        )
        if train:
            _store(self.mean, state.mean)
            _store(self.var, state.var)
            if count is not None:
                _store(count, state.count)
        if collected is not None and self.batch_moments is not None:
            self.batch_moments.set_value(collected)  # pyright: ignore[reportArgumentType]
        return y


def _store(variable, value):
    value = jax.lax.stop_gradient(value)  # as in Flax: NNX does not follow derivatives through its variables
    if value.dtype == variable[...].dtype:
        variable[...] = value
    else:  # complex for the first time
        variable.set_value(value)


def convert(model: Model, *, axis_name: checks.AxisName | None = None) -> Model:
    """Turn every `flax.nnx.BatchNorm` in `model` into a `bnjax.nnx.BatchNorm`, in place.

    What `convert_sync_batchnorm` is to PyTorch. The layers stay the objects that they were, of another class: values,
    options and metadata are kept, and lists, vmapped stacks and shared layers need no care. Instances of subclasses of
    `flax.nnx.BatchNorm` are left as they are. Convert outside of transforms, and before `nnx.view` and
    `nnx.cached_partial`, which hold on to the layers as they find them.

    Args:
      model: an NNX module, or any container of modules.
      axis_name: if not None, the mapped axis, or several, whose devices are to share statistics from now on.

    Returns:
      `model` itself.

    Example:
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> isinstance(bnjax.nnx.convert(model).layers[1], bnjax.nnx.BatchNorm)
      True
    """
    for _, layer in nnx.iter_graph(model):
        if type(layer) is nnx.BatchNorm:
            layer.__class__ = BatchNorm
        if type(layer) is BatchNorm and axis_name is not None:
            layer.axis_name = axis_name  # pyright: ignore[reportAttributeAccessIssue]
    return model


def functional(model: nnx.Module) -> tuple[Callable[..., Any], dict[str, Any]]:
    """An NNX model as a pure function with the call of a Linen model, for `bnjax.training.TrainState`.

    Args:
      model: stays as it is.

    Returns:
      apply: `apply(variables, *args, mutable=(), rngs=None, **kwargs)`: what the model returns, and, if `mutable` names
        collections, those as well. The model is in training mode (`model.train()`) if it does, else in evaluation
        (`model.eval()`). `rngs`, keys by name, seed the model's own streams.
      variables: `params` and `batch_stats` as nnx.State; what else the model holds stays as it is, and changes to it
        are lost. To have the variables in the model again: `nnx.update(model, state.params, state.batch_stats)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> apply, variables = bnjax.nnx.functional(bnjax.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, updates = apply(variables, x, mutable=["batch_stats"])
      >>> updates["batch_stats"]["mean"][...].round(3).tolist()
      [0.0..., 0.2...]
    """
    graphdef, params, batch_stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    streams = {node.tag for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream)}

    def apply(variables: Mapping[str, Any], *args: Any, mutable: Sequence[str] = (), rngs: Any = None, **kwargs: Any):
        model = nnx.merge(graphdef, variables["params"], variables["batch_stats"], rest, copy=True)
        if not mutable:
            model.eval()
            return model(*args, **kwargs)
        model.train()
        if still := streams - set(rngs or ()):
            raise ValueError(
                f"apply(rngs=...): the model draws random numbers from {sorted(still)}, which without keys are "
                "the same in each call. Pass a key for each, or rngs={...: key} to TrainState.create."
            )
        nnx.reseed(model, **(rngs or {}))
        collecting = _layers(model) if "batch_moments" in mutable else {}
        for path, layer in collecting.items():
            nothing = layers.nothing(layer.mean[...], layer.var[...])
            layer.batch_moments = BatchMoments(variables.get("batch_moments", {}).get(path, nothing))
        output = model(*args, **kwargs)
        updates: dict[str, Any] = {"batch_stats": nnx.state(model, nnx.BatchStat)}
        if collecting:
            updates["batch_moments"] = {path: layer.batch_moments.get_value() for path, layer in collecting.items()}
        return output, updates

    return apply, {"params": params, "batch_stats": batch_stats}


def _layers(model) -> dict[str, Any]:
    """The layers of bnjax in a model, by path."""
    return {"/".join(map(str, path)): layer for path, layer in nnx.iter_graph(model) if isinstance(layer, BatchNorm)}
