"""Training of several seeds at once, one `vmap` over them, on all devices of a mesh: each has a part of every batch."""

from collections.abc import Callable, Iterator
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

from experiments import data
from experiments.checkpoints import Checkpoints
from experiments.runtime import AXIS, Runtime, put


class Apply(Protocol):
    """A network: logits and its new state. In training, `mask` of shape (batch, 1) says which examples are there, and
    `axis_name` along which mapped axis the batch is divided; batch normalization needs both."""

    def __call__(
        self, params: Any, state: Any, x: Array, train: bool, *, mask: Array | None = None, axis_name: str | None = None
    ) -> tuple[Array, Any]: ...


class Learner(NamedTuple):
    """What training moves: learned parameters, running statistics, the optimizer's memory, and the sum of the training
    losses since the last evaluation."""

    params: Any
    state: Any
    opt_state: Any
    loss: Array


class Evaluation(NamedTuple):
    """Per seed, of shape (seeds,): mean training loss since the last evaluation (nan at step 0), and test accuracy (nan
    where a logit is not finite: the network has diverged)."""

    step: int
    loss: np.ndarray
    accuracy: np.ndarray


def fit(
    init: Callable[[Array], tuple[Any, Any]],
    apply: Apply,
    optimizer: optax.GradientTransformation,
    dataset: data.Dataset,
    *,
    seeds: int,
    steps: int,
    batch_size: int,
    eval_every: int,
    runtime: Runtime | None = None,
    checkpoints: Path | None = None,
) -> Iterator[Evaluation]:
    """Train by cross-entropy from `seeds` initializations, each with batches in its own order.

    Args:
      init: from a key to (params, state).
      apply: from params, state, images of shape (batch, height * width) and train to logits and state.
      optimizer: an optax transformation.
      dataset: images and labels.
      seeds: number of runs, whose keys are 0, 1, ...
      steps: updates per run.
      batch_size: images per update, of all devices together; the last of an epoch has what is left.
      eval_every: updates between evaluations on the whole test set.
      runtime: which devices and how, and how often to save; by default all devices.
      checkpoints: folder to save to, and to go on from if it has a checkpoint.

    Returns:
      An iterator: an evaluation before the first step, then one every `eval_every` steps and after the last. Those
      before the checkpoint that training went on from are among them.

    Raises:
      InputError: if a batch is larger than the training set.
    """
    if not 0 < batch_size <= len(dataset.train_images):
        raise data.InputError(
            f"batch_size={batch_size}: expected 1 to {len(dataset.train_images)}, the size of {dataset.name}."
        )
    runtime = runtime or Runtime()
    mesh = runtime.mesh()

    def start(seed):
        params, state = init(jax.random.key(seed))
        return Learner(params, state, optimizer.init(params), jnp.zeros(()))

    # One by one: random numbers under vmap or jit would take XLA longer to compile than training does.
    learner = jax.tree.map(lambda *leaves: put(np.stack(leaves), mesh), *[start(seed) for seed in range(seeds)])
    evaluate = _evaluator(apply, dataset, mesh)
    store = None if checkpoints is None else Checkpoints(checkpoints, runtime.checkpoint_keep)
    found = store.restore(learner) if store else None
    if found:
        done, learner, record = found
        evaluations = [Evaluation(step, *np.array(values, np.float32)) for step, *values in record]
    else:
        done, evaluations = 0, [Evaluation(0, np.full(seeds, np.nan, np.float32), evaluate(learner))]

    def train() -> Iterator[Evaluation]:
        nonlocal learner, done
        yield from evaluations
        if done == steps:
            return
        update = updater(apply, optimizer, mesh, runtime.parallel)
        images, labels = (put(x, mesh) for x in (_flat(dataset.train_images), dataset.train_labels))
        cuts = [eval_every, runtime.checkpoint_every] if store else [eval_every]
        while done < steps:
            count = min(steps, *(done - done % cut + cut for cut in cuts)) - done
            indices, weights = _parts(mesh, len(images), batch_size, seeds, done, count, min(eval_every, steps))
            learner, done = update(learner, indices, weights, np.int32(count), images, labels), done + count
            evaluated = done == steps or done % eval_every == 0
            if evaluated:
                loss = np.asarray(learner.loss) / np.float32(done - evaluations[-1].step)
                evaluations.append(Evaluation(done, loss, evaluate(learner)))
                learner = learner._replace(loss=put(np.zeros(seeds, np.float32), mesh))
            if store and (done == steps or done % runtime.checkpoint_every == 0):
                store.save(done, learner, [[e.step, e.loss.tolist(), e.accuracy.tolist()] for e in evaluations])
            if evaluated:
                yield evaluations[-1]

    return train()


