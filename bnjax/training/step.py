"""A compiled training step and evaluation, gradient accumulation, and rematerialization.

A model is any function with the signature of Linen's `Module.apply`: `apply_fn(variables, *args, mutable=, rngs=)`.
`bnjax.nnx.functional` returns such a function for an NNX model. This module has no training loop, no data and no loss.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bnjax.core import checks, frozen, trees
from bnjax.core.residuals import STATISTICS
from bnjax.training.state import TrainState, check_alive, check_unshared

Loss = Callable[["Model", Any, bool], Array | tuple[Array, Mapping[str, Array]]]

_DOTS_AND_STATISTICS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(STATISTICS)
)


def save_statistics(prim: Any, *args: Any, **params: Any) -> Any:
    """Policy for `jax.checkpoint` that saves batch statistics, and the outputs of dot products and convolutions.

    The backward pass then recomputes the normalization and the activation, which are elementwise, but no reduction over
    the batch and no collective. Applied to a whole network, the policy stores one residual for each block of
    convolution, batch normalization and nonlinearity; a `jax.checkpoint` around each block stores the blocks' inputs as
    well.

    Args:
      prim, *args, **params: the operation, as `jax.checkpoint` passes it to a policy.

    Returns:
      Whether the results of the operation are saved.

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


class Model:
    """The model with its variables, which a loss calls. Each call reads the running statistics of the call before.

    A loss must not call it inside a transformation of its own (`jax.checkpoint`, `lax.scan`): the updated variables
    would be tracers that leave the transformation, which is an error.
    """

    def __init__(self, apply_fn: Callable[..., Any], variables: dict[str, Any], mutable: list[str], rngs: Any):
        self.variables: dict[str, Any] = variables
        self._apply, self._mutable, self._rngs = apply_fn, mutable, rngs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for these arguments."""
        if self._rngs is not None:
            kwargs = {"rngs": self._rngs, **kwargs}
        if not self._mutable:
            return self._apply(self.variables, *args, **kwargs)
        with frozen.model_called():
            output, updates = self._apply(self.variables, *args, mutable=self._mutable, **kwargs)
        self.variables = {**self.variables, **updates}
        return output


def train_step(
    loss: Loss, *, accumulate: int = 1, policy: Any = None, donate: bool = True
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Make a compiled training step.

        gradient = sum_i gradient_i / accumulate

    Scale and bias of layers with `frozen_params=True` stay unchanged under every optimizer; a gradient of 0 would not
    keep weight decay from shrinking them.

    Args:
      loss: `loss(model, batch, train)` calls `model` like the module and returns the loss, or the loss and a dictionary
        of metrics. `train` is True here and False in `eval_step`.
      accumulate: number of micro-batches, > 0, which run in sequence and whose gradients are averaged. Each micro-batch
        is normalized by its own statistics. The running statistics are updated once, by the merged moments of all
        micro-batches; a layer that is called several times in a forward pass is updated once per call, by the moments
        merged so far. Every array of the batch is divided along its first axis, whose size must be a multiple of
        `accumulate`. Micro-batch i has the rows i, i + accumulate, ...; contiguous rows would move data between devices
        if the batch is sharded. Metrics of any shape are combined by their dtype. Floating and complex metrics are
        averaged over micro-batches, like the loss; integer metrics are counts, which are summed in 32 bits or more. So
        return a mean as a floating number and a sum over examples as an integer. A metric that is boolean or has a
        batch axis is an error.
      policy: policy of `jax.checkpoint` for the whole loss, such as `save_statistics`.
      donate: whether the new state reuses the memory of the old one. The old arrays are then deleted, also under other
        names such as `ema = state.params`. Copy what is kept, `jax.tree.map(jnp.copy, state.params)`.

    Returns:
      `step(state, batch)`, which returns the new state and `{"loss": ..., **metrics}`. With sharded arrays the result
      is that of the global batch.

    Raises:
      TypeError, ValueError: if `accumulate` is not positive. In a call: for a state that an earlier step deleted, and
        if a donated state holds one array twice. While tracing: for a state that is not a `TrainState` and for metrics
        that are not a dictionary; with micro-batches also if `accumulate` does not divide the batch, if a layer with
        running statistics collects no moments, if a metric cannot be combined, or if another collection
        changes its shapes.

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

    def objective(params, state, collections, batch, index):
        mutable = ["batch_stats", *state.collections, *["batch_moments"] * merging]
        model = Model(state.apply_fn, {"params": params, **collections}, mutable, _keys(state, index))
        value, metrics = _with_metrics(loss(model, batch, True))
        return value, (metrics, {name: model.variables.get(name, {}) for name in mutable})

    if policy is not None:
        objective = jax.checkpoint(objective, policy=policy)

    def one_batch(state, collections, batch, index):
        """Gradients and metrics of one micro-batch, and the collections after it, given the collections before it."""
        (_, (metrics, updated)), gradients = jax.value_and_grad(objective, has_aux=True)(
            state.params, state, collections, batch, index
        )
        return (gradients, metrics), updated

    def accumulated(state, batch):
        """Gradients, metrics and collections of all micro-batches.

        Each micro-batch starts from the running statistics before the step and the moments merged so far. The running
        statistics after the last one are therefore updated once, by the moments of all.
        """
        statistics = {"batch_stats": state.batch_stats}
        batches = jax.tree.map(lambda leaf: _divided(leaf, accumulate), batch)

        def shapes_of(batch):
            return jax.eval_shape(one_batch, state, statistics | state.collections, batch, 0)

        shapes, updated = shapes_of(jax.tree.map(lambda leaf: leaf[0], batches))
        trees.check_collected("train_step(accumulate=...)", state.batch_stats, updated["batch_moments"])
        _check_combinable(shapes[1], lambda: shapes_of(batch)[0][1])
        _check_same(state.collections, {name: updated[name] for name in state.collections})

        def add(carry, inputs):
            total, collections = carry
            one, collections = one_batch(state, collections | statistics, *inputs)
            return (jax.tree.map(lambda sum, leaf: sum + leaf.astype(sum.dtype), total, one), collections), None

        sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _summable(leaf.dtype)), shapes)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), updated)
        (total, updated), _ = jax.lax.scan(add, (sums, zeros | state.collections), (batches, jnp.arange(accumulate)))
        return jax.tree.map(lambda sum, leaf: _combined(sum, accumulate, leaf.dtype), total, shapes), updated

    def step(state, batch):
        _check_state("train_step", state)
        before = {"batch_stats": state.batch_stats, **state.collections}
        with frozen.listening() as layers:
            (gradients, metrics), updated = accumulated(state, batch) if merging else one_batch(state, before, batch, 0)
        changes = {"batch_stats": updated["batch_stats"], "collections": {n: updated[n] for n in state.collections}}
        new = state.apply_gradients(grads=gradients, **changes)
        return new.replace(params=layers.unchanged(new.params, state.params)), metrics

    return _Step("train_step", jax.jit(step, donate_argnums=0 if donate else ()), donate)


def eval_step(loss: Loss) -> Callable[[TrainState, Any], dict[str, Array]]:
    """Make a compiled evaluation step.

    Args:
      loss: as in `train_step`; it is called with train=False, without mutable collections and without keys.

    Returns:
      `step(state, batch)`, which returns `{"loss": ..., **metrics}`.

    Raises:
      TypeError, ValueError: for a state that a training step deleted; while tracing, for a state that is not a
        `TrainState` and for metrics that are not a dictionary.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from bnjax.training import TrainState, eval_step
      >>> def apply(variables, x):
      ...     return variables["params"]["scale"] * x
      >>> state = TrainState.create(apply_fn=apply, params={"scale": 2.0}, tx=optax.sgd(0.1))
      >>> eval_step(lambda model, batch, train: jnp.mean(model(batch)))(state, jnp.ones(3))["loss"].tolist()
      2.0
    """

    def step(state, batch):
        _check_state("eval_step", state)
        variables = {"params": state.params, "batch_stats": state.batch_stats, **state.collections}
        return _with_metrics(loss(Model(state.apply_fn, variables, [], None), batch, False))[1]

    return _Step("eval_step", jax.jit(step))


class _Step:
    """A compiled step, which first checks that the arrays of its state exist: XLA's own error names no state."""

    def __init__(self, call: str, compiled: Any, donate: bool = False):
        self._call, self._compiled, self._donate = f"{call}(...)(state=...)", compiled, donate

    def __call__(self, state: Any, batch: Any) -> Any:
        for name in ("params", "batch_stats"):
            trees.check_no_report(f"{self._call.removesuffix('=...)')}.{name})", getattr(state, name, None))
        arrays = check_alive(self._call, state)
        if self._donate:
            check_unshared(self._call, state, arrays)
        return self._compiled(state, batch)

    def __getattr__(self, name: str) -> Any:  # of the compiled function: lower, trace, clear_cache
        if name == "_compiled":  # missing while copied or unpickled
            raise AttributeError(name)
        return getattr(self._compiled, name)


