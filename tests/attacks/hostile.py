"""Hostile bundles: each function spoils a good bundle in place.

`python -m tests.attacks.hostile GOOD OUT` writes them all; README.md beside it says what each one shows.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
Attack = Callable[[Path], None]
ATTACKS: dict[str, tuple[Attack, str]] = {}  # name -> what it does, words the refusal must hold


def attack(words: str) -> Callable[[Attack], Attack]:
    def register(function: Attack) -> Attack:
        ATTACKS[function.__name__] = (function, words)
        return function

    return register


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest; everything else stays consistent with it."""
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document, indent=2))


def reweigh(folder: Path, data: bytes) -> None:
    """Other weights under a manifest that vouches for them."""
    (folder / WEIGHTS).write_bytes(data)
    entry = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    edit(folder, lambda document: document["files"].update({WEIGHTS: entry}))


class Canary:
    """Unpickling it makes a file: the proof that somebody ran code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


# --- code in disguise ---------------------------------------------------------------------------------------


@attack("not safetensors")
def pickle_as_weights(folder: Path) -> None:
    reweigh(folder, pickle.dumps(Canary(folder.parent / "canary")))


@attack("not safetensors")
def checkpoint_as_weights(folder: Path) -> None:
    buffer = BytesIO()
    torch.save({"weights": torch.zeros(4)}, buffer)
    reweigh(folder, buffer.getvalue())


@attack("not safetensors")
def archive_as_weights(folder: Path) -> None:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Canary(folder.parent / "canary")))
    reweigh(folder, buffer.getvalue())


@attack("not safetensors")
def safetensors_with_a_tail(folder: Path) -> None:
    reweigh(folder, (folder / WEIGHTS).read_bytes() + pickle.dumps(Canary(folder.parent / "canary")))


@attack("'model.pkl': not a file of a bundle")
def extra_pickle(folder: Path) -> None:
    (folder / "model.pkl").write_bytes(pickle.dumps(Canary(folder.parent / "canary")))


@attack("'conftest.py': not a file of a bundle")
def extra_code(folder: Path) -> None:
    (folder / "conftest.py").write_text("raise SystemExit\n")


@attack("trust_remote_code: unknown key")
def trust_remote_code(folder: Path) -> None:
    edit(folder, lambda document: document.update(trust_remote_code=True))


@attack("model.transformer_class: must be a class name")
def class_by_path(folder: Path) -> None:
    edit(folder, lambda document: document["model"].update(transformer_class="os.system"))


# --- files that are not what they seem ----------------------------------------------------------------------


@attack("weights.safetensors: cannot be opened as a regular file")
def weights_are_a_link(folder: Path) -> None:
    outside = folder.parent / "outside"
    shutil.move(folder / WEIGHTS, outside)
    (folder / WEIGHTS).symlink_to(outside)


@attack("manifest.json: not a regular file")
def manifest_is_a_pipe(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)


@attack("README.md: not a regular file")
def card_is_a_folder(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()


@attack("README.md: missing")
def no_card(folder: Path) -> None:
    (folder / "README.md").unlink()


# --- weights that do not fit --------------------------------------------------------------------------------


@attack("the manifest says")
def flipped_byte(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))


@attack("unknown tensor extra")
def another_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    reweigh(folder, save(tensors | {"extra": torch.zeros(1)}))


@attack("missing tensor")
def a_tensor_less(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    reweigh(folder, save(dict(list(tensors.items())[1:])))


@attack("has shape")
def another_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    reweigh(folder, save(tensors | {name: torch.zeros(1, 2, 3)}))


@attack("has dtype")
def whole_numbers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    reweigh(folder, save(tensors | {name: tensors[name].to(torch.int64)}))


@attack("not finite")
def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    reweigh(folder, save(tensors | {name: torch.full_like(tensors[name], float("nan"))}))


# --- manifests ----------------------------------------------------------------------------------------------


def spell(folder: Path, old: str, new: str) -> None:
    """Change the manifest's text: what json.dumps would not write."""
    text = (folder / MANIFEST).read_text()
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, new, 1))


@attack("appears twice")
def key_twice(folder: Path) -> None:
    spell(folder, '"schema": 4', '"schema": 4, "schema": 4')


@attack("NaN is not a number")
def nan_in_the_manifest(folder: Path) -> None:
    spell(folder, '"psnr_mean": 30.0', '"psnr_mean": NaN')


@attack("not finite")
def number_beyond_infinity(folder: Path) -> None:
    spell(folder, '"psnr_mean": 30.0', '"psnr_mean": 1e999')


@attack("outside what JSON readers agree on")
def huge_integer(folder: Path) -> None:
    spell(folder, '"channels": ', '"channels": 9223372036854775808')


@attack("outside what JSON readers agree on")
def endless_integer(folder: Path) -> None:
    spell(folder, '"channels": ', '"channels": ' + "9" * 500_000)


@attack("-0 is not an integer")
def negative_zero(folder: Path) -> None:
    spell(folder, '"schema": 4', '"schema": -0')


@attack("nested deeper")
def deep(folder: Path) -> None:
    spell(folder, '"evaluation": {}', '"evaluation": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}")


@attack("nested deeper")
def fairly_deep(folder: Path) -> None:
    spell(folder, '"evaluation": {}', '"evaluation": {"a": ' + "[" * 20 + "]" * 20 + "}")


@attack("byte order mark")
def byte_order_mark(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xef\xbb\xbf" + (folder / MANIFEST).read_bytes())


@attack("not UTF-8 at byte")
def latin_1(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes().replace(b"Apache", b"Apach\xe9"))


@attack("at most 1048576 are read")
def enormous(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes() + b" " * (1 << 20))


@attack("not JSON")
def torn(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:-20])


@attack("must be an object, got list")
def a_list(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


@attack("control characters")
def terminal_escape(folder: Path) -> None:
    edit(folder, lambda document: document.update(license="\x1b[2J"))


@attack("schema: got 5, this version reads 3 and 4: update lesa")
def from_the_future(folder: Path) -> None:
    edit(folder, lambda document: document.update(schema=5))


@attack("workload: must be a name")
def name_with_a_path(folder: Path) -> None:
    edit(folder, lambda document: document.update(workload="../champion"))


@attack("not a name")
def budget_with_a_path(folder: Path) -> None:
    edit(folder, lambda document: document["budgets"].update({"..%2f..": document["budgets"]["1.67x"]}))


@attack("full_steps")
def schedule_without_a_start(folder: Path) -> None:
    edit(folder, lambda document: document["budgets"]["1.67x"].update(full_steps=[1, 5]))


@attack("decreasing noise levels")
def rising_sigmas(folder: Path) -> None:
    edit(folder, lambda document: document.update(sigmas=document["sigmas"][::-1]))


@attack("must be an integer from 1 to")
def sizes_beyond_memory(folder: Path) -> None:
    edit(folder, lambda document: document["predictor"].update(channels=10**12))


@attack("is not one of")
def unknown_kind(folder: Path) -> None:
    edit(folder, lambda document: document["predictor"].update(kind="torch.hub.load"))


if __name__ == "__main__":
    good, out = Path(sys.argv[1]), Path(sys.argv[2])
    for attack_name, (function, expected) in ATTACKS.items():
        place = out / attack_name / "bundle"
        shutil.copytree(good, place)
        function(place)
        print(f"{place}: must be refused with {expected!r}")
