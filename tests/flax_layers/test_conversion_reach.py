"""What `convert` reaches: subclasses, layers through `flax.nnx.bridge`, and parts and copies of a converted model."""

import copy
import dataclasses
import gc
import pickle
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

import bnjax
import bnjax.linen
import bnjax.nnx
from tests.support import reference

KEY = jax.random.key(0)
NORM = partial(nn.BatchNorm, use_running_average=False)
EXACT = 16 * 1.2e-7 * 1e4  # of values near 1e4: their rounding, in standard deviations


@pytest.fixture
def far(rng):
    return (1e4 + rng.standard_normal((64, 3))).astype(np.float32)


def normalized(x):
    return reference.train(x.astype(np.float64), 1, 0, 0, 1)[0]


def assert_converted(far, y, mean, scale=1.0, momentum=0.5):
    """The output is the exact one, and the running mean moved by the momentum that was asked."""
    np.testing.assert_allclose(y, scale * normalized(far), atol=scale * EXACT)
    np.testing.assert_allclose(mean, (1 - momentum) * far.astype(np.float64).mean(0), rtol=1e-6)


class Doubled(nnx.BatchNorm):
    def __call__(self, x, **options):
        return 2 * super().__call__(x, **options)


class Redoubled(Doubled):
    def __init__(self, features, factor, *, rngs):
        super().__init__(features, rngs=rngs)
        self.factor = factor

    def __call__(self, x, train=True):
        return self.factor * super().__call__(x, use_running_average=not train)


class Inherited(Redoubled):
    pass


class Mixin:
    def __call__(self, x):
        return 2 * super().__call__(x)  # pyright: ignore


class Mixed(Mixin, nnx.BatchNorm):
    pass


class ByMethod(nnx.BatchNorm):
    def __call__(self, x):
        return 2 * self.forward(x)

    def forward(self, x):
        return super().__call__(x)


class Compiled(nnx.BatchNorm):
    @nnx.jit
    def __call__(self, x):
        return 2 * super().__call__(x)


class Recomputed(nnx.BatchNorm):
    def __call__(self, x):
        return 2 * nnx.remat(lambda layer, x: super().__call__(x))(self, x)


class Replaced(nnx.BatchNorm):
    def __call__(self, x):
        return x - self.mean[...]


class ByName(nnx.BatchNorm):
    def __call__(self, x):
        return nnx.BatchNorm.__call__(self, x)


class AboveReplaced(Replaced):
    def __call__(self, x):
        return super().__call__(x)


@pytest.mark.parametrize("kind", [Doubled, Mixed, ByMethod, Compiled, Recomputed], ids=lambda kind: kind.__name__)
def test_an_nnx_subclass_that_calls_super_is_converted(far, kind):
    model = bnjax.nnx.convert(nnx.List([kind(3, rngs=nnx.Rngs(0))]), momentum=0.5)
    layer = model[0]
    assert isinstance(layer, kind)
    assert isinstance(layer, bnjax.nnx.BatchNorm)
    assert type(layer).__name__ == kind.__name__
    y = layer(far)
    assert_converted(far, y, layer.mean[...], scale=2.0)


@pytest.mark.parametrize("kind", [Redoubled, Inherited])
def test_an_nnx_subclass_of_a_subclass_keeps_its_attributes(far, kind):
    layer = bnjax.nnx.convert(kind(3, 4.0, rngs=nnx.Rngs(0)), momentum=0.5)
    y = layer(far)
    assert_converted(far, y, layer.mean[...], scale=8.0)


@pytest.mark.parametrize("kind", [Replaced, ByName, AboveReplaced])
def test_an_nnx_subclass_that_does_not_call_super_is_named(kind):
    model = nnx.List([kind(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))])
    with pytest.warns(
        UserWarning, match=rf"'0': {kind.__name__} overrides __call__ without super\(\).__call__\. Use a"
    ):
        bnjax.nnx.convert(model, momentum=0.5)
    assert [type(layer) for layer in model] == [kind, bnjax.nnx.BatchNorm]
    assert model[0].momentum == 0.99


def test_an_nnx_subclass_converts_to_a_variant_and_back(far):
    class Own(bnjax.nnx.BatchNorm):
        def __call__(self, x):
            return 2 * super().__call__(x)

    expected = 2 * bnjax.nnx.GhostBatchNorm(3, ghost_size=8, rngs=nnx.Rngs(0))(far)
    for kind in (Doubled, Own):
        layer = bnjax.nnx.convert(kind(3, rngs=nnx.Rngs(0)), to=bnjax.nnx.RenormBatchNorm)
        assert callable(layer.r_max)
        layer = bnjax.nnx.convert(layer, to=bnjax.nnx.GhostBatchNorm, ghost_size=8)
        assert not hasattr(layer, "r_max")
        np.testing.assert_array_equal(layer(far), expected)
        layer = bnjax.nnx.convert(layer, to=bnjax.nnx.BatchNorm)
        np.testing.assert_allclose(layer(far), 2 * normalized(far), atol=2 * EXACT)


