"""Training with optax: a training state with running statistics, gradient accumulation, and rematerialization.

Modules, each of which imports only from the ones above it:

    decay     the parameters that weight decay applies to
    state     the training state
    step      the training step and the evaluation step
"""

from bnjax.training.decay import decay_mask
from bnjax.training.state import TrainState
from bnjax.training.step import Model, eval_step, save_statistics, train_step

__all__ = ["Model", "TrainState", "decay_mask", "eval_step", "save_statistics", "train_step"]
