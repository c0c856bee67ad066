"""Population statistics for weights that no longer move (Wu & Johnson, 2021)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.core import trees
from bnjax.core.records import BNState, Collected
from bnjax.core.running import absorb
from bnjax.core.sharding import select


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
    state = absorb(fresh, Collected(moments, support), (0.0, 1.0), unbiased_var)
    return state.mean, state.var, state.count > 0


def _with_bar(batches):
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("recalibrate(progress=True): the bar is tqdm's. Install it: pip install tqdm.") from error
    return tqdm(batches, desc="recalibrate", unit="batch")
