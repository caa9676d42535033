"""The plan, the identity, and what a recorded trajectory holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from lesa import atomic
from lesa.errors import LesaError
from lesa.models.pipelines import load_pipeline, sample
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.recording import record as recording
from lesa.recording.dataset import load_trajectories, recorded_elsewhere, recorded_splits
from lesa.recording.drive import LocalRecorder
from lesa.recording.plan import (
    PlannedTrajectory,
    batches,
    count_by_steps,
    describe_source,
    missing,
    plan_recording,
)
from lesa.recording.prompts import PromptError
from lesa.recording.record import kept_tokens, record_batch
from lesa.recording.store import TrajectoryStore, trajectory_key
from lesa.recording.store_format import StoreError
from tests.helpers.digests import tree_digest
from tests.helpers.recording import measured_size, record, transformer_arguments
from tests.helpers.tiny import SPLITS, tiny_flux, tiny_repository, write_prompts

STEPS = 8
SOURCE = {"fingerprint": "sha256:0", "scheduler": {"class": "X", "config": {}}}


@pytest.fixture
def workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workload:
    monkeypatch.chdir(tiny_repository(tmp_path, num_inference_steps=STEPS))
    return load_params()


def changed(workload: Workload, section: str, **values: Any) -> Workload:
    return dataclasses.replace(
        workload, **{section: dataclasses.replace(getattr(workload, section), **values)}
    )


def test_the_plan_is_the_first_prompts_in_file_order(workload: Workload) -> None:
    plan = plan_recording(changed(workload, "record", train_prompts=3, seeds_per_prompt=2).recording, SOURCE)
    assert [item.prompt for item in plan if item.split == "train"] == [
        p for p in SPLITS["train"][:3] for _ in "ab"
    ]
    assert [item.seed - 10_000 for item in plan if item.split == "train"] == [0, 2, 4, 6, 8, 10]
    assert [item.seed - 10_000 for item in plan if item.split == "validation"] == [1, 3, 5, 7]
    assert len({item.key for item in plan}) == len(plan) == 10
    assert all(item.key == trajectory_key(item.identity) for item in plan)


def test_further_numbers_of_steps_come_after_and_change_no_key(workload: Workload) -> None:
    before = plan_recording(workload.recording, SOURCE)
    more = changed(workload, "record", step_counts=(5, 12), step_count_prompts=2)
    plan = plan_recording(more.recording, SOURCE)
    assert plan[: len(before)] == before and {item.num_steps for item in before} == {STEPS}
    further = plan[len(before) :]
    assert [item.num_steps for item in further] == [5] * 4 + [12] * 4
    assert [item.prompt for item in further[:4]] == [*SPLITS["train"][:2], *SPLITS["validation"]]
    # The noise is that of the same prompts: no further seeds, and the same key as if the call had so many steps.
    assert {item.seed for item in further} < {item.seed for item in before}
    alone = plan_recording(changed(workload, "call", num_inference_steps=5).recording, SOURCE)
    assert further[0].key == alone[0].key and len({item.key for item in plan}) == len(plan)


def test_an_identity_is_what_it_always_was(workload: Workload) -> None:
    """Written out: a trajectory that was recorded before keeps its key."""
    planned = plan_recording(workload.recording, SOURCE)[0]
    assert planned.key == trajectory_key(
        {
            **SOURCE,
            "call": {
                "height": 16,
                "width": 16,
                "num_frames": None,
                "num_inference_steps": STEPS,
                "guidance_scale": 3.5,
                "true_cfg_scale": None,
                "max_sequence_length": 16,
            },
            "dtype": "float32",
            "format": 1,
            "prompt": "a thin seven",
            "seed": 10_000,
            "tap": planned.identity["tap"],
            "token_fraction": 1.0,
        }
    )


def test_trajectories_of_several_lengths_share_a_store(workload: Workload) -> None:
    pipe = load_pipeline(workload.model, workload.resources.device)
    more = changed(workload, "record", step_counts=(5, 12), step_count_prompts=2)
    store = TrajectoryStore.create(more.paths.trajectories)
    size, plan = measured_size(more, pipe), plan_recording(more.recording, describe_source(pipe))
    assert record(more, pipe, store)["recorded"] == 14
    assert store.verify() == [] and store.keys() == sorted(item.key for item in plan) and len(plan) == 14
    for item in plan:
        assert store.features(item.key).shape == (item.num_steps, 1, 16, 32)
        assert len(store.record(item.key)["sigmas"]) == item.num_steps + 1
    taken = sum(file.stat().st_blocks * 512 for file in store.path.rglob("*") if file.is_file())
    assert taken <= size.bytes_of(count_by_steps(plan)) + 4096 and size.bytes_of(count_by_steps(plan)) <= 1.5 * taken
    assert size.bytes_of(count_by_steps(plan[:6])) == size.bytes(6)
    train, validation = recorded_splits(more.recording)
    assert len(train.sigmas) == STEPS + 1 and (len(train), len(validation)) == (4, 2)
    elsewhere = recorded_elsewhere(more.recording)
    assert {count: (len(t.sigmas), len(t), len(v)) for count, (t, v) in elsewhere.items()} == {
        5: (6, 2, 2),
        12: (13, 2, 2),
    }
    with pytest.raises(ValueError, match="1 of 1 prompts have no trajectory of 6 steps"):
        load_trajectories(store.path, ["a thin seven"], 6)
    with pytest.raises(ValueError, match="3 different lists of noise levels"):
        load_trajectories(store.path, ["a thin seven"])
    done = record(workload, pipe, store)  # the numbers of steps are taken out of the settings again
    assert (done["recorded"], done["pruned"]) == (0, 8)
    assert store.keys() == sorted(item.key for item in plan[:6])


def test_appended_prompts_leave_every_other_key_as_it_was(workload: Workload, tmp_path: Path) -> None:
    before = {item.key for item in plan_recording(workload.recording, SOURCE)}
    longer = {**SPLITS, "train": [*SPLITS["train"], "a photo of a cat"]}
    write_prompts(tmp_path, longer)
    after = {item.key for item in plan_recording(changed(workload, "record", train_prompts=5).recording, SOURCE)}
    assert before < after and len(after) == len(before) + 1


def test_whatever_determines_the_bytes_is_in_the_key(workload: Workload) -> None:
    base = plan_recording(workload.recording, SOURCE)[0].key
    other = {**SOURCE, "fingerprint": "sha256:1"}
    variants = [
        plan_recording(workload.recording, other)[0],
        plan_recording(workload.recording, {**SOURCE, "scheduler": {"class": "X", "config": {"shift": 2.0}}})[0],
        plan_recording(changed(workload, "call", guidance_scale=2.0).recording, SOURCE)[0],
        plan_recording(changed(workload, "call", num_inference_steps=9).recording, SOURCE)[0],
        plan_recording(changed(workload, "model", dtype="bfloat16").recording, SOURCE)[0],
        plan_recording(changed(workload, "record", token_fraction=0.5).recording, SOURCE)[0],
        plan_recording(changed(workload, "record", seed_offset=0).recording, SOURCE)[0],
        plan_recording(changed(workload, "record", batch_size=4).recording, SOURCE)[0],
        plan_recording(workload.recording, SOURCE)[1],
    ]
    assert len({base, *(item.key for item in variants)}) == len(variants) + 1
    how = changed(workload, "record", validation_prompts=1)
    assert plan_recording(how.recording, SOURCE)[0].key == base


def test_overlapping_or_too_few_prompts_are_refused(workload: Workload, tmp_path: Path) -> None:
    with pytest.raises(PromptError) as caught:
        plan_recording(changed(workload, "record", train_prompts=9, validation_prompts=3).recording, SOURCE)
    assert "record.train_prompts: 9 asked for, train.txt has 4" in str(caught.value)
    assert "record.validation_prompts: 3 asked for" in str(caught.value)
    write_prompts(tmp_path, {**SPLITS, "test": [SPLITS["train"][3]]})
    with pytest.raises(PromptError, match="both train and test"):
        plan_recording(workload.recording, SOURCE)


def test_a_scheduler_that_adds_noise_is_refused_before_anything_is_recorded(workload: Workload) -> None:
    pipe, calls = tiny_flux(), list[int]()
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    own = pipe.scheduler.config
    multistep = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "algorithm_type": "sde-dpmsolver++"}
    for scheduler, why in (
        (FlowMatchEulerDiscreteScheduler.from_config(own, stochastic_sampling=True), "stochastic_sampling is true"),
        (DPMSolverMultistepScheduler(**multistep), "algorithm_type is sde-dpmsolver"),
        (FlowMatchLCMScheduler(), "every scheduler of its kind"),
    ):
        pipe.scheduler = scheduler
        recorder = LocalRecorder(pipe, workload.recording, TrajectoryStore(workload.paths.trajectories))
        with pytest.raises(LesaError, match=rf"scheduler: {type(scheduler).__name__} adds fresh noise .*{why}"):
            recorder.describe()
    assert calls == []
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(own)
    LocalRecorder(pipe, workload.recording, TrajectoryStore(workload.paths.trajectories)).describe()


def test_the_source_changes_with_weights_scheduler_and_encoders(workload: Workload) -> None:
    pipe = load_pipeline(workload.model, workload.resources.device)
    source = describe_source(pipe)
    assert json.loads(json.dumps(source)) == source and describe_source(tiny_flux()) == source
    with torch.no_grad():
        next(pipe.text_encoder_2.parameters()).view(-1)[0] += 1
    assert describe_source(pipe)["text"] != source["text"]
    assert describe_source(tiny_flux(seed=1))["fingerprint"] != source["fingerprint"]
    assert describe_source(tiny_flux(dynamic_shifting=False))["scheduler"] != source["scheduler"]


def test_a_trajectory_holds_what_training_needs(workload: Workload) -> None:
    pipe = load_pipeline(workload.model, workload.resources.device)
    planned = plan_recording(workload.recording, describe_source(pipe))[0]
    [trajectory] = record_batch(pipe, [planned], workload.record, workload.call)
    assert trajectory.features.shape == (STEPS, 1, 16, 32) and trajectory.features.dtype == torch.bfloat16
    assert trajectory.sigmas.shape == (STEPS + 1,) and trajectory.sigmas[-1] == 0
    assert torch.equal(trajectory.timesteps, pipe.scheduler.timesteps)
    context = trajectory.context
    assert torch.equal(
        context["latents_final"],
        sample(pipe, [planned.prompt], [planned.seed], workload.call, output_type="latent"),
    )
    assert context["temb"].shape == (STEPS, 1, 32) and context["model_timesteps"].shape == (STEPS,)
    with torch.no_grad():  # the sampler's own loop, from the recorded tensors alone
        store = TrajectoryStore.create(workload.paths.trajectories)
        key = store.commit(trajectory)
        record, context = store.record(key), store.context(key)
        arguments = transformer_arguments(record, context)
        latents = context["latents_initial"]
        for step in range(STEPS):
            velocity = pipe.transformer(
                hidden_states=latents, timestep=context["model_timesteps"][step : step + 1], **arguments
            )[0]
            latents = latents + (trajectory.sigmas[step + 1] - trajectory.sigmas[step]) * velocity
    assert torch.allclose(latents, context["latents_final"], atol=1e-5)
    for step in range(STEPS):  # the ends of the transformer reproduce its output from feature and temb
        feature = trajectory.features[step].float()
        assert torch.isfinite(
            pipe.transformer.proj_out(pipe.transformer.norm_out(feature, context["temb"][step]))
        ).all()


def test_both_branches_are_recorded(workload: Workload) -> None:
    pipe = load_pipeline(workload.model, workload.resources.device)
    guided = changed(workload, "call", true_cfg_scale=2.0)
    planned = plan_recording(guided.recording, describe_source(pipe))[0]
    [trajectory] = record_batch(pipe, [planned], guided.record, guided.call)
    assert trajectory.features.shape == (STEPS, 2, 16, 32)
    assert not torch.equal(trajectory.features[0, 0], trajectory.features[0, 1])
    record = {"call_kwargs": trajectory.call_kwargs}
    conditional = transformer_arguments(record, trajectory.context, branch=0)
    unconditional = transformer_arguments(record, trajectory.context, branch=1)
    assert set(conditional) == set(unconditional) >= {"encoder_hidden_states", "pooled_projections"}
    assert not torch.equal(conditional["encoder_hidden_states"], unconditional["encoder_hidden_states"])


def test_a_part_of_the_tokens_is_drawn_from_the_key(workload: Workload) -> None:
    part = changed(workload, "record", token_fraction=0.25)
    pipe = load_pipeline(workload.model, workload.resources.device)
    source = describe_source(pipe)
    planned, whole = plan_recording(part.recording, source)[0], plan_recording(workload.recording, source)[0]
    [trajectory] = record_batch(pipe, [planned], part.record, part.call)
    assert trajectory.token_index is not None and trajectory.token_index.shape == (4,)
    [full] = record_batch(pipe, [whole], workload.record, workload.call)
    assert full.token_index is None
    assert torch.equal(trajectory.features, full.features[:, :, trajectory.token_index])
    first, again = kept_tokens("a" * 32, 4096, 0.1), kept_tokens("a" * 32, 4096, 0.1)
    other = kept_tokens("b" * 32, 4096, 0.1)
    assert first is not None and again is not None and other is not None
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first) == 410 and torch.equal(first, first.unique())
    assert kept_tokens("a" * 32, 3, 0.001) is not None and kept_tokens("a" * 32, 3, 1.0) is None


def test_recording_again_records_nothing_and_a_changed_plan_only_the_rest(
    workload: Workload, tmp_path: Path
) -> None:
    pipe = load_pipeline(workload.model, workload.resources.device)
    store = TrajectoryStore.create(workload.paths.trajectories)
    keys = [item.key for item in plan_recording(workload.recording, describe_source(pipe))]
    done = record(workload, pipe, store)
    assert (done["planned"], done["recorded"], done["pruned"]) == (6, 6, 0) and sorted(keys) == store.keys()
    before = tree_digest(store.path)
    again = record(workload, pipe, store)
    assert (again["planned"], again["recorded"], again["pruned"]) == (6, 0, 0)
    assert tree_digest(store.path) == before
    train, validation = recorded_splits(workload.recording)
    assert (sorted(train.keys), sorted(validation.keys)) == (sorted(keys[:4]), sorted(keys[4:]))

    fewer = record(changed(workload, "record", train_prompts=2), pipe, store)
    assert (fewer["recorded"], fewer["pruned"]) == (0, 2)
    assert store.keys() == sorted([*keys[:2], *keys[4:]])
    write_prompts(tmp_path, {**SPLITS, "train": [*SPLITS["train"][:2], "a cat"]})
    other = record(changed(workload, "record", train_prompts=3), pipe, store)
    assert (other["recorded"], other["pruned"]) == (1, 0) and len(store.keys()) == 5


def test_bytes_do_not_depend_on_order_or_history(workload: Workload) -> None:
    pipe = load_pipeline(workload.model, workload.resources.device)
    plan = plan_recording(workload.recording, describe_source(pipe))
    forwards, backwards = TrajectoryStore.create("a.zarr"), TrajectoryStore.create("b.zarr")
    for planned in plan:
        forwards.commit(*record_batch(pipe, [planned], workload.record, workload.call))
    fresh = load_pipeline(workload.model, workload.resources.device)
    for planned in plan[::-1]:
        backwards.commit(*record_batch(fresh, [planned], workload.record, workload.call))
    assert tree_digest(forwards.path) == tree_digest(backwards.path)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_bytes_do_not_depend_on_who_shares_the_call(workload: Workload, guidance: float | None) -> None:
    """Whole batches, what a killed recorder left of them, and another order: the same store."""
    workload = changed(workload, "call", true_cfg_scale=guidance)
    several = changed(workload, "record", batch_size=4, token_fraction=0.5)
    pipe = load_pipeline(several.model, several.resources.device)
    plan = plan_recording(several.recording, describe_source(pipe))
    whole, rest, backwards = (TrajectoryStore.create(f"{name}.zarr") for name in ("whole", "rest", "backwards"))
    record(several, pipe, whole)
    for item in (plan[1], plan[4]):
        rest.commit(*record_batch(pipe, [item], several.record, several.call))
    record(several, pipe, rest)
    for batch in batches(plan[::-1], 4):
        for trajectory in record_batch(pipe, batch, several.record, several.call):
            backwards.commit(trajectory)
    assert tree_digest(whole.path) == tree_digest(rest.path) == tree_digest(backwards.path)
    # Alone in its call a sample is the same up to rounding, in every part of what is kept.
    alone = changed(workload, "record", token_fraction=0.5)
    for item, single in zip(plan, plan_recording(alone.recording, describe_source(pipe)), strict=True):
        kept = record_batch(pipe, [single], alone.record, alone.call)[0].context
        shared = whole.context(item.key)
        assert kept.keys() == shared.keys() and item.key != single.key
        for name, value in kept.items():
            torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-5, msg=name)
    index = kept_tokens(plan[0].key, 16, 0.5)
    [full] = record_batch(pipe, plan[:1], dataclasses.replace(several.record, token_fraction=1.0), several.call)
    assert index is not None and torch.equal(whole.features(plan[0].key), full.features[:, :, index])


def test_the_lengths_of_arguments_are_measured_once_a_recorder(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = changed(workload, "record", batch_size=2)
    pipe = load_pipeline(several.model, several.resources.device)
    batch_sizes: list[int] = []

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        batch_sizes.append(options["batch_size"])
        return sample(*arguments, **options)

    monkeypatch.setattr(recording, "sample", counted)
    store = TrajectoryStore.create(several.paths.trajectories)
    recorder = LocalRecorder(pipe, several.recording, store)
    source, _ = recorder.describe()
    done: list[str] = []
    plan = plan_recording(several.recording, source)
    recorder.record(plan, done.append)
    assert done == [item.key for item in plan] and sorted(done) == store.keys()
    assert batch_sizes == [1, 2, 2, 2, 2]  # one sample for the lengths, the size, three batches


def test_a_batch_has_one_number_of_steps_and_at_most_so_many_entries(workload: Workload) -> None:
    plan = plan_recording(changed(workload, "record", step_counts=(5,), step_count_prompts=3).recording, SOURCE)
    assert [(len(batch), batch[0].num_steps) for batch in batches(plan, 4)] == [(4, 8), (2, 8), (4, 5), (1, 5)]
    assert [item for batch in batches(plan, 4) for item in batch] == plan and batches([], 4) == []
    pipe = load_pipeline(workload.model, workload.resources.device)
    for size, wrong in ((2, []), (1, plan[:2]), (2, plan[5:7])):
        with pytest.raises(ValueError, match=f"a batch is 1 to {size} trajectories of one number of steps"):
            record_batch(pipe, wrong, dataclasses.replace(workload.record, batch_size=size), workload.call)


def test_the_size_is_known_before_recording(workload: Workload) -> None:
    pipe = load_pipeline(workload.model, workload.resources.device)
    size = measured_size(workload, pipe)
    assert (size.num_steps, size.num_branches, size.num_tokens, size.channels) == (STEPS, 1, 16, 32)
    store = TrajectoryStore.create(workload.paths.trajectories)
    record(workload, pipe, store)
    taken = sum(file.stat().st_blocks * 512 for file in store.path.rglob("*") if file.is_file())
    assert taken <= size.bytes(6) + 4096 and size.bytes(6) <= 1.5 * taken


def test_a_disk_that_cannot_hold_it_is_refused_before_anything_is_recorded(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = changed(workload, "record", seeds_per_prompt=2**33)
    pipe = load_pipeline(workload.model, workload.resources.device)
    store = TrajectoryStore.create(workload.paths.trajectories)
    size = measured_size(many, pipe)
    with pytest.raises(OSError, match=r"needs .* TiB and .* are free"):
        atomic.require_space(store.path, size.bytes(6 * 2**33))
    assert store.keys() == []


def test_poisoned_features_are_refused_by_key_and_step(workload: Workload) -> None:
    """The recorder meets a model that blows up at one step: nothing of that trajectory is committed."""
    pipe = load_pipeline(workload.model, workload.resources.device)
    calls = 0

    def poison(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal calls
        calls += 1
        return (
            (output[0], torch.full_like(output[1], float("nan"))) if calls == 8 else output
        )  # the first two calls measure the size

    pipe.transformer.single_transformer_blocks[-1].register_forward_hook(poison)
    store = TrajectoryStore.create(workload.paths.trajectories)
    plan = plan_recording(workload.recording, describe_source(pipe))
    with pytest.raises(StoreError, match=rf"{plan[0].key} is not recorded: NaN or infinity at step 5"):
        record(workload, pipe, store)
    assert store.keys() == [] and missing(store, plan) == plan


def test_a_cache_on_the_transformer_is_refused(workload: Workload) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = load_pipeline(workload.model, workload.resources.device)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    planned = PlannedTrajectory(key="0" * 32, identity={}, prompt="a", seed=0, split="train", num_steps=STEPS)
    with pytest.raises(ValueError, match="only full steps are recorded"):
        record_batch(pipe, [planned], workload.record, workload.call)


def test_bfloat16_pipelines_are_recorded_exactly(workload: Workload) -> None:
    half = changed(workload, "model", dtype="bfloat16")
    pipe = load_pipeline(half.model, half.resources.device)
    assert pipe.transformer.dtype == torch.bfloat16
    [trajectory] = record_batch(pipe, plan_recording(half.recording, describe_source(pipe))[:1], half.record, half.call)
    store = TrajectoryStore.create(half.paths.trajectories)
    key = store.commit(trajectory)
    assert torch.equal(store.features(key), trajectory.features)
    assert store.context(key)["conditioning.encoder_hidden_states"].dtype == torch.bfloat16
