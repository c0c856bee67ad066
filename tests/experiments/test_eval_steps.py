"""Evaluations at chosen steps."""

import jax
import numpy as np
import optax

from experiments.harness import data, train
from experiments.models import networks


def test_evaluations_at_chosen_steps_are_those_of_every_step():
    dataset = data.digits()
    network = networks.mlp(dataset, (5,), True)

    def evaluations(eval_every):
        splits = data.splits(dataset, [3], train=100, most=20)
        options = {"seeds": [3], "steps": 7, "batch_size": 20, "eval_every": eval_every}
        return [*train.fit(*network, lambda: optax.sgd(0.1), splits, **options)]

    every, chosen = evaluations(1), evaluations((5, 1, 9, 0))  # in any order; steps beyond the last do not count
    assert [each.step for each in chosen] == [0, 1, 5, 7]
    for each in chosen:
        for name, value in each.values.items():
            np.testing.assert_allclose(value, every[each.step].values[name], rtol=1e-5)
    losses = [each.loss for each in every]
    np.testing.assert_allclose(chosen[2].loss, np.mean(losses[2:6], 0), rtol=1e-5)
    assert jax.tree.all(jax.tree.map(np.isfinite, [each.loss for each in chosen[1:]]))
