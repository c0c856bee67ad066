"""The blocks of the pages for people who come from elsewhere, which compare bnjax with another library, and further
cases of what these pages define and say.
"""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch

import bnjax
from bnjax import interop
from tests.support import markdown

pytestmark = pytest.mark.usefixtures("flax_promotion")

torch.set_num_threads(1)
PAGES = markdown.pages(others=True)
X = np.random.default_rng(0).normal(2, 3, (16, 5)).astype("float32")


@pytest.fixture(scope="module")
def defined(tmp_path_factory):
    """`defined(page)`: the names that the blocks of a page define."""
    ran = {}

    def names(page):
        if page not in ran:
            ran[page] = markdown.run(page, PAGES[page], tmp_path_factory.mktemp("page"))
        return ran[page]

    return names


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(defined, page):
    assert defined(page)


@pytest.mark.parametrize(("scale", "offset"), [(True, False), (False, True), (False, False)])
def test_from_haiku_without_scale_or_offset(defined, scale, offset):
    layer = hk.transform_with_state(lambda x, train: hk.BatchNorm(scale, offset, 0.9, name="bn")(x, train))
    params, kept = layer.init(None, X, True)
    for _ in range(3):
        _, kept = layer.apply(params, kept, None, X, True)
    ours, state = defined("docs/coming-from/jax.md")["from_haiku"](params, kept, "bn")
    assert (ours.scale is not None, ours.bias is not None) == (scale, offset)
    assert state.count.tolist() == [3] * 5
    y, _ = bnjax.bn_apply(ours, state, X, train=False)
    np.testing.assert_allclose(y, layer.apply(params, kept, None, X, False)[0], atol=1e-5)


def test_haiku_with_local_stats_is_a_layer_without_state():
    layer = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, False, test_local_stats=True))
    params, kept = layer.init(None, X)
    y, _ = bnjax.bn_apply(bnjax.bn_init(5)[0], None, X, train=False)
    np.testing.assert_allclose(y, layer.apply(params, kept, None, X)[0], atol=1e-5)


def equinox_after(steps, **options):
    """An Equinox layer and its state after training steps, and the call that evaluates X."""
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(5, axis_name="batch", **options)
    for _ in range(steps):
        _, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(X, state)
    evaluated = eqx.nn.inference_mode(layer)
    y, _ = jax.vmap(evaluated, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(X, state)
    return layer, state, y


def test_from_equinox_evaluates_as_equinox_in_mode_ema(defined):
    layer, state, y = equinox_after(3, mode="ema", momentum=0.9)
    ours = defined("docs/coming-from/jax.md")["from_equinox"](layer, state)
    np.testing.assert_allclose(bnjax.bn_apply(*ours, X, train=False)[0], y, atol=1e-5)


def test_the_variance_of_equinox_is_too_large_by_what_the_page_says(defined):
    layer, state, y = equinox_after(100, mode="batch", momentum=0.99)
    params, ours = defined("docs/coming-from/jax.md")["from_equinox"](layer, state)
    excess = 0.99**100 / (1 - 0.99**100)
    assert round(excess, 2) == 0.58
    np.testing.assert_allclose(ours.var, X.var(0), rtol=1e-4)
    theirs = bnjax.bn_apply(params, ours._replace(var=ours.var + excess), X, train=False)[0]
    np.testing.assert_allclose(theirs, y, atol=1e-4)


def test_a_frozen_layer_of_pytorch_has_gradients_for_scale_and_bias():
    theirs = torch.nn.BatchNorm1d(5).eval()
    (theirs(torch.from_numpy(X)) ** 2).sum().backward()
    params, state = interop.from_torch(theirs)

    def loss(params):
        return jnp.sum(bnjax.bn_apply(params, state, X, train=False)[0] ** 2)

    gradients = jax.grad(loss)(params)
    np.testing.assert_allclose(gradients.scale, theirs.weight.grad, rtol=1e-4)
    np.testing.assert_allclose(gradients.bias, theirs.bias.grad, rtol=1e-4)


def test_pytorch_leaves_out_of_weight_decay_what_needs_no_gradient():
    theirs = torch.nn.BatchNorm1d(5).requires_grad_(False)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.1)
    theirs(torch.from_numpy(X).requires_grad_()).sum().backward()
    optimizer.step()
    assert theirs.weight.eq(1).all()


def test_pytorch_refuses_one_value_per_channel():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.nn.BatchNorm1d(5)(torch.from_numpy(X[:1]))


def test_fuse_modules_of_pytorch_is_fold_into_previous():
    pair = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4))
    pair(torch.randn(8, 3, 5, 5))
    fused = torch.ao.quantization.fuse_modules(pair.eval(), [["0", "1"]])[0]
    kernel = pair[0].weight.detach().permute(2, 3, 1, 0).numpy()
    ours, bias = bnjax.fold_into_previous(kernel, None, bnjax.fold(*interop.from_torch(pair[1])))
    np.testing.assert_allclose(ours, fused.weight.detach().permute(2, 3, 1, 0), atol=1e-6)
    np.testing.assert_allclose(bias, fused.bias.detach(), atol=1e-6)


def test_keras_leaves_out_of_weight_decay_what_is_not_trainable():
    model = keras.Sequential([keras.Input((5,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    model.layers[0].trainable = False
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.1), "mse")
    model.train_on_batch(X, X[:, :1])
    np.testing.assert_array_equal(model.layers[0].gamma, np.ones(5))


def test_keras_passes_the_mask_of_an_embedding_on():
    embedding, layer = keras.layers.Embedding(9, 5, mask_zero=True), keras.layers.BatchNormalization()
    tokens = np.array([[1, 2, 0], [3, 0, 0]])
    y = layer(embedding(tokens), training=True)
    ours = embedding(tokens), (tokens != 0)[..., None]
    expected, _ = bnjax.bn_apply(*bnjax.bn_init(5), ours[0], True, mask=ours[1], epsilon=1e-3)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_keras_layers_have_the_defaults_that_the_page_says():
    layer = keras.layers.BatchNormalization(renorm=True)
    assert (layer.momentum, layer.epsilon, layer.axis) == (0.99, 1e-3, -1)
    assert layer.renorm_clipping == {}
    with pytest.raises(ValueError, match="TensorFlow backend"):
        keras.layers.BatchNormalization(synchronized=True)


def test_equinox_warns_of_its_default_mode():
    with pytest.warns(UserWarning, match="defaults to 'ema'"):
        eqx.nn.make_with_state(eqx.nn.BatchNorm)(5, axis_name="batch")
