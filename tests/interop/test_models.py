"""Weights of whole models in and out, against convolutions in PyTorch's own order of axes. No PyTorch, no Keras."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import interop
from tests.support.torch_arrays import CLASSIFIER, LAST, norm, normalized, state_dict


class Alike(nn.Module):
    """Twelve layers of one shape."""

    @nn.compact
    def __call__(self, x):
        for _ in range(12):
            x = norm(epsilon=1e-5)(nn.Dense(3, use_bias=False)(x))
        return x


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_layers_of_one_shape_go_by_their_order_and_the_report_says_so(with_model, together):
    dense, norms = [f"dense__{i}" for i in range(12)], [f"norm__{i}" for i in range(12)]
    names = [name for pair in zip(dense, norms, strict=True) for name in pair] if together else dense + norms
    arrays = state_dict(**{name: 3 if name in norms else (3, 3) for name in names})
    variables = Alike().init(jax.random.key(0), np.ones((1, 3), np.float32))
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    how = {"model": Alike(), "inputs": x} if with_model else {}
    new, report = interop.from_torch_model(arrays, variables, **how)
    want = x
    for i in range(12):
        want = normalized(want @ arrays[f"dense.{i}.weight"].T, arrays, f"norm.{i}")
    np.testing.assert_allclose(Alike().apply(new, x), want, rtol=1e-4, atol=1e-4)
    assert {row.by for row in report.tensors} == {"order"}
    assert ("dense.10.weight", "Dense_10/kernel") in [(row.theirs, row.ours) for row in report.tensors]


class Shortcut(nn.Module):
    """Calls the shortcut first, which PyTorch's models define last."""

    @nn.compact
    def __call__(self, x):
        shortcut = norm(name="shortcut_norm")(nn.Conv(4, (1, 1), use_bias=False, name="shortcut")(x))
        for i in range(2):
            x = norm(name=f"norm{i}")(nn.Conv(4, (3, 3), use_bias=False, name=f"conv{i}")(x))
        return x + shortcut


def test_another_order_is_an_error_until_names_tell_all_that_it_moves():
    arrays = state_dict(conv1=(4, 3, 3, 3), bn1=4, conv2=(4, 4, 3, 3), bn2=4, down__0=(4, 3, 1, 1), down__1=4)
    variables = Shortcut().init(jax.random.key(0), LAST)
    how = {"model": Shortcut(), "inputs": LAST}
    with pytest.raises(ValueError, match=r"PyTorch's 'conv1' has \{'kernel': \(4, 3, 3, 3\)\}, and 'shortcut'.*needs"):
        interop.from_torch_model(arrays, variables, **how)
    with pytest.raises(ValueError, match=r"ambiguous: the convolutions matched by name are in .*'bn1': "):
        interop.from_torch_model(arrays, variables, {"down.0": "shortcut"}, **how)
    names = {"down.0": "shortcut", "down.1": "shortcut_norm"}
    words = r"only some of the normalizations.*Pass names=.*'shortcut_norm', 'bn1': \.\.\., 'bn2': \.\.\.\}"
    with pytest.raises(ValueError, match=words):
        interop.from_torch_model(arrays, variables, names, **how)
    names["bn1"] = "norm0"
    new, report = interop.from_torch_model(arrays, variables, names, **how)
    assert [(row.theirs, row.ours, row.by) for row in report.tensors if row.theirs.endswith(".weight")] == [
        ("conv1.weight", "conv0/kernel", "shape"),
        ("bn1.weight", "norm0/scale", "names"),
        ("conv2.weight", "conv1/kernel", "shape"),
        ("bn2.weight", "norm1/scale", "shape"),
        ("down.0.weight", "shortcut/kernel", "names"),
        ("down.1.weight", "shortcut_norm/scale", "names"),
    ]
    np.testing.assert_array_equal(new["batch_stats"]["shortcut_norm"]["var"], arrays["down.1.running_var"])


PATCHES = {"cls": np.ones((1, 1, 3)), "position": np.ones((1, 4, 3)), "fc.weight": np.full((2, 3), 2.0)}


