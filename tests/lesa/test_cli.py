"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from lesa import cli
from lesa.bundle import load_bundle
from lesa.cli import main
from lesa.peers.lineup import Searched, SearchedPeers, save_searched
from lesa.recording.ledger import Ledger, ledger_of
from lesa.recording.prompts import prompt_digests
from lesa.recording.pruned import PrunedTrajectories
from lesa.recording.store import TrajectoryStore
from tests.helpers.bundles import make_bundle
from tests.helpers.tiny import tiny_flux
from tests.lesa.recording.test_store import trajectory

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    make_bundle(tiny_flux(folder / "pipeline"), folder / "bundle")
    return folder


def test_schedule_shows_the_papers_ratios(capsys):
    assert main(["schedule", "--steps", "50", "--interval", "7", "8", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines] == [
        "10 full of 50: 5.00x",
        "9 full of 50: 5.56x",
        "8 full of 50: 6.25x",
    ]
    assert lines[0].split()[2] == "####......"
    assert [line.count("#") for line in lines] == [10, 9, 8]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["schedule", "--interval", "0"], "interval must be an integer of at least 1"),
        (["schedule", "--full-steps", "1,2"], "must contain step 0"),
        (["schedule"], "give --interval, --full-steps or --bundle"),
        (["schedule", "--budget", "5x"], "--budget needs --bundle"),
        (["bundle", "show", "nowhere"], "cannot open the folder"),
        (["store", "verify", "nowhere"], "nowhere"),
        (["flops", "no-such-model"], "no-such-model"),
        (["flops", "flux-dev", "--steps", "0"], "num_steps must be an integer of at least 1"),
        (["flops", "flux-dev", "--budget", "5x"], "--budget needs --bundle"),
        (["sample", "--bundle", "x"], "at least one prompt"),
        (["sample", "a seven", "--bundle", "models:/../x"], "is not of the form"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(capsys, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.startswith(f"lesa {arguments[0]}: ")
    assert "Traceback" not in captured.err and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_cannot_be_parsed(capsys):
    for arguments in ([], ["fly"], ["schedule", "--full-steps", "a,b"], ["sample", "--bundle"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "is not a list of steps" in capsys.readouterr().err


COMMANDS = ["sample", "compare", "schedule", "flops", "bundle", "bundle show", "bundle verify", "store"]


@pytest.mark.parametrize("command", [*COMMANDS, "store verify", "store drop-pruned", "doctor"])
def test_help_teaches_by_example(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"lesa {command}" in capsys.readouterr().out.split("examples:")[1]


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("lesa ")


def test_the_whole_table_of_true_sizes_is_printed_for_people(capsys):
    assert main(["flops", "flux-schnell"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("flux-schnell, 1024x1024, 256 text tokens") and "predicted call" in printed


def test_sample_writes_pictures_and_shows_the_run(place, tmp_path, capsys):
    base = ["--bundle", str(place / "bundle"), "--base", str(place / "pipeline"), "--device", "cpu"]
    out = tmp_path / "pictures"
    assert main(["sample", "a thin seven", "a bold two", *base, "--seed", "4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "6 full of 10: 1.67x" in printed and "budget: 1.67x" in printed
    assert sorted(path.name for path in out.iterdir()) == ["000-seed4-1.67x.png", "001-seed5-1.67x.png"]
    assert Image.open(out / "000-seed4-1.67x.png").size == (16, 16)

    again = tmp_path / "again"
    arguments = ["sample", "--prompt", "a thin seven", *base, "--seed", "4", "--json", "--out", str(again)]
    assert main([*arguments, "--interval", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["num_full"] == 7
    plain, one = tmp_path / "plain", tmp_path / "one"
    assert main(["sample", "a thin seven", *base, "--plain", "--out", str(plain)]) == 0
    assert main(["sample", "a thin seven", *base, "--interval", "1", "--out", str(one)]) == 0
    assert (plain / "000-seed0-plain.png").read_bytes() == (one / "000-seed0-interval1.png").read_bytes()


def test_samples_drawn_otherwise_have_other_names_and_none_is_overwritten_unasked(place, tmp_path, capsys):
    base = ["--bundle", str(place / "bundle"), "--base", str(place / "pipeline"), "--device", "cpu"]
    base += ["--out", str(tmp_path)]
    ways = [[], ["--plain"], ["--interval", "2"], ["--full-steps", "0,1,2,3,5"], ["--budget", "1.43x"]]
    for way in ways:
        assert main(["sample", "a thin seven", *base, *way]) == 0
    kinds = ["1.43x", "1.67x", "full5", "interval2", "plain"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"000-seed0-{kind}.png" for kind in kinds]
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # The default once more, chosen by another name.
    for way in ([], ["--plain"], ["--budget", "1.67x"]):
        assert main(["sample", "a bold two", *base, *way]) == 2
        assert "already: give another folder (--out), another --seed, or --overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main(["sample", "a bold two", *base, "--plain", "--overwrite"]) == 0
    assert (tmp_path / "000-seed0-plain.png").read_bytes() != before[tmp_path / "000-seed0-plain.png"]


def test_sample_refuses_steps_that_the_bundle_does_not_serve(place, tmp_path, capsys):
    base = ["--bundle", str(place / "bundle"), "--base", str(place / "pipeline"), "--device", "cpu"]
    assert main(["sample", "a thin seven", *base, "--steps", "12", "--out", str(tmp_path / "out")]) == 2
    assert "--steps: got 12, the bundle serves 10 to 10" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["sample", "a thin seven", *base, "--steps", "4", "--plain", "--out", str(tmp_path / "out")]) == 0


def test_sample_refuses_another_model(place, tmp_path, capsys):
    tiny_flux(tmp_path / "other", seed=1)
    arguments = [
        "sample",
        "a thin seven",
        "--bundle",
        str(place / "bundle"),
        "--base",
        str(tmp_path / "other"),
    ]
    assert main([*arguments, "--out", str(tmp_path / "pictures")]) == 2
    assert "fingerprint of the transformer: got" in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


def test_bundle_show_and_verify(place, tmp_path, capsys):
    bundle = str(place / "bundle")
    assert main(["bundle", "show", bundle]) == 0
    shown = capsys.readouterr().out
    assert "manifest sha256:" in shown and "1.67x (default)" in shown
    digest = shown.split("sha256:")[1].split()[0]
    assert main(["bundle", "show", bundle, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["workload"] == "tiny"
    assert main(["bundle", "verify", bundle, "--digest", digest]) == 0
    assert "good" in capsys.readouterr().out
    assert main(["bundle", "verify", bundle, "--digest", "0" * 64]) == 1
    assert "SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["bundle", "verify"], ["bundle", "show"], ["schedule", "--bundle"]])
def test_reading_a_bundle_imports_torch_and_nothing_else_that_takes_long(place, command):
    """A bundle is read with torch, numpy and safetensors: importing these is the whole wait."""
    code = "import sys; from lesa.cli import main; main(sys.argv[1:]); print(*{n.split('.')[0] for n in sys.modules})"
    arguments = [sys.executable, "-c", code, *command, str(place / "bundle")]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"torch", "lesa"} <= loaded, done.stderr
    slow = {"diffusers", "transformers", "accelerate", "mlflow", "zarr", "pandas", "scipy", "sklearn", "kan", "ray"}
    assert loaded.isdisjoint(slow)


def test_schedule_of_a_bundle(place, capsys):
    assert main(["schedule", "--bundle", str(place / "bundle"), "--budget", "1.43x"]) == 0
    assert capsys.readouterr().out == "1.43x  ####.#.#.#  7 full of 10: 1.43x\n"
    assert main(["schedule", "--bundle", str(place / "bundle"), "--budget", "9x"]) == 2


def test_compare_prints_a_table_and_json(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "held-out.txt"
    prompts.write_text("a thin seven\na bold two\n")
    arguments = [
        "compare",
        "--bundle",
        str(place / "bundle"),
        "--base",
        str(place / "pipeline"),
        "--prompts",
        str(prompts),
        "--seeds",
        "1",
        "--device",
        "cpu",
        "--json",
    ]
    assert main(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert "lesa" in json.dumps(results) and "taylor1" in json.dumps(results)
    assert main([*arguments[:-3], "--prompts", str(tmp_path / "none.txt")]) == 2


def test_compare_takes_searched_peers_that_are_this_models(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "held-out.txt"
    prompts.write_text("a thin seven\n")
    bundle = load_bundle(place / "bundle")
    budget = next(iter(bundle.manifest.budgets.values()))
    steps = (0, 1, 2, 4, 6, 8)
    line = Searched(
        method="taylor1", num_steps=10, evaluations=budget.schedule.num_full, steps=steps, psnr=30.0, runs=3
    )
    mine = SearchedPeers(
        workload="tiny",
        fingerprint=bundle.manifest.fingerprint,
        prompt_digests=tuple(prompt_digests(["another prompt"])),
        tuning_samples=1,
        peers=(line,),
    )
    path = tmp_path / "peers.json"
    save_searched(path, mine)
    common = ["--bundle", str(place / "bundle"), "--base", str(place / "pipeline"), "--device", "cpu", "--json"]
    arguments = ["compare", *common, "--seeds", "1", "--prompts", str(prompts), "--peers", str(path)]
    assert main(arguments) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["taylor1_searched"]["full_steps"] == list(steps)
    save_searched(path, dataclasses.replace(mine, prompt_digests=tuple(prompt_digests(["A thin seven"]))))
    assert main(arguments) == 2 and "saw 1 of 1 prompts" in capsys.readouterr().err
    save_searched(path, dataclasses.replace(mine, fingerprint="sha256:other"))
    assert main(arguments) == 2 and "search_peers again" in capsys.readouterr().err


def test_doctor_tells_versions_and_no_secrets(capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:canary@127.0.0.1:9/x?token=canary")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "torch 2." in printed and "http://***@127.0.0.1:9/x?***: not reachable" in printed
    assert "canary" not in printed
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["core"]["torch"] and facts["services"]["prefect"]["reachable"] is False
    assert "canary" not in json.dumps(facts)


def test_flops_of_a_true_size(capsys):
    assert main(["flops", "flux-dev", "--interval", "7", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["step_ratio"] == 5.0 and 4.5 < result["flops_ratio"] < 5.0


def test_flops_leaves_no_argument_out(capsys, place):
    def full_steps(*arguments):
        assert main(["flops", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)[0]["schedule"]["full_steps"]

    assert full_steps("flux-dev", "--warmup", "0")[:3] == [0, 7, 14]
    assert full_steps("flux-schnell", "--steps", "8") == [0, 3, 6]  # the model's own rule, as without arguments
    assert main(["flops", "flux-dev", "--bundle", str(place / "bundle"), "--budget", "x", "--interval", "7"]) == 2
    assert "give --budget, or --interval, --steps and --warmup" in capsys.readouterr().err


def test_a_store_is_verified_and_what_is_damaged_is_told_to_the_recording(tmp_path, capsys):
    path = tmp_path / "set.zarr"
    store = TrajectoryStore.create(path)
    good, bad = (store.commit(trajectory(seed)) for seed in (0, 1))
    ledger = Ledger(store)
    ledger.verify([good, bad])
    ledger.save()
    assert main(["store", "verify", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 2 trajectories, 0 problem(s)\n"
    shard = path / bad / "features/c.0.0.0.0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    (path / "note.txt").touch()
    forged = json.loads(ledger_of(path).read_text())
    forged["trajectories"][bad]["state"] = store.state_of(bad)  # a disk that lost a bit leaves no trace
    ledger_of(path).write_text(json.dumps(forged))
    assert main(["store", "verify", str(path)]) == 1
    printed = capsys.readouterr()
    assert f"trajectory {bad}: features" in printed.err and "note.txt: does not belong" in printed.err
    assert "2 problem(s)" in printed.out and "records damaged ones anew" in printed.out
    assert Ledger(store).unread([good, bad]) == [bad]


def test_what_was_pruned_is_deleted_on_request(tmp_path, capsys):
    path = tmp_path / "set.zarr"
    store = TrajectoryStore.create(path)
    kept, _ = (store.commit(trajectory(seed)) for seed in (0, 1))
    PrunedTrajectories(store).prune({kept})
    with store.writer_lock():
        assert main(["store", "drop-pruned", str(path)]) == 2
    assert f"held by process {os.getpid()}" in capsys.readouterr().err
    assert main(["store", "drop-pruned", str(path)]) == 0
    assert "1 trajectories deleted, " in capsys.readouterr().out and not (tmp_path / "set.zarr.pruned").exists()
    assert main(["store", "drop-pruned", str(path)]) == 0 and store.keys() == [kept]


@pytest.mark.parametrize(
    ("missing", "command", "remedy"),
    [
        ("google_crc32c", ["store", "verify", "STORE"], "pip install '.[pipeline]' in the repository"),
        ("safetensors", ["bundle", "show", "BUNDLE"], "pip install . in the repository"),
    ],
)
def test_what_is_not_installed_is_one_line_with_the_remedy(place, tmp_path, missing, command, remedy):
    TrajectoryStore.create(tmp_path / "set.zarr")
    folders = {"STORE": str(tmp_path / "set.zarr"), "BUNDLE": str(place / "bundle")}
    code = f"import sys; sys.modules[{missing!r}] = None; from lesa.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, *(folders.get(word, word) for word in command)]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert done.stderr == f"lesa {command[0]}: needs {missing}, which is not installed: {remedy}\n"


def test_every_dependency_of_the_core_is_known_as_such():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in declared}
    assert {{"pillow": "PIL", "pyyaml": "yaml"}.get(name, name) for name in names} == cli._CORE
