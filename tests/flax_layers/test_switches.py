"""Options that are on or off, and features that do not fit a layer, in both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax.linen
import bnjax.nnx

X = jnp.array([[1.0], [3.0]])
SWITCHES = ("frozen", "frozen_params", "unbiased_var", "use_scale", "use_bias", "use_running_average")


def linen_call(**options):
    return bnjax.linen.BatchNorm(**{"use_running_average": False} | options).init_with_output(jax.random.key(0), X)[0]


def nnx_call(**options):
    return bnjax.nnx.BatchNorm(1, rngs=nnx.Rngs(0), **options)(X)


@pytest.mark.parametrize("call", [linen_call, nnx_call])
@pytest.mark.parametrize("option", SWITCHES)
def test_an_option_that_is_no_bool_is_refused(option, call):
    with pytest.raises(TypeError, match=rf"BatchNorm\({option}=...\): expected a Python bool, got 'no'"):
        call(**{option: "no"})


def test_an_option_of_linen_alone_that_is_no_bool_is_refused():
    with pytest.raises(TypeError, match=r"BatchNorm\(force_float32_reductions=...\): expected a Python bool, got 'no'"):
        linen_call(force_float32_reductions="no")


@pytest.mark.parametrize("true", [1, np.bool_(True), np.array(True)])
def test_what_is_a_bool_to_flax_is_one_here(true):
    options = {"use_running_average": true, "use_scale": true}
    theirs = nn.BatchNorm(**options).init_with_output(jax.random.key(0), X)[0]
    np.testing.assert_allclose(linen_call(**options), theirs)
    np.testing.assert_allclose(nnx_call(**options), nnx.BatchNorm(1, rngs=nnx.Rngs(0), **options)(X))


def test_statistics_of_other_features_are_refused_by_linen():
    layer = bnjax.linen.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 4)))
    message = (
        r"BatchNorm\(x=...\): x has shape \(2, 3\) and so features \(3,\) on axis -1, but the layer's mean has shape "
    )
    with pytest.raises(ValueError, match=message + r"\(4,\). Pass an x .*, or initialize the layer with this x\."):
        layer.apply(variables, jnp.ones((2, 3)))


@pytest.mark.parametrize(("kind", "options", "call"), [("", {}, {}), ("Indexed", {"num_indices": 3}, {"index": 0})])
def test_an_x_of_other_features_is_refused_by_nnx(kind, options, call):
    layer = getattr(bnjax.nnx, f"{kind}BatchNorm")(4, rngs=nnx.Rngs(0), **options)
    message = (
        rf"^{kind}BatchNorm\(x=...\): x has shape \(2, 3\) and so features \(3,\) on axis -1, but .*num_features=3\."
    )
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones((2, 3)), **call)
