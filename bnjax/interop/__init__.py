"""Conversion of weights and running statistics from and to PyTorch and Keras, for single layers and whole models.

The functions take and return mappings and lists of arrays; neither library is imported. `TORCH`, `KERAS` and `FLAX` are
keyword arguments with which `bn_apply` computes what each library computes by default, so that training a converted
layer continues unchanged:

    params, state = from_torch(model.state_dict(), "bn1")
    y, state = bn_apply(params, state, x, train=True, **TORCH)

`from_torch` and `from_keras` convert one layer, `from_torch_model` and `from_keras_model` a whole model into a Linen or
NNX model, with its convolutions, dense layers and embeddings:

    variables, report = from_torch_model(model.state_dict(), variables, model=flax_model, inputs=x)
    print(report)

PyTorch's `momentum=None` is `bnjax.cumulative_average`. PyTorch counts the updates of a layer, bnjax the updates of
each feature; the counts differ after a batch with fewer than two valid values of a feature. Keras does not count. A
momentum that depends on the count (`cumulative_average`, `debiased`) treats statistics of count 0 as initial values,
which the first update replaces.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from bnjax.interop.layers import from_keras, from_torch, to_keras, to_torch
from bnjax.interop.match import Moved, Report
from bnjax.interop.models import from_keras_model, from_torch_model, to_keras_model, to_torch_model

__all__ = [
    "FLAX",
    "KERAS",
    "TORCH",
    "Moved",
    "Report",
    "from_keras",
    "from_keras_model",
    "from_torch",
    "from_torch_model",
    "to_keras",
    "to_keras_model",
    "to_torch",
    "to_torch_model",
]

TORCH: Mapping[str, Any] = MappingProxyType({"axis": 1, "momentum": 0.9, "epsilon": 1e-5, "unbiased_var": True})
"""Options with which `bn_apply` computes what PyTorch's layers compute by default."""
KERAS: Mapping[str, Any] = MappingProxyType({"axis": -1, "momentum": 0.99, "epsilon": 1e-3, "unbiased_var": False})
"""Options with which `bn_apply` computes what Keras's layer computes by default."""
FLAX: Mapping[str, Any] = MappingProxyType({"axis": -1, "momentum": 0.99, "epsilon": 1e-5, "unbiased_var": False})
"""Options with which `bn_apply` computes what Flax's layers compute by default."""
