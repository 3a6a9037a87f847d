"""What importing the packages loads, and the import paths of the last version."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest

import t2
from t2 import _renamed

LAYERS = "import t2.weights, t2.experts, t2.tasks, t2.model, t2.generation, t2.adaptation"
STRATEGIES = "from t2.adaptation import ClassifierStrategy, FewShotStrategy, PromptStrategy"
ATTRIBUTES = "t2.transfer.transfer, t2.tasks.get, t2.adaptation.two_pass, t2.training.Trainer, t2.eval.document"


@pytest.fixture(scope="module")
def loaded() -> list[set[str]]:
    """The modules that a new process has after `import t2`, its packages up to adaptation, and attributes of `t2`."""
    show = "print(*sys.modules)"
    code = f"import sys, t2; {show}; {LAYERS}; {STRATEGIES}; {show}; {ATTRIBUTES}; {show}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [set(line.split()) for line in run.stdout.splitlines()]


def test_importing_t2_is_light(loaded):
    assert not {"torch", "transformers", "t2kernels", "t2.model", "t2.training"} & loaded[0]


def test_inference_and_adaptation_load_no_trainer(loaded):
    assert not {"t2.cli", "t2.demo", "t2.eval", "t2.training"} & loaded[1]


def test_packages_are_attributes_of_t2(loaded):
    assert {"t2.experts.transfer", "t2.tasks.registry", "t2.training.trainer", "t2.eval"} <= loaded[2]


def test_all_public_names_resolve():
    for name in t2.__all__:
        assert getattr(t2, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        t2.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("package", "old", "new"), [("training", "Result", "TrainResult"), ("sandbox", "Result", "ProgramResult")]
)
def test_old_class_names_resolve_with_a_warning(package, old, new):
    module = importlib.import_module(f"t2.{package}")
    with pytest.warns(DeprecationWarning, match=f"t2.{package}.{old} is now t2.{package}.{new}"):
        assert getattr(module, old) is getattr(module, new)


@pytest.mark.parametrize("old", _renamed.MODULES)
def test_old_paths_resolve_with_a_warning(old):
    module = importlib.import_module(old)
    for home in _renamed.MODULES[old]:
        new = importlib.import_module(home)
        names = [name for name, value in vars(new).items() if getattr(value, "__module__", None) == new.__name__]
        public = next((name for name in names if not name.startswith("_")), None)
        if public is None:  # a package, whose names are imported when they are first used
            public = next(name for name in dir(new) if not name.startswith("_"))
        with pytest.warns(DeprecationWarning, match=rf"{old}\.{public} is now t2\."):
            assert getattr(module, public) is not None
    with pytest.raises(AttributeError, match="its names are in"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("old", sorted(_renamed.NAMES))
def test_old_names_of_classes_resolve_with_a_warning(old):
    new = _renamed.NAMES[old]
    paths = []
    for path, homes in _renamed.MODULES.items():
        if any(hasattr(importlib.import_module(home), new) for home in homes):
            with pytest.warns(DeprecationWarning, match=f"{path}.{old} is now t2.*{new}"):
                assert getattr(importlib.import_module(path), old).__name__ == new
            paths.append(path)
    assert paths, f"no old module has {old}"


def test_new_paths_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for name in ("SVFModel", "Expert", "load", "load_svf", "SVFConfig"):
            getattr(t2, name)
