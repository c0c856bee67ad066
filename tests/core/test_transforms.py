"""Every transform, one answer: the float64 oracle's for the whole batch on one device."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from experiments.benchmark.traffic import Program
from tests.support import reference
from tests.support.pairwise import pairwise
from tests.support.whole_batch import (
    BIAS,
    DEVICE_ROWS,
    FEATURES,
    MASKS,
    PARAMS,
    ROWS,
    SCALE,
    STATE,
    G,
    X,
    assert_matches_the_oracle,
    loss,
)


def split(v, *shape):
    return None if v is None else v.reshape(*shape, *v.shape[1:])


def whole(step, mask):
    return jax.tree.map(np.asarray, differentiated(step)(PARAMS, X, mask, G))


@cache
def differentiated(step):
    """Compiled once for masks of one shape and dtype."""
    return jax.jit(jax.value_and_grad(step, (0, 1), has_aux=True))


def mapped(mapping, shape, name):
    """A step over `shape` mapped axes: mapping(f, in_axes) maps one call's loss over the leading axes of x, mask, g."""

    def step(params, x, mask, g):
        def one(x, mask, g):
            return loss(params, x, mask, g, axis_name=name)

        in_axes = (0, None if mask is None else 0, 0)
        value, (y, new) = mapping(one, in_axes)(*(split(v, *shape) for v in (x, mask, g)))
        # Every device holds the same state; the first is compared, its equality with the rest asserted elsewhere.
        return jnp.sum(value), (y.reshape(X.shape), jax.tree.map(lambda s: s.reshape(-1, FEATURES)[0], new))

    return step


@cache
def sharded_map(sizes, check_vma):
    names = tuple("ab"[: len(sizes)])
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))

    def step(params, x, mask, g):
        specs = (P(), P(names), None if mask is None else P(names), P(names))

        @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=(P(names), (P(names), P())), check_vma=check_vma)
        def one(params, x, mask, g):
            value, aux = loss(params, x, mask, g, axis_name=names)
            return value[None], aux

        value, aux = one(params, x, mask, g)
        return jnp.sum(value), aux

    return step


def vmap(name):
    return lambda f, in_axes: jax.vmap(f, in_axes, axis_name=name)


STEPS = {
    "one_device": loss,
    "vmap": mapped(vmap("i"), (4, 4), "i"),
    "vmap_of_examples": mapped(vmap("i"), (ROWS,), "i"),
    "nested_vmap": mapped(lambda f, ax: vmap("j")(vmap("i")(f, ax), ax), (2, 4, 2), ("j", "i")),
    "nested_vmap_of_examples": mapped(lambda f, ax: vmap("j")(vmap("i")(f, ax), ax), (2, 8), ["i", "j"]),
    "jitted_vmap": jax.jit(mapped(vmap("i"), (4, 4), "i")),
    "pmap": mapped(lambda f, ax: jax.pmap(f, "i", in_axes=ax), (4, 4), "i"),
    "pmap_of_vmap": mapped(lambda f, ax: jax.pmap(vmap("i")(f, ax), "j", in_axes=ax), (2, 4, 2), ("i", "j")),
    "shard_map": sharded_map((4,), True),
    "shard_map_unchecked": sharded_map((4,), False),
    "shard_map_two_axes": sharded_map((2, 2), True),
    "shard_map_two_axes_unchecked": sharded_map((2, 2), False),
    "checkpoint": jax.checkpoint(loss),
}


@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", STEPS)
def test_transforms_match_the_whole_batch(name, mask):
    assert_matches_the_oracle(whole(STEPS[name], MASKS[mask]), MASKS[mask])


SHARDED_JIT = pairwise([P("a"), P("a", "b"), P(None, "b")], [AxisType.Auto, AxisType.Explicit], tuple(MASKS))


def sharded(spec, kind, mask):
    """A mesh, and params, x, mask, cotangent and state on it."""
    mesh = jax.make_mesh((2, 3) if spec[1:] == ("b",) else (4, 1), ("a", "b"), axis_types=(kind, kind))
    x, g = jax.device_put((X, G), NamedSharding(mesh, spec))
    m = None if MASKS[mask] is None else jax.device_put(MASKS[mask], NamedSharding(mesh, P(spec[0])))
    params, state = jax.device_put((PARAMS, STATE), NamedSharding(mesh, P(*spec[1:])))
    return mesh, params, x, m, g, state


