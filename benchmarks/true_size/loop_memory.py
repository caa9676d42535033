"""Memory of the closed loop's gradient at the published models' true size, counted without a GPU or any weights.

python -m benchmarks.true_size.loop_memory [--family flux-dev ...] [--full 10 5] [--kept] [--out FILE]

The transformer, the experts and the sampler's steps run on the meta device, where tensors have shapes and no values;
every storage is counted from the operation that makes it until nothing holds it any more, forward and backward. The
hook, the checkpoints and the rule are those that train. Attention keeps what a fused kernel keeps: its inputs, its
output and one number a row. What an allocator wastes and kernels need for themselves is not in it.
Results: benchmarks/results/loop-memory.json and .md; rows that are there are not counted again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.results_files import facts
from benchmarks.true_size.models import FAMILY_NAMES, build_transformer, preset_at
from lesa.atomic import write_bytes, write_json
from lesa.doctor.estimate import estimate_costs
from lesa.models.families import FAMILIES, family_of
from lesa.models.flops import call_inputs
from lesa.models.published import call_flops
from lesa.params import BudgetParams, Workload
from lesa.params_file import load_params
from lesa.sampling import hook
from lesa.schedule import Schedule
from lesa.training.experts import Job, new_expert
from lesa.training.jobs import expert_design
from lesa.training.losses import CLOSED_LOOP
from lesa.training.rollout import ExpertRule, freeze_pipeline, in_loop
from lesa.training.step_weights import StepWeights

OUT = Path("benchmarks/results/loop-memory.json")
GB = 1e9


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations within make, as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Views of these are not counted: they were there before."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = True

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())
        return tensor

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps for its backward pass."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    return _FusedAttention.apply(query, key, value)


@contextmanager
def without_values() -> Iterator[None]:
    """What reads values is replaced by what needs shapes alone.

    Attention keeps what a fused kernel keeps, where the meta device would keep whole matrices. All image tokens are the
    picture's own, which FLUX's ids would say.
    """
    with mock.patch.object(F, "scaled_dot_product_attention", _fused), mock.patch.object(
        hook, "_num_tokens", lambda *_: None
    ):
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """One backward pass through one accelerated run."""

    transformer: torch.nn.Module  # on the meta device
    inputs: dict[str, torch.Tensor]
    workload: Workload
    schedule: Schedule
    branches: int

    def peak(self, gradient_checkpointing: bool) -> int:
        """Bytes beside the weights at the highest, with the experts and their gradients."""
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(self.schedule.num_steps)
        scheduler.set_begin_index(0)
        pipe = SimpleNamespace(
            transformer=self.transformer, scheduler=scheduler, components={"transformer": self.transformer}
        )
        freeze_pipeline(pipe)
        rule = self._rule(scheduler.sigmas)
        with LiveBytes() as live, without_values():
            live.leave_out(self.transformer.parameters())
            latents = start = torch.zeros_like(self.inputs["hidden_states"])
            with in_loop(pipe, self.schedule, rule, gradient_checkpointing):
                for timestep in scheduler.timesteps:
                    latents = self._step(scheduler, timestep, latents)
            CLOSED_LOOP[self.workload.closed_loop.loss](latents, start).backward()
        return live.peak

    def _step(self, scheduler: Any, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        now = torch.zeros_like(self.inputs["timestep"])
        inputs = self.inputs | {"hidden_states": latents, "timestep": now}
        outputs = []
        for branch in ("cond", "uncond")[: self.branches]:
            with self.transformer.cache_context(branch):
                outputs.append(self.transformer(**inputs, return_dict=False)[0])
        velocity = outputs[0]
        if len(outputs) == 2:  # as QwenImagePipeline guides: the combination has the length of the conditional one
            combined = outputs[1] + 4.0 * (outputs[0] - outputs[1])
            lengths = (torch.norm(value, dim=-1, keepdim=True) for value in (outputs[0], combined))
            velocity = combined * (next(lengths) / next(lengths))
        return scheduler.step(velocity, timestep, latents, return_dict=False)[0]

    def _rule(self, sigmas: torch.Tensor) -> ExpertRule:
        workload, params = self.workload, self.workload.predictor
        channels, steps, regressors = _channels(self.transformer), self.schedule.num_steps, params.step_history + 1
        design = dataclasses.replace(
            expert_design(workload),
            call=dataclasses.replace(workload.call, num_inference_steps=steps),
            schedule=dataclasses.replace(
                workload.schedule,
                budgets={workload.schedule.default_budget: BudgetParams(full_steps=self.schedule.full_steps)},
            ),
            # A KAN of time offsets takes a megabyte whatever the model, and pykan's does not move to the meta device.
            predictor=dataclasses.replace(params, gate="table"),
        )
        weights = StepWeights(
            torch.zeros(steps, regressors, channels), torch.zeros(steps, channels, regressors, regressors)
        )
        return ExpertRule(
            experts={
                stage: new_expert(design, Job(workload.schedule.default_budget, stage), sigmas, channels).to("meta")
                for stage in range(len(params.history_sizes))
            },
            schedule=self.schedule,
            sigmas=sigmas,
            boundaries=params.boundaries,
            sizes=tuple(params.history_sizes),
            history=params.history,
            step_weights=weights.to("meta") if params.kind == "per_step" else None,
            step_history=params.step_history,
        )


def even(num_steps: int, num_full: int) -> Schedule:
    """Full steps as evenly apart as they go, the first two among them."""
    rest = [2 + round(index * (num_steps - 3) / (num_full - 2)) for index in range(num_full - 2)]
    return Schedule.explicit(num_steps, (0, 1, *rest))


def measure(name: str, num_full: int, scale: str = "true", kept: bool = False) -> dict[str, Any]:
    """One model at one number of full steps, with checkpointing and, if `kept`, without."""
    preset, workload = preset_at(name, scale), load_params(workload=name)
    transformer = build_transformer(preset, torch.device("meta"), torch.bfloat16)
    branches = 2 if family_of(transformer) is FAMILIES["qwen-image"] else 1
    inputs = call_inputs(transformer, preset.grid, preset.text_tokens, dtype=torch.bfloat16)
    loop = Loop(
        transformer=transformer,
        inputs=inputs,
        workload=workload,
        schedule=even(preset.num_inference_steps, num_full),
        branches=branches,
    )
    weights = sum(parameter.nbytes for parameter in transformer.parameters())
    row: dict[str, Any] = {"model": name, "full": num_full, "weights": weights}
    row["tokens"] = call_flops(transformer, preset.grid, preset.text_tokens).tokens
    row["recomputed"] = loop.peak(True)
    if kept:
        row["kept"] = loop.peak(False)
    return row


def _channels(transformer: torch.nn.Module) -> int:
    config = transformer.config
    return config.num_attention_heads * config.attention_head_dim


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people, in GB."""
    lines = [
        "# Memory of the closed loop's gradient",
        "",
        "One trajectory, the model in bfloat16, counted on the meta device by `python -m benchmarks.true_size"
        ".loop_memory`: GB beside the weights at the highest, with experts and their gradients.",
        "",
        "| model | image tokens | full steps | weights of the transformer | activations made again | kept | "
        "`lesa doctor` |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        kept, estimated = (f"{row[key] / GB:.1f}" if key in row else "" for key in ("kept", "estimated"))
        lines.append(
            f"| {row['model']} | {row['tokens']} | {row['full']} | {row['weights'] / GB:.1f} | "
            f"{row['recomputed'] / GB:.1f} | {kept} | {estimated} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.true_size.loop_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", nargs="+", choices=FAMILY_NAMES, default=list(FAMILY_NAMES))
    parser.add_argument("--full", type=int, nargs="+", default=[10, 5], help="full steps of 50")
    parser.add_argument("--kept", action="store_true", help="also without checkpointing, which takes twice as long")
    parser.add_argument("--scale", choices=("true", "small"), default="true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    before = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    counted = {(row["model"], row["full"]): row for row in before}
    for name in options.family:
        for num_full in options.full:
            if (name, num_full) not in counted:
                counted[name, num_full] = measure(name, num_full, options.scale, options.kept)
                write_rows(options.out, counted, arguments)
            print(table([counted[name, num_full]]).splitlines()[-1], flush=True)
    write_rows(options.out, counted, arguments)
    return 0


def write_rows(out: Path, counted: Mapping[tuple[str, int], dict[str, Any]], arguments: Sequence[str] | None) -> None:
    """All rows in the order of models and full steps, each beside what the doctor says now of its workload."""
    rows = [counted[key] for key in sorted(counted, key=lambda key: (FAMILY_NAMES.index(key[0]), -key[1]))]
    for row in rows:
        row["estimated"] = estimate_costs(load_params(workload=row["model"])).closed_loop
    known = facts("benchmarks.true_size.loop_memory", arguments, torch.device("cpu"))
    write_json(out, {**known, "rows": rows}, sort_keys=False)
    write_bytes(out.with_suffix(".md"), table(rows).encode())


if __name__ == "__main__":
    raise SystemExit(main())
