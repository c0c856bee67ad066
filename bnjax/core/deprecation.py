"""Old names of public functions. Each works for one version and says what replaces it."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any


def aliases(module: str, renamed: Mapping[str, Any]) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose functions have new names; `renamed` has the functions by their old names."""

    def deprecated(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = renamed[name]
        new = f"{module}.{value.__name__}"
        warnings.warn(f"{module}.{name} is deprecated: it is {new} now.", DeprecationWarning, stacklevel=2)
        return value

    return deprecated
