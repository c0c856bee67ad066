"""What PyTorch's and Keras's models say besides their arrays. Neither library: objects with the same attributes."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

import bnjax
from bnjax import interop
from tests.support.torch_arrays import CLASSIFIER, IMAGE, LAST, conv, norm, normalized, state_dict

LAYER = {"weight": np.ones(3), "bias": np.zeros(3), "running_mean": np.zeros(3), "running_var": np.ones(3)}


class TorchModule(SimpleNamespace):
    """A PyTorch module of these modules by name, with these tensors."""

    def named_modules(self, remove_duplicate):
        return [("", self), *self.modules.items()]

    def state_dict(self):
        return self.tensors


def batch_norm(**tensors):
    return TorchModule(modules={}, tensors=tensors, running_mean=None)


class LayerNorm(SimpleNamespace):
    pass


class _InstanceNorm(TorchModule):
    pass


def test_from_torch_takes_batch_normalization_alone():
    assert interop.from_torch(batch_norm()) == (bnjax.BNParams(None, None), None)
    model = TorchModule(modules={"ln": LayerNorm()}, tensors={f"ln.{k}": LAYER[k] for k in ("weight", "bias")})
    with pytest.raises(ValueError, match=r"prefix='ln'\): expected a BatchNorm, got LayerNorm"):
        interop.from_torch(model, "ln")
    with pytest.raises(ValueError, match="expected a BatchNorm, got _InstanceNorm"):
        interop.from_torch(_InstanceNorm(modules={}, tensors=LAYER, running_mean=0))


COMPUTED = {
    "weight_g weight_v": "remove_weight_norm",
    "weight_orig weight_u weight_v": "remove_spectral_norm",
    "weight_orig weight_mask": "prune.remove",
    "parametrizations.weight.original0 parametrizations.weight.original1": "remove_parametrizations",
    "parametrizations.weight.original parametrizations.weight.0._u": "remove_parametrizations",
}


@pytest.mark.parametrize("names", COMPUTED)
def test_weights_that_pytorch_computes_are_named_with_what_puts_them_back(names):
    tensors = {f"bn1.{name}": np.ones(3) for name in names.split()} | {"bn1.bias": np.zeros(3)}
    words = rf"{list(tensors)[:-1]}.*torch\.nn\.utils\.\S*{COMPUTED[names]}\(module, 'weight'\)".replace("[", r"\[")
    with pytest.raises(ValueError, match=rf"from_torch\(prefix='bn1'\): .*{words}"):
        interop.from_torch(tensors, "bn1")
    with pytest.raises(ValueError, match=rf"from_torch_model: .*{words}"):
        interop.from_torch_model(tensors, {"params": {}})
    other = {f"bn2.{name}": value for name, value in LAYER.items()}
    assert interop.from_torch(tensors | other, "bn2")[0].scale.shape == (3,)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (SimpleNamespace(shape=(3,), materialize=None), r"'bn.weight' has no values yet.*Call the lazy module once"),
        (SimpleNamespace(shape=(3,), is_meta=True), r"'bn.weight' has no values yet.*meta device"),
        ((1, 2), r"'bn.weight' is a tuple, not a tensor.*before quantization"),
    ],
)
def test_what_holds_no_values_is_named(value, words):
    arrays = state_dict(bn=3) | {"bn.weight": value}
    with pytest.raises(ValueError, match=words.replace("bn.", "")):
        interop.from_torch(arrays, "bn")
    with pytest.raises(ValueError, match=words):
        interop.from_torch_model(arrays, {"params": {}})
    assert interop.from_torch(arrays | {f"other.{k}": v for k, v in LAYER.items()}, "other")[1] is not None


DENSE = state_dict(fc=(3, 2))
X = np.ones((1, 2), np.float32)


def untracked(momentum=0.9, **options):
    """A Dense and a BatchNorm with statistics that are not those of a new layer."""
    model = nn.Sequential([nn.Dense(3, use_bias=False), norm(momentum=momentum, **options)])
    variables = model.init(jax.random.key(0), X)
    return model, {**variables, "batch_stats": jax.tree.map(lambda v: v + 5, variables["batch_stats"])}


@pytest.mark.parametrize("momentum", [0.9, bnjax.cumulative_average])
@pytest.mark.parametrize("affine", [True, False])
def test_statistics_that_pytorch_does_not_track_stay_and_the_report_names_them(affine, momentum):
    model, variables = untracked(momentum, use_scale=affine, use_bias=affine)
    tensors = DENSE | ({"bn.weight": np.full(3, 2.0), "bn.bias": np.ones(3)} if affine else {})
    own = {name.removeprefix("bn."): value for name, value in tensors.items() if name.startswith("bn.")}
    theirs = TorchModule(modules={"bn": batch_norm(**own), "fc": SimpleNamespace()}, tensors=tensors)
    for names in (None, {"bn": "layers_1"}):
        new, report = interop.from_torch_model(theirs, variables, names, model=model, inputs=X)
        assert new["batch_stats"] == variables["batch_stats"]
        stays = [row.ours for row in report.tensors if row.done == "stays: not kept there" and row.theirs == ""]
        count = ["count"] if callable(momentum) else []
        assert sorted(stays) == [f"layers_1/{name}" for name in (*count, "mean", "var")]
        back, report = interop.to_torch_model(new, names, state_dict=theirs, model=model, inputs=X)
        assert {name: value.tolist() for name, value in back.items()} == {k: v.tolist() for k, v in tensors.items()}
        assert report.tensors[-1].ours == "layers_1/var"


def test_a_layer_without_statistics_may_be_of_another_kind():
    model, variables = untracked()
    how = {"model": model, "inputs": X}
    tensors = DENSE | {"ln.weight": np.ones(3), "ln.bias": np.zeros(3)}
    with pytest.raises(ValueError, match=r"'ln' has none, so it may be a LayerNorm.*names=\{'ln': 'layers_1'\}"):
        interop.from_torch_model(tensors, variables, **how)
    new, _ = interop.from_torch_model(tensors, variables, {"ln": "layers_1"}, **how)
    assert new["batch_stats"] == variables["batch_stats"]
    theirs = TorchModule(modules={"ln": LayerNorm()}, tensors=tensors)
    with pytest.raises(ValueError, match=r"'ln' is a LayerNorm, but 'layers_1' has running statistics"):
        interop.from_torch_model(theirs, variables, {"ln": "layers_1"}, **how)


def test_a_count_that_pytorch_lacks_is_0_and_the_report_says_so():
    model, variables = untracked(bnjax.cumulative_average)
    tensors = DENSE | {name: array for name, array in state_dict(bn=3).items() if "num_batches" not in name}
    new, report = interop.from_torch_model(tensors, variables, model=model, inputs=X)
    assert new["batch_stats"]["layers_1"]["count"].tolist() == [0, 0, 0]
    assert report.tensors[-1][2:5] == ("layers_1/count", (3,), "0: not counted there")


class KerasLayer:
    """A layer of Keras: its weights by name, its attributes, and the shape of its input."""

    def __init__(self, path, shape, weights=(), **attributes):
        self.name, self.shape = path, shape
        self.weights = [Weight(f"{path}/{name}", value) for name, value in dict(weights).items()]
        self.__dict__.update(attributes)

    def get_build_config(self):
        return {"input_shape": self.shape}

    def get_weights(self):
        return [weight.value for weight in self.weights]


class Flatten(KerasLayer):
    def compute_output_shape(self, shape):
        return (shape[0], int(np.prod(shape[1:])))


class Reshape(KerasLayer):
    def compute_output_shape(self, shape):
        return (shape[0], *self.target)


class Weight:
    def __init__(self, path, value):
        self.path, self.value = path, value

    def __array__(self, dtype=None, copy=None):
        return self.value


def keras_model(*layers):
    weights = [weight for layer in layers for weight in layer.weights]
    return SimpleNamespace(weights=weights, _flatten_layers=lambda: layers)


KERAS_NAMES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def keras_norm(path, shape, **attributes):
    return KerasLayer(path, shape, {k: CLASSIFIER[f"bn.{v}"] for k, v in KERAS_NAMES.items()}, **attributes)


def keras_classifier(flatten, more=()):
    """The model of CLASSIFIER with channels first. Its Flatten is of the format `flatten`."""
    first = {"data_format": "channels_first"}
    return keras_model(
        KerasLayer("conv", (None, 3, 4, 5), {"kernel": CLASSIFIER["features.0.weight"].transpose(2, 3, 1, 0)}, **first),
        Reshape("squeeze", (None, 4), target=(4, 1, 1)),
        Flatten("flatten", (None, 4, 2, 3), data_format=flatten),
        keras_norm("bn", (None, 24), axis=-1),
        KerasLayer("fc", (None, 24), {"kernel": CLASSIFIER["fc.weight"].T}, units=5),
        *more,
    )


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding="VALID", use_bias=False)(x)
        return nn.Dense(5, use_bias=False)(norm()(x.reshape(len(x), -1)))


@pytest.mark.parametrize("flatten", ["channels_last", "channels_first"])
def test_a_keras_model_with_channels_first_keeps_its_outputs(flatten):
    x = np.asarray(conv(IMAGE, CLASSIFIER["features.0.weight"]))
    x = x.reshape(2, -1) if flatten == "channels_last" else x.transpose(0, 2, 3, 1).reshape(2, -1)
    want = normalized(x, CLASSIFIER, "bn") @ CLASSIFIER["fc.weight"].T
    theirs, how = keras_classifier(flatten), {"model": Classifier(), "inputs": LAST}
    variables = Classifier().init(jax.random.key(0), LAST)
    new, _ = interop.from_keras_model(theirs, variables, **how)
    np.testing.assert_allclose(Classifier().apply(new, LAST), want, rtol=1e-4, atol=1e-4)
    back, _ = interop.to_keras_model(new, theirs, **how)
    for ours, weight in zip(back, theirs.weights, strict=True):
        np.testing.assert_array_equal(ours, weight.value)


@pytest.mark.parametrize(
    ("flatten", "more", "words"),
    [
        ("channels_last", KerasLayer("pool", (None, 4, 2, 3), data_format="channels_last"),
            r"\['conv'\] have data_format='channels_first', and \['pool', 'flatten'\] do not.*in every layer"),
        ("channels_first", Reshape("unflatten", (None, 24), target=(4, 2, 3)),
            r"\['conv', 'flatten'\].*and \['unflatten'\] do not.*as models of their own"),
    ],
)  # fmt: skip
def test_a_keras_model_of_two_formats_is_refused(flatten, more, words):
    with pytest.raises(ValueError, match=words):
        interop.from_keras_model(keras_classifier(flatten, [more]), {"params": {}})


def test_a_flatten_that_moves_channels_needs_layers_with_channels_first():
    flatten = Flatten("flatten", (None, 3, 4, 5), data_format="channels_first")
    with pytest.raises(ValueError, match=r"\['flatten'\] have data_format='channels_first'.*arrays by path"):
        interop.to_keras_model({"params": {}}, keras_model(flatten))


@pytest.mark.parametrize(
    ("shape", "axis", "own", "place"),
    [((24, 24, 24), 1, -1, -3), ((24, 24), -1, 1, -1), ((24, 24, 24), 3, 3, None), ((24, 24), [1], -2, None)],
)
def test_the_axes_of_a_keras_layer_and_of_ours_are_compared(shape, axis, own, place):
    model, x = norm(axis=own), np.ones((1, *shape), np.float32)
    variables = model.init(jax.random.key(0), x)
    theirs = keras_model(keras_norm("bn", (None, *shape), axis=axis))
    how = {"model": model, "inputs": x}
    if place is None:
        new, _ = interop.from_keras_model(theirs, variables, **how)
        np.testing.assert_array_equal(new["batch_stats"]["mean"], CLASSIFIER["bn.running_mean"])
        return
    words = rf"'bn' are on axis {axis} of {x.ndim}, which is axis {place} .*on axis {-1 if own == -1 else own - x.ndim}"
    with pytest.raises(ValueError, match=words):
        interop.from_keras_model(theirs, variables, **how)
    with pytest.raises(ValueError, match=words):
        interop.to_keras_model(variables, theirs, **how)
    by_path = [(weight.path, weight.value) for weight in theirs.weights]
    assert interop.from_keras_model(by_path, variables, **how)[0]["batch_stats"]["mean"].shape == (24,)


def renormalized(**options):
    arrays = {name: CLASSIFIER[f"bn.{theirs}"] for name, theirs in KERAS_NAMES.items()}
    arrays |= {name: np.zeros(24, np.float32) for name in ("moving_stddev", "renorm_mean", "renorm_stddev")}
    own = {"scale": True, "center": True, "epsilon": 0.25, "axis": -1, **options, **arrays}
    return KerasLayer("bn", (None, 24), arrays, **own)


def test_a_renormalized_keras_layer_starts_from_the_running_statistics():
    layer = renormalized()
    params, state = interop.from_keras(layer)
    for got, want in zip((*params, state.mean, state.var), layer.get_weights(), strict=False):
        np.testing.assert_array_equal(got, want)
    from_list = interop.from_keras(layer.get_weights())
    np.testing.assert_array_equal(from_list[1].var, state.var)
    std = np.sqrt(layer.moving_variance + 0.25)
    want = [*layer.get_weights()[:4], std, layer.moving_mean, std]
    variables = norm().init(jax.random.key(0), np.ones((1, 24), np.float32))
    theirs = keras_model(layer)
    new, report = interop.from_keras_model(theirs, variables)
    assert [row.done for row in report.tensors] == ["as it is"] * 4 + ["only for renormalization"] * 3
    for back in (interop.to_keras(params, state, layer), interop.to_keras_model(new, theirs)[0]):
        for got, value in zip(back, want, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-6)
    with pytest.raises(ValueError, match=r"depends on the epsilon of its layer. Pass the Keras model itself"):
        interop.to_keras_model(new, [(weight.path, weight.value) for weight in theirs.weights])


def test_a_keras_layer_tells_its_scale_and_center():
    weights = {"beta": np.ones(2), "moving_mean": np.full(2, 2.0), "moving_variance": np.full(2, 3.0)}
    layer = KerasLayer("bn", (None, 2), weights, scale=False, center=True, gamma=None, **weights)
    params, state = interop.from_keras(layer, count=4)
    assert (params.scale, params.bias.tolist(), state.mean.tolist()) == (None, [1.0, 1.0], [2.0, 2.0])
    assert state.count.tolist() == [4, 4]
    assert [weight.tolist() for weight in interop.to_keras(params, state, layer)] == [[1, 1], [2, 2], [3, 3]]
    with pytest.raises(ValueError, match=r"scale=True, center=False\): the layer has scale=False, center=True"):
        interop.from_keras(layer, center=False)
    with pytest.raises(ValueError, match=r"scale=False, center=True, but scale and bias are present and None"):
        interop.to_keras(bnjax.BNParams(np.ones(2), None), state, layer)
    with pytest.raises(ValueError, match=r"features \(2,\), the state \(3,\)"):
        interop.to_keras(*bnjax.bn_init(3, scale=None), layer)


def test_from_keras_says_what_a_layer_must_be():
    unbuilt = KerasLayer("bn", None, moving_variance=None)
    with pytest.raises(ValueError, match=r"'bn' has no weights yet. Call it once, or layer.build\(shape\)"):
        interop.from_keras(unbuilt)
    with pytest.raises(ValueError, match=r"expected a BatchNormalization.*got SimpleNamespace.*from_keras_model"):
        interop.from_keras(keras_model())
