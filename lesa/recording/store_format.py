"""What lies on disk for one trajectory: the only metadata the store writes, so the only ones it reads.

Everything is checked against them before an array is allocated: Zarr format 3, uint16 or float32, one shard, the
codecs `bytes` and `crc32c` and nothing else. A file's size must be what its shape makes. Two formats are read, the
second is written: it keeps the arrays' metadata in the group's (Zarr's consolidated metadata) and names a shard
without folders, three files in three folders instead of five in eight, since DVC looks at each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch

from lesa import atomic
from lesa.errors import LesaError
from lesa.strict_json import StrictJsonError, parse

FORMAT = 2  # of what is written
SHARDS = {
    1: {"context": "context/c/0", "features": "features/c/0/0/0/0"},
    2: {"context": "context/c.0", "features": "features/c.0.0.0.0"},
}
FILES = {
    1: ("context/c/0", "context/zarr.json", "features/c/0/0/0/0", "features/zarr.json", "zarr.json"),
    2: ("context/c.0", "features/c.0.0.0.0", "zarr.json"),
}  # sorted, by format
_SEPARATORS = {1: "/", 2: "."}
MAX_METADATA_BYTES = 16 << 20  # of one zarr.json; the largest part is a list of kept tokens
_AXES = ("step", "branch", "token", "channel")
_BF16_NAN = 0x7FC0  # fill value: should a chunk ever go missing, it reads as NaN and not as zeros
CRC_BYTES, INDEX_BYTES = 4, 16  # per checksum; per entry of a shard's index
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
}


class StoreError(LesaError):
    """A store, or a trajectory in it, that must not be used; the message names the key and what is wrong."""


def features_bytes(shape: tuple[int, ...]) -> int:
    """Size of the shard of features [S, R, L, C]: an inner chunk with checksum a step, then the index."""
    return shape[0] * (math.prod(shape[1:]) * 2 + CRC_BYTES + INDEX_BYTES) + CRC_BYTES


def context_bytes(num_values: int) -> int:
    """Size of the context's only chunk."""
    return num_values * 4 + CRC_BYTES


def pack(key: str, context: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, dict[str, Any]]:
    """Context tensors as one float32 vector in the order of their names, and where each of them lies."""
    layout: dict[str, Any] = {}
    parts, offset = [], 0
    for name in sorted(context):
        tensor = context[name].detach().cpu().contiguous()
        kind = str(tensor.dtype).removeprefix("torch.")
        values = tensor.to(torch.float32)
        if kind not in _DTYPES or not torch.equal(values.to(tensor.dtype), tensor):
            raise StoreError(f"trajectory {key}: {name} ({kind}) does not fit into float32 without loss")
        layout[name] = {"dtype": kind, "offset": offset, "shape": list(tensor.shape)}
        parts.append(values.flatten())
        offset += values.numel()
    if offset == 0:
        raise StoreError(f"trajectory {key}: its context is empty")
    return torch.cat(parts).numpy(), layout


