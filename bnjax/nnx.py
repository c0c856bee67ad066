"""Flax NNX layers. They hold variables; the mathematics is in `functional.py` and beside it.

`BatchNorm` takes the place of `flax.nnx.BatchNorm` by a changed import, and `convert` puts it into a model that exists.
"""

import functools
from collections.abc import Iterable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from bnjax import checks, inference, layers
from bnjax.functional import BNParams, BNState
from bnjax.momentum import Momentum
from bnjax.nnx_conversion import convert as convert
from bnjax.nnx_functional import functional as functional
from bnjax.nnx_norm import BatchMoments as BatchMoments
from bnjax.nnx_norm import BatchNorm as BatchNorm
from bnjax.nnx_norm import ConditionalBatchNorm as ConditionalBatchNorm
from bnjax.nnx_norm import GhostBatchNorm as GhostBatchNorm
from bnjax.nnx_norm import IndexedBatchNorm as IndexedBatchNorm
from bnjax.nnx_norm import RenormBatchNorm as RenormBatchNorm
from bnjax.recurrent import SCALE, BNLSTMCarry, bn_lstm_carry, norm_layers, orthogonal, step

Model = TypeVar("Model")
_kernel, _zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()


class Identity(nnx.Module):
    """What stands where `fold` took a layer away: it gives back what it gets, in the dtype that the layer gave."""

    dtype: Any
    promoted: Any

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        return x.astype(jnp.promote_types(x.dtype, self.promoted) if self.dtype is None else self.dtype)


def fold(model: Model, pairs: Iterable[tuple[str, str]]) -> Model:
    """Fold batch normalization into the layers beside it, in place: for evaluation, the same model without it.

    Args:
      model: an NNX module with running statistics, in whatever mode.
      pairs: (linear, norm) or (norm, linear), paths such as ("conv1", "bn1") or ("blocks/0/bn", "blocks/0/dense"), in
        the order in which the model calls them. Nothing may stand between the two, no activation, and nothing else
        may use what the first gives. Linear layers are `nnx.Linear`, `nnx.Conv` (grouped and depthwise too) and
        `nnx.ConvTranspose`. After the norm they are exact only where no zeros are padded into their input: with
        padding VALID, CIRCULAR or REFLECT, or a kernel of one place.

    Returns:
      `model` itself. A layer folded is an `Identity`, without variables; a linear layer without a bias has one.

    Raises:
      ValueError, TypeError: for a path that is not there, a pair that is not of these kinds or does not fit, or a norm
        that is in two pairs. The model is then as it was.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, use_bias=False, rngs=rngs), bnjax.nnx.BatchNorm(4, rngs=rngs))
      >>> model = bnjax.nnx.fold(model, [("layers/0", "layers/1")])
      >>> model.layers[0].bias.shape, len(nnx.state(model, nnx.BatchStat))
      ((4,), 0)
    """
    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}
    kept: dict[str, Any] = {}
    linears: dict[str, tuple[Any, Any]] = {}
    for pair in pairs:
        call = f"fold(pairs=[{pair!r}])"
        linear, norm, previous = layers.pair(call, pair, {n: type(nodes[n]) for n in nodes}, _LINEAR, _NORM)
        if norm in kept:
            raise ValueError(f"{call}: {norm!r} is in two pairs. It can be folded into one layer.")
        layer, bn = nodes[linear], nodes[norm]
        kernel, bias = linears.get(linear) or (layer.kernel[...], None if layer.bias is None else layer.bias[...])
        if bn.axis not in (-1, kernel.ndim - bn.mean.ndim):
            raise ValueError(f"{call}: {norm!r} has axis={bn.axis}. Folding needs the features on the last axis, -1.")
        stored = BNParams(*(None if v is None else v[...] for v in (bn.scale, bn.bias)))
        statistics = BNState(bn.mean[...], bn.var[...], jnp.zeros(()))
        affine = inference.fold(stored, statistics, epsilon=bn.epsilon)
        linears[linear] = layers.fold_linear(call, layer, kernel, bias, affine, previous)
        kept[norm] = functools.reduce(jnp.promote_types, (v.dtype for v in (*stored, *statistics[:2]) if v is not None))
    for name, (kernel, bias) in linears.items():
        layer = nodes[name]
        layer.kernel.set_value(kernel)
        if layer.bias is None:
            layer.bias, layer.use_bias = nnx.Param(bias), True
        else:
            layer.bias.set_value(bias)
    for name, promoted in kept.items():
        bn = nodes[name]
        for attribute in [name for name in vars(bn) if name[0] != "_" and name != "dtype"]:
            delattr(bn, attribute)
        bn.__class__, bn.promoted = Identity, promoted
    return model