@pytest.mark.parametrize(("spec", "kind", "mask"), SHARDED_JIT)
def test_sharded_jit_matches_the_whole_batch(spec, kind, mask):
    mesh, *arrays = sharded(spec, kind, mask)
    with jax.set_mesh(mesh):
        assert_matches_the_oracle(differentiated(loss)(*arrays), MASKS[mask])


@jax.jit
def layer(params, x, mask, g, state):
    """Without a loss, which is a collective of its own."""
    y, transpose, new = jax.vjp(lambda p, x: bnjax.bn_apply(p, state, x, True, mask=mask), params, x, has_aux=True)
    return y, new, transpose(g)


@pytest.mark.optimized
@pytest.mark.lowerings
@pytest.mark.parametrize(("spec", "kind", "mask"), SHARDED_JIT)
def test_sharded_jit_has_one_collective_each_way(spec, kind, mask):
    mesh, *arrays = sharded(spec, kind, mask)
    with jax.set_mesh(mesh):
        program = Program(layer.lower(*arrays).compile().as_text())
    # The sums of the forward pass and those of the backward pass. Real-valued weights have the number of valid elements
    # beside them, of 4 bytes, which XLA does not combine with sums in float64. Features over "b" need no collective.
    sizes = [c.bytes for c in program.collectives]
    assert len([size for size in sizes if size != 4]) == (0 if spec[0] is None else 2)
    assert sizes.count(4) == (spec[0] is not None and mask == "weights")
    assert program.conditionals == 0


def collectives(lowered):
    """The collectives of the compiled program on the usual way, as (kind, bytes): those in no branch of the guard."""
    return [(c.kind, c.bytes) for c in Program(lowered.compile().as_text()).collectives]


@cache
def forward(step):
    return jax.jit(lambda *args: step(*args)[1])


@cache
def gradients(step):
    return jax.jit(jax.grad(step, (0, 1), has_aux=True))


@pytest.mark.optimized
@pytest.mark.parametrize(("mask", "sizes", "check_vma"), pairwise(tuple(MASKS), [(4,), (2, 2)], [True, False]))
def test_named_axes_cost_one_collective_forward_and_one_backward(mask, sizes, check_vma):
    step = sharded_map(sizes, check_vma)
    args = (PARAMS, X, MASKS[mask], G)
    # Weights that are not known to be 1 travel too. Real-valued ones are summed first, with the number of valid
    # elements, and their mean weight is merged. Unchecked, the bits of a checksum travel with the first sums.
    rows = {"none": 2, "weights": 4}.get(mask, 3)
    sums = [8 * FEATURES] if mask == "weights" else []
    sums.append(4 * rows * FEATURES)
    sums[0] += 0 if check_vma else 128
    # Only the outputs of the forward pass: the loss of this test would be one more collective.
    assert collectives(forward(step).lower(*args)) == [("all-reduce", size) for size in sums]
    # Unchecked, JAX sums the gradients of scale and bias itself, and XLA joins the three sums into one.
    sums.append((8 if check_vma else 16) * FEATURES)
    assert collectives(gradients(step).lower(*args)) == [("all-reduce", size) for size in sums]


@pytest.mark.optimized
def test_gradients_inside_shard_map_cost_one_collective_backward():
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("a"), P("a")), out_specs=(P(), P()))
    def step(params, x, g):
        return jax.grad(lambda p: loss(p, x, None, g, axis_name="a"), has_aux=True)(params)[0], lax.psum(1, "a")

    assert [kind for kind, _ in collectives(step.lower(PARAMS, X, G))] == ["all-reduce", "all-reduce"]


@pytest.mark.optimized
@pytest.mark.parametrize("wrt", ["scale", "bias"])
@pytest.mark.parametrize("train", [True, False])
def test_the_gradient_of_scale_or_bias_alone_moves_no_more_than_its_size(wrt, train):
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("a"), P("a")), out_specs=P())
    def step(value, x, g):
        params = bnjax.BNParams(None, None)._replace(**{wrt: value})

        def inner(value):
            y, _ = bnjax.bn_apply(params._replace(**{wrt: value}), STATE, x, train, axis_name="a")
            return jnp.sum(y * g)

        return jax.grad(inner)(value)

    mean, var = reference.moments(X)[1:] if train else (np.zeros(3), np.ones(3))
    want = (G * (X - mean) / np.sqrt(var + 1e-5) if wrt == "scale" else G).sum(0)
    np.testing.assert_allclose(step(SCALE, X, G), want, atol=2e-5)
    assert collectives(step.lower(SCALE, X, G))[-1] == ("all-reduce", 4 * FEATURES)


