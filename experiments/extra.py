"""What to install where a package that the experiments import is missing."""

_BENCH = ("equinox", "haiku", "keras", "torch")


def message(error: ModuleNotFoundError) -> str:
    """The line that says what to install; an error about a module of this repository is raised again."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "bnjax", "experiments"):
        raise error
    extra = "bench" if package in _BENCH else "experiments"
    return f"error: the experiments need {package}, which is not installed. Run: pip install '.[{extra}]'"
