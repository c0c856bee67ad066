"""Training of several seeds at once: one `vmap` over them, one `scan` between two evaluations."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import data

Apply = Callable[[Any, Any, Array, bool], tuple[Array, Any]]


class Learner(NamedTuple):
    """What training moves: learned parameters, running statistics, the optimizer's memory."""

    params: Any
    state: Any
    opt_state: Any


class Evaluation(NamedTuple):
    """Per seed, of shape (seeds,): mean training loss since the last evaluation (nan at step 0), and test accuracy (nan
    where a logit is not finite: the network has diverged)."""

    step: int
    loss: Array
    accuracy: Array


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
) -> Iterator[Evaluation]:
    """Train by cross-entropy from `seeds` initializations, each with batches in its own order.

    Args:
      init: from a key to (params, state).
      apply: from params, state, images of shape (batch, height * width) and train to logits and state.
      optimizer: an optax transformation.
      dataset: images and labels.
      seeds: number of runs, whose keys are 0, 1, ...
      steps: updates per run.
      batch_size: images per update.
      eval_every: updates between evaluations on the whole test set.

    Returns:
      An iterator: an evaluation before the first step, then one every `eval_every` steps and after the last.

    Raises:
      InputError: if a batch is larger than the training set.
    """
    if not 0 < batch_size <= len(dataset.train_images):
        raise data.InputError(
            f"batch_size={batch_size}: expected 1 to {len(dataset.train_images)}, the size of {dataset.name}."
        )
    return _fit(init, apply, optimizer, dataset, seeds, steps, batch_size, eval_every)


def _fit(init, apply, optimizer, dataset, seeds, steps, batch_size, eval_every):
    train_x, test_x = (jnp.asarray(x.reshape(len(x), -1)) for x in (dataset.train_images, dataset.test_images))
    train_y, test_y = jnp.asarray(dataset.train_labels), jnp.asarray(dataset.test_labels)

    def start(key):
        params, state = init(key)
        return Learner(params, state, optimizer.init(params))

    def step(learner, indices):
        def loss(params):
            logits, state = apply(params, learner.state, train_x[indices], True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, train_y[indices]).mean(), state

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(learner.params)
        updates, opt_state = optimizer.update(gradients, learner.opt_state, learner.params)
        return Learner(optax.apply_updates(learner.params, updates), state, opt_state), value

    @partial(jax.jit, donate_argnums=0)
    @jax.vmap
    def advance(learner, indices):
        learner, losses = jax.lax.scan(step, learner, indices)
        return learner, losses.mean()

    @jax.jit
    @jax.vmap
    def accuracy(learner):
        logits, _ = apply(learner.params, learner.state, test_x, False)
        # Without this a diverged network would score the share of class 0.
        return jnp.where(jnp.isfinite(logits).all(), (logits.argmax(-1) == test_y).mean(), jnp.nan)

    learner = jax.vmap(start)(jax.vmap(jax.random.key)(jnp.arange(seeds)))
    orders = [data.batches(len(train_x), batch_size, np.random.default_rng(seed)) for seed in range(seeds)]
    yield Evaluation(0, jnp.full(seeds, jnp.nan), accuracy(learner))
    for done in range(0, steps, eval_every):
        chunk = min(eval_every, steps - done)
        learner, loss = advance(learner, np.stack([list(islice(order, chunk)) for order in orders]))
        yield Evaluation(done + chunk, loss, accuracy(learner))


def check_positive(config: Any, *names: str) -> None:
    """These fields of an experiment are positive and finite."""
    for name in names:
        for value in np.ravel(getattr(config, name)):
            if not 0 < value < np.inf:
                raise data.InputError(f"{name}={value}: expected a positive number.")


def write_config(folder: Path, config: Any, **facts: Any) -> None:
    """`config.json`: the fields of the experiment, and facts about the run."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"config": asdict(config), **facts, "jax": jax.__version__, "backend": jax.default_backend()}
    (folder / "config.json").write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """What `write_config` wrote."""
    return json.loads((folder / "config.json").read_text())


def records(network: str, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """One line of `metrics.jsonl` per seed; what is not finite is null, as JSON has no NaN."""
    for seed, (loss, accuracy) in enumerate(zip(evaluation.loss, evaluation.accuracy, strict=True)):
        yield {
            "network": network,
            "seed": seed,
            "step": evaluation.step,
            "loss": float(loss) if np.isfinite(loss) else None,
            "test_accuracy": float(accuracy) if np.isfinite(accuracy) else None,
        }


def read_curves(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """From `metrics.jsonl`, per network: the steps, and test accuracies of shape (seeds, evaluations), nan for null."""
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        runs = curves.setdefault(record["network"], {})
        runs.setdefault(record["seed"], {})[record["step"]] = record["test_accuracy"]
    return {
        network: (np.array(list(runs[0])), np.array([list(run.values()) for run in runs.values()], float))
        for network, runs in curves.items()
    }
