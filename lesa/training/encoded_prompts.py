"""Text encoders and decoder away from the device while a loop trains through the sampler, each prompt encoded once.

A loop asks for the same prompts again and again, and encoders and decoder take memory beside the transformer: 9.9 of
FLUX.1-dev's 33.7 GB in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from torch import nn


class EncodedPrompts:
    """A pipeline's `encode_prompt` that remembers each prompt's embeddings, in the memory of the host.

    A batch is put together of its prompts' own; where these are of different lengths it is encoded as a whole.

    Args:
        encode: the pipeline's own.
        release: called after anything was encoded.
    """

    def __init__(self, encode: Any, release: Any) -> None:
        self._encode, self._release = encode, release
        self._known: dict[tuple[str, str], tuple[Any, ...]] = {}

    def __call__(self, prompt: Any = None, **arguments: Any) -> tuple[Any, ...]:
        given = any(isinstance(value, torch.Tensor | list) for value in arguments.values())
        if not isinstance(prompt, list) or given:
            return self._fresh(prompt, arguments)
        every = [self._remembered(text, arguments) for text in prompt]
        if any(_shapes(one) != _shapes(every[0]) for one in every):
            return self._fresh(prompt, arguments)
        device = arguments.get("device")
        return tuple(_joined(values, device) for values in zip(*every, strict=True))

    def _remembered(self, text: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
        key = (text, repr(sorted(arguments.items(), key=lambda item: item[0])))
        if key not in self._known:
            encoded = self._fresh([text], arguments)
            self._known[key] = tuple(v.cpu() if isinstance(v, torch.Tensor) else v for v in encoded)
        return self._known[key]

    @torch.no_grad()
    def _fresh(self, prompt: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
        try:
            return self._encode(prompt=prompt, **arguments)
        finally:
            self._release()


@contextmanager
def prompts_encoded_once(pipe: Any) -> Iterator[None]:
    """Within, `pipe` encodes each prompt once, and of its parts the transformer alone stays on the device.

    A pipeline whose parts are offloaded already keeps its own way.
    """
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not pipe.transformer]
    own = [] if any(hasattr(part, "_hf_hook") for part in parts) else parts
    device = pipe.transformer.device
    hooks = [cpu_offload_with_hook(part, device)[1] for part in own]

    def release() -> None:
        for hook in hooks:
            hook.offload()

    pipe.encode_prompt = EncodedPrompts(pipe.encode_prompt, release)
    try:
        yield
    finally:
        del pipe.encode_prompt  # the class has its own
        for part in own:
            remove_hook_from_module(part, recurse=True)
            part.to(device)


def _shapes(encoded: tuple[Any, ...]) -> list[torch.Size | None]:
    return [value.shape if isinstance(value, torch.Tensor) else None for value in encoded]


def _joined(values: tuple[Any, ...], device: torch.device | None) -> Any:
    """One batch of the prompts' values; what has no place for a batch is the same for all."""
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    batched = values[0].shape[0] == 1 and len(values) > 1
    return (torch.cat(values) if batched else values[0]).to(device)
