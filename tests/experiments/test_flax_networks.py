"""The experiments' networks of Linen's and NNX's layers: against float64 NumPy, and trained on one device or two."""

import jax
import numpy as np
import optax
import pytest

from experiments.harness import data, train
from experiments.harness.runtime import Runtime
from experiments.models import flax_networks
from tests.support import reference

CLASSES = 3
MASK = np.array([True] * 5 + [False, True])


def variables(network, rng):
    """As `init` makes them, but with random numbers instead of zeros and ones; NumPy's, which need no compilation."""

    def numbers(path, leaf):
        std = np.sqrt(2 / np.prod(leaf.shape[:-1])) if path[-1].key == "kernel" else 0.5
        values = (std * rng.standard_normal(leaf.shape)).astype(np.float32)
        return np.exp(values) if path[-1].key in ("var", "scale") else values

    return jax.tree_util.tree_map_with_path(numbers, jax.eval_shape(network.init, jax.random.key(0)))


def norm(x, params, state, mask):
    """With a mask in training; and what the running mean becomes."""
    args = x, params["scale"], params["bias"], state["mean"], state["var"]
    if mask is None:
        return reference.normalize(x, state["mean"], state["var"], *args[1:3]), state["mean"]
    mask = mask.reshape(-1, *[1] * (x.ndim - 1))
    return reference.train(*args, momentum=0.75, mask=mask)[:2]


def mlp(params, state, x, mask):
    means = {}
    for i in (1, 2):
        x = x @ params[f"linear{i}"]["kernel"].astype(np.float64) + params[f"linear{i}"].get("bias", 0)
        if state:
            x, means[f"norm{i}"] = norm(x, params[f"norm{i}"], state[f"norm{i}"], mask)
        x = np.maximum(x, 0)
    return x @ params["head"]["kernel"] + params["head"]["bias"], means


