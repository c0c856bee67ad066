"""Flax NNX layers of batch normalization, and functions for whole NNX models.

`BatchNorm` is a drop-in replacement for `flax.nnx.BatchNorm`, and `convert` puts it into an existing model.
`functional` turns a model into a pure function, and `fold_model` removes the layers for serving.
"""

from bnjax.nnx.conversion import convert
from bnjax.nnx.folding import Identity, fold_model, fold_report
from bnjax.nnx.lstm import BNLSTMCell
from bnjax.nnx.norm import BatchMoments, BatchNorm
from bnjax.nnx.pure import functional
from bnjax.nnx.variants import (
    AdaptiveBatchNorm,
    ConditionalBatchNorm,
    GhostBatchNorm,
    IndexedBatchNorm,
    RenormBatchNorm,
)

__all__ = [
    "AdaptiveBatchNorm",
    "BNLSTMCell",
    "BatchMoments",
    "BatchNorm",
    "ConditionalBatchNorm",
    "GhostBatchNorm",
    "Identity",
    "IndexedBatchNorm",
    "RenormBatchNorm",
    "convert",
    "fold_model",
    "fold_report",
    "functional",
]
