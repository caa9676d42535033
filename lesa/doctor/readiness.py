"""Whether this machine can make a workload's predictor: needs against what is here, each with its remedy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from lesa.doctor.estimate import PEAK_FLOPS, UTILISATION, CostEstimate, estimate_costs
from lesa.doctor.machine import INSTALL_PIPELINE, answers, version
from lesa.errors import redacted
from lesa.params import ClosedLoopParams, ModelParams, Workload
from lesa.recording.plan import recorded_prompts
from lesa.recording.prompts import PromptError, read_splits

_HUB = "https://huggingface.co"
_GATED = ("flux-dev", "flux-schnell")  # models whose page wants an account and a click before it gives the files
_PACKAGES = ("prefect", "ray", "dvc", "zarr", "mlflow", "pykan", "matplotlib", "diffusers", "transformers")
_DISK_MARGIN = 1.1


@dataclass(frozen=True, slots=True)
class Check:
    """One thing a workload costs."""

    name: str
    ok: bool
    found: str  # needed and present, in words
    remedy: str = ""  # where not ok


def examine_workload(workload: Workload) -> dict[str, Any]:
    """Needs, checks and a verdict as plain values; nothing is downloaded or written.

    Args:
        workload: all its settings are valid already; its paths are relative to this folder.

    Raises:
        ValueError: the size of its model cannot be known.
    """
    costs = estimate_costs(workload)
    checks = [
        _packages(),
        _gpu(workload.resources.device, workload.closed_loop, costs),
        *_model(workload.model, costs),
        *_scorer(workload.scorer, is_made=workload.base is not None),
        *_disk(workload.model, workload.paths.trajectories, costs),
        _prompts(workload),
    ]
    return {
        "workload": workload.name,
        "needs": costs.to_dict(),
        "checks": [asdict(check) for check in checks],
        "ready": all(check.ok for check in checks),
    }


def format_readiness(facts: Mapping[str, Any]) -> str:
    """`examine_workload` for people."""
    costs, hours = facts["needs"], facts["needs"]["gpu_hours"]
    parameters = sum(costs["parameters"].values()) / 1e9
    lines = [f"workload  {facts['workload']}: {costs['model']}, {parameters:.2f} billion parameters"]
    rate = f"{UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s"
    lines.append(
        f"estimate  {hours['all']:.3g} GPU hours at {rate} (computed, not measured): "
        + ", ".join(f"{stage} {value:.2g}" for stage, value in hours.items() if stage != "all")
    )
    lines.append(
        f"          store {_gb(costs['store_bytes'])} for {costs['trajectories']} trajectories "
        f"({_gb(costs['store_bytes_all_tokens'])} with every token)"
    )
    for check in facts["checks"]:
        lines.append(f"{'ok' if check['ok'] else 'NO':<9} {check['name']}: {check['found']}")
        if not check["ok"]:
            lines.append(f"          {check['remedy']}")
    missing = [check["name"] for check in facts["checks"] if not check["ok"]]
    name = facts["workload"]
    verdict = f"make repro WORKLOAD={name} can start here" if not missing else f"not here yet: {', '.join(missing)}"
    lines.append(f"verdict   {verdict}")
    return "\n".join(lines)


def _packages() -> Check:
    absent = [name for name in _PACKAGES if version(name) is None]
    found = "all installed" if not absent else f"missing: {', '.join(absent)}"
    return Check("packages", not absent, found, f"make install, or {INSTALL_PIPELINE}")


def _gpu(device: str, loop: ClosedLoopParams, costs: CostEstimate) -> Check:
    import torch

    parts = (
        f"about {_gb(costs.gpu)} needed (weights {_gb(sum(costs.weights.values()))}, a run {_gb(costs.sampling)}"
        + (f", search {_gb(costs.fitting)}" if costs.fitting > costs.sampling else "")
        + (f", closed loop {_gb(costs.closed_loop)} beside {_gb(costs.loop_weights)}" if costs.closed_loop else "")
        + ")"
    )
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        hours = costs.run_flops / 1e11 / 3600  # a hundred GFLOP/s, what a few cores do
        small = hours < 0.01
        remedy = f"use a machine with a CUDA GPU: one unaccelerated run would take some {hours:.0f} hours on a CPU"
        return Check("GPU memory", small, f"{parts}, no GPU{' needed at this size' if small else ' here'}", remedy)
    if not torch.cuda.is_available():
        return Check("GPU memory", False, f"{parts}, torch sees no GPU", "device: cuda is asked for; use auto or cpu")
    total = torch.cuda.get_device_properties(0).total_memory
    remedy = "take a larger GPU"
    without = sum(costs.weights.values()) + max(costs.sampling, costs.fitting)
    if costs.gpu > without:
        again = "" if loop.gradient_checkpointing else ", set closed_loop.gradient_checkpointing to true"
        remedy += (
            f"{again}, lower closed_loop.batch_size ({loop.batch_size}), or set closed_loop.iterations to 0: "
            f"the predictor of the first training step then needs {_gb(without)}"
        )
    return Check("GPU memory", costs.gpu <= total, f"{parts}, {_gb(total)} on {torch.cuda.get_device_name(0)}", remedy)


def _model(model: ModelParams, costs: CostEstimate) -> list[Check]:
    source, revision = model.source, model.revision
    if costs.facts.is_local:
        here = (Path(source) / "model_index.json").is_file()
        remedy = f"put a saved diffusers pipeline into {source} (docs/runbook.md)"
        return [Check("model", here, f"{source} is {'here' if here else 'not here'}", remedy)]
    if cached(source, revision):
        return [Check("model", True, f"{source} at {revision} is in the cache")]
    if _offline():
        remedy = "unset HF_HUB_OFFLINE, or fill the cache elsewhere and bring it (HF_HOME)"
        return [Check("hub", False, f"{source} is not in the cache and HF_HUB_OFFLINE is set", remedy)]
    hub = os.environ.get("HF_ENDPOINT", _HUB)
    proxy = _proxy(hub)
    reachable = answers(hub if proxy is None else proxy)
    remedy = "connect this machine, set HTTPS_PROXY or HF_ENDPOINT, or bring a filled cache (HF_HOME)"
    asked = redacted(hub) if proxy is None else f"{redacted(proxy)}, the proxy to {redacted(hub)},"
    checks = [Check("hub", reachable, f"{asked} is {'reachable' if reachable else 'not reachable'}", remedy)]
    if costs.facts.name in _GATED:
        remedy = f"accept the licence on {_HUB}/{source}, then `hf auth login`"
        found = "an access token is set" if _has_token() else "no access token; the model's page asks for an account"
        checks.append(Check("account", _has_token(), found, remedy))
    return checks


def _disk(model: ModelParams, store: Path, costs: CostEstimate) -> list[Check]:
    """What each file system must take, and what it has."""
    wanted: dict[int, list[tuple[str, int, Path]]] = {}
    locked: dict[Path, None] = {}  # may not be written to, in the order of asking

    def want(what: str, num_bytes: int, place: Path) -> None:
        existing = _existing(place)
        if num_bytes > 0 and not os.access(existing, os.W_OK):
            locked[existing] = None
        if num_bytes > 0:
            wanted.setdefault(existing.stat().st_dev, []).append((what, num_bytes, existing))

    if not costs.facts.is_local and not cached(model.source, model.revision):
        want("download", costs.download, hub_cache())
    data, cache = Path("data"), Path(".dvc/cache")
    left = max(0, costs.store - _size(store))
    want("trajectory store", left, data)
    want("checkpoints and bundle", costs.training, data)
    if not _one_device(data, cache):
        want("DVC's copy of store and bundle", costs.disk, cache)
    checks = []
    for items in wanted.values():
        total, free = sum(size for _, size, _ in items), shutil.disk_usage(items[0][2]).free
        parts = ", ".join(f"{what} {_gb(size)}" for what, size, _ in items)
        remedy = "free space, or lower record.token_fraction or record.train_prompts; HF_HOME moves the download"
        found = f"{_gb(total)} needed ({parts}), {_gb(free)} free under {items[0][2]}"
        checks.append(Check("disk", total * _DISK_MARGIN <= free, found, remedy))
    if locked:
        found = f"no right to write under {', '.join(map(str, locked))}"
        checks.append(Check("write access", False, found, "change the owner or the mount, or work in a copy elsewhere"))
    return checks


def _scorer(folder: str | None, *, is_made: bool) -> list[Check]:
    """Of a scorer that no stage of this workload makes."""
    if folder is None or is_made:
        return []
    here = Path(folder).is_dir()
    remedy = "drop `scorer` from the section, or make it first: the stage base of the workload that it belongs to"
    return [Check("scorer", here, f"{folder} is {'here' if here else 'not here'}", remedy)]


def _prompts(workload: Workload) -> Check:
    """Training and validation prompts that are recorded, test prompts that are judged."""
    remedy = f"fill data/prompts/{workload.prompts}, or lower the numbers"
    try:
        found = recorded_prompts(workload.recording)
        test = len(read_splits(workload.paths.prompts)["test"])
    except PromptError as error:
        return Check("prompts", False, str(error), remedy)
    wanted = workload.evaluate.prompts
    if wanted > test:
        return Check("prompts", False, f"evaluate.prompts: {wanted} wanted, test.txt has {test}", remedy)
    counts = {split: len(lines) for split, lines in found.items()} | {"test": test}
    return Check("prompts", True, ", ".join(f"{count} {split}" for split, count in counts.items()))


def hub_cache() -> Path:
    """Where the hub's files are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def cached(source: str, revision: str | None) -> bool:
    """Whether a snapshot of this commit with its index is in the cache; a torn one is completed when it is loaded."""
    folder = hub_cache() / f"models--{source.replace('/', '--')}" / "snapshots" / str(revision)
    return (folder / "model_index.json").is_file() and any(folder.glob("transformer/*.safetensors"))


def _offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _proxy(uri: str) -> str | None:
    """The proxy that the environment sets between here and a URI."""
    parts = urlsplit(uri)
    proxy = getproxies().get(parts.scheme)
    if not proxy or proxy_bypass(parts.hostname or ""):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _one_device(data: Path, cache: Path) -> bool:
    return _existing(data).stat().st_dev == _existing(cache).stat().st_dev


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
