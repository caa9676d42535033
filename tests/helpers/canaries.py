"""Secrets that tests plant in the environment of real stages, and the search for them in everything that is written."""

from __future__ import annotations

import contextlib
import os
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

CANARIES = {
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow/1",
    "AWS_SECRET_ACCESS_KEY": "canary+aws/2",
    "HF_TOKEN": "hf_canary3",
    "PREFECT_API_AUTH_STRING": "admin:canary-prefect-4",
}
IN_ADDRESS = "canary-address-5"


def spellings() -> list[bytes]:
    pair = f"user:{IN_ADDRESS}"
    whole = [*CANARIES.values(), CANARIES["PREFECT_API_AUTH_STRING"].partition(":")[2], IN_ADDRESS, pair]
    return [text.encode() for secret in whole for text in (secret, quote(secret, safe=""), b64_of(secret))]


def b64_of(text: str) -> str:
    return b64encode(text.encode()).decode()


def sweep(folder: Path) -> list[str]:
    """Every file below a folder that holds a canary, and which."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            with contextlib.suppress(OSError):  # a socket, a file that is gone
                if path.is_file():
                    data = path.read_bytes()
                    found += [f"{path.relative_to(folder)} {canary!r}" for canary in spellings() if canary in data]
    return found
