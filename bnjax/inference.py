"""From training to use: layers folded away, and population statistics for weights that no longer move.

In evaluation a layer is one affine map, y = scale' * x + bias', which a linear layer beside it takes into its kernel:

    scale' = scale / sqrt(var + epsilon)        bias' = bias - mean * scale'

`bnjax.linen.fold` and `bnjax.nnx.fold` do it to whole models by pairs of names.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bnjax import checks, trees
from bnjax.array_moments import serializable
from bnjax.functional import BNParams, BNState, absorb, aligned, select
from bnjax.moments import wider
from bnjax.normalize import normalize, slopes


@serializable
class Affine(NamedTuple):
    """A scale and a bias for each feature: y = scale * x + bias."""

    scale: Array
    bias: Array


def fold(params: BNParams, state: BNState, *, epsilon: float = 1e-5) -> Affine:
    """One scale and one bias for each feature, which do what the layer does in evaluation.

        bn_apply(params, state, x, train=False)[0] = scale' * x + bias'

    Args:
      params, state: of the layer, of shape `features`; scale and bias may be None.
      epsilon: that of the layer.

    Returns:
      scale' and bias' of shape `features`, in float32 or wider. The output differs by rounding, which grows with
      |mean| / sqrt(var + epsilon).

    Raises:
      ValueError: without a state: a layer that normalizes by its batch is no affine map.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> params, _ = bnjax.bn_init(2, scale=4.0)
      >>> state = bnjax.BNState(mean=jnp.array([1.0, 2.0]), var=jnp.array([4.0, 16.0]), count=jnp.array([1, 1]))
      >>> scale, bias = bnjax.fold(params, state)
      >>> scale.round(3).tolist(), bias.round(3).tolist()
      ([2.0, 1.0], [-2.0, -2.0])
    """
    if state is None:
        raise ValueError("fold(state=None): a layer without running statistics normalizes by its batch; it stays.")
    epsilon = checks.positive("fold", "epsilon", epsilon)
    params = BNParams(*(None if v is None else jnp.asarray(v) for v in params))
    mean, var = jnp.asarray(state.mean), jnp.asarray(state.var).real
    for name, v in params._asdict().items():
        if v is not None and v.shape != mean.shape:
            raise ValueError(
                f"fold(params=...): params.{name} has shape {v.shape}, state.mean {mean.shape}. Pass those of one "
                "index, class or example: they have a scale and a bias of their own."
            )
    dtypes = (wider(v.dtype) for v in (mean, *params) if v is not None)
    zero = jnp.zeros(mean.shape, functools.reduce(jnp.promote_types, dtypes))
    scale = slopes(zero, var, params.scale, epsilon)[1]
    return Affine(scale, normalize(zero, mean, var, *params, None, epsilon))


def fold_into_previous(kernel: Array, bias: Array | None, affine: Affine, *, axis: int = -1) -> tuple[Array, Array]:
    """Kernel and bias of a linear layer with the layer after it folded in.

        kernel' = kernel * scale        bias' = bias * scale + bias of the layer

    Args:
      kernel: of a dense layer or of a convolution of any kind: transposed, grouped, depthwise, dilated, strided.
      bias: of shape (features,), or None.
      affine: what `fold` gives.
      axis: of the output's features in the kernel: -1 in Flax, but -2 for ConvTranspose(transpose_kernel=True).

    Returns:
      kernel, and bias of shape (features,), which is there now if it was not; in the dtype that each had.

    Raises:
      ValueError: if the kernel has another number of features on that axis.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> affine = bnjax.Affine(scale=jnp.array([2.0, 3.0]), bias=jnp.array([0.0, 1.0]))
      >>> kernel, bias = bnjax.fold_into_previous(jnp.ones((1, 2)), jnp.ones(2), affine)
      >>> kernel.tolist(), bias.tolist()
      ([[2.0, 3.0]], [2.0, 4.0])
    """
    features = checks.feature_axes("fold_into_previous", kernel, axis)
    _check_fits("fold_into_previous", kernel, affine, kernel.shape[features[0]])
    scale, shift = affine
    scaled = kernel.astype(scale.dtype) * aligned(scale, kernel, features)
    moved = shift if bias is None else bias.astype(scale.dtype) * scale + shift
    return scaled.astype(kernel.dtype), moved.astype((kernel if bias is None else bias).dtype)


def fold_into_next(kernel: Array, bias: Array | None, affine: Affine, *, groups: int = 1) -> tuple[Array, Array]:
    """Kernel and bias of a linear layer with the layer before it folded in.

        kernel' = kernel * scale        bias' = bias + sum kernel * bias of the layer

    with the sum over all that enters an output. Exact where the kernel sees no padding of zeros: those stand for what
    the layer would have made `bias`. For a transposed convolution only a kernel of one place is so.

    Args:
      kernel: (..., inputs / groups, outputs).
      bias: of shape (outputs,), or None.
      affine: what `fold` gives, of shape (inputs,).
      groups: of a convolution (`feature_group_count`).

    Returns:
      kernel, and bias of shape (outputs,), in the dtype that each had.

    Raises:
      ValueError: if the kernel has another number of inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> affine = bnjax.Affine(scale=jnp.array([2.0, 3.0]), bias=jnp.array([0.0, 1.0]))
      >>> kernel, bias = bnjax.fold_into_next(jnp.ones((2, 1)), jnp.ones(1), affine)
      >>> kernel.tolist(), bias.tolist()
      ([[2.0], [3.0]], [2.0])
    """
    _check_fits("fold_into_next", kernel, affine, kernel.shape[-2] * groups)
    # The outputs of a group stand together, and see the inputs of their group.
    scale, shift = (jnp.repeat(v.reshape(groups, -1).T, kernel.shape[-1] // groups, axis=1) for v in affine)
    scale, shift = (jnp.expand_dims(v, tuple(range(kernel.ndim - 2))) for v in (scale, shift))
    wide = kernel.astype(scale.dtype)
    moved = jnp.sum(wide * shift, axis=tuple(range(kernel.ndim - 1)))
    if bias is not None:
        moved += bias.astype(moved.dtype)
    return (wide * scale).astype(kernel.dtype), moved.astype((kernel if bias is None else bias).dtype)


def recalibrate(
    apply: Callable[..., Any],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    unbiased_var: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """The variables with the statistics that fixed weights have over these batches (Wu & Johnson, 2021, section 3).

        mean = sum_b n_b mean_b / n        var = sum_b n_b (var_b + |mean_b - mean|^2) / n

    Precise batch normalization, which PyTorch calls `update_bn`: for weights that never met their running statistics,
    such as averaged ones, or where those lag behind. It is the moments of all values that a layer gets while the model
    runs in training mode, however they fall into batches, not an average of the batches' variances. (Each batch is
    still normalized by its own statistics on the way, as in training: batches should have its size.)

    Args:
      apply: called as `apply(variables, batch, mutable=[...])`, has to run the model in training mode and to return its
        output and the collections named: `functools.partial(model.apply, train=True)` of a Linen model, or what
        `bnjax.nnx.functional` gives. Dropout is as in training; `partial(..., rngs={...})` has its keys. It is compiled
        once for each shape of a batch. Batches that are tuples or dictionaries come as they are: for a model of images,
        `lambda variables, batch, **options: model.apply(variables, batch["image"], train=True, **options)`.
      variables: `params` and `batch_stats`, and whatever else the model has. Its layers are those of `bnjax.linen` or
        `bnjax.nnx`; those of Flax are after `convert`.
      batches: a list or another iterable of batches, which are arrays or trees of arrays, of any sizes, sharded or not.
        They are read once.
      unbiased_var: whether the variance is divided by n - 1 in place of n.
      progress: whether tqdm shows a bar.

    Returns:
      The variables, with new statistics in the dtypes that they had. Where someone counts, the count is the number of
      batches. A feature with fewer than two valid values in all of them, or whose statistics are not finite, keeps its
      own, and so do frozen layers.

    Raises:
      TypeError, ValueError: for an array or a dictionary in place of an iterable of batches, without a batch or
        `batch_stats`, if `apply` does not take a batch, or if a layer with running statistics or the whole model gave
        no moments.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnjax, bnjax.linen
      >>> layer = bnjax.linen.BatchNorm(use_running_average=False)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 1)))
      >>> batches = [jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[10.0]])]
      >>> variables = bnjax.recalibrate(layer.apply, variables, batches)
      >>> variables["batch_stats"]["mean"].tolist(), variables["batch_stats"]["var"].tolist()
      ([4.0], [12.5])
    """
    if "batch_stats" not in variables:
        raise ValueError(
            f"recalibrate(variables=...): no batch_stats among {sorted(variables)}. Pass what init or training "
            'returned: {"params": ..., "batch_stats": ...}.'
        )
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        raise TypeError(
            f"recalibrate(batches=...): expected an iterable of batches, got one {type(batches).__name__}, which "
            "would be taken apart. Pass a list: [batch]."
        )
    layers = {name: state for name, (_, state) in trees.norms({}, variables["batch_stats"]).items()}
    # From count 0 a batch that tells a layer something leaves 1, and renormalization does not correct yet.
    counts = {name: jnp.zeros_like(state.count) for name, state in layers.items() if state.count is not None}
    zeros = {name: {"count": count} for name, count in counts.items()}
    start = {**variables, "batch_stats": trees.replaced(variables["batch_stats"], zeros)}
    update = jax.jit(lambda variables, batch: apply(variables, batch, mutable=["batch_stats", "batch_moments"])[1])
    moments = None
    for batch in _with_bar(batches) if progress else batches:
        if moments is None:  # weights of 0, so that the first batch needs no program of its own
            given = _tried(update, start, batch).get("batch_moments", {})
            trees.check_collected("recalibrate(apply=...)", variables["batch_stats"], given)
            moments = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), given)
        left = update({**start, "batch_moments": moments}, batch)
        moments, after = left["batch_moments"], trees.norms({}, left["batch_stats"])
        counts = {name: count + after[name][1].count for name, count in counts.items()}
    if moments is None:
        raise ValueError("recalibrate(batches=...): there is no batch. A generator can be read only once.")
    collected = trees.collected(moments)
    if not any(jnp.any(support.valid > 0) for _, support in collected.values()):
        raise ValueError(
            "recalibrate(apply=...): no layer saw a value in training mode. Call the model with train=True, or "
            "whatever makes its layers use the batch's statistics."
        )
    new = {}
    for name, state in layers.items():
        mean, var, enough = _population(*collected[name], unbiased_var)
        if jnp.isrealobj(state.mean) and jnp.iscomplexobj(mean):  # the first batch makes it complex
            state = state._replace(mean=state.mean.astype(mean.dtype))
        kept = {"mean": (mean, state.mean), "var": (var, state.var)}
        new[name] = {key: select(enough, value.astype(old.dtype), old) for key, (value, old) in kept.items()}
        if name in counts:
            new[name]["count"] = select(enough, counts[name], state.count)
    return {**variables, "batch_stats": trees.replaced(variables["batch_stats"], new)}


def _tried(update, variables, batch):
    """The shapes that `update` returns; where it fails on a tuple or a dictionary, the error says what to do."""
    try:
        return jax.eval_shape(update, variables, batch)
    except Exception as error:
        if hasattr(batch, "shape"):
            raise
        raise TypeError(
            "recalibrate(apply=...): apply(variables, batch, mutable=...) failed on a batch that is a "
            f"{type(batch).__name__}. If it does not take one, pass a function that takes it apart: "
            "lambda variables, batch, **options: model.apply(variables, batch[0], train=True, **options)."
        ) from error


def _population(moments, support, unbiased_var):
    """Mean and variance of what was collected, and where there is enough of it."""
    fresh = BNState(jnp.zeros_like(moments.mean), jnp.ones_like(moments.var), jnp.zeros(moments.var.shape, jnp.int32))
    state = absorb(fresh, moments, support, (0.0, 1.0), unbiased_var)
    return state.mean, state.var, state.count > 0


def _with_bar(batches):
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("recalibrate(progress=True): the bar is tqdm's. Install it: pip install tqdm.") from error
    return tqdm(batches, desc="recalibrate", unit="batch")


def _check_fits(call, kernel, affine, features):
    if affine.scale.shape != (features,):
        raise ValueError(
            f"{call}(kernel=...): the kernel has shape {kernel.shape} and so {features} features there, but "
            f"affine.scale has shape {affine.scale.shape}. Fold layers that stand side by side."
        )
    if jnp.iscomplexobj(affine.bias) and not jnp.iscomplexobj(kernel):
        raise TypeError(
            f"{call}(kernel=...): a {kernel.dtype} kernel cannot hold a complex layer. Pass kernel.astype(complex)."
        )
