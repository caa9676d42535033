"""The published format: round trip, and one refusal for everything that can be wrong with it."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch

from lesa.atomic import sha256_file
from lesa.bundle import load_bundle, write_bundle
from lesa.bundle.card import card
from lesa.bundle.format import _most_bytes
from lesa.bundle.manifest import READ, BundleError, Manifest
from lesa.params import CallParams
from lesa.schedule import Schedule
from lesa.validation import NAME
from tests.attacks.hostile import ATTACKS, edit, reweigh
from tests.helpers.bundles import extrapolating, make_bundle, manifest_for, run_sigmas
from tests.helpers.digests import tree_digest
from tests.helpers.tiny import tiny_flux

WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"


@pytest.fixture(scope="module")
def pipe():
    return tiny_flux()


@pytest.fixture(scope="module")
def good(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "good"
    make_bundle(pipe, folder)
    return folder


@pytest.fixture
def spoiled(good, tmp_path) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(good, folder)
    return folder


def refusal(folder: Path, **kwargs) -> str:
    with pytest.raises(BundleError) as caught:
        load_bundle(folder, **kwargs)
    assert caught.value.problems
    return str(caught.value)


def test_round_trip(pipe, good):
    bundle = load_bundle(good)
    sigmas = run_sigmas(pipe)
    expected = extrapolating(pipe.transformer.inner_dim, sigmas, Schedule.uniform(10, 3))
    assert bundle.predictor.spec == expected.spec
    for name, tensor in expected.tensors.items():
        assert torch.equal(bundle.predictor.tensors[name], tensor)
    assert bundle.manifest.workload == "tiny"
    assert torch.equal(torch.tensor(bundle.manifest.sigmas), sigmas)
    assert bundle.manifest.budgets["1.67x"].schedule == Schedule.uniform(10, 3)
    assert bundle.digest == sha256_file(good / MANIFEST)
    assert sorted(path.name for path in good.iterdir()) == ["README.md", MANIFEST, WEIGHTS]
    text = (good / "README.md").read_text()
    assert "FluxPipeline" in text and "1.67x (default) | 6 of 10" in text


def test_the_card_says_how_to_call_the_pipeline(good):
    manifest = load_bundle(good).manifest
    assert "from diffusers import FluxPipeline\n" in card(manifest)
    assert "image = pipe(prompt, **lesa.call_kwargs(pipe)).images[0]" in card(manifest)
    call = manifest.data["call"] | {"num_frames": 9}
    video = dataclasses.replace(manifest, data=manifest.data | {"call": call})
    assert "video = pipe(prompt, **lesa.call_kwargs(pipe)).frames[0]" in card(video)


def test_the_same_predictor_makes_the_same_bytes(pipe, good, tmp_path):
    make_bundle(pipe, tmp_path / "again")
    assert tree_digest(tmp_path / "again") == tree_digest(good)


def test_a_pinned_digest_is_held_to(good):
    digest = load_bundle(good).digest
    assert load_bundle(good, expected_digest=digest).digest == digest
    assert load_bundle(good, expected_digest=f"sha256:{digest}").digest == digest
    assert "expected " + "0" * 64 in refusal(good, expected_digest="0" * 64)


def test_a_consistent_forgery_needs_a_pinned_digest(good, spoiled):
    """Digests inside a bundle prove integrity, not origin."""
    pinned = load_bundle(good).digest
    from safetensors.torch import load_file, save

    tensors = {name: 2 * tensor for name, tensor in load_file(spoiled / WEIGHTS).items()}
    reweigh(spoiled, save(tensors))
    assert load_bundle(spoiled).digest != pinned
    assert "SHA-256" in refusal(spoiled, expected_digest=pinned)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(spoiled, name):
    function, words = ATTACKS[name]
    function(spoiled)
    assert words in refusal(spoiled)
    assert not (spoiled.parent / "canary").exists()


def test_weights_cut_anywhere_are_refused(spoiled):
    data = (spoiled / WEIGHTS).read_bytes()
    for size in (*range(0, 1024), *range(1024, len(data), 37)):
        (spoiled / WEIGHTS).write_bytes(data[:size])
        with pytest.raises(BundleError):
            load_bundle(spoiled)


def test_weights_cut_anywhere_are_refused_also_when_vouched_for(spoiled):
    data = (spoiled / WEIGHTS).read_bytes()
    for size in range(0, len(data), 7):
        reweigh(spoiled, data[:size])
        with pytest.raises(BundleError):
            load_bundle(spoiled)


def test_any_flipped_bit_is_refused(spoiled):
    for name in (WEIGHTS, MANIFEST):
        data = bytearray((spoiled / name).read_bytes())
        pinned = sha256_file(spoiled / MANIFEST)
        for index in range(0, min(len(data), 4096), 3):
            data[index] ^= 0x10
            (spoiled / name).write_bytes(bytes(data))
            with pytest.raises(BundleError):
                load_bundle(spoiled, expected_digest=pinned)
            data[index] ^= 0x10
        (spoiled / name).write_bytes(bytes(data))
    assert load_bundle(spoiled).manifest.workload == "tiny"


def test_every_problem_is_listed(spoiled):
    def change(document):
        document["channels"] = 7
        document["sigmas"][0] = "high"
        del document["tap"]
        document["model"]["fingerprint"] = "abc"

    edit(spoiled, change)
    message = refusal(spoiled)
    for words in (
        "predictor.channels: got 32, channels says 7",
        "sigmas",
        "tap: missing",
        "model.fingerprint",
    ):
        assert words in message


def test_a_budget_that_the_predictor_cannot_serve_is_refused(spoiled):
    edit(spoiled, lambda document: document["budgets"]["1.67x"].update(full_steps=[0, 5], error_bounds=[None, 0.1]))
    assert "needs 2 full steps before step 1" in refusal(spoiled)


@pytest.mark.parametrize(
    "key", ["schema", "model", "scheduler", "call", "sigmas", "budgets", "predictor", "files"]
)
def test_missing_and_wrong_sections_are_named(spoiled, key):
    good = (spoiled / MANIFEST).read_text()
    edit(spoiled, lambda document: document.pop(key))
    assert key in refusal(spoiled)
    (spoiled / MANIFEST).write_text(good)
    for wrong in (None, 7, "text", [1], True):
        edit(spoiled, lambda document, wrong=wrong: document.update({key: wrong}))
        assert key.split(".")[0] in refusal(spoiled)
        (spoiled / MANIFEST).write_text(good)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../x",
        "/x",
        "a/../../b",
        "%2e%2e",
        "..%252f",
        "a\0",
        "a\n",
        "a\\b",
        "C:\\a",
        "a.",
        "ａ",
        "x" * 300,
        "A",
    ],
)
def test_names_that_could_be_paths_are_no_names(name):
    assert not NAME.fullmatch(name)


def test_a_missing_folder_is_refused(tmp_path):
    assert "cannot open the folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "cannot open the folder" in refusal(tmp_path / "file")


def test_writing_checks_first_and_leaves_what_was_there(pipe, good, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(good, folder)
    before = tree_digest(folder)
    sigmas = run_sigmas(pipe)
    predictor = extrapolating(pipe.transformer.inner_dim, sigmas, Schedule.uniform(10, 3))
    bad = manifest_for(pipe, sigmas) | {"workload": "Bad Name", "default_budget": "9x"}
    with pytest.raises(BundleError) as caught:
        write_bundle(folder, bad, predictor)
    assert len(caught.value.problems) == 2
    nan = manifest_for(pipe, sigmas) | {"evaluation": {"psnr": float("nan")}}
    with pytest.raises(BundleError, match=r"manifest\.json"):
        write_bundle(folder, nan, predictor)
    assert tree_digest(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]
    changed = manifest_for(pipe, sigmas) | {"license": "MIT"}
    assert write_bundle(folder, changed, predictor).digest != before
    assert load_bundle(folder).manifest.data["license"] == "MIT"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def places(value, path=()):
    """Every place in a document, by its keys; of a list its first items."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@pytest.mark.parametrize("schema", READ)
