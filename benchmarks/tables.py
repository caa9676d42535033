"""docs/results.md and the README's table, written from the kept files of benchmarks/results.

python -m benchmarks.tables            # writes both pages
python -m benchmarks.tables --check    # exit status 1 where a page is not what would be written

No figure of a measurement is typed: what the kept files hold is computed here. What they do not hold (dates, machines)
stands in the sentences below. In every comparison the peer that comes nearest to ours is printed first.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kept_results import ROOT, readme_table
from benchmarks.results_page import page
from lesa.atomic import write_bytes

PAGE = Path("docs/results.md")
README = Path("README.md")
BEGIN = "<!-- begin: written by python -m benchmarks.tables -->"
END = "<!-- end -->"


def with_table(readme: str, table: str) -> str:
    """The README with the table between its markers.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    parts = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", readme)
    if len(parts) != 3 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md: wants {BEGIN} and {END}, each once and in this order")
    return f"{parts[0]}{BEGIN}\n{table}\n{END}{parts[2]}"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write both pages, or with `--check` compare them; 1 where they differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    options = parser.parse_args(arguments)
    readme = (root / README).read_text(encoding="utf-8")
    pages = {PAGE: page(root), README: with_table(readme, readme_table(root))}
    stale = [name for name, text in pages.items() if not (root / name).is_file() or (root / name).read_text() != text]
    if not options.check:
        for name in stale:
            (root / name).parent.mkdir(exist_ok=True)
            write_bytes(root / name, pages[name].encode())
            print(f"{name}: written")
        return 0
    for name in stale:
        print(f"{name}: not what `python -m benchmarks.tables` writes", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