class Patches(nn.Module):
    @nn.compact
    def __call__(self, x):
        start = self.param("start", nn.initializers.zeros, (1, 1, 3))
        return nn.Dense(2, use_bias=False)(x + start + self.param("where", nn.initializers.zeros, (1, 4, 3)))


def test_arrays_of_no_layer_are_taken_as_they_are_if_they_are_named_or_one_row():
    x = jnp.ones((1, 4, 3))
    variables = Patches().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"PyTorch's 'position' has .*and 'where'.*pass names"):
        interop.from_torch_model(PATCHES, variables, model=Patches(), inputs=x)
    new, report = interop.from_torch_model(PATCHES, variables, {"position": "where"}, model=Patches(), inputs=x)
    assert new["params"]["where"].sum() == 12
    assert str(report).splitlines() == [
        "theirs     shape      ours            shape      done               by",
        "cls        (1, 1, 3)  start           (1, 1, 3)  as it is           shape",
        "position   (1, 4, 3)  where           (1, 4, 3)  as it is           names",
        "fc.weight  (2, 3)     Dense_0/kernel  (3, 2)     transposed (1, 0)  shape",
    ]


def two(first="a", second="b"):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, use_bias=False, name=first)(nn.Dense(3, use_bias=False, name=second)(x))

    return Two(), Two().init(jax.random.key(0), jnp.ones((1, 3)))


class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False, name="a")(x)


SQUARE = state_dict(one=(3, 3), two=(3, 3))


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        (SQUARE, {}, r"model=None\): ambiguous: the paths \['a', 'b'\].*Pass model= and inputs="),
        (SQUARE, {"inputs": jnp.ones((1, 3)), "train": True}, r"model=None\): \['inputs', 'train'\] are for the call"),
        ({"one.weight": SQUARE["one.weight"]}, {"model": ...}, r"1 dense.*Flax model 2.*Flax model: \['a'\]"),
        (SQUARE | state_dict(three=(9, 3)), {"model": ...}, r"left over in the PyTorch model.*other: \['three'\]"),
        (SQUARE | {"two.weight": np.ones((3, 4))}, {"model": ...}, r"number 2: PyTorch's 'two' has .*\(3, 4\).*'a'"),
        (SQUARE | {"two.bias": np.ones(3)}, {"model": ...}, r"'two' has .*'bias': \(3,\).*, and 'a'"),
        (SQUARE | {"index": np.arange(4)}, {"model": ...}, r"1 other tensors.*Flax model 0.*\['index'\].*Leave out"),
        (SQUARE | {"two.weight": np.ones((3, 3), int)}, {"model": ...}, "two.weight is int64. Expected floating"),
        (SQUARE, {"model": ..., "names": {"three": "a"}}, r"\{'three': 'a'\}\): PyTorch's model has no 'three'"),
        (SQUARE, {"model": ..., "names": {"one": "c"}}, r"'one': 'c'\}\): the model has no 'c', but \['b', 'a'\]"),
        (SQUARE, {"model": ..., "names": {"one": "a", "two": "a"}}, r"\['a'\] are named twice"),
        ({"model": SQUARE}, {}, r"'model' is a mapping of 2 entries.*pass state_dict\['model'\]"),
        ([1, 2], {}, r"state_dict=\.\.\.\): expected a mapping of.*, got list. Pass module.state_dict\(\)"),
    ],
)  # fmt: skip
def test_from_torch_model_rejects_what_does_not_match(arrays, options, words):
    model, variables = two()
    if "model" in options:
        options = options | {"model": model, "inputs": jnp.ones((1, 3))}
    with pytest.raises(ValueError, match=words):
        interop.from_torch_model(arrays, variables, **options)


def test_layers_without_a_model_go_by_shape_where_paths_do_not_tell_their_order():
    variables = {"params": {"b": {"kernel": jnp.ones((2, 3))}, "a": {"kernel": jnp.ones((3, 4))}}}
    arrays = state_dict(one=(3, 2), two=(4, 3))
    new, _ = interop.from_torch_model(arrays, variables)
    np.testing.assert_array_equal(new["params"]["b"]["kernel"], arrays["one.weight"].T)


