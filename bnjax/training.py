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

from bnjax.core import checks, trees
from bnjax.core.array_moments import CHECKPOINT_NAME

__all__ = ["Model", "TrainState", "decay_mask", "eval_step", "save_statistics", "train_step"]

Loss = Callable[["Model", Any, bool], Array | tuple[Array, Mapping[str, Array]]]

_OUTPUTS = ("intermediates", "batch_moments")

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
      collections: the model's other variables by collection, such as a cache or metrics of its own. `create` gathers
        here what it is given by any other name, but for `intermediates` and `batch_moments`, which are outputs. They
        are mutable in training, as in Flax: each call of the model gets what the call before left, from micro-batch to
        micro-batch and from step to step. In evaluation the model reads them.

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
    collections: Any = struct.field(default_factory=dict)

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: Any, **kwargs: Any) -> "TrainState":
        """A state at step 0. It holds copies: a step that donates it leaves the variables that made it alone."""
        others = set(kwargs) - set(cls.__dataclass_fields__)
        given = {name: kwargs.pop(name) for name in sorted(others)}
        given = {name: tree for name, tree in given.items() if name not in _OUTPUTS} | kwargs.pop("collections", {})
        for name, tree in given.items():
            if not isinstance(tree, Mapping):
                raise TypeError(
                    f"TrainState.create({name}=...): expected a collection of variables, got {type(tree).__name__}. "
                    f"Names are {sorted(cls.__dataclass_fields__)} and those of the model's collections."
                )
        kwargs["collections"] = unfreeze(given)
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
      accumulate: number of micro-batches, run one after the other, whose gradients are averaged. Each is normalized by
        its own statistics; the running statistics move once, by the merged moments of all of them (a layer that is
        called several times in a forward pass moves as often, by the moments merged so far). All arrays of the batch
        are divided along their first axis, whose size `accumulate` divides: micro-batch i has the rows i,
        i + accumulate, ..., so that a batch sharded over devices is divided where it lies.
        Metrics of any shape are combined by their dtype: floating and complex ones are averaged over micro-batches, as
        the loss is; integer ones are counts, and are added up, in 32 bits or more. So return a mean as a floating
        number and a sum over examples as an integer. Booleans have no such meaning and are an error, and so is a
        metric with an axis of examples.
      policy: a policy of `jax.checkpoint` for the whole loss, such as `save_statistics`.
      donate: whether the memory of the state that comes in is used for the one that goes out. It is deleted then.

    Returns:
      `step(state, batch)`: the new state, and `{"loss": ..., **metrics}`. Over sharded arrays it is global by itself.

    Raises:
      TypeError, ValueError: if `accumulate` is not positive; while tracing, for a state that is not a `TrainState`,
        metrics that are not a dictionary, and, with micro-batches, if `accumulate` does not divide the batch, if a
        layer with running statistics gives no moments to accumulate, if a metric cannot be combined, or if another
        collection changes its shapes.

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
    merging = accumulate > 1

    def objective(params, state, left, batch, index):
        mutable = ["batch_stats", *state.collections, *["batch_moments"] * merging]
        model = Model(state.apply_fn, {"params": params, **left}, mutable, _keys(state, index))
        value, metrics = _with_metrics(loss(model, batch, True))
        return value, (metrics, {name: model.variables.get(name, {}) for name in mutable})

    if policy is not None:
        objective = jax.checkpoint(objective, policy=policy)

    def part(state, left, batch, index):
        """Gradients and metrics of one micro-batch, and the collections that it leaves, from those that were left."""
        (_, (metrics, left)), gradients = jax.value_and_grad(objective, has_aux=True)(
            state.params, state, left, batch, index
        )
        return (gradients, metrics), left

    def whole(state, batch):
        """Those of all micro-batches. Each starts from the statistics before the step and the moments so far."""
        before = {"batch_stats": state.batch_stats}
        batches = jax.tree.map(lambda leaf: _divided(leaf, accumulate), batch)
        first = jax.tree.map(lambda leaf: leaf[0], batches)
        shapes, left = jax.eval_shape(part, state, before | state.collections, first, 0)
        trees.check_collected("train_step(accumulate=...)", state.batch_stats, left["batch_moments"])
        _check_combinable(shapes[1], lambda: jax.eval_shape(part, state, before | state.collections, batch, 0)[0][1])
        _check_same(state.collections, {name: left[name] for name in state.collections})

        def add(carry, inputs):
            total, left = carry
            one, left = part(state, left | before, *inputs)
            return (jax.tree.map(lambda sum, leaf: sum + leaf.astype(sum.dtype), total, one), left), None

        sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _summable(leaf.dtype)), shapes)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), left)
        (total, left), _ = jax.lax.scan(add, (sums, nothing | state.collections), (batches, jnp.arange(accumulate)))
        return jax.tree.map(lambda sum, leaf: _combined(sum, accumulate, leaf.dtype), total, shapes), left

    def step(state, batch):
        _check_state("train_step", state)
        before = {"batch_stats": state.batch_stats, **state.collections}
        (gradients, metrics), left = whole(state, batch) if merging else part(state, before, batch, 0)
        collections = {name: left[name] for name in state.collections}
        return state.apply_gradients(grads=gradients, batch_stats=left["batch_stats"], collections=collections), metrics

    return jax.jit(step, donate_argnums=0 if donate else ())


