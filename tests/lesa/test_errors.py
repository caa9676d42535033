"""What a worker refuses arrives at whoever started it: message, class and the list of problems."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil

import pytest

import lesa
from lesa.bundle.manifest import BundleError
from lesa.errors import LesaError
from lesa.params_file import ParamsError
from lesa.pull import PullError
from lesa.recording.prompts import PromptError
from lesa.recording.store_format import StoreError
from lesa.sampling.checks import MismatchError
from lesa.sampling.clock import ForeignCallError
from lesa.sampling.hook_registry import HookError
from lesa.strict_json import StrictJsonError

MADE = [
    LesaError("no"),
    BundleError("folder", ["channels: missing", "sigmas: missing"]),
    ForeignCallError("its timestep is 3"),
    HookError("silenced"),
    MismatchError("the pipeline does not fit", ["height: got 8, expected 16"]),
    ParamsError("params.yaml", ["a: missing", "b: unknown key"]),
    PromptError("prompts: line 1 is empty"),
    PullError("no registry"),
    StoreError("trajectory 0: wrong checksum"),
    StrictJsonError("not JSON"),
]


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("copied", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])  # noqa: S301
def test_a_refusal_survives_the_way_between_processes(error, copied):
    error.add_note("while testing")
    again = copied(error)
    assert type(again) is type(error) and isinstance(again, ValueError)
    assert str(again) == str(error) and again.args == error.args
    assert vars(again) == vars(error)
    assert getattr(again, "problems", None) == getattr(error, "problems", None)
    assert again.__notes__[-1] == "while testing"


def test_every_refusal_of_another_shape_is_among_them():
    for module in pkgutil.walk_packages(lesa.__path__, "lesa."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def below(kind: type) -> set[type]:
        return {kind}.union(*(below(each) for each in kind.__subclasses__()))

    ours = {kind for kind in below(LesaError) if kind.__module__.startswith("lesa.")}
    of_their_own = {kind for kind in ours if "__init__" in vars(kind)}
    assert of_their_own <= {type(error) for error in MADE}
