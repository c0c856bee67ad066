"""The report of a conversion where variables belong."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnjax
import bnjax.linen
from bnjax import interop, training

pytestmark = pytest.mark.usefixtures("flax_promotion")


def test_a_report_where_variables_belong_is_refused_with_the_way_to_take_it_apart():
    x = jnp.arange(8.0).reshape(4, 2)
    model = nn.Sequential([bnjax.linen.BatchNorm(use_running_average=False)])
    state_dict = {"bn.weight": np.ones(2), "bn.bias": np.zeros(2)}
    state_dict |= {"bn.running_mean": np.zeros(2), "bn.running_var": np.ones(2)}
    old = model.init(jax.random.key(0), x)
    pair = interop.from_torch_model(state_dict, old, model=model, inputs=x)
    named = interop.from_torch_model(state_dict, old, {"bn": "layers_0"})
    advice = r"Take them apart, variables, report = from_torch_model\(...\), and pass the variables"
    for wrong, got in (
        (pair, "the variables of a conversion and its report"),
        (named, "the variables of a conversion and its report"),
        (pair[1], "the report of a conversion"),
        (named[1], "the report of a conversion"),
    ):
        message = rf"=...\): got {got}\. {advice}"
        for name in "params", "batch_stats", "cache":
            given = {"params": old["params"], "batch_stats": old["batch_stats"], name: wrong}
            with pytest.raises(TypeError, match=rf"^TrainState.create\({name}{message}"):
                training.TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.1), **given)
        with pytest.raises(TypeError, match=rf"^recalibrate\(variables{message}"):
            bnjax.recalibrate(model.apply, wrong, [x])
        with pytest.raises(TypeError, match=rf"^fold_model\(variables{message}"):
            bnjax.linen.fold_model(model, wrong, x)
        for to_model in interop.to_torch_model, interop.to_keras_model:
            with pytest.raises(TypeError, match=rf"^{to_model.__name__}\(variables{message}"):
                to_model(wrong, **{"state_dict" if to_model is interop.to_torch_model else "weights": {}}, model=model)
        state = training.TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.1), **pair[0])
        for step in training.train_step, training.eval_step:
            with pytest.raises(TypeError, match=rf"^{step.__name__}\(...\)\(state.batch_stats\): got {got}\. {advice}"):
                step(lambda model, batch, train: 0.0)(state.replace(batch_stats=wrong), x)
        with pytest.raises(TypeError, match=rf"^diagnose\(batch_stats{message}"):
            bnjax.diagnose(old["params"], wrong)
        with pytest.raises(TypeError, match=rf"^diagnose\(params{message}"):
            bnjax.diagnose(wrong, old["batch_stats"])
    for variables, _ in (pair, named):
        state = training.TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.1), **variables)
        mean = bnjax.recalibrate(model.apply, variables, [x])["batch_stats"]["layers_0"]["mean"]
        np.testing.assert_allclose(mean, [3, 4])
        np.testing.assert_array_equal(state.batch_stats["layers_0"]["var"], 1)
