"""Population statistics of fixed weights (Wu & Johnson, 2021)."""

import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.core import checks, trees
from bnjax.core.records import BNState, Collected
from bnjax.core.running import absorb
from bnjax.core.sharding import select

LOG = logging.getLogger("bnjax")


def recalibrate(
    apply: Callable[..., Any],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    num_batches: int | None = None,
    unbiased_var: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Recompute the running statistics of fixed weights over some batches (Wu & Johnson, 2021, section 3).

        mean = sum_b n_b mean_b / n        var = sum_b n_b (var_b + |mean_b - mean|^2) / n

    This is precise batch normalization, `torch.optim.swa_utils.update_bn` in PyTorch. It is needed if the running
    statistics lag behind the weights, and for averaged weights, which were never run in training mode. The result is
    the moments of all values that enter a layer in training mode, however they are divided into batches, not an average
    of the batches' variances. Meanwhile each batch is normalized by its own statistics, so batches should have the size
    that training used; with accumulated gradients, the size of a micro-batch.

    Args:
      apply: function called as `apply(variables, batch, mutable=[...])`. It must run the model in training mode and
        return the output and the collections named: `functools.partial(model.apply, train=True)` of a Linen model, or
        the function that `bnjax.nnx.functional` returns. Dropout is active; `partial(..., rngs={...})` passes its keys.
        It is compiled once per shape of a batch. A batch that is a tuple or a dictionary is passed unchanged, so a
        model of images needs
        `lambda variables, batch, **options: model.apply(variables, batch["image"], train=True, **options)`.
      variables: `params`, `batch_stats`, and the model's other collections. Its layers are from `bnjax.linen` or
        `bnjax.nnx`, or Flax's own layers after `convert`.
      batches: a list or another iterable of batches, which are arrays or trees of arrays, of any size, sharded or not.
        It is read once, and may be infinite if `num_batches` is given.
      num_batches: the maximum number of batches to use, > 0; by default all. No further batch is drawn. If there are
        fewer, a warning says how many.
      unbiased_var: whether the sum of squares is divided by n - 1 instead of n.
      progress: whether tqdm shows a progress bar.

    Returns:
      The variables, with new statistics in the dtypes of the old ones. A count, if the model has one, becomes the
      number of batches that the feature absorbed. A feature with fewer than two valid values in all batches, or whose
      statistics are not finite, keeps its old ones, and so do layers that ran in evaluation mode or are frozen. The
      logger `bnjax` names both in a warning. Layers that own other running statistics, such as a `running_mean` and a
      `running_var`, keep them too, with a UserWarning.

    Raises:
      TypeError, ValueError: for an array or a dictionary instead of an iterable of batches, if there is no batch or no
        `batch_stats`, if `num_batches` is not positive, if `apply` does not accept a batch, if no layer has running
        statistics, or if such a layer or the whole model collected no moments.

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
    trees.check_no_report("recalibrate(variables=...)", variables)
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"recalibrate(variables=...): expected variables by collection, got a {type(variables).__name__}. "
            "The order is recalibrate(apply, variables, batches). For an NNX model the first two are what "
            "bnjax.nnx.functional(model) returns."
        )
    if "batch_stats" not in variables:
        raise ValueError(
            f"recalibrate(variables=...): no batch_stats among {sorted(variables)}. Pass the variables that init or "
            'training returned: {"params": ..., "batch_stats": ...}.'
        )
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        raise TypeError(
            f"recalibrate(batches=...): expected an iterable of batches, got one {type(batches).__name__}, whose "
            "elements would count as batches. Pass a list: [batch]."
        )
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(
            f"recalibrate(batches=...): expected an iterable of batches, got a {type(batches).__name__}. Pass a list, "
            "or call the function that makes a generator."
        )
    if num_batches is not None:
        checks.positive_integer("recalibrate", "num_batches", num_batches)
        batches = itertools.islice(batches, num_batches)
    layers = {name: state for name, (_, state) in trees.norms({}, variables["batch_stats"]).items()}
    unknown = trees.others(variables, layers)
    if not layers:
        found = f" It has layers of other classes: {trees.named(unknown)}. Use bnjax's BatchNorm there." * bool(unknown)
        raise ValueError(f"recalibrate(variables=...): no layer has running statistics `mean` and `var`.{found}")
    # Every batch starts from count 0: the count after it is then 1 if a feature absorbed it and 0 otherwise, and
    # renormalization, whose limits depend on the count, does not correct.
    counts = {name: jnp.zeros_like(state.count) for name, state in layers.items() if state.count is not None}
    zeros = {name: {"count": count} for name, count in counts.items()}
    start = {**variables, "batch_stats": trees.replaced(variables["batch_stats"], zeros)}
    update = jax.jit(lambda variables, batch: apply(variables, batch, mutable=["batch_stats", "batch_moments"])[1])
    moments, used = None, 0
    for batch in _with_bar(batches, num_batches) if progress else batches:
        if moments is None:  # Moments of weight 0: without them the first batch would be compiled separately.
            given = _output_shapes(update, start, batch).get("batch_moments", {})
            trees.check_collected("recalibrate(apply=...)", variables["batch_stats"], given)
            moments = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), given)
        updates = update({**start, "batch_moments": moments}, batch)
        moments, after = updates["batch_moments"], trees.norms({}, updates["batch_stats"])
        counts = {name: count + after[name][1].count for name, count in counts.items()}
        used += 1
    if moments is None:
        raise ValueError("recalibrate(batches=...): there is no batch. A generator can be read only once.")
    collected = trees.collected(moments)
    kept = [name for name in layers if not jnp.any(collected[name].moments.weight > 0)]
    if len(kept) == len(layers):
        raise ValueError(
            "recalibrate(apply=...): no layer saw a value in training mode. Call the model with train=True, or with "
            "another argument by which its layers use the batch statistics. Frozen layers keep their statistics."
        )
    if num_batches is not None and used < num_batches:
        warnings.warn(f"recalibrate(num_batches={num_batches}): `batches` ended after {used}.", stacklevel=2)
    if kept:
        LOG.warning(
            "recalibrate: no value in training mode, so statistics stay as they were: %s. These layers are frozen, ran "
            "in evaluation mode, or were not called.",
            trees.named(kept),
        )
    if unknown:
        warnings.warn(
            f"recalibrate(apply=...): running statistics of {trees.named(unknown)} stay as they were. These layers are "
            "neither bnjax's nor converted ones: use bnjax's BatchNorm in their place.",
            stacklevel=2,
        )
    new, partly = {}, []
    for name, state in layers.items():
        mean, var, enough = _population(*collected[name], unbiased_var)
        if name not in kept and not jnp.all(enough):
            partly.append(f"{trees.named([name])} ({jnp.sum(~enough)} of {enough.size})")
        if jnp.isrealobj(state.mean) and jnp.iscomplexobj(mean):  # complex data make a real running mean complex
            state = state._replace(mean=state.mean.astype(mean.dtype))
        pairs = {"mean": (mean, state.mean), "var": (var, state.var)}
        new[name] = {key: select(enough, value.astype(old.dtype), old) for key, (value, old) in pairs.items()}
        if name in counts:
            some = enough if state.count.ndim else jnp.any(enough)  # one count may serve all features
            new[name]["count"] = select(some, counts[name], state.count)
    if partly:
        LOG.warning(
            "recalibrate: statistics of some features stay as they were: %s. All batches together gave them fewer than "
            "two valid values, or values that are not finite.",
            ", ".join(partly),
        )
    return {**variables, "batch_stats": trees.replaced(variables["batch_stats"], new)}


def _output_shapes(update, variables, batch):
    """The shapes that `update` returns. If it fails on a tuple or a dictionary, the error says what to pass."""
    try:
        return jax.eval_shape(update, variables, batch)
    except (TypeError, AttributeError, IndexError) as error:  # what functions of arrays raise for other types
        if hasattr(batch, "shape"):
            raise
        raise TypeError(
            "recalibrate(apply=...): apply(variables, batch, mutable=...) failed on a batch that is a "
            f"{type(batch).__name__}. If it expects an array, pass a function that takes it apart: "
            "lambda variables, batch, **options: model.apply(variables, batch[0], train=True, **options)."
        ) from error


def _population(moments, support, unbiased_var):
    """Mean and variance of the collected moments, and the features with at least two valid values."""
    fresh = BNState(jnp.zeros_like(moments.mean), jnp.ones_like(moments.var), jnp.zeros(moments.var.shape, jnp.int32))
    state = absorb(fresh, Collected(moments, support), (0.0, 1.0), unbiased_var)
    return state.mean, state.var, state.count > 0


def _with_bar(batches, total):
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("recalibrate(progress=True): needs tqdm. Install it: pip install tqdm.") from error
    return tqdm(batches, desc="recalibrate", unit="batch", total=total)