def unpack(key: str, values: np.ndarray, layout: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    flat, context, offset = torch.from_numpy(values), {}, 0
    for name in sorted(layout):
        place = layout[name]
        if not isinstance(place, dict) or set(place) != {"dtype", "offset", "shape"}:
            raise StoreError(f"trajectory {key}: layout of {name} is {short(place)}")
        shape, kind = place["shape"], place["dtype"]
        if not _is_shape(shape) or place["offset"] != offset or not isinstance(kind, str) or kind not in _DTYPES:
            raise StoreError(f"trajectory {key}: layout of {name} is {short(place)}")
        size = math.prod(shape)
        if offset + size > flat.numel():
            raise StoreError(
                f"trajectory {key}: {name} ends at {offset + size}, the context at {flat.numel()}"
            )
        context[name] = flat[offset : offset + size].reshape(shape).to(_DTYPES[kind])
        offset += size
    if offset != flat.numel():
        raise StoreError(f"trajectory {key}: layout covers {offset} of {flat.numel()} context values")
    return context


def digest(values: np.ndarray) -> str:
    return atomic.sha256_bytes(np.ascontiguousarray(values).view(np.uint8).data)


def check_digest(key: str, name: str, values: np.ndarray, record: Mapping[str, Any]) -> None:
    digests = record["digests"]
    expected = digests.get(name) if isinstance(digests, dict) else None
    got = digest(values)
    if got != expected:
        raise StoreError(
            f"trajectory {key}: {name} has digest {got}, its record says {expected}; record it again"
        )


def group_metadata(attributes: Mapping[str, Any], arrays: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A group's zarr.json; with `arrays`, metadata by name, it needs none of their own."""
    consolidated = {"kind": "inline", "metadata": arrays, "must_understand": False}
    return {
        "attributes": dict(attributes),
        **({} if arrays is None else {"consolidated_metadata": consolidated}),
        "node_type": "group",
        "zarr_format": 3,
    }


def arrays_of(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Metadata of the arrays that a group's zarr.json of format 2 has; None where it has another form."""
    consolidated = metadata.get("consolidated_metadata")
    arrays = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    if not isinstance(arrays, dict) or tuple(sorted(arrays)) != tuple(SHARDS[2]):
        return None
    return arrays if all(isinstance(array, dict) for array in arrays.values()) else None


def _metadata(
    shape: tuple[int, ...],
    data_type: str,
    fill_value: Any,
    codecs: list[Any],
    axes: tuple[str, ...],
    attributes: Any,
    format: int,
) -> dict[str, Any]:
    return {
        "attributes": attributes,
        "chunk_grid": {"configuration": {"chunk_shape": list(shape)}, "name": "regular"},
        "chunk_key_encoding": {"configuration": {"separator": _SEPARATORS[format]}, "name": "default"},
        "codecs": codecs,
        "data_type": data_type,
        "dimension_names": list(axes),
        "fill_value": fill_value,
        "node_type": "array",
        "shape": list(shape),
        "storage_transformers": [],
        "zarr_format": 3,
    }


def _plain_codecs() -> list[Any]:
    return [{"configuration": {"endian": "little"}, "name": "bytes"}, {"name": "crc32c"}]


def features_metadata(shape: tuple[int, ...], format: int = FORMAT) -> dict[str, Any]:
    sharding = {
        "configuration": {
            "chunk_shape": [1, *shape[1:]],
            "codecs": _plain_codecs(),
            "index_codecs": _plain_codecs(),
            "index_location": "end",
        },
        "name": "sharding_indexed",
    }
    return _metadata(shape, "uint16", _BF16_NAN, [sharding], _AXES, {}, format)


def context_metadata(size: int, layout: Mapping[str, Any], format: int = FORMAT) -> dict[str, Any]:
    return _metadata((size,), "float32", "NaN", _plain_codecs(), ("value",), dict(layout), format)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) in (int, float) for item in value)


def _is_tokens(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(type(item) is int for item in value))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


RECORD: dict[str, tuple[Callable[[Any], bool], str]] = {  # key of a commit record -> what it must be
    "call_kwargs": (lambda value: isinstance(value, list) and all(map(_is_mapping, value)), "a list of mappings"),
    "digests": (_is_mapping, "a mapping"),
    "format": (lambda value: type(value) is int, "a number"),
    "identity": (_is_mapping, "a mapping"),
    "key": (lambda value: isinstance(value, str), "text"),
    "prompt": (lambda value: isinstance(value, str), "text"),
    "seed": (lambda value: type(value) is int, "a whole number"),
    "sigmas": (_is_numbers, "a list of numbers"),
    "timesteps": (_is_numbers, "a list of numbers"),
    "token_index": (_is_tokens, "null or a list of whole numbers"),
}


def check_record(key: str, record: Mapping[str, Any]) -> None:
    """Refuse a commit record with other keys, or with values of another kind."""
    if set(record) != set(RECORD):
        raise StoreError(f"trajectory {key}: record has {short(sorted(record))}, expected {list(RECORD)}")
    for name, (accept, what) in RECORD.items():
        if not accept(record[name]):
            raise StoreError(f"trajectory {key}: {name} must be {what}, got {short(record[name])}; record it again")
    if len(record["sigmas"]) != len(record["timesteps"]) + 1:
        counts = f"{len(record['sigmas'])} noise levels for {len(record['timesteps'])} timesteps"
        raise StoreError(f"trajectory {key}: {counts}, expected one more; record it again")


def read_metadata(path: Path) -> dict[str, Any]:
    """A zarr.json, read as `lesa.strict_json` reads; StoreError says what is wrong with it."""
    try:
        with atomic.open_regular(path) as file:
            text = file.read(MAX_METADATA_BYTES + 1)
        return parse(text, max_bytes=MAX_METADATA_BYTES, printable=False)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    except StrictJsonError as error:
        raise StoreError(f"{path}: not the JSON it should be ({error})") from None


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**40 for size in shape)


def positive_shape(key: str, metadata: Mapping[str, Any], ndim: int) -> tuple[int, ...]:
    """The declared shape, once it is `ndim` sizes of at least 1."""
    shape: Any = metadata.get("shape")
    if not _is_shape(shape) or len(shape) != ndim or 0 in shape:
        raise StoreError(f"trajectory {key}: shape {short(shape)} is not {ndim} positive sizes")
    return tuple(shape)


def compare(key: str, name: str, got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    wrong = [field for field in sorted(set(got) | set(expected)) if got.get(field) != expected.get(field)]
    if wrong:
        pairs = "; ".join(f"{f}: got {short(got.get(f))}, expected {short(expected.get(f))}" for f in wrong)
        raise StoreError(f"trajectory {key}: {name} is not in the one form this store has: {pairs}")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def write_group(
    folder: Path,
    attributes: Mapping[str, Any],
    *,
    features: np.ndarray,  # uint16 [S, R, L, C]
    context: np.ndarray,  # float32, all values
    layout: Mapping[str, Any],  # which of them lie where
) -> None:
    """Write a trajectory's three files into `folder`, which is empty."""
    import zarr
    from zarr.storage import LocalStore

    arrays = {
        "context": context_metadata(context.size, layout),
        "features": features_metadata(features.shape),
    }
    (folder / "zarr.json").write_bytes(atomic.json_bytes(group_metadata(attributes, arrays)))
    group = zarr.open_group(LocalStore(folder), mode="r+", zarr_format=3, use_consolidated=True)
    for name, values in (("context", context), ("features", features)):
        array = group[name]
        assert isinstance(array, zarr.Array)
        array.with_config({"write_empty_chunks": True})[...] = values


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
