"""Recurrent batch normalization: the BN-LSTM (Cooijmans et al., 2017).

    (f, i, o, g) = BN(W_h h; gamma_h, 0) + BN(W_x x; gamma_x, 0) + b                                        (6)
    c' = sigmoid(f) * c + sigmoid(i) * tanh(g)                                                              (7)
    h' = sigmoid(o) * tanh(BN(c'; gamma_c, beta_c))                                                         (8)

The input and the recurrent term are normalized separately, and every timestep by its own statistics; timesteps past the
last one use its statistics. The scales start at 0.1: with 1 the gradient of tanh vanishes (section 4).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax.core import checks
from bnjax.core.moments import wider
from bnjax.core.records import BNParams, BNState, serializable
from bnjax.core.schedules import Momentum
from bnjax.variants.indexed import IndexedBatchNorm, indexed_bn_init

SCALE = 0.1
"""Initial scale of all three normalizations."""


def orthogonal(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """An orthogonal kernel, drawn in 32 bits or more, because JAX has no QR decomposition in half precision."""
    return jax.nn.initializers.orthogonal()(key, shape, wider(dtype)).astype(dtype)


@serializable
class BNLSTMParams(NamedTuple):
    """Kernels and bias, whose columns are in the order f, i, o, g, and the parameters of the three normalizations."""

    input_kernel: Array  # (inputs, 4 features)
    recurrent_kernel: Array  # (features, 4 features)
    bias: Array  # (4 features,)
    input_bn: BNParams  # of x @ input_kernel, without a bias
    recurrent_bn: BNParams  # of output @ recurrent_kernel, without a bias
    cell_bn: BNParams  # of the cell


@serializable
class BNLSTMState(NamedTuple):
    """Running statistics of the three normalizations, which have a leading axis of timesteps."""

    input_bn: BNState  # (num_steps, 4 features)
    recurrent_bn: BNState  # (num_steps, 4 features)
    cell_bn: BNState  # (num_steps, features)


def norm_layers(features: int) -> list[tuple[str, int, float | None]]:
    """The three normalizations: name, features and initial bias. Two have no bias, because b is added to their sum."""
    return [("input_bn", 4 * features, None), ("recurrent_bn", 4 * features, None), ("cell_bn", features, 0.0)]


@serializable
class BNLSTMCarry(NamedTuple):
    """The values that one timestep passes to the next."""

    cell: Array  # (batch, features)
    output: Array  # (batch, features)
    step: Array  # (), the timestep
    length: Array | None  # (batch,), the number of timesteps of each sequence; None if every sequence has all of them


def bn_lstm_init(
    key: Array, inputs: int, features: int, num_steps: int, *, dtype: Any = jnp.float32
) -> tuple[BNLSTMParams, BNLSTMState]:
    """Variables of a BN-LSTM: an input kernel of variance 1 / inputs, an orthogonal recurrent kernel, a bias of 0.

    Args:
      key: a jax.random key.
      inputs, features: number of inputs and of units.
      num_steps: number of timesteps with their own statistics, > 0.
      dtype: floating dtype of the parameters. Statistics have it, widened to at least 32 bits.

    Returns:
      BNLSTMParams and BNLSTMState.

    Raises:
      TypeError, ValueError: for `inputs`, `features` or `num_steps` that are not positive integers, and for a dtype
        that is neither floating nor complex.

    Example:
      >>> import bnjax, jax
      >>> params, state = bnjax.bn_lstm_init(jax.random.key(0), 3, 8, num_steps=10)
      >>> params.recurrent_kernel.shape, state.cell_bn.mean.shape
      ((8, 32), (10, 8))
    """
    for name, value in {"inputs": inputs, "features": features, "num_steps": num_steps}.items():
        checks.positive_integer("bn_lstm_init", name, value)
    dtype = checks.inexact_dtype("bn_lstm_init", dtype)
    keys = jax.random.split(key)
    norms = {
        name: indexed_bn_init(size, num_steps, scale=SCALE, bias=bias, dtype=dtype)
        for name, size, bias in norm_layers(features)
    }
    params = BNLSTMParams(
        jax.nn.initializers.lecun_normal()(keys[0], (inputs, 4 * features), dtype),
        orthogonal(keys[1], (features, 4 * features), dtype),
        jnp.zeros(4 * features, dtype),
        **{name: params for name, (params, _) in norms.items()},
    )
    return params, BNLSTMState(**{name: state for name, (_, state) in norms.items()})


def bn_lstm_carry(
    batch: int, features: int, *, length: Array | None = None, dtype: Any = jnp.float32, like: Array | None = None
) -> BNLSTMCarry:
    """The carry before the first timestep.

    Args:
      batch, features: shape of the cell and of the output.
      length: number of timesteps of each sequence, of shape (batch,), or None for all timesteps.
      dtype: floating dtype of the cell and of the output.
      like: an input, over whose mesh axes the carry then varies, as a shard_map that checks varying axes requires.

    Returns:
      BNLSTMCarry of zeros.

    Raises:
      TypeError, ValueError: for a `batch` that is not a non-negative integer, `features` that are not a positive one, a
        `length` that is not a number of timesteps for each sequence, and a dtype that is neither floating nor complex.

    Example:
      >>> import bnjax
      >>> bnjax.bn_lstm_carry(16, 8).cell.shape
      (16, 8)
    """
    symbolic = jax.export.is_symbolic_dim(batch)
    if not symbolic and (isinstance(batch, bool) or not isinstance(batch, int | np.integer) or batch < 0):
        raise ValueError(
            f"bn_lstm_carry(batch={batch!r}): expected a non-negative integer. Pass the number of sequences."
        )
    checks.positive_integer("bn_lstm_carry", "features", features)
    checks.inexact_dtype("bn_lstm_carry", dtype)
    if length is not None and getattr(length, "shape", None) != (batch,):
        raise ValueError(
            f"bn_lstm_carry(length=...): expected an array of shape ({batch},), got "
            f"{getattr(length, 'shape', type(length).__name__)}. Pass the number of timesteps of each sequence."
        )
    # Two arrays, because a buffer that both share could not be donated.
    cell, output = (jnp.zeros((batch, features), dtype) for _ in range(2))
    if like is not None:
        cell, output = (v + lax.full_like(like, 0, dtype, shape=v.shape) for v in (cell, output))
    return BNLSTMCarry(cell, output, jnp.zeros((), jnp.int32), length)


def bn_lstm_apply(
    params: BNLSTMParams,
    state: BNLSTMState,
    carry: BNLSTMCarry,
    x: Array,
    train: bool,
    *,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    axis_name: checks.AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased_var: bool = False,
) -> tuple[BNLSTMCarry, BNLSTMState]:
    """One timestep of a BN-LSTM (Cooijmans et al., 2017, equations 6 to 8).

        (f, i, o, g) = BN(W_h h; gamma_h, 0) + BN(W_x x; gamma_x, 0) + b
        c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h' = sigmoid(o) * tanh(BN(c'; gamma_c, beta_c))

    A sequence that has ended keeps its carry and does not enter the statistics.

    Args:
      params, state: the result of `bn_lstm_init`, or the state of the timestep before.
      carry: the result of `bn_lstm_carry`, or the carry of the timestep before.
      x: inputs of shape (batch, inputs).
      train and the rest: as in `bnjax.bn_apply`.

    Returns:
      carry: the next carry, whose `output` is h', in the dtypes of the old one.
      state: the next state. A scan over timesteps carries both.

    Raises:
      TypeError, ValueError: as `bnjax.bn_apply`, and for params, a state or a carry of another kind or of shapes that
        do not fit each other or x.

    Example:
      >>> import bnjax, jax, jax.numpy as jnp
      >>> params, state = bnjax.bn_lstm_init(jax.random.key(0), 3, 8, num_steps=5)
      >>> x = jax.random.normal(jax.random.key(1), (5, 16, 3))  # time, batch, inputs
      >>> def step(carry, x):
      ...     carry, state = bnjax.bn_lstm_apply(params, carry[1], carry[0], x, train=True)
      ...     return (carry, state), carry.output
      >>> (carry, state), outputs = jax.lax.scan(step, (bnjax.bn_lstm_carry(16, 8), state), x)
      >>> outputs.shape, state.cell_bn.count[:, 0].tolist()
      ((5, 16, 8), [1, 1, 1, 1, 1])
    """
    _check_arguments("bn_lstm_apply", params, state, carry, x)
    norm_of = IndexedBatchNorm(
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased_var=unbiased_var,
        num_indices=state.cell_bn.mean.shape[0],
        call="bn_lstm_apply",
    )
    new_state = {}

    def norm(name, values, mask):
        values, new_state[name] = norm_of.apply(
            getattr(params, name), getattr(state, name), values, train, mask, index=carry.step
        )
        return values

    carry = step(params.input_kernel, params.recurrent_kernel, params.bias, carry, x, norm)
    return carry, BNLSTMState(**new_state)


def _check_arguments(call, params, state, carry, x):
    """Check the kinds, dtypes and shapes of the arguments of `bn_lstm_apply`."""
    records = ("params", params, BNLSTMParams), ("state", state, BNLSTMState), ("carry", carry, BNLSTMCarry)
    for name, value, kind in records:
        if not all(hasattr(value, field) for field in kind._fields):
            maker = "bn_lstm_carry" if kind is BNLSTMCarry else "bn_lstm_init"
            raise TypeError(
                f"{call}({name}=...): expected bnjax.{kind.__name__}, got {type(value).__name__}. Pass what {maker} "
                "returned."
            )
    kernels = {name: getattr(params, name) for name in ("input_kernel", "recurrent_kernel", "bias")}
    arrays = {f"params.{name}": kernel for name, kernel in kernels.items()}
    for name, value in {**arrays, "carry.cell": carry.cell, "carry.output": carry.output, "x": x}.items():
        checks.inexact(call, name, value)
    inputs, features = (kernels[name].shape[0] if kernels[name].ndim else 0 for name in list(kernels)[:2])
    shapes = (inputs, 4 * features), (features, 4 * features), (4 * features,)
    for (name, kernel), shape in zip(kernels.items(), shapes, strict=True):
        if kernel.shape != shape:
            raise ValueError(
                f"{call}(params=...): params.{name} has shape {kernel.shape}, expected {shape}. Pass what bn_lstm_init "
                "returned."
            )
    check_step(call, inputs, features, carry, x)


def check_step(call: str, inputs: int, features: int, carry: BNLSTMCarry, x: Array) -> None:
    """Check that the shapes of the inputs of one timestep and of a carry fit the cell and each other."""
    if np.ndim(x) != 2 or x.shape[1] != inputs:
        raise ValueError(
            f"{call}(x=...): expected shape (batch, {inputs}), got {np.shape(x)}. Pass the inputs of one timestep, one "
            "for each row of the input kernel."
        )
    batch = x.shape[0]
    expected = {"cell": (batch, features), "output": (batch, features), "step": (), "length": (batch,)}
    for name, shape in expected.items():
        got = None if name == "length" and carry.length is None else np.shape(getattr(carry, name))
        if got is not None and got != shape:
            raise ValueError(
                f"{call}(carry=...): x has shape {x.shape} and the cell {features} features, so carry.{name} of shape "
                f"{shape} is expected, got {got}. Pass bn_lstm_carry({batch}, {features}), or the carry of "
                "the timestep before."
            )


def step(
    input_kernel: Array,
    recurrent_kernel: Array,
    bias: Array,
    carry: BNLSTMCarry,
    x: Array,
    norm: Callable[[str, Array, Array | None], Array],
) -> BNLSTMCarry:
    """Equations 6 to 8; `norm(name, values, mask)` applies the normalization of that name."""
    valid = None if carry.length is None else (carry.step < carry.length)[:, None]
    if valid is not None:
        # Padding may be NaN. Without this line the gradient of input_kernel would be NaN as well, because it is the
        # product of x and a cotangent, and NaN times 0 is NaN.
        x = jnp.where(valid, x, 0)
    recurrent = norm("recurrent_bn", carry.output @ recurrent_kernel, valid)
    gates = recurrent + norm("input_bn", x @ input_kernel, valid)
    f, i, o, g = jnp.split(gates + jnp.expand_dims(bias, 0).astype(gates.dtype), 4, -1)
    cell = jax.nn.sigmoid(f) * carry.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    output = jax.nn.sigmoid(o) * jnp.tanh(norm("cell_bn", cell, valid))
    if valid is not None:
        cell, output = jnp.where(valid, cell, carry.cell), jnp.where(valid, output, carry.output)
    # A scan requires a carry of constant dtypes.
    return BNLSTMCarry(cell.astype(carry.cell.dtype), output.astype(carry.output.dtype), carry.step + 1, carry.length)
