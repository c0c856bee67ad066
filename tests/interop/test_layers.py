"""Weights and statistics from and to PyTorch and Keras, against arrays that golden/make.py made with both."""

import itertools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
import bnjax.nnx
from bnjax import interop, linen
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
    with pytest.raises(ValueError, match=r"expected \['gamma', 'beta', 'moving_mean', 'moving_variance'\].*got 3"):
        interop.from_keras([np.zeros(3)] * 3)
    with pytest.raises(ValueError, match="negative variance"):
        interop.from_keras([np.zeros(3), -np.ones(3)], False, False)
    with pytest.raises(ValueError, match="state=None"):
        interop.to_keras(bnjax.bn_init(2)[0], None)


def test_to_torch_gives_ones_for_a_missing_scale_and_leaves_out_a_missing_bias():
    params, state = bnjax.bn_init(2, scale=None)
    assert interop.to_torch(params, state)["weight"].tolist() == [1.0, 1.0]
    params, state = bnjax.bn_init(2, bias=None)
    back = interop.to_torch(params, state)
    assert set(back) == {"weight", "running_mean", "running_var", "num_batches_tracked"}
    again, _ = interop.from_torch(back)
    assert (again.bias, again.scale.tolist()) == (None, [1.0, 1.0])
    assert set(interop.to_torch(bnjax.BNParams(None, None), None)) == set()


def test_half_precision_goes_in_as_it_is_and_out_as_what_pytorch_can_take():
    layer = {name: np.linspace(0.1, 1, 3).astype(jnp.bfloat16) for name in LAYER}
    params, state = interop.from_torch(layer)
    assert (params.scale.dtype, state.var.dtype) == (jnp.bfloat16, jnp.float32)
    back = interop.to_torch(params, state)
    for name, array in layer.items():
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name], array.astype(np.float32))


def test_to_torch_counts_the_most_updated_feature():
    params, state = bnjax.bn_init(3)
    x = jnp.array([[1.0, 2.0, 3.0], [4.0, jnp.nan, 6.0]])
    _, state = bnjax.bn_apply(params, state, x, True)
    assert state.count.tolist() == [1, 0, 1]
    assert interop.to_torch(params, state)["num_batches_tracked"] == 1


class Mlp(nn.Module):
    """As `mlp`, with layers that have the weights of PyTorch's."""

    momentum: Any = 0.9

    @nn.compact
    def __call__(self, x, train):
        for size in make.SIZES[1:-1]:
            x = linen.BatchNorm(use_running_average=not train, momentum=self.momentum)(nn.Dense(size)(x))
            x = nn.relu(x)
        return nn.Dense(make.SIZES[-1])(x)


def nnx_mlp():
    rngs = nnx.Rngs(0)
    layers = []
    for into, out in itertools.pairwise(make.SIZES[:-1]):
        layers += [nnx.Linear(into, out, rngs=rngs), nnx.BatchNorm(out, momentum=0.9, rngs=rngs), nnx.relu]
    return nnx.Sequential(*layers, nnx.Linear(*make.SIZES[-2:], rngs=rngs))


def linen_variables(momentum=0.9):
    return Mlp(momentum).init(jax.random.key(0), np.ones((1, make.SIZES[0]), np.float32), False)


NETWORK = {name: array for name, array in under("network/").items() if name[0].isdigit()}


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        (linen_variables, {"1": "BatchNorm_0", "4": "BatchNorm_1"}),
        (lambda: linen_variables(bnjax.cumulative_average), {"1": "BatchNorm_0", "4": "BatchNorm_1"}),
        (lambda: bnjax.nnx.functional(nnx_mlp())[1], {"1": "layers/1", "4": "layers/4"}),
    ],
    ids=["linen", "linen with counts", "nnx"],
)
def test_a_model_of_pytorch_in_and_out(variables, names):
    before = variables()
    after, report = interop.from_torch_model(NETWORK, before, names)
    assert [row.theirs for row in report.tensors] == list(NETWORK)
    assert all(row.by == "names" for row in report.tensors)
    assert jax.tree.structure(after) == jax.tree.structure({**before})
    back = interop.to_torch_model(after, names)
    counted = len(jax.tree.leaves(before["batch_stats"])) == 6
    for key, array in back.items():
        want = 0 if key.endswith("tracked") and not counted else NETWORK[key]
        np.testing.assert_array_equal(array, want)
    assert set(back) == {key for key in NETWORK if key[0] in names}
    dense = [path for path, _ in jax.tree_util.tree_leaves_with_path(before["params"]) if "ernel" in str(path)]
    assert len(dense) == 3  # stay as they were
    for new, old in zip(*(jax.tree.leaves(v["params"]) for v in (after, before)), strict=True):
        assert new.ndim == 1 or new is old


