"""What `convert` reports: an error if `where` matches nothing, a warning if nothing or not everything was converted."""

import warnings
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge
from flax.training.train_state import TrainState

import bnjax.linen
import bnjax.nnx

KEY = jax.random.key(0)
NORM = partial(nn.BatchNorm, use_running_average=False)
X = np.ones((8, 4), np.float32)


class Statistics(nn.Module):
    """A module with variables of these names."""

    collection: str
    names: tuple[str, ...]
    shape: tuple[int, ...] = (4,)

    @nn.compact
    def __call__(self, x):
        for name in self.names:
            self.variable(self.collection, name, jnp.zeros, self.shape)
        return x


class Overridden(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
        self.variable("batch_stats", "mean", jnp.zeros, (4,))
        self.variable("batch_stats", "var", jnp.ones, (4,))
        return x


def variables_of(model, **options):
    """Trace the first call of a converted Linen model."""
    return jax.eval_shape(bnjax.linen.convert(model, **options).init, KEY, X)


def module_of(kind, **values):
    """An NNX module with variables of these names."""

    class Own(nnx.Module):
        def __init__(self):
            for name, value in values.items():
                setattr(self, name, kind(value))

    return Own()


def with_norm(layer):
    return nnx.List([layer, nnx.BatchNorm(4, rngs=nnx.Rngs(0))])


OWN = [
    ("batch_stats", ("mean", "var")),
    ("bn_stats", ("mean", "variance")),
    ("batch_stats", ("moving_mean", "moving_variance")),
    ("state", ("running_mean", "running_var")),
    ("ema", ("ra_mean", "ra_var", "count")),
    ("params", ("runningMean", "runningVar")),
    ("batch_stats", ("mean_ema", "std_ema")),
]
OTHER = [
    ("batch_stats", ("u", "sigma")),  # of a spectral norm
    ("batch_stats", ("ema_mean",)),
    ("params", ("mean", "var")),  # of a distribution
    ("constants", ("mean", "std")),  # of a data set
    ("state", ("running_mean", "moving_var")),
]


@pytest.mark.parametrize(("collection", "names"), OWN, ids=str)
def test_a_linen_layer_with_statistics_of_its_own_is_named(collection, names):
    with pytest.warns(UserWarning, match=r"convert\(model=Sequential\): These .*'layers_1': Statistics holds running"):
        variables_of(nn.Sequential([NORM(), Statistics(collection, names)]))


@pytest.mark.parametrize(("collection", "names"), OTHER, ids=str)
def test_other_variables_of_a_linen_model_raise_no_alarm(collection, names):
    variables_of(nn.Sequential([NORM(), Statistics(collection, names)]))
    variables_of(nn.Sequential([NORM(), Statistics("batch_stats", ("mean", "var"), shape=())]))  # of a reward, say


def test_a_class_called_batch_norm_is_named_whatever_its_variables_are():
    for name, collection, names in (("SyncBN", "buffers", ("mean", "var")), ("BatchNorm", "batch_stats", ("m", "v"))):
        own = type(name, (Statistics,), {})(collection, names)
        with pytest.warns(UserWarning, match=rf"'layers_1': {name} holds running statistics"):
            variables_of(nn.Sequential([NORM(), own]))

    class BatchRenorm(nnx.Module):
        def __init__(self):
            self.mean, self.var = nnx.Variable(X[0]), nnx.Variable(X[0])

    with pytest.warns(UserWarning, match=r"'0': BatchRenorm holds running statistics"):
        bnjax.nnx.convert(with_norm(BatchRenorm()))
    with pytest.warns(UserWarning, match=r"'0': Own holds running statistics"):  # in one variable
        bnjax.nnx.convert(with_norm(module_of(nnx.BatchStat, state={"mean": X[0], "var": X[0]})))

    # Parameters of a distribution raise no alarm, nor do layers of bnjax.
    variables_of(nn.Sequential([NORM(), type("BNNDense", (Statistics,), {})("buffers", ("mean", "var"))]))
    variables_of(nn.Sequential([NORM(), type("BNDense", (Statistics,), {})("params", ("mean", "var"))]))


@pytest.mark.parametrize(
    "values",
    [
        {"kind": nnx.BatchStat, "mean": X[0], "var": X[0]},
        {"kind": nnx.Variable, "running_mean": X[0], "running_var": X[0]},
        {"kind": nnx.Param, "ra_mean": X[0], "ra_std": X[0]},
    ],
    ids=lambda values: values["kind"].__name__,
)
def test_an_nnx_layer_with_statistics_of_its_own_is_named(values):
    with pytest.warns(UserWarning, match=r"convert\(model=List\): These .*'0': Own holds running statistics") as found:
        bnjax.nnx.convert(with_norm(module_of(**values)))
    assert found[0].filename == __file__
    bnjax.nnx.convert(with_norm(module_of(**values)), where=lambda path: path == "1")  # as the warning advises


def test_other_modules_of_an_nnx_model_raise_no_alarm():
    rngs = nnx.Rngs(0)
    others = [
        module_of(nnx.Param, mean=X[0], var=X[0]),
        module_of(nnx.BatchStat, mean=X[0]),
        module_of(nnx.BatchStat, mean=X[0, 0], var=X[0, 0]),
        nnx.SpectralNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs),
        nnx.RMSNorm(4, rngs=rngs),
        nnx.metrics.Welford(),
        bnjax.nnx.BNLSTMCell(3, 2, num_steps=2, rngs=rngs),
    ]
    for other in others:
        bnjax.nnx.convert(with_norm(other))
    bnjax.nnx.convert(bnjax.nnx.BatchNorm(4, rngs=rngs))  # layers of bnjax, and nothing to change


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(), nn.GroupNorm(2), nn.Dense(2)], ids=lambda layer: type(layer).__name__
)
def test_a_linen_model_without_layers_is_named_in_its_first_call(layer):
    with pytest.warns(UserWarning, match=r"convert\(model=Sequential\): nothing was converted. The model has no Batch"):
        variables_of(nn.Sequential([layer]))
    with pytest.raises(ValueError, match=r"where matches no layer of Sequential. It has no BatchNorm layer of Flax or"):
        variables_of(nn.Sequential([layer]), where=lambda path: True)


