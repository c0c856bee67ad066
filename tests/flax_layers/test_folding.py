"""Folding: the folded layer or model gives the same output as before, without batch normalization."""

import re
from collections import Counter
from functools import partial

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.core import trees
from experiments.benchmark import footprint
from tests.support.folding import CLOSE, applied, called, drawn, numbers

# A case: the class of a linear layer and its options.

PREVIOUS = {
    "dense": ("Dense", {}),
    "dense without bias": ("Dense", {"use_bias": False}),
    "convolution": ("Conv", {"kernel_size": (3, 3), "strides": 2}),
    "dilated": (
        "Conv",
        {"kernel_size": (3, 3), "kernel_dilation": 2, "input_dilation": 2, "padding": 2, "use_bias": False},
    ),
    "one-dimensional, causal": ("Conv", {"kernel_size": (3,), "padding": "CAUSAL"}),
    "masked": ("Conv", {"kernel_size": (1, 3), "mask": (numbers(1, 3, 4, 8) > 0).astype(np.float32)}),
    "grouped": ("Conv", {"kernel_size": (3, 3), "feature_group_count": 2}),
    "depthwise": ("Conv", {"kernel_size": (3, 3), "feature_group_count": 4, "use_bias": False}),
    "transposed": ("ConvTranspose", {"kernel_size": (3, 2), "strides": (2, 2)}),
    "transposed, with the kernel transposed": (
        "ConvTranspose",
        {"kernel_size": (3, 3), "strides": (2, 2), "transpose_kernel": True, "use_bias": False},
    ),
}
NEXT = {
    "dense": ("Dense", {}),
    "dense without bias": ("Dense", {"use_bias": False}),
    "valid": ("Conv", {"kernel_size": (3, 3), "strides": 2, "padding": "VALID"}),
    "grouped, valid": ("Conv", {"kernel_size": (2, 3), "padding": 0, "feature_group_count": 2}),
    "depthwise, circular": (
        "Conv",
        {"kernel_size": (3, 3), "padding": "CIRCULAR", "feature_group_count": 4, "use_bias": False},
    ),
    "reflected": ("Conv", {"kernel_size": (3, 3), "padding": "REFLECT"}),
    "of one place": ("Conv", {"kernel_size": (1, 1), "strides": 2}),
    "transposed, of one place": ("ConvTranspose", {"kernel_size": (1, 1)}),
    "transposed, with the kernel transposed": ("ConvTranspose", {"kernel_size": (1, 1), "transpose_kernel": True}),
}
INEXACT = {
    "same": ("Conv", {"kernel_size": (3, 3)}),
    "causal": ("Conv", {"kernel_size": (3,), "padding": "CAUSAL"}),
    "padded": ("Conv", {"kernel_size": (1, 1), "padding": ((0, 1), (0, 0))}),
    "padded by a number": ("Conv", {"kernel_size": (1, 1), "padding": 1}),
    "dilated": ("Conv", {"kernel_size": (1, 1), "input_dilation": 2, "padding": 0}),
    "masked": ("Conv", {"kernel_size": (1, 1), "mask": np.ones((1, 1, 4, 8), np.float32)}),
    "transposed": ("ConvTranspose", {"kernel_size": (2, 2), "padding": "VALID"}),
    "transposed, strided": ("ConvTranspose", {"kernel_size": (1, 1), "strides": (2, 2)}),
}


def image(kind, options):
    return numbers(2, *[6] * len(options.get("kernel_size", ())), 4)


def linen_pair(kind, options, previous):
    linear, norm = getattr(nn, kind)(8, **options), bnjax.linen.BatchNorm(use_running_average=True)
    model = nn.Sequential([linear, norm] if previous else [norm, linear])
    return model, drawn(jax.eval_shape(model.init, jax.random.key(0), image(kind, options)))


