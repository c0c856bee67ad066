"""Arrays of all indices of named axes: gathered, or summed, in one collective.

Axes of a mesh are mapped by `shard_map` or `pmap` and have collectives. Axes of `vmap` have none: a gather over them
uses the batch axis of `vmap`.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.core.jax_internals import mesh_axes

Groups = Sequence[Sequence[int]] | None


def kinds_of_axes(names: tuple[Hashable, ...], groups: Groups) -> tuple[tuple[Hashable, ...], tuple[Hashable, ...]]:
    """The names of mesh axes, and the names of vmap axes."""
    on_mesh = tuple(name for name in names if name in mesh_axes())
    on_vmap = tuple(name for name in names if name not in on_mesh)
    if groups is not None and on_mesh and on_vmap:
        raise ValueError(
            f"axis_index_groups={groups}: the axes {on_mesh} lie on a mesh and {on_vmap} are mapped by vmap. "
            "Pass groups over axes of one kind."
        )
    return on_mesh, on_vmap


def gather(tree: Any, names: tuple[Hashable, ...], groups: Groups) -> Any:
    """The arrays of every index of mapped axes, stacked; with groups, only this index's group, padded with zeros.

    Over axes of a mesh one collective sends all arrays, as rows of real numbers.
    """
    if names[0] not in mesh_axes():
        return jax.tree.map(lambda leaf: _own_group(_gather_one_by_one(leaf, names), names, groups), tree)
    leaves, treedef = jax.tree.flatten(tree)
    rows = jnp.stack([row for leaf in leaves for row in _real_rows(leaf)])
    rows = _varying(rows, names)
    # One collective serves any number of mesh axes; "invarying" types its result as replicated.
    if groups is None:
        gathered = lax.all_gather(rows, names, to="invarying")
    elif len({*map(len, groups)}) == 1:
        gathered = lax.all_gather(rows, names, axis_index_groups=groups)
    else:  # JAX gathers in groups of one size only
        gathered = _own_group(lax.all_gather(rows, names), names, groups)
    columns = iter(jnp.moveaxis(gathered, 1, 0))
    complete = [lax.complex(next(columns), next(columns)) if jnp.iscomplexobj(v) else next(columns) for v in leaves]
    return jax.tree.unflatten(treedef, complete)


def _real_rows(leaf):
    return [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]


def _gather_one_by_one(leaf, names):
    """An array of every index of axes of vmap, which have to be gathered one name at a time."""
    gathered = leaf
    for name in reversed(names):
        try:
            gathered = lax.all_gather(gathered, name)
        except AssertionError as error:  # which has no message
            raise ValueError(
                f"axis_name={name!r}: JAX has no collectives over an axis of vmap inside shard_map with "
                "check_vma=True. Pass check_vma=False to shard_map, or shard that axis too."
            ) from error
    return gathered.reshape(-1, *leaf.shape)


def _own_group(gathered, names, groups):
    """The rows of the group that this index belongs to, out of the rows of all indices, padded with zeros."""
    if groups is None:
        return gathered
    members = np.full((len(gathered), max(map(len, groups))), -1)
    for group in groups:
        members[list(group), : len(group)] = group
    own = jnp.asarray(members)[lax.axis_index(names)]
    return jnp.where(own.reshape(-1, *(1,) * (gathered.ndim - 1)) >= 0, gathered[own], 0)


def sum_over(rows: Any, names: tuple[Hashable, ...], groups: Groups) -> Any:
    """The sums of a list of arrays over mapped axes of a mesh, or over this index's group, in one collective."""
    if not names:
        return rows
    rows = jnp.stack(rows)
    return lax.psum(_varying(rows, names), names) if groups is None else jnp.sum(gather(rows, names, groups), 0)


def _varying(rows, names):
    """`rows`, typed as varying over mesh axes, as collectives require; rows of a replicated x are not."""
    return rows + (0 * lax.axis_index(names)).astype(rows.dtype)
