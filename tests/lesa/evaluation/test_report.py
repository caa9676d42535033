from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lesa.evaluation.plots import method_grid
from lesa.evaluation.report import write_report
from tests.helpers.bundles import NUM_STEPS
from tests.helpers.evaluation import BUDGETS, results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "base.json").write_text("{}")
    write_report(results(), folder, training={"ground truth": [(0, 1.0), (10, 0.1)]})
    return folder


def test_the_page_stands_alone(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    assert "<script" not in page and "http" not in page and "prefers-color-scheme: dark" in page
    linked = re.findall(r'src="([^"]+)"', page)
    assert {"psnr_vs_ratio.png", "alpha.png", "prompts.png", "training.png"} <= set(linked)
    for name in linked:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 100
    assert {path.name for path in folder.glob("*.png")} == set(linked)
    for row in results().rows:
        assert row.label in page
    assert "held-out prompts" in page and "20 steps from the same noise" in page


def test_the_bill_is_shown_beside_what_it_gained(tmp_path: Path) -> None:
    budget = next(iter(BUDGETS))
    lead = results().difference(budget, "lesa", best_peer(budget))
    bills = {
        "record": {"forwards": 40.0 * NUM_STEPS, "backwards": 0.0},
        "train_stage2": {"forwards": 10.0 * NUM_STEPS, "backwards": 5.0 * NUM_STEPS},
        "evaluate": {"forwards": 900.0 * NUM_STEPS, "backwards": 0.0},
    }
    billed = dataclasses.replace(results(), bills=bills, about={"default_budget": budget})
    page = write_report(billed, tmp_path).read_text()
    assert f"<td>{40 * NUM_STEPS}</td><td>0</td>\n<td>40</td>" in page
    assert f"<td>{10 * NUM_STEPS}</td><td>{5 * NUM_STEPS}</td>\n<td>20</td>" in page
    assert "the work of 60 plain runs" in page, "judging is no part of making"
    assert ("for each decibel" in page) == (lead.mean > 0)
    if lead.mean > 0:
        assert f"{60 / lead.mean:,.0f} for each decibel that LESA leads by at {budget}" in page
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["bills"] == bills


def best_peer(budget: str) -> str:
    peers = [row for row in results().at(budget) if row.kind != "lesa"]
    return max(peers, key=lambda row: row.psnr.mean).method


def test_what_others_put_there_stays(folder: Path) -> None:
    assert (folder / "base.json").read_text() == "{}"
    assert not list(folder.glob("*.partial"))


def test_prompts_cannot_break_the_page(tmp_path: Path) -> None:
    hostile = dataclasses.replace(results(), about={"workload": "<script>alert(1)</script>"})
    page = write_report(hostile, tmp_path).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_names_and_settings_of_methods_cannot_break_the_page(tmp_path: Path) -> None:
    row = dataclasses.replace(results().rows[0], label="a <b> & c", settings={"note": 'x" onload="y'})
    page = write_report(dataclasses.replace(results(), rows=(row, *results().rows[1:])), tmp_path).read_text()
    assert "a &lt;b&gt; &amp; c" in page and "a <b> & c" not in page
    assert "onload=&#34;y" in page and 'onload="y' not in page


def test_metrics_and_results_are_plain(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["budgets"]) == set(BUDGETS)
    assert metrics["budgets"]["1.67x"]["lesa"]["psnr"]["mean"] > 0
    assert json.loads((folder / "results.json").read_text())["schema"] == 1


def test_samples_can_be_checked_by_hand(folder: Path) -> None:
    with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["prompt"].tolist() == list(results().prompts)
        assert arrays["seed"].tolist() == list(results().seeds)
        ours = arrays["1.67x/lesa/psnr"]
        assert arrays["plain/converged_psnr"].shape == arrays["converged_index"].shape
    assert np.array_equal(ours, results().values("1.67x", "lesa"))


def test_curves_are_tables_for_dvc(folder: Path) -> None:
    def read(name: str) -> list[dict[str, str]]:
        with open(folder / name, newline="") as file:
            return list(csv.DictReader(file))

    ratio = read("psnr_vs_ratio.csv")
    assert len(ratio) == len(results().rows)
    assert {line["method"] for line in ratio} == {row.method for row in results().rows}
    error = [line for line in read("feature_error_by_step.csv") if line["method"] == "taylor1"]
    assert len(error) == NUM_STEPS * len(BUDGETS)
    alpha = [line for line in read("alpha.csv") if (line["budget"], line["method"]) == ("1.67x", "lesa")]
    assert [int(line["step"]) for line in alpha] == list(BUDGETS["1.67x"].predicted_steps)


def test_writing_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_report(results(), tmp_path)
    for name in ("metrics.json", "results.json", "samples.npz", "alpha.csv", "psnr_vs_ratio.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_video_is_shown_by_its_first_middle_and_last_frame(tmp_path: Path) -> None:
    """Downwards, and tall pictures get tall panels."""
    frames = {key: images[:, None].repeat(1, 9, 1, 1, 1) for key, images in results().images.items()}
    for images in frames.values():
        images[:, 4] = 0.0
        images[:, -1] = 1.0
    videos = dataclasses.replace(results(), images=frames)
    method_grid(videos, next(iter(BUDGETS)), ["lesa"], [0], tmp_path / "videos.png")
    method_grid(results(), next(iter(BUDGETS)), ["lesa"], [0], tmp_path / "pictures.png")
    tall, plain = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("videos", "pictures"))
    assert tall.shape[0] > 1.5 * plain.shape[0] and tall.shape[1] == plain.shape[1]
    assert (tall == 0).sum() > (plain == 0).sum() + 500, "the middle frame is black"
