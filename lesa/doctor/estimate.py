"""What making a workload's predictor takes, told before anything is downloaded: disk, GPU memory, operations.

Disk is what files of these shapes take; memory and hours are estimates, and their assumptions are the constants here.
Shapes: L image tokens, T text tokens, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lesa.doctor.model_size import ModelFacts, model_facts
from lesa.models.bill import BACKWARD
from lesa.models.families import blocks, family_of
from lesa.models.flops import call_inputs, predictor_bytes
from lesa.models.published import call_flops
from lesa.params import ClosedLoopParams, PredictorParams, ScheduleParams, Workload, searched_budgets
from lesa.peers.tuning import TUNING_SAMPLES
from lesa.predictor.spec import PredictorSpec, Variant, leading_steps
from lesa.recording.plan import RecordingSize
from lesa.schedule import Schedule
from lesa.training.step_weights import CHUNK

PEAK_FLOPS = 989e12  # of an H100 SXM in bfloat16, dense, as its data sheet says
UTILISATION = 0.4  # of it that a transformer call is taken to reach
METHODS = 20  # that the evaluation and the gate run at every budget
TRIED = 40  # settings of the peers' thresholds at every budget
RECOMPUTED = 2  # forward passes of a full step with activations made again: the call, and each block of it
_BLOCK_VALUES = 17  # values a token and channel that a block keeps for its backward pass (34 bytes in 16 bits)
_PREDICTED_VALUES = 6  # float32 values a token and channel that a predicted step keeps for its backward pass
_FITTING_COPIES = 3  # of the features that sums are made of: as read, as rows, and with a constant beside them
_DECODER_BYTES = 1024  # a pixel of an image or a frame, while it is decoded
_CHECKPOINT_COPIES = 20  # of a predictor's float32 weights: both results, optimiser, coordinates, best so far
_ELEMENT = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class CostEstimate:
    """Bytes and operations."""

    facts: ModelFacts
    weights: dict[str, int]  # bytes of the pipeline's parts in the workload's dtype, on the GPU
    download: int  # bytes, of a hub model: its parts in bfloat16; 0 for a local folder
    trajectories: int
    store: int  # bytes on disk
    store_all_tokens: int  # the same with record.token_fraction 1
    training: int  # bytes on disk: checkpoints, predictors, bundle
    sampling: int  # bytes on the GPU beside the weights
    fitting: int  # bytes on the GPU beside the weights, in the search; 0 where nothing is searched
    closed_loop: int  # bytes on the GPU beside the weights; 0 where it has no iterations
    loop_weights: int  # bytes of the parts that are on the GPU meanwhile
    run_flops: float  # of one unaccelerated run, all branches
    forward_flops: float  # of one call, one branch
    flops: dict[str, float]  # by stage

    @property
    def gpu(self) -> int:
        """Bytes of the GPU's memory that the largest stage takes."""
        others = sum(self.weights.values()) + max(self.sampling, self.fitting)
        return max(others, self.closed_loop + self.loop_weights)

    @property
    def disk(self) -> int:
        """Bytes beside the download."""
        return self.store + self.training

    def hours(self, stage: str | None = None) -> float:
        """GPU hours of a stage, or of all, at `UTILISATION` of `PEAK_FLOPS`."""
        operations = sum(self.flops.values()) if stage is None else self.flops[stage]
        return operations / (PEAK_FLOPS * UTILISATION) / 3600

    def forwards(self, stage: str) -> float:
        """A stage's work in forwards of the transformer, as `lesa.models.bill` counts it; a backward is two."""
        return self.flops[stage] / self.forward_flops

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.facts.name,
            "parameters": self.facts.numbers,
            "download_bytes": self.download,
            "trajectories": self.trajectories,
            "store_bytes": self.store,
            "store_bytes_all_tokens": self.store_all_tokens,
            "training_bytes": self.training,
            "gpu_bytes": {
                "weights": sum(self.weights.values()),
                "sampling": self.sampling,
                "fitting": self.fitting,
                "closed_loop": self.closed_loop,
                "closed_loop_weights": self.loop_weights,
                "most": self.gpu,
            },
            "run_tflops": self.run_flops / 1e12,
            "forwards": {stage: round(self.forwards(stage)) for stage in self.flops},
            "gpu_hours": {stage: self.hours(stage) for stage in self.flops} | {"all": self.hours()},
        }


