"""What `pip install .` gives somebody: a wheel without the checkout, typed, that enables a bundle."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.helpers.bundles import make_bundle
from tests.helpers.tiny import tiny_flux

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Of the environment that runs the tests: third parties alone, since its entry for the checkout is a .pth or a finder.
USE = """
import importlib.metadata, sys
from pathlib import Path
import lesa, torch
from diffusers import FluxPipeline
assert Path(lesa.__file__).is_relative_to(sys.prefix), lesa.__file__
pipe = FluxPipeline.from_pretrained(sys.argv[1])
lesa.enable(pipe, sys.argv[2])
pipe("a thin seven", generator=torch.Generator().manual_seed(0), **lesa.call_kwargs(pipe))
print(lesa.summary(pipe).num_full, "full", importlib.metadata.version(sys.argv[3]))
lesa.disable(pipe)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the files that git knows or would take, so that no build folder of the checkout has a say."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if name.startswith(("lesa/", "flows/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = f"import setuptools.build_meta as backend; print(backend.build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith(PROJECT["name"].replace("-", "_") + "-" + PROJECT["version"])
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lesa", "flows"}
    kinds = (".py", ".jinja", ".yaml")
    sources = [p for folder in ("lesa", "flows") for p in (ROOT / folder).rglob("*") if p.suffix in kinds]
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= set(names)
    assert "lesa/py.typed" in names


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_enables_a_bundle_in_a_fresh_process(wheel: Path, tmp_path: Path) -> None:
    pipe = tiny_flux(tmp_path / "pipeline")
    make_bundle(pipe, tmp_path / "bundle")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    home = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", home, wheel]
    subprocess.run(install, check=True, env=environment, timeout=200)
    # A path file is read for its folders alone: the path files inside them, the checkout's among these, are not.
    Path(home, "third_parties.pth").write_text(sysconfig.get_path("purelib") + "\n")
    arguments = [tmp_path / "pipeline", tmp_path / "bundle", PROJECT["name"]]
    done = subprocess.run(
        [python, "-c", USE, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"6 full {PROJECT['version']}" in done.stdout


def test_the_types_are_there_for_whoever_imports_lesa() -> None:
    assert (ROOT / "lesa/py.typed").is_file()
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert {"py.typed", "**/*.jinja"} <= set(data["lesa"])
