"""Batch normalization in float64 NumPy, written from Ioffe & Szegedy (2015), with a weight for every element.

This oracle never imports bnjax. Arguments of any dtype are widened, so it sees exactly the numbers the code under test
is given.
"""

import numpy as np


def _wide(values):
    return np.asarray(values, np.complex128 if np.iscomplexobj(values) else np.float64)


def _axes(x, axis):
    features = {a % x.ndim for a in np.atleast_1d(axis)}
    return tuple(a for a in range(x.ndim) if a not in features)


def weights(x, mask):
    return np.ones(x.shape) if mask is None else np.broadcast_to(_wide(mask), x.shape)


def moments(x, axis=-1, mask=None):
    """Weight, mean and variance per feature; mean and variance are 0 where the weight is."""
    x, w, axes = _wide(x), weights(x, mask), _axes(x, axis)
    x = np.where(w > 0, x, 0)
    total = w.sum(axes)
    divisor = np.where(total > 0, total, 1)
    mean = (w * x).sum(axes) / divisor
    var = (w * np.abs(x - np.expand_dims(mean, axes)) ** 2).sum(axes) / divisor
    return total, mean, var


def aligned(v, x, axis):
    return v if np.ndim(v) == x.ndim and np.ndim(v) != len(np.atleast_1d(axis)) else np.expand_dims(v, _axes(x, axis))


def normalize(x, mean, var, scale, bias, axis=-1, epsilon=1e-5):
    mean, var, scale, bias = (_wide(aligned(v, x, axis)) for v in (mean, var, scale, bias))
    return scale * (_wide(x) - mean) / np.sqrt(var + epsilon) + bias


def train(x, scale, bias, running_mean, running_var, axis=-1, momentum=0.99, epsilon=1e-5, mask=None, unbiased=False):
    """Output, running mean and running variance after one step; every feature has two valid places at least."""
    total, mean, var = moments(x, axis, mask)
    y = normalize(x, mean, var, scale, bias, axis, epsilon)
    square = (weights(x, mask) ** 2).sum(_axes(x, axis))
    new_var = var * total / (total - square / total) if unbiased else var
    return (
        y,
        momentum * _wide(running_mean) + (1 - momentum) * mean,
        momentum * _wide(running_var) + (1 - momentum) * new_var,
    )


def adapted(x, running_mean, running_var, source_weight, axis=-1, mask=None):
    """Mean and variance of section 2 of Schneider et al. (2020).

    Examples lie on the first axis that is reduced. One counts as its largest weight, and n is their effective number
    (Kish, 1965). A feature without a valid place has the running statistics.
    """
    total, mean, var = moments(x, axis, mask)
    first, *inner = _axes(x, axis)
    example = weights(x, mask).max(tuple(inner), keepdims=True)
    square = (example**2).sum((first, *inner))
    n = np.where(total > 0, example.sum((first, *inner)) ** 2 / np.where(square > 0, square, 1), 0)
    weight = np.where(n > 0, source_weight + n, 1)
    keep, take = np.where(n > 0, source_weight / weight, 1), n / weight
    return keep * _wide(running_mean) + take * mean, keep * _wide(running_var) + take * var


def gradients(x, g, scale, axis=-1, epsilon=1e-5, mask=None):
    """Gradients of sum(g y) in x, scale and bias, by the chain of section 3 of the paper; real x."""
    x, g, w, axes = _wide(x), _wide(g), weights(x, mask), _axes(x, axis)
    total, mean, var = (np.expand_dims(v, axes) for v in moments(x, axis, mask))
    centered = np.where((w == 0) & ~np.isfinite(x), 0, x - mean)
    dxhat = g * aligned(scale, x, axis)
    dvar = (dxhat * centered).sum(axes, keepdims=True) * -0.5 * (var + epsilon) ** -1.5
    dmean = -dxhat.sum(axes, keepdims=True) / np.sqrt(var + epsilon)
    dx = dxhat / np.sqrt(var + epsilon) + w / total * (2 * dvar * centered + dmean)
    return dx, (g * centered / np.sqrt(var + epsilon)).sum(axes), g.sum(axes)
