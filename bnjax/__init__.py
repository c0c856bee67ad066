"""Batch normalization for JAX: pure functions, exact on one device or many.

The package consists of these parts, each of which imports only from the parts above it:

    core          the mathematics: moments, normalization, the layer as a function, schedules, checks
    variants      adaptive, ghost, renormalized, indexed, conditional and recurrent batch normalization
    traced        the program of a model, and the calls of its layers (these need flax)
    deploy        layers folded into adjacent linear layers; recalibrated running statistics
    diagnosis     faults in running statistics, as a table and a figure
    interop       conversion of weights from and to PyTorch and Keras
    training      a training state and a training step (it needs flax and optax)
    flax_shared   code shared by the Linen and the NNX layers
    linen, nnx    the layers, and convert, fold_model and more for whole models (they need flax)
"""

from typing import TYPE_CHECKING

from bnjax import interop
from bnjax.core.apply import bn_apply, bn_init
from bnjax.core.checks import UnboundAxisNameError
from bnjax.core.layer import BatchNorm
from bnjax.core.moments import batch_moments, merge_moments
from bnjax.core.records import BNParams, BNState, Moments
from bnjax.core.schedules import cumulative_average, debiased, linear_ramp
from bnjax.deploy.affine import Affine, fold, fold_into_next, fold_into_previous
from bnjax.deploy.recalibration import recalibrate
from bnjax.diagnosis.measure import Diagnosis, diagnose
from bnjax.variants.adaptive import AdaptiveBatchNorm, adaptive_bn_apply
from bnjax.variants.conditional import conditional_params
from bnjax.variants.ghost import GhostBatchNorm, ghost_bn_apply
from bnjax.variants.indexed import IndexedBatchNorm, indexed_bn_apply, indexed_bn_init
from bnjax.variants.lstm import BNLSTMCarry, BNLSTMParams, BNLSTMState, bn_lstm_apply, bn_lstm_carry, bn_lstm_init
from bnjax.variants.renorm import RENORM_D_MAX, RENORM_R_MAX, RenormBatchNorm, renorm_bn_apply

__version__ = "0.1.0"

__all__ = [
    "RENORM_D_MAX",
    "RENORM_R_MAX",
    "AdaptiveBatchNorm",
    "Affine",
    "BNLSTMCarry",
    "BNLSTMParams",
    "BNLSTMState",
    "BNParams",
    "BNState",
    "BatchNorm",
    "Diagnosis",
    "GhostBatchNorm",
    "IndexedBatchNorm",
    "Moments",
    "RenormBatchNorm",
    "UnboundAxisNameError",
    "adaptive_bn_apply",
    "batch_moments",
    "bn_apply",
    "bn_init",
    "bn_lstm_apply",
    "bn_lstm_carry",
    "bn_lstm_init",
    "conditional_params",
    "cumulative_average",
    "debiased",
    "diagnose",
    "fold",
    "fold_into_next",
    "fold_into_previous",
    "ghost_bn_apply",
    "indexed_bn_apply",
    "indexed_bn_init",
    "interop",
    "linear_ramp",
    "merge_moments",
    "recalibrate",
    "renorm_bn_apply",
]

if not TYPE_CHECKING:  # a type checker knows the names that exist
    _ELSEWHERE = {
        "linen": "BNLSTM BNLSTMCell ConditionalBatchNorm convert fold_model",
        "nnx": "BNLSTMCell BatchMoments ConditionalBatchNorm Identity convert fold_model fold_report functional",
        "training": "TrainState decay_mask eval_step save_statistics train_step",
        "interop": "from_keras from_keras_model from_torch from_torch_model to_keras to_keras_model to_torch "
        "to_torch_model",
    }

    def __getattr__(name):
        message = f"module 'bnjax' has no attribute {name!r}"
        found = [module for module, names in _ELSEWHERE.items() if name in names.split()]
        if found:
            places = (f"bnjax.{module}.{name} after `import bnjax.{module}`" for module in found)
            message += f". It is {', or '.join(places)}."
        elif name in _ELSEWHERE:
            message += f" yet. Write `import bnjax.{name}`, which needs Flax: pip install 'bnjax[flax]'."
        raise AttributeError(message, name=name)
