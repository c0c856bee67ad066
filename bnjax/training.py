"""Training with optax: running statistics carried along, gradients accumulated, layers rematerialized.

A model here is any function with the call of Linen's `Module.apply`: `apply_fn(variables, *args, mutable=, rngs=)`.
`bnjax.nnx.functional` makes one of an NNX model. The loop, the data and the loss stay the user's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import unfreeze
from flax.training import train_state
from jax import Array

from bnjax import checks, trees
from bnjax.array_moments import CHECKPOINT_NAME

Loss = Callable[["Model", Any, bool], Array | tuple[Array, Mapping[str, Array]]]

_DOTS_AND_STATISTICS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)
)


def save_statistics(prim: Any, *args: Any, **params: Any) -> Any:
    """Policy for `jax.checkpoint`: save the batches' statistics, and what dots and convolutions give.

    The backward then computes the normalization and the activation again, which are elementwise, but never a reduction
    over the batch and never a collective. Put around a whole network (a `jax.checkpoint` for each block saves the
    blocks' inputs too), it saves one activation for each convolution with its batch normalization and nonlinearity.

    Args:
      prim, *args, **params: what `jax.checkpoint` asks about.

    Returns:
      Whether to save it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnjax
      >>> from bnjax.training import save_statistics
      >>> params, state = bnjax.bn_init(3)
      >>> def block(kernel, x):
      ...     return jax.nn.relu(bnjax.bn_apply(params, state, x @ kernel, train=True)[0])
      >>> block = jax.checkpoint(block, policy=save_statistics)
      >>> jax.grad(lambda kernel: block(kernel, jnp.eye(3)).sum())(jnp.eye(3)).shape
      (3, 3)
    """
    return _DOTS_AND_STATISTICS(prim, *args, **params)


class TrainState(train_state.TrainState):
    """Flax's `TrainState` with the running statistics, and with keys for what draws random numbers.

    Args:
      apply_fn: `model.apply` of a Linen model, or what `bnjax.nnx.functional` returns.
      params, tx: parameters and the optax transformation that moves them.
      batch_stats: running statistics.
      rngs: None, or keys by name (`{"dropout": key}`). Every step and every micro-batch gets its own from them.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> import bnjax.linen
      >>> from bnjax.training import TrainState
      >>> model = bnjax.linen.BatchNorm()
      >>> variables = model.init(jax.random.key(0), jnp.ones((4, 2)), use_running_average=False)
      >>> state = TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.1), **variables)
      >>> state.batch_stats["mean"].tolist()
      [0.0, 0.0]
    """

    batch_stats: Any = struct.field(default_factory=dict)
    rngs: Any = None

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: Any, **kwargs: Any) -> "TrainState":
        """A state at step 0. It holds copies: a step that donates it leaves the variables that made it alone."""
        if "batch_stats" in kwargs:
            kwargs["batch_stats"] = unfreeze(kwargs["batch_stats"])  # as every step returns them
        return jax.tree.map(jnp.copy, super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs))


class Model:
    """What a loss calls: the model with its variables. Each call sees the statistics that the one before left.

    Call it in the loss itself: inside a transformation of its own (`jax.checkpoint`, `lax.scan`) it is an error.
    """

    def __init__(self, apply_fn: Callable[..., Any], variables: dict[str, Any], mutable: list[str], rngs: Any):
        self.variables = variables
        self._apply, self._mutable, self._rngs = apply_fn, mutable, rngs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for these arguments."""
        if self._rngs is not None:
            kwargs = {"rngs": self._rngs, **kwargs}
        if not self._mutable:
            return self._apply(self.variables, *args, **kwargs)
        output, updates = self._apply(self.variables, *args, mutable=self._mutable, **kwargs)
        self.variables = {**self.variables, **updates}
        return output


