"""The README's tables: the best row of each peer, and figures that are the files' own."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.fidelity import RESULTS, searched_file
from benchmarks.fidelity_summary import chosen, main, table
from lesa.peers.lineup import load_searched

ROOT = Path(__file__).parents[2]


def row(method: str, mean: float) -> dict:
    psnr = {"mean": mean, "low": mean - 0.5, "high": mean + 0.5, "p5": mean - 3}
    return {"budget": "10", "method": method, "label": method, "num_steps": 50, "psnr": psnr, "converged_psnr": None}


def test_of_each_peer_the_best_row_counts() -> None:
    rows = [row("per_step_searched", 58.0), row("l2p", 46.0), row("l2p_full_steps_ours", 51.0), row("taylor1", 35.0)]
    rows += [row("taylor2_own", 41.0), row("taylor1_searched", 47.0), row("taylor1_ours", 60.0)]
    found = [r["method"] for r in chosen(rows)]
    assert found == ["per_step_searched", "l2p_full_steps_ours", "taylor1_searched", "taylor2_own"]
    of_psnr = {"budget": "10", "method": "per_step_searched", "metric": "psnr", "mean": 1.0, "low": 0.5, "high": 1.5}
    gains = [of_psnr | {"against": method} | other for method in found for other in ({}, {"metric": "ssim", "mean": 9})]
    text = table({"rows": rows, "differences": gains}, "10")
    assert "| 10 of 50 steps (5.00x) |" in text
    assert "| taylor2_own | 41.00 [40.50, 41.50] | 38.00 | +1.00 [+0.50, +1.50] | - |" in text
    assert text.count("\n") == 5 and "**per_step_searched** (the default)" in text


def test_the_readme_has_the_figures_of_the_kept_files(capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text()
    for path in sorted(RESULTS.glob("fidelity-*.json")):
        for found in json.loads(path.read_text())["rows"]:
            if found["method"] in ("per_step_searched", "lesa_searched"):
                psnr = found["psnr"]
                cells = f"| {psnr['mean']:.2f} [{psnr['low']:.2f}, {psnr['high']:.2f}] | {psnr['p5']:.2f} |"
                assert cells in readme, f"{path.name}: {found['method']} at {found['budget']}"
    assert main(["none"]) == 2 and "no file fidelity-none-*.json" in capsys.readouterr().err


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
