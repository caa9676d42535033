"""Faults in what a predictor computes: alpha, projection, step weights, routing, binding."""

from __future__ import annotations

from tests.planted.fault import Fault

ALPHA, PROJECTION = ("tests/lesa/predictor/test_alpha.py",), ("tests/lesa/predictor/test_projection.py",)
PREDICTOR = ("tests/lesa/predictor/test_predictor.py",)
STEPS = ("tests/lesa/training/test_step_weights.py",)

FAULTS = [
    Fault(
        "offsets-have-the-wrong-sign",
        "lesa/predictor/alpha.py",
        "sigmas[list(past)] - sigmas[step]",
        "sigmas[step] - sigmas[list(past)]",
        (*ALPHA, *PREDICTOR),
    ),
    Fault(
        "linear-alpha-divides-by-the-older-offset",
        "lesa/predictor/alpha.py",
        "dt[:, 0] / (dt[:, 1] - dt[:, 0])",
        "dt[:, 0] / dt[:, 1]",
        (*ALPHA, *PREDICTOR),
    ),
    Fault(
        "offsets-are-scaled-to-half-the-range",
        "lesa/predictor/alpha.py",
        "2 * (dt - low) / width - 1",
        "(dt - low) / width",
        (*ALPHA, *PREDICTOR),
    ),
    Fault(
        "offsets-above-the-range-are-accepted",
        "lesa/predictor/alpha.py",
        "((dt < low - slack) | (dt > high + slack))",
        "((dt < low - slack) & (dt > high + slack))",
        (*ALPHA, *PREDICTOR),
    ),
    Fault(
        "a-history-of-steps-is-one-short",
        "lesa/predictor/alpha.py",
        "max(step - 1 - size, -1)",
        "max(step - size, -1)",
        (*ALPHA, *PREDICTOR),
    ),
    Fault(
        "the-history-is-projected-in-the-wrong-order",
        "lesa/predictor/projection.py",
        'zip(tensors["scale"], features, strict=True)',
        'zip(tensors["scale"], reversed(features), strict=True)',
        (*PROJECTION, *PREDICTOR),
    ),
    Fault(
        "folding-takes-the-newest-scale-for-all",
        "lesa/predictor/projection.py",
        'weight[index, k, index] += tensors["scale"][k]',
        'weight[index, k, index] += tensors["scale"][0]',
        (*PROJECTION, *PREDICTOR),
    ),
    Fault(
        "folding-drops-the-bias",
        "lesa/predictor/projection.py",
        '"bias": tensors["bias"]}',
        '"bias": torch.zeros_like(tensors["bias"])}',
        (*PROJECTION, *PREDICTOR),
    ),
    Fault(
        "scales-are-folded-as-weights-of-features",
        "lesa/predictor/predictor.py",
        'step_weights.to_difference_weights(experts[stage]["scale"].float())',
        'experts[stage]["scale"].float()',
        STEPS,
    ),
    Fault(
        "the-first-stages-projection-is-remembered-for-all",
        "lesa/predictor/predictor.py",
        'history.memo.get(("lesa z", stage))',
        'history.memo.get(("lesa z", self.stages[0]))',
        PREDICTOR,
    ),
    Fault(
        "step-weights-get-the-experts-history-alone",
        "lesa/predictor/predictor.py",
        "self.spec.step_history if by_step else 1",
        "1 if by_step else self.spec.step_history",
        STEPS,
    ),
    Fault(
        "the-channel-part-counts-twice",
        "lesa/predictor/predictor.py",
        "parts = {stage: projections.without_channel_part(tensors) for stage, tensors in parts.items()}",
        "parts = dict(parts)",
        STEPS,
    ),
    Fault(
        "experts-of-the-fewest-full-steps-serve-unknown-schedules",
        "lesa/predictor/spec.py",
        "abs(variant.num_full - schedule.num_full)",
        "variant.num_full - schedule.num_full",
        PREDICTOR,
    ),
    Fault(
        "mixed-experts-serve-the-budgets-too",
        "lesa/predictor/spec.py",
        "if self.step_counts and not self.is_trained_for(schedule):",
        "if self.step_counts:",
        PREDICTOR,
    ),
    Fault(
        "differences-have-the-wrong-sign",
        "lesa/predictor/step_weights.py",
        "[newer - older for newer, older in pairwise(held)]",
        "[older - newer for newer, older in pairwise(held)]",
        (*STEPS, *PREDICTOR),
    ),
]
