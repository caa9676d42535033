"""Reads the feature this project predicts, and what else a run of the transformer leaves for training.

The tap is the image-token output of the last block, before any ControlNet residual; of an editing model's tokens,
those of the image being made. Plain torch hooks, so it also reads what a cache hook puts in a block's place.
Shapes: B batch, L tokens, C channels, D width of temb.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from lesa.models.families import BlockList, Family, blocks, family_of

# Change with every step, so they are no conditioning: the recorder keeps what they come from.
_PER_STEP = ("hidden_states", "timestep")


class FeatureTap:
    """Context manager around pipeline calls; one entry in every list per call of the transformer.

    features: [B, L', C], L' the kept tokens; temb: [B, D], as it enters norm_out; timesteps: [B], as the
    transformer was given them; latents: the first call's hidden_states; conditioning: the other arguments of
    the first step's calls, one mapping a branch.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        *,
        dtype: torch.dtype = torch.bfloat16,  # of the kept features
        device: torch.device | str = "cpu",  # where they are kept
        token_index: Callable[[int], torch.Tensor | None] | None = None,  # L -> [B, L'] kept; None keeps all
    ) -> None:
        self.features: list[torch.Tensor] = []
        self.temb: list[torch.Tensor] = []
        self.timesteps: list[torch.Tensor] = []
        self.conditioning: list[dict[str, Any]] = []
        self.latents: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None  # [B, L'] indices of the kept tokens; None: all are kept
        self._transformer = transformer
        self._dtype, self._device = dtype, torch.device(device)
        self._token_index = token_index
        self._parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self._handles: list[RemovableHandle] = []
        self._row: BlockList | None = None
        self._family: Family = family_of(transformer)
        self._num_tokens: int | None = None  # leading tokens of the image being made; None: all

    def __enter__(self) -> FeatureTap:
        _, tail, self._row = blocks(self._transformer, self._family)[-1]
        self._handles = [
            self._transformer.register_forward_pre_hook(self._on_call, with_kwargs=True),
            tail.register_forward_hook(self._on_feature),
            self._transformer.norm_out.register_forward_pre_hook(self._on_norm_out, with_kwargs=True),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def num_branches(self) -> int:
        """Calls of the transformer in the first step."""
        return len(self.conditioning)

    def _on_call(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        latents, timestep = given["hidden_states"], given["timestep"]
        self.timesteps.append(timestep.detach().to("cpu", torch.float32).reshape(-1))
        place = None if self._family.grid is None else self._family.grid(given)
        self._num_tokens = None if place is None else place.num_tokens
        if self.latents is None:
            self.latents = latents.detach().clone()
        elif len(self.timesteps) > self.num_branches + 1 or not torch.equal(latents, self.latents):
            return  # a later step: its conditioning is the first step's
        self.conditioning.append({name: value for name, value in given.items() if name not in _PER_STEP})

    def _on_feature(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert self._row is not None
        feature = (output[self._row.hidden_index] if isinstance(output, tuple) else output).detach()
        feature = feature[:, : self._num_tokens]
        if not self.features and self._token_index is not None:
            self.tokens = self._token_index(feature.shape[1])
        if self.tokens is not None:
            kept = self.tokens.to(feature.device)
            feature = feature.gather(1, kept[..., None].expand(-1, -1, feature.shape[2]))
        # A copy in any case: blocks further on may write into their input.
        self.features.append(feature.to(self._device, self._dtype, copy=True))

    def _on_norm_out(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        temb = args[1] if len(args) > 1 else kwargs["conditioning_embedding"]
        self.temb.append(temb.detach().to("cpu", torch.float32, copy=True))
