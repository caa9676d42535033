"""A name for a transformer's configuration and base weights.

It survives precision, adapters, compilation and offload, and is cheap enough for twelve billion parameters:
a few slices of every tensor are read. It tells models and fine-tunes apart, not weights edited between the
slices. A smaller sample, for every run, tells whether weights changed since a moment before.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lesa.errors import LesaError

_VERSION = "lesa-fingerprint-1"
_NUM_SLICES = 4
_SLICE = 64  # elements
_WATCHED = 16  # elements of a parameter that tell whether it changed
_ADAPTER_PARTS = ("lora_", "hada_", "lokr_", "oft_", "magnitude_vector", "modules_to_save")  # PEFT's names
_WRAPPERS = ("_orig_mod", "base_layer", "_fsdp_wrapped_module")  # path elements that wrap a module
_INTEGER_MODULES = "torch.ao.nn.quantized"  # their weights are packed, so they are no parameters
_NOT_ARCHITECTURE = ("quantization_config",)  # how weights are stored, not what they are


def fingerprint(transformer: torch.nn.Module) -> str:
    """`sha256:...` over configuration, parameter names and shapes, and sampled values rounded to bfloat16.

    Equal for float32 and bfloat16 loads of the same weights, with or without unfused adapters, compiled or
    offloaded (accelerate's and diffusers' hooks).

    Raises:
        ValueError: for weights that are on the meta device with no offload hook to read them from.
    """
    transformer = _uncompiled(transformer)
    digest = hashlib.sha256(_VERSION.encode())
    digest.update(type(transformer).__name__.encode())
    digest.update(json.dumps(_architecture(transformer), sort_keys=True, default=str).encode())
    samples: list[torch.Tensor] = []
    names: list[str] = []
    for name, value in sorted(base_parameters(transformer)):
        names.append(f"{name} {list(value.shape)}")
        samples.append(_sample(value))
    digest.update("\n".join(names).encode())
    if samples:
        # One transfer for all: a wait per tensor would cost more than the reading.
        devices = {sample.device for sample in samples}
        joined = torch.cat(samples) if len(devices) == 1 else torch.cat([sample.cpu() for sample in samples])
        digest.update(joined.cpu().contiguous().view(torch.int16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def adapters(transformer: torch.nn.Module) -> list[str]:
    """Names of the adapters (LoRA and the like) loaded into the transformer, fused ones not included."""
    return sorted(getattr(_uncompiled(transformer), "peft_config", None) or {})


def is_quantized(transformer: torch.nn.Module) -> bool:
    """Whether the weights are stored in fewer bits than a floating type of 16."""
    transformer = _uncompiled(transformer)
    if getattr(transformer, "hf_quantizer", None) is not None or getattr(transformer, "is_quantized", False):
        return True
    if any(type(module).__module__.startswith(_INTEGER_MODULES) for module in transformer.modules()):
        return True
    return any(
        not value.dtype.is_floating_point or value.dtype.itemsize < 2 or _is_tensor_subclass(value)
        for _, value in base_parameters(transformer, read=False)
    )


def base_parameters(transformer: torch.nn.Module, *, read: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every parameter of the base model, as if nothing wrapped it.

    With `read`, values that an offload hook keeps elsewhere are fetched from there.
    """
    for name, module, leaf, value in _base_places(transformer):
        yield name, (_offloaded(module, leaf, value, name) if read else value)


def _base_places(transformer: torch.nn.Module) -> list[tuple[str, torch.nn.Module, str, torch.Tensor]]:
    """Name, module, attribute and what stands there of every parameter of the base model.

    Over the modules' own dictionaries, since every run asks: `named_modules` and names cut up for each parameter take
    several times as long.
    """
    places: list[tuple[str, torch.nn.Module, str, torch.Tensor]] = []
    seen: set[int] = set()

    def walk(prefix: str, module: torch.nn.Module) -> None:
        seen.add(id(module))
        for leaf, value in module._parameters.items():
            if value is not None and not _is_adapter(leaf):
                places.append((prefix + leaf, module, leaf, value))
        for leaf, child in module._modules.items():
            if child is not None and id(child) not in seen and not _is_adapter(leaf):
                walk(prefix if leaf in _WRAPPERS else f"{prefix}{leaf}.", child)

    walk("", transformer)
    return places