def test_convolutions_need_the_model_and_every_layer_a_call():
    model = nn.Sequential(
        [
            nn.Conv(4, (3, 3), padding="VALID", use_bias=False),
            lambda x: x.reshape(2, -1),
            norm(),
            nn.Dense(5, use_bias=False),
        ]
    )
    variables = model.init(jax.random.key(0), LAST)
    with pytest.raises(ValueError, match=r"model=None\): ambiguous: kernels of more than two axes, \['layers_0'\]"):
        interop.from_torch_model(CLASSIFIER, variables)
    with pytest.raises(ValueError, match=r"inputs=\.\.\.\): with these inputs the model never calls \['b'\]"):
        interop.from_torch_model(SQUARE, two()[1], model=Half(), inputs=jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"expected a mapping with params, got State"):
        interop.from_torch_model(CLASSIFIER, nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))
    negative = CLASSIFIER | {"bn.running_var": -np.ones(24)}
    with pytest.raises(ValueError, match=r"from_torch_model: 'bn': running_var has the negative variance -1.0"):
        interop.from_torch_model(negative, variables, model=model, inputs=LAST)
    with pytest.raises(ValueError, match=r"to_torch_model\(names=None, state_dict=None\): pass state_dict="):
        interop.to_torch_model(variables)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_counts_and_dtypes_are_those_of_the_model(kind):
    arrays = state_dict(bn=3)
    options = {"momentum": bnjax.cumulative_average, "use_running_average": True}
    if kind == "linen":
        variables = bnjax.linen.BatchNorm(**options).init(jax.random.key(0), jnp.ones((1, 3)))
    else:
        variables = bnjax.nnx.functional(bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options))[1]
    variables = {**variables, "params": jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables["params"])}
    new, report = interop.from_torch_model(SimpleNamespace(state_dict=lambda: arrays), variables)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value").rpartition("/")[2]: leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(new)
    }
    assert leaves["count"].tolist() == [7, 7, 7]
    assert leaves["scale"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaves["scale"], arrays["bn.weight"].astype(jnp.bfloat16))
    assert jax.tree.map(lambda v: v.dtype, new) == jax.tree.map(lambda v: v.dtype, {**variables})
    assert report.tensors[-1].done == "for each feature"
    back, _ = interop.to_torch_model(new, state_dict=arrays)
    assert (back["bn.num_batches_tracked"], back["bn.weight"].dtype) == (7, np.float32)


def test_arrays_that_change_afterwards_do_not_change_the_variables():
    arrays = state_dict(fc=(3, 3))
    model, variables = nn.Dense(3, use_bias=False), {"params": {"kernel": jnp.zeros((3, 3))}}
    new, _ = interop.from_torch_model(arrays, variables, model=model, inputs=jnp.ones((1, 3)))
    want = arrays["fc.weight"].T.copy()
    arrays["fc.weight"][:] = 0
    np.testing.assert_array_equal(new["params"]["kernel"], want)


def test_from_torch_takes_a_module_and_says_what_else_to_pass():
    arrays = state_dict(bn=3)
    params, state = interop.from_torch(SimpleNamespace(state_dict=lambda: arrays), "bn")
    np.testing.assert_array_equal(params.scale, arrays["bn.weight"])
    assert state is not None
    with pytest.raises(
        ValueError, match=r"from_torch\(state_dict=\.\.\.\): expected a mapping.*got float. Pass module"
    ):
        interop.from_torch(1.0)


KERAS = {
    "conv/kernel": (3, 3, 3, 4),
    "deep/kernel": (2, 2, 4, 3),
    "both/depthwise_kernel": (1, 1, 12, 1),
    "both/pointwise_kernel": (1, 1, 12, 2),
    "both/bias": (2,),
    "block/norm/gamma:0": (4,),
    "block/norm/beta:0": (4,),
    "block/norm/moving_mean:0": (4,),
    "block/norm/moving_variance:0": (4,),
}


