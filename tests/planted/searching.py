"""Faults in the search for full steps and in the tuning of peers."""

from __future__ import annotations

from tests.planted.fault import Fault

DESCENT, LOCAL = ("tests/lesa/search/test_descent.py",), ("tests/lesa/search/test_local_search.py",)
FINALISTS, PATH = ("tests/lesa/search/test_finalists.py",), ("tests/lesa/search/test_path.py",)
JOBS = ("tests/lesa/search/test_jobs.py",)
TRIALS = ("tests/lesa/search/test_trials.py",)
TUNING, LINEUP = ("tests/lesa/peers/test_tuning.py",), ("tests/lesa/peers/test_lineup.py",)

FAULTS = [
    Fault(
        "the-search-judges-on-validation",
        "lesa/search/jobs.py",
        "train, _ = kept_splits(workload.recording)",
        "_, train = kept_splits(workload.recording)",
        (*JOBS, *DESCENT),
    ),
    Fault(
        "the-cheapest-path-is-that-of-validation",
        "lesa/search/jobs.py",
        "train, _ = recorded_splits(workload.recording)",
        "_, train = recorded_splits(workload.recording)",
        (*JOBS, *DESCENT),
    ),
    Fault(
        "schedules-are-compared-with-other-samples-latents",
        "lesa/search/descent.py",
        "self.data.latents[rows].to(",
        "self.data.latents[: len(rows)].to(",
        DESCENT,
    ),
    Fault(
        "weights-are-fitted-on-what-is-judged",
        "lesa/search/descent.py",
        "StepFits(data, fitted, predictor",
        "StepFits(data, judged, predictor",
        DESCENT,
    ),
    Fault(
        "a-judged-prompts-other-noises-are-fitted",
        "lesa/search/descent.py",
        "for row, prompt in enumerate(data.prompts) if prompt not in taken",
        "for row, prompt in enumerate(data.prompts) if row not in rows",
        DESCENT,
    ),
    Fault(
        "the-worst-end-of-the-descents-is-taken",
        "lesa/search/descent.py",
        "best = min(ends, key=done.error)",
        "best = max(ends, key=done.error)",
        DESCENT,
    ),
    Fault(
        "the-screening-decides-nothing",
        "lesa/search/descent.py",
        "sorted(finalists, key=screen)[: search.finalists]",
        "finalists[: search.finalists]",
        DESCENT,
    ),
    Fault(
        "the-finalist-with-the-largest-error-wins",
        "lesa/search/descent.py",
        "best = min(finalists, key=train)",
        "best = max(finalists, key=train)",
        DESCENT,
    ),
    Fault(
        "finalists-are-judged-on-what-they-learned-from",
        "lesa/search/finalists.py",
        "return float(loss_of(judged))",
        "return float(loss_of(fitted))",
        (*FINALISTS, *DESCENT),
    ),
    Fault(
        "finalists-learn-from-what-judges-them",
        "lesa/search/finalists.py",
        "[fitted[i] for i in draw(batch, len(fitted), settings.batch_size)]",
        "[judged[i] for i in draw(batch, len(judged), settings.batch_size)]",
        (*FINALISTS, *DESCENT),
    ),
    Fault(
        "finalists-are-compared-with-other-samples-latents",
        "lesa/search/finalists.py",
        "data.latents[list(indices)]",
        "data.latents[: len(indices)]",
        (*FINALISTS, *DESCENT),
    ),
    Fault(
        "leaders-may-be-alike",
        "lesa/search/finalists.py",
        "if all(_apart(steps, other) >= APART",
        "if any(_apart(steps, other) >= APART",
        FINALISTS,
    ),
    Fault(
        "descents-begin-at-the-worst-start",
        "lesa/search/local_search.py",
        "ranked = sorted(starts, key=done.error)",
        "ranked = sorted(starts, key=done.error, reverse=True)",
        LOCAL,
    ),
    Fault(
        "a-worse-neighbour-is-taken",
        "lesa/search/local_search.py",
        "done.error(candidate, best) < done.error(best)",
        "done.error(candidate, best) > done.error(best)",
        LOCAL,
    ),
    Fault(
        "a-full-step-may-leave-the-run",
        "lesa/search/local_search.py",
        "if candidate[-1] < num_steps and",
        "if candidate[-1] <= num_steps and",
        LOCAL,
    ),
    Fault(
        "an-eliminated-trial-looks-ahead-of-the-incumbent",
        "lesa/search/trials.py",
        "behind = fmean(a - b",
        "behind = fmean(b - a",
        TRIALS,
    ),
    Fault(
        "trials-that-lead-are-eliminated",
        "lesa/search/trials.py",
        "return fmean(differences) > BEHIND",
        "return -fmean(differences) > BEHIND",
        TRIALS,
    ),
    Fault(
        "a-drift-is-weighted-by-its-place",
        "lesa/search/path.py",
        "dsigma[s] * (velocities[place]",
        "dsigma[place] * (velocities[place]",
        PATH,
    ),
    Fault(
        "the-longest-path-is-taken",
        "lesa/search/path.py",
        "return min(complete)[1]",
        "return max(complete)[1]",
        PATH,
    ),
    # lesa/peers
    Fault(
        "a-cache-may-be-as-slow-as-its-slowest-trial",
        "lesa/peers/tuning.py",
        "limit = min(slow_enough)",
        "limit = max(slow_enough)",
        TUNING,
    ),
    Fault(
        "the-worst-image-of-a-cache-counts",
        "lesa/peers/tuning.py",
        "return max((t for t in trials",
        "return min((t for t in trials",
        TUNING,
    ),
    Fault(
        "a-cache-pays-for-what-it-saves",
        "lesa/peers/tuning.py",
        "fewest + (ours - eager) *",
        "fewest + (plain - ours) *",
        TUNING,
    ),
    Fault(
        "a-cache-is-charged-for-our-last-budget",
        "lesa/peers/tuning.py",
        "costs[1 : 1 + len(ours)], costs[1 + len(ours) :]",
        "costs[1 : 1 + len(ours)], costs[len(ours) :]",
        TUNING,
    ),
    Fault(
        "a-cache-gets-fewer-full-steps-than-we-have",
        "lesa/peers/tuning.py",
        "max(steps, _num_full(ours[budget]))",
        "min(steps, _num_full(ours[budget]))",
        TUNING,
    ),
    Fault(
        "the-bisection-goes-the-wrong-way",
        "lesa/peers/tuning.py",
        "(middle, high) if new[-1].computed >= target else (low, middle)",
        "(low, middle) if new[-1].computed >= target else (middle, high)",
        TUNING,
    ),
    Fault(
        "taylorseers-own-steps-have-the-longest-gap",
        "lesa/peers/lineup.py",
        "min(fitting)[2]",
        "max(fitting)[2]",
        LINEUP,
    ),
    Fault(
        "a-peer-is-compared-with-fewer-evaluations",
        "lesa/peers/lineup.py",
        "if peer.evaluations == schedule.num_full and",
        "if peer.evaluations <= schedule.num_full and",
        (*LINEUP, "tests/lesa/peers/test_searched.py"),
    ),
]