def estimate_costs(workload: Workload) -> CostEstimate:
    """The needs of a workload.

    Raises:
        ValueError: its model is neither a folder here nor a published one of `lesa.models.published`.
    """
    facts = model_facts(
        workload.name, workload.model, workload.call, is_trained_here=workload.base is not None
    )
    transformer, family = facts.transformer, family_of(facts.transformer)
    element = _ELEMENT[workload.model.dtype]
    call, record = workload.call, workload.record
    steps, branches = call.num_inference_steps, 2 if (call.true_cfg_scale or 0.0) > 1.0 else 1
    searched = searched_budgets(workload.schedule)
    model = call_flops(transformer, facts.grid, facts.text_tokens)
    run = branches * steps * model.total
    full = full_step_counts(workload.schedule, steps)
    trajectories = {
        count: sum(workload.recording.num_recorded(count).values()) * record.seeds_per_prompt
        for count in workload.recording.step_counts
    }
    every_token = _recording(facts, steps, branches, model.channels, 1.0)
    kept = _recording(facts, steps, branches, model.channels, record.token_fraction)
    wide = (model.tokens + facts.text_tokens) * model.channels  # values of one block's streams
    feature = model.tokens * model.channels
    pixels = call.height * call.width * (call.num_frames or 1)
    weights = {name: numbers * element for name, numbers in facts.numbers.items()}
    # Where activations are made again, encoders and decoder are off the device (`lesa.training.encoded_prompts`).
    in_loop = weights["transformer"] if workload.closed_loop.gradient_checkpointing else sum(weights.values())
    sampling = 2 * _BLOCK_VALUES * wide * element + pixels * _DECODER_BYTES
    return CostEstimate(
        facts=facts,
        weights=weights,
        download=0 if facts.is_local else 2 * sum(facts.numbers.values()),
        trajectories=sum(trajectories.values()),
        store=kept.bytes_of(trajectories),
        store_all_tokens=every_token.bytes_of(trajectories),
        training=_CHECKPOINT_COPIES * len(full) * _predictor_bytes(workload.predictor, steps, model.channels),
        sampling=sampling * max(workload.evaluate.batch_size, record.batch_size),
        fitting=_fitting(steps, kept.num_tokens * model.channels, model.channels) if searched else 0,
        closed_loop=_closed_loop(
            workload.closed_loop, steps, full, branches, wide, feature, len(blocks(transformer, family)), element
        ),
        loop_weights=in_loop,
        run_flops=run,
        forward_flops=model.total,
        flops=_flops(workload, full, run),
    )


def full_step_counts(rule: ScheduleParams, num_steps: int) -> dict[str, int]:
    """Full steps of every budget, searched or not."""
    given = {name: schedule.num_full for name, schedule in _given_schedules(rule, num_steps).items()}
    searched = searched_budgets(rule)
    return {name: searched[name] if name in searched else given[name] for name in rule.budgets}


def _given_schedules(rule: ScheduleParams, num_steps: int) -> dict[str, Schedule]:
    """Of the budgets that nothing is searched for."""
    searched = searched_budgets(rule)
    return {
        name: Schedule.explicit(num_steps, budget.full_steps)
        if budget.full_steps is not None
        else Schedule.uniform(num_steps, budget.interval or 1, rule.warmup_steps, rule.cooldown_steps)
        for name, budget in rule.budgets.items()
        if name not in searched
    }


