"""PyTorch's models in NumPy: state dictionaries, and layers in its order of axes. No PyTorch."""

from functools import partial

import numpy as np
from jax import lax

import bnjax.linen

norm = partial(bnjax.linen.BatchNorm, use_running_average=True)


def state_dict(**shapes):
    """Arrays of PyTorch's layers, by name and shape of the weight; of a normalization the number of features."""
    rng = np.random.default_rng(0)
    arrays = {}
    for layer, shape in shapes.items():
        layer = layer.replace("__", ".")
        if isinstance(shape, int):
            for name in ("weight", "bias", "running_mean", "running_var"):
                arrays[f"{layer}.{name}"] = rng.uniform(0.5, 2, shape).astype("float32")
            arrays[f"{layer}.num_batches_tracked"] = np.array(7)
        else:
            arrays[f"{layer}.weight"] = rng.normal(size=shape).astype("float32")
    return arrays


def conv(x, kernel, **options):
    """PyTorch's: (N, C, H, W) by (out, in, height, width)."""
    options = {"window_strides": (1, 1), "padding": "VALID", **options}
    return lax.conv_general_dilated(x, kernel, dimension_numbers=("NCHW", "OIHW", "NCHW"), **options)


def normalized(x, arrays, layer):
    weight, bias, mean, var = (arrays[f"{layer}.{n}"] for n in ("weight", "bias", "running_mean", "running_var"))
    return (np.asarray(x) - mean) / np.sqrt(var + np.float32(1e-5)) * weight + bias


CLASSIFIER = state_dict(features__0=(4, 3, 3, 3), bn=24, fc=(5, 24))
IMAGE = np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype("float32")
LAST = IMAGE.transpose(0, 2, 3, 1)