def _check_state(call, state):
    if not isinstance(state, TrainState):
        raise TypeError(
            f"{call}(...)(state=...): expected bnjax.training.TrainState, got {type(state).__module__}."
            f"{type(state).__name__}, which has no running statistics. Call bnjax.training.TrainState.create."
        )


def _keys(state, index):
    """The keys of micro-batch `index` of this step."""
    if state.rngs is None:
        return None
    return {name: jax.random.fold_in(jax.random.fold_in(key, state.step), index) for name, key in state.rngs.items()}


def _with_metrics(result):
    value, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if isinstance(value, tuple) or not isinstance(metrics, Mapping):
        raise TypeError(
            "loss(...): expected the loss, or the loss and a dictionary of metrics, got "
            f"{type(result).__name__ if isinstance(value, tuple) else f'a {type(metrics).__name__} of metrics'}. "
            'For example, return loss, {"accuracy": accuracy}.'
        )
    if "loss" in metrics:
        raise ValueError("loss(...): its metrics hold a 'loss', the name of the loss itself. Rename this metric.")
    return value, {"loss": value, **{name: jnp.asarray(metric) for name, metric in metrics.items()}}


def _summable(dtype):
    """The dtype in which values of `dtype` are summed: of its kind, with 32 bits or more."""
    kinds = {jnp.inexact: jnp.float32, jnp.signedinteger: jnp.int32, jnp.unsignedinteger: jnp.uint32}
    wide = next(wide for kind, wide in kinds.items() if jnp.issubdtype(dtype, kind))
    return max(jnp.dtype(dtype), jnp.dtype(wide), key=lambda d: d.itemsize)