def train_step(
    loss: Loss, *, accumulate: int = 1, policy: Any = None, donate: bool = True
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """A compiled step of training.

    Args:
      loss: `loss(model, batch, train)` calls `model` as the module is called and returns the loss, or the loss and a
        dictionary of metrics. `train` is True here and False in `eval_step`.
      accumulate: number of micro-batches, run one after the other, whose gradients and metrics are averaged. Each is
        normalized by its own statistics; the running statistics move once, by the merged moments of all of them (a
        layer that is called several times in a forward pass moves as often, by the moments merged so far). All arrays
        of the batch are divided along their first axis, whose size `accumulate` divides: micro-batch i has the rows i,
        i + accumulate, ..., so that a batch sharded over devices is divided where it lies.
      policy: a policy of `jax.checkpoint` for the whole loss, such as `save_statistics`.
      donate: whether the memory of the state that comes in is used for the one that goes out. It is deleted then.

    Returns:
      `step(state, batch)`: the new state, and `{"loss": ..., **metrics}`. Over sharded arrays it is global by itself.

    Raises:
      ValueError: if `accumulate` is not positive; while tracing, if it does not divide the batch, or if a layer with
        running statistics gives no moments to accumulate.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> import bnjax.linen
      >>> from bnjax.training import TrainState, eval_step, train_step
      >>> class Network(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = nn.relu(bnjax.linen.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
      ...         return nn.Dense(1)(x)
      >>> def loss(model, batch, train):
      ...     return jnp.mean((model(batch["x"], train) - batch["y"]) ** 2)
      >>> batch = {"x": jnp.arange(8.0).reshape(8, 1), "y": jnp.ones((8, 1))}
      >>> variables = Network().init(jax.random.key(0), batch["x"], False)
      >>> state = TrainState.create(apply_fn=Network().apply, tx=optax.sgd(1e-2), **variables)
      >>> state, metrics = train_step(loss, accumulate=2)(state, batch)
      >>> sorted(metrics), int(state.step), eval_step(loss)(state, batch)["loss"].shape
      (['loss'], 1, ())
    """
    checks.positive_integer("train_step", "accumulate", accumulate)
    mutable = ["batch_stats"] if accumulate == 1 else ["batch_stats", "batch_moments"]

    def objective(params, state, moments, batch, index):
        collections = {"batch_stats": state.batch_stats} | ({} if moments is None else {"batch_moments": moments})
        model = Model(state.apply_fn, {"params": params, **collections}, mutable, _keys(state, index))
        value, metrics = _with_metrics(loss(model, batch, True))
        return value, (metrics, {name: model.variables.get(name, {}) for name in mutable})

    if policy is not None:
        objective = jax.checkpoint(objective, policy=policy)

    def part(state, moments, batch, index):
        """Gradients and metrics of one micro-batch, and the collections that it leaves."""
        (_, (metrics, left)), gradients = jax.value_and_grad(objective, has_aux=True)(
            state.params, state, moments, batch, index
        )
        return (gradients, metrics), left

    def whole(state, batch):
        """Those of all micro-batches. Each starts from the statistics before the step and the moments so far."""
        batches = jax.tree.map(lambda leaf: _divided(leaf, accumulate), batch)
        shapes = jax.eval_shape(part, state, None, jax.tree.map(lambda leaf: leaf[0], batches), 0)
        trees.check_collected("train_step(accumulate=...)", state.batch_stats, shapes[1]["batch_moments"])

        def add(carry, inputs):
            total, left = carry
            one, left = part(state, left["batch_moments"], *inputs)
            return (jax.tree.map(lambda sum, leaf: sum + leaf.astype(sum.dtype), total, one), left), None

        sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _summable(leaf.dtype)), shapes[0])
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1])
        (total, left), _ = jax.lax.scan(add, (sums, nothing), (batches, jnp.arange(accumulate)))
        return jax.tree.map(lambda sum, leaf: _mean(sum, accumulate, leaf.dtype), total, shapes[0]), left

    def step(state, batch):
        (gradients, metrics), left = part(state, None, batch, 0) if accumulate == 1 else whole(state, batch)
        return state.apply_gradients(grads=gradients, batch_stats=left["batch_stats"]), metrics

    return jax.jit(step, donate_argnums=0 if donate else ())


def eval_step(loss: Loss) -> Callable[[TrainState, Any], dict[str, Array]]:
    """A compiled evaluation: `step(state, batch)` is `{"loss": ..., **metrics}`.

    Args:
      loss: that of `train_step`, called with train=False. Nothing is mutable, and there are no keys for random numbers.
    """

    def step(state, batch):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return _with_metrics(loss(Model(state.apply_fn, variables, [], None), batch, False))[1]

    return jax.jit(step)


def decay_mask(params: Any) -> Any:
    """Which parameters weight decay is for: all but those named scale or bias, of whatever rank and wherever they are.

    Args:
      params: any tree of dictionaries, namedtuples (`BNParams`) or NNX states. The last name in a parameter's path
        counts, in keys that are tuples or joined by "/" as well; Haiku's `offset` is a bias.

    Returns:
      The same tree with True where decay applies, for `optax.masked` and the `mask` of `optax.adamw`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import bnjax
      >>> from bnjax.training import decay_mask
      >>> decay_mask({"kernel": jnp.ones((3, 4)), "bn": bnjax.bn_init((1, 1, 4))[0]})
      {'bn': BNParams(scale=False, bias=False), 'kernel': True}
      >>> optimizer = optax.adamw(1e-3, weight_decay=0.05, mask=decay_mask)
    """

    def decays(path, _):
        keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        names = [name for key in keys for name in (key if isinstance(key, tuple) else str(key).split("/"))]
        named = [name for name in names if isinstance(name, str) and name not in ("None", "value")]
        return not named or named[-1] not in ("scale", "bias", "offset")

    return jax.tree_util.tree_map_with_path(decays, params)


def _keys(state, index):
    """The keys of this step's micro-batch `index`."""
    if state.rngs is None:
        return None
    return {name: jax.random.fold_in(jax.random.fold_in(key, state.step), index) for name, key in state.rngs.items()}


def _with_metrics(result):
    value, metrics = result if isinstance(result, tuple) else (result, {})
    if "loss" in metrics:
        raise ValueError("loss(...): its metrics hold a 'loss', but that names what it returns. Name it otherwise.")
    return value, {"loss": value, **{name: jnp.asarray(metric) for name, metric in metrics.items()}}


def _summable(dtype):
    """The dtype to add up values of `dtype` in."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32


def _mean(total, number, dtype):
    return (total / number).astype(dtype if jnp.issubdtype(dtype, jnp.inexact) else total.dtype)


def _divided(leaf, accumulate):
    """Rows i, i + accumulate, ... for each i: cut this way a row stays on the device where it lies."""
    if jnp.ndim(leaf) == 0 or len(leaf) % accumulate:
        raise ValueError(
            f"train_step(accumulate={accumulate}): an array of the batch has shape {jnp.shape(leaf)}. Its first axis "
            f"must be a multiple of {accumulate}: pad it and mask the loss, or leave the last batch out."
        )
    return jnp.moveaxis(jnp.reshape(leaf, (-1, accumulate, *leaf.shape[1:])), 1, 0)
