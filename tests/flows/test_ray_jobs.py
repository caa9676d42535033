"""Training jobs side by side: the same results as one by one, refusals as they were, deaths retried."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from flows.ray_jobs import ray_session, run_jobs
from flows.tracking.run import Reporter
from lesa.bundle import BundleError
from lesa.params import WorkerResources
from lesa.params_file import load_params

ROOT = Path(__file__).resolve().parents[2]


def square(workload, job, report):
    import torch

    report(job, {"value": float(job)})
    return job * job, torch.get_num_threads(), workload.name


def die_once(workload, job, report):
    marker = Path(f"died-{job}")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "resumed"


def stumble(workload, job, report):
    import json

    json.loads("{")  # no refusal of ours: a fault of code


def refuse(workload, job, report):
    from lesa.recording.prompts import read_prompts

    read_prompts(Path("nowhere"), "train")


def refuse_all(workload, job, report):
    from lesa.bundle import BundleError

    raise BundleError("folder", ["channels: missing", "sigmas: missing"])


@pytest.fixture
def reporter(tmp_path, monkeypatch) -> Reporter:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the workers must find this file
    spool = tmp_path / "spool.jsonl"
    spool.touch()
    return Reporter(path=spool, name="train")


def go(work, reporter, workers, jobs=None):
    return run_jobs(
        work,
        load_params(ROOT / "params.yaml"),
        jobs or {"a": 2, "b": 3},
        share=WorkerResources(workers=workers),
        reporter=reporter,
    )


def parts(reporter: Reporter) -> set[str]:
    return {key for line in reporter.path.read_text().splitlines() for key in json.loads(line)["values"]}


def test_one_after_the_other(reporter):
    import torch

    threads = torch.get_num_threads()
    try:
        assert go(square, reporter, 1) == {"a": (4, 1, "flux-digits"), "b": (9, 1, "flux-digits")}
    finally:
        torch.set_num_threads(threads)
    assert parts(reporter) == {"a/value", "b/value"}


@pytest.mark.slow
def test_side_by_side(reporter):
    with ray_session(2):  # one for all four: starting one takes seconds
        assert go(square, reporter, 2) == {"a": (4, 1, "flux-digits"), "b": (9, 1, "flux-digits")}
        assert parts(reporter) == {"a/value", "b/value"}
        with pytest.raises(ValueError, match=r"nowhere/train\.txt does not exist"):
            go(refuse, reporter, 2)
        with pytest.raises(BundleError, match="not a usable bundle") as caught:
            go(refuse_all, reporter, 2)
        assert caught.value.problems == ["channels: missing", "sigmas: missing"]
        with pytest.raises(Exception, match="JSONDecodeError"):
            go(stumble, reporter, 2)
        assert go(die_once, reporter, 2) == {"a": "resumed", "b": "resumed"}
