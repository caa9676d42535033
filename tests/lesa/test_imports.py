"""What a sampler needs to have installed, and how long it waits for it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# As if never installed: libraries that ask whether a package is there must hear no, not an error.
BLOCKER = """
import sys
from importlib.machinery import PathFinder
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        blocked = name.split(".")[0] in {blocked!r}
        return None if blocked else self.finder.find_spec(name, path, target)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
"""
ORCHESTRATION = ("prefect", "ray", "dvc", "mlflow")
PIPELINE = (*ORCHESTRATION, "kan", "zarr", "numcodecs", "matplotlib", "sklearn", "pandas")


def python(code: str, *arguments: str, blocked: tuple[str, ...] = ()) -> str:
    """Standard output of `code` in a fresh interpreter where `blocked` packages cannot be imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")} | {
        "PYTHONPATH": str(ROOT)
    }
    result = subprocess.run(
        [sys.executable, "-c", BLOCKER.format(blocked=blocked) + code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def modules() -> list[str]:
    found = []
    for path in sorted((ROOT / "lesa").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not name.endswith("__main__"):
            found.append(name.removesuffix(".__init__"))
    return found


def test_no_module_of_lesa_needs_orchestration():
    code = f"import importlib\nfor name in {modules()!r}:\n    importlib.import_module(name)\nprint('all')"
    assert "all" in python(code, blocked=ORCHESTRATION)


def test_the_direction_is_flows_to_lesa():
    for path in (ROOT / "lesa").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top != "flows", path
                assert top not in ORCHESTRATION or (top == "mlflow" and path.name == "pull.py"), path


def test_nothing_on_a_read_path_runs_code():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for path in (ROOT / "lesa").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, path
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "torch.load", "torch.save", "__import__"), (path, name)


def test_enabling_and_sampling_need_torch_and_diffusers_alone(tmp_path):
    """The core as an installation without extras gives it: make the bundle here, use it in a bare process."""
    from tests.helpers.bundles import make_bundle
    from tests.helpers.tiny import tiny_flux

    pipe = tiny_flux(tmp_path / "pipeline")
    make_bundle(pipe, tmp_path / "bundle")
    code = """
import sys
import lesa, torch
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained(sys.argv[1])
lesa.enable(pipe, sys.argv[2])
pipe("a thin seven", generator=torch.Generator().manual_seed(0), **lesa.call_kwargs(pipe))
print(lesa.summary(pipe).num_full, "full")
lesa.disable(pipe)
loaded = {name.split(".")[0] for name in sys.modules}
print(sorted(loaded & set(sys.argv[3].split(","))))
"""
    out = python(
        code, str(tmp_path / "pipeline"), str(tmp_path / "bundle"), ",".join(PIPELINE), blocked=PIPELINE
    )
    assert "6 full" in out and out.strip().endswith("[]")


def test_import_brings_nothing_heavy():
    out = python("import sys, lesa\nprint(sorted({'torch', 'diffusers', 'yaml'} & set(sys.modules)))")
    assert out.strip() == "[]"
    out = python("import sys, lesa.cli, lesa.commands\nprint(sorted({'torch', 'diffusers'} & set(sys.modules)))")
    assert out.strip() == "[]"


@pytest.mark.slow
def test_loading_a_bundle_takes_little_longer_than_importing_diffusers(tmp_path):
    from tests.helpers.bundles import make_bundle
    from tests.helpers.tiny import tiny_flux

    make_bundle(tiny_flux(), tmp_path / "bundle")
    code = """
import sys, time
start = time.perf_counter()
import diffusers
from diffusers.hooks import HookRegistry
middle = time.perf_counter()
import lesa
from lesa.bundle import load_bundle
load_bundle(sys.argv[1])
lesa.enable
print(middle - start, time.perf_counter() - middle)
"""
    extra = min(float(python(code, str(tmp_path / "bundle")).split()[-1]) for _ in range(2))
    assert extra < 1.0


def test_the_public_names_are_there():
    import lesa

    for name in lesa.__all__:
        assert getattr(lesa, name) is not None
    assert set(lesa.__all__) <= set(dir(lesa))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lesa.nothing  # noqa: B018
