"""What `make repro` ends with: the pipeline run, its table, its report, and whether there is a champion.

    python -m flows.outcome [--repro] [--workload NAME]

Exit codes: 0 a fitting champion is registered, 1 there is none, otherwise DVC's.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys

from flows.registry import CHAMPION, Registry
from flows.repro import dvc_file, dvc_repro
from flows.stage import experiment_name, metrics_folder, read_workload
from lesa.atomic import Locked
from lesa.params import Workload, load_params


def show_outcome(workload: Workload) -> int:
    """Prints table, report and decision; 0 if there is a champion for the bundle's transformer, else 1."""
    report, decided = workload.paths.report, metrics_folder(workload) / "decision.json"
    table = report / "table.txt"
    if table.is_file():
        print(table.read_text())
    decision = json.loads(decided.read_text())
    fingerprint = json.loads((workload.paths.bundle / "manifest.json").read_text())["model"]["fingerprint"]
    name = experiment_name(workload)
    champion = Registry(name).alias(CHAMPION)
    print(f"report:   {report / 'index.html'}")
    print(f"bundle:   {workload.paths.bundle}")
    verdict = "promoted" if decision["promote"] else "kept as it was"
    print(f"gate:     version {decision['candidate']}, champion {verdict}: {'; '.join(decision['reasons'])}")
    if champion is None:
        print(
            f"champion: none; what the gate refused is in {decided}. If the "
            "registry was removed or replaced, register again: dvc repro --force --single-item publish"
        )
        return 1
    if champion.fingerprint != fingerprint:
        print(
            f"champion: version {champion.number} was made for another transformer and does not fit this one"
        )
        return 1
    print(f'champion: version {champion.number}; lesa.enable(pipe, "models:/{name}@{CHAMPION}")')
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.outcome", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--workload", default=None, help="section of params.yaml (default: its default_workload)"
    )
    parser.add_argument("--repro", action="store_true", help="run `dvc repro` first")
    args = parser.parse_args(argv)
    try:
        workload = read_workload(args.workload)
        if args.repro:
            pipeline = dvc_file(workload.name, load_params("params.yaml").name)
            code = dvc_repro(pipeline, show=functools.partial(print, flush=True))
            if code != 0:
                return code
        return show_outcome(workload)
    except (ValueError, FileNotFoundError, Locked) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