def nnx_pair(kind, options, previous):
    rngs = nnx.Rngs(0)
    linear = getattr(nnx, "Linear" if kind == "Dense" else kind)(4, 8, **options, rngs=rngs)
    norm = bnjax.nnx.BatchNorm(8 if previous else 4, use_running_average=True, rngs=rngs)
    model = nnx.Sequential(linear, norm) if previous else nnx.Sequential(norm, linear)
    nnx.update(model, drawn(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    return model


PAIRS = [(True, *case) for case in PREVIOUS.values()] + [(False, *case) for case in NEXT.values()]
IDS = [f"into the previous: {name}" for name in PREVIOUS] + [f"into the next: {name}" for name in NEXT]


@pytest.mark.parametrize(("previous", "kind", "options"), PAIRS, ids=IDS)
def test_linen_fold_preserves_output(previous, kind, options):
    model, variables = linen_pair(kind, options, previous)
    x = image(kind, options)
    folded, interceptor = bnjax.linen.fold_model(model, variables, x, pairs=[("layers_0", "layers_1")])
    linear = "layers_0" if previous else "layers_1"
    assert set(folded) == {"params"}
    assert {k: set(v) for k, v in folded["params"].items()} == {linear: {"kernel", "bias"}}
    got = applied(model, folded, x, interceptor)
    np.testing.assert_allclose(got, applied(model, variables, x), **CLOSE)
    bare = getattr(nn, kind)(8, **{**options, "use_bias": True})
    np.testing.assert_allclose(applied(bare, {"params": folded["params"][linear]}, x), got, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("previous", "kind", "options"), PAIRS, ids=IDS)
def test_nnx_fold_preserves_output(previous, kind, options):
    model = nnx_pair(kind, options, previous)
    x = image(kind, options)
    want = called(model, x)
    assert bnjax.nnx.fold_model(model, pairs=[("layers/0", "layers/1")]) is model
    got = called(model, x)
    np.testing.assert_allclose(got, want, **CLOSE)
    linear = "layers/0" if previous else "layers/1"
    assert {k: set(v) for k, v in trees.leaves(nnx.state(model, nnx.Param)).items()} == {linear: {"kernel", "bias"}}
    assert not nnx.state(model, nnx.BatchStat)
    graph, state = nnx.split(model)
    np.testing.assert_array_equal(called(nnx.merge(graph, state), x), got)


@pytest.mark.parametrize(("kind", "options"), INEXACT.values(), ids=INEXACT)
def test_fold_refuses_what_would_not_be_exact(kind, options):
    model, variables = linen_pair(kind, options, previous=False)
    with pytest.raises(
        ValueError,
        match=r"fold_model\(pairs=\[\('layers_0', 'layers_1'\)\]\).*not exact if padding or dilation adds zeros",
    ):
        bnjax.linen.fold_model(model, variables, image(kind, options), pairs=[("layers_0", "layers_1")])
    model = nnx_pair(kind, options, previous=False)
    before = nnx.state(model)
    with pytest.raises(ValueError, match="not exact if padding or dilation adds zeros"):
        bnjax.nnx.fold_model(model, pairs=[("layers/0", "layers/1")])
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


class Block(nn.Module):
    """Convolution, norm, ReLU, then a norm before a convolution of one place, then a norm that stays."""

    features: int
    norm: type = bnjax.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        norm = partial(self.norm, use_running_average=not train, epsilon=1e-3)
        x = nn.relu(norm()(nn.Conv(self.features, (3, 3), use_bias=False)(x)))
        x = nn.Conv(self.features, (1, 1))(norm(use_scale=False)(x))
        return norm(use_bias=False)(nn.relu(x))


class Network(nn.Module):
    norm: type = bnjax.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        x = Block(4, self.norm)(x, train)
        x = Block(6, self.norm, name="last")(x, train)
        x = nn.Dense(8)(x.mean((1, 2)))
        return nn.Dense(3)(self.norm(use_running_average=not train)(x))


NAMES = [("Conv_0", "BatchNorm_0"), ("BatchNorm_1", "Conv_1")]
LINEN = [(f"{b}/{i}", f"{b}/{j}") for b in ("Block_0", "last") for i, j in NAMES] + [("Dense_0", "BatchNorm_0")]


@pytest.mark.parametrize("norm", [bnjax.linen.BatchNorm, nn.BatchNorm])
def test_a_linen_model_is_folded_and_exported(norm):
    model, x = Network(norm), numbers(2, 5, 5, 3)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    folded, interceptor = bnjax.linen.fold_model(model, variables, x, pairs=LINEN)
    assert set(trees.norms(folded["params"], folded["batch_stats"])) == {"Block_0/BatchNorm_2", "last/BatchNorm_2"}
    assert set(folded["params"]["Block_0"]["Conv_0"]) == {"kernel", "bias"}

    @jax.jit
    def serve(folded, x):
        with nn.intercept_methods(interceptor):
            return model.apply(folded, x)

    want = applied(model, variables, x)
    np.testing.assert_allclose(serve(folded, x), want, **CLOSE)
    exported = jax.export.deserialize(jax.export.export(serve)(folded, x).serialize())
    np.testing.assert_allclose(exported.call(folded, x), serve(folded, x), rtol=1e-6, atol=1e-6)


@pytest.mark.optimized
def test_a_folded_model_compiles_to_the_operations_of_one_without_norms():
    def operations(call):
        text = call.func.lower(*call.args).compile().as_text()
        return Counter(re.findall(r"= \S+ ([a-z-]+)\(", text))

    found = {name: operations(call) for name, call in footprint.serving(jnp.ones((2, 8, 8, 4))).items()}
    assert found["folded"] == found["never had it"]
    assert found["folded"]["convolution"] == footprint.BLOCKS
    assert found["batch normalization"] != found["folded"]


class NnxBlock(nnx.Module):
    def __init__(self, into, features, norm, rngs):
        self.conv1 = nnx.Conv(into, features, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = norm(features, epsilon=1e-3, rngs=rngs)
        self.bn2 = norm(features, use_scale=False, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (1, 1), rngs=rngs)
        self.bn3 = norm(features, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.bn3(nnx.relu(self.conv2(self.bn2(nnx.relu(self.bn1(self.conv1(x)))))))


@pytest.mark.parametrize("norm", [bnjax.nnx.BatchNorm, nnx.BatchNorm, bnjax.nnx.RenormBatchNorm])
def test_an_nnx_model_is_folded_and_exported(norm):
    rngs, x = nnx.Rngs(0), numbers(2, 5, 5, 3)
    model = nnx.Sequential(NnxBlock(3, 4, norm, rngs), NnxBlock(4, 6, norm, rngs))
    nnx.update(model, drawn(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    model.eval()
    want = called(model, x)
    pairs = [(f"layers/{i}/{a}", f"layers/{i}/{b}") for i in (0, 1) for a, b in [("conv1", "bn1"), ("bn2", "conv2")]]
    bnjax.nnx.fold_model(model, pairs=pairs)
    assert set(trees.norms({}, nnx.state(model, nnx.BatchStat))) == {"layers/0/bn3", "layers/1/bn3"}
    np.testing.assert_allclose(model(x), want, **CLOSE)
    got = called(model, x)
    np.testing.assert_allclose(got, want, **CLOSE)
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    exported = jax.export.export(jax.jit(lambda leaves, x: nnx.merge(graph, structure.unflatten(leaves))(x)))
    again = jax.export.deserialize(exported(leaves, x).serialize())
    np.testing.assert_allclose(again.call(leaves, x), got, rtol=1e-6, atol=1e-6)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def layer(module, x, _):
            x = nn.Dense(4, use_bias=False, parent=module)(x)
            return nn.relu(bnjax.linen.BatchNorm(use_running_average=True, parent=module)(x)), None

        scan = nn.scan(layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)
        return scan(self, x, None)[0]


def test_a_scanned_stack_is_folded_layer_by_layer():
    model, x = Scanned(), numbers(5, 4)
    variables = drawn(model.init(jax.random.key(0), x))
    assert variables["batch_stats"]["BatchNorm_0"]["mean"].shape == (3, 4)
    folded, interceptor = bnjax.linen.fold_model(model, variables, x, pairs=[("Dense_0", "BatchNorm_0")])
    want = applied(model, variables, x)
    np.testing.assert_allclose(applied(model, folded, x, interceptor), want, **CLOSE)


def test_a_vmapped_stack_is_folded_layer_by_layer():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        linear = nnx.Conv(4, 4, (3,), padding="VALID", use_bias=False, rngs=rngs)
        return nnx.Sequential(nnx.BatchNorm(4, use_running_average=True, rngs=rngs), linear)

    model = stack(nnx.Rngs(0))
    nnx.update(model, drawn(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    call = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))
    want = call(model, numbers(2, 5, 4))
    bnjax.nnx.fold_model(model, pairs=[("layers/0", "layers/1")])
    assert model.layers[1].bias.shape == (3, 4)
    np.testing.assert_allclose(call(model, numbers(2, 5, 4)), want, **CLOSE)


@pytest.fixture
def mixed():
    """Flax promotes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("mixed")
def test_fold_keeps_partitioning_and_the_dtype_that_the_norm_gave():
    kernel = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
    dense = nn.Dense(4, kernel_init=kernel, dtype=jnp.bfloat16, use_bias=False)
    scale = nn.with_partitioning(nn.initializers.constant(2.0), ("model",))
    model = nn.Sequential([dense, bnjax.linen.BatchNorm(use_running_average=True, dtype=jnp.float32, scale_init=scale)])
    x = numbers(2, 3)
    variables = model.init(jax.random.key(0), x)
    folded, interceptor = bnjax.linen.fold_model(model, variables, x, pairs=[("layers_0", "layers_1")])
    new, old = (v["params"]["layers_0"]["kernel"] for v in (folded, variables))
    assert new.names == (None, "model")
    np.testing.assert_allclose(new.value, 2 * old.value / np.sqrt(1 + 1e-5), rtol=1e-6)
    with nn.intercept_methods(interceptor):
        assert model.apply(folded, x).dtype == jnp.float32
    assert model.apply(variables, x).dtype == jnp.float32

    rngs = nnx.Rngs(0)
    linear = nnx.Linear(3, 4, dtype=jnp.bfloat16, rngs=rngs)
    model = nnx.Sequential(linear, nnx.BatchNorm(4, dtype=jnp.float16, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    model.eval()
    before = [model.layers[1](linear(x)).dtype, model(x).dtype]
    bnjax.nnx.fold_model(model, pairs=[("layers/0", "layers/1")])
    assert [model.layers[1](linear(x)).dtype, model(x).dtype] == before == [jnp.float16, jnp.float32]


def test_a_norm_between_two_linear_layers_and_a_linear_layer_between_two_norms():
    rngs, x = nnx.Rngs(0), numbers(5, 4)
    model = nnx.Sequential(nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
    nnx.update(model, drawn(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    model.eval()
    want = model(x)
    bnjax.nnx.fold_model(model, pairs=[("layers/0", "layers/1"), ("layers/1", "layers/2")])
    assert not nnx.state(model, nnx.BatchStat)
    np.testing.assert_allclose(model(x), want, **CLOSE)


def test_shared_layers_are_folded_once():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense, norm = nn.Dense(4, use_bias=False), bnjax.linen.BatchNorm(use_running_average=True)
            return norm(dense(nn.relu(norm(dense(x)))))

    model, x = Twice(), numbers(5, 4)
    variables = drawn(model.init(jax.random.key(0), x))
    folded, interceptor = bnjax.linen.fold_model(model, variables, x, pairs=[("Dense_0", "BatchNorm_0")])
    want = applied(model, variables, x)
    np.testing.assert_allclose(applied(model, folded, x, interceptor), want, **CLOSE)


LINEN_ERRORS = {
    "absent": ([("Conv_9", "BatchNorm_0")], r"calls no 'Conv_9'.*'Block_0/BatchNorm_0'.*'Dense_0'"),
    "activation between": ([("Block_0/BatchNorm_0", "Block_0/Conv_1")], r"not the output of 'Block_0/BatchNorm_0'"),
    "other order": ([("BatchNorm_0", "Dense_0")], r"the input of 'Dense_0' is not the output of 'BatchNorm_0'"),
    "two linear": ([("Dense_0", "Dense_1")], r"Dense and Dense. Expected one of \['Dense', 'Conv', 'ConvTranspose'\]"),
    "two norms": ([("Block_0/BatchNorm_0", "Block_0/BatchNorm_1")], r"BatchNorm and BatchNorm"),
    "twice": ([("Dense_0", "BatchNorm_0"), ("BatchNorm_0", "Dense_1")], r"'BatchNorm_0' is in two pairs"),
}


@pytest.mark.parametrize(("pairs", "words"), LINEN_ERRORS.values(), ids=LINEN_ERRORS)
def test_linen_fold_rejects(pairs, words):
    model, x = Network(), numbers(2, 5, 5, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables)
    with pytest.raises(ValueError, match=words):
        bnjax.linen.fold_model(model, variables, x, pairs=pairs)


def test_the_interceptor_refuses_variables_that_were_not_folded():
    model, variables = linen_pair("Dense", {}, previous=True)
    x = image("Dense", {})
    _, interceptor = bnjax.linen.fold_model(model, variables, x, pairs=[("layers_0", "layers_1")])
    with nn.intercept_methods(interceptor), pytest.raises(ValueError, match="'layers_1' has statistics"):
        model.apply(variables, x)


class Scaled(nnx.Linear):
    pass


NNX_ERRORS = {
    "absent": ([("layers/7", "layers/1")], r"calls no 'layers/7'.*\['layers/0', 'layers/1', 'layers/3'\]"),
    "subclass": ([("layers/2", "layers/1")], r"Scaled and BatchNorm.*no subclass"),
    "sizes": ([("layers/3", "layers/1")], r"layers/3.*shape \(5, 6\) and so 6 features.*\(4,\)"),
    "indexed": ([("layers/0", "layers/4")], r"Linear and IndexedBatchNorm"),
    "twice": ([("layers/0", "layers/1")] * 2, r"'layers/1' is in two pairs"),
}


@pytest.mark.parametrize(("pairs", "words"), NNX_ERRORS.values(), ids=NNX_ERRORS)
def test_nnx_fold_rejects_and_leaves_the_model_alone(pairs, words):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs),
        bnjax.nnx.BatchNorm(4, rngs=rngs),
        Scaled(4, 4, rngs=rngs),
        nnx.Linear(5, 6, rngs=rngs),
        bnjax.nnx.IndexedBatchNorm(4, num_indices=2, rngs=rngs),
    )
    before = nnx.state(model)
    with pytest.raises(ValueError, match=words):
        bnjax.nnx.fold_model(model, pairs=pairs)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_fold_rejects_features_on_another_axis():
    model = nn.Sequential([nn.Dense(4), bnjax.linen.BatchNorm(axis=1, use_running_average=True)])
    x = numbers(2, 4, 4)
    with pytest.raises(ValueError, match=r"'layers_1' has axis=1. Folding needs the features on the last"):
        bnjax.linen.fold_model(model, model.init(jax.random.key(0), x), x, pairs=[("layers_0", "layers_1")])
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Conv(4, 4, (1, 1), rngs=rngs), nnx.BatchNorm(4, axis=1, rngs=rngs))
    with pytest.raises(ValueError, match=r"'layers/1' has axis=1"):
        bnjax.nnx.fold_model(model, pairs=[("layers/0", "layers/1")])
