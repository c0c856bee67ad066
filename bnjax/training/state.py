"""A training state with running statistics: its creation, its serialization, and checks before it is donated."""

import dataclasses
from collections.abc import Mapping
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, serialization, struct
from flax.core import unfreeze
from flax.training import train_state
from jax import Array

from bnjax.core import trees
from bnjax.core.jax_internals import is_traced

_OUTPUTS = ("intermediates", "batch_moments")


class TrainState(train_state.TrainState):
    """Flax's `TrainState` with running statistics, keys for random numbers, and the model's other collections.

    Args:
      apply_fn: `model.apply` of a Linen model, or the function that `bnjax.nnx.functional` returns.
      params, tx: parameters, and the optax transformation that updates them.
      batch_stats: running statistics.
      rngs: None, or keys by name (`{"dropout": key}`). Each step and micro-batch gets its own key, derived from these.
      collections: the model's other variables by collection, such as a cache. `create` puts every keyword that is not a
        field of this class here, except `intermediates` and `batch_moments`, which are outputs. In training these
        collections are mutable, as in Flax: each call of the model reads the result of the call before, from one
        micro-batch or step to the next. In evaluation they are only read.

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

    batch_stats: Any = struct.field(default_factory=dict)
    rngs: Any = None
    collections: Any = struct.field(default_factory=dict)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        _register(cls)

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: Any, **kwargs: Any) -> "TrainState":
        """A state at step 0, which holds copies. Without them a step that donates the state would delete `params`."""
        for name, tree in {"params": params, **kwargs}.items():
            trees.check_no_report(f"TrainState.create({name}=...)", tree)
        check_alive("TrainState.create(...)", {"params": params, **kwargs})
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

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """The state after one update of the parameters by their gradients, with other fields replaced by `kwargs`."""
        check_alive("TrainState.apply_gradients(...)", self)
        return super().apply_gradients(grads=grads, **kwargs)


def check_alive(call: str, state: Any) -> list[Array]:
    """The arrays of a state, after a check that none was deleted by a step to which the state was donated."""
    arrays = [leaf for leaf in jax.tree.leaves(state) if _is_array(leaf)]
    deleted = sum([array.is_deleted() for array in arrays])
    if deleted:
        paths = jax.tree_util.tree_leaves_with_path(state)
        first = next(path for path, leaf in paths if _is_array(leaf) and leaf.is_deleted())
        raise ValueError(
            f"{call}: {deleted} of {len(arrays)} arrays are deleted, {_name(first)} first. A step that was called "
            "with their state has given their memory to the new one. Continue with the state that the step returned. "
            "To keep one, or its params for a moving average, copy it before the step, jax.tree.map(jnp.copy, state), "
            "or make the step with train_step(..., donate=False)."
        )
    return arrays


def check_unshared(call: str, state: Any, arrays: list[Array]) -> None:
    """Check that no array is two leaves of the state: its memory could not be donated twice."""
    if len(set(map(id, arrays))) == len(arrays):
        return
    seen: dict[int, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        other = seen.setdefault(id(leaf), path)
        if other is not path and _is_array(leaf):
            raise ValueError(
                f"{call}: {_name(other)} and {_name(path)} are the same array, whose memory the step cannot reuse "
                "twice. Copy one of them, jax.tree.map(jnp.copy, ...), or make the step with "
                "train_step(..., donate=False)."
            )


def _is_array(leaf):
    return isinstance(leaf, Array) and not is_traced(leaf)


def _name(path):
    name = jax.tree_util.keystr(path)
    return f"state{name}" if name.startswith(".") else name


def _register(cls):
    """Register a class of states with `flax.serialization`, whose format has no typed keys and no NNX states."""
    data = [field.name for field in dataclasses.fields(cls) if field.metadata.get("pytree_node", True)]

    def to_state_dict(state):
        check_alive("to_state_dict(...)", state)
        fields = {name: serialization.to_state_dict(_nested(getattr(state, name))) for name in data}
        return jax.tree.map(_packed, fields)

    def from_state_dict(state, stored):
        if set(stored) != set(data):
            raise ValueError(
                f"from_state_dict(state={sorted(stored)}): expected the fields of {cls.__name__}, {sorted(data)}. "
                "Restore into a state of the class that was stored."
            )
        fields = jax.tree.map(_unpacked, stored, is_leaf=_is_packed)
        restored = {}
        for name in data:
            own = getattr(state, name)
            new = serialization.from_state_dict(_nested(own), fields[name], name=name)
            has_states = any(map(_is_nnx, jax.tree.leaves(own, is_leaf=_is_nnx)))
            restored[name] = jax.tree.map(_filled, own, new, is_leaf=_is_nnx) if has_states else new
        return state.replace(**restored)

    serialization.register_serialization_state(cls, to_state_dict, from_state_dict, override=True)


def _nested(tree):
    """The tree with dictionaries of arrays, by name, in place of NNX states."""

    def nested(node):
        if not _is_nnx(node):
            return node
        found: dict[str, Any] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(node):
            *above, last = _keys(path)
            parent = found
            for key in above:
                parent = parent.setdefault(key, {})
            parent[last] = leaf
        return found

    return jax.tree.map(nested, tree, is_leaf=_is_nnx)


def _filled(own, new):
    """`new`, as an NNX state if `own` is one; `new` is then what `_nested` makes of such a state."""
    if not _is_nnx(own):
        return new
    paths, treedef = jax.tree_util.tree_flatten_with_path(own)
    return jax.tree.unflatten(treedef, [reduce(lambda node, key: node[key], _keys(path), new) for path, _ in paths])


def _keys(path):
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return keys[:-1] if isinstance(path[-1], jax.tree_util.GetAttrKey) else keys  # the value of a variable


def _is_nnx(node):
    return isinstance(node, nnx.State)


def _packed(leaf):
    if not (isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)):
        return leaf
    return {"key_data": jax.random.key_data(leaf), "key_impl": str(jax.random.key_impl(leaf))}


def _is_packed(tree):
    return isinstance(tree, Mapping) and set(tree) == {"key_data", "key_impl"}


def _unpacked(tree):
    if not _is_packed(tree):
        return tree
    return jax.random.wrap_key_data(jnp.asarray(tree["key_data"]), impl=tree["key_impl"])


_register(TrainState)
