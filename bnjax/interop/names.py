"""Layers that have the same name in two models, for `match.py`.

A name is read as its words and numbers: "layer1.0.bn2", "layer1/0/bn2" and "layer1_0/bn2" are the same, and a wrapper's
prefix ("module.", "backbone/") is not part of a name. A number is comparable only if both models count alike: "conv1"
is not "conv1" if one model has conv1 and conv2, and the other conv0 and conv1. Numbers in automatic names ("conv2d_1"
in Keras, "Conv_0" in Flax, "3" in PyTorch's Sequential) count everything that was made before.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

Words = tuple[str | int, ...]

_HIDDEN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # inserted anywhere in a name
_WRAPPERS = {"module", "model", "backbone", "net", "network"}
_KERAS = (  # names that Keras gives to layers without one
    r"((depthwise_|separable_)?conv[123]d(_transpose)?|dense|einsum_dense|embedding|rms_normalization|"
    r"(batch|layer|group|unit|spectral)_normalization|sequential|functional)(_\d+)?"
)
_FLAX = r"layers_\d+|[A-Z]\w*_\d+"
_AUTOMATIC = re.compile(rf"\d+|{_FLAX}|{_KERAS}")  # a part of a name that no one chose
_KINDS = ({"bn", "norm", "ln", "gn"}, {"fc", "dense", "linear"})  # words for the same kinds of layers
_ALIKE = {"kernel": "weight", "scale": "weight", "embedding": "weight", "gamma": "weight", "beta": "bias"}


class Names(NamedTuple):
    """The names of two models' layers in words, by name, and what their equality means."""

    theirs: dict[str, Words]
    ours: dict[str, Words]
    same: dict[str, str]  # by their name, our name that certainly means the same
    doubtful: dict[str, str]  # by their name, our equal name, whose number may count other layers

    def crossed(self, first: tuple[str, str], second: tuple[str, str]) -> bool:
        """Whether two pairs of names contradict each other: they count in opposite directions, as bn1 with bn2 and bn2
        with bn1, or the words that distinguish them are swapped, as q_proj with key and k_proj with query."""
        if re.fullmatch(_KERAS, re.split("[./]", first[0])[-1]):
            return False
        (t, o), (t2, o2) = ((self.theirs[t], self.ours[o]) for t, o in (first, second))
        own = [[{w.lower() for w in words if isinstance(w, str)} for words in side] for side in ((t, t2), (o, o2))]
        (their, their2), (our, our2) = ((a - b, b - a) for a, b in own)
        if _any_alike(their, our2) and _any_alike(their2, our):
            return not _any_alike(their, our) and not _any_alike(their2, our2)
        theirs, ours = _counted(t, t2), _counted(o, o2)
        if theirs is None or ours is None:
            return False
        (stem, number, number2), (own_stem, own_number, own_number2) = theirs, ours
        if stem != own_stem:  # then numbers mean the same only if both were chosen, and for layers of one sort
            sides = zip((rf"\d+|{_KERAS}", rf"\d+|{_FLAX}"), first, second, strict=True)
            automatic = any(re.fullmatch(pattern, part) for pattern, a, b in sides for part in _differing(a, b))
            if automatic or not stem or not own_stem or not _alike(*(str(w[-1]).lower() for w in (stem, own_stem))):
                return False
        return (number - number2) * (own_number - own_number2) < 0