GROUPS = {"pairs": [[0, 3], [1, 2]], "unequal": [[2], [3, 0, 1]]}


def grouped(mapping, groups):
    """State per device, stacked, and the gradients, with statistics shared in groups of four devices."""

    def step(params, x, mask, g):
        if mapping == "vmap" or mapping == "pmap":
            transform = jax.vmap if mapping == "vmap" else jax.pmap
            f = transform(
                lambda x, mask, g: loss(params, x, mask, g, axis_name="i", axis_index_groups=groups), axis_name="i"
            )
            value, (y, new) = f(*(split(v, 4, 4) for v in (x, mask, g)))
            return jnp.sum(value), (y.reshape(X.shape), new)
        sizes, names = ((2, 2), ("a", "b")) if "two" in mapping else ((4,), ("a",))
        mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))

        @partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P(), P(names), P(names), P(names)),
            out_specs=P(names),
            check_vma="unchecked" not in mapping,
        )
        def one(params, x, mask, g):
            value, (y, new) = loss(params, x, mask, g, axis_name=names, axis_index_groups=groups)
            return value[None], (y, jax.tree.map(lambda s: s[None], new))

        value, aux = one(params, x, mask, g)
        return jnp.sum(value), aux

    return step


@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    "mapping", ["vmap", "pmap", "shard_map", "shard_map_unchecked", "shard_map_two", "shard_map_two_unchecked"]
)
def test_axis_index_groups_match_each_group_as_a_batch_of_its_own(mapping, groups):
    mask = MASKS["empty"]
    (_, (y, new)), (dparams, dx) = whole(grouped(mapping, GROUPS[groups]), mask)
    dscale = 0
    for group in GROUPS[groups]:
        rows = DEVICE_ROWS[group].ravel()
        some = reference.moments(X[rows], mask=mask[rows])[0].max() > 0
        if not some:  # only the group of device 2 has no valid row
            np.testing.assert_allclose(
                y[rows], reference.normalize(X[rows], np.zeros(3), np.ones(3), SCALE, BIAS), 1e-5
            )
            np.testing.assert_array_equal(new.count[np.array(group)], 0)
            dscale = dscale + (G[rows] * X[rows] / np.sqrt(1 + 1e-5)).sum(0)
            continue
        want_y, mean, var = reference.train(
            X[rows], SCALE, BIAS, np.zeros(3), np.ones(3), momentum=0.9, mask=mask[rows]
        )
        want_dx, group_dscale, _ = reference.gradients(X[rows], G[rows], SCALE, mask=mask[rows])
        np.testing.assert_allclose(y[rows], want_y, atol=2e-5)
        np.testing.assert_allclose(dx[rows], want_dx, atol=2e-5)
        for device in group:
            np.testing.assert_allclose(new.mean[device], mean, rtol=2e-6)
            np.testing.assert_allclose(new.var[device], var, rtol=2e-6)
        dscale = dscale + group_dscale
    np.testing.assert_allclose(dparams.scale, dscale, atol=3e-5)


@pytest.mark.optimized
@pytest.mark.parametrize(("groups", "gathered"), [([[0, 2], [1, 3]], 2), ([[0], [1, 2, 3]], 4)])
def test_groups_gather_from_their_own_devices(groups, gathered):
    # Only groups of several sizes gather from all devices, because JAX has no collective for them.
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    apply = partial(bnjax.bn_apply, PARAMS, STATE, train=True, axis_name="a", axis_index_groups=groups)
    specs = {"in_specs": P("a"), "out_specs": (P("a"), jax.tree.map(lambda _: P("a"), STATE))}
    mapped = jax.jit(jax.shard_map(apply, mesh=mesh, **specs))
    rows, features = 3, X.shape[-1]
    assert collectives(mapped.lower(X)) == [("all-gather", gathered * rows * features * 4)]


