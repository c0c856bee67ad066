"""Training of many runs, of all seeds and settings, in one program.

By default the runs are divided over the local devices, which then need not communicate. A CPU takes one run after the
other, in a loop, because kernels that differ from run to run make a convolution under `vmap` a grouped one, which takes
2.5 times as long there (a network of eight convolutions, 20 runs). Other devices train all their runs in one `vmap`.
With a `Runtime`, every run is on all of its devices, and each device has a shard of every batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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

from experiments.harness import data, scores, stream
from experiments.harness.checkpoints import Checkpoints
from experiments.harness.runtime import AXIS, RUNS, Runtime, put, runs_mesh

VIEWED = 500
"""The number of training images, at most, that a probe sees."""
AT_ONCE = 32
"""The number of runs, at most, that an accelerator evaluates at once, which bounds the memory of their activations."""

Setting = Mapping[str, float | Callable[[int], float]]
"""By name, the numbers that init and optimizer are called with. A function gives each seed a number of its own."""


class Apply(Protocol):
    """A network, which returns logits and its new state. In training, batch normalization needs `mask`, of shape
    (batch, 1), which is False for padding, or None if no batch is padded; and `axis_name`, the mapped axis along which
    the batch is sharded."""

    def __call__(
        self, params: Any, state: Any, x: Array, train: bool, *, mask: Array | None = None, axis_name: str | None = None
    ) -> tuple[Array, Any]: ...


class Learner(NamedTuple):
    """The state of training: parameters, running statistics, the optimizer's state, the sum of the training losses
    since the last evaluation, the place of the run's seed among the seeds, and the setting, by name. The last two are
    constant."""

    params: Any
    state: Any
    opt_state: Any
    loss: Array
    place: Array
    setting: dict[str, Array] = {}  # never changed


class View(NamedTuple):
    """What a probe sees of one run besides its variables: the first training images of its seed as rows of pixels,
    their labels, and the setting; and the test images and their labels. Metrics of the latter are named `test_...`."""

    images: Array
    labels: Array
    setting: dict[str, Array]
    test_images: Array
    test_labels: Array


Probe = Callable[[Any, Any, View], dict[str, Array]]
"""A function from params, state and the view of one run to additional metrics."""


class Evaluation(NamedTuple):
    """The metrics of all runs after a step. Runs are ordered by setting, then by seed.

    `progress` is the fraction of all steps that is done. `loss`, of shape (runs,), is the mean training loss since the
    last evaluation, and nan at step 0. `values`, by name and of shape (runs, ...), contains `validation_accuracy` and
    `validation_loss`, or `test_accuracy` and `test_loss`, or both (see `fit`), which are nan for a diverged network
    (with a logit that is not finite), and the metrics of the probe.
    """

    step: int
    progress: float
    loss: np.ndarray
    values: dict[str, np.ndarray]


def fit(
    init: Callable[..., tuple[Any, Any]],
    apply: Apply,
    optimizer: Callable[..., optax.GradientTransformation],
    dataset: data.Dataset | data.Splits,
    *,
    seeds: int | Sequence[int],
    steps: int,
    batch_size: int,
    eval_every: int | Sequence[int],
    settings: Sequence[Setting] = ({},),
    probe: Probe | None = None,
    with_images: bool = False,
    moving: bool = False,
    tests: bool = True,
    runtime: Runtime | None = None,
    checkpoints: Path | None = None,
) -> Iterator[Evaluation]:
    """Train by cross-entropy from the initialization of every seed in each setting, with batches in the seed's order.

    Args:
      init: function from a key, and a setting as keywords, to (params, state).
      apply: function from params, state, images of shape (batch, pixels) and train to logits and state.
      optimizer: function from a setting as keywords to an optax transformation.
      dataset: a data set, whose training and test parts all seeds share, or the splits of these seeds.
      seeds: the seeds, or their number n for 0, ..., n - 1. There is a run for each seed in each setting.
      steps: number of updates per run.
      batch_size: images per update, over all devices; the last batch of an epoch has the remaining images.
      eval_every: number of updates between evaluations, or the steps of these evaluations.
      settings: numbers, or functions of the seed, of the same names; all settings are trained in one program.
      probe: function for additional metrics.
      with_images: whether `init` gets the training images of its seed too, as rows of pixels, by the keyword `images`.
      moving: whether training images are shifted, rotated and scaled at random in every step (see `stream`).
      tests: whether test metrics, also those of the probe, are measured after the last step. Without validation images
        they are measured in all evaluations.
      runtime: devices that share every batch, and the interval of checkpoints. By default the runs are divided over
        the local devices.
      checkpoints: folder to save to. If it contains a checkpoint, training continues from it.

    Returns:
      An iterator over evaluations, before the first step, then every `eval_every` steps, or at those, and after the
      last. If training continues from a checkpoint, the evaluations before it are included.

    Raises:
      InputError: if a batch is larger than the training set.
    """
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    splits = _fixed(dataset, len(seeds)) if isinstance(dataset, data.Dataset) else dataset
    number = splits.train.shape[1]
    if not 0 < batch_size <= number:
        raise data.InputError(f"batch_size={batch_size}: expected 1 to {number}, the size of {splits.name}.")
    stops = _stops(eval_every, steps)
    longest = int(np.diff([0, *stops]).max())
    mesh = runtime.mesh() if runtime else runs_mesh()
    along = None if runtime else RUNS  # the axis of the mesh that the runs are divided over

    def start(setting, place):
        setting = {name: value(seeds[place]) if callable(value) else value for name, value in setting.items()}
        own = {"images": data.flat(splits.images[splits.train[place]])} if with_images else {}
        params, state = init(jax.random.key(seeds[place]), **own, **setting)
        setting = {name: jnp.float32(value) for name, value in setting.items()}
        return Learner(params, state, optimizer(**setting).init(params), jnp.zeros(()), jnp.int32(place), setting)

    # In a Python loop: under vmap or jit, XLA would take longer to compile the random numbers than the training.
    starts = [start(setting, place) for setting in settings for place in range(len(seeds))]
    runs = len(starts)
    if along:  # every device has the same number of runs: the first one is repeated, and its copies are left out
        starts += [starts[0]] * (_multiple(runs, mesh.size) - runs)
    learner = jax.tree.map(lambda *leaves: _stacked(leaves, mesh, along), *starts)
    evaluate = _evaluator(apply, probe, splits, mesh, along, runs, tests)
    store = None if checkpoints is None or not runtime else Checkpoints(checkpoints, runtime.checkpoint_keep)
    found = store.restore(learner) if store else None
    if found:
        done, learner, record = found
        evaluations = [_unpacked(*packed) for packed in record]
    else:
        done, unknown = 0, np.full(runs, np.nan, np.float32)
        evaluations = [Evaluation(0, 0.0, unknown, evaluate(learner, steps == 0))]

    def train() -> Iterator[Evaluation]:
        nonlocal learner, done
        yield from evaluations
        if done == steps:
            return
        padded = bool(number % batch_size or (runtime and batch_size % mesh.size))
        update = updater(apply, optimizer, mesh, runtime.parallel if runtime else "runs", moving, padded)
        images = put(splits.images if moving else data.flat(splits.images), mesh)
        labels = put(splits.labels, mesh)
        while done < steps:
            stop = stops[np.searchsorted(stops, done, "right")]
            if store and runtime:
                stop = min(stop, done - done % runtime.checkpoint_every + runtime.checkpoint_every)
            count = int(stop) - done
            batch = _parts(mesh, along, splits.train, batch_size, seeds, done, count, longest, moving)
            learner, done = update(learner, batch, np.int32(count), images, labels), done + count
            evaluated = done in stops
            if evaluated:
                loss = np.asarray(learner.loss)[:runs] / np.float32(done - evaluations[-1].step)
                evaluations.append(Evaluation(done, done / steps, loss, evaluate(learner, done == steps)))
                learner = learner._replace(loss=put(np.zeros(len(starts), np.float32), mesh, along))
            if store and runtime and (done == steps or done % runtime.checkpoint_every == 0):
                store.save(done, learner, [_packed(evaluation) for evaluation in evaluations])
            if evaluated:
                yield evaluations[-1]

    return train()


def _stops(eval_every: int | Sequence[int], steps: int) -> list[int]:
    """The steps after which runs are evaluated, in order; the last one is always evaluated."""
    steps_of = range(eval_every, steps, eval_every) if isinstance(eval_every, int) else eval_every
    return [*sorted({step for step in steps_of if 0 < step < steps}), steps]


def _fixed(dataset: data.Dataset, seeds: int) -> data.Splits:
    """The data set's own training and test parts for all seeds, without validation images."""
    images = np.concatenate([dataset.train_images, dataset.test_images])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    number = len(dataset.train_labels)
    train, test = (np.tile(part.astype(np.int32), (seeds, 1)) for part in np.split(np.arange(len(labels)), [number]))
    return data.Splits(dataset.name, images, np.tile(labels, (seeds, 1)), train, train[:, :0], test)


