"""Every writer meets the end of a real small disk, at every size around what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
WRITERS = {"bundle", "predictor", "checkpoint", "catalogue", "ledger"}


@pytest.mark.slow
def test_what_was_there_survives_and_what_was_meant_is_written_once_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=512k none "{disk}" && exec "$0" "$@"'
    command = [sys.executable, "-m", "tests.faults.full_disk", str(disk), str(tmp_path)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, *command], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, outcome = line.split()
        outcomes.setdefault(name, []).append(outcome)
    assert outcomes.keys() == WRITERS
    for name, seen in outcomes.items():  # refused at first, and no size in between does half of it
        assert seen[0] == "full" and seen[-1] == "fits" and seen[:-1] == ["full"] * (len(seen) - 1), (name, seen)
