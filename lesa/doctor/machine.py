"""What is installed, which device, what can be reached: the facts a bug report needs, without secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lesa.errors import redacted

DISTRIBUTION = "lesa-diffusion"  # pyproject.toml's name; "lesa" on the public index is another project
INSTALL = "pip install . in the repository"
INSTALL_PIPELINE = "pip install '.[pipeline]' in the repository"
_CORE = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")
_PIPELINE = ("prefect", "ray", "dvc", "zarr", "mlflow", "pykan", "scikit-learn", "matplotlib")
_PREFECT_DEFAULT = "http://127.0.0.1:4200/api"
_TIMEOUT = 2.0  # seconds a service has to answer


def examine() -> dict[str, Any]:
    """Facts as plain values: versions (None where absent), devices, services."""
    return {
        "lesa": version(DISTRIBUTION),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "core": {name: version(name) for name in _CORE},
        "pipeline": {name: version(name) for name in _PIPELINE},
        "device": _device(),
        "services": {"registry": _registry(), "prefect": _prefect()},
    }


def format_facts(facts: Mapping[str, Any]) -> str:
    """`examine()` for people, and what to do about what is missing."""
    lines = [f"lesa      {facts['lesa'] or 'not installed (running from a folder)'}"]
    lines.append(f"python    {facts['python']} on {facts['platform']}")
    for group, remedy in (("core", INSTALL), ("pipeline", INSTALL_PIPELINE)):
        present = [f"{name} {version}" for name, version in facts[group].items() if version]
        absent = [name for name, version in facts[group].items() if not version]
        lines.append(f"{group:<9} {', '.join(present) or 'nothing'}")
        if absent:
            lines.append(f"          missing: {', '.join(absent)} ({remedy})")
    device = facts["device"]
    lines.append(f"device    {device['name']}" + (f", {device['memory']}" if device.get("memory") else ""))
    for name, service in facts["services"].items():
        state = {True: "reachable", False: "not reachable", None: "not set up"}[service["reachable"]]
        lines.append(f"{name:<9} {service['where']}: {state}")
    return "\n".join(lines)


def version(name: str) -> str | None:
    """Of an installed distribution; None where it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    if version("torch") is None:
        return {"kind": None, "name": "unknown: torch is not installed"}
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        return {
            "kind": "cuda",
            "name": f"{count} x {properties.name}",
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "bfloat16": torch.cuda.is_bf16_supported(),
        }
    return {"kind": "cpu", "name": f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}


def _registry() -> dict[str, Any]:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        exists = Path("mlflow.db").is_file()
        return {"where": "./mlflow.db", "reachable": True if exists else None}
    if uri.startswith("sqlite:///"):
        return {"where": uri, "reachable": Path(uri.removeprefix("sqlite:///")).is_file()}
    return {"where": redacted(uri), "reachable": answers(uri)}


def _prefect() -> dict[str, Any]:
    given = os.environ.get("PREFECT_API_URL")
    uri = given or _PREFECT_DEFAULT
    reachable = answers(uri)
    return {"where": redacted(uri), "reachable": reachable if reachable or given else None}


def answers(uri: str) -> bool:
    """Whether something listens at a URI's host and port; nothing is sent."""
    parts = urlsplit(uri)
    if parts.hostname is None:
        return False
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname, port), timeout=_TIMEOUT):
            return True
    except (OSError, ValueError):
        return False
