"""Flax Linen layers. They hold variables; the mathematics is in `functional.py` and beside it.

`BatchNorm` takes the place of `flax.linen.BatchNorm` by a changed import. `convert` is for models that cannot be
edited: their own BatchNorm layers compute through bnjax.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from bnjax import checks, inference, layers, trees
from bnjax.functional import aligned
from bnjax.linen_conversion import convert as convert
from bnjax.linen_conversion import exact_batch_norm as exact_batch_norm
from bnjax.linen_norm import BatchNorm as BatchNorm
from bnjax.linen_norm import ConditionalBatchNorm as ConditionalBatchNorm
from bnjax.linen_norm import GhostBatchNorm as GhostBatchNorm
from bnjax.linen_norm import IndexedBatchNorm as IndexedBatchNorm
from bnjax.linen_norm import RenormBatchNorm as RenormBatchNorm
from bnjax.momentum import Momentum
from bnjax.recurrent import SCALE, BNLSTMCarry, bn_lstm_carry, norm_layers, orthogonal, step


def fold(
    model: nn.Module, variables: Mapping[str, Any], pairs: Iterable[tuple[str, str]], *args: Any, **kwargs: Any
) -> tuple[dict[str, Any], Any]:
    """Fold batch normalization into the layers beside it: for evaluation, the same model without it.

    A Linen module cannot drop a layer. So this gives variables and an interceptor:

        with nn.intercept_methods(interceptor):
            y = model.apply(variables, x, train=False)

    under which a layer folded gives back what it gets, and a linear layer without a bias adds the one that it has now.
    The variables are those of the model written without the norms and with use_bias=True.

    Args:
      model: a Linen module.
      variables: `params` and `batch_stats`, and whatever else it has.
      pairs: (linear, norm) or (norm, linear), paths such as ("Conv_0", "BatchNorm_0") or ("Block_0/BatchNorm_0",
        "Block_0/Dense_0"), in the order in which the model calls them. Nothing may stand between the two, which is
        checked, and nothing else may use what the first gives. Linear layers are `nn.Dense`, `nn.Conv` (grouped and
        depthwise too) and `nn.ConvTranspose`. After the norm they are exact only where no zeros are padded into their
        input: with padding VALID, CIRCULAR or REFLECT, or a kernel of one place.
      *args, **kwargs: of `model.apply` in evaluation. The model is traced with them, not run.

    Returns:
      variables: new ones, without those of the layers folded.
      interceptor: for `flax.linen.intercept_methods` around every `apply`, also under `jit` and `jax.export`.

    Raises:
      ValueError, TypeError: for a path that the model does not call, a pair that is not of these kinds, does not fit or
        does not stand side by side, or a norm that is in two pairs.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import bnjax.linen
      >>> model = nn.Sequential([nn.Dense(3, use_bias=False), bnjax.linen.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
      >>> folded, interceptor = bnjax.linen.fold(model, variables, [("layers_0", "layers_1")], jnp.ones((1, 2)))
      >>> with nn.intercept_methods(interceptor):
      ...     y = model.apply(folded, jnp.ones((1, 2)))
      >>> sorted(folded["params"]["layers_0"]), "batch_stats" in folded
      (['bias', 'kernel'], False)
    """
    calls = _calls(lambda: model.apply(variables, *args, **kwargs))
    types = {name: type(called[0].module) for name, called in calls.items()}
    params: dict[Any, Any]
    params, stats = (flatten_dict(unfreeze(variables.get(name, {}))) for name in ("params", "batch_stats"))
    norms = trees.norms(variables.get("params", {}), variables.get("batch_stats", {}))
    folded: dict[str, Any] = {}  # the dtype that each norm gives
    biased = set()
    for pair in pairs:
        call = f"fold(pairs=[{pair!r}])"
        linear, norm, previous = layers.pair(call, pair, types, _LINEAR, _NORM)
        if norm in folded:
            raise ValueError(f"{call}: {norm!r} is in two pairs. It can be folded into one layer.")
        first, second = (calls[name] for name in pair)
        if [id(c.y) for c in first] != [id(c.x) for c in second]:
            raise ValueError(
                f"{call}: what {pair[1]!r} is called with is not what {pair[0]!r} gives. Leave out pairs with an "
                "activation, a reshaping or another layer between."
            )
        layer, bn = calls[linear][0].module, calls[norm][0]
        if layers.feature_axes(bn.x, bn.module.axis) != (bn.x.ndim - 1,):
            raise ValueError(
                f"{call}: {norm!r} has axis={bn.module.axis}. Folding needs the features on the last axis."
            )
        affine = inference.fold(*norms[norm], epsilon=bn.module.epsilon)
        kernel, bias = ((*linear.split("/"), name) for name in ("kernel", "bias"))
        if bias not in params:
            biased.add(linear)
        old_kernel, old_bias = (nn.meta.unbox(params.get(path)) for path in (kernel, bias))
        both = layers.fold_linear(call, layer, old_kernel, old_bias, affine, previous)
        for path, new in zip((kernel, bias), both, strict=True):
            box = params.get(path)
            params[path] = box.replace_boxed(new) if isinstance(box, nn.meta.AxisMetadata) else new
        folded[norm] = bn.y.dtype

    def interceptor(next_function, args, kwargs, context):
        module, name = context.module, "/".join(context.module.path)
        called = context.method_name == "__call__"
        if called and name in folded:
            if module.has_variable("batch_stats", "mean"):
                raise ValueError(
                    f"interceptor: {name!r} has statistics. Apply the variables that fold gave, not others."
                )
            return _argument(args, kwargs).astype(folded[name])
        y = next_function(*args, **kwargs)
        if called and name in biased:
            added: Any = aligned(module.get_variable("params", "bias"), y, (y.ndim - 1,))
            y += added.astype(y.dtype)
        return y

    gone = {tuple(name.split("/")) for name in folded}
    remaining = {
        name: unflatten_dict({path: value for path, value in flat.items() if path[:-1] not in gone})
        for name, flat in {"params": params, "batch_stats": stats}.items()
    }
    return {name: tree for name, tree in {**variables, **remaining}.items() if tree}, interceptor


class _Call(NamedTuple):
    """A module called with x, which gave y."""

    module: Any
    x: Any
    y: Any


def _calls(function) -> dict[str, list[_Call]]:
    """Which modules a function calls, by path. It is traced: what one gives and another gets is one object."""
    calls: dict[str, list[_Call]] = {}

    def record(next_function, args, kwargs, context):
        y = next_function(*args, **kwargs)
        if context.method_name == "__call__" and (args or kwargs):
            call = _Call(context.module, _argument(args, kwargs), y)
            calls.setdefault("/".join(context.module.path), []).append(call)
        return y

    with nn.intercept_methods(record):
        jax.eval_shape(function)
    return calls


def _argument(args, kwargs):
    """The first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()))


