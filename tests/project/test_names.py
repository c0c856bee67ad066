"""Names that are looked for in the wrong place, and packages that are not installed."""

import importlib
import runpy
import sys

import pytest

import bnjax
from experiments import __main__ as program


@pytest.mark.parametrize("module", ["linen", "nnx", "training", "interop"])
def test_a_name_of_a_submodule_is_an_attribute_error_that_says_where_it_is(module):
    names = bnjax._ELSEWHERE[module].split()  # pyright: ignore[reportPrivateUsage]
    public = set(importlib.import_module(f"bnjax.{module}").__all__)
    assert set(names) <= public
    elsewhere = {name for name in public if name.endswith(("Norm", "LSTM", "Cell", "_model"))}
    assert elsewhere <= {*names, *bnjax.__all__}
    for name in names:
        assert not hasattr(bnjax, name)
        with pytest.raises(AttributeError, match=rf"bnjax\.{module}\.{name} after `import bnjax\.{module}`"):
            getattr(bnjax, name)


@pytest.mark.parametrize("module", ["linen", "nnx", "training"])
def test_a_submodule_that_is_not_imported_says_so(module, monkeypatch):
    importlib.import_module(f"bnjax.{module}")
    monkeypatch.delattr(bnjax, module)
    with pytest.raises(AttributeError, match=rf"Write `import bnjax\.{module}`, which needs Flax: pip install 'bnjax"):
        getattr(bnjax, module)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'bnjax' has no attribute 'nonsense'$"):
        _ = bnjax.nonsense


@pytest.mark.parametrize("package", ["tyro", "flax"])
def test_the_experiments_without_a_package_say_what_to_install(package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("experiments", package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"the experiments need {package}, .*pip install '\.\[experiments\]'"):
        runpy.run_module("experiments", run_name="__main__")


def test_an_experiment_that_misses_a_package_says_what_to_install(monkeypatch, capsys):
    def missing(args):
        raise ModuleNotFoundError("No module named 'keras'", name="keras.layers")

    monkeypatch.setattr(program, "_commands", missing)
    assert program.main([]) == 2
    assert "need keras, which is not installed. Run: pip install '.[bench]'" in capsys.readouterr().err

    def broken(args):
        raise ModuleNotFoundError("No module named 'experiments.none'", name="experiments.none")

    monkeypatch.setattr(program, "_commands", broken)
    with pytest.raises(ModuleNotFoundError, match=r"experiments\.none"):
        program.main([])