def _combined(total, number, dtype):
    """The result of a sum over micro-batches: the mean of floating and complex numbers, the sum of integers."""
    return (total / number).astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else total


def _check_combinable(metrics, of_whole_batch):
    """Check that every metric is numeric, and has the same shape for a micro-batch as for the whole batch."""
    for name, metric in metrics.items():
        if not jnp.issubdtype(metric.dtype, jnp.number):
            raise TypeError(
                f"loss(...): the metric {name!r} is {metric.dtype}, which cannot be combined over micro-batches. "
                "Return a fraction, which is averaged, or an integer count, which is summed."
            )
    if all(metric.ndim == 0 for metric in metrics.values()):
        return
    for name, metric in of_whole_batch().items():
        if metric.shape != metrics[name].shape:
            raise ValueError(
                f"loss(...): the metric {name!r} has shape {metrics[name].shape} for a micro-batch and {metric.shape} "
                "for the batch, so it has a batch axis. Reduce it: micro-batches are averaged or summed."
            )


def _check_same(before, after):
    """Check that a forward pass keeps the structure, shapes and dtypes of the collections, as a scan requires."""
    for name, tree in before.items():
        old, new = (jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), t) for t in (tree, after[name]))
        if old != new:
            raise ValueError(
                f"train_step(accumulate=...): the collection {name!r} changes from {old} to {new} in a forward pass. "
                "Initialize it with the shapes that it has after training, or leave it out of TrainState.create."
            )


def _divided(leaf, accumulate):
    """Rows i, i + accumulate, ... for each i. Contiguous rows would move between devices if the batch is sharded."""
    if jnp.ndim(leaf) == 0 or len(leaf) % accumulate:
        raise ValueError(
            f"train_step(accumulate={accumulate}): an array of the batch has shape {jnp.shape(leaf)}. Its first axis "
            f"must be a multiple of {accumulate}: pad the batch and mask the loss, or drop the last batch."
        )
    return jnp.moveaxis(jnp.reshape(leaf, (-1, accumulate, *leaf.shape[1:])), 1, 0)
