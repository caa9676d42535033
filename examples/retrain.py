"""Bring a workload up to date from Python, as a schedule does at night, and show what the gate decided.

python examples/retrain.py --workload flux-digits

What changed since the last time decides what runs: new prompts are recorded, a changed setting is trained again, and
nothing at all happens where nothing changed. Interrupted, it goes on where it was. Run it in the repository.
"""

from __future__ import annotations

import argparse
import json

from flows.retrain import retrain
from flows.stage import metrics_folder, read_workload, run_flow


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", help="a section of params.yaml (default: its default_workload)")
    options = parser.parse_args()

    result = run_flow(retrain, workload=options.workload)  # a Prefect flow, with a server behind it
    if result["status"] == "skipped":  # another run is at work and brings things up to date
        print(result["reason"])
        return 1
    decision = json.loads((metrics_folder(read_workload(options.workload)) / "decision.json").read_text())
    print(f"candidate: version {decision['candidate']}, {'promoted' if decision['promote'] else 'kept out'}")
    for reason in decision["reasons"]:
        print(f"  {reason}")
    print(f"champion:  version {result['champion']}" if result["champion"] else "champion:  none")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
