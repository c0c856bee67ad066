"""`jax.export` with symbolic sizes: the exported function gives the same results, for every size."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import bnjax
import bnjax.linen
import bnjax.nnx
from tests.support.collecting import apply_and_collect

RNG = np.random.default_rng(3)
PARAMS = bnjax.BNParams(np.array([0.5, -2.0, 3.0], np.float32), np.array([1.0, 0.0, -1.0], np.float32))
STATE = bnjax.bn_init(3)[1]
INDEXED, INDEXED_STATE = jax.jit(lambda: bnjax.indexed_bn_init(3, 2, indexed_params=True))()
CLASSES = bnjax.BNParams(np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 3), np.float32))


def gradients(apply, **options):
    def loss(params, state, x):
        y, new = apply(params, state, x, True, **options)
        return jnp.sum(y**3) + jnp.sum(new.var)

    return lambda x: jax.grad(loss, (0, 1, 2), allow_int=True)(PARAMS, STATE, x)[::2]


def ghost(x, **options):
    return bnjax.ghost_bn_apply(PARAMS, STATE, x, True, ghost_size=4, **options)


def rows(x):
    """Weights that are 0 at every third example."""
    weights = jnp.arange(x.shape[0]) % 3
    return weights.astype(jnp.float32).reshape(-1, *(1,) * (x.ndim - 1))


@cache
def lstm_init():
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, jax.jit(lambda: bnjax.bn_lstm_init(jax.random.key(0), 3, 2, 4))())


def lstm(x):
    carry = bnjax.bn_lstm_carry(x.shape[0], 2, length=jnp.arange(x.shape[0]) % 3)
    return bnjax.bn_lstm_apply(*lstm_init(), carry, x, True)


# A function of x, the symbolic shape of x, and two values of its symbols.
TWO = {"b": 5}, {"b": 32}
IMAGES = {"b": 2, "h": 3, "w": 5}, {"b": 4, "h": 8, "w": 7}
CASES = {
    "training": (lambda x: bnjax.bn_apply(PARAMS, STATE, x, True), "b, 3", TWO),
    "unbiased": (lambda x: bnjax.bn_apply(PARAMS, STATE, x, True, unbiased_var=True), "2*b, 3", TWO),
    "evaluation": (lambda x: bnjax.bn_apply(PARAMS, STATE, x, False), "b, 3", TWO),
    "without a state": (lambda x: bnjax.bn_apply(PARAMS, None, x, False)[0], "b, 3", TWO),
    "features first": (lambda x: bnjax.bn_apply(PARAMS, STATE, x, True, axis=0), "3, b", TWO),
    "images": (lambda x: bnjax.bn_apply(PARAMS, STATE, x, True), "b, h, w, 3", IMAGES),
    "images, features first": (lambda x: bnjax.bn_apply(PARAMS, STATE, x, True, axis=1), "b, 3, h, w", IMAGES),
    "boolean mask": (lambda x: bnjax.bn_apply(PARAMS, STATE, x, True, mask=rows(x) > 0), "b, 3", TWO),
    "weights": (lambda x: bnjax.bn_apply(PARAMS, STATE, x, True, mask=rows(x), unbiased_var=True), "b, h, 3", IMAGES),
    "half precision": (lambda x: bnjax.bn_apply(PARAMS, STATE, x.astype(jnp.bfloat16), True)[1], "b, 3", TWO),
    "moments": (lambda x: bnjax.batch_moments(x, mask=rows(x)), "b, 3", TWO),
    "gradients": (gradients(bnjax.bn_apply), "b, 3", TWO),
    "gradients of images": (gradients(bnjax.bn_apply), "b, h, w, 3", IMAGES),
    "gradients in evaluation": (
        jax.grad(lambda x: jnp.sum(bnjax.bn_apply(PARAMS, STATE, x, False)[0] ** 3)),
        "b, 3",
        TWO,
    ),
    "ghost": (ghost, "4*b, 3", TWO),
    "ghost, images": (ghost, "8*b, h, w, 3", IMAGES),
    "ghost, weights": (lambda x: ghost(x, mask=1 + rows(x)), "4*b, 3", TWO),
    "gradients of ghost": (gradients(bnjax.ghost_bn_apply, ghost_size=2), "2*b, 3", TWO),
    "ghost in evaluation": (lambda x: bnjax.ghost_bn_apply(PARAMS, STATE, x, False, ghost_size=4), "b, 3", TWO),
    "renormalized": (lambda x: bnjax.renorm_bn_apply(PARAMS, STATE, x, True, r_max=2.0, d_max=1.0), "b, 3", TWO),
    "adaptive": (
        lambda x: bnjax.adaptive_bn_apply(PARAMS, STATE, x, source_weight=4, mask=rows(x))[0],
        "b, h, 3",
        IMAGES,
    ),
    "indexed": (lambda x: bnjax.indexed_bn_apply(INDEXED, INDEXED_STATE, x, True, index=1), "b, 3", TWO),
    "conditional": (
        lambda x: bnjax.bn_apply(bnjax.conditional_params(CLASSES, jnp.arange(x.shape[0]) % 2, x), STATE, x, True),
        "b, h, 3",
        IMAGES,
    ),
    "BN-LSTM": (lstm, "b, 3", TWO),
    "collected": (
        lambda x: apply_and_collect(PARAMS, STATE, x, mask=rows(x)),
        "b, 3",
        TWO,
    ),
}


def examples(x):
    """Examples under `vmap` whose length alone is a symbol; every third element is masked."""
    mask = jnp.arange(x.shape[1])[:, None] % 3 > 0

    def one(x):
        return bnjax.bn_apply(PARAMS, STATE, x, True, mask=mask, axis_name="examples")

    return jax.vmap(one, axis_name="examples")(x)


CASES["examples, masked"] = (examples, "4, b, 3", TWO)


def shape_of(text, values):
    return [eval(size, {}, values) for size in text.split(",")]


def assert_exports(function, text, sizes, **options):
    x = jax.ShapeDtypeStruct(export.symbolic_shape(text), jnp.float32)
    exported = export.deserialize(export.export(jax.jit(function), **options)(x).serialize())
    xs = [(RNG.standard_normal(shape_of(text, values)) * 2 + 3).astype(np.float32) for values in sizes]
    got, want = (jax.jit(lambda xs, f=f: [f(x) for x in xs])(xs) for f in (exported.call, function))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_exported_with_symbolic_sizes_matches_the_function(name):
    assert_exports(*CASES[name])


@pytest.mark.parametrize("function", [CASES["training"][0], CASES["gradients"][0]])
def test_exported_for_several_platforms_matches_the_function(function):
    assert_exports(function, "b, 3", TWO, platforms=["cpu", "cuda", "tpu"])


@pytest.mark.parametrize("text", ["b, 3", "2*b, 3", "4*b+1, 3"])
def test_ghost_says_which_symbolic_batches_it_takes(text):
    x = jax.ShapeDtypeStruct(export.symbolic_shape(text), jnp.float32)
    with pytest.raises(ValueError, match=r'ghost_bn_apply\(x=.*not known to be a multiple of ghost_size=4.*"4\*g"'):
        export.export(jax.jit(ghost))(x)


LAYERS = {
    "BatchNorm": ({}, {}),
    "GhostBatchNorm": ({"ghost_size": 2}, {}),
    "RenormBatchNorm": ({}, {}),
    "IndexedBatchNorm": ({"num_indices": 2}, {"index": 1}),
    "ConditionalBatchNorm": ({"num_classes": 2}, {"label": True}),
}


def called(layer, x, extra):
    label = {"label": jnp.arange(x.shape[0]) % 2} if "label" in extra else extra
    return layer(x, mask=jnp.ones((x.shape[0], 1, 1), bool), **label)


@pytest.mark.parametrize("name", LAYERS)
def test_exported_linen_layers_match_the_layer(name):
    options, extra = LAYERS[name]
    layer = getattr(bnjax.linen, name)(use_running_average=False, **options)
    x = jnp.ones((4, 2, 3))
    variables = jax.jit(nn.init(lambda layer, x: called(layer, x, extra), layer))(jax.random.key(0), x)
    collections = ["batch_stats", "batch_moments"]

    def apply(x):
        return nn.apply(lambda layer, x: called(layer, x, extra), layer, mutable=collections)(variables, x)

    assert_exports(apply, "2*b, h, 3", IMAGES)


@pytest.mark.parametrize("name", LAYERS)
def test_exported_nnx_layers_match_the_layer(name):
    options, extra = LAYERS[name]
    graph, variables = nnx.split(getattr(bnjax.nnx, name)(3, rngs=nnx.Rngs(0), **options))

    def apply(x):
        layer = nnx.merge(graph, jax.tree.map(lambda v: v, variables))  # of this trace
        y = called(layer, x, extra)
        return y, layer.mean[...], layer.var[...]

    assert_exports(apply, "2*b, h, 3", IMAGES)


def test_every_namedtuple_of_the_api_goes_in_and_out():
    affine = bnjax.fold(PARAMS, STATE)
    carry = bnjax.bn_lstm_carry(2, 2)
    tree = (affine, PARAMS, STATE, bnjax.batch_moments(jnp.ones((2, 3))), *lstm_init(), carry)
    doubled = export.export(jax.jit(lambda tree: jax.tree.map(lambda v: v + v, tree)))(tree)
    got = export.deserialize(doubled.serialize()).call(tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + b), got, tree)