_LINEAR = (nn.Dense, nn.Conv, nn.ConvTranspose)
_NORM = (nn.BatchNorm, BatchNorm, GhostBatchNorm, RenormBatchNorm)


class BNLSTMCell(nn.RNNCellBase, kw_only=True):
    """LSTM with recurrent batch normalization (Cooijmans et al., 2017): `bnjax.bn_lstm_apply` as a cell.

    Its statistics are variables to be carried from step to step: that is what `BNLSTM` does. `flax.linen.RNN` cannot
    carry variables that its own initialization makes.

    Args:
      features: number of units.
      num_steps: timesteps that have statistics of their own; those past the last use the last one's.
      use_running_average: True normalizes by the running statistics, False by the batch's.
      momentum, epsilon, axis_name, axis_index_groups, param_dtype: as in `BatchNorm`.
      kernel_init, recurrent_kernel_init, bias_init: of the kernels, whose columns are in the order f, i, o, g.
    """

    features: int
    num_steps: int
    use_running_average: bool
    momentum: Momentum = 0.99
    epsilon: float = 1e-5
    axis_name: checks.AxisName | None = None
    axis_index_groups: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()
    recurrent_kernel_init: Any = orthogonal
    bias_init: Any = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, carry: BNLSTMCarry, inputs: Array) -> tuple[BNLSTMCarry, Array]:
        """The next carry, and its output of shape (batch, features), for inputs of shape (batch, inputs)."""
        norms = {
            name: IndexedBatchNorm(
                num_indices=self.num_steps,
                use_running_average=self.use_running_average,
                momentum=self.momentum,
                epsilon=self.epsilon,
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
                param_dtype=self.param_dtype,
                scale_init=nn.initializers.constant(SCALE),
                use_bias=bias is not None,
                name=name,
            )
            for name, _, bias in norm_layers(self.features)
        }
        width = 4 * self.features
        carry = step(
            self.param("input_kernel", self.kernel_init, (inputs.shape[-1], width), self.param_dtype),
            self.param("recurrent_kernel", self.recurrent_kernel_init, (self.features, width), self.param_dtype),
            self.param("bias", self.bias_init, (width,), self.param_dtype),
            carry,
            inputs,
            lambda name, values, mask: norms[name](values, index=carry.step, mask=mask),
        )
        return carry, carry.output

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...], *, length: Array | None = None) -> BNLSTMCarry:
        """The carry before the first timestep, for inputs of shape (batch, inputs); `length` of shape (batch,)."""
        return bn_lstm_carry(input_shape[0], self.features, length=length, dtype=self.param_dtype)

    @property
    def num_feature_axes(self) -> int:
        return 1


