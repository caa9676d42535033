"""Who is champion and why; and a person's own decision about it, which is recorded and held to.

python -m flows.champion [--workload NAME]                          the history
python -m flows.champion --make 3 --reason "blurs hands"            go back to version 3: the later one stays out
python -m flows.champion --lift 5 --reason "fixed the prompts"      version 5 may become champion again
"""

from __future__ import annotations

import argparse
import sys

from flows.environment import ROOT, quiet_environment
from flows.registry.history import barred
from flows.registry.registry import CHAMPION, Registry, Version
from flows.stage import experiment_name, read_workload
from flows.tracking.client import named_failures
from lesa.errors import LesaError


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default=None, help="section of params.yaml (default: its default_workload)")
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument("--make", metavar="VERSION", help="make this version champion, whatever the gate said")
    wish.add_argument("--lift", metavar="VERSION", help="let a version that was rolled back be judged again")
    parser.add_argument("--reason", default="", help="why, for the record")
    arguments = parser.parse_args(argv)
    quiet_environment()
    try:
        name = experiment_name(read_workload(arguments.workload))
        with named_failures(ROOT):
            registry = Registry(name, ROOT)
            if arguments.make is not None:
                registry.make_champion(_version(registry, arguments.make), arguments.reason)
            elif arguments.lift is not None:
                registry.lift(_version(registry, arguments.lift), arguments.reason)
            print(history_text(registry))
    except LesaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def history_text(registry: Registry) -> str:
    """One line a decision, the newest last, and what holds now."""
    entries = registry.history.entries()
    lines = [
        f"{entry.number:4}  {entry.kind:11}  version {entry.version}"
        + (f", before {entry.before}" if entry.before else "")
        + (f"  ({entry.reason})" if entry.reason else "")
        for entry in entries
    ]
    champion, alias = registry.champion(entries), registry.alias(CHAMPION)
    lines.append("no champion" if champion is None else f"champion: {registry.name} version {champion.number}")
    if champion is not None and (alias is None or alias.number != champion.number):
        lines.append(f"the alias {CHAMPION} points at {'nothing' if alias is None else f'version {alias.number}'}")
    lines += [f"rolled back: version {number}" for number in barred(entries)]
    return "\n".join(lines)


def _version(registry: Registry, number: str) -> Version:
    version = registry.version(number)
    if version is None:
        raise LesaError(f"{registry.name} has no version {number!r}")
    return version


if __name__ == "__main__":
    raise SystemExit(main())