def compare(theirs: Sequence[str], ours: Sequence[str], tensors: Iterable[str] = ()) -> Names:
    """Compare the names of two models' layers.

    Args:
      theirs, ours: the names; parts are separated by "." or "/".
      tensors: names among them of arrays, "block/scale", and not of layers, "block".
    """
    tensors = set(tensors)
    readings = []
    for strip in (list, _unwrapped, _without_common):
        sides = []
        for names in (theirs, ours):
            parts = [[part for part in re.split("[./]", name) if part] for name in names]
            for name, own in zip(names, parts, strict=True):
                if name in tensors and own:
                    own[-1] = _ALIKE.get(own[-1], own[-1])
            sides.append(dict(zip(names, strip(parts), strict=True)))
        readings.append(sides)
    words, parts = max(
        (([{name: _words(own) for name, own in side.items()} for side in sides], sides) for sides in readings),
        key=lambda reading: len(_equal(*reading[0])),
    )
    counted = [_numbers(side.values()) for side in words]
    same, doubtful = {}, {}
    for their, our in _equal(*words).items():
        stems = _stems(words[0][their])
        numbers = [(counted[0].get(stem, set()), counted[1].get(stem, set())) for stem in stems]
        automatic = any(_AUTOMATIC.fullmatch(part) for part in (*parts[0][their], *parts[1][our]))
        if all(a == b for a, b in numbers):
            same[their] = our
        elif not automatic and all(a <= b or b <= a for a, b in numbers):
            doubtful[their] = our
    return Names(words[0], words[1], same, doubtful)


def _counted(first: Words, second: Words) -> tuple[Words, int, int] | None:
    """What precedes the numbers of two names that differ only in these, and the numbers."""
    places = [i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]]
    if len(first) != len(second) or len(places) != 1:
        return None
    a, b = (words[places[0]] for words in (first, second))
    return (first[: places[0]], a, b) if isinstance(a, int) and isinstance(b, int) else None


def _differing(first: str, second: str) -> set[str]:
    """The parts that only one of two names has."""
    return set(re.split("[./]", first)) ^ set(re.split("[./]", second))


def _alike(first: str, second: str) -> bool:
    """Whether two words may mean the same: q and query, norm and batchnorm, fc and dense."""
    for a, b in ((first, second), (second, first)):
        if a.startswith(b) or a.endswith(b):
            return True
    return any({first, second} <= kind for kind in _KINDS)


def _any_alike(first: Iterable[str], second: Collection[str]) -> bool:
    return any(_alike(a, b) for a in first for b in second)


def _words(parts: Sequence[str]) -> Words:
    found = re.findall(r"\d+|[^\d_\W]+", "/".join(parts))
    return tuple(int(word) if word.isdigit() else word for word in found)


def _equal(theirs: Mapping[str, Words], ours: Mapping[str, Words]) -> dict[str, str]:
    """By their name, our equal name, if no other name of either model equals it."""
    by_words: dict[Words, tuple[list[str], list[str]]] = {}
    for i, side in enumerate((theirs, ours)):
        for name, words in side.items():
            by_words.setdefault(words, ([], []))[i].append(name)
    return {t[0]: o[0] for words, (t, o) in by_words.items() if len(t) == len(o) == 1 and words}


def _stems(words: Words) -> list[Words]:
    """What precedes each number of a name, and the name itself, which others may continue with a number."""
    return [words[:i] for i, word in enumerate(words) if isinstance(word, int)] + [words]


def _numbers(names: Iterable[Words]) -> dict[Words, set[int | None]]:
    """By stem, the numbers that follow it in a model's names, None for a name that ends there."""
    numbers: dict[Words, set[int | None]] = {}
    for words in names:
        for stem in _stems(words):
            after = words[len(stem)] if len(stem) < len(words) else None
            numbers.setdefault(stem, set()).add(after if isinstance(after, int) else None)
    return numbers


def _unwrapped(names: list[list[str]]) -> list[list[str]]:
    found = []
    for parts in names:
        parts = [part for part in parts[:-1] if part not in _HIDDEN] + parts[-1:]
        while len(parts) > 1 and (parts[0] in _WRAPPERS or re.fullmatch(r"(sequential|functional)(_\d+)?", parts[0])):
            parts = parts[1:]
        found.append(parts)
    return found


def _without_common(names: list[list[str]]) -> list[list[str]]:
    names = [[part for part in parts[:-1] if part not in _HIDDEN] + parts[-1:] for parts in names]
    common = 0
    while len({tuple(parts[: common + 1]) for parts in names}) == 1 and all(len(parts) > common + 1 for parts in names):
        common += 1
    return [parts[common:] for parts in names]