def test_sync_over_one_of_two_mesh_axes_matches_each_column_of_the_mesh():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(("a", "b")), P(("a", "b"))), out_specs=(P(("a", "b")), P("b")))
    def one(params, x, g):
        value, (_, new) = loss(params, x, None, g, axis_name="a")
        return value[None], jax.tree.map(lambda s: s[None], new)

    def step(params, x, mask, g):
        value, new = one(params, x, g)
        return jnp.sum(value), new

    (_, new), (dparams, dx) = whole(step, None)
    dscale = 0
    for b, devices in enumerate(([0, 2], [1, 3])):
        rows = DEVICE_ROWS[devices].ravel()
        _, mean, var = reference.train(X[rows], SCALE, BIAS, np.zeros(3), np.ones(3), momentum=0.9)
        want_dx, column_dscale, _ = reference.gradients(X[rows], G[rows], SCALE)
        np.testing.assert_allclose(new.mean[b], mean, rtol=2e-6)
        np.testing.assert_allclose(new.var[b], var, rtol=2e-6)
        np.testing.assert_allclose(dx[rows], want_dx, atol=2e-5)
        dscale = dscale + column_dscale
    np.testing.assert_allclose(dparams.scale, dscale, atol=2e-5)


def test_derivatives_where_x_is_replicated_over_one_of_the_named_axes():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    @partial(jax.shard_map, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    def forward(x):
        return bnjax.bn_apply(PARAMS, STATE, x, True, axis_name=("a", "b"))[0]

    (got,) = jax.jit(lambda x, g: jax.vjp(forward, x)[1](g))(X, G)
    np.testing.assert_allclose(got, reference.gradients(X, G, SCALE)[0], atol=2e-5)


@jax.jit
def each_alone(x, mask):
    def one(x, m):
        return bnjax.bn_apply(PARAMS, STATE, x, True, mask=m, momentum=0.9, axis_name="i")

    return jax.vmap(one, (0, None if mask is None else 0), axis_name="i")(x, mask)


@pytest.mark.parametrize("mask", MASKS)
def test_vmap_over_an_axis_with_explicit_sharding_matches_the_whole_batch(mask):
    # Only the forward pass: jax 0.10.2 rejects the gradient for shardings that it made itself, and lowers no psum over
    # such an axis whose operand it cannot divide. Outside vmap, explicit sharding is tested with gradients above.
    with jax.set_mesh(jax.make_mesh((4,), ("a",), axis_types=(AxisType.Explicit,))):
        x = jax.device_put(X, P("a"))
        m = None if MASKS[mask] is None else jax.device_put(MASKS[mask], P("a"))

        y, new = each_alone(x, m)
    want, mean, var = reference.train(X, SCALE, BIAS, np.zeros(3), np.ones(3), momentum=0.9, mask=MASKS[mask])
    np.testing.assert_allclose(y, want, atol=2e-5)
    np.testing.assert_allclose(new.mean, np.broadcast_to(mean, X.shape), rtol=2e-6)
    np.testing.assert_allclose(new.var, np.broadcast_to(var, X.shape), rtol=2e-6)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("x_spec", "state_spec"), [(P("a", "b"), P()), (P("a"), P("b"))])
def test_explicitly_sharded_features_need_not_be_sharded_alike(x_spec, state_spec, mask):
    with jax.set_mesh(jax.make_mesh((2, 3), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)):
        x, g = (jax.device_put(v, x_spec) for v in (X, G))
        m = None if MASKS[mask] is None else jax.device_put(MASKS[mask], P("a"))
        params, state = jax.device_put((PARAMS, STATE), NamedSharding(jax.sharding.get_mesh(), state_spec))
        result = differentiated(loss)(params, x, m, g, state)
    assert_matches_the_oracle(result, MASKS[mask])


def test_vmap_inside_checked_shard_map_says_what_to_do():
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))

    def f(x):
        return jax.vmap(lambda x: bnjax.batch_moments(x, axis_name=("a", "i")).mean, axis_name="i")(x)

    x = split(X, 8, 2)
    with pytest.raises(ValueError, match=r"axis_name='i': .* Pass check_vma=False"):
        jax.shard_map(f, mesh=mesh, in_specs=P("a"), out_specs=P("a"))(x)
    unchecked = jax.shard_map(f, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False)
    np.testing.assert_allclose(unchecked(x), np.broadcast_to(reference.moments(X)[1], (8, 3)), rtol=1e-6)


def test_a_replicated_x_counts_once_per_device():
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(lambda x: bnjax.batch_moments(x, axis_name="a"), mesh=mesh, in_specs=P(), out_specs=P())
    _, mean, var = reference.moments(X)
    got = f(X)
    np.testing.assert_array_equal(got.weight, [4 * ROWS] * 3)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(got.var, var, rtol=1e-6)