def eval_step(loss: Loss) -> Callable[[TrainState, Any], dict[str, Array]]:
    """A compiled evaluation: `step(state, batch)` is `{"loss": ..., **metrics}`.

    Args:
      loss: that of `train_step`, called with train=False. Nothing is mutable, and there are no keys for random numbers.
    """

    def step(state, batch):
        _check_state("eval_step", state)
        variables = {"params": state.params, "batch_stats": state.batch_stats, **state.collections}
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


def _check_state(call, state):
    if not isinstance(state, TrainState):
        raise TypeError(
            f"{call}(...)(state=...): expected bnjax.training.TrainState, got {type(state).__module__}."
            f"{type(state).__name__}, which has no running statistics. Make one by TrainState.create."
        )


def _keys(state, index):
    """The keys of this step's micro-batch `index`."""
    if state.rngs is None:
        return None
    return {name: jax.random.fold_in(jax.random.fold_in(key, state.step), index) for name, key in state.rngs.items()}


def _with_metrics(result):
    value, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if isinstance(value, tuple) or not isinstance(metrics, Mapping):
        raise TypeError(
            "loss(...): expected the loss, or the loss and a dictionary of metrics, got "
            f"{type(result).__name__ if isinstance(value, tuple) else f'a {type(metrics).__name__} of metrics'}. "
            'Return loss, {"accuracy": accuracy}, say.'
        )
    if "loss" in metrics:
        raise ValueError("loss(...): its metrics hold a 'loss', but that names what it returns. Name it otherwise.")
    return value, {"loss": value, **{name: jnp.asarray(metric) for name, metric in metrics.items()}}


def _summable(dtype):
    """The dtype to add up values of `dtype` in: of its kind, with 32 bits or more."""
    kinds = {jnp.inexact: jnp.float32, jnp.signedinteger: jnp.int32, jnp.unsignedinteger: jnp.uint32}
    wide = next(wide for kind, wide in kinds.items() if jnp.issubdtype(dtype, kind))
    return max(jnp.dtype(dtype), jnp.dtype(wide), key=lambda d: d.itemsize)


def _combined(total, number, dtype):
    """Of the sum over micro-batches: the mean of floating and complex numbers, and the sum of integers."""
    return (total / number).astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else total


def _check_combinable(metrics, of_whole_batch):
    """Every metric is floating, complex or integer, and has the shape that it has for the whole batch."""
    for name, metric in metrics.items():
        if not jnp.issubdtype(metric.dtype, jnp.number):
            raise TypeError(
                f"loss(...): the metric {name!r} is {metric.dtype}, which micro-batches cannot be combined in. "
                "Return a fraction, which is averaged, or an integer count, which is added up."
            )
    if all(metric.ndim == 0 for metric in metrics.values()):
        return
    for name, metric in of_whole_batch().items():
        if metric.shape != metrics[name].shape:
            raise ValueError(
                f"loss(...): the metric {name!r} has shape {metrics[name].shape} for a micro-batch and {metric.shape} "
                "for the batch. It has an axis of examples, and micro-batches are averaged or added up: reduce it."
            )


def _check_same(before, after):
    """Collections that micro-batches hand on keep their structure, shapes and dtypes."""
    for name, tree in before.items():
        old, new = (jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), t) for t in (tree, after[name]))
        if old != new:
            raise ValueError(
                f"train_step(accumulate=...): the collection {name!r} changes from {old} to {new} in a forward pass. "
                "Initialize it as training leaves it, or leave it out of TrainState.create."
            )


def _divided(leaf, accumulate):
    """Rows i, i + accumulate, ... for each i: cut this way a row stays on the device where it lies."""
    if jnp.ndim(leaf) == 0 or len(leaf) % accumulate:
        raise ValueError(
            f"train_step(accumulate={accumulate}): an array of the batch has shape {jnp.shape(leaf)}. Its first axis "
            f"must be a multiple of {accumulate}: pad it and mask the loss, or leave the last batch out."
        )
    return jnp.moveaxis(jnp.reshape(leaf, (-1, accumulate, *leaf.shape[1:])), 1, 0)
