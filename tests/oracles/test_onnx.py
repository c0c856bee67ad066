"""bnjax against the reference evaluator of ONNX, which has no gradients; channels come first.

Not compared: half precisions, in which the evaluator takes the moments too.
"""

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

import bnjax
from tests.oracles.layers import BIAS, FEATURES, FIRST, SCALE, Seen, affine, compare, ours


class OnnxLayer:
    """A model of one BatchNormalization for training and one for evaluation."""

    def __init__(self, shape, dtype, **attributes):
        self.evaluators = {train: evaluator(shape, dtype, train, **attributes) for train in (True, False)}
        self.scale, self.bias = SCALE.astype(dtype), BIAS.astype(dtype)
        self.mean, self.var = np.zeros(FEATURES, dtype), np.ones(FEATURES, dtype)

    def __call__(self, x, cotangent, train):
        values = np.asarray(x), self.scale, self.bias, self.mean, self.var
        y, *updated = self.evaluators[train].run(None, dict(zip(INPUTS, values, strict=True)))
        if train:
            self.mean, self.var = updated
        return Seen(y, None, None, None, self.mean, self.var)


INPUTS = ("x", "scale", "bias", "mean", "var")
FIELDS = ("output", "mean", "var")


def evaluator(shape, dtype, train, **attributes):
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    outputs = ["y", "running_mean", "running_var"] if train else ["y"]
    node = helper.make_node("BatchNormalization", INPUTS, outputs, training_mode=int(train), **attributes)
    shapes = dict.fromkeys((*INPUTS, *outputs), (FEATURES,)) | {"x": shape, "y": shape}
    infos = {name: helper.make_tensor_value_info(name, element, shapes[name]) for name in shapes}
    graph = helper.make_graph([node], "layer", [infos[name] for name in INPUTS], [infos[name] for name in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
    onnx.checker.check_model(model, full_check=True)
    return ReferenceEvaluator(model)


def converted(dtype, momentum=0.9, epsilon=1e-5):
    """Attributes of ONNX are float32, in a model of float64 too."""
    _, state = bnjax.bn_init(FEATURES, dtype=dtype)
    momentum, epsilon = (float(np.float32(v)) for v in (momentum, epsilon))
    return ours(affine(dtype), state, axis=1, momentum=momentum, epsilon=epsilon)


@pytest.mark.parametrize("shape", FIRST, ids=str)
def test_bn_apply_matches_onnx_in_every_layout(agree, dtype, shape):
    compare(agree, converted(dtype), OnnxLayer(shape, dtype), shape, dtype, fields=FIELDS)


@pytest.mark.parametrize(
    "options", [{"momentum": 0.0}, {"momentum": 0.5, "epsilon": 1.0}, {"momentum": 0.99, "epsilon": 1e-3}], ids=str
)
def test_bn_apply_matches_onnx_with_options(agree, x64, options):
    compare(agree, converted(x64, **options), OnnxLayer(FIRST[2], x64, **options), FIRST[2], x64, fields=FIELDS)
