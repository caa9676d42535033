"""The published format: a folder of exactly manifest.json, weights.safetensors and README.md.

A bundle holds numbers and text, never code. What the digests promise: the weights are those that the manifest
names, and the manifest is the one whose digest you pinned. What they do not promise: a consistent forgery is
noticed only where the expected digest comes from elsewhere (registry tag, DVC lock).
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from lesa import atomic
from lesa.bundle.card import card
from lesa.bundle.manifest import SCHEMA, WEIGHTS, BundleError, Manifest
from lesa.predictor.predictor import Predictor
from lesa.predictor.spec import PredictorSpec
from lesa.strict_json import StrictJsonError, parse

MANIFEST, README = "manifest.json", "README.md"
MAX_MANIFEST = MAX_README = 1 << 20  # bytes
WRITTEN = ("schema", "channels", "step_range", "predictor", "files")  # keys of a manifest that `write_bundle` adds
_VALUE_BYTES = 4  # of the widest of _DTYPES
_NAME_BYTES = 512  # of a tensor's line in the header of the weights; it takes some 150
_FILES = (MANIFEST, README, WEIGHTS)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle; `digest` is the SHA-256 of its manifest, which names everything else."""

    manifest: Manifest
    predictor: Predictor
    digest: str
    path: Path


def load_bundle(folder: str | Path, expected_digest: str | None = None) -> Bundle:
    """Read and verify a bundle: the bytes that were checked are the bytes that are used.

    Args:
        folder: the bundle.
        expected_digest: SHA-256 of the manifest, with or without `sha256:`; None trusts the folder's origin.

    Raises:
        BundleError: why it is refused, every problem that could be told.
    """
    folder = Path(folder)
    with _opened(folder) as descriptor:
        text = _read_file(folder, descriptor, MANIFEST, MAX_MANIFEST)
        digest = atomic.sha256_bytes(text)
        if expected_digest is not None and digest != expected_digest.removeprefix("sha256:"):
            raise BundleError(folder, [f"{MANIFEST}: SHA-256 is {digest}, expected {expected_digest}"])
        try:
            document = parse(text, max_bytes=MAX_MANIFEST)
        except StrictJsonError as error:
            raise BundleError(folder, [f"{MANIFEST}: {error}"]) from None
        manifest = Manifest.from_dict(document, folder)
        _read_file(folder, descriptor, README, MAX_README)  # for people; held to the same rules
        most = _most_bytes(manifest.predictor)
        if manifest.weights_bytes > most:  # before they are read: a file may claim terabytes that it does not take
            said = f"{WEIGHTS}: {manifest.weights_bytes} bytes by the manifest, its predictor has at most {most}"
            raise BundleError(folder, [said])
        weights = _read_file(folder, descriptor, WEIGHTS, manifest.weights_bytes)
    return Bundle(manifest, _predictor(folder, manifest, weights), digest, folder)


def write_bundle(folder: str | Path, manifest: Mapping[str, Any], predictor: Predictor) -> Bundle:
    """Write a bundle beside `folder`, verify it as a reader would, then put it in place.

    Args:
        folder: where it goes; a bundle that is there is replaced only by one that loads.
        manifest: as in lesa.bundle.manifest, without the keys in `WRITTEN`, which follow.
        predictor: what the sampler runs.

    Raises:
        BundleError: listing what is wrong with the manifest; nothing is written to `folder` then.
    """
    folder = Path(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in predictor.tensors.items()}
    weights = save_safetensors(tensors)
    document = {
        **manifest,
        "schema": SCHEMA,
        "channels": predictor.spec.channels,
        "step_range": list(predictor.spec.step_range),
        "predictor": predictor.spec.to_dict(),
        "files": {WEIGHTS: {"bytes": len(weights), "sha256": atomic.sha256_bytes(weights)}},
    }
    atomic.make_dirs(folder.parent)
    with atomic.new_dir(folder, replace=True) as partial:
        try:
            atomic.write_json(partial / MANIFEST, document)
        except ValueError as error:  # NaN, or something that is no JSON
            raise BundleError(folder, [f"{MANIFEST}: {error}"]) from None
        atomic.write_bytes(partial / WEIGHTS, weights)
        checked = Manifest.from_dict(document, folder)
        atomic.write_bytes(partial / README, card(checked).encode())
        load_bundle(partial)
    return load_bundle(folder)


def _most_bytes(spec: PredictorSpec) -> int:
    """What the weights of a predictor can take at most: its values, and a header that names its tensors."""
    shapes = Predictor.tensor_shapes(spec).values()
    return sum(math.prod(shape) * _VALUE_BYTES + _NAME_BYTES for shape in shapes) + _NAME_BYTES


def _predictor(folder: Path, manifest: Manifest, weights: bytes) -> Predictor:
    problems = []
    if len(weights) != manifest.weights_bytes:
        problems.append(f"{WEIGHTS}: {len(weights)} bytes, the manifest says {manifest.weights_bytes}")
    digest = atomic.sha256_bytes(weights)
    if digest != manifest.weights_sha256:
        problems.append(f"{WEIGHTS}: SHA-256 is {digest}, the manifest says {manifest.weights_sha256}")
    if problems:
        raise BundleError(folder, problems)
    try:
        tensors = load_safetensors(weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(folder, [f"{WEIGHTS}: not safetensors ({error})"]) from None
    odd = sorted(name for name, value in tensors.items() if value.dtype not in _DTYPES)
    if odd:
        raise BundleError(
            folder, [f"{WEIGHTS}: tensor {name!r} has dtype {tensors[name].dtype}" for name in odd]
        )
    try:
        predictor = Predictor(manifest.predictor, tensors)
        sigmas = torch.tensor(manifest.sigmas)
        for budget in manifest.budgets.values():
            predictor.alphas(budget.schedule, sigmas)
    except ValueError as error:
        raise BundleError(folder, [f"{WEIGHTS}: {error}"]) from None
    return predictor


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """The folder's descriptor, once it is known to hold a bundle's three names and no others."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(folder, [f"cannot open the folder: {error.strerror}"]) from None
    try:
        names = sorted(os.listdir(descriptor))
        problems = [f"{name}: missing" for name in _FILES if name not in names]
        problems += [f"{name[:80]!r}: not a file of a bundle" for name in names if name not in _FILES]
        if problems:
            raise BundleError(folder, problems)
        yield descriptor
    finally:
        os.close(descriptor)


def _read_file(folder: Path, parent: int, name: str, limit: int) -> bytes:
    """A regular file's bytes, read once; links, devices and more than `limit` bytes are refused."""
    # O_NONBLOCK: opening a FIFO must not wait for a writer that never comes.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=parent)
    except OSError as error:
        raise BundleError(
            folder, [f"{name}: cannot be opened as a regular file ({error.strerror})"]
        ) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise BundleError(folder, [f"{name}: not a regular file"])
    with open(descriptor, "rb") as file:
        if status.st_size > limit:
            raise BundleError(folder, [f"{name}: {status.st_size} bytes, at most {limit} are read"])
        return file.read(status.st_size)
