"""The bytes of a trajectory's arrays, read as they lie: a Zarr v3 shard of steps, and one chunk of context values.

The metadata have been compared by then, so the layout is known (`lesa.store_format`). A training job reads every
trajectory there is, and going through a general reader takes several times as long as the reading itself. Every
checksum in the files is verified, as such a reader does.
"""

from __future__ import annotations

import math
from pathlib import Path

import google_crc32c  # zarr's own
import numpy as np

from lesa import atomic
from lesa.store_format import CRC_BYTES, INDEX_BYTES, StoreError


def read_features(key: str, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """uint16 [S, R, L, C] from a shard with one inner chunk a step and its index at the end.

    Raises:
        StoreError: naming the first step whose chunk is not what its checksum says.
    """
    data = _read(path)
    steps, size = shape[0], math.prod(shape[1:]) * 2
    index = _verified(data[len(data) - steps * INDEX_BYTES - CRC_BYTES :])
    if index is None:
        raise StoreError(f"trajectory {key}: features, index of the shard: wrong checksum; record it again")
    values = np.empty(shape, np.uint16)
    for step, (offset, length) in enumerate(np.frombuffer(index, "<u8").reshape(steps, 2).tolist()):
        chunk = _verified(data[offset : offset + length]) if length == size + CRC_BYTES else None
        if chunk is None or len(chunk) != size:
            raise StoreError(f"trajectory {key}: features, step {step}: wrong checksum; record it again")
        values[step] = np.frombuffer(chunk, "<u2").reshape(shape[1:])
    return values


def read_context(key: str, path: Path) -> np.ndarray:
    """All float32 values of the context's only chunk; StoreError where they are not what the checksum says."""
    values = _verified(_read(path))
    if values is None:
        raise StoreError(f"trajectory {key}: context: wrong checksum; record it again")
    return np.frombuffer(values, "<f4").astype(np.float32)


def _read(path: Path) -> bytes:
    with atomic.open_regular(path) as file:
        return file.read()


def _verified(data: bytes) -> bytes | None:
    """What stands before the checksum at the end; None where it is another's."""
    values, checksum = data[:-CRC_BYTES], data[-CRC_BYTES:]
    return values if int.from_bytes(checksum, "little") == google_crc32c.value(values) else None
