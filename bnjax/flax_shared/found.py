"""What `convert` finds in a model, and what it reports about layers that it does not convert."""

import inspect
import warnings
from dataclasses import dataclass, field

from bnjax.flax_shared.conversion import Conversion


@dataclass
class Found:
    """The layers that a conversion found, by path; `waiting` are the Linen parts of the model not called so far."""

    model: str
    conversion: Conversion
    layers: dict[str, bool] = field(default_factory=dict[str, bool])  # whether it is converted
    left: dict[str, str] = field(default_factory=dict[str, str])  # what could not be converted, and why
    waiting: set[tuple[str, ...]] = field(default_factory=set[tuple[str, ...]])
    told: set[str] = field(default_factory=set[str])

    def leave(self, path: str, reason: str) -> None:
        """Note a layer that cannot be converted, unless `where` leaves it out."""
        if self.conversion.converts(path):
            self.left[path] = reason

    def tell(self, *, everything: bool) -> None:
        """Warn of layers that cannot be converted and, if `everything` was found, of a conversion without effect.

        Raises:
          ValueError: if everything was found and `where` matches no layer.
        """
        left = {path: reason for path, reason in self.left.items() if path not in self.told}
        named = "; ".join(f"{path or 'the model itself'!r}: {reason}" for path, reason in left.items())
        if everything and self.conversion.where is not None and not any(self.layers.values()):
            paths = ", ".join(repr(path) for path in sorted(self.layers))
            has = f"Its layers are: {paths}." if paths else "It has no BatchNorm layer of Flax or bnjax."
            has += f" Layers that cannot be converted: {named}." if named else ""
            raise ValueError(f"convert(where=...): where matches no layer of {self.model}. {has}")
        nothing = everything and not self.layers
        if not (nothing or left):
            return
        self.told.update(left)
        message = f"convert(model={self.model}): " + "nothing was converted. " * nothing
        if left:
            message += (
                f"These layers stay as they are: {named}. Use a BatchNorm layer of Flax or bnjax in their place, or "
                "leave them out by where=, which silences this warning."
            )
        else:
            message += "The model has no BatchNorm layer of Flax or bnjax."
        warnings.warn(message, stacklevel=_users_frame())


def _users_frame() -> int:
    """The `stacklevel`, for the caller, of the first frame outside the libraries."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level


_LIBRARIES = {"bnjax", "contextlib", "flax", "functools", "jax"}
