"""The training state: parameters, running statistics, the optimizer's state, keys and other collections."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, serialization, struct
from flax.core import unfreeze
from flax.training import train_state
from jax import Array
from jax.core import Tracer

_OUTPUTS = ("intermediates", "batch_moments")


class TrainState(train_state.TrainState):
    """Flax's `TrainState` with running statistics, keys for random numbers, and the model's other collections.

    Args:
      apply_fn: `model.apply` of a Linen model, or the function that `bnjax.nnx.functional` returns.
      params, tx: parameters, and the optax transformation that updates them.
      batch_stats: running statistics.
      rngs: None, or keys by name (`{"dropout": key}`). A key of its own is derived for every step and micro-batch.
      collections: the model's other variables by collection, such as a cache. `create` puts every keyword that is not a
        field of this class here, except `intermediates` and `batch_moments`, which are outputs. In training these
        collections are mutable, as in Flax: each call of the model reads the result of the call before, from one
        micro-batch or step to the next. In evaluation they are read only.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> import bnjax.linen
      >>> from bnjax.training import TrainState
      >>> model = bnjax.linen.BatchNorm()
      >>> variables = model.init(jax.random.key(0), jnp.ones((4, 2)), use_running_average=False)
      >>> state = TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.1), **variables)
      >>> state.batch_stats["mean"].tolist()
      [0.0, 0.0]
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register(cls)

    batch_stats: Any = struct.field(default_factory=dict)
    rngs: Any = None
    collections: Any = struct.field(default_factory=dict)

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: Any, **kwargs: Any) -> "TrainState":
        """A state at step 0, which holds copies. Without them a step that donates the state would delete `params`."""
        check_not_deleted("TrainState.create", {"params": params, **kwargs})
        others = set(kwargs) - set(cls.__dataclass_fields__)
        given = {name: kwargs.pop(name) for name in sorted(others)}
        given = {name: tree for name, tree in given.items() if name not in _OUTPUTS} | kwargs.pop("collections", {})
        for name, tree in given.items():
            if not isinstance(tree, Mapping):
                raise TypeError(
                    f"TrainState.create({name}=...): expected a collection of variables, got {type(tree).__name__}. "
                    f"Pass the fields {sorted(cls.__dataclass_fields__)} and collections of the model."
                )
        kwargs["collections"] = unfreeze(given)
        if "batch_stats" in kwargs:
            kwargs["batch_stats"] = unfreeze(kwargs["batch_stats"])  # as steps return them, so no recompilation
        return jax.tree.map(jnp.copy, super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs))


def _register(cls):
    """Let `flax.serialization` save keys as their data, and NNX states as dictionaries; Flax itself refuses both."""
    serialization.register_serialization_state(cls, _to_state_dict, _from_state_dict, override=True)


def _to_state_dict(state):
    return {name: serialization.to_state_dict(_plain(getattr(state, name))) for name in _saved(state)}


def _from_state_dict(state, saved):
    names = _saved(state)
    if set(saved) != set(names):
        raise ValueError(
            f"flax.serialization, {type(state).__name__}: expected the fields {sorted(names)}, got {sorted(saved)}. "
            "Restore into a state of the class that was saved."
        )
    restored = {}
    for name in names:
        old = getattr(state, name)
        new = serialization.from_state_dict(_plain(old), saved[name], name=name)
        special = any(_is_key(leaf) or _is_nnx(leaf) for leaf in jax.tree.leaves(old, is_leaf=_is_nnx))
        restored[name] = jax.tree.map(_restored, old, new, is_leaf=_is_nnx) if special else new
    return state.replace(**restored)


def _saved(state):
    return [field.name for field in dataclasses.fields(state) if field.metadata.get("pytree_node", True)]


def _plain(tree):
    """The tree with the data of keys in their place, and a dictionary of strings in the place of an NNX state."""

    def plain(leaf):
        if not _is_nnx(leaf):
            return jax.random.key_data(leaf) if _is_key(leaf) else leaf
        nested = {}
        for path, value in jax.tree_util.tree_leaves_with_path(leaf):
            *above, last = _names(path)
            node = nested
            for name in above:
                node = node.setdefault(name, {})
            node[last] = plain(value)
        return nested

    return jax.tree.map(plain, tree, is_leaf=_is_nnx)


def _restored(old, new):
    """A leaf of the kind of the old one, from what `_plain` made of it."""
    if _is_nnx(old):
        leaves, treedef = jax.tree_util.tree_flatten_with_path(old)
        values = [functools.reduce(lambda node, name: node[name], _names(path), new) for path, _ in leaves]
        return jax.tree.unflatten(treedef, [_restored(leaf, v) for (_, leaf), v in zip(leaves, values, strict=True)])
    return jax.random.wrap_key_data(jnp.asarray(new), impl=jax.random.key_impl(old)) if _is_key(old) else new


def _names(path):
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return names[:-1] if isinstance(path[-1], jax.tree_util.GetAttrKey) else names  # the value of a variable


def _is_nnx(node):
    return isinstance(node, nnx.State)


def _is_key(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


_register(TrainState)


def check_state(call: str, state: Any) -> None:
    """Check that a step is given a training state whose arrays exist."""
    if not isinstance(state, TrainState):
        raise TypeError(
            f"{call}(...)(state=...): expected bnjax.training.TrainState, got {type(state).__module__}."
            f"{type(state).__name__}, which has no running statistics. Call bnjax.training.TrainState.create."
        )
    check_not_deleted(call + "(...)", {"state": state})


def check_not_deleted(call: str, given: Mapping[str, Any]) -> None:
    """Check that no array of the arguments was given away to a step that donates its state."""
    if not any(map(_is_deleted, jax.tree.leaves(given))):
        return
    paths = (path for path, leaf in jax.tree_util.tree_leaves_with_path(given) if _is_deleted(leaf))
    first, *others = next(paths)
    name = jax.tree_util.keystr((first,), simple=True)
    raise ValueError(
        f"{call}({name}=...): {name}{jax.tree_util.keystr(tuple(others))} was deleted, because a step reused the "
        "memory of the state that it was given. Go on with the state that the step returned. To use a state or its "
        "params again, as for an average of weights, keep a copy of them before the step, jax.tree.map(jnp.copy, "
        "state), or make the step with train_step(..., donate=False)."
    )


def _is_deleted(leaf):
    return isinstance(leaf, Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()
