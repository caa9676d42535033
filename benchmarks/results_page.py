"""The text of docs/results.md around the tables of `benchmarks.kept_results`; figures come from the kept files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.kept_results import (
    FIRST,
    RESULTS,
    Document,
    best,
    by_count,
    chosen,
    comparison,
    kept_files,
    load,
    markdown,
    mean_interval,
    reference_table,
)

_HEAD = """# What was measured

Written by `python -m benchmarks.tables` from the files in `benchmarks/results/`; nothing here is typed by hand but
the notes on machines and dates. How it is measured: [benchmarks/README.md](../benchmarks/README.md). Words:
[words.md](words.md).

**Everything here is of small models on small pictures, on CPUs.** The figures show that the system works and what it
gains over each peer there. They are no promise for FLUX.1-dev or others, which have not been trained here.

PSNR is to the image that all steps make, in dB, with a 95% bootstrap interval over prompts; "5th pct." is its 5th
percentile over samples; "to converged" is the PSNR to a run of 1000 steps from the same noise, on a part of the
samples. All rows of a table make the same number of transformer evaluations, except that a step whose prediction is
not finite or more than ten times too large is computed in full. A row without a suffix is on uniform full steps or an
even grid; "searched" is on full steps or a grid searched for that peer on training prompts; "our searched" on ours;
"its own" on its published rule. After the default comes the strongest peer, then the others; our other forms stand
last. Of each peer the best row is shown, all rows are in the file that is linked.
"""

_DIGITS = """## flux-digits

The default workload. The model was trained on 900 other prompts, the predictor on 400 further ones that the model
never saw. The kept tables are of 2026-11-29 (Intel Xeon, 2 cores). "The LESA form" is the paper's form with its best
settings here: a history of steps with own predictions, three of them where the schedule allows.
"""

_DIGITS_NOTES = """
A base model trained on another make of CPU is another model and gets full steps of its own:
[machines.md](../benchmarks/studies/machines.md). The pictures are of another such run than the tables.

![The same prompts and noise by every method, 10 of 50 steps](flux-digits-5x.png)
![PSNR against step ratio and wall-clock ratio](flux-digits-psnr.png)
"""

_PHOTOS = """## flux-photos

Crops of two colour photographs, 24 x 24, asked for by place, size and treatment: a harder distribution, on which PSNR
varies more than twice as much from sample to sample. The settings are those of `flux-digits`, none tuned for it, but
800 training prompts of one noise each. Kept tables of 2026-11-29; cache-dit was not among the peers.
"""

_ARCHITECTURES = """## The other architectures

Small models of the other families, trained here from nothing by the same stages. "Searched" steps are the search
stage's, "even" ones the paper's uniform schedule. Every peer has at least as many full steps; its best row counts, on
our full steps or its own. MagCache is tuned to equal time and computes 3 of 4 steps beside LESA's 2 on
`schnell-digits`. These predictors learned from prompts that the models themselves were trained on; the workloads have
since been given others for it ([data/prompts/README.md](../data/prompts/README.md)) and have not been run again.
"""

_EVEN = """
With even steps in the bundle, a setting of its own (`hunyuan-moving-digits` on a base model with fewer training
steps): HunyuanVideo's scheduler moves its noise levels so far up that the last steps are the long ones, and even
steps miss them: FirstBlockCache, which chooses its steps, is ahead. The gate refused that bundle, as it did
`lightning-digits` with even steps. Searched steps are the answer, and the default.
"""

_CACHE_DIT = """## cache-dit, FirstBlockCache, MagCache and the untrained rules

The 5x budget of a bundle as `make repro` publishes it, beside cache-dit's DBCache with each calibrator, tuned on
training prompts, and the other training-free peers (2026-11-29). At equal time DBCache computes fewer full steps,
since one or more of this model's six blocks run at every step.
"""

_FLOPS = """## Operations at true size

Counted on the meta device, not timed: no weights, no GPU ([flops.md](../benchmarks/results/flops.md)). The predictor
is the default's form at the model's width, its operations are part of what an accelerated run costs.
"""

_WALL_CLOCK = """## Wall clock

Of the whole pipeline call on `flux-digits`, text encoders and decoder included, against plain calls of the same
batch: medians of 7 pairs of calls, the lowest and highest pair in brackets (2026-11-29, 2 CPU cores). With few
samples a call the text encoders and the decoder of so small a model weigh more.
"""

_ADAPTIVE = """## adaptive=True

