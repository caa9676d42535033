"""The pages of results: what a command writes from the kept files, the strongest peer first."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.fidelity import RESULTS, searched_file
from benchmarks.kept_results import (
    LINES_OF_README,
    OURS,
    PEERS,
    by_count,
    chosen,
    comparison,
    load,
    readme_table,
    reference_table,
)
from benchmarks.tables import BEGIN, END, main, with_table
from lesa.peers.lineup import load_searched

ROOT = Path(__file__).parents[2]


def row(method: str, mean: float) -> dict:
    psnr = {"mean": mean, "low": mean - 0.5, "high": mean + 0.5, "p5": mean - 3}
    return {"budget": "10", "method": method, "label": method, "num_steps": 50, "psnr": psnr, "converged_psnr": None}


def test_the_strongest_peer_stands_first_and_of_each_peer_the_best_row_counts() -> None:
    rows = [row("per_step_searched", 58.0), row("l2p", 46.0), row("l2p_full_steps_ours", 51.0), row("taylor1", 35.0)]
    rows += [row("lesa_uniform", 50.0), row("lesa_searched", 57.0), row("taylor2_own", 41.0), row("hicache", 52.0)]
    rows += [row("taylor1_searched", 47.0), row("taylor2_ours", 48.0)]
    methods = [r["method"] for r in chosen(rows)]
    peers = ["hicache", "l2p_full_steps_ours", "taylor2_ours", "taylor2_own"]
    assert methods == ["per_step_searched", *peers, "lesa_searched", "lesa_uniform"]
    gain = {"budget": "10", "method": "per_step_searched", "metric": "psnr", "mean": 1.0, "low": 0.5, "high": 1.5}
    gains = [gain | {"against": method} | other for method in methods for other in ({}, {"metric": "ssim", "mean": 9})]
    text = comparison({"rows": rows, "differences": gains}, "10")
    assert "| 10 of 50 steps (5.00x) |" in text
    assert "| taylor2_own | 41.00 [40.50, 41.50] | 38.00 | +1.00 [+0.50, +1.50] | - |" in text
    assert text.count("\n") == 8 and "**per_step_searched** (the default)" in text
    assert "| *ours:* lesa_uniform |" in text


def test_every_kept_row_belongs_to_us_or_to_one_peer() -> None:
    for path in sorted((ROOT / RESULTS).glob("fidelity-*.json")):
        for kept in load(path.stem)["rows"]:
            peers = [name for name, pattern in PEERS.items() if re.fullmatch(pattern, kept["method"])]
            assert len(peers) == (kept["method"] not in OURS), (path.name, kept["method"], peers)
    assert set().union(*LINES_OF_README.values()) <= set(PEERS)


def test_the_strongest_peer_of_each_workload_is_named() -> None:
    """A line a budget of the kept files: the strongest of all peers before TaylorSeer."""
    names = ["schnell-digits", "hunyuan-moving-digits-even"]
    lines = iter(reference_table(names).splitlines()[2:])
    for name in names:
        for rows in load(f"reference-{name}")["budgets"].values():
            peers = [r for method, r in rows.items() if not method.startswith("lesa")]
            strongest = max(peers, key=lambda r: r["psnr"]["mean"])
            gain = strongest["lesa_minus_this"]
            cells = next(lines).split(" | ")
            interval = f"[{gain['low']:+.2f}, {gain['high']:+.2f}]"
            assert cells[4] == f"{gain['mean']:+.2f} {interval} ({strongest['label']})"
            assert cells[1].startswith(f"{len(rows['lesa']['full_steps'])} of {rows['lesa']['num_steps']}, ")
    assert next(lines, None) is None


def test_the_committed_pages_are_what_the_command_writes(capsys) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_is_not_what_is_written_is_named_and_then_written(tmp_path: Path, capsys) -> None:
    shutil.copytree(ROOT / RESULTS, tmp_path / RESULTS)
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\n| typed by hand |\n{END}\nafter\n")
    assert main(["--check"], tmp_path) == 1
    errors = capsys.readouterr().err
    assert "README.md: not what" in errors and "docs/results.md: not what" in errors
    assert main([], tmp_path) == 0 and main(["--check"], tmp_path) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "by hand" not in readme
    assert (tmp_path / "docs/results.md").read_text() == (ROOT / "docs/results.md").read_text()


@pytest.mark.parametrize("text", ["nothing", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {END}"])
def test_a_readme_without_both_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="each once and in this order"):
        with_table(text, "table")


def test_the_readme_has_six_rows_of_the_kept_figures() -> None:
    lines = readme_table().splitlines()
    rows = [line.split(" | ") for line in lines[2:8]]
    assert lines[8] == "" and rows[0][0] == "| **lesa**, the default"
    for column, (count, document) in enumerate(by_count("flux-digits").items(), start=1):
        kept = {r["method"]: r["psnr"]["mean"] for r in document["rows"] if r["budget"] == count}
        assert rows[0][column] == f"**{kept['per_step_searched']:.1f}**"
        peers = max(mean for method, mean in kept.items() if method not in OURS)
        assert max(float(r[column]) for r in rows[1:]) == float(f"{peers:.1f}")


def test_the_kept_steps_of_the_peers_are_those_of_the_kept_tables() -> None:
    kept = sorted((ROOT / RESULTS).glob("peers-*.json"))
    assert "peers-flux-digits" in {path.stem for path in kept}
    for path in kept:
        found = load_searched(path)
        of_peers = {(peer.method, str(peer.evaluations)): list(peer.steps) for peer in found.peers}
        rows = [
            (row["method"].removesuffix("_searched"), row["budget"], row["settings"])
            for file in sorted((ROOT / RESULTS).glob(f"fidelity-{found.workload}-*.json"))
            for row in json.loads(file.read_text())["rows"]
            if "search_runs" in row["settings"]
        ]
        assert len(rows) == len(of_peers) > 0
        for method, budget, settings in rows:
            assert of_peers[method, budget] == settings.get("full_steps", settings.get("grid")), (method, budget)


def test_a_clones_own_search_goes_before_the_kept_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert searched_file("w") == RESULTS / "peers-w.json"
    own = tmp_path / "data/peers/w.json"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    assert searched_file("w").resolve() == own