def _stacked(leaves: Sequence[Array], mesh: Mesh, along: str | None) -> Array:
    if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key):
        stacked = _stacked([jax.random.key_data(key) for key in leaves], mesh, along)
        return jax.random.wrap_key_data(stacked, impl=jax.random.key_impl(leaves[0]))
    return put(np.stack(leaves), mesh, along)


def _packed(evaluation: Evaluation) -> list[Any]:
    values = {name: value.tolist() for name, value in evaluation.values.items()}
    return [*evaluation[:2], evaluation.loss.tolist(), values]


def _unpacked(step: int, progress: float, loss: list[float], values: dict[str, Any]) -> Evaluation:
    arrays = {name: np.array(value, np.float32) for name, value in values.items()}
    return Evaluation(step, progress, np.array(loss, np.float32), arrays)


class Batches(NamedTuple):
    """The batches of some steps: the images' indices, their weights, and their motions, if they move. The shapes are
    (seeds, steps, size), and for motions (seeds, steps, size, 4)."""

    indices: Array
    weights: Array
    motions: Array | None


def _parts(
    mesh: Mesh,
    along: str | None,
    train: np.ndarray,
    batch_size: int,
    seeds: Sequence[int],
    first: int,
    steps: int,
    length: int,
    moving: bool,
) -> Batches:
    """The batches of the steps from `first` on, of `length` steps, of which only the first `steps` are used."""
    size = batch_size if along else _multiple(batch_size, mesh.size)
    drawn = [data.batches(train.shape[1], batch_size, seed, first, steps, size) for seed in seeds]
    indices, weights = (np.stack(x) for x in zip(*drawn, strict=True))
    indices = np.take_along_axis(train, indices.reshape(len(seeds), -1), 1).reshape(indices.shape)
    motions = np.stack([stream.motions(seed, first, steps, size) for seed in seeds]) if moving else None

    def padded(x):
        # One shape, and so one compiled program, for every number of steps.
        unused = ((0, 0), (0, length - steps), *[(0, 0)] * (x.ndim - 2))
        return put(np.pad(x, unused), mesh, None, None, None if along else AXIS)

    return Batches(padded(indices), padded(weights), None if motions is None else padded(motions))


def updater(
    apply: Apply,
    optimizer: Callable[..., optax.GradientTransformation],
    mesh: Mesh,
    parallel: Literal["jit", "shard_map", "runs"],
    moving: bool = False,
    padded: bool = True,
) -> Callable[[Learner, Batches, Any, Array, Array], Learner]:
    """The compiled function that trains all runs for some steps.

    Args:
      apply, optimizer, moving: see `fit`.
      mesh: devices along `AXIS`, or along `RUNS`.
      parallel: "jit", where the compiler shards the computation and statistics are global; "shard_map", where each
        device has its shard and sums run over the named axis; or "runs", where each device has some of the runs.
      padded: whether a batch may have padding. Otherwise there is no mask, which takes time.

    Returns:
      A function of the Learner, whose leaves have a leading axis of runs, and whose memory is donated; the batches,
      sharded along the last axis of their indices unless runs are divided; the number of steps to take; all images, as
      rows of pixels unless they move; and the labels of each seed.
    """
    named = AXIS if parallel == "shard_map" else None
    alone = parallel == "runs" and _on_cpu(mesh)

    def step(learner, indices, weights, motions, images, labels):
        chosen, weight = indices[learner.place], weights[learner.place]
        x, y = images[chosen], labels[learner.place][chosen]
        if motions is not None:
            x = stream.moved(x, motions[learner.place]).reshape(len(x), -1)

        def loss(params):
            mask = weight[:, None] > 0 if padded else None
            logits, state = apply(params, learner.state, x, True, mask=mask, axis_name=named)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            # This device's term of the mean loss. shard_map, like jit, sums its gradient over devices.
            return weight @ each, state

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(learner.params)
        value = jax.lax.psum(value, named) if named else value
        updates, opt_state = optimizer(**learner.setting).update(gradients, learner.opt_state, learner.params)
        params = optax.apply_updates(learner.params, updates)
        return learner._replace(params=params, state=state, opt_state=opt_state, loss=learner.loss + value)

    def update(learner, batches, count, images, labels):
        def body(i, learner):
            indices, weights, motions = (None if part is None else part[:, i] for part in batches)
            every = step if alone else jax.vmap(step, (0, *[None] * 5))
            return every(learner, indices, weights, motions, images, labels)

        def steps(learner):
            # A scan of a fixed length would be another program, with other rounding, for each interruption of training.
            return jax.lax.fori_loop(0, count, body, learner)

        return jax.lax.map(steps, learner) if alone else steps(learner)

    learners = P(RUNS) if parallel == "runs" else P()
    if parallel != "jit":
        batch = P(None, None, AXIS) if named else P()
        parts: Any = (batch, batch, batch if moving else None)
        specs = (learners, Batches(*parts), P(), P(), P())
        # Runs do not communicate, so nothing has to be checked; a network may then have a mapped axis of its own.
        checked = parallel != "runs"
        update = jax.shard_map(update, mesh=mesh, in_specs=specs, out_specs=learners, check_vma=checked)
    return jax.jit(update, donate_argnums=0, out_shardings=NamedSharding(mesh, learners))


