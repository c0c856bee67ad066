"""Flax Linen layers of batch normalization, and functions for whole Linen models.

`BatchNorm` is a drop-in replacement for `flax.linen.BatchNorm`. `convert` is for models that cannot be edited: it makes
their own BatchNorm layers compute through bnjax. `fold_model` removes the layers for serving.
"""

from bnjax.linen.conversion import convert
from bnjax.linen.folding import fold_model
from bnjax.linen.lstm import BNLSTM, BNLSTMCell
from bnjax.linen.norm import (
    AdaptiveBatchNorm,
    BatchNorm,
    ConditionalBatchNorm,
    GhostBatchNorm,
    IndexedBatchNorm,
    RenormBatchNorm,
)

__all__ = [
    "BNLSTM",
    "AdaptiveBatchNorm",
    "BNLSTMCell",
    "BatchNorm",
    "ConditionalBatchNorm",
    "GhostBatchNorm",
    "IndexedBatchNorm",
    "RenormBatchNorm",
    "convert",
    "fold_model",
]