class KerasLike(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding="VALID", use_bias=False)(x)
        x = nn.Conv(12, (2, 2), padding="VALID", use_bias=False, feature_group_count=4)(x)
        x = nn.Conv(12, (1, 1), use_bias=False, feature_group_count=12)(x)
        return norm()(nn.Conv(2, (1, 1))(x).reshape(len(x), -1))


def test_keras_weights_by_path_go_to_separable_and_depthwise_convolutions():
    rng = np.random.default_rng(0)
    weights = [(path, rng.uniform(0.5, 1, shape).astype("float32")) for path, shape in KERAS.items()]
    variables = KerasLike().init(jax.random.key(0), LAST)
    how = {"model": KerasLike(), "inputs": LAST}
    new, report = interop.from_keras_model(weights, variables, **how)
    given = dict(weights)
    # Channel c of the input gives channels 3 c, 3 c + 1 and 3 c + 2.
    for c in range(12):
        want = given["deep/kernel"][:, :, c // 3, c % 3]
        np.testing.assert_array_equal(new["params"]["Conv_1"]["kernel"][:, :, 0, c], want)
    np.testing.assert_array_equal(new["params"]["Conv_3"]["bias"], given["both/bias"])
    np.testing.assert_array_equal(new["batch_stats"]["BatchNorm_0"]["var"], given["block/norm/moving_variance:0"])
    assert {row.done for row in report.tensors} == {"as it is", "reshaped"}
    back, _ = interop.to_keras_model(new, weights, **how)
    for ours, (_, theirs) in zip(back, weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([np.ones((3, 3))], r"expected a Keras model, or arrays by path, got list. get_weights\(\) has no paths"),
        ([("a/kernel", np.ones((3, 3)))] * 2, r"several weights have the paths \['a/kernel'\]"),
        ({"a/kernel": np.ones((3, 2))}, r"from_keras_model\(weights=.*Keras's 'a' has \{'kernel': \(3, 2\)\}"),
    ],
)
def test_from_keras_model_rejects(weights, words):
    variables = {"params": {"kernel": jnp.zeros((3, 3))}}
    with pytest.raises(ValueError, match=words):
        interop.from_keras_model(weights, variables)


def test_an_embedding_and_a_dense_layer_of_one_shape_are_told_apart_by_the_calls():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(7, use_bias=False, name="a")(nn.Embed(7, 4, name="b")(x))

    arrays = state_dict(embedding=(7, 4), head=(7, 4))
    x = np.array([[1, 5, 2]])
    variables = Tied().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"model=None.*ambiguous"):
        interop.from_torch_model(arrays, variables)
    new, _ = interop.from_torch_model(arrays, variables, model=Tied(), inputs=x)
    want = arrays["embedding.weight"][x] @ arrays["head.weight"].T
    np.testing.assert_allclose(Tied().apply(new, x), want, rtol=1e-5, atol=1e-5)


def test_arguments_that_are_no_mappings_or_do_not_fit_the_call_are_named():
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), np.ones((1, 2)))
    arrays = {"fc.weight": np.ones((3, 2)), "fc.bias": np.zeros(3)}
    for how in ({"model": model, "inputs": np.ones((1, 2))}, {}):
        with pytest.raises(ValueError, match=r"names=...\): expected a mapping.* got list"):
            interop.from_torch_model(arrays, {"batch_stats": {}, **variables}, ["fc"], **how)
    with pytest.raises(
        ValueError, match=r"variables=...\): expected a mapping with batch_stats, got dict of \['params'"
    ):
        interop.from_torch_model(arrays, variables, {"fc": "Dense_0"})
    with pytest.raises(Exception, match="the existing parameter") as error:
        interop.from_torch_model(arrays, variables, model=model, inputs=np.ones((1, 5)))
    assert "does not run with inputs of shapes [(1, 5)]" in error.value.__notes__[-1]
