"""Training of many runs at once, all seeds and settings in one `vmap`, on all devices of a mesh. Each device has a
shard of every batch."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.harness import data
from experiments.harness.checkpoints import Checkpoints
from experiments.harness.runtime import AXIS, Runtime, put

Probe = Callable[[Any, Any], dict[str, Array]]
"""A function from params and state of one run to additional metrics."""


class Apply(Protocol):
    """A network, which returns logits and its new state. In training, batch normalization needs `mask`, of shape
    (batch, 1), which is False for padding, and `axis_name`, the mapped axis along which the batch is sharded."""

    def __call__(
        self, params: Any, state: Any, x: Array, train: bool, *, mask: Array | None = None, axis_name: str | None = None
    ) -> tuple[Array, Any]: ...


class Learner(NamedTuple):
    """The state of training: parameters, running statistics, the optimizer's state, the sum of the training losses
    since the last evaluation, and the setting, by name, which is constant."""

    params: Any
    state: Any
    opt_state: Any
    loss: Array
    setting: dict[str, Array] = {}  # never changed


class Evaluation(NamedTuple):
    """The metrics of all runs after a step. Runs are ordered by setting, then by seed.

    `progress` is the fraction of all steps that is done. `loss`, of shape (runs,), is the mean training loss since the
    last evaluation, and nan at step 0. `values`, by name and of shape (runs, ...), contains `test_accuracy`, which is
    nan for a diverged network (with a logit that is not finite), and the metrics of the probe.
    """

    step: int
    progress: float
    loss: np.ndarray
    values: dict[str, np.ndarray]


def fit(
    init: Callable[..., tuple[Any, Any]],
    apply: Apply,
    optimizer: Callable[..., optax.GradientTransformation],
    dataset: data.Dataset,
    *,
    seeds: int,
    steps: int,
    batch_size: int,
    eval_every: int,
    settings: Sequence[dict[str, float]] = ({},),
    probe: Probe | None = None,
    runtime: Runtime | None = None,
    checkpoints: Path | None = None,
) -> Iterator[Evaluation]:
    """Train by cross-entropy from `seeds` initializations in each setting, each with batches in its seed's order.

    Args:
      init: function from a key, and a setting as keywords, to (params, state).
      apply: function from params, state, images of shape (batch, pixels) and train to logits and state.
      optimizer: function from a setting as keywords to an optax transformation.
      dataset: images and labels.
      seeds: number of runs in each setting, with the keys 0, 1, ...
      steps: number of updates per run.
      batch_size: images per update, over all devices; the last batch of an epoch has the remaining images.
      eval_every: number of updates between evaluations on the whole test set.
      settings: dictionaries of numbers with the same names; all settings are trained in one `vmap`.
      probe: function for additional metrics.
      runtime: devices, and the interval of checkpoints; by default one device.
      checkpoints: folder to save to. If it contains a checkpoint, training continues from it.

    Returns:
      An iterator over evaluations, before the first step, then every `eval_every` steps and after the last. If training
      continues from a checkpoint, the evaluations before it are included.

    Raises:
      InputError: if a batch is larger than the training set.
    """
    if not 0 < batch_size <= len(dataset.train_images):
        raise data.InputError(
            f"batch_size={batch_size}: expected 1 to {len(dataset.train_images)}, the size of {dataset.name}."
        )
    runtime = runtime or Runtime(devices=1)
    mesh = runtime.mesh()

    def start(setting, seed):
        params, state = init(jax.random.key(seed), **setting)
        setting = {name: jnp.float32(value) for name, value in setting.items()}
        return Learner(params, state, optimizer(**setting).init(params), jnp.zeros(()), setting)

    # In a loop: under vmap or jit, XLA would take longer to compile the random numbers than the training.
    starts = [start(setting, seed) for setting in settings for seed in range(seeds)]
    learner = jax.tree.map(lambda *leaves: _stacked(leaves, mesh), *starts)
    evaluate = _evaluator(apply, probe, dataset, mesh)
    store = None if checkpoints is None else Checkpoints(checkpoints, runtime.checkpoint_keep)
    found = store.restore(learner) if store else None
    if found:
        done, learner, record = found
        evaluations = [_unpacked(*packed) for packed in record]
    else:
        done, unknown = 0, np.full(len(starts), np.nan, np.float32)
        evaluations = [Evaluation(0, 0.0, unknown, evaluate(learner))]

    def train() -> Iterator[Evaluation]:
        nonlocal learner, done
        yield from evaluations
        if done == steps:
            return
        update = updater(apply, optimizer, mesh, runtime.parallel)
        images, labels = (put(x, mesh) for x in (data.flat(dataset.train_images), dataset.train_labels))
        cuts = [eval_every, runtime.checkpoint_every] if store else [eval_every]
        while done < steps:
            count = min(steps, *(done - done % cut + cut for cut in cuts)) - done
            indices, weights = _parts(mesh, len(images), batch_size, seeds, done, count, min(eval_every, steps))
            learner, done = update(learner, indices, weights, np.int32(count), images, labels), done + count
            evaluated = done == steps or done % eval_every == 0
            if evaluated:
                loss = np.asarray(learner.loss) / np.float32(done - evaluations[-1].step)
                evaluations.append(Evaluation(done, done / steps, loss, evaluate(learner)))
                learner = learner._replace(loss=put(np.zeros(len(starts), np.float32), mesh))
            if store and (done == steps or done % runtime.checkpoint_every == 0):
                store.save(done, learner, [_packed(evaluation) for evaluation in evaluations])
            if evaluated:
                yield evaluations[-1]

    return train()


def _stacked(leaves: Sequence[Array], mesh: Mesh) -> Array:
    if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key):
        stacked = _stacked([jax.random.key_data(key) for key in leaves], mesh)
        return jax.random.wrap_key_data(stacked, impl=jax.random.key_impl(leaves[0]))
    return put(np.stack(leaves), mesh)


def _packed(evaluation: Evaluation) -> list[Any]:
    values = {name: value.tolist() for name, value in evaluation.values.items()}
    return [*evaluation[:2], evaluation.loss.tolist(), values]


def _unpacked(step: int, progress: float, loss: list[float], values: dict[str, Any]) -> Evaluation:
    arrays = {name: np.array(value, np.float32) for name, value in values.items()}
    return Evaluation(step, progress, np.array(loss, np.float32), arrays)


def _parts(mesh: Mesh, number: int, batch_size: int, seeds: int, first: int, steps: int, length: int) -> list[Array]:
    """Indices and weights of batches, of shape (seeds, length, size), of which the first `steps` rows are used."""
    size = _multiple(batch_size, mesh.size)
    chunk = [data.batches(number, batch_size, seed, first, steps, size) for seed in range(seeds)]
    unused = ((0, 0), (0, length - steps), (0, 0))  # one shape, and so one compiled program, for every number of steps
    return [put(np.pad(np.stack(x), unused), mesh, None, None, AXIS) for x in zip(*chunk, strict=True)]


def updater(
    apply: Apply,
    optimizer: Callable[..., optax.GradientTransformation],
    mesh: Mesh,
    parallel: Literal["jit", "shard_map"],
) -> Callable[[Learner, Array, Array, Any, Array, Array], Learner]:
    """The compiled function that trains all runs for some steps.

    Args:
      apply, optimizer: see `fit`.
      mesh: devices along `AXIS`.
      parallel: "jit", where the compiler shards the computation and statistics are global, or "shard_map", where each
        device has its shard and sums run over the named axis.

    Returns:
      A function of the Learner, whose leaves have a leading axis of runs, and whose memory is donated; the indices and
      weights of `data.batches`, of shape (seeds, steps, size), sharded along the last axis; the number of steps to
      take; and the training images and labels.
    """
    named = AXIS if parallel == "shard_map" else None

    def step(learner, indices, weights, images, labels):
        def loss(params):
            logits, state = apply(
                params, learner.state, images[indices], True, mask=weights[:, None] > 0, axis_name=named
            )
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[indices])
            # This device's term of the mean loss. shard_map, like jit, sums its gradient over devices.
            return weights @ each, state

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(learner.params)
        value = jax.lax.psum(value, named) if named else value
        updates, opt_state = optimizer(**learner.setting).update(gradients, learner.opt_state, learner.params)
        params = optax.apply_updates(learner.params, updates)
        return Learner(params, state, opt_state, learner.loss + value, learner.setting)

    def update(learner, indices, weights, count, images, labels):
        settings = len(learner.loss) // len(indices)

        def body(i, learner):
            now = (jnp.tile(part[:, i], (settings, 1)) for part in (indices, weights))
            return jax.vmap(partial(step, images=images, labels=labels))(learner, *now)

        # A scan of a fixed length would give another program, with other rounding, for each way to interrupt training.
        return jax.lax.fori_loop(0, count, body, learner)

    if named:
        batch = P(None, None, AXIS)
        update = jax.shard_map(update, mesh=mesh, in_specs=(P(), batch, batch, P(), P(), P()), out_specs=P())
    return jax.jit(update, donate_argnums=0, out_shardings=NamedSharding(mesh, P()))


def accuracy(apply: Apply, params: Any, state: Any, images: Array, labels: Array, number: int | None = None) -> Array:
    """The accuracy on the images, or on the first `number` of them; nan if the network has diverged."""
    logits, _ = apply(params, state, images, False)
    # The argmax of nan is 0, so a diverged network would otherwise score the share of class 0.
    return jnp.where(jnp.isfinite(logits).all(), (logits.argmax(-1) == labels).sum() / (number or len(labels)), jnp.nan)


def cross_entropy(
    apply: Callable[..., tuple[Array, Any]], params: Any, state: Any, images: Array, labels: Array
) -> Array:
    """The mean cross-entropy over a batch, in training."""
    logits, _ = apply(params, state, images, True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def probe_accuracy(apply: Apply, dataset: data.Dataset) -> Probe:
    """A probe that measures the accuracy on the training set."""
    images, labels = data.flat(dataset.train_images), dataset.train_labels
    return lambda params, state: {
        "train_accuracy": accuracy(apply, params, state, jnp.asarray(images), jnp.asarray(labels))
    }


def _evaluator(
    apply: Apply, probe: Probe | None, dataset: data.Dataset, mesh: Mesh
) -> Callable[[Learner], dict[str, np.ndarray]]:
    """A function for test accuracy and the probe's metrics of all runs. The test set is sharded over the devices."""
    number = len(dataset.test_images)
    padded = np.arange(_multiple(number, mesh.size)) % number
    images, labels = data.flat(dataset.test_images)[padded], dataset.test_labels[padded]
    labels[number:] = -1  # no prediction equals it
    images, labels = (put(x, mesh, AXIS) for x in (images, labels))

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    @partial(jax.vmap, in_axes=(0, 0, None, None))
    def values(params, state, images, labels):
        known = probe(params, state) if probe else {}
        return {"test_accuracy": accuracy(apply, params, state, images, labels, number), **known}

    return lambda learner: jax.tree.map(np.asarray, values(learner.params, learner.state, images, labels))


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
