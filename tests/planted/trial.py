"""Tests against one fault at a time, in a temporary copy of the working tree.

Importing torch and diffusers takes longer than most of the tests that matter here. So the process imports this
project's modules once, with all that they need, forgets them, and forks for every fault: a child has the libraries
already and imports the project anew, from the copy.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import hypothesis
import pytest
import pytest_timeout  # noqa: F401 (a child has it already)

from tests.planted.fault import Fault

ROOT = Path(__file__).parents[2]
OWN = ("lesa", "flows", "benchmarks", "tests")  # packages that a child imports anew
LIBRARIES = (  # modules of ours whose imports are those of most tests
    "lesa.publishing.judgement",
    "lesa.search.jobs",
    "lesa.training.closed_loop",
    "lesa.training.jobs",
    "lesa.evaluation.report",
    "tests.helpers.evaluation",
    "tests.helpers.tiny",
)
# What is not needed to tell whether a test fails is left out: other plugins, explained assertions, the cache.
OPTIONS = ("-q", "-m", "not slow and not long", "--assert=plain", "-p", "pytest_timeout", "-p", "no:cacheprovider")
TEST_SECONDS = 900  # of one test: a fault may make a loop endless, and the machine may be busy
Result = Literal["caught", "survived", "broken"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What the tests said to a fault."""

    result: Result  # broken: the tests could not be run, or fail without the fault too
    by: str  # the first test that failed
    seconds: float
    log: str = ""  # the end of what pytest printed, where it is broken


@contextmanager
def copied_tree(root: Path = ROOT) -> Iterator[Path]:
    """A temporary copy of the files that git knows, or would add, as they are in the working tree."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        for name in names:
            if (root / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, Path(folder) / name)
        yield Path(folder)


def load_libraries() -> None:
    """Import what tests import, then forget the modules of this project."""
    for name in LIBRARIES:
        importlib.import_module(name)
    hypothesis.settings.register_profile("planted", deadline=None)  # the machine may be busy
    hypothesis.settings.load_profile("planted")
    gc.collect()
    gc.freeze()


def try_fault(fault: Fault, tree: Path) -> Outcome:
    """Plant a fault in the copy, run its tests until one fails, take the fault out again."""
    path = tree / fault.file
    before = path.read_bytes()
    fault.plant(tree)
    _drop_bytecode(path)
    try:
        return run_tests(fault.tests, tree)
    finally:
        path.write_bytes(before)
        _drop_bytecode(path)


def run_tests(tests: Sequence[str], tree: Path, *, first_failure: bool = True) -> Outcome:
    """The quick tests of some files in a child process."""
    started = time.perf_counter()
    log = tree / "planted.log"
    code = _forked([*OPTIONS, f"--timeout={TEST_SECONDS}", *(["-x"] if first_failure else []), "--", *tests], tree, log)
    printed = log.read_text(errors="replace")
    failed = failed_tests(printed)
    result: Result = "survived" if code == 0 else "caught" if failed else "broken"
    return Outcome(
        result=result,
        by=" ".join(failed),
        seconds=round(time.perf_counter() - started, 1),
        log=printed[-2000:] if result == "broken" else "",
    )


def failed_tests(printed: str) -> list[str]:
    """Tests that failed, or files that could not be imported, by pytest's summary."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)


def _forked(arguments: Sequence[str], tree: Path, log: Path) -> int:
    """Exit status of pytest in a child that imports this project from `tree`."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with log.open("w") as printed:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
            _move_to(tree)
            status = int(pytest.main(list(arguments)))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # nothing of the parent's is cleaned up twice
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _move_to(tree: Path) -> None:
    """Import this project from the copy from now on, in processes that tests start too."""
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, tree))]
    for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
        del sys.modules[name]
    importlib.invalidate_caches()


def _drop_bytecode(path: Path) -> None:
    """Compiled files are told from stale ones by seconds and size, which two faults may share."""
    for compiled in path.with_name("__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
