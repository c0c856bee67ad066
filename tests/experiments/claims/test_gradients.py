"""Gradients: the probe by the chain rule in float64, Yang et al.'s law, and the verdict from given curves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import gradients
from experiments.harness import data, lab, runs, train
from experiments.models import networks

IMAGES = data.digits().train_images[:60].reshape(60, -1)
LABELS = data.digits().train_labels[:60]
VIEW = train.View(jnp.asarray(IMAGES), jnp.asarray(LABELS), {}, jnp.asarray(IMAGES), jnp.asarray(LABELS))


def probed(depth, width, batch_norm, scale=1.0):
    network = networks.mlp(data.digits(), [width] * depth, batch_norm)
    params, state = network.init(jax.random.key(0), scale=scale)
    return params, jax.jit(gradients.gradient_norms(network, width, depth))(params, state, VIEW)


def slope(norms, depth):
    """Decades a layer towards the output, by least squares over the recorded layers."""
    return np.polyfit(gradients.recorded(depth), np.log10(norms), 1)[0]


def test_norms_of_the_plain_network_match_the_chain_rule():
    params, found = probed(3, 7, False)
    kernels = [np.float64(layer["kernel"]) for layer in params]
    outputs = [np.float64(IMAGES)]
    for kernel in kernels[:-1]:
        outputs.append(np.maximum(outputs[-1] @ kernel, 0))
    logits = outputs[-1] @ kernels[-1]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradient = (shares - np.eye(10)[LABELS]) / len(LABELS) @ kernels[-1].T
    norms = []
    for kernel, output in zip(kernels[-2::-1], outputs[::-1], strict=False):
        norms.insert(0, np.linalg.norm(gradient))
        gradient = gradient * (output > 0) @ kernel.T
    assert len(norms) == 3
    np.testing.assert_allclose(found["gradient_norm"], norms, rtol=1e-4)
    np.testing.assert_allclose(found["range"], np.log10(max(norms) / min(norms)), rtol=1e-3)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == LABELS).mean())


def test_lecun_is_he_at_the_scale_of_its_arm():
    kernel = np.ones((8, 2), np.float32)
    np.testing.assert_allclose(networks.he(kernel) * gradients.ARMS["plain, LeCun"], networks.lecun(kernel), rtol=1e-6)


def test_plain_gradients_vanish_by_half_their_square_for_each_layer_with_lecun_and_not_with_he():
    """He et al. (2015, section 2.2): the variance of the gradient changes by inputs * variance of the weights / 2."""
    he, lecun = (
        slope(probed(12, 100, False, gradients.ARMS[name])[1]["gradient_norm"], 12)
        for name in ("plain, He", "plain, LeCun")
    )
    assert lecun - he == pytest.approx(-np.log10(0.5**0.5), abs=0.01)
    assert abs(he) < 0.03


def test_normalized_gradients_explode_as_yang_et_al_derive():
    np.testing.assert_allclose(10**gradients.YANG, 1.21, atol=0.002)
    _, found = probed(12, 100, True)
    assert -slope(found["gradient_norm"], 12) == pytest.approx(gradients.YANG, abs=0.02)


def test_a_gradient_that_underflows_has_no_range():
    _, found = probed(12, 100, False, 1e-6)
    assert found["gradient_norm"][0] == 0
    assert np.isnan(found["range"])


def test_effects_are_the_changes_over_all_layers_at_initialization_and_once_trained(tmp_path):
    record, depth = runs.Record(tmp_path / "metrics.jsonl"), 5
    shown = len(gradients.recorded(depth))
    for arm in gradients.ARMS:
        for rate in (0.01, 0.1, 1):
            record.add(lab.tuning(f"{arm}, 5", rate), 900, [0, 9], {"loss": [0.5 + abs(rate - 0.1)] * 2})
        for seed in (1000, 1001):
            never = seed == 1001 and arm != "plain, LeCun"  # it counts at its highest accuracy
            values = {
                "accuracy": [0.1, 0.5, 0.89 if never else 0.9, 0.8],
                "range": [0.5, 0.3, 0.1 * (seed - 999), 9.0],  # at the third evaluation
                "gradient_norm": np.ones((4, shown)),
            }
            record.add(lab.at(f"{arm}, 5", 0.1), seed, [0, 10, 20, 30], values)
    finding = gradients.Gradients(seeds=2, depths=(5,)).judge(record.metrics([900, 1000, 1001], 10))
    np.testing.assert_allclose(finding.effects["5 layers, at initialization"], [0.5, 0.5])
    np.testing.assert_allclose(finding.effects["5 layers, trained"], [0.1, 0.2])
    assert np.isnan(finding.effects["50 layers, trained"]).all()
    assert finding.remarks == {"5 layers, trained": ""}
    assert finding.table[2][:5] == ["plain, He", "5", "0.50 ± 0.00", "0.10 (1 of 2)", "20 (1 of 2)"]
    assert {*finding.effects} == {part.name for part in gradients.Gradients.PARTS}


def test_rejects_depths_without_a_part():
    with pytest.raises(data.InputError, match=r"depths=\(7,\): expected some of"):
        gradients.Gradients(depths=(7,))