def _parts(mesh: Mesh, number: int, batch_size: int, seeds: int, first: int, steps: int, length: int) -> list[Array]:
    """Indices and weights of the batches of some steps, of shape (seeds, length, size), of which `steps` rows count."""
    size = _multiple(batch_size, mesh.size)
    chunk = [data.batches(number, batch_size, seed, first, steps, size) for seed in range(seeds)]
    unused = ((0, 0), (0, length - steps), (0, 0))  # one shape for every number of steps, thus one program
    return [put(np.pad(np.stack(x), unused), mesh, None, None, AXIS) for x in zip(*chunk, strict=True)]


def updater(
    apply: Apply, optimizer: optax.GradientTransformation, mesh: Mesh, parallel: Literal["jit", "shard_map"]
) -> Callable[[Learner, Array, Array, Any, Array, Array], Learner]:
    """The compiled training of all seeds by some steps.

    Args:
      apply: see `fit`.
      optimizer: an optax transformation.
      mesh: devices along `AXIS`.
      parallel: "jit", where the compiler divides the work and statistics are global by themselves, or "shard_map",
        where each device sees its part and sums run over the named axis.

    Returns:
      A function of the Learner, whose leaves have an axis of seeds and whose memory is given up; the indices and
      weights of `data.batches`, of shape (seeds, steps, size), divided along the last axis; how many of these steps to
      take; and the training images and labels.
    """
    named = AXIS if parallel == "shard_map" else None

    def step(learner, indices, weights, images, labels):
        def loss(params):
            logits, state = apply(
                params, learner.state, images[indices], True, mask=weights[:, None] > 0, axis_name=named
            )
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[indices])
            # This device's part of the mean: shard_map, like jit, makes of its gradient the sum over devices.
            return weights @ each, state

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(learner.params)
        value = jax.lax.psum(value, named) if named else value
        updates, opt_state = optimizer.update(gradients, learner.opt_state, learner.params)
        return Learner(optax.apply_updates(learner.params, updates), state, opt_state, learner.loss + value)

    def update(learner, indices, weights, count, images, labels):
        def body(i, learner):
            return jax.vmap(partial(step, images=images, labels=labels))(learner, indices[:, i], weights[:, i])

        # Not a scan of a fixed length: the program, and with it every bit, is the same wherever training is cut.
        return jax.lax.fori_loop(0, count, body, learner)

    if named:
        batch = P(None, None, AXIS)
        update = jax.shard_map(update, mesh=mesh, in_specs=(P(), batch, batch, P(), P(), P()), out_specs=P())
    return jax.jit(update, donate_argnums=0, out_shardings=NamedSharding(mesh, P()))


def _evaluator(apply: Apply, dataset: data.Dataset, mesh: Mesh) -> Callable[[Learner], np.ndarray]:
    """The test accuracy of all seeds, each device counting in its part of the test set."""
    number = len(dataset.test_images)
    padded = np.arange(_multiple(number, mesh.size)) % number
    images, labels = _flat(dataset.test_images)[padded], dataset.test_labels[padded]
    labels[number:] = -1  # no prediction equals it
    images, labels = (put(x, mesh, AXIS) for x in (images, labels))

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    @partial(jax.vmap, in_axes=(0, None, None))
    def accuracy(learner, images, labels):
        logits, _ = apply(learner.params, learner.state, images, False)
        # Without this a diverged network would score the share of class 0.
        return jnp.where(jnp.isfinite(logits).all(), (logits.argmax(-1) == labels).sum() / number, jnp.nan)

    return lambda learner: np.asarray(accuracy(learner, images, labels))


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
