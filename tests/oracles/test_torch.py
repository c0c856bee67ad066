"""bnjax against PyTorch on the CPU.

Not compared: training on one value per feature, which PyTorch refuses.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen
from torch import nn

import bnjax
import bnjax.linen
from bnjax import interop
from tests.oracles.layers import BIAS, FEATURES, FIRST, LAST, SCALE, STEPS, Seen, batch, compare, ours
from tests.oracles.torch_arrays import array, tensor

torch.set_num_threads(1)  # its threads spin while they wait, and there are other workers

LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class TorchLayer:
    """With `last`, x has its channels last and PyTorch sees a view of it, in the memory format of that name."""

    def __init__(self, module, last=False):
        self.module, self.last = module, last

    def __call__(self, x, cotangent, train):
        self.module.train(train).zero_grad()
        x, cotangent = leaf, cotangent = tensor(x).requires_grad_(), tensor(cotangent)
        if self.last:
            x, cotangent = x.movedim(-1, 1), cotangent.movedim(-1, 1)
        y = self.module(x)
        y.backward(cotangent)
        module = self.module
        gradients = leaf.grad, *(None if p is None else p.grad for p in (module.weight, module.bias))
        y = y.movedim(1, -1) if self.last else y
        return Seen(*map(array, (y, *gradients, module.running_mean, module.running_var)))


def layer(make=nn.BatchNorm1d, dtype=torch.float32, **options):
    module = make(FEATURES, dtype=dtype, **options)
    if module.affine:
        module.load_state_dict({"weight": torch.tensor(SCALE), "bias": torch.tensor(BIAS)}, strict=False)
    return module


def converted(module, **options):
    named = module.state_dict()
    variables = interop.from_torch(named) if named else (bnjax.BNParams(None, None), None)
    return ours(*variables, **{**interop.TORCH, **options})


@pytest.mark.parametrize("shape", FIRST, ids=str)
def test_bn_apply_matches_pytorch_in_every_layout(agree, dtype, shape):
    module = layer(LAYERS[len(shape)], getattr(torch, dtype))
    compare(agree, converted(module), TorchLayer(module), shape, dtype)


@pytest.mark.parametrize("shape", LAST[2:], ids=str)
def test_bn_apply_matches_pytorch_with_channels_last_in_memory(agree, shape):
    module = layer(LAYERS[len(shape)])
    compare(agree, converted(module, axis=-1), TorchLayer(module, last=True), shape)


OPTIONS = {
    "no_affine_momentum_0": ({"affine": False, "momentum": 0.0}, {"momentum": 1.0}),
    "no_statistics_epsilon_1": ({"track_running_stats": False, "eps": 1.0}, {"epsilon": 1.0}),
    "neither": ({"affine": False, "track_running_stats": False}, {}),
    "cumulative": ({"momentum": None}, {"momentum": bnjax.cumulative_average}),
    "momentum_0.01_epsilon_1e-3": ({"momentum": 0.01, "eps": 1e-3}, {"momentum": 0.99, "epsilon": 1e-3}),
    "momentum_1": ({"momentum": 1.0}, {"momentum": 0.0}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bn_apply_matches_pytorch_with_options(agree, x64, name):
    theirs, options = OPTIONS[name]
    module = layer(nn.BatchNorm2d, torch.float64, **theirs)
    compare(agree, converted(module, **options), TorchLayer(module), FIRST[2], x64)


def test_bn_apply_matches_pytorch_with_sync_batch_norm(agree):
    module = nn.SyncBatchNorm.convert_sync_batchnorm(layer(nn.BatchNorm2d))
    assert isinstance(module, nn.SyncBatchNorm)
    compare(agree, converted(module), TorchLayer(module), FIRST[2])


@pytest.mark.parametrize("shape", FIRST[::2], ids=str)
def test_bn_apply_matches_pytorch_with_bfloat16_input(agree, shape):
    module = layer(LAYERS[len(shape)])
    compare(agree, converted(module), TorchLayer(module), shape, "bfloat16")


def test_bn_apply_matches_pytorch_with_everything_in_bfloat16(agree):
    module = layer(nn.BatchNorm2d, torch.bfloat16)
    # PyTorch rounds its statistics after each step and what it normalizes by, where ours stay in float32.
    compare(agree, converted(module), TorchLayer(module), FIRST[2], "bfloat16", growth=STEPS + 1)


def trained(module):
    """The layer after some steps, so that none of its statistics is a round number."""
    dtype = str(module.running_mean.dtype).removeprefix("torch.")
    theirs = TorchLayer(module)
    for step in range(STEPS):
        theirs(*batch(step, FIRST[2], dtype), True)
    return module


@pytest.mark.parametrize("make", [nn.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("affine", [True, False])
def test_torch_round_trip_is_exact(agree, dtype, make, affine):
    module = trained(layer(make, getattr(torch, dtype), affine=affine))
    params, state = interop.from_torch(module.state_dict())
    assert state.count.tolist() == [STEPS] * FEATURES
    fresh = make(FEATURES, affine=affine, dtype=getattr(torch, dtype))
    fresh.load_state_dict({name: torch.from_numpy(v) for name, v in interop.to_torch(params, state).items()})
    assert fresh.num_batches_tracked == STEPS
    for name, value in module.named_parameters():
        agree("round trip", array(fresh.get_parameter(name)), array(value), growth=0)
    for name in ("running_mean", "running_var"):
        agree("round trip", array(fresh.get_buffer(name)), array(module.get_buffer(name)), growth=0)
    for our, name in zip((*params, *state[:2]), ("weight", "bias", "running_mean", "running_var"), strict=True):
        if our is not None:
            agree("round trip", our, array(getattr(module, name)), growth=0)


def test_from_torch_takes_a_state_dict_in_bfloat16(agree):
    module = trained(layer(nn.BatchNorm2d, torch.bfloat16))
    params, state = interop.from_torch(module.state_dict())
    for our, name in zip(params, ("weight", "bias"), strict=True):
        agree("round trip", our, array(getattr(module, name)), growth=0)
    for our, name in zip(state[:2], ("running_mean", "running_var"), strict=True):
        agree("round trip", our, array(getattr(module, name).float()), growth=0)


def test_a_layer_without_bias_goes_back_without_bias(agree, dtype):
    module = trained(layer(nn.BatchNorm2d, getattr(torch, dtype)))
    module.register_parameter("bias", None)  # bias=False, which older releases do not have
    params, state = interop.from_torch(module)
    back = interop.to_torch(params, state)
    assert list(back) == list(module.state_dict())
    assert back.pop("num_batches_tracked") == STEPS
    for name, value in back.items():
        agree("round trip", value, array(module.state_dict()[name]), growth=0)


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.InstanceNorm1d, partial(nn.Linear, 3), partial(nn.GroupNorm, 1)])
def test_from_torch_takes_no_module_of_another_kind(make):
    with pytest.raises(ValueError, match=r"expected a BatchNorm, got|Layers with running_mean"):
        interop.from_torch(make(3))


@pytest.mark.parametrize("make", [nn.LazyBatchNorm2d, partial(nn.BatchNorm2d, 3, device="meta")])
def test_from_torch_takes_no_module_without_values(make):
    with pytest.raises(ValueError, match=r"from_torch\(prefix=''\): 'weight' has no values yet"):
        interop.from_torch(make())


class Network(nn.Sequential):
    """784-256-128-10, a BatchNorm1d after each hidden Linear and before its ReLU."""

    SIZES = (784, 256, 128, 10)

    def __init__(self, dtype):
        torch.manual_seed(0)
        parts = []
        for fan_in, fan_out in itertools.pairwise(self.SIZES):
            parts += [nn.Linear(fan_in, fan_out), nn.BatchNorm1d(fan_out), nn.ReLU()]
        super().__init__(*parts[:-2])
        self.to(dtype)


def of_network(named):
    """Parameters and states of what bears these names in a network of PyTorch."""
    dense = [(jnp.asarray(array(named[f"{i}.weight"])).T, jnp.asarray(array(named[f"{i}.bias"]))) for i in (0, 3, 6)]
    layers = [interop.from_torch(named, name) for name in ("1", "4")]
    return (dense, [params for params, _ in layers]), [state for _, state in layers]


@partial(jax.jit, static_argnames="train")
def logits(params, states, x, train):
    dense, layers = params
    new = []
    for (kernel, bias), layer, state in zip(dense, layers, states, strict=False):
        x, after = bnjax.bn_apply(layer, state, x @ kernel + bias[None], train, **interop.TORCH)
        x = jax.nn.relu(x)
        new.append(after)
    kernel, bias = dense[-1]
    return x @ kernel + bias[None], new


RATE = 0.125


@jax.jit
def update(params, states, x, labels):
    def loss(params):
        y, new = logits(params, states, x, True)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(y), labels, 1)), new

    (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - RATE * g, params, gradients), new, value


def test_a_network_trains_as_in_pytorch(agree, dtype):
    network = Network(getattr(torch, dtype))
    params, states = of_network(network.state_dict())
    rng = np.random.default_rng(0)
    inputs, labels = rng.random((6, 32, 784)).astype(dtype), rng.integers(0, 10, (6, 32, 1))
    # The roundings of a sum of 784 numbers one after another walk at random.
    agree = partial(agree, growth=784**0.5)
    for x, label in zip(inputs[:-1], labels, strict=False):
        loss = nn.functional.cross_entropy(network(tensor(x)), tensor(label[:, 0]))
        network.zero_grad()
        loss.backward()
        with torch.no_grad():  # by hand: torch.optim takes seconds to import
            for parameter in network.parameters():
                parameter -= RATE * parameter.grad
        params, states, value = update(params, states, x, label)
        agree("loss", value, array(loss))
    theirs = of_network(network.state_dict())
    for our, their in zip(jax.tree.leaves(params), jax.tree.leaves(theirs[0]), strict=True):
        agree("parameter", our, their)
    for our, their in zip(states, theirs[1], strict=True):
        agree("running mean", our.mean, their.mean)
        agree("running var", our.var, their.var)
        assert our.count.tolist() == their.count.tolist()
    y = array(network.eval()(tensor(inputs[-1])))
    agree("output", logits(params, states, inputs[-1], False)[0], y)
    # And PyTorch continues with what was trained here.
    for name, layer, state in zip(("1", "4"), params[1], states, strict=True):
        found = {key: torch.from_numpy(v) for key, v in interop.to_torch(layer, state, name).items()}
        assert not network.load_state_dict(found, strict=False).unexpected_keys
    agree("output", array(network(tensor(inputs[-1]))), y)


class LinenNetwork(linen.Module):
    """That of `Network`, in evaluation."""

    @linen.compact
    def __call__(self, x):
        for features in Network.SIZES[1:-1]:
            layer = bnjax.linen.BatchNorm(use_running_average=True, epsilon=interop.TORCH["epsilon"])
            x = linen.relu(layer(linen.Dense(features)(x)))
        return linen.Dense(Network.SIZES[-1])(x)


def test_a_linen_model_goes_on_from_one_of_pytorch_and_back(agree):
    network = Network(torch.float32)
    inputs = np.random.default_rng(0).random((4, 32, 784)).astype(np.float32)
    for x in inputs[:-1]:
        network(tensor(x))
    named, names = network.state_dict(), {"1": "BatchNorm_0", "4": "BatchNorm_1"}
    variables = jax.jit(LinenNetwork().init)(jax.random.key(0), inputs[0])
    variables, report = interop.from_torch_model(named, variables, names)
    assert not [row for row in report.tensors if row.done == "stays: not named"]
    (dense, _), _ = of_network(named)
    params = {f"Dense_{i}": {"kernel": kernel, "bias": bias} for i, (kernel, bias) in enumerate(dense)}
    variables["params"] = {**variables["params"], **params}
    theirs = array(network.eval()(tensor(inputs[-1])))
    agree("output", jax.jit(LinenNetwork().apply)(variables, inputs[-1]), theirs, growth=784**0.5)
    fresh = Network(torch.float32)
    back = {key: torch.from_numpy(v) for key, v in interop.to_torch_model(variables, names).items()}
    assert not fresh.load_state_dict(back, strict=False).unexpected_keys
    for key in back:
        if not key.endswith("num_batches_tracked"):  # Linen does not count
            agree("round trip", array(fresh.state_dict()[key]), array(named[key]), growth=0)
