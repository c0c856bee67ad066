"""bnjax against Haiku, whose running statistics are those of `bnjax.debiased`.

Not compared: half precisions, in which Haiku takes the moments too, and evaluation before the first update, where its
statistics are 0 and 0.
"""

from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp
import pytest

import bnjax
from tests.oracles.layers import FEATURES, FIRST, LAST, JaxLayer, affine, compare, ours, promotion

DECAY = 0.9


def theirs(shape, dtype, scale=True, offset=True, decay_rate=DECAY, axis=-1, over=None, **options):
    transformed = hk.transform_with_state(
        lambda x, train: hk.BatchNorm(scale, offset, decay_rate, **options)(x, is_training=train)
    )
    x = jnp.ones(shape if over is None else (1, *shape), dtype)
    init = partial(transformed.init, None, train=True)
    with promotion():
        _, kept = jax.jit(init if over is None else jax.vmap(init, out_axes=None, axis_name=over))(x)
    aligned = [1] * len(shape)
    aligned[axis] = FEATURES

    def apply(params, kept, x, train):
        named = zip(("scale", "offset"), params, strict=True)
        params = {name: value.reshape(aligned) for name, value in named if value is not None}
        return transformed.apply({"batch_norm": params} if params else {}, kept, None, x, train)

    def statistics(kept):
        return [kept[f"batch_norm/~/{name}_ema"]["average"].reshape(FEATURES) for name in ("mean", "var")]

    return JaxLayer(apply, affine(dtype, scale, offset), kept, statistics, over)


def converted(dtype, scale=True, bias=True, decay_rate=DECAY, **options):
    _, state = bnjax.bn_init(FEATURES, dtype=dtype)
    return ours(affine(dtype, scale, bias), state, momentum=bnjax.debiased(decay_rate), **options)


def lost(decay_rate):
    """Haiku divides by 1 - decay^t unchanged, and by a variance of E[x^2] - E[x]^2, of a mean near its root."""
    return 2 / (1 - decay_rate)


@pytest.mark.parametrize("shape", LAST, ids=str)
def test_bn_apply_matches_haiku_in_every_layout(agree, shape):
    compare(agree, converted("float32"), theirs(shape, "float32"), shape, growth=lost(DECAY))


def test_bn_apply_matches_haiku_with_channels_first(agree):
    their = theirs(FIRST[2], "float32", axis=1, data_format="channels_first")
    compare(agree, converted("float32", axis=1), their, FIRST[2], growth=lost(DECAY))


OPTIONS = {
    "no_scale_decay_rate_0": ({"scale": False, "decay_rate": 0.0},) * 2,
    "no_offset_decay_rate_0.5": ({"offset": False, "decay_rate": 0.5}, {"bias": False, "decay_rate": 0.5}),
    "neither_epsilon_1": (
        {"scale": False, "offset": False, "eps": 1.0},
        {"scale": False, "bias": False, "epsilon": 1.0},
    ),
    "decay_rate_0.99": ({"decay_rate": 0.99},) * 2,
    "epsilon_1e-3": ({"eps": 1e-3}, {"epsilon": 1e-3}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bn_apply_matches_haiku_with_options(agree, x64, name):
    their, our = OPTIONS[name]
    growth = lost(our.get("decay_rate", DECAY))
    compare(agree, converted(x64, **our), theirs(LAST[1], x64, **their), LAST[1], x64, growth)


def test_bn_apply_matches_haiku_over_a_named_axis(agree, x64):
    their = theirs(LAST[2][1:], x64, over="replica", cross_replica_axis="replica")
    our = converted(x64, over="replica", axis_name="replica")
    compare(agree, our, their, LAST[2], x64, lost(DECAY))