def test_no_single_change_of_a_manifest_is_more_than_a_refusal(good, schema):
    """Whatever stands at whichever place: the manifest is read, or its problems are named."""
    document = json.loads((good / MANIFEST).read_text()) | {"schema": schema}
    if schema < 4:
        for budget in document["budgets"].values():
            del budget["error_bounds"]
    assert Manifest.from_dict(document).to_dict() == document
    read = []
    for path in list(places(document))[1:]:
        for wrong in (None, True, -1, "Bad Name", [None], {"a": 1}):
            changed = copy.deepcopy(document)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = wrong
            try:
                read += [path] * bool(Manifest.from_dict(changed))
            except BundleError as error:
                assert error.problems
    free = {"created_from", "training", "evaluation", "tap", "license", "base_license"}  # text, or any mapping
    held = {path for path in read if path[0] not in free}
    assert not {path for path in held if path[0] in ("workload", "step_range", "files", "schema", "default_budget")}
    assert {("model", "source"), ("scheduler", "config")} <= held


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d["files"].update({WEIGHTS: None}), f"files.{WEIGHTS}: must be a mapping, got nothing"),
        (lambda d: d["files"].update({"code.py": d["files"][WEIGHTS]}), "files.code.py: unknown key"),
        (lambda d: d["files"][WEIGHTS].update(bytes=0), f"files.{WEIGHTS}.bytes: must be at least 1, got 0"),
        (lambda d: d["files"][WEIGHTS].update(sha256="abc"), f"files.{WEIGHTS}.sha256: must be 64 hexadecimal digits"),
        (lambda d: d["call"].pop("num_frames"), "call.num_frames: missing"),
        (lambda d: d["call"].update(height=0), "call.height: must be at least 1, got 0"),
        (lambda d: d["call"].update(num_inference_steps=9), "call.num_inference_steps: got 9, num_inference_"),
        (lambda d: d["budgets"]["1.67x"].update(interval=0), "budgets.1.67x.interval: must be at least 1, got 0"),
        (lambda d: d["budgets"]["1.67x"].pop("error_bounds"), "budgets.1.67x.error_bounds: missing"),
        (lambda d: d["budgets"]["1.67x"]["error_bounds"].pop(), "budgets.1.67x.error_bounds: must be a list of"),
        (lambda d: d.update(schema=3), "budgets.1.67x.error_bounds: unknown key"),
        (lambda d: d.update(budgets={}), "budgets: must be from 1 to 64, got 0"),
        (lambda d: d.update(branches=["a", "a"]), "branches: must be a list of one to four names, got list ['a', 'a']"),
        (lambda d: d.update(step_range=[10, 5]), "step_range: must be two numbers of steps, the lowest first, got"),
        (lambda d: d.update(step_range=[5, 10]), "step_range: got [5, 10], the predictor was trained on [10, 10]"),
        (lambda d: d.update(default_budget="9x"), "default_budget: '9x' is not one of 1.43x, 1.67x"),
        (lambda d: d["model"].update(family="unet"), "model.family: must be one of ['flux'"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_named_by_its_path(spoiled, change, problem):
    edit(spoiled, change)
    assert problem in refusal(spoiled)


def test_a_bundle_of_smaller_pictures_than_a_workload_may_have_is_read(good):
    document = json.loads((good / MANIFEST).read_text())
    document["call"] |= {"height": 4, "width": 1, "guidance_scale": 4}
    call = Manifest.from_dict(document).call
    assert type(call) is CallParams and (call.height, call.width, call.guidance_scale) == (4, 1, 4.0)


def test_a_manifest_goes_through_json(good):
    document = json.loads((good / MANIFEST).read_text())
    assert Manifest.from_dict(document).to_dict() == document


def test_weights_larger_than_their_predictor_are_refused_before_they_are_read(spoiled):
    """Eight gibibytes that take no disk: a hole in a file, vouched for by the manifest."""
    size = 8 << 30
    os.truncate(spoiled / WEIGHTS, size)
    edit(spoiled, lambda document: document["files"][WEIGHTS].update(bytes=size))
    tracemalloc.start()
    try:
        assert f"{WEIGHTS}: {size} bytes by the manifest, its predictor has at most" in refusal(spoiled)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_what_a_predictor_writes_is_never_too_large_for_it(good):
    bundle = load_bundle(good)
    most = _most_bytes(bundle.predictor.spec)
    assert bundle.manifest.weights_bytes <= most < bundle.manifest.weights_bytes + (8 << 10)


def test_a_folder_that_may_not_be_written_is_one_line_with_the_remedy(pipe, monkeypatch, tmp_path):
    mkdir = Path.mkdir

    def refuse(self, *arguments, **options):
        if self.name.startswith("mine."):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match="this user may not write there: have the folder's owner or mode changed"):
        make_bundle(pipe, tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []
