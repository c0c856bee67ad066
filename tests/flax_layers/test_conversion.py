"""`convert` on models that somebody else wrote, against the same models written with bnjax's layers."""

import pickle
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from tests.support import reference
from tests.support.folding import called
from tests.support.resnet import LinenResNet, NNXResNet

KEY = jax.random.key(0)
FLAX = partial(nn.BatchNorm, use_running_average=False, axis_name="batch")
EXACT = 16 * 1.2e-7 * 1e4  # of values near 1e4: their rounding, in standard deviations


class Encoder(nn.Module):
    norm: Any

    def setup(self):
        self.bn = self.norm()
        self.layers = [nn.Dense(3), self.norm(momentum=0.5)]

    def __call__(self, x):
        return self.layers[1](self.layers[0](self.bn(x)))


@nn.jit
class Compiled(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x):
        return self.norm(name="norm")(x)


class Holder(nn.Module):
    held: Any

    @nn.compact
    def __call__(self, x):
        return self.held(x)


class Network(nn.Module):
    """Layers made in setup, in a list, in a compact method, under jit, remat, scan and vmap."""

    norm: Any = FLAX

    @nn.compact
    def __call__(self, x):
        x = Compiled(self.norm)(Encoder(self.norm, name="encoder")(x) + x)
        x = nn.remat(Encoder)(self.norm)(x)
        scanned = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = scanned(self.norm(name="scanned"), x, None)
        mapped = nn.vmap(Compiled, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
        return mapped(self.norm, name="mapped")(x.reshape(2, -1, x.shape[-1]))


@pytest.fixture
def far(rng):
    return (1e4 + rng.standard_normal((64, 3))).astype(np.float32)


def run(model, x):
    """In one program: the output and the variables of initialization, and what the model gives then."""

    @jax.jit
    def both(x):
        y, variables = model.init_with_output(KEY, x)
        return y, variables, model.apply(variables, x, mutable=["batch_stats"])

    return both(x)


@partial(jax.jit, static_argnums=0)
def initialized(model, x):
    return model.init(KEY, x, True)


def assert_equal(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


CHANGES = [
    {},
    {"momentum": 0.7, "epsilon": 1e-2, "unbiased_var": True},
    {"momentum": bnjax.cumulative_average},
    {"frozen": True},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "none")
def test_a_converted_linen_model_is_the_model_written_with_our_layers(far, changes):
    model = bnjax.linen.convert(Network(), axis_name=None, **changes)
    written = partial(bnjax.linen.BatchNorm, use_running_average=False, **changes)
    expected = Network(lambda **options: written(**options | changes))  # a change goes before what the author wrote
    assert_equal(run(model, far), run(expected, far))


@pytest.mark.parametrize(
    ("to", "options"), [("GhostBatchNorm", {"ghost_size": 8}), ("RenormBatchNorm", {"r_max": 2.0, "d_max": 1.0})]
)
def test_a_linen_model_converts_to_a_variant(far, to, options):
    kind = getattr(bnjax.linen, to)
    expected = Network(partial(kind, use_running_average=False, **options))
    assert_equal(run(bnjax.linen.convert(Network(), to=kind, axis_name=None, **options), far), run(expected, far))
    ours = Network(partial(bnjax.linen.BatchNorm, use_running_average=False))  # layers of bnjax become it as well
    assert_equal(run(bnjax.linen.convert(ours, to=kind, **options), far), run(expected, far))


@pytest.mark.optimized
def test_a_linen_model_and_its_conversion_are_compiled_apart(far):
    # Whichever comes first: jit knows a function by its object and its arguments, not by what surrounds the call.
    norm = partial(nn.BatchNorm, use_running_average=False)
    exact = reference.train(far.astype(np.float64), 1, 0, 0, 1)[0]

    @partial(jax.jit, static_argnums=0)
    def step(model, variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])[0]

    for model in (Compiled(norm), nn.remat(Compiled)(norm), Holder(Compiled(norm))):
        converted = bnjax.linen.convert(model)
        variables = jax.jit(model.init)(KEY, far)
        for order in ([model, converted], [converted, model]):
            jax.clear_caches()
            errors = {order[i] is converted: np.abs(step(order[i], variables, far) - exact).max() for i in (0, 1, 0, 1)}
            assert errors[True] < EXACT
            assert errors[False] > 1


@pytest.mark.optimized
def test_submodules_of_a_bound_conversion_are_converted(far):
    model = Encoder(partial(nn.BatchNorm, use_running_average=False))
    variables = model.init(KEY, far)
    bound = bnjax.linen.convert(model).bind(variables, mutable=["batch_stats"])
    exact = reference.train(far.astype(np.float64), 1, 0, 0, 1)[0]
    np.testing.assert_allclose(bound.bn(far), exact, atol=EXACT)
    np.testing.assert_allclose(bound.layers[1](far), exact, atol=EXACT)
    assert np.abs(model.bind(variables, mutable=["batch_stats"]).bn(far) - exact).max() > 1  # the original's stay
    held = bnjax.linen.convert(nn.Sequential([nn.BatchNorm(use_running_average=False)]))
    bound = held.bind(held.init(KEY, far), mutable=["batch_stats"])
    np.testing.assert_allclose(bound.layers[0](far), exact, atol=EXACT)


@pytest.mark.optimized
def test_a_conversion_in_a_model_leaves_the_rest_of_it_alone(far):
    norm = partial(nn.BatchNorm, use_running_average=False)

    class Both(nn.Module):
        given: Any

        @nn.compact
        def __call__(self, x):
            made = bnjax.linen.convert(nn.Sequential([norm()]))
            return [layer(x) for layer in (made, norm(), self.given)]

    (made, flax, given), variables = Both(bnjax.linen.convert(nn.Sequential([norm()]))).init_with_output(KEY, far)
    exact = reference.train(far.astype(np.float64), 1, 0, 0, 1)[0]
    np.testing.assert_allclose(made, exact, atol=EXACT)
    np.testing.assert_allclose(given, exact, atol=EXACT)
    assert np.abs(flax - exact).max() > 1
    assert sorted(variables["params"]) == ["BatchNorm_0", "BatchNorm_1", "given"]


def test_the_innermost_conversion_counts(far):
    inner = bnjax.linen.convert(nn.Sequential([nn.BatchNorm(use_running_average=False)]), momentum=0.5)
    outer = bnjax.linen.convert(nn.Sequential([inner, nn.BatchNorm(use_running_average=False)]), momentum=0.25)
    _, _, (_, updates) = run(outer, far)
    stats = updates["batch_stats"]
    np.testing.assert_allclose(stats["layers_0"]["layers_0"]["mean"], 0.5 * far.mean(0, np.float64), rtol=1e-6)
    np.testing.assert_allclose(stats["layers_1"]["var"], 0.25 + 0.75, rtol=1e-4)
    again = bnjax.linen.convert(inner, momentum=0.75)  # of the same model, the last
    np.testing.assert_allclose(run(again, far)[2][1]["batch_stats"]["layers_0"]["mean"], 0.25 * far.mean(0), rtol=1e-6)


def test_where_chooses_layers_by_path(far):
    model = LinenResNet()
    x = far.reshape(4, 4, 4, 3)
    variables = initialized(model, x)

    @partial(jax.jit, static_argnums=0)
    def stats_of(model, variables):
        return model.apply(variables, x, True, mutable=["batch_stats"])[1]["batch_stats"]

    def means(model):
        stats = stats_of(model, variables)
        return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(stats) if "mean" in str(k)}

    flax, ours = means(model), means(bnjax.linen.convert(model, momentum=0.0, where=lambda path: "Block_1" in path))
    moved = [name for name in flax if (flax[name] != ours[name]).any()]
    assert moved == [name for name in flax if "Block_1" in name]
    assert moved


def test_equal_conversions_are_equal_and_others_are_not(far):
    model = LinenResNet()
    ours = bnjax.linen.convert(model, momentum=0.9)
    assert ours == bnjax.linen.convert(model, momentum=0.9)
    assert hash(ours) == hash(bnjax.linen.convert(model, momentum=0.9))
    assert ours != model
    assert ours != bnjax.linen.convert(model, momentum=0.8)
    assert ours == ours.clone() == pickle.loads(pickle.dumps(ours)) == bnjax.linen.convert(ours, momentum=0.9)
    x = far.reshape(4, 4, 4, 3)
    assert repr(ours) == repr(model)
    assert ours.tabulate(KEY, x, True) == model.tabulate(KEY, x, True)
    assert_equal(initialized(ours, x), initialized(model, x))


@pytest.mark.optimized
def test_a_linen_layer_itself_is_converted(far):
    layer = bnjax.linen.convert(nn.BatchNorm(use_running_average=False), momentum=0.0)
    np.testing.assert_allclose(run(layer, far)[0], reference.train(far.astype(np.float64), 1, 0, 0, 1)[0], atol=EXACT)
    np.testing.assert_allclose(run(layer, far)[2][1]["batch_stats"]["var"], far.astype(np.float64).var(0), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ghost_size": 4}, r"convert\(ghost_size=...\): a BatchNorm has no ghost_size.*pass to=GhostBatchNorm"),
        ({"moment": 0.9}, r"convert\(moment=...\): a BatchNorm has no moment. Changes are \('axis_name'"),
        ({"momentum": 1.5}, r"convert\(momentum=1.5\): expected a number in \[0, 1\]"),
        ({"epsilon": 0}, r"convert\(epsilon=0\)"),
        ({"frozen": 1}, r"convert\(frozen=...\): expected a Python bool"),
        ({"where": "head"}, r"convert\(where='head'\): expected a function of a layer's path"),
        ({"to": nn.LayerNorm}, r"convert\(to='LayerNorm'\): expected one of"),
        ({"to": "IndexedBatchNorm"}, r"convert\(to='IndexedBatchNorm'\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_convert_rejects_what_layers_do_not_have(library, changes, message):
    model = LinenResNet() if library == "linen" else NNXResNet(nnx.Rngs(0))
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(bnjax, library).convert(model, **changes)


def test_errors_of_a_converted_layer_name_the_layer(far):
    for to, name in ((None, "BatchNorm"), (bnjax.linen.RenormBatchNorm, "RenormBatchNorm")):
        layer = bnjax.linen.convert(nn.Sequential([nn.BatchNorm(use_running_average=False)]), to=to)
        with pytest.raises(ValueError, match=rf"^{name}\(mask=...\)"):
            layer.init(KEY, far, mask=jnp.ones((7, 3), bool))
    for layer in (nn.Sequential([nn.BatchNorm(use_running_average=False)]), nn.BatchNorm(use_running_average=False)):
        with pytest.raises(TypeError, match=r"BatchNorm\(x=...\): expected an array, got a list. Pass the array in it"):
            bnjax.linen.convert(layer).init(KEY, [far, far])
    with pytest.raises(TypeError, match=r"BatchNorm\(x=...\): expected an array, got a tuple"):
        bnjax.nnx.convert(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))((far, far))


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_convert_rejects_a_ghost_batch_norm_without_a_size(library):
    model = LinenResNet() if library == "linen" else NNXResNet(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"convert\(ghost_size=None\): expected a positive integer"):
        getattr(bnjax, library).convert(model, to=getattr(bnjax, library).GhostBatchNorm)


def test_convert_rejects_other_things_than_models(far):
    with pytest.raises(TypeError, match=r"For an NNX model use bnjax.nnx.convert"):
        bnjax.linen.convert(NNXResNet(nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"got a class. Pass LinenResNet\(...\)"):
        bnjax.linen.convert(LinenResNet)
    with pytest.raises(TypeError, match=r"got a class. Pass NNXResNet\(...\)"):
        bnjax.nnx.convert(NNXResNet)
    for linen in (nn.BatchNorm(), bnjax.linen.BatchNorm(), [nn.BatchNorm()]):
        with pytest.raises(TypeError, match=r"convert\(model=(BatchNorm|list)\): a Linen module. Use bnjax.linen.con"):
            bnjax.nnx.convert(linen, momentum=0.5)
    for other in (None, 3, [], {"a": jnp.ones(3)}, nnx.Rngs(0)):
        with pytest.raises(
            TypeError, match=rf"convert\(model={type(other).__name__}\): expected an NNX module, or a con"
        ):
            bnjax.nnx.convert(other)
    layer = nn.BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match=r"the module is bound to variables. Convert it, then call bind"):
        bnjax.linen.convert(layer.bind(layer.init(KEY, far)))


def nnx_model(make):
    rngs = nnx.Rngs(0)

    class Model(nnx.Module):
        def __init__(self):
            self.first = make(rngs=rngs)
            self.blocks = nnx.List([make(rngs=rngs), nnx.Linear(3, 3, rngs=rngs), make(rngs=rngs)])
            self.shared = self.first
            self.stack = nnx.vmap(lambda keys: make(rngs=nnx.Rngs(keys)))(jax.random.split(KEY, 2))

        def __call__(self, x):
            for layer in (self.first, *self.blocks, self.shared):
                x = layer(x)
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)

    return Model()


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "none")
def test_a_converted_nnx_model_is_the_model_written_with_our_layers(far, changes):
    model = bnjax.nnx.convert(nnx_model(partial(nnx.BatchNorm, 3, axis_name="batch")), axis_name=None, **changes)
    expected = nnx_model(partial(bnjax.nnx.BatchNorm, 3, **changes))
    assert_equal(called(model, far), called(expected, far))
    assert_equal(nnx.state(model, nnx.BatchStat), nnx.state(expected, nnx.BatchStat))


@pytest.mark.parametrize(
    ("to", "options"), [("GhostBatchNorm", {"ghost_size": 8}), ("RenormBatchNorm", {"d_max": 1.0})]
)
def test_an_nnx_model_converts_to_a_variant_and_back(far, to, options):
    kind = getattr(bnjax.nnx, to)
    expected = nnx_model(partial(kind, 3, **options))
    model = bnjax.nnx.convert(nnx_model(partial(nnx.BatchNorm, 3)), to=kind, **options)
    assert_equal(called(model, far), called(expected, far))
    assert_equal(nnx.state(model, nnx.BatchStat), nnx.state(expected, nnx.BatchStat))
    model = bnjax.nnx.convert(model, to=bnjax.nnx.BatchNorm)
    assert type(model.first) is bnjax.nnx.BatchNorm
    assert not set(options) & set(vars(model.first))


def test_where_chooses_nnx_layers_by_path():
    model = bnjax.nnx.convert(nnx_model(partial(nnx.BatchNorm, 3)), where=lambda path: path.startswith("blocks/"))
    assert type(model.first) is type(model.stack) is nnx.BatchNorm
    assert [type(layer) for layer in model.blocks] == [bnjax.nnx.BatchNorm, nnx.Linear, bnjax.nnx.BatchNorm]