@cache
def _is_adapter(element: str) -> bool:
    return any(part in element for part in _ADAPTER_PARTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSample:
    """A few values of every base parameter: tells later whether the weights are still the same.

    Made in milliseconds for a model of a thousand parameters. Adapters beside the base weights do not count, nor does
    a precision that rounds to the same bfloat16; an adapter that was fused into them does.
    """

    places: dict[str, tuple[torch.Size, slice]]  # shape of each parameter, and where its values lie
    values: torch.Tensor  # int16 on the CPU: the bits of bfloat16 values

    @classmethod
    def of(cls, transformer: torch.nn.Module) -> WeightSample:
        """Read from wherever the weights are now; one transfer a device, and no tensor is copied as a whole.

        Raises:
            LesaError: as `base_parameters`.
        """
        groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        kept: dict[tuple[torch.device, torch.dtype], list[tuple[str, torch.Size, int]]] = {}
        with torch.inference_mode():
            for name, value in base_parameters(_uncompiled(transformer)):
                local = getattr(value, "_local_tensor", value)  # the part of a distributed one that is here
                entries = local if local.is_contiguous() else local.reshape(-1)
                size, group = local.numel(), (local.device, local.dtype)
                count = min(size, _WATCHED)
                picked = entries.as_strided((count,), (max(size // _WATCHED, 1),))
                groups.setdefault(group, []).append(picked)
                kept.setdefault(group, []).append((name, value.shape, count))
            read = [torch.cat(parts).to(torch.bfloat16).cpu() for parts in groups.values()]
        places, start = {}, 0
        for name, shape, count in itertools.chain.from_iterable(kept.values()):
            places[name] = shape, slice(start, start + count)
            start += count
        values = torch.cat(read) if read else torch.empty(0, dtype=torch.bfloat16)
        return cls(places=places, values=values.view(torch.int16))

    @classmethod
    def none(cls) -> WeightSample:
        """Of no parameters: where weights cannot be compared."""
        return cls(places={}, values=torch.empty(0, dtype=torch.int16))

    def differences(self, other: WeightSample) -> list[str]:
        """Names of the parameters that are not in both, or not the same."""
        if self.places == other.places and torch.equal(self.values, other.values):
            return []
        return sorted(
            name for name in self.places.keys() | other.places.keys() if not self._has_same(name, other)
        )

    def _has_same(self, name: str, other: WeightSample) -> bool:
        if name not in self.places or name not in other.places:
            return False
        (own_shape, own), (shape, place) = self.places[name], other.places[name]
        return own_shape == shape and torch.equal(self.values[own], other.values[place])


def _architecture(transformer: torch.nn.Module) -> dict[str, Any]:
    """Settings that differ from the class's defaults: one that a newer diffusers adds changes nothing."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(transformer).__init__).parameters.items()
    }
    settings = dict(getattr(transformer, "config", {}))
    plain = {name: _plain(value) for name, value in settings.items()}
    return {
        name: value
        for name, value in plain.items()
        if not name.startswith("_") and name not in _NOT_ARCHITECTURE and value != _plain(defaults.get(name))
    }


def _plain(value: Any) -> Any:
    """Tuples and lists are the same setting: JSON turns one into the other."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _offloaded(module: torch.nn.Module, leaf: str, value: torch.Tensor, name: str) -> torch.Tensor:
    if value.device.type != "meta":
        return value.detach()
    hook = getattr(module, "_hf_hook", None)
    for candidate in (hook, *getattr(hook, "hooks", ())):
        kept: Mapping[str, torch.Tensor] | None = getattr(candidate, "weights_map", None)
        if kept is not None and leaf in kept:
            return kept[leaf].detach()
    raise LesaError(
        f"parameter {name} is on the meta device and no offload hook says where its values are: "
        "enable LESA before offloading, or load the weights"
    )


def _sample(value: torch.Tensor) -> torch.Tensor:
    """Evenly spaced slices of the flattened tensor, all of it where it is small, as bfloat16."""
    flat = value.reshape(-1)
    if flat.numel() > _NUM_SLICES * _SLICE:
        gap = (flat.numel() - _SLICE) // (_NUM_SLICES - 1)
        flat = torch.cat([flat[index * gap : index * gap + _SLICE] for index in range(_NUM_SLICES)])
    return flat.to(torch.bfloat16)


def _is_tensor_subclass(value: torch.Tensor) -> bool:
    inner = value.data if isinstance(value, torch.nn.Parameter) else value
    return type(inner).__module__.split(".")[0] in ("torchao", "bitsandbytes", "optimum")


def _uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """What torch.compile wraps, where it wraps anything."""
    from diffusers.utils.torch_utils import unwrap_module  # seconds to import; who plans a recording needs none of it

    inner: torch.nn.Module = unwrap_module(module)
    return inner