def test_a_converted_nnx_model_evaluates_by_the_statistics_of_pytorch():
    model = nnx_mlp()
    apply, variables = bnjax.nnx.functional(model)
    variables, _ = interop.from_torch_model(NETWORK, variables, {"1": "layers/1", "4": "layers/4"})
    nnx.update(model, *variables.values())
    model.eval()
    x = make.batch(9, (4, make.SIZES[0]))
    hidden = x @ np.asarray(model.layers[0].kernel[...])
    std = np.sqrt(NETWORK["1.running_var"] + 1e-5)
    want = (hidden - NETWORK["1.running_mean"]) / std * NETWORK["1.weight"] + NETWORK["1.bias"]
    np.testing.assert_allclose(model.layers[1](model.layers[0](x)), want, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(apply(variables, x), model(x))


def test_from_torch_model_lists_what_was_not_matched():
    _, report = interop.from_torch_model(NETWORK, linen_variables(), {"4": "BatchNorm_1"})
    assert "1.running_mean" in [row.theirs for row in report.tensors if row.done == "not named"]
    assert [row.ours for row in report.tensors if row.done == "stays: not named"] == [
        f"BatchNorm_0/{name}" for name in ("scale", "bias", "mean", "var")
    ]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"1": "BatchNorm_2"}, r"names=\{'1': 'BatchNorm_2'\}.*no such layer.*BatchNorm_0"),
        ({"9": "BatchNorm_0"}, r"prefix='9'.*Layers with running_mean: \['1', '4'\]"),
        ({"1": "BatchNorm_1"}, r"\{'1': 'BatchNorm_1'\}.*\(256,\).*\(128,\)"),
        ({"1": "BatchNorm_0", "4": "BatchNorm_0"}, "named twice"),
    ],
)
def test_from_torch_model_rejects(names, words):
    with pytest.raises(ValueError, match=words):
        interop.from_torch_model(NETWORK, linen_variables(), names)
    with pytest.raises(ValueError, match=r"to_torch_model.*no such layer"):
        interop.to_torch_model(linen_variables(), {"1": "BatchNorm_2"})


def test_from_torch_model_refuses_parameters_that_the_model_has_not():
    variables = linen.BatchNorm(use_bias=False, use_running_average=True).init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"'bias'.*use_scale and use_bias"):
        interop.from_torch_model(LAYER, variables, {"": ""})


def test_a_layer_without_statistics_leaves_those_of_the_model():
    variables = linen.BatchNorm(use_running_average=True).init(jax.random.key(0), jnp.ones((1, 3)))
    layer = {"weight": np.full(3, 2.0), "bias": np.ones(3)}
    after, report = interop.from_torch_model(layer, variables, {"": ""})
    assert (after["params"]["scale"].tolist(), after["batch_stats"]["var"].tolist()) == ([2.0] * 3, [1.0] * 3)
    assert [(row.theirs, row.ours, row.done) for row in report.tensors] == [
        ("weight", "scale", "as it is"),
        ("bias", "bias", "as it is"),
        ("", "mean", "stays: not kept there"),
        ("", "var", "stays: not kept there"),
    ]


def test_arguments_of_another_kind_are_named():
    params, state = bnjax.bn_init(3)
    with pytest.raises(ValueError, match=r"to_torch\(params=...\): got params and state in one tuple"):
        interop.to_torch((params, state), None)
    with pytest.raises(ValueError, match=r"from_keras\(weights=...\): .* got a mapping.*from_keras_model"):
        interop.from_keras({"bn/gamma": np.ones(3)})
