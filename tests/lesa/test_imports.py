"""What a sampler needs to have installed, how long it waits for it, and which package may import which."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
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
MAKERS = ("recording", "training", "search", "peers", "evaluation", "publishing", "doctor", "base_models")  # of bundles
# A file imports what stands on an earlier line, or in its own package or module.
ORDER = """
errors
validation
schedule metrics strict_json locks
atomic predictor
params
models
bundle recording base_models params_file
pull
sampling
training peers
search evaluation doctor
publishing commands
cli
flows __main__
benchmarks
"""
LEVEL = {part: level for level, line in enumerate(ORDER.split("\n")) for part in line.split()}
FACES = ("lesa", "lesa.bundle", "flows")  # packages whose `__init__.py` holds more than a docstring


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


def modules(root: Path, *packages: str) -> dict[str, Path]:
    """Every module of the packages under `root`, by its name."""
    files = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    names = [".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return dict(zip(names, files, strict=True))


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of `known` that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names)


def part_of(module: str) -> str:
    """The entry of `ORDER` that a module belongs to; empty for the face of lesa."""
    top, *rest = module.split(".")
    return top if top != "lesa" else (rest or [""])[0]


def direction_problems(root: Path) -> list[str]:
    """Imports that run upwards, package faces that import, and circles of modules."""
    known = modules(root, "lesa", "flows", "benchmarks")
    graph = {name: set(imported(path, known)) - {name} for name, path in known.items()}
    problems = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in sorted(others)
        if part_of(name) and part_of(other) and part_of(name) != part_of(other)
        if LEVEL[part_of(other)] >= LEVEL[part_of(name)]
    ]
    for name, path in known.items():
        body = ast.parse(path.read_text()).body
        is_docstring = len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        if path.name == "__init__.py" and name not in FACES and not is_docstring:
            problems.append(f"{name}/__init__.py holds more than a docstring")
    try:
        TopologicalSorter({name: others for name, others in graph.items() if name != "lesa"}).prepare()
    except ValueError as error:
        problems.append(f"circle: {error.args[1]}")
    return problems


def test_no_module_of_lesa_needs_orchestration():
    names = [name for name in modules(ROOT, "lesa") if not name.endswith("__main__")]
    code = f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\nprint('all')"
    assert "all" in python(code, blocked=ORCHESTRATION)


def test_imports_run_in_one_direction_without_a_circle():
    assert direction_problems(ROOT) == []


@pytest.mark.parametrize(
    ("file", "planted", "problem"),
    [
        ("lesa/models/a.py", "from lesa.sampling import b", "lesa.models.a imports lesa.sampling.b"),
        ("lesa/models/a.py", "def f():\n    import lesa.sampling.b", "lesa.models.a imports lesa.sampling.b"),
        ("lesa/peers/a.py", "from lesa.training.c import d", "lesa.peers.a imports lesa.training.c"),
        ("lesa/sampling/b.py", "import flows.e", "lesa.sampling.b imports flows.e"),
        ("lesa/training/c.py", "def f():\n    from lesa.training import g", "circle: ['lesa.training."),
        ("flows/e.py", "from flows import h", "circle: ['flows."),
        ("lesa/models/__init__.py", "x = 1", "lesa.models/__init__.py holds more than a docstring"),
    ],
)
def test_a_planted_import_is_noticed(tmp_path: Path, file: str, planted: str, problem: str):
    sound = {
        "lesa/__init__.py": "from lesa.sampling import b",
        "lesa/models/a.py": "",
        "lesa/sampling/b.py": "from lesa import models",
        "lesa/training/c.py": "from lesa.sampling import b\nfrom lesa import sampling",
        "lesa/training/g.py": "from lesa.training.c import x",
        "lesa/peers/a.py": "",
        "flows/__init__.py": "import os",
        "flows/e.py": "import lesa",
        "flows/h.py": "from flows.e import x",
        **{f"lesa/{package}/__init__.py": '"""One."""' for package in ("models", "sampling", "training", "peers")},
    }
    for name, text in sound.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert direction_problems(tmp_path) == []
    (tmp_path / file).write_text(f"{sound[file]}\n{planted}")
    assert [each[: len(problem)] for each in direction_problems(tmp_path)] == [problem]


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
print(sorted(name for name in sys.modules if name.startswith("lesa.") and name.split(".")[1] in sys.argv[4].split(",")))
"""
    folders = (str(tmp_path / "pipeline"), str(tmp_path / "bundle"))
    out = python(code, *folders, ",".join(PIPELINE), ",".join(MAKERS), blocked=PIPELINE)
    assert "6 full" in out and out.strip().splitlines()[-2:] == ["[]", "[]"]


def test_import_brings_nothing_heavy():
    out = python("import sys, lesa\nprint(sorted({'torch', 'diffusers', 'yaml'} & set(sys.modules)))")
    assert out.strip() == "[]"
    out = python("import sys, lesa\nprint(sorted(name for name in sys.modules if name.startswith('lesa.')))")
    assert out.strip() == "[]"
    out = python("import sys, lesa.cli, lesa.commands\nprint(sorted({'torch', 'diffusers'} & set(sys.modules)))")
    assert out.strip() == "[]"


def test_what_starts_a_stage_loads_no_torch():
    """`dvc repro` with nothing to do, a refusal of settings and a stage that hands its work to others start in tenths
    of a second, and every test that starts one."""
    light = "flows.stage, flows.repro, flows.champion, flows.prefect_server, flows.tracking.sender"
    heavy = "{'torch', 'diffusers', 'prefect', 'mlflow'}"
    out = python(f"import sys, {light}\nprint(sorted({heavy} & set(sys.modules)))")
    assert out.strip() == "[]"
    stages = "flows.search, flows.train_stage1, flows.train_stage2, flows.evaluate, flows.retrain"
    out = python(f"import sys, {stages}\nprint(sorted({{'torch', 'diffusers'}} & set(sys.modules)))")
    assert out.strip() == "[]"
    out = python("import sys, flows.base, flows.record\nprint(sorted({'diffusers', 'ray'} & set(sys.modules)))")
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
