"""Whole models of PyTorch, and the Flax models that their weights are moved to, and back."""

import itertools
from functools import partial

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn.utils import prune

import bnjax.linen
import bnjax.nnx
from bnjax import interop
from tests.oracles.torch_arrays import array, tensor

torch.set_num_threads(1)

NORM = {"momentum": 0.9, "epsilon": 1e-5, "unbiased_var": True}


# PyTorch's models, as torchvision writes them: the shortcut is defined last and called in the middle.
class Block(nn.Module):
    def __init__(self, into, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or into != out:
            self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet18(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        for i, (into, out) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)]):
            setattr(self, f"layer{i + 1}", nn.Sequential(Block(into, out, 1 if i == 0 else 2), Block(out, out, 1)))
        self.fc = nn.Linear(512, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class LinenResNet18(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        conv = partial(linen.Conv, use_bias=False)
        norm = partial(bnjax.linen.BatchNorm, use_running_average=not train, **NORM)
        x = linen.relu(norm()(conv(64, (7, 7), 2, padding=3)(x)))
        x = linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, features in enumerate((64, 128, 256, 512)):
            for stride in (1 if i == 0 else 2, 1):
                y = linen.relu(norm()(conv(features, (3, 3), stride, padding=1)(x)))
                y = norm()(conv(features, (3, 3), padding=1)(y))
                if x.shape != y.shape:
                    x = norm(name=f"shortcut_norm{i}")(conv(features, (1, 1), stride, name=f"shortcut{i}")(x))
                x = linen.relu(x + y)
        return linen.Dense(10)(x.mean((1, 2)))


class NNXBlock(nnx.Module):
    def __init__(self, into, out, stride, rngs):
        self.bn1, self.bn2 = (bnjax.nnx.BatchNorm(out, rngs=rngs, **NORM) for _ in range(2))
        self.conv1 = nnx.Conv(into, out, (3, 3), stride, padding=1, use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(out, out, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.shortcut = nnx.data(None)
        if stride > 1 or into != out:
            conv = nnx.Conv(into, out, (1, 1), stride, use_bias=False, rngs=rngs)
            self.shortcut = nnx.Sequential(conv, bnjax.nnx.BatchNorm(out, rngs=rngs, **NORM))

    def __call__(self, x):
        y = self.bn2(self.conv2(jax.nn.relu(self.bn1(self.conv1(x)))))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class NNXResNet18(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 64, (7, 7), 2, padding=3, use_bias=False, rngs=rngs)
        self.bn = bnjax.nnx.BatchNorm(64, rngs=rngs, **NORM)
        sizes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        sizes += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
        self.blocks = nnx.List([NNXBlock(*size, rngs) for size in sizes])
        self.classifier = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x):
        x = linen.max_pool(jax.nn.relu(self.bn(self.conv(x))), (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean((1, 2)))


MOBILE = [(8, 16, 1), (16, 32, 2), (32, 32, 1)]


def mobile_net():
    """Depthwise and pointwise convolutions, all alike in a row, and a flatten before two dense layers."""
    parts = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    for into, out, stride in MOBILE:
        parts += [nn.Conv2d(into, into, 3, stride, 1, groups=into, bias=False), nn.BatchNorm2d(into), nn.ReLU6()]
        parts += [nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU6()]
    parts += [nn.Conv2d(32, 64, 3, 1, 1, groups=32), nn.Conv2d(64, 64, 1, groups=4), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*parts, nn.BatchNorm1d(64 * 4), nn.Linear(64 * 4, 24), nn.ReLU(), nn.Linear(24, 24))


class LinenMobileNet(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        conv = partial(linen.Conv, use_bias=False)
        norm = partial(bnjax.linen.BatchNorm, use_running_average=not train, **NORM)
        x = linen.relu6(norm()(conv(8, (3, 3), 2, padding=1)(x)))
        for into, out, stride in MOBILE:
            x = linen.relu6(norm()(conv(into, (3, 3), stride, padding=1, feature_group_count=into)(x)))
            x = linen.relu6(norm()(conv(out, (1, 1))(x)))
        x = linen.Conv(64, (3, 3), padding=1, feature_group_count=32)(x)
        x = linen.Conv(64, (1, 1), feature_group_count=4)(x)
        x = norm()(linen.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))
        return linen.Dense(24)(linen.relu(linen.Dense(24)(x)))


def network():
    sizes = list(itertools.pairwise((784, 256, 128, 10)))
    parts = [[nn.Linear(*size), nn.BatchNorm1d(size[1]), nn.ReLU()] for size in sizes]
    return nn.Sequential(*itertools.chain(*parts)).__getitem__(slice(-2))


class LinenNetwork(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        for features in (256, 128):
            x = bnjax.linen.BatchNorm(use_running_average=not train, **NORM)(linen.Dense(features)(x))
            x = linen.relu(x)
        return linen.Dense(10)(x)


def nnx_network(rngs):
    layers = []
    for into, out in ((784, 256), (256, 128)):
        layers += [nnx.Linear(into, out, rngs=rngs), bnjax.nnx.BatchNorm(out, rngs=rngs, **NORM), nnx.relu]
    return nnx.Sequential(*layers, nnx.Linear(128, 10, rngs=rngs))


class Generator(nn.Module):
    """A dense layer whose features become an image, and transposed convolutions, between convolution and dense."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
        self.code, self.norm = nn.Linear(6 * 8 * 8, 8), nn.LayerNorm(8)
        self.back, self.bn = nn.Linear(8, 5 * 4 * 3), nn.BatchNorm1d(5 * 4 * 3)
        self.up1, self.up2 = nn.ConvTranspose2d(5, 5, 3, 2, 1), nn.ConvTranspose2d(5, 4, (2, 3))

    def forward(self, x):
        x = self.bn(self.back(self.norm(self.code(self.down(x))))).relu()
        return self.up2(self.up1(x.view(len(x), 5, 4, 3)))


class LinenGenerator(linen.Module):
    swapped: bool

    @linen.compact
    def __call__(self, x, train):
        norm = partial(bnjax.linen.BatchNorm, use_running_average=not train, **NORM)
        x = linen.relu(norm()(linen.Conv(6, (3, 3), 2, padding=1)(x))).reshape(len(x), -1)
        x = linen.LayerNorm(epsilon=1e-5)(linen.Dense(8)(x))
        x = linen.relu(norm()(linen.Dense(60)(x))).reshape(-1, 4, 3, 5)
        up = partial(linen.ConvTranspose, transpose_kernel=self.swapped)
        return up(4, (2, 3), padding=((1, 1), (2, 2)))(up(5, (3, 3), (2, 2), padding=1)(x))


class Text(nn.Module):
    """An embedding and a last layer of the same shape, and three layers between that only order distinguishes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        self.convolution, self.bn = nn.Conv1d(6, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 11, bias=False)

    def forward(self, x):
        x = self.embedding(x)
        x = torch.softmax(self.query(x) @ self.key(x).mT, -1) @ self.value(x)
        return self.last(self.bn(self.convolution(x.mT)).mT)


class LinenText(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Embed(11, 6, name="z")(x)
        query, key = linen.Dense(6, name="y")(x), linen.Dense(6, name="x")(x)
        x = linen.softmax(query @ jnp.swapaxes(key, 1, 2)) @ linen.Dense(6, name="w")(x)
        x = bnjax.linen.BatchNorm(use_running_average=not train, **NORM)(linen.Conv(6, (3,), padding=1)(x))
        return linen.Dense(11, use_bias=False, name="a")(x)


IMAGES, TOKENS = (4, 3, 32, 32), np.random.default_rng(1).integers(0, 11, (4, 7))
# Both models, the shape of a batch, and what rounding grows by: in the ResNet sums have up to 4608 numbers, whose
# roundings walk at random.
MODELS = {
    "resnet18": (ResNet18, LinenResNet18, IMAGES, 4608**0.5),
    "resnet18 nnx": (ResNet18, NNXResNet18, IMAGES, 4608**0.5),
    "mobilenet": (mobile_net, LinenMobileNet, (4, 3, 16, 16), 1),
    "784-256-128-10": (network, LinenNetwork, (32, 784), 1),
    "784-256-128-10 nnx": (network, nnx_network, (32, 784), 1),
    "generator": (Generator, partial(LinenGenerator, False), (4, 3, 16, 16), 1),
    "generator swapped": (Generator, partial(LinenGenerator, True), (4, 3, 16, 16), 1),
    "text": (Text, LinenText, None, 1),
}


class Flax:
    """A Linen or NNX model behind one call."""

    def __init__(self, make, x):
        self.nnx = make in (NNXResNet18, nnx_network)
        self.model = make(nnx.Rngs(0)) if self.nnx else make()
        if self.nnx:
            self.apply, self.variables = bnjax.nnx.functional(self.model)
        else:
            self.apply, self.variables = self.model.apply, jax.jit(self.model.init, static_argnums=2)(
                jax.random.key(0), x, False
            )  # fmt: skip
        self.how = {"model": self.model, "inputs": x} | ({} if self.nnx else {"train": False})

    def evaluate(self, variables, x):
        return jax.jit(partial(self.apply, **({} if self.nnx else {"train": False})))(variables, x)

    def gradient_step(self, variables, x):
        """Output, statistics and parameters after a step of gradient descent on the sum of the squares."""
        options = {"mutable": ["batch_stats"]} | ({} if self.nnx else {"train": True})

        @jax.jit
        def step(variables):
            def loss(params):
                y, updates = self.apply({**variables, "params": params}, x, **options)
                return jnp.sum(y**2) / y.size, (y, updates)

            gradients, (y, updates) = jax.grad(loss, has_aux=True)(variables["params"])
            params = jax.tree.map(lambda p, g: p - RATE * g, variables["params"], gradients)
            return y, {**variables, "params": params, **updates}

        return step(variables)


RATE = 0.125


def last(array):
    """Channels last."""
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_computes_as_in_pytorch_and_back(agree, name):
    make, flax, shape, growth = MODELS[name]
    torch.manual_seed(0)
    model, other = make(), make()
    rng = np.random.default_rng(0)
    images = [TOKENS] * 3 if shape is None else rng.normal(size=(3, *shape)).astype("float32")
    with torch.no_grad():  # no statistics, scales and biases that are round numbers
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0
    model(tensor(images[0]))
    ours = Flax(flax, last(images[0]))
    variables, report = interop.from_torch_model(model.state_dict(), ours.variables, **ours.how)
    assert [row.theirs for row in report.tensors] == list(model.state_dict())
    assert jax.tree.structure(variables) == jax.tree.structure({**ours.variables})
    agree = partial(agree, growth=growth)
    theirs = array(model.eval()(tensor(images[1])))
    agree("output", ours.evaluate(variables, last(images[1])), last(theirs))

    y = model.train()(tensor(images[2]))
    model.zero_grad()
    (y**2).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= RATE * parameter.grad
    our, variables = ours.gradient_step(variables, last(images[2]))
    agree("output", our, last(array(y)))
    named, report = interop.to_torch_model(variables, state_dict=other, **ours.how)
    assert [row.theirs for row in report.tensors] == list(named) == list(model.state_dict())
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            agree("running var" if "running" in key else "parameter", named[key], array(value))
    other.load_state_dict({key: torch.from_numpy(value) for key, value in named.items()})
    theirs = array(other.eval()(tensor(images[1])))
    agree("output", ours.evaluate(variables, last(images[1])), last(theirs))
    back, _ = interop.from_torch_model(other, ours.variables, **ours.how)
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(variables), strict=True):
        agree("round trip", new, old, growth=0)


def test_the_network_moves_without_the_flax_model(agree):
    model = network().eval()
    ours = Flax(LinenNetwork, np.zeros((1, 784), np.float32))
    variables, report = interop.from_torch_model(model, ours.variables)
    x = np.random.default_rng(0).normal(size=(8, 784)).astype("float32")
    agree("output", ours.evaluate(variables, x), array(model(tensor(x))), growth=784**0.5)
    assert {row.by for row in report.tensors} == {"shape"}


class LinenSmall(linen.Module):
    affine: bool = True

    @linen.compact
    def __call__(self, x, train):
        options = {"use_running_average": not train, "use_scale": self.affine, "use_bias": self.affine, **NORM}
        return linen.Dense(2)(linen.relu(bnjax.linen.BatchNorm(**options)(linen.Dense(5)(x))))


def small(linear=lambda layer: layer, **options):
    torch.manual_seed(0)
    model = nn.Sequential(linear(nn.Linear(6, 5)), nn.BatchNorm1d(5, **options), nn.ReLU(), nn.Linear(5, 2))
    if options.get("affine", True):
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
    return model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("names", [None, {"1": "BatchNorm_0"}])
def test_a_model_that_tracks_no_statistics_computes_as_in_pytorch(agree, affine, names):
    model, ours = small(affine=affine, track_running_stats=False), LinenSmall(affine)
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    variables, how = ours.init(jax.random.key(0), x, True), {"model": ours, "inputs": x, "train": True}
    new, report = interop.from_torch_model(model, variables, names, **how)
    agree("output", ours.apply(new, x, True, mutable=["batch_stats"])[0], array(model(tensor(x))))
    assert jax.tree.leaves(new["batch_stats"]) == jax.tree.leaves(variables["batch_stats"])
    assert [row.ours for row in report.tensors[-2:]] == ["BatchNorm_0/mean", "BatchNorm_0/var"]
    back, _ = interop.to_torch_model(new, names, state_dict=model, **how)
    assert list(back) == list(model.state_dict())


COMPUTED = {
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", 7), lambda layer: prune.remove(layer, "weight")),
}
COMPUTED |= {
    f"parametrizations.{name}": (
        getattr(nn.utils.parametrizations, name),
        lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "weight"),
    )
    for name in ("weight_norm", "spectral_norm", "orthogonal")
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_are_refused_and_the_remedy_keeps_the_outputs(agree, name):
    apply, remove = COMPUTED[name]
    model = small(apply)
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    model(tensor(x))
    ours = LinenSmall()
    variables, how = ours.init(jax.random.key(0), x, False), {"model": ours, "inputs": x, "train": False}
    parts = [key for key in model.state_dict() if key.startswith(("0.weight", "0.parametrizations"))]
    with pytest.raises(ValueError, match=rf"from_torch_model: .*{parts}.*model.eval\(\)".replace("[", r"\[")):
        interop.from_torch_model(model, variables, **how)
    theirs = array(model.eval()(tensor(x)))
    remove(model[0])
    new, _ = interop.from_torch_model(model, variables, **how)
    agree("output", ours.apply(new, x, False), theirs)


def test_a_compiled_batch_normalization_is_not_an_empty_one():
    layer = nn.BatchNorm2d(4)
    compiled = torch.compile(layer)
    with pytest.raises(ValueError, match=r"Layers with running_mean: \['_orig_mod'\]"):
        interop.from_torch(compiled)
    params, state = interop.from_torch(compiled, "_orig_mod")
    np.testing.assert_array_equal(params.scale, array(layer.weight))
    np.testing.assert_array_equal(state.var, array(layer.running_var))