def _evaluator(
    apply: Apply, probe: Probe | None, splits: data.Splits, mesh: Mesh, along: str | None, runs: int, tests: bool
) -> Callable[[Learner, bool], dict[str, np.ndarray]]:
    """A function of the learner, and of whether this is the last evaluation, for the metrics of all runs. Unless runs
    are divided, the images are sharded over the devices."""
    axis, always = None if along else AXIS, not splits.validation.shape[1]
    parts = {}
    for name, indices in {"validation": splits.validation, "test": splits.test}.items():
        number = indices.shape[1]
        padding = 0 if along else _multiple(number, mesh.size) - number
        weight = (np.arange(number + padding) < number) / np.float32(max(number, 1))
        indices = np.concatenate([indices, indices[:, :padding]], 1)
        parts[name] = put(indices, mesh, None, axis), put(weight.astype(np.float32), mesh, axis)
    constants = (put(data.flat(splits.images), mesh), put(splits.labels, mesh), put(splits.train[:, :VIEWED], mesh))

    def values(place, params, state, setting, parts, images, labels, viewed, *, name):
        """The metrics on one part of the images, and those of the probe that belong to it."""
        here = labels[place]
        shown, tested = viewed[place], parts["test"][0][place][: splits.test.shape[1]]
        view = View(images[shown], here[shown], setting, images[tested], here[tested])
        known = probe(params, state, view) if probe else {}
        known = {key: value for key, value in known.items() if always or key.startswith("test_") == (name == "test")}
        indices, weight = parts[name]
        logits, _ = apply(params, state, images[indices[place]], False)
        right, loss = scores.scored(logits, here[indices[place]])
        return known | {f"{name}_accuracy": weight @ right, f"{name}_loss": weight @ loss}

    def every(place, params, state, setting, *constants, name):
        run = (place, params, state, setting)
        if not along:
            return jax.vmap(partial(values, name=name), (0, 0, 0, 0, *[None] * 4))(*run, *constants)
        at_once = None if _on_cpu(mesh) else AT_ONCE
        return jax.lax.map(lambda run: values(*run, *constants, name=name), run, batch_size=at_once)

    shared, compiled = P(along) if along else P(), {}
    for name in parts:
        each = partial(every, name=name)
        if along:
            specs = (shared,) * 4 + (P(),) * 4
            each = jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=shared, check_vma=False)
        compiled[name] = jax.jit(each, out_shardings=NamedSharding(mesh, shared))

    def evaluate(learner, last):
        # Without validation images the test images serve for all evaluations, and the whole probe belongs to them.
        names = ["test"] if always else ["validation", "test"] if last and tests else ["validation"]
        found = {}
        for name in names:
            found |= compiled[name](learner.place, *learner[:2], learner.setting, parts, *constants)
        return jax.tree.map(lambda x: np.asarray(x)[:runs], found)

    return evaluate


def _on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