One sample a run; adapters are random LoRAs, "change" is how much they change the attention's weights. Bounds are of
64 validation runs alone; training runs count beside them since (`publish.bound_samples`). 2026-11-29.
"""

_COUNTS = """## Other numbers of steps

One set of experts for any number of steps, trained on those of `record.step_counts`; at the bundle's own number the
budgets' own predictors serve and "mixed" is what these experts would make of it. Peers: reuse, TaylorSeer of order 1
and 2 on the same full steps, and fewer Euler steps; the strongest is named. 2026-11-29.
"""

_MORE = """## What each choice is worth

One choice of the LESA form changed at a time, trained with two seeds, judged on validation prompts (2026-11-28):
[choices-flux-digits.md](../benchmarks/results/choices-flux-digits.md). Other studies and their diaries:
[benchmarks/README.md](../benchmarks/README.md#studies).
"""

_ARCHITECTURE_NAMES = ("qwen-digits", "hunyuan-moving-digits", "schnell-digits", "lightning-digits")


def page(root: Path) -> str:
    """docs/results.md as it must be."""
    parts = [_HEAD, _DIGITS, *_workload("flux-digits", root), _digits_memory(root), _DIGITS_NOTES]
    parts += [_PHOTOS, *_workload("flux-photos", root), _photos_memory(root)]
    even = [f"{name}-even" for name in ("hunyuan-moving-digits", "lightning-digits")]
    parts += [_ARCHITECTURES, reference_table(_ARCHITECTURE_NAMES, root), _students(root)]
    parts += [_EVEN, reference_table(even, root)]
    parts += [_CACHE_DIT, _compare(root), _FLOPS, _flops(root), _WALL_CLOCK, _wall_clock(root)]
    parts += [_ADAPTIVE, _adaptive(root), _COUNTS, _step_counts(root), _MORE]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _workload(name: str, root: Path) -> list[str]:
    """The tables of a workload, and what they say in sentences."""
    documents = by_count(name, root)
    files = kept_files(name, root)
    parts = []
    smallest = []
    for count, document in documents.items():
        counts, plain = document["counts"], document["plain"]
        rows = {row["method"]: row for row in document["rows"] if row["budget"] == count}
        parts += [
            f"### {name}, {count} of {rows[FIRST]['num_steps']} steps",
            comparison(document, count),
            f"{counts['samples']} samples of {counts['prompts']} held-out prompts with fresh noise; to converged: "
            f"{counts['converged_samples']} samples, on which the image of all steps has "
            f"{plain['converged_psnr']['mean']:.2f} dB. The scorer, a classifier trained on real pictures, reads "
            f"{plain['agreement']['mean']:.1%} of the plain images as prompted and "
            f"{rows[FIRST]['agreement']['mean']:.1%} of the default's. All {len(rows)} rows: "
            f"[{files[count]}.md](../{RESULTS}/{files[count]}.md).",
        ]
        strongest = chosen(list(rows.values()))[1]
        smallest.append((_lead(document, count, FIRST, strongest["method"]), count, strongest["label"]))
    lead, count, label = min(smallest, key=lambda entry: entry[0]["mean"])
    parts.append(
        f"The smallest lead over the strongest peer is {mean_interval(lead)} dB ({label}, {count} full steps). On the "
        f"uniform schedule, over TaylorSeer without a search at the better of its rows: {_uniform(documents)}."
    )
    return parts


def _lead(document: Document, count: str, method: str, against: str) -> Mapping[str, float]:
    wanted = (count, method, against, "psnr")
    lead: Mapping[str, float] = next(
        d for d in document["differences"] if (d["budget"], d["method"], d["against"], d["metric"]) == wanted
    )
    return lead


def _uniform(documents: Mapping[str, Document]) -> str:
    """Leads of both uniform forms over the better published row of TaylorSeer, at each number of full steps."""
    words = []
    for label, method in (("the default's form", "per_step_uniform"), ("the LESA form", "lesa_uniform")):
        leads = []
        for count, document in documents.items():
            rows = [row for row in document["rows"] if row["budget"] == count]
            peer = best(rows, ["TaylorSeer, published"])["method"]
            leads.append(f"{_lead(document, count, method, peer)['mean']:.1f}")
        words.append(f"{label} {', '.join(leads)} dB at {', '.join(documents)} full steps")
    return "; ".join(words)


def _digits_memory(root: Path) -> str:
    """Training images beside held-out ones: the older files hold means alone."""
    rows = []
    for count, document in by_count("flux-digits", root).items():
        held_out = {row["method"]: row["psnr"]["mean"] for row in document["rows"] if row["budget"] == count}
        for method in (FIRST, "lesa_searched", "taylor1_ours"):
            key = f"{count}/{method}"
            images, prompts = document["on_training_images"][key], document["on_training_prompts"][key]
            more = [f"{value - held_out[method]:+.2f}" for value in (images, prompts)]
            rows.append([count, _label(document, count, method), f"{held_out[method]:.2f}", f"{images:.2f}", *more])
    headings = ["full steps", "row", "held-out", "training images", "more", "training prompts, fresh noise: more"]
    return (
        "### flux-digits: what is memorized\n\nPSNR on the images that the predictor was trained on, beside held-out "
        "ones (171 prompts spread over the 400; TaylorSeer learns nothing and shows how easy the prompts are).\n\n"
        + markdown(headings, rows)
    )


def _photos_memory(root: Path) -> str:
    rows = []
    for count, document in by_count("flux-photos", root).items():
        for method in (FIRST, "lesa_searched"):
            memory = document["learned_by_heart"][f"{count}/{method}"]
            gaps = [mean_interval(memory[key], "+") for key in ("gap", "net")]
            rows.append([count, _label(document, count, method), f"{memory['images']:.2f}", *gaps])
    headings = ["full steps", "row", "training images", "more than held-out", "of it in the lead over TaylorSeer"]
    return "### flux-photos: what is memorized\n\nAll 800 training prompts.\n\n" + markdown(headings, rows)


def _label(document: Document, count: str, method: str) -> str:
    rows = (row for row in document["rows"] if (row["budget"], row["method"]) == (count, method))
    return str(next(rows)["label"])


def _students(root: Path) -> str:
    words = []
    for name, steps in (("schnell-digits", 4), ("lightning-digits", 8)):
        base = load(f"reference-{name}", root)["base"]
        words.append(
            f"{name} ({steps} steps) {base['agreement']:.3f} as prompted, its teacher with 50 steps "
            f"{base['teacher_agreement']:.3f}, {base['teacher_psnr']:.1f} dB to the teacher's images"
        )
    promoted = [name for name in _ARCHITECTURE_NAMES if load(f"reference-{name}", root)["promoted"]]
    return (
        f"The gate made these champions: {', '.join(promoted)}. As prompted is what a scorer reads: the peers' images "
        "read so nearly as often as the plain run's, so that a better agreement cannot be shown on these models. The "
        f"few-step models are distilled: {'; '.join(words)} (120 validation prompts)."
    )


def _compare(root: Path) -> str:
    document = load("compare-flux-digits-5x", root)
    gains = {d["against"]: d for d in document["differences"] if (d["method"], d["metric"]) == ("lesa", "psnr")}
    ours = next(row for row in document["rows"] if row["method"] == "lesa")
    peers = sorted((r for r in document["rows"] if r["kind"] != "lesa"), key=lambda row: -row["psnr"]["mean"])
    lines = [
        [
            row["label"],
            f"{row['computed_steps']:g}",
            mean_interval(row["psnr"]),
            mean_interval(gains[row["method"]], "+") if row is not ours else "",
            f"{row['wall_clock_ratio']:.2f}x",
        ]
        for row in (ours, *peers[:12], *(r for r in peers[12:] if "equal time" in r["label"]))
    ]
    counts = document["counts"]
    return (
        markdown(["5x", "computed steps", "PSNR, dB", "LESA minus this", "wall clock"], lines)
        + f"\n\n{counts['samples']} samples of {counts['prompts']} held-out prompts; the strongest rows and those "
        f"at equal time. All {len(document['rows'])}: "
        f"[compare-flux-digits-5x.md](../{RESULTS}/compare-flux-digits-5x.md)."
    )


def _flops(root: Path) -> str:
    headings = ["model", "size", "full steps", "plain, TFLOPs", "accelerated", "ratio", "predictor, full calls", "kept"]
    rows = [
        [
            row["family"] + (f", {row['branches']} branches" if row["branches"] > 1 else ""),
            row["size"],
            f"{len(row['schedule']['full_steps'])} of {row['schedule']['num_steps']}",
            f"{row['plain_tflops']:.0f}",
            f"{row['accelerated_tflops']:.0f}",
            f"{row['flops_ratio']:.2f}x",
            f"{row['predictor_full_calls']:.4f}",
            f"{sum(row['bytes_kept'].values()) / 1e9:.3f} GB",
        ]
        for row in load("flops", root)["rows"]
    ]
    return markdown(headings, rows)


def _wall_clock(root: Path) -> str:
    rows = load("wall_clock", root)["rows"]
    batches = sorted({row["batch"] for row in rows})
    at: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        at.setdefault(row["budget"], {})[row["batch"]] = row
    lines = [
        [budget, f"{cells[batches[0]]['step_ratio']:.2f}x"]
        + [f"{cells[n]['ratio']:.2f}x [{cells[n]['ratio_low']:.2f}, {cells[n]['ratio_high']:.2f}]" for n in batches]
        for budget, cells in at.items()
    ]
    return markdown(["budget", "steps saved", *(f"{n} samples a call" for n in batches)], lines)


def _adaptive(root: Path) -> str:
    document = load("adaptive-flux-digits-5x", root)
    lines = []
    for row in document["rows"]:
        fast, adaptive = row["fast"], row["adaptive"]
        gain = dict(zip(("mean", "low", "high"), row["gain"], strict=True))
        change = "none" if not row["strength"] else f"{row['relative_weight_change']:.0%}"
        lines.append([
            change, f"{fast['psnr_mean']:.2f}", f"{adaptive['psnr_mean']:.2f}", mean_interval(gain, "+"),
            f"{fast['psnr_p5']:.2f}, {adaptive['psnr_p5']:.2f}", f"{adaptive['share_changed']:.1%}",
            f"{adaptive['mean_full_steps']:.2f}",
        ])  # fmt: skip
    headings = [
        "change",
        f"{document['budget']}, dB",
        "adaptive",
        "gain",
        "5th pct.: both",
        "changed over",
        "full steps",
    ]
    blind = "; ".join(f"strength {strength}: {_traffic(parts)}" for strength, parts in document["traffic"].items())
    return (
        markdown(headings, lines)
        + "\n\nWhere half of the runs have such an adapter, adaptive minus as many full steps spent blindly: "
        + f"{blind}. {document['samples']} samples of {document['prompts']} prompts: "
        f"[adaptive-flux-digits-5x.md](../{RESULTS}/adaptive-flux-digits-5x.md)."
    )


def _traffic(parts: Mapping[str, Mapping[str, float]]) -> str:
    mean, p5 = (parts["adaptive"][key] - parts["blind"][key] for key in ("psnr_mean", "psnr_p5"))
    return f"mean {mean:+.1f} dB, 5th percentile {p5:+.1f} dB"


def _step_counts(root: Path) -> str:
    document = load("step-counts-flux-digits", root)
    trained = document["about"]["trained_counts"]
    lines = []
    leads = []
    for row in document["rows"]:
        methods = row["methods"]
        peers = {name: values for name, values in methods.items() if name not in ("lesa", "mixed")}
        strongest = max(peers, key=lambda name: peers[name]["mean"])
        gap = peers[strongest]["lesa_minus_this"]
        if row["num_steps"] != 50:
            leads.append(gap["mean"])
        mixed = f"{methods['mixed']['mean']:.2f}" if "mixed" in methods else ""
        steps = f"{row['num_steps']}" + ("" if row["num_steps"] in trained else " (between)")
        lines.append([
            steps, row["budget"], f"{len(row['full_steps'])}", mean_interval(methods["lesa"]),
            f"{mean_interval(gap, '+')} ({strongest})", mixed,
        ])  # fmt: skip
    about = document["about"]
    headings = ["steps", "budget", "full", "LESA, dB", "minus the strongest peer", "mixed"]
    return (
        markdown(headings, lines)
        + f"\n\n{about['samples']} samples of {about['prompts']} held-out prompts, trained at "
        f"{', '.join(map(str, trained))} steps. Away from the bundle's own 50 steps {sum(x > 0 for x in leads)} of "
        f"{len(leads)} rows are ahead of the strongest peer; the worst is at {min(leads):+.1f} dB."
    )
