"""Explicit sharding: the value, the state and the gradients of the whole arrays, or an error that says what to pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support.pairwise import pairwise

RNG = np.random.default_rng(9)
X = (RNG.standard_normal((16, 4)) * 2 + 5).astype(np.float32)
G = RNG.standard_normal((16, 4)).astype(np.float32)
PARAMS = bnjax.BNParams(jnp.array([0.5, -2.0, 3.0, 1.0]), jnp.array([1.0, 0.0, -1.0, 2.0]))
STATE = bnjax.bn_init(4)[1]
INDEXED, INDEXED_STATE = jax.jit(lambda: bnjax.indexed_bn_init(4, 3, indexed_params=True))()
CLASSES = bnjax.BNParams(*jnp.asarray(RNG.standard_normal((2, 3, 4)), jnp.float32))
LABEL = np.arange(16) % 3
MASKS = {"none": None, "boolean": (np.arange(16) % 5 > 0).reshape(16, 1), "weights": RNG.random((16, 1), np.float32)}


def ghost(size):
    return lambda params, state, x, mask: bnjax.ghost_bn_apply(params, state, x, True, ghost_size=size, mask=mask)


def conditional(params, state, x, mask, label):
    return bnjax.bn_apply(bnjax.conditional_params(params, label, x), state, x, True, mask=mask)


# A function, its parameters and state, and a further argument.
CASES = {
    "bn_apply": (lambda p, s, x, m: bnjax.bn_apply(p, s, x, True, mask=m), PARAMS, STATE),
    "evaluation": (lambda p, s, x, m: bnjax.bn_apply(p, s, x, False, mask=m), PARAMS, STATE),
    "without a state": (lambda p, s, x, m: bnjax.bn_apply(p, None, x, True, mask=m), PARAMS, STATE),
    "schedule": (
        lambda p, s, x, m: bnjax.bn_apply(p, s, x, True, mask=m, momentum=bnjax.cumulative_average),
        PARAMS,
        STATE,
    ),
    "renorm_bn_apply": (
        lambda p, s, x, m: bnjax.renorm_bn_apply(p, s, x, True, r_max=2.0, d_max=1.0, mask=m),
        PARAMS,
        STATE,
    ),
    "ghost_bn_apply": (ghost(4), PARAMS, STATE),
    "ghost_bn_apply of the whole": (ghost(16), PARAMS, STATE),
    "conditional_params": (conditional, CLASSES, STATE, LABEL),
    "indexed_bn_apply": (
        lambda p, s, x, m, i: bnjax.indexed_bn_apply(p, s, x, True, index=i, mask=m),
        INDEXED,
        INDEXED_STATE,
        np.int32(1),
    ),
}
# Over data, over data and features, over features, and parameters and state over nothing, features, data (FSDP).
X_SPECS = [P("a"), P("a", "b"), P(None, "b")]
VARIABLE_SPECS = [P(), P("b"), P("a")]


def mesh():
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)


@partial(jax.jit, static_argnums=0)
def step(function, params, state, x, mask, g, *rest):
    def loss(params, x):
        y, new = function(params, state, x, mask, *rest)
        return jnp.sum(y * g), (y, new)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)


def put(tree, spec):
    """On the mesh, with the spec for the last axes, or for the first ones of what has a value for each example."""

    def one(v):
        each = v.ndim > 0 and v.shape[0] == 16
        own = spec[: v.ndim] if each else (*[None] * (v.ndim - 1), *spec)[: v.ndim]
        own = [None if n == 1 else name for n, name in zip(v.shape, own, strict=False)]
        return jax.device_put(v, NamedSharding(jax.sharding.get_mesh(), P(*own)))

    return jax.tree.map(one, tree)


# All pairs for the layer itself; the variants see each spec once, with the mask that has most to do.
SHARDED = [("bn_apply", *case) for case in pairwise(tuple(MASKS), X_SPECS, VARIABLE_SPECS)]
SHARDED += [
    (name, "weights", x_spec, VARIABLE_SPECS[(i + j) % 3])
    for i, name in enumerate(CASES)
    for j, x_spec in enumerate(X_SPECS)
    if name != "bn_apply"
]


@pytest.mark.parametrize(("name", "mask", "x_spec", "variable_spec"), SHARDED, ids=lambda part: str(part))
def test_explicitly_sharded_matches_the_whole(name, mask, x_spec, variable_spec):
    function, params, state, *rest = CASES[name]
    want = step(function, params, state, X, MASKS[mask], G, *rest)
    with jax.set_mesh(mesh()):
        variables = put((params, state), variable_spec)
        arrays = put((X, MASKS[mask], G, *rest), x_spec)
        got = step(function, *variables, *arrays)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    # Sums of 16 values of size 10 at most, in another order: 16 eps of the largest is 2e-5, and few come near.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    new = got[0][1][1]
    if new is not None:  # a scan carries it
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, variables[1])


ROWS = (RNG.standard_normal((16, 8, 4)) * 2 + 5).astype(np.float32)
SOME = {"none": None} | {
    str(shape): RNG.random(shape) < 0.8 for shape in [(1, 1, 1), (16, 1, 1), (1, 8, 1), (16, 8, 1)]
}


SPECS = [P("a"), P("a", None, "b"), P("b", "a"), P(None, "a", "b")]


@pytest.mark.parametrize("mask", SOME)
@pytest.mark.parametrize(
    ("name", "spec"),
    # With the batch over both axes, a group of 4 examples would lie on two devices, which is an error.
    [("bn_apply", P(("a", "b"))), *((name, spec) for name in ("bn_apply", "ghost_bn_apply") for spec in SPECS)],
)
def test_masks_that_lack_axes_may_be_sharded_with_any_axis_of_x(name, spec, mask):
    # Of 8 rows 2 lie on each device where "a" divides them, and a part of them is one row.
    function, params, state = CASES[name]
    want, lengths = function(params, state, ROWS, SOME[mask]), (16, 8, 1)
    with jax.set_mesh(mesh()):
        spec = (*spec, None, None)[:3]
        own = [
            part if SOME[mask] is not None and n == SOME[mask].shape[a] else None
            for a, (n, part) in enumerate(zip(lengths, spec, strict=True))
        ]
        m = None if SOME[mask] is None else jax.device_put(SOME[mask], P(*own[:2], None))
        got = jax.jit(function)(params, state, jax.device_put(ROWS, P(*spec)), m)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [3, 5, 8])
def test_ghost_says_which_groups_fit_explicit_shards(size):
    with jax.set_mesh(mesh()):
        x = put(X, P("a"))
        with pytest.raises(ValueError, match=rf"whole groups of ghost_size={size}. Pass a ghost_size that divides 4"):
            ghost(size)(PARAMS, STATE, x, None)
        y, new = ghost(size)(PARAMS, STATE, jax.sharding.reshard(x, P()), None)  # as the message says
    want_y, want = ghost(size)(PARAMS, STATE, X, None)
    np.testing.assert_allclose(y, want_y, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new, want)


def test_moments_take_a_mask_of_another_sharding():
    with jax.set_mesh(mesh()):
        got = bnjax.batch_moments(put(X, P("a", "b")), mask=jnp.asarray(MASKS["weights"]))
    want = bnjax.batch_moments(X, mask=jnp.asarray(MASKS["weights"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), got, want)
