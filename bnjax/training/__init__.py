"""Training with optax: a training state with running statistics, gradient accumulation, and rematerialization.

    optimizers   which parameters an optimizer decays
    state        the training state, and how it is saved
    steps        compiled steps of training and evaluation, and a rematerialization policy

A model is any function with the signature of Linen's `Module.apply`: `apply_fn(variables, *args, mutable=, rngs=)`.
`bnjax.nnx.functional` returns such a function for an NNX model. This package has no training loop, no data and no loss.
"""

from bnjax.training.optimizers import decay_mask
from bnjax.training.state import TrainState
from bnjax.training.steps import Model, eval_step, save_statistics, train_step

__all__ = ["Model", "TrainState", "decay_mask", "eval_step", "save_statistics", "train_step"]