def _recording(facts: ModelFacts, steps: int, branches: int, channels: int, fraction: float) -> RecordingSize:
    """One trajectory, as `lesa.recording.record.measure_size` measures it of a loaded pipeline."""
    inputs = call_inputs(facts.transformer, facts.grid, facts.text_tokens)
    tensors = {name: value.numel() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    latents = tensors.pop("hidden_states")
    tensors.pop("timestep")
    values = 2 * latents + branches * sum(tensors.values()) + steps * (1 + branches * channels)
    kept = max(1, round(fraction * math.prod(facts.grid)))
    return RecordingSize(
        num_steps=steps,
        num_branches=branches,
        num_tokens=kept,
        channels=channels,
        context_values=values,
        step_values=1 + branches * channels,
    )


def _predictor_bytes(params: PredictorParams, num_steps: int, channels: int) -> int:
    """Weights of one budget in float32."""
    spec = PredictorSpec(
        channels=channels,
        num_steps=num_steps,
        boundaries=params.boundaries,
        history_sizes=params.history_sizes,
        variants=(Variant(name="counted", full_steps=(0,)),),
        kind=params.kind,
        step_history=params.step_history,
        projection=params.projection,
        rank=params.rank,
    )
    return predictor_bytes(spec, tokens=1, element_size=4)["weights"]


def _fitting(steps: int, values: int, channels: int) -> int:
    """Sums of products that the search makes on the GPU, and the features that it makes them of, in float64."""
    features = max(CHUNK, 8 * steps * values)
    return _FITTING_COPIES * features + 2 * 8 * (steps + 1) ** 2 * channels


def _closed_loop(
    settings: ClosedLoopParams,
    steps: int,
    full: dict[str, int],  # full steps of every budget
    branches: int,
    wide: int,  # values of one block's streams
    feature: int,  # values of a feature
    num_blocks: int,
    element: int,  # bytes a value
) -> int:
    """Activations that the gradient through the sampler needs, of the largest budget."""
    if settings.iterations == 0 or settings.gradient != "through_sampler":
        return 0
    a_block = wide * element * _BLOCK_VALUES
    if settings.gradient_checkpointing:  # predictions and twice the kept features, then one call's blocks' inputs
        held = [branches * (steps + count) * feature * element for count in full.values()]
        return settings.batch_size * (max(held) + num_blocks * wide * element + a_block)
    return settings.batch_size * max(
        branches * (count * num_blocks * a_block + (steps - count) * feature * 4 * _PREDICTED_VALUES)
        for count in full.values()
    )


def _flops(workload: Workload, full: dict[str, int], run: float) -> dict[str, float]:
    """Transformer calls of each stage; training the experts on recorded features is little beside them."""
    steps, record, judged = workload.call.num_inference_steps, workload.record, workload.evaluate
    accelerated = {name: run * count / steps for name, count in full.items()}
    loop = workload.closed_loop
    through = loop.gradient == "through_sampler"
    again = RECOMPUTED * loop.gradient_checkpointing
    # A full step before the first predicted one depends on nothing that is trained; of a search, the fewest there are.
    given, fewest = _given_schedules(workload.schedule, steps), leading_steps(workload.predictor.kind)
    leading = {name: (*given[name].predicted_steps, steps)[0] if name in given else fewest for name in full}
    learned = {name: 1 - min(leading[name], count) / count for name, count in full.items()}

    def an_update(name: str, through: bool = True) -> float:
        """Of a trajectory, in accelerated runs."""
        return 1 + through * learned[name] * loop.model_gradient * (BACKWARD + again)

    search = workload.search
    screened = search.screened if search.screened > search.finalists else 0

    def a_search(name: str) -> float:
        """Of a budget, in accelerated runs."""
        short = screened * search.screen_iterations + search.finalists * search.finalist_iterations
        judged = 2 * search.samples * (screened + search.finalists)
        trained = short * loop.batch_size * an_update(name) + judged
        return search.descents * search.evaluations * search.samples + trained * (search.finalists > 1)

    validations = 1 + math.ceil(loop.iterations / loop.checkpoint_every)
    validated = record.validation_prompts * record.seeds_per_prompt * validations
    samples = judged.prompts * judged.seeds_per_prompt
    converged = samples * judged.converged_fraction * run * judged.converged_steps / steps
    at_gate = workload.publish.gate_prompts * judged.seeds_per_prompt
    every_method = METHODS * sum(accelerated.values())
    tuning = TRIED * min(TUNING_SAMPLES, record.train_prompts) * sum(accelerated.values())
    of_training = min(workload.publish.bound_samples, record.train_prompts * record.seeds_per_prompt)
    bounds = (record.validation_prompts * record.seeds_per_prompt + of_training) * sum(accelerated.values())
    return {
        "record": (record.train_prompts + record.validation_prompts) * record.seeds_per_prompt * run,
        "search": sum(accelerated[name] * a_search(name) for name in searched_budgets(workload.schedule)),
        "train_stage2": sum(
            work * (loop.iterations * loop.batch_size * an_update(name, through) + validated)
            for name, work in accelerated.items()
        ),
        "evaluate": samples * (run + every_method) + converged + tuning,
        "publish": at_gate * (run + every_method) + tuning + bounds,
    }
