"""The gate: may this candidate become champion, and with which of its budgets?

It asks two questions of every budget and opponent, both of the same samples, by paired intervals over prompts:
  mean   at the default budget, and against peers at every one, the candidate's mean PSNR is higher; against the
         champion at another budget it is not lower by more than the tolerance;
  tail   the mean of its worst fifth is not lower by more than the tolerance. (A percentile says nothing of what lies
         beneath it, and a tail of fewer samples takes more prompts than there are to be told from an equal one.)
A question is answered when its interval lies on one side of what it asks for. While any is open, more samples are
drawn, up to a stated number; each look has its share of the 5% (`look_levels`), so that the promise of the intervals
is that of the whole judgement. What is open in the end is not answered with yes. The default budget decides for the
candidate; another budget that fails is left out of what is published. Whatever is missing, not finite or not
comparable speaks against the candidate. A pure function of what is measured for this decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from lesa.evaluation.bootstrap import Resamples

CANDIDATE, CHAMPION = "lesa", "champion"  # names of the two among the methods; all others are peers
ERROR = 0.05  # of a two-sided interval, over all looks
RESAMPLES = 4000  # the first look's ends are far out
WORST = 0.2  # of the samples, whose mean is the tail

Answer = Literal["yes", "no", "open"]
Measured = Mapping[str, Mapping[str, Sequence[float]]]  # budget -> method -> PSNR in dB, one a sample
# (budget -> opponents to measure beside the candidate, first sample, end) -> what was measured of those samples
Measure = Callable[[Mapping[str, Sequence[str]], int, int], Measured]


class Question(NamedTuple):
    """Whether the candidate's mean or tail lies above an opponent's less a margin."""

    budget: str
    opponent: str
    about: Literal["mean", "tail"]
    margin: float  # dB that the candidate may be lower


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What the samples so far say to a question."""

    answer: Answer
    difference: float  # dB, candidate less opponent
    low: float
    high: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "answer": self.answer,
            "difference": self.difference,
            "low": self.low,
            "high": self.high,
            "samples": self.samples,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What was decided and why; `to_dict` is what is recorded."""

    promote: bool
    reasons: tuple[str, ...]  # every reason against the candidate, or the one for it
    budgets: tuple[str, ...] = ()  # that may be published
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # other budgets: why not
    numbers: Mapping[str, Any] = field(default_factory=dict)  # opponent -> budget -> question -> finding
    samples: int = 0  # the most that any question took

    def to_dict(self) -> dict[str, Any]:
        return {
            "promote": self.promote,
            "reasons": list(self.reasons),
            "budgets": list(self.budgets),
            "left_out": {budget: list(reasons) for budget, reasons in self.left_out.items()},
            "numbers": dict(self.numbers),
            "samples": self.samples,
        }


def look_sizes(first: int, most: int) -> tuple[int, ...]:
    """Numbers of samples at which the gate looks: `first`, then twice as many each time, `most` at the end."""
    sizes = [first]
    while sizes[-1] * 2 <= most:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes)


def look_levels(looks: int) -> tuple[float, ...]:
    """Error of each look's intervals: they sum to `ERROR`, so that it holds over all looks (Bonferroni).

    Most of it is kept for the last one, which small differences need; a large one is beyond any doubt at the first.
    """
    weights = [1.0, *(2.0**look for look in range(looks - 1))]
    return tuple(ERROR * weight / sum(weights) for weight in weights)


def judge(
    opponents: Mapping[str, Sequence[str]],
    measure: Measure,
    *,
    default_budget: str,
    groups: Sequence[int],
    looks: Sequence[int],
    tolerance_db: float,
    log: Callable[[str], None] = lambda line: None,
) -> Decision:
    """Draws samples until every question is answered or there are no more of them.

    Args:
        opponents: of each budget of the candidate; `CHAMPION` among them where it has one of as many full steps.
        measure: samples with the candidate and the opponents named.
        default_budget: the condition for all.
        groups: the prompt of each sample, of as many as the last look takes; the intervals resample prompts.
        looks: numbers of samples, rising.
        tolerance_db: how much lower the worst fifth may be, and the mean where it need not be higher.
        log: told after each look what is still open.

    Returns:
        promote is True only if every question of the default budget was answered with yes.
    """
    asked, failed = {}, {}
    for budget, names in opponents.items():
        asked[budget] = _questions(budget, names, budget == default_budget, tolerance_db)
        if not {*names} - {CHAMPION}:
            failed[budget] = [f"peers: none was measured at budget {budget}"]
    if default_budget not in opponents:
        failed[default_budget] = [f"the candidate was not measured at the default budget {default_budget}"]
    findings: dict[Question, Finding] = {}
    psnr: dict[str, dict[str, list[float]]] = {budget: {} for budget in opponents}
    first = 0
    for end, error in zip(looks, look_levels(len(looks)), strict=True):
        wanted = _still_open(asked, findings, failed)
        if default_budget in failed or not wanted:
            break
        resamples = _resamples(tuple(groups[:end]))
        named = {budget: sorted({question.opponent for question in open_}) for budget, open_ in wanted.items()}
        measured = measure(named, first, end)
        for budget, open_ in wanted.items():
            needed = {CANDIDATE, *(question.opponent for question in open_)}
            if defects := _extend(psnr[budget], measured.get(budget, {}), needed, budget, end - first):
                failed[budget] = defects
                continue
            for question in open_:
                finding = _ask(question, psnr[budget], resamples, 1 - error)
                findings[question] = finding
                if finding.answer == "no":
                    failed.setdefault(budget, []).append(_sentence(question, finding))
        left = _still_open(asked, findings, failed)
        log(f"{end} samples: {sum(map(len, left.values()))} of {sum(map(len, asked.values()))} questions open")
        first = end
    return _decision(asked, findings, failed, default_budget)


def _questions(budget: str, opponents: Sequence[str], is_default: bool, tolerance: float) -> list[Question]:
    questions = []
    for name in opponents:
        margin = 0.0 if is_default or name != CHAMPION else tolerance
        questions += [Question(budget, name, "mean", margin), Question(budget, name, "tail", tolerance)]
    return questions


def _still_open(
    asked: Mapping[str, Sequence[Question]], findings: Mapping[Question, Finding], failed: Mapping[str, object]
) -> dict[str, list[Question]]:
    """Questions without an answer of the budgets that can still pass, where there are any."""
    open_ = {
        budget: [q for q in questions if q not in findings or findings[q].answer == "open"]
        for budget, questions in asked.items()
        if budget not in failed
    }
    return {budget: questions for budget, questions in open_.items() if questions}


def _extend(
    have: dict[str, list[float]], new: Mapping[str, Sequence[float]], names: set[str], budget: str, count: int
) -> list[str]:
    """Adds the samples; what is wrong with them, in sentences."""
    defects = []
    for name in sorted(names):
        values = new.get(name, ())
        bad = sum(not math.isfinite(value) for value in values)
        if len(values) != count:
            defects.append(f"{name}: {len(values)} samples at budget {budget}, expected {count}")
        elif bad:
            defects.append(f"{name}: {bad} samples at budget {budget} are not finite")
        else:
            have.setdefault(name, []).extend(map(float, values))
    return defects


@lru_cache(maxsize=8)
def _resamples(groups: tuple[int, ...]) -> Resamples:
    return Resamples(groups, RESAMPLES)


def _ask(
    question: Question, psnr: Mapping[str, Sequence[float]], resamples: Resamples, confidence: float
) -> Finding:
    ours, theirs = psnr[CANDIDATE], psnr[question.opponent]
    if question.about == "mean":
        found = resamples.mean_difference(ours, theirs, confidence)
    else:
        found = resamples.worst_difference(ours, theirs, WORST, confidence)
    answer: Answer = "open"
    if found.low > -question.margin:
        answer = "yes"
    elif found.high <= -question.margin:
        answer = "no"
    return Finding(
        answer=answer, difference=float(found.mean), low=float(found.low), high=float(found.high), samples=len(ours)
    )


def _sentence(question: Question, finding: Finding) -> str:
    what = "the mean" if question.about == "mean" else "the worst fifth's mean"
    bound = "must be above zero" if not question.margin else f"must be above {-question.margin:g} dB"
    doubt = "" if finding.answer == "no" else " and is not known to be"
    return (
        f"{question.opponent}: at budget {question.budget} the difference of {what} is {finding.difference:+.3f} dB "
        f"[{finding.low:+.3f}, {finding.high:+.3f}] on {finding.samples} samples, it {bound}{doubt}"
    )


def _decision(
    asked: Mapping[str, Sequence[Question]],
    findings: Mapping[Question, Finding],
    failed: Mapping[str, Sequence[str]],
    default_budget: str,
) -> Decision:
    against = {budget: list(reasons) for budget, reasons in failed.items()}
    if default_budget not in failed:  # else what is open was never to be answered
        for budget, questions in _still_open(asked, findings, failed).items():
            against[budget] = [_sentence(question, findings[question]) for question in questions]
    numbers: dict[str, Any] = {}
    for question, finding in findings.items():
        numbers.setdefault(question.opponent, {}).setdefault(question.budget, {})[question.about] = finding.to_dict()
    samples = max((finding.samples for finding in findings.values()), default=0)
    if default_budget in against:
        return Decision(promote=False, reasons=tuple(against[default_budget]), numbers=numbers, samples=samples)
    kept = tuple(budget for budget in asked if budget not in against)
    names = sorted({question.opponent for question in asked[default_budget]}, key=lambda name: (name != CHAMPION, name))
    return Decision(
        promote=True,
        reasons=(f"better than {', '.join(names)}",),
        budgets=kept,
        left_out={budget: tuple(reasons) for budget, reasons in against.items()},
        numbers=numbers,
        samples=samples,
    )