class BNLSTM(nn.Module):
    """A BN-LSTM over sequences: a scan of the cell that carries the running statistics from step to step.

    It does not collect moments, so that `bnjax.training.train_step` cannot accumulate over it.

    Args:
      cell: a `BNLSTMCell`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bnjax.linen import BNLSTM, BNLSTMCell
      >>> layer = BNLSTM(BNLSTMCell(features=8, num_steps=5, use_running_average=False))
      >>> x = jax.random.normal(jax.random.key(0), (16, 5, 3))
      >>> length = jnp.arange(16) % 5 + 1
      >>> variables = layer.init(jax.random.key(1), x)
      >>> (carry, outputs), updates = layer.apply(variables, x, length=length, mutable=["batch_stats"])
      >>> outputs.shape, updates["batch_stats"]["cell"]["cell_bn"]["mean"].shape
      ((16, 5, 8), (5, 8))
    """

    cell: BNLSTMCell

    @nn.compact
    def __call__(
        self, inputs: Array, *, length: Array | None = None, initial_carry: BNLSTMCarry | None = None
    ) -> tuple[BNLSTMCarry, Array]:
        """The last carry, and the outputs of shape (batch, time, features).

        Args:
          inputs: of shape (batch, time, inputs).
          length: timesteps of each sequence, of shape (batch,). One that has ended keeps its carry, repeats its output,
            and does not enter the statistics.
          initial_carry: that of `cell.initialize_carry`, or a last carry to go on from, `length` included.
        """
        if initial_carry is not None and length is not None:
            raise ValueError(
                "BNLSTM(length=..., initial_carry=...): the carry has the length. Pass it to one of the two."
            )
        carry = initial_carry
        if carry is None:
            features, dtype = self.cell.features, self.cell.param_dtype
            carry = bn_lstm_carry(len(inputs), features, length=length, dtype=dtype, like=inputs)
        if self.is_initializing():
            self.cell(carry, inputs[:, 0])  # a scan carries only variables that exist
        moving = self.is_mutable_collection("batch_stats")
        over_time = nn.scan(
            lambda cell, carry, x: cell(carry, x),
            variable_broadcast="params" if moving else ["params", "batch_stats"],
            variable_carry="batch_stats" if moving else False,
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        return over_time(self.cell, carry, inputs)
