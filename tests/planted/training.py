"""Faults in recording, in what is read of it, in losses, targets and both training steps."""

from __future__ import annotations

from tests.planted.fault import Fault

LOSSES, TARGETS = ("tests/lesa/training/test_losses.py",), ("tests/lesa/training/test_targets.py",)
LOOP, GROUND = ("tests/lesa/training/test_loop.py",), ("tests/lesa/training/test_ground_truth.py",)
CASES = ("tests/lesa/training/test_cases.py",)
CLOSED, JOBS = ("tests/lesa/training/test_closed_loop.py",), ("tests/lesa/training/test_jobs.py",)
RECOMPUTE = ("tests/lesa/training/test_recompute.py", "tests/benchmarks/true_size/test_loop_memory.py")
COUNTS = ("tests/lesa/training/test_step_counts.py",)
RECORD, DATASET = ("tests/lesa/recording/test_record.py",), ("tests/lesa/recording/test_dataset.py",)

FAULTS = [
    # lesa/training/losses.py and targets.py
    Fault(
        "squared-errors-are-averaged-over-samples",
        "lesa/training/losses.py",
        ".flatten(1).mean(dim=1)",
        ".flatten(1).mean(dim=0)",
        LOSSES,
    ),
    Fault(
        "output-errors-are-not-divided-by-their-weights",
        "lesa/training/losses.py",
        "(error.mean(dim=(0, 2)) * weights).sum() / weights.sum()",
        "(error.mean(dim=(0, 2)) * weights).sum() / len(weights)",
        LOSSES,
    ),
    Fault(
        "loud-steps-drown-quiet-ones",
        "lesa/training/losses.py",
        "dim=(0, 2, 3), keepdim=True",
        "dim=(0, 1, 2, 3), keepdim=True",
        LOSSES,
    ),
    Fault(
        "decibels-are-taken-of-the-batch",
        "lesa/training/losses.py",
        "return log_squared_errors(latents, reference).mean()",
        "return _squared_errors(latents, reference).mean().log()",
        LOSSES,
    ),
    Fault(
        "a-step-weighs-what-the-step-before-moves",
        "lesa/training/targets.py",
        "sigmas[s + 1] - sigmas[s]",
        "sigmas[s] - sigmas[s - 1]",
        (*TARGETS, *GROUND),
    ),
    Fault(
        "predictions-start-from-the-oldest-feature",
        "lesa/training/targets.py",
        "columns[index] = history[0] + alphas[index] * z",
        "columns[index] = history[-1] + alphas[index] * z",
        (*TARGETS, *GROUND),
    ),
    Fault(
        "targets-of-every-stage",
        "lesa/training/targets.py",
        "if stages[step] == stage\n",
        "if stages[step] <= stage\n",
        (*TARGETS, *GROUND),
    ),
    # lesa/training/closed_loop.py and rollout.py
    Fault(
        "the-loop-is-compared-with-other-samples-latents",
        "lesa/training/closed_loop.py",
        "data.latents[rows].to(",
        "data.latents[: len(rows)].to(",
        CLOSED,
    ),
    Fault(
        "the-loop-runs-other-samples-noise",
        "lesa/training/rollout.py",
        "manual_seed(data.seeds[i]) for i in indices]",
        "manual_seed(data.seeds[i]) for i in range(len(indices))]",
        CLOSED,
    ),
    Fault(
        "the-loop-runs-other-samples-prompts",
        "lesa/training/rollout.py",
        "prompts = [data.prompts[i] for i in indices]",
        "prompts = list(data.prompts[: len(indices)])",
        CLOSED,
    ),
    Fault(
        "drifted-states-of-the-first-branch-alone",
        "lesa/training/closed_loop.py",
        "captured[data.branch[i], step][row]",
        "captured[0, step][row]",
        CLOSED,
    ),
    Fault(
        "drifted-predictions-meet-other-samples-conditioning",
        "lesa/training/closed_loop.py",
        "data.temb[list(indices)][:, list(targets.steps)]",
        "data.temb[: len(indices)][:, list(targets.steps)]",
        CLOSED,
    ),
    Fault(
        "the-loop-whitens-on-validation",
        "lesa/training/closed_loop.py",
        "[(case.train, case.rule.targets(stage)) for case in cases]",
        "[(case.validation, case.rule.targets(stage)) for case in cases]",
        CLOSED,
    ),
    Fault(
        "the-loop-fits-its-step-weights-whitening-on-validation",
        "lesa/training/closed_loop.py",
        "step_weights = start_step_weights(design, budget, start, experts, train)",
        "step_weights = start_step_weights(design, budget, start, experts, validation)",
        CLOSED,
    ),
    Fault(
        "the-loop-sees-the-experts-history-in-step-weights",
        "lesa/training/rollout.py",
        "differences(held, self.step_history)",
        "differences(held, size)",
        CLOSED,
    ),
    Fault(
        "the-loop-starts-from-its-own-result",
        "lesa/training/jobs.py",
        "load_predictor(workload.paths.ground_truth)",
        "load_predictor(workload.paths.closed_loop)",
        JOBS,
    ),
    # lesa/training/recompute.py and encoded_prompts.py, and where they are called
    Fault(
        "a-calls-activations-are-kept",
        "lesa/training/recompute.py",
        "return _checkpoint(call, *args, **kwargs)",
        "return call(*args, **kwargs)",
        RECOMPUTE,
    ),
    Fault(
        "a-predictions-activations-are-kept",
        "lesa/training/rollout.py",
        "rule = RecomputedRule(rule)",
        "pass",
        RECOMPUTE,
    ),
    Fault(
        "a-checkpoint-holds-what-is-given-by-name",
        "lesa/training/recompute.py",
        "return checkpoint(by_name, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=False)",
        "return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)",
        RECOMPUTE,
    ),
    Fault(
        "what-is-held-for-one-loss-is-missed-in-recomputing",
        "lesa/training/rollout.py",
        "if isinstance(rule, ExpertRule) and not gradient_checkpointing else ()",
        "if isinstance(rule, ExpertRule) else ()",
        RECOMPUTE,
    ),
    Fault(
        "the-gradient-goes-through-steps-that-were-to-be-constants",
        "lesa/training/rollout.py",
        "stack.enter_context(constant_calls(pipe, constants))",
        "stack.enter_context(constant_calls(pipe, frozenset()))",
        RECOMPUTE,
    ),
    Fault(
        "the-share-of-constant-steps-is-upside-down",
        "lesa/training/recompute.py",
        "if place >= model_gradient)",
        "if place < model_gradient)",
        RECOMPUTE,
    ),
    Fault(
        "constant-steps-are-not-those-of-the-settings",
        "lesa/training/closed_loop.py",
        "constant_steps(case.schedule, settings.model_gradient, batch)",
        "constant_steps(case.schedule, 1.0, batch)",
        RECOMPUTE,
    ),
    Fault(
        "a-prompt-is-remembered-as-another",
        "lesa/training/encoded_prompts.py",
        "key = (text, repr(",
        'key = ("", repr(',
        ("tests/lesa/training/test_encoded_prompts.py",),
    ),
    # lesa/training/loop.py and cases.py
    Fault(
        "validation-is-done-on-training-trajectories",
        "lesa/training/loop.py",
        "judge.loss(case, case.validation, chunk, None)",
        "judge.loss(case, case.train, chunk, None)",
        LOOP,
    ),
    Fault(
        "batches-are-drawn-of-the-wrong-rows",
        "lesa/training/loop.py",
        "chosen = [rows[index] for index in draw(batch, len(rows), batch_size)]",
        "chosen = draw(batch, len(rows), batch_size)",
        (*LOOP, *CLOSED),
    ),
    Fault(
        "the-last-state-is-kept-and-not-the-best",
        "lesa/training/loop.py",
        "or loss < state.best_loss:",
        "or loss != state.best_loss:",
        LOOP,
    ),
    Fault(
        "a-checkpoint-of-other-validation-prompts-is-taken-up",
        "lesa/training/cases.py",
        "trajectories_digest(train, validation, *further)",
        "trajectories_digest(train, train, *further)",
        (*CASES, *GROUND),
    ),
    Fault(
        "more-validation-trajectories-count-than-every-case-has",
        "lesa/training/cases.py",
        "judged = min(len(validation)",
        "judged = max(len(validation)",
        (*CASES, *COUNTS),
    ),
    # lesa/training/ground_truth.py
    Fault(
        "true-histories-meet-other-steps-conditioning",
        "lesa/training/ground_truth.py",
        "data.temb[list(rows)][:, list(targets.steps)]",
        "data.temb[list(rows)][:, : len(targets.steps)]",
        GROUND,
    ),
    Fault(
        "true-histories-meet-other-samples-conditioning",
        "lesa/training/ground_truth.py",
        "data.temb[list(rows)][:, list(targets.steps)]",
        "data.temb[: len(rows)][:, list(targets.steps)]",
        GROUND,
    ),
    Fault(
        "experts-are-whitened-on-validation",
        "lesa/training/ground_truth.py",
        "[(case.train, case.targets) for case in cases]",
        "[(case.validation, case.targets) for case in cases]",
        GROUND,
    ),
    Fault(
        "step-weights-are-fitted-on-validation",
        "lesa/training/ground_truth.py",
        "step_weights_of_stage(design, job, expert, train).export()",
        "step_weights_of_stage(design, job, expert, validation).export()",
        GROUND,
    ),
    # lesa/recording
    Fault(
        "training-and-validation-share-noise",
        "lesa/recording/plan.py",
        "2 * number + RECORDED_SPLITS.index(split)",
        "number + RECORDED_SPLITS.index(split)",
        RECORD,
    ),
    Fault(
        "validation-records-training-prompts",
        "lesa/recording/plan.py",
        "enumerate(known[split][:count])",
        'enumerate(known["train"][:count])',
        RECORD,
    ),
    Fault(
        "prompts-share-the-noise-of-their-neighbours",
        "lesa/recording/plan.py",
        "index * recording.record.seeds_per_prompt + repeat",
        "index + repeat",
        RECORD,
    ),
    Fault(
        "a-batch-keeps-the-first-samples-latents",
        "lesa/recording/record.py",
        "latents[row : row + 1]",
        "latents[:1]",
        RECORD,
    ),
    Fault(
        "a-batch-keeps-the-first-samples-features",
        "lesa/recording/record.py",
        "features=features[:, row]",
        "features=features[:, 0]",
        RECORD,
    ),
    Fault(
        "a-batch-keeps-the-first-samples-conditioning",
        "lesa/recording/record.py",
        '"temb": temb[:, row]',
        '"temb": temb[:, 0]',
        RECORD,
    ),
    Fault(
        "validation-reads-training-trajectories",
        "lesa/recording/dataset.py",
        "tuple(splits[split][: recording",
        'tuple(splits["train"][: recording',
        DATASET,
    ),
    Fault(
        "training-and-validation-are-swapped",
        "lesa/recording/dataset.py",
        '(load("train", num_steps), load("validation", num_steps))',
        '(load("validation", num_steps), load("train", num_steps))',
        DATASET,
    ),
    Fault(
        "every-branch-has-the-first-ones-conditioning",
        "lesa/recording/dataset.py",
        'context["temb"][:, branch]',
        'context["temb"][:, 0]',
        DATASET,
    ),
    Fault(
        "features-read-from-the-store-are-the-first-branchs",
        "lesa/recording/dataset.py",
        "[list(steps), self.branch[i]]",
        "[list(steps), 0]",
        DATASET,
    ),
]