def test_an_nnx_model_without_layers_is_named_at_once():
    layer = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    with pytest.warns(
        UserWarning, match=r"convert\(model=LayerNorm\): nothing was converted. The model has no BatchNorm"
    ):
        assert bnjax.nnx.convert(layer) is layer
    with pytest.raises(ValueError, match=r"where matches no layer of LayerNorm. It has no BatchNorm layer of Flax or"):
        bnjax.nnx.convert(layer, where=lambda path: True)


def test_a_linen_model_is_named_once():
    model = bnjax.linen.convert(nn.Sequential([Overridden(), nn.Dense(4)]))
    with pytest.warns(
        UserWarning, match=r"nothing was converted. .*'layers_0': Overridden overrides __call__ without"
    ) as w:
        variables = model.init(KEY, X)
    assert w[0].filename == __file__
    model.init(KEY, X)
    jax.eval_shape(partial(model.apply, mutable=["batch_stats"]), variables, X)
    with pytest.warns(UserWarning, match="nothing was converted"):  # another conversion, although an equal one
        variables_of(nn.Sequential([Overridden(), nn.Dense(4)]))


def test_where_without_a_match_is_an_error_in_every_call():
    model = bnjax.linen.convert(nn.Sequential([NORM(), nn.Dense(4), NORM()]), where=lambda path: "layer_" in path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no layer of Sequential. Its layers are: 'layers_0', 'layers_2'\."):
            jax.eval_shape(model.init, KEY, X)
    layers = with_norm(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"no layer of List. Its layers are: '0', '1'\."):
        bnjax.nnx.convert(layers, momentum=0.5, where=lambda path: path == "layers/0")
    assert [type(layer) for layer in layers] == [nnx.BatchNorm] * 2  # unchanged


class Coder(nn.Module):
    def setup(self):
        self.first, self.second = NORM(), NORM()

    def encode(self, x):
        return self.first(x)

    def decode(self, x):
        return self.second(x)

    def plain(self, x):
        return 2 * x

    def __call__(self, x):
        return self.decode(self.encode(x))


def test_a_method_that_skips_layers_raises_no_alarm():
    apply = jax.eval_shape
    variables = jax.eval_shape(Coder().init, KEY, X)
    for options in ({}, {"where": lambda path: path == "second"}):
        for method in ("encode", "decode", "plain"):
            model = bnjax.linen.convert(Coder(), **options)
            apply(partial(model.apply, method=method, mutable=["batch_stats"]), variables, X)
            apply(partial(model.init, method=method), KEY, X)
    model = bnjax.linen.convert(Coder(), where=lambda path: path == "third")
    with pytest.raises(ValueError, match=r"no layer of Coder. Its layers are: 'first', 'second'"):
        apply(partial(model.apply, method="encode", mutable=["batch_stats"]), variables, X)


def test_a_block_that_was_compiled_before_raises_no_alarm():
    @nn.jit
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return NORM(name="norm")(x)

    for options in ({}, {}, {"where": lambda path: path.endswith("norm")}):
        variables_of(nn.Sequential([Block()]), **options)


class Linen(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        own = partial(Statistics, "batch_stats", ("mean", "var"))
        return {"norm": NORM, "own": own, "dense": partial(nn.Dense, 4)}[self.kind](name="inner")(x)


class Bridged(nnx.Module):
    def __init__(self, *kinds):
        rngs = nnx.Rngs(0)
        self.parts = nnx.List([bridge.ToNNX(Linen(kind), rngs=rngs).lazy_init(X) for kind in kinds])

    def __call__(self, x):
        for part in self.parts:
            x = part(x, mutable=["batch_stats"])
        return x


def test_linen_parts_of_an_nnx_model_report_in_the_first_call():
    with pytest.warns(
        UserWarning, match=r"convert\(model=Bridged\): These .*'parts/1/inner': Statistics holds running"
    ):
        bnjax.nnx.convert(Bridged("norm", "own"))(X)
    with pytest.warns(
        UserWarning, match=r"convert\(model=Bridged\): nothing was converted. The model has no BatchNorm"
    ):
        bnjax.nnx.convert(Bridged("dense"))(X)
    with pytest.raises(ValueError, match=r"where matches no layer of Bridged. Its layers are: 'parts/0/inner'"):
        bnjax.nnx.convert(Bridged("norm"), where=lambda path: path == "parts/1/inner")(X)
    bnjax.nnx.convert(with_norm(Bridged("dense")))[0](X)
    bnjax.nnx.convert(Bridged("norm", "norm"), where=lambda path: path == "parts/1/inner")(X)


def test_nnx_parts_of_a_linen_model_report_in_the_first_call():
    class Both(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.own = module_of(nnx.BatchStat, mean=X[0], var=X[0])

        def __call__(self, x):
            return self.norm(x)

    with pytest.warns(UserWarning, match=r"convert\(model=Sequential\): These .*'layers_0/own': Own holds running"):
        variables_of(nn.Sequential([bridge.to_linen(Both)]))
    with pytest.raises(ValueError, match=r"Its layers are: .*'layers_0/norm'"):
        variables_of(nn.Sequential([bridge.to_linen(Both)]), where=lambda path: path == "norm")


class Pretrained:
    """A model as in Transformers: an object that holds a module and its parameters."""

    def __init__(self):
        self.module, self.params = Coder(), {}


MODEL = Coder()


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (Pretrained(), r"convert\(model=Pretrained\): .*Pass its module, model.module"),
        (partial(Coder), "Call the partial, and pass the module that it makes, a Coder"),
        (partial(MODEL.apply, train=True), "Pass the module itself, the Coder whose method was passed"),
        (MODEL.apply, "Pass the module itself, the Coder whose method was passed"),
        (TrainState.create(apply_fn=MODEL.apply, params={}, tx=optax.identity()), r"state\.apply_fn\.__self__"),
    ],
    ids=["model", "partial", "partial of apply", "apply", "state"],
)
def test_convert_says_where_the_module_is(model, advice):
    with pytest.raises(TypeError, match=rf"expected a Linen module.*{advice}|^{advice}"):
        bnjax.linen.convert(model)
    with pytest.raises(TypeError, match=advice):
        bnjax.nnx.convert(model)


def test_convert_of_several_linen_modules_says_what_to_pass():
    with pytest.raises(TypeError, match=r"convert\(model=list\).*Pass one module at a time, or an nn.Sequential"):
        bnjax.linen.convert([NORM()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variables_of(nn.Sequential([NORM()]))  # the remedy
