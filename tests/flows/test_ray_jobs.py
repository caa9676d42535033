"""Training jobs side by side: the same results as one by one, refusals as they were, deaths retried."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from flows import job_signs
from flows.ray_jobs import JobFailed, ray_session, run_jobs
from flows.tracking.run import Reporter
from lesa.bundle import BundleError
from lesa.errors import LesaError
from lesa.models.bill import counted
from lesa.params import WorkerResources
from lesa.params_file import load_params

ROOT = Path(__file__).resolve().parents[2]


def square(workload, job, report):
    import torch

    report(job, {"value": float(job)})
    return job * job, torch.get_num_threads(), workload.name


def compute(workload, job, report):
    from lesa.models.bill import Bill, charge

    charge(Bill(forwards=job, backwards=1.0))


def die_once(workload, job, report):
    marker = Path(f"died-{job}")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "resumed"


def stumble(workload, job, report):
    import json

    json.loads("{")  # no refusal of ours: a fault of code


def stop_once(workload, job, report):
    """Hangs as a GPU does, in its first process."""
    report(1, {"value": 1.0})
    marker = Path(f"stopped-{job}")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return os.getpid()


def say_nothing_once(workload, job, report):
    marker = Path(f"silent-{job}")
    if not marker.exists():
        marker.touch()
        time.sleep(600)
    return "resumed"


def never_end(workload, job, report):
    os.kill(os.getpid(), signal.SIGSTOP)


def tell(workload, job, report):
    raise RuntimeError(f"at http://user:{os.environ['HF_TOKEN']}@host")


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


def go(work, reporter, workers, jobs=None, timeout_s=600, threads=1):
    return run_jobs(
        work,
        load_params(ROOT / "params.yaml"),
        jobs or {"a": 2, "b": 3},
        share=WorkerResources(workers=workers, threads_per_worker=threads, timeout_s=timeout_s),
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


def test_what_a_job_of_this_process_computes_is_on_the_bill_once(reporter):
    with counted() as bill:
        go(compute, reporter, 1)
    assert (bill.forwards, bill.backwards) == (2 + 3, 2)


@pytest.mark.slow
def test_side_by_side(reporter, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-of-a-job")
    with ray_session(2):  # one for all five: starting one takes seconds
        assert go(square, reporter, 2) == {"a": (4, 1, "flux-digits"), "b": (9, 1, "flux-digits")}
        assert parts(reporter) == {"a/value", "b/value"}
        with counted() as bill:
            go(compute, reporter, 2)
        assert (bill.forwards, bill.backwards) == (2 + 3, 2)
        assert go(square, reporter, 2, threads=2) == {"a": (4, 2, "flux-digits"), "b": (9, 2, "flux-digits")}
        with pytest.raises(ValueError, match=r"nowhere/train\.txt does not exist"):
            go(refuse, reporter, 2)
        with pytest.raises(BundleError, match="not a usable bundle") as caught:
            go(refuse_all, reporter, 2)
        assert caught.value.problems == ["channels: missing", "sigmas: missing"]
        with pytest.raises(Exception, match="JSONDecodeError"):
            go(stumble, reporter, 2)
        assert go(die_once, reporter, 2) == {"a": "resumed", "b": "resumed"}
        with pytest.raises(Exception, match=r"http://\*\*\*@host") as caught:
            go(tell, reporter, 2)
        assert "canary" not in str(caught.value)


@pytest.mark.slow
def test_a_process_that_hangs_is_replaced(reporter, monkeypatch, capsys):
    """Stopped, or silent for too long: the job goes elsewhere, the screen says which one it was, and not for ever."""
    monkeypatch.setattr(job_signs, "SHOW_SECONDS", (2.0, 2.0))
    with ray_session(2):
        monkeypatch.setattr(job_signs, "SILENT_SECONDS", 5.0)
        pids = go(stop_once, reporter, 2)
        assert sorted(pids) == ["a", "b"]
        shown = capsys.readouterr().out
        assert "train a: no sign of life for" in shown and "is replaced" in shown
        assert re.search(r"train: [01] of 2 done; at work: .*a for 0 min", shown), shown
        with pytest.raises(JobFailed, match=r"[ab]: failed in 3 processes, the last one: no sign of life for \d+ s"):
            go(never_end, reporter, 2)
        monkeypatch.setattr(job_signs, "SILENT_SECONDS", 60.0)
        assert go(say_nothing_once, reporter, 2, timeout_s=3) == {"a": "resumed", "b": "resumed"}
        assert "nothing reported for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("RAY_ADDRESS", "10.0.0.1:6379", "a Ray of its own; unset it"), ("RAY_AUTH_MODE", "disabled", "must be 'token'")],
)
def test_another_ray_is_refused_in_a_line(name, value, message, monkeypatch):
    import ray

    monkeypatch.setenv(name, value)
    with pytest.raises(LesaError, match=message), ray_session(1):
        pass
    assert not ray.is_initialized()
