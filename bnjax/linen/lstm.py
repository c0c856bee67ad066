"""The BN-LSTM (Cooijmans et al., 2017) as layers."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bnjax.core import checks
from bnjax.core.schedules import Momentum
from bnjax.linen.norm import IndexedBatchNorm
from bnjax.variants.lstm import SCALE, BNLSTMCarry, bn_lstm_carry, check_step, norm_layers, orthogonal, step


class BNLSTMCell(nn.RNNCellBase, kw_only=True):
    """LSTM with recurrent batch normalization (Cooijmans et al., 2017): `bnjax.bn_lstm_apply` as a cell.

    The running statistics must be carried from timestep to timestep, which `BNLSTM` does. `flax.linen.RNN` cannot,
    because its initialization creates the variables inside the scan that would carry them.

    Args:
      features: number of units.
      num_steps: number of timesteps with their own statistics; later timesteps use the last one's.
      use_running_average: True normalizes by the running statistics, False by the batch statistics.
      momentum, epsilon, axis_name, axis_index_groups, param_dtype: as in `BatchNorm`.
      kernel_init, recurrent_kernel_init, bias_init: initializers of the input kernel, the recurrent kernel and the
        bias, whose last axis is in the order f, i, o, g.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnjax.linen
      >>> cell = bnjax.linen.BNLSTMCell(features=8, num_steps=5, use_running_average=False)
      >>> x = jax.random.normal(jax.random.key(0), (16, 3))  # one timestep
      >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
      >>> (carry, output), variables = cell.init_with_output(jax.random.key(1), carry, x)
      >>> output.shape, int(carry.step), variables["batch_stats"]["cell_bn"]["mean"].shape
      ((16, 8), 1, (5, 8))
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
        """The next carry, and the output of shape (batch, features), for inputs of shape (batch, inputs)."""
        checks.positive_integer("BNLSTMCell", "features", self.features)
        checks.positive_integer("BNLSTMCell", "num_steps", self.num_steps)
        check_step("BNLSTMCell", inputs.shape[-1], self.features, carry, inputs)
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
        """The number of feature axes of the inputs."""
        return 1


class BNLSTM(nn.Module):
    """A BN-LSTM over sequences: a scan of the cell that carries the running statistics from timestep to timestep.

    It does not collect moments, so `bnjax.training.train_step` cannot accumulate gradients of a model that holds it.

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
          length: number of timesteps of each sequence, of shape (batch,). A sequence that has ended keeps its carry,
            repeats its output, and does not enter the statistics.
          initial_carry: result of `cell.initialize_carry`, or the last carry of an earlier call, `length` included.

        Raises:
          ValueError: if both `length` and `initial_carry` are given.
        """
        if initial_carry is not None and length is not None:
            raise ValueError(
                "BNLSTM(length=..., initial_carry=...): the carry holds the length already. Pass length to "
                "cell.initialize_carry, and only initial_carry here."
            )
        carry = initial_carry
        if carry is None:
            features, dtype = self.cell.features, self.cell.param_dtype
            carry = bn_lstm_carry(len(inputs), features, length=length, dtype=dtype, like=inputs)
        if self.is_initializing():
            self.cell(carry, inputs[:, 0])  # a scan carries only existing variables, so they are created before it
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
