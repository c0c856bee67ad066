"""Weights and statistics from and to PyTorch and Keras, against arrays that golden/make.py made with both."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import interop
from tests.golden import make

GOLDEN = Path(make.__file__).parent
TORCH, KERAS = (dict(np.load(GOLDEN / name)) for name in ("torch.npz", "keras.npz"))


def under(lead, arrays=TORCH):
    return {name.removeprefix(lead): array for name, array in arrays.items() if name.startswith(lead)}


def options(name):
    momentum = bnjax.cumulative_average if name == "cumulative" else interop.TORCH["momentum"]
    return {**interop.TORCH, "momentum": momentum}


@pytest.mark.parametrize("name", make.LAYERS)
def test_a_layer_of_pytorch_goes_on_training_as_there(name):
    before = under(f"{name}/before/")
    params, state = interop.from_torch(before)
    assert (state is None) == (name == "no_statistics")
    assert (params == (None, None)) == (name == "no_affine")
    for step in range(make.STEPS):
        x = make.batch(step, (4, 3, 5, 6))
        y, pullback, state = jax.vjp(
            lambda params, x, state=state: bnjax.bn_apply(params, state, x, True, **options(name)),
            params,
            x,
            has_aux=True,
        )
        gradients, dx = pullback(jnp.asarray(make.wave(4, 3, 5, 6, phase=10.0 + step)))
        want = under(f"{name}/{step}/")
        np.testing.assert_allclose(y, want["y"], rtol=2e-6, atol=1e-5)
        np.testing.assert_allclose(dx, want["dx"], rtol=2e-6, atol=1e-5)
        for got, key in zip(gradients, ("dweight", "dbias"), strict=True):
            assert (got is None) == (key not in want)
            if got is not None:
                np.testing.assert_allclose(got, want[key], rtol=2e-6, atol=2e-5)
        params = jax.tree.map(lambda p, g: p - jnp.float32(0.1) * g, params, gradients)
    after = under(f"{name}/after/")
    ours = interop.to_torch(params, state)
    assert set(ours) == set(after)
    for key, value in after.items():
        np.testing.assert_allclose(ours[key], value, rtol=2e-6, atol=2e-6)
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype)
    y, _ = bnjax.bn_apply(params, state, make.batch(9, (4, 3, 5, 6)), False, **options(name))
    np.testing.assert_allclose(y, TORCH[f"{name}/evaluation"], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("name", make.LAYERS)
def test_torch_round_trip_is_exact(name):
    after = under(f"{name}/after/")
    named = {f"block.bn1.{key}": value for key, value in after.items()}
    back = interop.to_torch(*interop.from_torch(named, "block.bn1"), prefix="block.bn1.")
    assert set(back) == set(named)
    for key, value in named.items():
        np.testing.assert_array_equal(back[key], value)


def mlp(params, states, x, train):
    """784-256-128-10 with batch normalization before each ReLU."""
    new = []
    for (kernel, bias), layer, state in zip(params["dense"], params["bn"], states, strict=False):
        x, after = bnjax.bn_apply(layer, state, x @ kernel + bias[None], train, **interop.TORCH)
        new.append(after)
        x = jax.nn.relu(x)
    kernel, bias = params["dense"][-1]
    return x @ kernel + bias[None], new


def test_the_reference_network_of_pytorch_trains_to_the_same_statistics():
    sizes = list(zip(make.SIZES[:-1], make.SIZES[1:], strict=True))
    dense = [
        (jnp.asarray(make.wave(out, into, phase=20.0 + i) / into**0.5).T, jnp.zeros(out))
        for i, (into, out) in enumerate(sizes)
    ]
    layers = [bnjax.bn_init(out) for out in make.SIZES[1:-1]]
    params = {"dense": dense, "bn": [layer for layer, _ in layers]}
    states = [state for _, state in layers]
    labels = np.arange(32) % 10

    @jax.jit
    def update(params, states, x):
        def loss(params):
            logits, new = mlp(params, states, x, True)
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(32), labels]), new

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - jnp.float32(0.1) * g, params, gradients), new, value

    for step in range(make.STEPS):
        params, states, value = update(params, states, make.batch(step, (32, make.SIZES[0])))
        np.testing.assert_allclose(value, TORCH["network/losses"][step], rtol=1e-5)
    golden = under("network/")
    for ours, state, name in zip(params["bn"], states, ("1", "4"), strict=True):
        wanted = interop.from_torch(golden, name)
        for got, want in zip((*ours, *state), (*wanted[0], *wanted[1]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    logits, _ = mlp(params, states, make.batch(9, (32, make.SIZES[0])), False)
    np.testing.assert_allclose(logits, golden["evaluation"], atol=1e-4)


def test_the_reference_network_of_keras_trains_to_the_same_weights():
    params = (jnp.asarray(make.wave(20, 64, phase=30.0) / 20**0.5), jnp.zeros(64), bnjax.bn_init(64)[0])
    state = bnjax.bn_init(64)[1]
    target = make.wave(32, 64, phase=31.0)

    def apply(params, state, x, train):
        kernel, bias, layer = params
        return bnjax.bn_apply(layer, state, jax.nn.relu(x @ kernel + bias[None]), train, **interop.KERAS)

    for step in range(make.STEPS):

        def loss(params, state=state, step=step):
            y, new = apply(params, state, make.batch(step, (32, 20)), True)
            return jnp.mean((y - target) ** 2), new

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        np.testing.assert_allclose(value, KERAS["losses"][step], rtol=1e-5)
        params = jax.tree.map(lambda p, g: p - jnp.float32(0.1) * g, params, gradients)
    weights = [KERAS[f"after/{i}"] for i in range(4)]
    for got, want in zip(interop.to_keras(params[2], state), weights, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    layer, running = interop.from_keras(weights, count=make.STEPS)
    np.testing.assert_array_equal(running.count, [make.STEPS] * 64)
    y, _ = apply((*params[:2], layer), running, make.batch(9, (32, 20)), False)
    np.testing.assert_allclose(y, KERAS["evaluation"], atol=1e-5)
    for back, want in zip(interop.to_keras(layer, running), weights, strict=True):
        np.testing.assert_array_equal(back, want)


@pytest.mark.parametrize(("scale", "center"), [(True, False), (False, True), (False, False)])
def test_keras_weights_without_scale_or_center(scale, center):
    weights = [np.full(2, value, np.float32) for value in range(2 + scale + center)]
    params, state = interop.from_keras(weights, scale, center)
    assert ((params.scale is None), (params.bias is None)) == (not scale, not center)
    for back, want in zip(interop.to_keras(params, state), weights, strict=True):
        np.testing.assert_array_equal(back, want)


LAYER = {"weight": np.ones(3), "bias": np.zeros(3), "running_mean": np.zeros(3), "running_var": np.ones(3)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"running_var": None}, ["prefix='bn1'", "running_var", "missing"]),
        ({"running_var": np.array([1.0, -2.0, 1.0])}, ["prefix='bn1'", "running_var", "negative variance -2.0"]),
        ({"bias": np.zeros(4)}, ["prefix='bn1'", "one shape", r"'bias': \(4,\)"]),
        ({"weight": np.ones(3, int)}, ["prefix='bn1'", "weight is int64"]),
        (dict.fromkeys(LAYER), ["no bn1.weight and no bn1.running_mean", "other"]),
    ],
)
def test_from_torch_rejects(change, words):
    layer = {f"bn1.{name}": value for name, value in {**LAYER, **change}.items() if value is not None}
    for word in words:
        with pytest.raises(ValueError, match=word):
            interop.from_torch({**layer, "other.running_mean": np.zeros(3)}, "bn1")


def test_from_keras_and_to_keras_reject():
    with pytest.raises(ValueError, match=r"expected \['gamma', 'beta', 'moving_mean', 'moving_variance'\], got 3"):
        interop.from_keras([np.zeros(3)] * 3)
    with pytest.raises(ValueError, match="negative variance"):
        interop.from_keras([np.zeros(3), -np.ones(3)], False, False)
    with pytest.raises(ValueError, match="state=None"):
        interop.to_keras(bnjax.bn_init(2)[0], None)


def test_to_torch_fills_in_what_pytorch_has_both_of_or_neither():
    params, state = bnjax.bn_init(2, scale=None)
    assert interop.to_torch(params, state)["weight"].tolist() == [1.0, 1.0]
    assert set(interop.to_torch(bnjax.BNParams(None, None), None)) == set()


def test_to_torch_counts_the_most_updated_feature():
    params, state = bnjax.bn_init(3)
    x = jnp.array([[1.0, 2.0, 3.0], [4.0, jnp.nan, 6.0]])
    _, state = bnjax.bn_apply(params, state, x, True)
    assert state.count.tolist() == [1, 0, 1]
    assert interop.to_torch(params, state)["num_batches_tracked"] == 1