def conv(x, kernel, stride):
    """With the padding of SAME, which adds one more at the end than at the beginning where the number is odd."""
    size, (height, width) = len(kernel), x.shape[1:3]
    out = [-(-n // stride) for n in (height, width)]
    pad = [max((o - 1) * stride + size - n, 0) for o, n in zip(out, (height, width), strict=True)]
    x = np.pad(x, [(0, 0), *[(p // 2, p - p // 2) for p in pad], (0, 0)])
    return sum(
        x[:, i : i + stride * out[0] : stride, j : j + stride * out[1] : stride][:, : out[0], : out[1]]
        @ kernel[i, j].astype(np.float64)
        for i in range(size)
        for j in range(size)
    )


def resnet(params, state, x, mask):
    means = {}

    def conv_norm(x, name, stride=1):
        y = conv(x, params[f"{name}_conv"]["kernel"], stride) + params[f"{name}_conv"].get("bias", 0)
        if state:
            y, means[f"{name}_norm"] = norm(y, params[f"{name}_norm"], state[f"{name}_norm"], mask)
        return y

    x = np.maximum(conv_norm(x.reshape(-1, 5, 6, x.shape[1] // 30).astype(np.float64), "stem"), 0)
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        shortcut = conv_norm(x, f"stage{stage}_projection", stride) if stage > 1 else x
        y = conv_norm(np.maximum(conv_norm(x, f"stage{stage}_first", stride), 0), f"stage{stage}_second")
        x = np.maximum(shortcut + y, 0)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], means


@pytest.mark.parametrize(
    ("name", "shape", "batch_norm"),
    [
        ("mlp-linen", (5, 6), True),
        ("mlp-linen", (5, 6), False),
        ("mlp-nnx", (5, 6), True),
        ("mlp-nnx", (5, 6), False),
        ("resnet", (5, 6, 3), True),
        ("resnet", (5, 6), False),
    ],
)
def test_networks_match_the_oracle_in_training_and_evaluation(name, shape, batch_norm, rng):
    oracle = resnet if name == "resnet" else mlp
    network = flax_networks.build(name, shape, CLASSES, batch_norm, momentum=0.75)
    params, state = variables(network, rng)
    assert bool(state) == batch_norm
    x = rng.standard_normal((len(MASK), np.prod(shape))).astype(np.float32)
    logits, new = jax.jit(network.apply, static_argnums=3)(params, state, x, True, mask=MASK[:, None])
    wanted, means = oracle(params, state, x, MASK)
    np.testing.assert_allclose(logits[MASK], wanted[MASK], rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for layer, mean in means.items():
        np.testing.assert_allclose(new[layer]["mean"], mean, rtol=1e-4, atol=1e-4 * np.abs(mean).max())
    logits, same = jax.jit(network.apply, static_argnums=3)(params, state, x, False)
    wanted, _ = oracle(params, state, x, None)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_both_mlps_have_one_structure_and_initialization():
    """The tutorial's sizes for its images; kernels of variance 1 / inputs, and other numbers for another key."""
    params, state = zip(
        *(flax_networks.build(name, (28, 28), 10, True).init(jax.random.key(0)) for name in ("mlp-linen", "mlp-nnx")),
        strict=True,
    )
    for both in (params, state):
        assert jax.tree.structure(both[0]) == jax.tree.structure(both[1])
    for each in params:
        kernels = [each[layer]["kernel"] for layer in ("linear1", "linear2", "head")]
        assert [kernel.shape for kernel in kernels] == [(784, 256), (256, 128), (128, 10)]
        for kernel in kernels:
            np.testing.assert_allclose(kernel.std() * np.sqrt(len(kernel)), 1, rtol=0.1)
    assert (params[0]["linear1"]["kernel"] != params[1]["linear1"]["kernel"]).any()
    for layer in ("norm1", "norm2"):
        for i in range(2):
            assert {name: float(np.unique(values).item()) for name, values in state[i][layer].items()} == {
                "mean": 0,
                "var": 1,
            }


def test_resnet_is_initialized_for_relu(monkeypatch):
    """Kernels of variance 2 / inputs; in fewer shapes than it has, as XLA compiles random numbers for each."""
    monkeypatch.setattr(flax_networks, "CHANNELS", (8, 8, 8))
    params, _ = flax_networks.build("resnet", (8, 8), 10, True).init(jax.random.key(0))
    kernels = np.stack([params[f"stage{i}_{part}_conv"]["kernel"] for i in (1, 2, 3) for part in ("first", "second")])
    assert kernels.shape == (6, 3, 3, 8, 8)
    np.testing.assert_allclose(kernels.std((1, 2, 3, 4)), np.sqrt(2 / 72), rtol=0.1)
    assert len(np.unique(kernels)) > kernels.size / 2


@pytest.fixture(scope="module")
def few():
    digits = data.load()
    return digits._replace(
        train_images=digits.train_images[:50],
        train_labels=digits.train_labels[:50],
        test_images=digits.test_images[:20],
        test_labels=digits.test_labels[:20],
    )


@pytest.mark.parametrize("name", ["mlp-linen", "mlp-nnx", pytest.param("resnet", marks=pytest.mark.slow)])
def test_training_on_two_devices_by_name_equals_one(name, few, monkeypatch):
    """The last batch has two images, and the second device none of them."""
    monkeypatch.setattr(flax_networks, "CHANNELS", (8, 16))  # a stage less to compile
    network = flax_networks.build(name, (8, 8), 10, True)
    losses = []
    for runtime in (Runtime(devices=1), Runtime(devices=2, parallel="shard_map")):
        evaluations = train.fit(
            lambda key: variables(network, np.random.default_rng(np.asarray(jax.random.key_data(key)))),
            network.apply,
            lambda: optax.sgd(0.1),
            few,
            seeds=2,
            steps=8,
            batch_size=16,
            eval_every=4,
            runtime=runtime,
        )
        losses.append([evaluation.loss for evaluation in evaluations][1:])
    assert (losses[0][1] < losses[0][0]).all()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vgg", (8, 8), "network=vgg: expected one of mlp-linen, mlp-nnx, resnet"),
        ("resnet", (64,), r"build\(shape=\(64,\)\): expected \(height, width\) or"),
    ],
)
def test_build_rejects(name, shape, message):
    with pytest.raises(data.InputError, match=message):
        flax_networks.build(name, shape, 10, True)
