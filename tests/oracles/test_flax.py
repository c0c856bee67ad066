"""bnjax against Flax's own Linen and NNX layers.

Not compared: NNX in float64 and in bfloat16, since it keeps its statistics in float32 and casts them to the dtype of x.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import interop
from tests.oracles.layers import FEATURES, FIRST, LAST, JaxLayer, affine, compare, ours


def new(dtype):
    """Running statistics of a new layer."""
    return {"mean": jnp.zeros(FEATURES, dtype), "var": jnp.ones(FEATURES, dtype)}


def statistics(kept):
    return kept["mean"], kept["var"]


def linen(dtype, mask=None, over=None, **options):
    """A layer with dtype for its parameters, which leaves that of the output to x."""
    layer = nn.BatchNorm(param_dtype=dtype, **options)

    def apply(params, kept, x, train):
        named = zip(("scale", "bias"), params, strict=True)
        variables = {"params": {name: v for name, v in named if v is not None}, "batch_stats": kept}
        layer_of_x = layer.clone(dtype=x.dtype)
        y, updates = layer_of_x.apply(variables, x, use_running_average=not train, mask=mask, mutable=["batch_stats"])
        return y, {**kept, **updates.get("batch_stats", {})}

    return JaxLayer(apply, affine(dtype, layer.use_scale, layer.use_bias), new(dtype), statistics, over)


def of_nnx(dtype, mask=None, over=None, **options):
    def apply(params, kept, x, train):
        layer = nnx.BatchNorm(FEATURES, dtype=x.dtype, param_dtype=dtype, rngs=nnx.Rngs(0), **options)
        for variable, value in zip((layer.scale, layer.bias), params, strict=True):
            if value is not None:
                variable[...] = value
        layer.mean[...], layer.var[...] = kept["mean"], kept["var"]
        y = layer(x, use_running_average=not train, mask=mask)
        return y, {"mean": layer.mean[...], "var": layer.var[...]}

    used = options.get("use_scale", True), options.get("use_bias", True)
    return JaxLayer(apply, affine(dtype, *used), new(dtype), statistics, over)


@pytest.fixture(params=[linen, of_nnx], ids=["linen", "nnx"])
def make(request):
    return request.param


def converted(dtype, scale=True, bias=True, **options):
    _, state = bnjax.bn_init(FEATURES, dtype=dtype)
    return ours(affine(dtype, scale, bias), state, **{**interop.FLAX, **options})


# A variance of E[x^2] - E[x]^2, of a mean near its root.
FAST = 2


@pytest.mark.parametrize("shape", LAST, ids=str)
def test_bn_apply_matches_flax_in_every_layout(agree, make, shape):
    compare(agree, converted("float32"), make("float32"), shape, growth=FAST)


def test_bn_apply_matches_linen_in_float64(agree, x64):
    compare(agree, converted(x64), linen(x64), LAST[2], x64, FAST)


def test_bn_apply_matches_flax_with_channels_first(agree, make):
    compare(agree, converted("float32", axis=1), make("float32", axis=1), FIRST[2], growth=FAST)


OPTIONS = {
    "no_scale_momentum_0": ({"use_scale": False, "momentum": 0.0}, {"scale": False, "momentum": 0.0}),
    "no_bias_epsilon_1": ({"use_bias": False, "epsilon": 1.0}, {"bias": False, "epsilon": 1.0}),
    "neither_momentum_0.9": (
        {"use_scale": False, "use_bias": False, "momentum": 0.9},
        {"scale": False, "bias": False, "momentum": 0.9},
    ),
    "slow_variance_epsilon_1e-3": ({"use_fast_variance": False, "epsilon": 1e-3}, {"epsilon": 1e-3}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bn_apply_matches_flax_with_options(agree, make, name):
    their, our = OPTIONS[name]
    growth = 1 if name.startswith("slow_variance") else FAST
    compare(agree, converted("float32", **our), make("float32", **their), LAST[2], growth=growth)


def test_bn_apply_matches_flax_with_a_mask(agree, make):
    mask = np.random.default_rng(9).random((*LAST[2][:-1], 1)) < 0.6
    compare(agree, converted("float32", mask=mask), make("float32", mask=mask), LAST[2], growth=FAST)


def test_bn_apply_matches_linen_with_bfloat16_input(agree):
    # Linen rounds two parts of the gradient of x and then their sum, which is one distance of two neighbours more.
    compare(agree, converted("float32"), linen("float32"), LAST[2], "bfloat16", growth=2)


def test_bn_apply_matches_flax_over_a_named_axis(agree, make):
    named = {"over": "replica", "axis_name": "replica"}
    compare(agree, converted("float32", **named), make("float32", **named), LAST[2], growth=FAST)
