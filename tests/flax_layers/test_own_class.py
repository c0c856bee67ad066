"""The classes of docs/coming-from/own-class.md: what the page says works on them, and what does not know them."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnjax.linen
from bnjax import interop, training
from tests.support import markdown

PAGE = "docs/coming-from/own-class.md"
pytestmark = pytest.mark.usefixtures("flax_promotion")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return SimpleNamespace(**markdown.run(PAGE, markdown.pages()[PAGE], tmp_path_factory.mktemp("page")))


def training_mode(model):
    return lambda variables, batch, **options: model.apply(variables, batch[0], True, batch[1], **options)


def test_the_tools_for_layers_know_a_class_that_holds_one(page):
    model, variables = page.Model(page.NewNorm), page.variables
    new = bnjax.recalibrate(training_mode(model), variables, [(page.x, page.mask)])["batch_stats"]["norm"]["bn"]
    hidden = (page.x @ variables["params"]["Dense_0"]["kernel"])[page.mask]
    np.testing.assert_allclose(new["mean"], hidden.mean(0), atol=1e-5)
    np.testing.assert_allclose(new["var"], hidden.var(0), rtol=1e-4)
    assert len(bnjax.diagnose(variables["params"], variables["batch_stats"]).layers) == 1
    converted = bnjax.linen.convert(model, momentum=0.0)
    _, updates = converted.apply(variables, page.x, True, page.mask, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["norm"]["bn"]["mean"], new["mean"], atol=1e-5)


def test_accumulation_updates_a_class_that_holds_a_layer_once(page):
    model, batch = page.Model(page.NewNorm), {"x": page.x, "mask": page.mask}
    state = training.TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.0), **page.variables)
    step = training.train_step(lambda model, batch, train: model(batch["x"], train, batch["mask"]).mean(), accumulate=2)
    state, _ = step(state, batch)
    _, whole = model.apply(page.variables, page.x, True, page.mask, mutable=["batch_stats"])
    for ours, expected in zip(jax.tree.leaves(state.batch_stats), jax.tree.leaves(whole["batch_stats"]), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_weights_of_pytorch_go_into_a_class_that_holds_a_layer(page):
    state_dict = {"fc1.weight": np.ones((8, 3)), "fc1.bias": np.zeros(8)}
    state_dict |= {f"bn.{name}": np.full(8, 2.0) for name in ("weight", "bias", "running_mean", "running_var")}
    state_dict |= {"fc2.weight": np.ones((2, 8)), "fc2.bias": np.zeros(2)}
    new, _ = interop.from_torch_model(
        state_dict, page.variables, model=page.Model(page.NewNorm), inputs=(page.x, False, page.mask)
    )
    assert jnp.all(new["batch_stats"]["norm"]["bn"]["mean"] == 2)


def test_the_tools_for_layers_do_not_know_a_class_of_its_own(page):
    model = page.Model(page.KeptNorm)
    with pytest.warns(UserWarning, match=r"nothing was converted.*'norm': KeptNorm holds running statistics"):
        bnjax.linen.convert(model).apply(page.checkpoint, page.x, False)
    _, interceptor = bnjax.linen.fold_model(model, page.checkpoint, page.x, False)
    assert not interceptor.report.folded
    with pytest.raises(ValueError, match="no batch_stats among"):
        bnjax.recalibrate(training_mode(model), page.checkpoint, [(page.x, page.mask)])


def test_the_variance_over_devices_has_that_of_their_means():
    """Which a mean of variances, `lax.pmean(var)`, leaves out; a mean of E[x^2] does not."""
    x = np.random.default_rng(0).normal(size=(2, 8, 3)).astype("float32") + np.arange(2, dtype="float32")[:, None, None]
    params, state = bnjax.bn_init(3)
    call = jax.vmap(lambda x: bnjax.bn_apply(params, state, x, True, axis_name="i", momentum=0.0)[1], axis_name="i")
    var = call(x).var[0]
    np.testing.assert_allclose(var, x.var(1).mean(0) + x.mean(1).var(0), rtol=1e-4)
    np.testing.assert_allclose(var, (x**2).mean(1).mean(0) - x.mean((0, 1)) ** 2, rtol=1e-4)


class Derived(bnjax.linen.BatchNorm):
    """A class whose argument is the opposite of Flax's, in its place."""

    @nn.compact
    def __call__(self, x, is_training):
        return super().__call__(x, use_running_average=not is_training)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, is_training):
        x = Derived(name="norm")(nn.Dense(4)(x), is_training)
        return bnjax.linen.BatchNorm(use_running_average=not is_training)(nn.Dense(4)(x))


def test_a_derived_class_is_left_by_name_and_its_arguments_are_not_read():
    x = np.ones((5, 3), np.float32)
    variables = Network().init(jax.random.key(0), x, False)
    report = bnjax.linen.fold_model(Network(), variables, x, False)[1].report
    assert report.folded == [("Dense_1", "BatchNorm_0")]
    assert report.unfolded["norm"].startswith("Derived is none of")
