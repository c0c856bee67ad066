"""Layers with names: which names are the same in two models, and where they overrule order. No PyTorch, no Keras."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax.nnx
from bnjax import interop
from bnjax.interop.names import compare
from tests.support.torch_arrays import norm, state_dict

X = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype("float32")


@pytest.mark.parametrize(
    ("theirs", "ours", "same", "doubtful"),
    [
        ("module.conv1 module.layer1.0.bn2", "conv1 layer1_0/bn2", [0, 1], []),
        ("_orig_mod.module.a.conv b._orig_mod.conv", "a/conv b/conv", [0, 1], []),
        ("backbone.conv fc", "conv fc", [0, 1], []),
        ("conv fc", "backbone/conv fc", [0, 1], []),
        ("resnet.conv resnet.fc", "model/conv model/fc", [0, 1], []),
        ("encoder.conv decoder.conv", "encoder/conv decoder/conv", [0, 1], []),
        ("skip.bn bn", "skip_bn bn", [0, 1], []),
        ("norms.0 norms.1", "norms/0 norms/1", [0, 1], []),
        ("conv2d conv2d_1", "conv2d conv2d_1", [0, 1], []),
        ("Conv_0 Conv_1", "Conv_0 Conv_1", [0, 1], []),
        # Numbers that count other things in the two models.
        ("conv1 conv2", "conv0 conv1", [], []),
        ("features.0 features.3", "features/0 features/1", [], []),
        ("0 1 4", "layers_0 layers_1 layers_2", [], []),
        ("conv2d_1 conv2d_2", "conv2d conv2d_1", [], []),
        ("dense dense_1", "dense Dense_0", [], []),
        ("batch_normalization_3", "BatchNorm_3", [], []),
        # If "stem" is counted in the one model, bn1 of the other is its second.
        ("bn1 bn2 bn3", "bn1 bn2 stem", [], [0, 1]),
    ],
)
def test_names_are_the_same_if_their_words_are_and_their_numbers_count_alike(theirs, ours, same, doubtful):
    theirs, ours = theirs.split(), ours.split()
    for first, second in ((theirs, ours), (ours, theirs)):
        found = compare(first, second)
        assert found.same == {first[i]: second[i] for i in same}
        assert found.doubtful == {first[i]: second[i] for i in doubtful}


@pytest.mark.parametrize(
    ("theirs", "ours", "crossed"),
    [
        ("bn2 bn1", "bn1 bn2", True),
        ("k_proj q_proj", "q k", True),
        ("q_proj k_proj", "key query", True),
        ("up2 up1", "upsample1 upsample2", True),
        ("norm2 norm1", "bn1 bn2", True),
        ("fc2 fc1", "dense_1 dense_2", True),
        ("norm_b norm_a", "ln_a ln_b", True),
        ("encoder.bn decoder.bn", "dec/norm enc/norm", True),
        ("left.bn right.bn", "Right/BatchNorm_0 Left/BatchNorm_0", True),
        # Names that agree, numbers that no one chose, and layers that need not count alike.
        ("q_proj k_proj", "query key", False),
        ("encoder.bn decoder.bn", "enc/norm dec/norm", False),
        ("norm2 norm1", "BatchNorm_0 BatchNorm_1", False),
        ("0 3", "up2 up1", False),
        ("up1 up2", "dec4 dec3", False),
        ("conv1 downsample.0", "Conv_0 conv_proj", False),
        ("conv2d_1 conv2d", "conv1 conv2", False),
    ],
)
def test_an_order_that_gives_a_layer_the_name_of_another_is_crossed(theirs, ours, crossed):
    first, second = zip(theirs.split(), ours.split(), strict=True)
    names = compare(theirs.split(), ours.split())
    assert names.crossed(first, second) == names.crossed(second, first) == crossed


@pytest.mark.parametrize("names", [("q", "k", "v"), ("query", "key", "value"), (None, None, None)])
def test_projections_that_are_defined_in_another_order_are_refused(names):
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            return sum(nn.Dense(4, use_bias=False, name=name)(x) for name in names)

    x = np.ones((1, 4), "float32")
    arrays = {f"{name}_proj.weight": np.full((4, 4), i, "float32") for i, name in enumerate("kqv")}
    variables = jax.eval_shape(Attention().init, jax.random.key(0), x)
    how = {"model": Attention(), "inputs": x}
    if names[0] is None:
        new, _ = interop.from_torch_model(arrays, variables, **how)
        assert [float(new["params"][f"Dense_{i}"]["kernel"][0, 0]) for i in range(3)] == [0, 1, 2]
        return
    with pytest.raises(ValueError, match=f"ambiguous: their order pairs 'k_proj' with '{names[0]}' and 'q_proj'"):
        interop.from_torch_model(arrays, variables, **how)
    pins = dict(zip(("q_proj", "k_proj", "v_proj"), names, strict=True))
    new, _ = interop.from_torch_model(arrays, variables, pins, **how)
    assert [float(new["params"][name]["kernel"][0, 0]) for name in names] == [1, 0, 2]


# Layers by sort, two of each, which the other library lists in the other order.
SHAPES = {"conv": (3, 3, 3, 3), "dense": (3, 3), "norm": (3,), "tensor": (1, 1, 1, 3)}
NAMES = {sort: (f"{sort}_first", f"{sort}_second") for sort in SHAPES}


class Named(nn.Module):
    names: dict

    @nn.compact
    def __call__(self, x):
        for name in self.names["conv"]:
            x = nn.Conv(3, (3, 3), use_bias=False, name=name)(x)
        for name in self.names["norm"]:
            x = norm(name=name)(x)
        for name in self.names["dense"]:
            x = nn.Dense(3, use_bias=False, name=name)(x)
        for name in self.names["tensor"]:
            x += self.param(name, nn.initializers.zeros, (1, 1, 1, 3))
        return x


class NNXNamed(nnx.Module):
    def __init__(self, names):
        rngs = nnx.Rngs(0)
        for sort, pair in names.items():
            for name in pair:
                make = {
                    "conv": lambda: nnx.Conv(3, 3, (3, 3), use_bias=False, rngs=rngs),
                    "dense": lambda: nnx.Linear(3, 3, use_bias=False, rngs=rngs),
                    "norm": lambda: bnjax.nnx.BatchNorm(3, use_running_average=True, rngs=rngs),
                    "tensor": lambda: nnx.Param(jnp.zeros((1, 1, 1, 3))),
                }[sort]
                setattr(self, name, make())
        self.names = nnx.static({sort: tuple(pair) for sort, pair in names.items()})

    def __call__(self, x):
        for sort in ("conv", "norm", "dense"):
            for name in self.names[sort]:
                x = getattr(self, name)(x)
        return x + sum(getattr(self, name)[...] for name in self.names["tensor"])


def their_arrays(library, names):
    """Arrays in which every layer of one sort is different, in the reverse order of the names."""
    shapes = {name: SHAPES[sort] for sort, pair in names.items() for name in reversed(pair)}
    if library == "torch":
        arrays = state_dict(**{name: shape if len(shape) != 1 else 3 for name, shape in shapes.items()})
        return {key.removesuffix(".weight") if "tensor" in key else key: value for key, value in arrays.items()}
    rng, arrays = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        if "tensor" in name:
            arrays[name] = rng.uniform(1, 2, shape).astype("float32")
        for weight in ("gamma", "beta", "moving_mean", "moving_variance") if "norm" in name else ("kernel",):
            if "tensor" not in name:
                arrays[f"{name}/{weight}"] = rng.uniform(1, 2, shape).astype("float32")
    return arrays


def ours(kind, names):
    if kind == "linen":
        model = Named(names)
        return model, jax.eval_shape(model.init, jax.random.key(0), X)
    model = NNXNamed(names)
    return model, bnjax.nnx.functional(model)[1]


def leaf(variables, collection, layer, name):
    tree = variables[collection][layer]
    return np.asarray((tree[name] if name else tree)[...])


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("library", ["torch", "keras"])
def test_layers_of_the_same_name_belong_together_in_any_order(library, kind):
    arrays = their_arrays(library, NAMES)
    model, variables = ours(kind, NAMES)
    how = {"model": model, "inputs": X}
    if library == "torch":
        new, report = interop.from_torch_model(arrays, variables, **how)
        back, again = interop.to_torch_model(new, state_dict=arrays, **how)
        kernel, scale, order = "{}.weight", "{}.weight", (2, 3, 1, 0)
    else:
        new, report = interop.from_keras_model(arrays, variables, **how)
        back, again = interop.to_keras_model(new, arrays, **how)
        kernel, scale, order = "{}/kernel", "{}/gamma", (0, 1, 2, 3)
        back = dict(zip(arrays, back, strict=True))
    assert {row.by for row in report.tensors} == {"same name"}
    assert report == again
    for name in NAMES["conv"]:
        want = arrays[kernel.format(name)].transpose(order)
        np.testing.assert_array_equal(leaf(new, "params", name, "kernel"), want)
    for name in NAMES["dense"]:
        want = arrays[kernel.format(name)]
        np.testing.assert_array_equal(leaf(new, "params", name, "kernel"), want.T if library == "torch" else want)
    for name in NAMES["norm"]:
        np.testing.assert_array_equal(leaf(new, "params", name, "scale"), arrays[scale.format(name)])
    for name in NAMES["tensor"]:
        np.testing.assert_array_equal(leaf(new, "params", name, None), arrays[name])
    for key, value in arrays.items():
        np.testing.assert_array_equal(back[key], 0 if key.endswith("tracked") else value)


@pytest.mark.parametrize("sort", NAMES)
@pytest.mark.parametrize(
    ("theirs", "own", "names", "words"),
    [
        # Theirs have the reverse order of these names. Numbers that do not count alike still have an order.
        ("b1 b3", "b1 b2", {}, r"their order pairs '{0}b3' with '{0}b1' and '{0}b1' with '{0}b2'"),
        ("b1 b2 c", "b1 b2 b3", {}, r"their order pairs '{0}b1' with '{0}b3' and not with '{0}b1'"),
        # Most of them have the same name, or one of them is named; the others have one shape.
        ("a b c d e", "a b c x y", {}, r"names match only some of the .*Pass names=\{{'{0}e': \.\.\., '{0}d': "),
        ("a b c", "x y z", {"a": "y"}, r"some.*'{0}x', '{0}z'\] are .*names=\{{'{0}a': '{0}y', '{0}c': \.\.\., '{0}b"),
    ],
)  # fmt: skip
def test_an_order_that_names_contradict_is_an_error_until_names_says_more(sort, theirs, own, names, words):
    theirs, own = ([f"{sort}{name}" for name in side.split()] for side in (theirs, own))
    names = {f"{sort}{t}": f"{sort}{o}" for t, o in names.items()}
    others = {other: () for other in SHAPES if other != sort}
    arrays = their_arrays("torch", {sort: theirs, **others})
    model = Named({sort: own, **others})
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    with pytest.raises(ValueError, match=words.format(sort)):
        interop.from_torch_model(arrays, variables, names, model=model, inputs=X)
    everything = dict(zip(theirs, own, strict=True)) | names
    rest = [name for name in own if name not in names.values()]
    everything |= dict(zip([name for name in theirs if name not in names], rest, strict=True))
    _, report = interop.from_torch_model(arrays, variables, everything, model=model, inputs=X)
    assert {row.by for row in report.tensors} == {"names"}


def test_order_is_an_error_for_all_sorts_if_the_layers_named_cross_it():
    own = {"conv": ["a", "b"], "norm": ["norm0", "norm1"], "dense": (), "tensor": ()}
    model = Named(own)
    arrays = state_dict(b=(3, 3, 3, 3), bn2=3, a=(3, 3, 3, 3), bn1=3)
    with pytest.raises(
        ValueError, match=r"the convolutions matched by name are in different orders.*'bn2': \.\.\., 'bn1'"
    ):
        interop.from_torch_model(arrays, jax.eval_shape(model.init, jax.random.key(0), X), model=model, inputs=X)


def test_same_names_order_layers_without_the_model():
    arrays = state_dict(b=(3, 3), a=(3, 3))
    variables = {"params": {name: {"kernel": jnp.zeros((3, 3))} for name in ("a", "b")}}
    new, _ = interop.from_torch_model(arrays, variables)
    for name in ("a", "b"):
        np.testing.assert_array_equal(new["params"][name]["kernel"], arrays[f"{name}.weight"].T)


def test_a_square_array_of_no_known_layer_needs_names_in_spite_of_its_name():
    class Square(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("mixing", nn.initializers.zeros, (3, 3))

    arrays = {"mixing": np.eye(3, dtype="float32")}
    variables = {"params": {"mixing": np.zeros((3, 3), np.float32)}}
    with pytest.raises(ValueError, match=r"'mixing' has .*pass names"):
        interop.from_torch_model(arrays, variables, model=Square(), inputs=X)
    interop.from_torch_model(arrays, variables, {"mixing": "mixing"}, model=Square(), inputs=X)
