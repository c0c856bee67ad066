"""Flax NNX layers. They hold variables; the mathematics is in `functional.py` and beside it.

`BatchNorm` takes the place of `flax.nnx.BatchNorm` by a changed import, and `convert` puts it into a model that exists.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from bnjax import checks, layers
from bnjax.momentum import Momentum
from bnjax.nnx_norm import BatchMoments as BatchMoments
from bnjax.nnx_norm import BatchNorm as BatchNorm
from bnjax.nnx_norm import ConditionalBatchNorm as ConditionalBatchNorm
from bnjax.nnx_norm import GhostBatchNorm as GhostBatchNorm
from bnjax.nnx_norm import IndexedBatchNorm as IndexedBatchNorm
from bnjax.nnx_norm import RenormBatchNorm as RenormBatchNorm
from bnjax.recurrent import SCALE, BNLSTMCarry, bn_lstm_carry, norm_layers, orthogonal, step

Model = TypeVar("Model")
_kernel, _zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()


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
        if isinstance(layer, BatchNorm) and axis_name is not None:
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
