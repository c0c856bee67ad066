"""The BN-LSTM (Cooijmans et al., 2017) as layers."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from bnjax.core import checks
from bnjax.core.schedules import Momentum
from bnjax.nnx.variants import IndexedBatchNorm
from bnjax.variants.lstm import SCALE, BNLSTMCarry, bn_lstm_carry, check_step, norm_layers, orthogonal, step

_kernel, _zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()


class BNLSTMCell(nnx.RNNCellBase):
    """LSTM with recurrent batch normalization (Cooijmans et al., 2017): `bnjax.bn_lstm_apply` as a cell.

    `flax.nnx.RNN` runs it over sequences, and carries the running statistics from timestep to timestep. For sequences
    of different lengths pass `initial_carry=cell.initialize_carry(shape, length=lengths)`: a sequence that has ended
    keeps its carry, repeats its output, and does not enter the statistics. The last carry then holds the last valid
    timestep of each sequence, so `seq_lengths` is not needed.

    Args:
      in_features, hidden_features: number of inputs and of units.
      num_steps: number of timesteps with their own statistics; later timesteps use the last one's.
      momentum, epsilon, axis_name, axis_index_groups, use_running_average, param_dtype: as in `BatchNorm`.
      kernel_init, recurrent_kernel_init, bias_init: initializers of the input kernel, the recurrent kernel and the
        bias, whose last axis is in the order f, i, o, g.
      rngs: random number streams, of which `params` is used.

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
        sizes = {"in_features": in_features, "hidden_features": hidden_features, "num_steps": num_steps}
        for name, size in sizes.items():
            checks.positive_integer("BNLSTMCell", name, size)
        width = 4 * hidden_features
        self.input_kernel: nnx.Param[Array] = nnx.Param(kernel_init(rngs.params(), (in_features, width), param_dtype))
        recurrent = recurrent_kernel_init(rngs.params(), (hidden_features, width), param_dtype)
        self.recurrent_kernel: nnx.Param[Array] = nnx.Param(recurrent)
        self.bias: nnx.Param[Array] = nnx.Param(bias_init(rngs.params(), (width,), param_dtype))
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
        self.hidden_features: int = hidden_features
        self.param_dtype: Any = param_dtype

    def __call__(self, carry: BNLSTMCarry, inputs: Array) -> tuple[BNLSTMCarry, Array]:  # pyright: ignore
        """The next carry, and the output of shape (batch, hidden_features), for inputs (batch, in_features)."""

        def norm(name, values, mask):
            return getattr(self, name)(values, index=carry.step, mask=mask)

        check_step("BNLSTMCell", self.input_kernel.shape[0], self.hidden_features, carry, inputs)
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
        """The number of feature axes of the inputs."""
        return 1
