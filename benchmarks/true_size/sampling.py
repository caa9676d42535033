"""Wall clock and memory at the published models' true size: random weights in bfloat16, no download.

python -m benchmarks.true_size.sampling         # all three models on one GPU of 80 GB, one at a time
python -m benchmarks.true_size.sampling --family flux-dev --full 10 8 --rounds 5
python -m benchmarks.true_size.sampling --scale small --device cpu        # same code on tiny models, in seconds

Each run is the real pipeline's loop (FluxPipeline, QwenImagePipeline with two branches, HunyuanVideoPipeline) at the
papers' sizes, without text encoders and decoder. Plain, LESA, diffusers' TaylorSeer (all blocks' attention, and lite)
and, where it is installed, cache-dit take turns in one process; the first round is the warm-up. A method that does not
fit in memory is a row that says so. Times do not depend on the weights' values, so this measures speed and memory and
says nothing of quality. Results: benchmarks/results/true_size.json, written after every model.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import TaylorSeerCacheConfig

from benchmarks.peers.external import BEFORE, taylorseer_lite, taylorseer_steps
from benchmarks.results_files import facts, spread, timed
from benchmarks.true_size.models import FAMILY_NAMES, build_pipeline, call_arguments, preset_at
from lesa.atomic import write_json
from lesa.models.flops import call_inputs
from lesa.models.pipelines import pick_device
from lesa.models.probe import held_bytes, probe
from lesa.models.published import Preset
from lesa.params import BudgetParams, CallParams, ModelParams, PredictorParams, RecordParams, ScheduleParams, Workload
from lesa.peers.caches import diffusers_cache_method
from lesa.peers.method import Method, lesa_method
from lesa.predictor.predictor import Predictor
from lesa.predictor.rule import History
from lesa.sampling.hook import cache_state, is_lesa_cache_enabled
from lesa.schedule import Schedule
from lesa.training.experts import untrained_predictor
from lesa.training.jobs import expert_design

OUT = Path("benchmarks/results/true_size.json")
NUM_STEPS = 50
INTERVALS = {10: 7, 9: 8, 8: 10}  # full steps of 50 -> interval after three warm-up steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.true_size.sampling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", nargs="+", choices=FAMILY_NAMES, default=list(FAMILY_NAMES))
    parser.add_argument("--full", type=int, nargs="+", choices=tuple(INTERVALS), default=[10], help="full steps of 50")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each method, after one for warming up")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--scale", default="true", choices=("true", "small"))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    try:
        device = pick_device(options.device)
        if options.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
        if options.scale == "true" and device.type != "cuda":
            raise ValueError("--scale true needs a GPU; --scale small runs the same code here")
    except ValueError as error:
        parser.error(str(error))
    record: dict[str, Any] = {
        **facts("benchmarks.true_size.sampling", arguments, device),
        "scale": options.scale,
        "dtype": "bfloat16",
        "rounds": options.rounds,
        "models": [],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.family:
        try:
            record["models"].append(measure(preset_at(name, options.scale), device, options.full, options.rounds))
        except (ValueError, torch.OutOfMemoryError) as error:
            record["models"].append({"family": name, "error": _first_line(error)})
        _free(device)
        write_json(options.out, record, sort_keys=False)
        print(json.dumps(record["models"][-1], indent=2), flush=True)
    return 0


def measure(preset: Preset, device: torch.device, full: Sequence[int], rounds: int) -> dict[str, Any]:
    """One model: a call, the predictor alone, and runs of every method in turn."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    pipe = build_pipeline(preset, device, dtype)
    weights = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
    arguments = call_arguments(preset, pipe)
    kind = {"device": device, "dtype": dtype}
    inputs = call_inputs(pipe.transformer, preset.grid, preset.text_tokens, **kind)
    call = lambda: pipe.transformer(**inputs, return_dict=False)  # noqa: E731
    with torch.no_grad():
        call()
        calls = [timed(call, device) for _ in range(max(3, rounds))]
    run(pipe, arguments)  # warm, and sets the noise levels that predictors are bound to
    sigmas = pipe.scheduler.sigmas.float().cpu()
    rows: list[dict[str, Any]] = []
    alone: dict[str, Any] = {}
    methods: dict[str, Method | None] = {"plain": None}
    for count in full:
        schedule = Schedule.uniform(NUM_STEPS, INTERVALS[count])
        predictor = fresh_predictor(preset, schedule, sigmas, pipe.transformer)
        alone[str(count)] = time_predictor(predictor, schedule, sigmas, preset, device, rounds)
        methods |= {f"{m.name}@{count}": m for m in methods_at(count, schedule, predictor, pipe)}
    found = take_turns(pipe, arguments, sigmas, methods, device, rounds)
    plain = found.pop("plain")
    if "error" in plain:
        raise ValueError(f"the plain run failed: {plain['error']}")
    for name, row in found.items():
        if "seconds" in row:
            row["ratio"] = plain["seconds"]["median"] / row["seconds"]["median"]
        method = methods[name]
        assert method is not None
        rows.append({"method": method.name, "label": method.label, "full_steps": int(method.budget), **row})
    return {
        "family": preset.name,
        "size": preset.size,
        "branches": preset.branches,
        "image_tokens": preset.grid[0] * preset.grid[1] * preset.grid[2],
        "num_inference_steps": NUM_STEPS,
        "weights_bytes": weights,
        "full_call_seconds": spread(calls),
        "predictor_alone_seconds": alone,
        "plain": plain,
        "methods": rows,
    }


