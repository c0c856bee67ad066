"""Pairs that folding finds by tracing: the folded model gives the same output, and unfolded norms have a reason."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax.linen
import bnjax.nnx
from tests.support.folding import CLOSE, applied, drawn, numbers

KEY = jax.random.key(0)
BN = partial(nn.BatchNorm, use_running_average=True)


class Model(nn.Module):
    """A function of x with layers made in it, by name."""

    function: Any

    @nn.compact
    def __call__(self, x):
        return self.function(x)


def through(*layers):
    """A model of layers by name, and functions between."""

    def function(x):
        for layer in layers:
            x = layer[1](name=layer[0])(x) if isinstance(layer, tuple) else layer(x)
        return x

    return Model(function)


A, B = ("a", partial(nn.Dense, 4)), ("b", partial(nn.Dense, 4))
SAME = ("same", partial(nn.Conv, 4, (3,)))
FOUND = {
    "adjacent": (through(A, ("bn", BN)), [("a", "bn")]),
    "dropout": (through(A, lambda x: nn.Dropout(0.5, deterministic=True)(x), ("bn", BN)), [("a", "bn")]),
    "reshape": (through(A, lambda x: x.reshape(-1, 4), ("bn", BN)), [("a", "bn")]),
    "another axis": (through(A, lambda x: x[:, None].squeeze(1), ("bn", BN)), [("a", "bn")]),
    "a wider dtype": (through(A, lambda x: x.astype(jnp.float32), ("bn", BN)), [("a", "bn")]),
    "the next": (through(nn.relu, ("bn", BN), A), [("bn", "a")]),
    "the previous goes before": (through(A, ("bn", BN), B), [("a", "bn")]),
    "both sides of one": (through(nn.relu, ("bn", BN), A, ("bn2", BN)), [("bn", "a"), ("a", "bn2")]),
    "jit": (through(nn.relu, lambda x: nn.jit(Model)(through(A, ("bn", BN)).function, name="m")(x)), [("m/a", "m/bn")]),
    "remat": (through(lambda x: nn.remat(Model)(through(A, ("bn", BN)).function, name="m")(x)), [("m/a", "m/bn")]),
}
LEFT = {
    "an activation": (
        through(A, nn.relu, ("bn", BN)),
        "its input is the output of max; its output is used by the model's result",
    ),
    "a sum": (Model(lambda x: nn.Dense(4, name="a")(x) + BN(name="bn")(nn.relu(x))), "its output is used by add"),
    "a second user": (
        Model(lambda x: (lambda y: BN(name="bn")(y) + y)(nn.Dense(4, name="a")(x))),
        "the output of 'a' is used by 'bn' and add, not only by 'bn'",
    ),
    "the model returns it": (
        Model(lambda x: (lambda y: (BN(name="bn")(y), y))(nn.Dense(4, name="a")(x))),
        "the output of 'a' is used by 'bn' and the model's result",
    ),
    "padding": (through(nn.relu, ("bn", BN), SAME), "not exact if padding or dilation adds zeros"),
    "features reshaped": (through(A, lambda x: x.reshape(-1, 2), ("bn", BN)), "its input is the output of reshape"),
    "transposed": (through(A, lambda x: x.mT, ("bn", BN)), "its input is the output of transpose"),
    "another feature axis": (through(A, ("bn", partial(BN, axis=1))), "'bn' has axis=1"),
    "a shared linear layer": (
        Model(lambda x: (lambda a: BN(name="bn")(a(x)) + nn.relu(a(x)))(nn.Dense(4, name="a"))),
        "the output of 'a' is used by max and 'bn', not only by 'bn'",
    ),
    "integers between": (through(A, lambda x: x.astype(jnp.int32), ("bn", BN)), "output of convert_element_type"),
}


def variables_of(model, x):
    return drawn(jax.eval_shape(model.init, KEY, x))


@pytest.mark.parametrize(("model", "pairs"), FOUND.values(), ids=FOUND)
def test_linen_fold_finds_layers_side_by_side(model, pairs):
    x = numbers(2, 3, 4)
    variables = variables_of(model, x)
    model.apply(variables, x)  # blocks under jit are compiled before they are traced, and again when folded
    folded, interceptor = bnjax.linen.fold_model(model, variables, x)
    assert interceptor.report.folded == pairs
    assert not interceptor.report.unfolded
    assert "batch_stats" not in folded
    want = applied(model, variables, x)
    np.testing.assert_allclose(interceptor.model.apply(folded, x), want, **CLOSE)
    np.testing.assert_allclose(applied(interceptor.model, folded, x), want, **CLOSE)
    shapes = jax.ShapeDtypeStruct(x.shape, x.dtype)
    assert bnjax.linen.fold_model(model, variables, shapes)[1].report == interceptor.report


@pytest.mark.parametrize(("model", "reason"), LEFT.values(), ids=LEFT)
def test_linen_fold_leaves_the_rest_and_says_why(model, reason, caplog):
    x = numbers(2, 3, 4)
    with jax.numpy_dtype_promotion("standard"):
        variables = variables_of(model, x)
        folded, interceptor = bnjax.linen.fold_model(model, variables, x)
        want, got = model.apply(variables, x), interceptor.model.apply(folded, x)
    assert not interceptor.report.folded
    assert reason in interceptor.report.unfolded["bn"]
    assert f"left bn: {interceptor.report.unfolded['bn']}" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, got, want)


def nnx_model(function, **layers):
    class Small(nnx.Module):
        def __init__(self):
            for name, make in layers.items():
                setattr(self, name, make(rngs=nnx.Rngs(0)))

        def __call__(self, x):
            return function(self, x)

    model = Small()
    nnx.update(model, drawn(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    model.eval()
    return model


DENSE, NORM = partial(nnx.Linear, 4, 4), partial(nnx.BatchNorm, 4)
NNX_FOUND = {
    "adjacent": (lambda m, x: m.bn(m.a(x)), [("a", "bn")]),
    "dropout": (lambda m, x: m.bn(nnx.Dropout(0.5, deterministic=True)(m.a(x))), [("a", "bn")]),
    "reshape": (lambda m, x: m.bn(m.a(x).reshape(-1, 4)), [("a", "bn")]),
    "the next": (lambda m, x: m.a(m.bn(nnx.relu(x))), [("bn", "a")]),
    "jit": (lambda m, x: nnx.jit(lambda m, x: m.bn(m.a(x)))(m, x), [("a", "bn")]),
    "remat": (lambda m, x: nnx.remat(lambda m, x: m.bn(m.a(x)))(m, x), [("a", "bn")]),
}
NNX_LEFT = {
    "an activation": (lambda m, x: m.bn(nnx.relu(m.a(x))), "its input is the output of max"),
    "a second user": (lambda m, x: (lambda y: m.bn(y) + y)(m.a(x)), "used by 'bn' and add, not only by 'bn'"),
    "not called": (lambda m, x: m.a(x), "the model does not call it"),
    "a shared linear layer": (lambda m, x: m.bn(m.a(x)) + m.a(x), "the output of 'a' is used by"),
    "in training": (lambda m, x: m.bn(m.a(x), use_running_average=False), "normalizes by its batch"),
}


@pytest.mark.parametrize(("function", "pairs"), NNX_FOUND.values(), ids=NNX_FOUND)
def test_nnx_fold_finds_layers_side_by_side(function, pairs):
    model, x = nnx_model(function, a=DENSE, bn=NORM), numbers(2, 3, 4)
    want = model(x)
    assert bnjax.nnx.fold_report(model, x).folded == pairs
    np.testing.assert_array_equal(model(x), want)  # that changed nothing
    assert bnjax.nnx.fold_model(model, x) is model
    assert not jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    np.testing.assert_allclose(model(x), want, **CLOSE)


@pytest.mark.parametrize(("function", "reason"), NNX_LEFT.values(), ids=NNX_LEFT)
def test_nnx_fold_leaves_the_rest_and_says_why(function, reason, caplog):
    model, x = nnx_model(function, a=DENSE, bn=NORM), numbers(2, 3, 4)
    before = nnx.state(model)
    bnjax.nnx.fold_model(model, x)
    assert reason in caplog.text
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    with pytest.raises(ValueError, match=reason if reason.startswith("norm") else r"fold_model\(pairs="):
        bnjax.nnx.fold_model(model, x, pairs=[("a", "bn")])


def test_nnx_fold_without_an_input_takes_no_word_for_the_axis_or_for_a_layer_used_twice():
    model = nnx_model(lambda m, x: m.bn(m.a(x)), a=DENSE, bn=partial(nnx.BatchNorm, 4, axis=1), c=NORM)
    with pytest.raises(ValueError, match=r"'bn' has axis=1.*or an example input, with which the model is traced"):
        bnjax.nnx.fold_model(model, pairs=[("a", "bn")])
    with pytest.raises(ValueError, match=r"'bn' has axis=1. Folding needs the features on the last axis, -1\."):
        bnjax.nnx.fold_model(model, numbers(2, 4, 4), pairs=[("a", "bn")])
    model.bn.axis = 1 - 2
    with pytest.raises(ValueError, match="'a' is in two pairs"):
        bnjax.nnx.fold_model(model, pairs=[("a", "bn"), ("a", "c")])
    model.bn.axis = 1
    x = numbers(2, 4)  # where axis 1 is the last
    want = model(x)
    np.testing.assert_allclose(bnjax.nnx.fold_model(model, x, pairs=[("a", "bn")])(x), want, **CLOSE)


@pytest.mark.parametrize("pairs", [("a", "bn"), {"a"}, [("a", "bn", "b")], [("a",)]], ids=str)
def test_fold_rejects_what_are_no_pairs(pairs):
    model, x = through(A, ("bn", BN)), numbers(2, 3, 4)
    with pytest.raises(ValueError, match=r"fold_model\(pairs=.*expected a list of pairs of names"):
        bnjax.linen.fold_model(model, variables_of(model, x), x, pairs=pairs)
    with pytest.raises(ValueError, match=r"fold_model\(pairs=.*expected a list of pairs of names"):
        bnjax.nnx.fold_model(nnx_model(lambda m, x: m.bn(m.a(x)), a=DENSE, bn=NORM), pairs=pairs)


def test_fold_takes_pairs_as_a_keyword():
    model, x = through(A, ("bn", BN)), numbers(2, 3, 4)
    variables = variables_of(model, x)
    small = nnx_model(lambda m, x: m.bn(m.a(x)), a=DENSE, bn=NORM)
    for pairs in ([("a", "bn")], [["a", "bn"]], {"a": "bn"}):
        assert bnjax.linen.fold_model(model, variables, x, pairs=pairs)[1].report.folded == [("a", "bn")]
        assert bnjax.nnx.fold_report(small, x, pairs=pairs).folded == [("a", "bn")]
        with pytest.raises(ValueError, match=r"got only names. Pass pairs by keyword: fold_model\(..., pairs=.*'bn'"):
            bnjax.linen.fold_model(model, variables, pairs, x)
        with pytest.raises(ValueError, match=r"got only names. Pass pairs by keyword: fold_model\(..., pairs=.*'bn'"):
            bnjax.nnx.fold_model(small, pairs)
    for fold in (partial(bnjax.linen.fold_model, model, variables), partial(bnjax.nnx.fold_model, small)):
        with pytest.raises(ValueError, match=r"fold_model\(...\): no arguments of the model. Pass an example input"):
            fold()


def test_fold_rejects_other_things_than_models():
    x = numbers(2, 4)
    layers = [DENSE(rngs=nnx.Rngs(0)), NORM(rngs=nnx.Rngs(0))]
    with pytest.raises(TypeError, match=r"fold_model\(model=int\): expected a Linen module"):
        bnjax.linen.fold_model(3, {}, x)
    with pytest.raises(TypeError, match=r"fold_model\(model=Linear\).*For an NNX model use bnjax.nnx.fold_model"):
        bnjax.linen.fold_model(layers[0], {}, x)
    for fold in (bnjax.nnx.fold_model, bnjax.nnx.fold_report):
        for other in (3, layers):
            message = rf"{fold.__name__}\(model={type(other).__name__}\): expected an NNX module. Pass the module"
            with pytest.raises(TypeError, match=message):
                fold(other, x)
        with pytest.raises(TypeError, match=rf"{fold.__name__}\(model=Dense\): a Linen .* Use bnjax.linen.fold_model"):
            fold(nn.Dense(4), x)
    with pytest.raises(TypeError, match=r"fold_model\(model=int\): expected an NNX module, or a container"):
        bnjax.nnx.fold_model(3, pairs=[("0", "1")])
    assert type(bnjax.nnx.fold_model(layers, pairs=[("0", "1")])[1]) is bnjax.nnx.Identity  # named pairs need no call


def test_fold_rejects_a_trace_in_training():
    model, x = through(A, ("bn", partial(nn.BatchNorm, use_running_average=False))), numbers(2, 3, 4)
    with pytest.raises(ValueError, match=r"'bn' normalizes by its batch in this trace.*such as train=False"):
        bnjax.linen.fold_model(model, variables_of(model, x), x, pairs=[("a", "bn")], mutable=["batch_stats"])


def test_a_folded_linen_model_refuses_other_variables():
    model, x = through(("a", partial(nn.Dense, 4, use_bias=False)), ("bn", BN)), numbers(2, 3, 4)
    variables = variables_of(model, x)
    _, interceptor = bnjax.linen.fold_model(model, variables, x)
    with pytest.raises(ValueError, match=r"interceptor: 'a' has no bias. Apply the variables that fold_model returned"):
        interceptor.model.apply(variables, x)


class InSetup(nn.Module):
    norm: Any = BN

    def setup(self):
        self.a, self.bn, self.free = nn.Dense(4), self.norm(), self.norm()

    def __call__(self, x):
        return self.free(nn.relu(self.bn(self.a(x))))


@pytest.mark.parametrize("model", [InSetup(), through(A, ("bn", BN), nn.relu, ("free", BN))], ids=["setup", "compact"])
@pytest.mark.parametrize("changes", [{}, {"epsilon": 0.5}, {"frozen": True}], ids=str)
def test_a_converted_model_is_folded_as_it_was_converted(model, changes):
    x = numbers(5, 4)
    variables, converted = variables_of(model, x), bnjax.linen.convert(model, **changes)
    want = converted.apply(variables, x)
    folded, interceptor = bnjax.linen.fold_model(converted, variables, x)
    assert interceptor.report.folded == [("a", "bn")]
    assert list(interceptor.report.unfolded) == ["free"]  # which keeps the options of the conversion
    np.testing.assert_allclose(interceptor.model.apply(folded, x), want, **CLOSE)
    with nn.intercept_methods(interceptor):
        np.testing.assert_allclose(converted.apply(folded, x), want, **CLOSE)
    np.testing.assert_allclose(bnjax.linen.convert(interceptor.model, **changes).apply(folded, x), want, **CLOSE)


def test_a_folded_model_is_folded_again():
    model, x = through(A, ("bn", BN), nn.relu, B, ("bn2", BN)), numbers(5, 4)
    variables = variables_of(model, x)
    want = model.apply(variables, x)
    once, interceptor = bnjax.linen.fold_model(model, variables, x, pairs=[("a", "bn")])
    twice, interceptor = bnjax.linen.fold_model(interceptor.model, once, x)
    assert ("b", "bn2") in interceptor.report.folded
    assert "batch_stats" not in twice
    np.testing.assert_allclose(interceptor.model.apply(twice, x), want, **CLOSE)


COMPUTED = "is computed, as by weight normalization"


def test_fold_leaves_a_linear_layer_whose_kernel_is_not_its_own():
    x = numbers(5, 4)
    for wrapper in (nn.WeightNorm, partial(nn.SpectralNorm, error_on_non_matrix=True)):
        spectral = isinstance(wrapper, partial)

        def function(x, wrapper=wrapper, options={"update_stats": False} if spectral else {}):
            return BN(name="bn")(wrapper(nn.Dense(4, name="a"), name="w")(x, **options))

        variables = Model(function).init(KEY, x)
        assert COMPUTED in bnjax.linen.fold_model(Model(function), variables, x)[1].report.unfolded["bn"]
        with pytest.raises(ValueError, match=COMPUTED):
            bnjax.linen.fold_model(Model(function), variables, x, pairs=[("a", "bn")])

    def tied(x):
        a = nn.Dense(4, name="a")
        return nn.relu(BN(name="bn")(a(x))) @ a.variables["params"]["kernel"].T

    model = Model(tied)
    assert (
        "the kernel of 'a' is used elsewhere"
        in bnjax.linen.fold_model(model, variables_of(model, x), x)[1].report.unfolded["bn"]
    )

    def weight_norm(rngs):
        return nnx.WeightNorm(DENSE(rngs=rngs), rngs=rngs)

    model = nnx_model(lambda m, x: m.bn(m.a(x)), a=weight_norm, bn=NORM)
    assert COMPUTED in bnjax.nnx.fold_report(model, x).unfolded["bn"]
    model = nnx_model(lambda m, x: m.b(nnx.relu(m.bn(m.a(x)))), a=DENSE, bn=NORM, b=DENSE)
    model.b.kernel = model.a.kernel
    assert "the kernel of 'a' is used elsewhere" in bnjax.nnx.fold_report(model, x).unfolded["bn"]
    with pytest.raises(ValueError, match="'a' shares its kernel or bias with another layer"):
        bnjax.nnx.fold_model(model, pairs=[("a", "bn")])


def test_a_norm_that_trains_in_one_of_its_calls_is_left():
    def twice(x):
        a, bn = nn.Dense(4, name="a"), nn.BatchNorm(name="bn")
        return bn(a(bn(a(x), use_running_average=False)), use_running_average=True)

    model, x = Model(twice), numbers(5, 4)
    report = bnjax.linen.fold_model(model, variables_of(model, x), x, mutable=["batch_stats"])[1].report
    assert "normalizes by its batch" in report.unfolded["bn"]


def test_fold_leaks_no_tracer():
    model, x = through(A, ("bn", BN)), numbers(2, 3, 4)
    variables = variables_of(model, x)
    with jax.check_tracer_leaks():
        assert bnjax.linen.fold_model(model, variables, x)[1].report.folded == [("a", "bn")]
        small = nnx_model(lambda m, x: m.bn(m.a(x)), a=DENSE, bn=NORM)
        assert bnjax.nnx.fold_report(small, x).folded == [("a", "bn")]