def test_layers_that_keep_their_class_are_named():
    class Ghost(bnjax.nnx.GhostBatchNorm):
        def __call__(self, x):
            return super().__call__(x)

    rngs = nnx.Rngs(0)
    for layer in (Ghost(3, ghost_size=2, rngs=rngs), bnjax.nnx.ConditionalBatchNorm(3, num_classes=2, rngs=rngs)):
        with pytest.warns(UserWarning, match=rf"'0': {type(layer).__name__} keeps its class"):
            bnjax.nnx.convert(nnx.List([layer]), to=bnjax.nnx.RenormBatchNorm)
    layer = bnjax.linen.IndexedBatchNorm(num_indices=2, use_running_average=False)
    with pytest.warns(UserWarning, match="IndexedBatchNorm keeps its class"):
        jax.eval_shape(bnjax.linen.convert(layer, to=bnjax.linen.RenormBatchNorm).init, KEY, jnp.ones((4, 3)), index=0)


def test_copies_of_a_converted_nnx_subclass_are_converted(far):
    layer = bnjax.nnx.convert(Doubled(3, rngs=nnx.Rngs(0)), momentum=0.5)
    for copied in (copy.deepcopy(layer), nnx.clone(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is type(layer)
        assert_converted(far, copied(far), copied.mean[...], scale=2.0)


class ToLinen(nn.Module):
    kind: Any = nnx.BatchNorm

    @nn.compact
    def __call__(self, x):
        return bridge.to_linen(self.kind, 3, name="norm")(x)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return NORM(name="norm")(x)


class ToNNX(nnx.Module):
    def __init__(self, features, rngs, kind=Linen):
        self.inner = bridge.ToNNX(kind(), rngs=rngs).lazy_init(jnp.ones((2, features)))

    def __call__(self, x, **options):
        return self.inner(x, **options)


@pytest.mark.parametrize("where", [None, lambda path: path.endswith("norm")], ids=["all", "where"])
def test_nnx_layers_in_a_linen_model_are_converted(far, where):
    for model, path in ((ToLinen(), ["norm"]), (ToLinen(ToNNX), ["norm", "inner", "norm"])):
        converted = bnjax.linen.convert(model, momentum=0.5, where=where)
        y, updates = converted.apply(converted.init(KEY, far), far, mutable=["batch_stats"])
        stats = updates["batch_stats"]
        for name in path:
            stats = stats[name]
        assert_converted(far, y, stats["mean"])
    counting = bnjax.linen.convert(ToLinen(), momentum=bnjax.cumulative_average)
    _, updates = counting.apply(ToLinen().init(KEY, far), far, mutable=["batch_stats"])
    np.testing.assert_array_equal(updates["batch_stats"]["norm"]["count"], [1, 1, 1])


@pytest.mark.parametrize("where", [None, lambda path: path == "inner/norm"], ids=["all", "where"])
def test_linen_layers_in_an_nnx_model_are_converted(far, where):
    for kind in (Linen, ToLinen):
        model = bnjax.nnx.convert(ToNNX(3, nnx.Rngs(0), kind), momentum=0.5, where=where)
        y = model(far, mutable=["batch_stats"])
        assert_converted(far, y, model.inner.norm["mean"][...])
    variant = bnjax.nnx.convert(ToNNX(3, nnx.Rngs(0)), to=bnjax.nnx.GhostBatchNorm, ghost_size=8)
    expected = bnjax.nnx.GhostBatchNorm(3, ghost_size=8, rngs=nnx.Rngs(0))(far)
    np.testing.assert_allclose(variant(far, mutable=["batch_stats"]), expected, atol=EXACT)


class Coder(nn.Module):
    def setup(self):
        self.first, self.second = NORM(), NORM()

    def __call__(self, x):
        return self.second(self.first(x))


def assert_exact(model, variables, far, exact=True):
    y, _ = model.apply(variables, far, mutable=["batch_stats"])
    error = np.abs(y - normalized(far)).max()
    assert error < EXACT if exact else error > 1


def test_parts_of_a_converted_linen_model_stay_converted(far):
    whole = bnjax.linen.convert(nn.Sequential([NORM(), NORM()]))
    part = nn.Sequential(whole.layers[:1])
    variables = part.init(KEY, far)
    assert_exact(part, variables, far)
    layer = {name: tree["layers_0"] for name, tree in variables.items()}
    assert_exact(whole.layers[1], layer, far)
    # With `where`, a part keeps its place in the whole.
    chosen = bnjax.linen.convert(nn.Sequential([NORM(), NORM()]), where=lambda path: path == "layers_1")
    assert_exact(nn.Sequential(chosen.layers[:1]), variables, far, exact=False)
    assert_exact(nn.Sequential(chosen.layers[1:]), variables, far)


def test_submodules_of_a_bound_model_keep_their_place(far):
    model = bnjax.linen.convert(Coder(), where=lambda path: path == "second")
    bound = model.bind(Coder().init(KEY, far), mutable=["batch_stats"])
    for name, exact in (("first", False), ("second", True)):
        assert (np.abs(getattr(bound, name)(far) - normalized(far)).max() < EXACT) == exact
        module, variables = getattr(bound, name).unbind()
        assert_exact(module, variables, far, exact)


def test_paths_are_those_of_the_converted_model(far):
    class Around(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.inner(x)

    inner = bnjax.linen.convert(nn.Sequential([NORM()]), where=lambda path: path == "layers_0")
    assert_exact(Around(inner), Around(inner).init(KEY, far), far)


def test_a_layer_in_two_places_stays_one(far):
    shared = NORM()
    model = bnjax.linen.convert(nn.Sequential([shared, nn.Dense(3), shared]))
    assert model.layers[0] is model.layers[2]
    assert sorted(jax.eval_shape(model.init, KEY, far)["batch_stats"]) == ["layers_0"]


class Fixed(nn.Module):
    size: int = dataclasses.field(init=False, default=3)
    other: int = dataclasses.field(kw_only=True, default=2)

    @nn.compact
    def __call__(self, x):
        return NORM()(x)


class Post(nn.Module):
    size: int = 3

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "factor", self.size - 2)

    @nn.compact
    def __call__(self, x):
        return self.factor * NORM()(x)


class Hashed(nn.Module):
    table: Any = None

    def __eq__(self, other):
        return isinstance(other, Hashed)

    def __hash__(self):
        return 7

    @nn.compact
    def __call__(self, x):
        return NORM()(x)


class Registered(nn.Module):
    def __init_subclass__(cls, *, key, **options):
        super().__init_subclass__(**options)


class Keyed(Registered, key=1):
    @nn.compact
    def __call__(self, x):
        return NORM()(x)


@pytest.mark.parametrize(
    "model", [Fixed(), Post(), Hashed(np.zeros(2)), Keyed(), Coder()], ids=lambda m: type(m).__name__
)
def test_copies_of_a_converted_linen_model_are_equal_to_it(model):
    converted = bnjax.linen.convert(model, momentum=0.5)
    assert converted != model
    assert model != converted
    copies = [
        copy.copy(converted),
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        pickle.loads(pickle.dumps(converted, 0)),
        dataclasses.replace(converted),
        converted.clone(),
        converted.copy(),
        bnjax.linen.convert(model, momentum=0.5),
    ]
    for copied in copies:
        assert copied == converted
        assert hash(copied) == hash(converted)
        assert type(copied) is type(converted)
        assert vars(copied).get("factor") == vars(model).get("factor")
    assert converted != bnjax.linen.convert(model, momentum=0.25)


def test_conversions_leave_no_classes(far):
    kinds = (Coder, nn.BatchNorm)
    gc.collect()
    before = [len(kind.__subclasses__()) for kind in kinds]
    for _ in range(5):
        jax.eval_shape(bnjax.linen.convert(Coder(), where=lambda path: True).init, KEY, far)
    gc.collect()
    assert [len(kind.__subclasses__()) for kind in kinds] == before


def test_conversions_of_a_linen_model_add_up(far):
    model = nn.Sequential([NORM(), NORM()])
    both = bnjax.linen.convert(bnjax.linen.convert(model, momentum=0.5), epsilon=0.1)
    assert both == bnjax.linen.convert(model, momentum=0.5, epsilon=0.1)
    one = bnjax.linen.convert(
        bnjax.linen.convert(model, momentum=0.5), momentum=0.0, where=lambda path: path[-1] == "0"
    )
    _, updates = one.apply(one.init(KEY, far), far, mutable=["batch_stats"])
    means = far.astype(np.float64).mean(0)
    np.testing.assert_allclose(updates["batch_stats"]["layers_0"]["mean"], means, rtol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["layers_1"]["var"], 0.5 + 0.5 * 1, rtol=1e-4)  # of what is normal
    # A part keeps what was changed in the whole, in another model and after another conversion.
    part = bnjax.linen.convert(nn.Sequential(one.layers[:1]), unbiased_var=True)
    _, updates = part.apply(part.init(KEY, far), far, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["layers_0"]["mean"], means, rtol=1e-6)
    np.testing.assert_allclose(
        updates["batch_stats"]["layers_0"]["var"], far.astype(np.float64).var(0, ddof=1), rtol=1e-4
    )