@torch.no_grad()
def run(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """One sampler run through the pipeline's own call, to latents."""
    return pipe(**arguments, generator=torch.Generator("cpu").manual_seed(0))[0]


def methods_at(count: int, schedule: Schedule, predictor: Predictor, pipe: Any) -> list[Method]:
    """LESA and its peers at a number of full steps; TaylorSeer on its own rule with the same number."""
    budget = str(count)
    found = [lesa_method(budget, predictor, schedule)]
    if (lite := taylorseer_lite(budget, schedule.num_steps, count, order=1)) is not None:
        found += [taylorseer(budget, schedule.num_steps, count), lite]
    if importlib.util.find_spec("cache_dit") is None or importlib.util.find_spec("benchmarks.peers.cache_dit") is None:
        return found
    from benchmarks.peers import cache_dit as cache_dit_peer

    missing = cache_dit_peer.missing(pipe, CallParams(height=8, width=8, num_inference_steps=schedule.num_steps))
    return found if missing else found + cache_dit_peer.masked_methods(budget, schedule)


def taylorseer(budget: str, num_steps: int, count: int) -> Method:
    """diffusers' TaylorSeer as it comes: every attention's output is cached and extrapolated, in bfloat16."""
    interval = next(n for n in range(1, num_steps) if len(taylorseer_steps(num_steps, n)) == count)
    return diffusers_cache_method(
        budget,
        num_steps,
        lambda: TaylorSeerCacheConfig(cache_interval=interval, disable_cache_before_step=BEFORE, max_order=1),
        name="diffusers_taylorseer1",
        label="diffusers TaylorSeer, order 1, attention outputs (the rest of every block runs)",
        settings={"cache_interval": interval, "max_order": 1, "factors": "bfloat16"},
    )


def take_turns(
    pipe: Any,
    arguments: dict[str, Any],
    sigmas: torch.Tensor,
    methods: dict[str, Method | None],
    device: torch.device,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Every method's run once a round; None is the plain run. A method that fails is left out of later rounds."""
    found: dict[str, dict[str, Any]] = {name: {} for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, method in methods.items():
            if "error" in found[name]:
                continue
            try:
                with nullcontext() if method is None else method.using(pipe, sigmas):
                    if number == 0:  # looked into while warming up; timed runs carry no hooks of ours
                        found[name] = look_into(pipe, arguments, device)
                    else:
                        seconds[name].append(timed(lambda: run(pipe, arguments), device))
            except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
                found[name] = {"error": _first_line(error)}
            _free(device)
    return {
        name: row if "error" in row else {"seconds": spread(seconds[name]), **row} for name, row in found.items()
    }


def look_into(pipe: Any, arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A run's computed calls, bytes that caches keep from step to step, peak memory beside the weights."""
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with probe(pipe) as trace, kept_at_most(pipe.transformer) as kept:
        latents = run(pipe, arguments)
    row = {
        "computed_calls": trace.computed,
        "calls": trace.calls,
        "finite": bool(torch.isfinite(latents).all()),
        "bytes_kept": max(kept, default=0),
        "peak_bytes_beside_weights": torch.cuda.max_memory_allocated(device) - before
        if device.type == "cuda"
        else None,
    }
    if is_lesa_cache_enabled(pipe.transformer):
        records = [r for r in cache_state(pipe.transformer).steps if r.kind == "predicted"]
        row["predicted_step_seconds"] = spread([record.device_seconds for record in records])
    return row


@contextmanager
def kept_at_most(transformer: torch.nn.Module) -> Iterator[list[int]]:
    """Bytes held by caches at every call of the ends."""
    held: list[int] = []
    handle = transformer.norm_out.register_forward_pre_hook(lambda *_: held.append(held_bytes(transformer)))
    try:
        yield held
    finally:
        handle.remove()


def fresh_predictor(preset: Preset, schedule: Schedule, sigmas: torch.Tensor, transformer: Any) -> Predictor:
    """The default workload's form at this model's width, before training: what it costs does not depend on it."""
    channels = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    budget = str(schedule.num_full)
    workload = Workload(
        name=preset.name,
        model=ModelParams(family="flux", source="data/base/none"),
        call=CallParams(height=8, width=8, num_inference_steps=schedule.num_steps),
        prompts=preset.name,
        schedule=ScheduleParams(
            budgets={budget: BudgetParams(full_steps=schedule.full_steps)}, default_budget=budget
        ),
        record=RecordParams(train_prompts=1, validation_prompts=1),
        predictor=PredictorParams(
            kind="per_step", history_sizes=(2, 2, 2), projection="low_rank", rank=channels // 4
        ),
    )
    return untrained_predictor(expert_design(workload), sigmas, channels)


@torch.no_grad()
def time_predictor(
    predictor: Predictor, schedule: Schedule, sigmas: torch.Tensor, preset: Preset, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Seconds of the rule alone for one branch: the first prediction after a full step, and a later one."""
    rule = predictor.bind(schedule, sigmas, device=device, dtype=torch.bfloat16)
    frames, rows, columns = preset.grid
    shape = (1, frames * rows * columns, predictor.spec.channels)
    history = History(rule.history_size)
    for step in range(rule.history_size):
        history.push(step, torch.randn(shape, device=device, dtype=torch.bfloat16))
    step = next(s for s in schedule.predicted_steps if len(schedule.anchors(s, rule.history_size)) == rule.history_size)
    first, later = [], []
    for _ in range(rounds + 1):
        history.memo = {}
        first.append(timed(lambda: rule(history, step), device))
        later.append(timed(lambda: rule(history, step), device))
    return {"first_after_full": spread(first[1:]), "later": spread(later[1:]), "weights_bytes": rule.nbytes}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


if __name__ == "__main__":
    raise SystemExit(main())
