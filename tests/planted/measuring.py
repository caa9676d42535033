"""Faults in measuring the methods and in gathering what was measured."""

from __future__ import annotations

from tests.planted.fault import Fault

COMPARE, MEASURE = ("tests/lesa/evaluation/test_compare.py",), ("tests/lesa/evaluation/test_measure.py",)
MEASURED = ("tests/lesa/evaluation/test_aggregate.py", *MEASURE, *COMPARE)
BOOTSTRAP = ("tests/lesa/evaluation/test_bootstrap.py",)

FAULTS = [
    Fault(
        "converged-psnr-of-the-wrong-images",
        "lesa/evaluation/measure.py",
        "images[list(converged)]",
        "images[: len(converged)]",
        MEASURED,
    ),
    Fault(
        "converged-psnr-is-grouped-by-the-first-prompts",
        "lesa/evaluation/aggregate.py",
        'groups[list(converged_at)] if metric == "converged_psnr"',
        'groups[: len(converged_at)] if metric == "converged_psnr"',
        MEASURED,
    ),
    Fault(
        "paired-converged-psnr-is-grouped-by-the-first-prompts",
        "lesa/evaluation/results.py",
        "self.groups[list(self.converged_indices)] if is_part",
        "self.groups[: len(values)] if is_part",
        MEASURED,
    ),
    Fault(
        "the-converged-run-has-the-plain-runs-steps",
        "lesa/evaluation/measure.py",
        "sample(pipe, texts, noise, slow, batch_size=size)",
        "sample(pipe, texts, noise, call, batch_size=size)",
        MEASURED,
    ),
    Fault(
        "the-wall-clock-ratio-is-upside-down",
        "lesa/evaluation/aggregate.py",
        "[a / b for a, b in zip(plain.seconds",
        "[b / a for a, b in zip(plain.seconds",
        MEASURED,
    ),
    Fault(
        "the-operations-ratio-is-upside-down",
        "lesa/evaluation/aggregate.py",
        "num_steps * model.total / method.flops(model, computed, sigmas)",
        "method.flops(model, computed, sigmas) / (num_steps * model.total)",
        MEASURED,
    ),
    Fault(
        "a-solvers-computed-steps-are-scaled-to-the-plain-run",
        "lesa/evaluation/aggregate.py",
        "measured.computed / measured.calls * method.num_steps",
        "measured.computed / measured.calls * num_steps",
        MEASURED,
    ),
    Fault(
        "an-evaluation-resamples-samples",
        "lesa/evaluation/aggregate.py",
        "return np.array([numbers[prompt] for prompt in prompts], dtype=np.int64)",
        "return np.arange(len(prompts), dtype=np.int64)",
        MEASURED,
    ),
    Fault(
        "outliers-are-the-good-samples",
        "lesa/evaluation/aggregate.py",
        'values["psnr"] < metrics.OUTLIER_DB',
        'values["psnr"] > metrics.OUTLIER_DB',
        MEASURED,
    ),
    Fault(
        "feature-errors-of-full-steps",
        "lesa/evaluation/aggregate.py",
        "predicted = method.schedule.predicted_steps if",
        "predicted = method.schedule.full_steps if",
        MEASURED,
    ),
    Fault(
        "the-worst-samples-are-the-best",
        "lesa/evaluation/results.py",
        "np.percentile(values, 5)",
        "np.percentile(values, 95)",
        MEASURED,
    ),
    Fault(
        "a-gain-is-the-others",
        "lesa/evaluation/results.py",
        "paired_interval(ours, theirs,",
        "paired_interval(theirs, ours,",
        MEASURED,
    ),
    Fault(
        "every-batch-has-the-first-ones-noise",
        "lesa/evaluation/measure.py",
        "list(prompts[chunk]), seeds[chunk]",
        "list(prompts[chunk]), seeds[: chunk.stop - chunk.start]",
        MEASURED,
    ),
    Fault(
        "feature-errors-are-relative-to-the-prediction",
        "lesa/evaluation/measure.py",
        "metrics.relative_l1(ours, true)",
        "metrics.relative_l1(true, ours)",
        MEASURED,
    ),
    Fault(
        "the-call-that-is-looked-into-is-timed",
        "lesa/evaluation/measure.py",
        "<= num_samples and start > 0]",
        "<= num_samples and start >= 0]",
        MEASURE,
    ),
    Fault(
        "caches-of-an-evaluation-are-tuned-on-test-prompts",
        "lesa/evaluation/compare.py",
        '["train"][:TUNING_SAMPLES]',
        '["test"][:TUNING_SAMPLES]',
        COMPARE,
    ),
    Fault(
        "caches-of-an-evaluation-are-tuned-on-its-noise",
        "lesa/evaluation/compare.py",
        "workload.record.seed_offset + index for",
        "workload.evaluate.seed_offset + index for",
        COMPARE,
    ),
    Fault(
        "a-workload-is-judged-on-validation-prompts",
        "lesa/evaluation/compare.py",
        'splits["test"][: settings.prompts], settings',
        'splits["validation"][: settings.prompts], settings',
        COMPARE,
    ),
    Fault(
        "caches-are-given-the-time-of-the-first-training-step",
        "lesa/evaluation/compare.py",
        'predictor=predictors["lesa"])',
        'predictor=predictors["lesa_ground_truth"])',
        COMPARE,
    ),
    Fault(
        "a-comparison-tunes-on-the-noise-it-judges-on",
        "lesa/evaluation/compare.py",
        "seed_offset + len(texts) + i for",
        "seed_offset + i for",
        COMPARE,
    ),
    Fault(
        "intervals-have-one-tail",
        "lesa/evaluation/bootstrap.py",
        "100 * (1 - confidence) / 2",
        "100 * (1 - confidence)",
        BOOTSTRAP,
    ),
    Fault(
        "a-share-that-was-never-seen-never-happens",
        "lesa/evaluation/bootstrap.py",
        "max(found.high, unseen)",
        "min(found.high, unseen)",
        BOOTSTRAP,
    ),
]
