"""Faults in which steps are full, in a run of the sampler, in the choice of a budget."""

from __future__ import annotations

from tests.planted.fault import Fault

SCHEDULE, BUDGETS = ("tests/lesa/test_schedule.py",), ("tests/lesa/bundle/test_budgets.py",)
RUN, HOOK = ("tests/lesa/sampling/test_run.py",), ("tests/lesa/sampling/test_hook.py",)
RUN_HOOK = (*RUN, *HOOK)
STATISTICS = ("tests/lesa/sampling/test_statistics.py",)
ADAPTIVE = ("tests/lesa/sampling/test_adaptive.py",)
CHOICE = (*BUDGETS, "tests/lesa/sampling/test_enable.py")

FAULTS = [
    # lesa/schedule.py
    Fault(
        "uniform-first-interval-is-one-longer",
        "lesa/schedule.py",
        "*range(warmup_steps, num_steps, interval)",
        "*range(warmup_steps + 1, num_steps, interval)",
        SCHEDULE,
    ),
    Fault(
        "cooldown-takes-one-step-more",
        "lesa/schedule.py",
        "max(num_steps - cooldown_steps, 0)",
        "max(num_steps - cooldown_steps - 1, 0)",
        SCHEDULE,
    ),
    Fault(
        "anchors-include-the-step-itself",
        "lesa/schedule.py",
        "if full < step)[:size]",
        "if full <= step)[:size]",
        SCHEDULE,
    ),
    Fault(
        "anchors-are-the-oldest",
        "lesa/schedule.py",
        "if full < step)[:size]",
        "if full < step)[-size:]",
        SCHEDULE,
    ),
    Fault(
        "a-step-at-a-boundary-is-in-the-quieter-stage",
        "lesa/schedule.py",
        "float(sigma) < boundary for",
        "float(sigma) <= boundary for",
        SCHEDULE,
    ),
    Fault(
        "carried-schedule-forgets-how-many-full-steps-must-be-kept",
        "lesa/schedule.py",
        "max(least, math.floor(",
        "max(MIN_CARRIED, math.floor(",
        SCHEDULE,
    ),
    Fault(
        "least-full-is-that-of-the-slowest-budget",
        "lesa/schedule.py",
        "return min(schedule.num_full",
        "return max(schedule.num_full",
        (*SCHEDULE, *BUDGETS),
    ),
    Fault(
        "a-history-one-short-is-accepted",
        "lesa/schedule.py",
        "and available < size:",
        "and available < size - 1:",
        SCHEDULE,
    ),
    # lesa/sampling/run.py and lesa/sampling/statistics.py
    Fault(
        "features-stay-after-the-last-step",
        "lesa/sampling/run.py",
        "state.reset()  # nothing",
        "pass  # nothing",
        RUN_HOOK,
    ),
    Fault(
        "a-reset-history-keeps-its-memo",
        "lesa/predictor/rule.py",
        "self.steps, self.features, self.memo = (), (), {}",
        "self.steps, self.features = (), ()",
        ("tests/lesa/predictor/test_rule.py", *RUN_HOOK),
    ),
    Fault(
        "a-new-feature-keeps-the-old-memo",
        "lesa/predictor/rule.py",
        "        self.memo = {}",
        "        self.memo = self.memo",
        ("tests/lesa/predictor/test_rule.py", "tests/lesa/predictor/test_predictor.py"),
    ),
    Fault(
        "a-reset-branch-keeps-the-features-for-the-fallback",
        "lesa/sampling/run.py",
        "self.norm = self.slower = None",
        "self.norm = None",
        (*RUN, *ADAPTIVE),
    ),
    Fault(
        "the-guard-compares-with-an-older-feature",
        "lesa/sampling/run.py",
        "self.history.push(step, feature)\n        self.norm = None",
        "self.history.push(step, feature)",
        RUN_HOOK,
    ),
    Fault(
        "a-run-that-starts-late-is-told-it-starts-at-the-front",
        "lesa/sampling/hook.py",
        "self.run.begin(step, ",
        "self.run.begin(0, ",
        (*HOOK, "tests/lesa/sampling/test_images_flux.py"),
    ),
    Fault(
        "the-newest-anchor-alone-decides-whether-a-late-run-has-its-history",
        "lesa/sampling/run.py",
        "min(self._needed(step)) < self._first_step",
        "max(self._needed(step)) < self._first_step",
        RUN_HOOK,
    ),
    Fault(
        "fallbacks-are-planned-as-full",
        "lesa/sampling/run.py",
        'planned="full" if is_full else "predicted"',
        'planned="full" if prediction is None else "predicted"',
        RUN_HOOK,
    ),
    Fault(
        "a-fallback-of-the-second-branch-is-not-counted",
        "lesa/sampling/statistics.py",
        'elif kind == "full":',
        'elif planned == "full":',
        RUN_HOOK,
    ),
    Fault(
        "unplanned-full-steps-enter-the-history",
        "lesa/sampling/run.py",
        "if self.schedule.is_full(step) or self.rule.keeps_predictions:",
        "if feature is not None:",
        RUN_HOOK,
    ),
    Fault(
        "the-meter-divides-by-the-prediction",
        "lesa/sampling/run.py",
        "_relative_l1(rule(state.history, step), feature)",
        "_relative_l1(feature, rule(state.history, step))",
        RUN_HOOK,
    ),
    Fault(
        "the-watch-sees-the-mean-sample",
        "lesa/sampling/run.py",
        "observe(step, float(errors.max()))",
        "observe(step, float(errors.mean()))",
        (*RUN, *ADAPTIVE),
    ),
    Fault(
        "the-fallback-is-given-the-faster-schedules-features",
        "lesa/sampling/run.py",
        "or not fallback.slower.is_full(step):",
        "or not self.schedule.is_full(step):",
        (*RUN, *ADAPTIVE),
    ),
    Fault(
        "peak-bytes-are-those-of-the-last-step",
        "lesa/sampling/run.py",
        "max(self.statistics.peak_bytes, held)",
        "held",
        RUN_HOOK,
    ),
    Fault(
        "tokens-of-the-image-that-is-edited-are-kept",
        "lesa/sampling/run.py",
        "newest = feature[:, : self._num_tokens]",
        "newest = feature",
        (*RUN, "tests/lesa/sampling/test_images_flux.py"),
    ),
    Fault(
        "the-worst-branch-is-the-best-one",
        "lesa/sampling/statistics.py",
        "torch.stack(self._errors).amax(dim=0)",
        "torch.stack(self._errors).amin(dim=0)",
        STATISTICS,
    ),
    Fault(
        "bounds-are-asked-of-the-step-that-changed-over",
        "lesa/sampling/statistics.py",
        "record.step >= self.change",
        "record.step > self.change",
        STATISTICS,
    ),
    # lesa/sampling/hook.py, adaptive.py, binding.py
    Fault(
        "a-run-goes-on-with-the-run-before",
        "lesa/sampling/hook.py",
        "self.run = self._new_run(self.config.schedule, self.config.rule, self.config.notes)  # whatever",
        "self.run  # whatever",
        HOOK,
    ),
    Fault(
        "features-of-a-broken-off-run-stay",
        "lesa/sampling/run.py",
        "        self.forget()\n        self._is_begun = self.statistics.finished = False",
        "        self._is_begun = self.statistics.finished = False",
        RUN_HOOK,
    ),
    Fault(
        "a-failed-call-leaves-the-clock-as-it-was",
        "lesa/sampling/hook.py",
        "            self._clock.fail()\n",
        "",
        HOOK,
    ),
    Fault(
        "noise-levels-are-not-checked",
        "lesa/sampling/hook.py",
        "expected_sigmas=config.sigmas if is_own else None",
        "expected_sigmas=None if is_own else config.sigmas",
        ("tests/lesa/sampling/test_calls.py", *HOOK),
    ),
    Fault(
        "bounds-of-the-bundles-own-steps-judge-every-number-of-steps",
        "lesa/sampling/hook.py",
        "bounds=config.bounds if schedule is config.schedule else {}",
        "bounds=config.bounds",
        (*HOOK, "tests/lesa/sampling/test_calls.py"),
    ),
    Fault(
        "a-binding-is-taken-for-other-noise-levels-of-as-many-steps",
        "lesa/sampling/binding.py",
        "torch.equal(self._newest[0], sigmas)",
        "len(self._newest[0]) == len(sigmas)",
        ("tests/lesa/sampling/test_binding.py", "tests/lesa/sampling/test_calls.py"),
    ),
    Fault(
        "the-change-over-is-at-the-step-of-the-alarm",
        "lesa/sampling/adaptive.py",
        "from bisect import bisect_right",
        "from bisect import bisect_left as bisect_right",
        ADAPTIVE,
    ),
    Fault(
        "the-slower-budget-is-the-slowest",
        "lesa/bundle/budgets.py",
        "return min(slower, key=full.__getitem__)",
        "return max(slower, key=full.__getitem__)",
        (*BUDGETS, *ADAPTIVE),
    ),
    # lesa/bundle/budgets.py
    Fault(
        "the-dearest-budget-that-is-good-enough",
        "lesa/bundle/budgets.py",
        "return min(good, key=lambda name: (manifest.budgets[name].schedule.num_full, -measured[name]))",
        "return max(good, key=lambda name: (manifest.budgets[name].schedule.num_full, -measured[name]))",
        CHOICE,
    ),
    Fault(
        "a-loss-is-added-to-the-best-quality",
        "lesa/bundle/budgets.py",
        "best - float(max_loss_db or 0.0)",
        "best + float(max_loss_db or 0.0)",
        CHOICE,
    ),
    Fault(
        "outliers-are-taken-at-their-estimate",
        "lesa/bundle/budgets.py",
        '_measured(manifest, "outlier_share_high")',
        '_measured(manifest, "outlier_share")',
        CHOICE,
    ),
    Fault(
        "a-carried-budget-forgets-how-many-full-steps-must-be-kept",
        "lesa/bundle/budgets.py",
        "schedule.carried(steps, least)",
        "schedule.carried(steps)",
        (*CHOICE, "tests/lesa/sampling/test_calls.py"),
    ),
]