_LINEAR = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
_NORM = (nnx.BatchNorm, BatchNorm, GhostBatchNorm, RenormBatchNorm)


class BNLSTMCell(nnx.RNNCellBase):
    """LSTM with recurrent batch normalization (Cooijmans et al., 2017): `bnjax.bn_lstm_apply` as a cell.

    For `flax.nnx.RNN`, which carries its statistics from step to step. For sequences of several lengths, start it with
    `initial_carry=cell.initialize_carry(shape, length=lengths)`: a sequence that has ended keeps its carry, repeats its
    output, and does not enter the statistics (and the last carry is each sequence's own: no `seq_lengths` is needed).

    Args:
      in_features, hidden_features: number of inputs and of units.
      num_steps: timesteps that have statistics of their own; those past the last use the last one's.
      momentum, epsilon, axis_name, axis_index_groups, use_running_average, param_dtype: as in `BatchNorm`.
      kernel_init, recurrent_kernel_init, bias_init: of the kernels, whose columns are in the order f, i, o, g.
      rngs: keys of the stream `params`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> cell = bnjax.nnx.BNLSTMCell(3, 8, num_steps=5, rngs=nnx.Rngs(0))
      >>> outputs = nnx.RNN(cell)(jax.random.normal(jax.random.key(0), (16, 5, 3)))  # batch, time, inputs
      >>> outputs.shape, cell.cell_bn.mean.shape
      ((16, 5, 8), (5, 8))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        num_steps: int,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        axis_name: checks.AxisName | None = None,
        axis_index_groups: Any = None,
        use_running_average: bool | None = False,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = _kernel,
        recurrent_kernel_init: Any = orthogonal,
        bias_init: Any = _zeros,
        rngs: nnx.Rngs,
    ):
        width = 4 * hidden_features
        self.input_kernel = nnx.Param(kernel_init(rngs.params(), (in_features, width), param_dtype))
        recurrent = recurrent_kernel_init(rngs.params(), (hidden_features, width), param_dtype)
        self.recurrent_kernel = nnx.Param(recurrent)
        self.bias = nnx.Param(bias_init(rngs.params(), (width,), param_dtype))
        for name, size, bias in norm_layers(hidden_features):
            norm = IndexedBatchNorm(
                size,
                num_indices=num_steps,
                momentum=momentum,
                epsilon=epsilon,
                axis_name=axis_name,
                axis_index_groups=axis_index_groups,
                use_running_average=use_running_average,
                param_dtype=param_dtype,
                scale_init=nnx.initializers.constant(SCALE),
                use_bias=bias is not None,
                rngs=rngs,
            )
            setattr(self, name, norm)
        self.hidden_features, self.param_dtype = hidden_features, param_dtype

    def __call__(self, carry: BNLSTMCarry, inputs: Array) -> tuple[BNLSTMCarry, Array]:  # pyright: ignore
        """The next carry, and its output of shape (batch, hidden_features), for inputs (batch, in_features)."""

        def norm(name, values, mask):
            return getattr(self, name)(values, index=carry.step, mask=mask)

        kernels = (self.input_kernel[...], self.recurrent_kernel[...], self.bias[...])
        carry = step(*kernels, carry, inputs, norm)
        return carry, carry.output

    def initialize_carry(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_shape: tuple[int, ...], rngs: Any = None, *, length: Array | None = None
    ) -> BNLSTMCarry:
        """The carry before the first timestep, for inputs of shape (batch, in_features); `length` of shape (batch,)."""
        return bn_lstm_carry(input_shape[0], self.hidden_features, length=length, dtype=self.param_dtype)

    @property
    def num_feature_axes(self) -> int:
        return 1
