"""The pair of reductions and its transpose: values, derivatives, transforms, and what is compiled of them."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.core import reductions
from bnjax.core.reductions import spread, sums

pytestmark = pytest.mark.optimized

# Places to reduce over: none, fewer than there are slabs, as many, a prime, with and without something left over, more
# than one level of slabs; before, after and around the feature axis.
CASES = [
    ((5, 3), ()),
    ((0, 3), (0,)),
    ((7, 3), (0,)),
    ((16, 3), (0,)),
    ((4099, 3), (0,)),
    ((3, 4099), (1,)),
    ((60, 100), (0,)),
    ((64, 8, 8, 5), (0, 1, 2)),
    ((20, 5, 9, 11), (0, 2, 3)),
    ((2, 5, 9, 11), (0, 2, 3)),
    ((4, 33, 7, 2), (1, 2)),
]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make(shape, axes, rng):
    """g and x, and per feature mean, c and k."""
    few = [1 if a in axes else size for a, size in enumerate(shape)]
    return [rng.standard_normal(s) for s in (shape, shape, few, few, few)]


@partial(jax.jit, static_argnums=5)
def transposes(g, x, mean, c, k, axes):
    """`sums` and `spread`, and what each is transposed to."""
    (g_bar,) = jax.linear_transpose(lambda g: sums(g, x, mean, axes), g)((c, k))
    c_bar, k_bar = jax.linear_transpose(lambda c, k: spread(c, k, x, mean), c, k)(g)
    return sums(g, x, mean, axes), spread(c, k, x, mean), g_bar, c_bar, k_bar


@pytest.mark.parametrize("way", [sums, reductions._gpu_sums])
@pytest.mark.parametrize(("shape", "axes"), CASES)
def test_sums_match_numpy(way, shape, axes, rng):
    g, x, mean, _, _ = make(shape, axes, rng)
    total, product = jax.jit(way, static_argnames="axes")(g, x, mean, axes=axes)
    np.testing.assert_allclose(total, np.sum(g, axes, keepdims=True), atol=1e-11)
    np.testing.assert_allclose(product, np.sum(np.asarray(g) * (x - mean), axes, keepdims=True), atol=1e-11)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("shape", "axes"), [*CASES, ((16, 8, 8, 128), (0, 1, 2)), ((3, 24, 2, 64), (1, 2))])
def test_joint_sums_match_numpy_however_they_are_cut(shape, axes, devices, rng):
    first, second = rng.standard_normal((2, *shape))
    got = reductions.joint_sums(jnp.asarray(first), jnp.asarray(second), axes, devices)
    np.testing.assert_allclose(got, [first.sum(axes), second.sum(axes)], atol=1e-11)


@pytest.mark.parametrize(
    ("shape", "devices", "pieces"),
    [
        ((2048, 1024), 1, (0, 1)),  # as many sums as are wanted
        ((2048, 128), 1, (0, 8)),
        ((7, 8, 8, 256), 1, (0, 7)),
        ((5, 8, 8, 128), 1, (1, 8)),
        ((7, 11, 64), 1, (0, 1)),  # pieces of a few elements would be arrays of the size of x
        ((64, 8, 8, 512), 8, (0, 16)),
        ((12, 8, 8, 1024), 8, (0, 12)),  # the batch lies on four devices at the most
        ((7, 8, 8, 64), 8, (0, 7)),
    ],
)
def test_pieces_are_enough_and_whole_on_each_device(shape, devices, pieces):
    axes = tuple(range(len(shape) - 1))
    assert reductions._pieces(shape, axes, devices) == pieces


@pytest.mark.parametrize(
    ("shape", "devices", "pays"),
    [
        ((2048, 64), 1, True),
        ((8192, 64), 1, False),  # XLA splits both sums
        ((2039, 64), 1, False),  # a prime: no pieces, and too few sums without
        ((2039, 1024), 1, True),
        ((251, 64), 1, True),  # few elements
        ((16384, 64), 8, True),
        ((60, 8, 8, 64), 8, False),
    ],
)
def test_joint_sums_are_for_short_sums_that_are_many_or_have_pieces(shape, devices, pays):
    axes = tuple(range(len(shape) - 1))
    assert reductions.joint_sums_pay(jnp.zeros(shape), axes, devices, parts=devices) == pays


@pytest.mark.parametrize(("shape", "axes"), [(shape, axes) for shape, axes in CASES if axes and 0 not in shape])
def test_batch_moments_match_numpy_however_many_places(shape, axes, rng):
    x = rng.standard_normal(shape) + 100.0
    features = tuple(a for a in range(len(shape)) if a not in axes)
    moments = bnjax.batch_moments(jnp.asarray(x), axis=features)
    np.testing.assert_allclose(moments.mean, x.mean(axes), rtol=1e-14)
    np.testing.assert_allclose(moments.var, x.var(axes), rtol=1e-12)
    np.testing.assert_array_equal(moments.weight, np.prod([shape[a] for a in axes]))


@pytest.mark.parametrize(("shape", "axes"), CASES)
def test_sums_and_spread_are_each_others_transpose(shape, axes, rng):
    g, x, mean, c, k = make(shape, axes, rng)
    (total, product), spreaded, g_bar, c_bar, k_bar = transposes(g, x, mean, c, k, axes)
    left = np.sum(c * total) + np.sum(k * product)
    np.testing.assert_allclose(left, np.sum(g * spreaded), rtol=1e-12)
    np.testing.assert_allclose(g_bar, c + k * (x - mean), rtol=1e-12)
    np.testing.assert_allclose(c_bar, total, atol=1e-11)
    np.testing.assert_allclose(k_bar, product, atol=1e-11)


@pytest.mark.parametrize("name", ["sums", "spread"])
def test_derivatives_match_those_of_plain_autodiff(name, rng):
    axes = (0,)
    g, x, mean, c, k = make((33, 3), axes, rng)

    def ours(g, x, mean, c, k):
        return sums(g, x, mean, axes) if name == "sums" else spread(c, k, x, mean)

    def plain(g, x, mean, c, k):
        both = jnp.sum(g, axes, keepdims=True), jnp.sum(g * (x - mean), axes, keepdims=True)
        return both if name == "sums" else c + k * (x - mean)

    def nonlinear(f):
        return lambda *args: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(f(*args)))

    args = g, x, mean, c, k
    every = tuple(range(5))

    def gradient(f):
        return jax.grad(nonlinear(f), every)

    def second(f):
        return jax.grad(lambda *args: sum(jnp.sum(d**2) for d in gradient(f)(*args)), every)

    def forward(f):
        return lambda *args: jax.jvp(nonlinear(f), args, tuple(map(jnp.cos, args)))

    for derive in gradient, second, forward:
        got, want = (jax.tree.leaves(jax.jit(derive(f))(*args)) for f in (ours, plain))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mapped", list(itertools.product([None, 0], [None, 0, 1], [None, 0]))[1:])  # not all None
def test_vmap_is_a_loop(mapped, rng):
    shapes = (40, 3), (40, 3), (1, 3)
    args = [rng.standard_normal(s if d is None else np.insert(s, d, 4)) for s, d in zip(shapes, mapped, strict=True)]
    summed = jax.jit(sums, static_argnums=3)
    got = jax.jit(jax.vmap(lambda *a: sums(*a, (0,)), mapped))(*args)
    for i in range(4):
        each = [a if d is None else np.take(a, i, d) for a, d in zip(args, mapped, strict=True)]
        for one, many in zip(summed(*each, (0,)), got, strict=True):
            np.testing.assert_allclose(many[i], one, rtol=1e-12, atol=1e-12)


def test_without_jit_the_gradient_is_the_same(rng):
    x = jnp.asarray(rng.standard_normal((40, 3)))
    params, state = bnjax.bn_init(3, dtype=jnp.float64)

    def loss(params, x):
        return jnp.sum(jnp.sin(bnjax.bn_apply(params, state, x, True)[0]))

    with jax.disable_jit():
        got = jax.grad(loss, (0, 1))(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.grad(loss, (0, 1))(params, x)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def step(params, x, cotangent):
    _, state = bnjax.bn_init(x.shape[-1])
    y, pullback, new = jax.vjp(lambda params, x: bnjax.bn_apply(params, state, x, True), params, x, has_aux=True)
    return y, new, pullback(cotangent)


@pytest.mark.lowerings
def test_on_one_device_nothing_of_full_size_is_written_but_the_output_and_the_gradient():
    # Speed is memory traffic. XLA's own lowering wrote x - mean as well, twice.
    x = jax.ShapeDtypeStruct((64, 7, 7, 32), jnp.float32)
    compiled = jax.jit(step).lower(bnjax.bn_init(32)[0], x, x).compile()
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :]
    written = re.findall(r"^  (?:ROOT )?%\S+ = \w+\[([\d,]+)\]\S* (?!parameter|bitcast|get-tuple|tuple)", entry, re.M)
    full = [dims for dims in written if np.prod([int(d) for d in dims.split(",")]) >= 64 * 7 * 7 * 32]
    assert len(full) == 2
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 7 * 7 * 32 * 4 / 2


@pytest.mark.lowerings
@pytest.mark.parametrize("rows", [64, 5 * reductions.LONGEST])
def test_slabs_are_for_arrays_that_one_device_holds(rows):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = bnjax.bn_init(3)[0], jnp.ones((rows, 3))

    def complex_sums(f, *args):
        return "complex<f" in f.lower(*args).as_text()

    assert complex_sums(jax.jit(step), params, x, x)
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    assert not complex_sums(jax.jit(step), params, sharded, sharded)
    mapped = jax.shard_map(
        lambda x: step(params, x, x)[2][1], mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    assert complex_sums(jax.jit(mapped), sharded)


@pytest.mark.lowerings
def test_the_backward_pass_keeps_x_and_nothing_else_of_its_size():
    params, state = bnjax.bn_init(3)

    def pullback(params, x):
        y = x * 2.0  # as a convolution would make it
        return jax.vjp(lambda params, y: bnjax.bn_apply(params, state, y, True)[0], params, y)[1], y

    jaxpr = jax.make_jaxpr(pullback)(params, jnp.ones((64, 3))).jaxpr
    *kept, y = jaxpr.outvars
    assert {v for v in kept if getattr(v.aval, "shape", ()) == (64, 3)} == {y}


def test_cut_takes_the_first_run_of_axes_that_is_long_enough():
    x, mean = jnp.zeros((8, 5, 6, 11, 2)), jnp.zeros((1, 5, 1, 1, 2))
    slabs = reductions.cut(16, (0, 2, 3), x, mean)
    assert [part.shape for part in slabs.parts] == [(8, 5, 11, 6, 2), (1, 5, 1, 1, 2)]
    assert (slabs.axis, slabs.axes) == (2, (0, 2))
    assert slabs.leftover is None
    assert reductions.cut(16, (0,), x) is None
