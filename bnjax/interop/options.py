"""The options of PyTorch's and Keras's layers compared with the options of the Flax layers that get their weights.

Two convolutions agree if they read the same elements, which depends on the size of the input: with stride 2 "SAME" pads
an image of size 8 by (0, 1) and one of size 7 by (1, 1). Layers whose class overrides the computation are not read.
"""

from math import isclose
from typing import Any

from jax import lax

from bnjax.interop.kernels import TENSOR, TORCH, Layer, Library
from bnjax.interop.match import Pairs
from bnjax.interop.readers import Convolution, Normalization, Unread, read_flax, read_keras, read_torch


def compare(call: str, library: Library, model: Any, pairs: Pairs, verified: bool = False) -> tuple[str, ...]:
    """Raise an error if the options of paired layers differ. Return in words what was not compared.

    Args:
      call: the function called, for errors.
      library: the other library.
      model: its model, or only arrays, which have no options.
      pairs: the layers that belong together, with the moves of their arrays.
      verified: whether the outputs of the models are known to be equal, so that no difference matters.
    """
    differ, unread = differences(library, model, pairs)
    if differ and not verified:
        more = f", and {len(differ) - 5} more" if len(differ) > 5 else ""
        alone = "model.state_dict()" if library is TORCH else "[(w.path, w) for w in model.weights]"
        expected = " pass expected=, the outputs for these inputs, or" if call.startswith("from") else ""
        raise ValueError(
            f"{call}({library.argument}=...): options of layers differ: {'; '.join(differ[:5])}{more}. Give "
            f"Flax's layers the options of {library.name}'s. If the models compute the same in another way,{expected} "
            f"pass {library.argument}={alone}, which has no options."
        )
    return tuple(unread)


def differences(library: Library, model: Any, pairs: Pairs) -> tuple[list[str], list[str]]:
    """The options in which paired layers differ, and what was not compared, in words. The arguments are those of
    `compare`."""
    differ, unread = [], []
    if hasattr(model, "named_modules"):
        theirs = read_torch(model)
    elif hasattr(model, "_flatten_layers"):
        theirs = read_keras(model)
    else:
        return [], []
    for (layer, ours, _), _ in pairs:
        if ours.sort == TENSOR or ours.called.module is None:
            continue
        their = theirs.get(layer.name, Unread("no layer has this name"))
        our = read_flax(ours.called.module, ours.shapes())
        names = f"{library.name}'s {layer.name!r}", f"{ours.name!r}"
        unknown = [
            f"{name} ({side.why})" for name, side in zip(names, (their, our), strict=True) if type(side) is Unread
        ]
        unread += unknown
        if isinstance(their, Convolution) and isinstance(our, Convolution):
            found = _convolutions(their, our, ours)
            if found and found[0] == "padding" and (their.unsure or ours.called.padded or our.padding == "CAUSAL"):
                unread.append(f"the padding of {names[0]} and {names[1]} (the input may be padded outside them)")
            elif found:
                option, a, b = found
                differ.append(f"{names[0]} has {option} {a}, {names[1]} has {b}")
        elif isinstance(their, Normalization) and isinstance(our, Normalization):
            differ += [f"{names[0]} has {a}, {names[1]} has {b}" for a, b in _normalizations(their, our, ours)]
    return differ, unread


def _convolutions(theirs: Convolution, ours: Convolution, layer: Layer):
    """The first option in which convolutions differ: its name and both values."""
    kernel = layer.shapes()["kernel"][:-2]
    transposed = layer.called.kind.startswith("transposed")
    if theirs.groups != ours.groups:
        return "groups", theirs.groups, f"feature_group_count={ours.groups}"
    if any(d != 1 for d in ours.input_dilation):
        return "input_dilation", 1, f"input_dilation={tuple(ours.input_dilation)}"
    if any(k > 1 and a != b for k, a, b in zip(kernel, theirs.dilation, ours.dilation, strict=True)):
        return "dilation", tuple(theirs.dilation), f"kernel_dilation={tuple(ours.dilation)}"
    windows = [(k - 1) * d + 1 for k, d in zip(kernel, ours.dilation, strict=True)]
    for shape in layer.called.shapes:
        size = shape[-1 - len(kernel) : -1]
        pads = [_padding(side, size, windows, transposed) for side in (theirs, ours)]
        reads = [
            [_reads(*axis, transposed) for axis in zip(size, pad, windows, side.strides, strict=True)]
            for pad, side in zip(pads, (theirs, ours), strict=True)
        ]
        strides = zip(theirs.strides, ours.strides, *reads, strict=True)
        if any(a != b and max(reads_a[1], reads_b[1]) > 1 for a, b, reads_a, reads_b in strides):
            return "strides", tuple(theirs.strides), f"strides={tuple(ours.strides)}"
        if [read[:2] for read in reads[0]] != [read[:2] for read in reads[1]]:
            words = [
                f"{side.padding!r}, which is {pad} for an input of {tuple(size)}"
                if isinstance(side.padding, str)
                else pad
                for side, pad in zip((theirs, ours), pads, strict=True)
            ]
            return "padding", words[0], f"padding={words[1]}"
        if theirs.mode != ours.mode and any(used for side in reads for *_, used in side):
            return "padding mode", theirs.mode, ours.mode
    return None


def _padding(side: Convolution, size, windows, transposed):
    """The padding before and after each axis of an input of this size, as Flax pads."""
    if not isinstance(side.padding, str):
        return [tuple(pair) for pair in side.padding]
    if transposed:
        return [_transposed(window, s, side.padding) for window, s in zip(windows, side.strides, strict=True)]
    if side.padding == "CAUSAL":
        return [(window - 1, 0) for window in windows]
    if side.padding in ("CIRCULAR", "REFLECT"):
        return [((window - 1) // 2, window // 2) for window in windows]
    return [(int(low), int(high)) for low, high in lax.padtype_to_pads(size, windows, side.strides, side.padding)]


def _transposed(window, stride, padding):
    """The padding of the dilated input in `lax.conv_transpose`."""
    total = window + stride - 2 + (max(window - stride, 0) if padding == "VALID" else 0)
    low = window - 1 if padding == "VALID" else min(-(-total // 2), window - 1)
    return low, total - low


def _reads(size, padding, window, stride, transposed):
    """The padding before an axis, the size of the output, and whether any padding is read. Padding at the end of an
    axis that is not read makes no difference."""
    low, high = padding
    if transposed:
        return low, (size - 1) * stride + 2 + low + high - window, False
    out = (size + low + high - window) // stride + 1
    return low, out, low > 0 or low + size < (out - 1) * stride + window


def _normalizations(theirs: Normalization, ours: Normalization, layer: Layer):
    flat = all(
        len(shape) == 2 for shape in layer.called.shapes
    )  # without pixels, one group holds all of a layer's features
    kinds = ["layer" if flat and (side.kind, side.groups) == ("group", 1) else side.kind for side in (theirs, ours)]
    if kinds[0] != kinds[1]:
        yield f"a {kinds[0]} normalization", f"a {kinds[1]} normalization"
    elif kinds[0] == "group" and theirs.groups != ours.groups:
        yield f"{theirs.groups} groups", f"num_groups={ours.groups}"
    if not isclose(theirs.epsilon, ours.epsilon, rel_tol=1e-6):
        yield f"epsilon {theirs.epsilon:g}", f"epsilon={ours.epsilon:g}"
