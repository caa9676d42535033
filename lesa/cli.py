"""The `lesa` command: sample, compare, look at schedules, bundles, stores and the machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesa.errors import LesaError

if TYPE_CHECKING:
    from lesa.bundle import Bundle
    from lesa.schedule import Schedule

_EXAMPLES = """examples:
  lesa sample "a thin seven" --bundle models:/lesa-flux-digits@champion --out pictures
  lesa compare --bundle data/bundles/flux-digits --seeds 8
  lesa schedule --steps 50 --interval 7 8 10
  lesa flops flux-dev --interval 7
  lesa bundle verify data/bundles/flux-digits
  lesa store verify data/trajectories/flux-digits.zarr
  lesa doctor
  lesa doctor flux-dev
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did what was asked, 1 when a check failed, 2 for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"lesa {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lesa {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lesa",
        description="Learned stage-aware predictors that make diffusion transformers sample faster.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sample = _command(
        commands,
        "sample",
        _sample,
        "draw pictures with a bundle, and show what was full and what was predicted",
        'lesa sample "a thin seven" "a bold two" --bundle data/bundles/flux-digits --seed 1 --out pictures\n'
        '  lesa sample "a thin seven" --bundle models:/lesa-flux-digits@champion --budget 6.25x\n'
        '  lesa sample "a thin seven" --bundle data/bundles/flux-digits --steps 28   (where it was trained for that)\n'
        '  lesa sample "a thin seven" --bundle data/bundles/flux-digits --plain      (without acceleration)',
    )
    sample.add_argument("prompts", nargs="*", metavar="PROMPT", help="one picture each")
    sample.add_argument("--prompt", action="append", default=[], help="the same, may be repeated")
    _bundle_arguments(sample)
    _schedule_choice(sample)
    sample.add_argument(
        "--seed", type=int, default=0, help="noise of the first picture; the next has the next"
    )
    sample.add_argument(
        "--out", type=Path, default=Path("."), help="folder for the PNG files (default: here)"
    )
    sample.add_argument("--steps", type=int, help="sampler steps, in the bundle's range (default: the bundle's own)")
    sample.add_argument("--batch-size", type=int, default=16, help="pictures a pipeline call")
    sample.add_argument(
        "--adaptive", action="store_true", help="go on with a slower budget where errors exceed their calibrated bounds"
    )
    sample.add_argument("--plain", action="store_true", help="every step full, the bundle's call")
    sample.add_argument("--json", action="store_true", help="print the summary as JSON")

    compare = _command(
        commands,
        "compare",
        _compare,
        "a bundle against training-free rules and solvers at equal full steps, on held-out prompts",
        "lesa compare --bundle data/bundles/flux-digits --seeds 4 --peers data/peers/flux-digits.json\n"
        "  lesa compare --bundle models:/lesa-flux-digits@champion --prompts test.txt --json",
    )
    _bundle_arguments(compare)
    compare.add_argument(
        "--prompts", type=Path, help="file of held-out prompts, one a line (default: the set's test.txt)"
    )
    compare.add_argument("--num-prompts", type=int, default=16, help="how many of them, from the first")
    compare.add_argument("--seeds", type=int, default=2, help="noise seeds a prompt")
    compare.add_argument(
        "--seed", type=int, default=40_000, help="the first noise seed; training uses lower ones"
    )
    compare.add_argument("--batch-size", type=int, default=32, help="pictures a pipeline call")
    compare.add_argument(
        "--fast", action="store_true", help="leave the threshold caches out: they need tuning"
    )
    compare.add_argument(
        "--peers", type=Path, help="also peers on steps of their own: a file of benchmarks.peers.search_peers"
    )
    compare.add_argument("--json", action="store_true", help="print every number as JSON")

    schedule = _command(
        commands,
        "schedule",
        _schedule,
        "which steps are full (#) and which predicted (.)",
        "lesa schedule --steps 50 --interval 7 8 10\n"
        "  lesa schedule --steps 50 --full-steps 0,1,2,5,9,14,20,27,35,44\n"
        "  lesa schedule --bundle data/bundles/flux-digits",
    )
    schedule.add_argument("--steps", type=int, default=50, help="sampler steps (default 50)")
    schedule.add_argument(
        "--interval", type=int, nargs="+", default=[], help="steps from full to full; 1 is plain"
    )
    schedule.add_argument("--warmup", type=int, default=3, help="leading full steps (default 3)")
    schedule.add_argument("--cooldown", type=int, default=0, help="trailing full steps (default 0)")
    schedule.add_argument("--full-steps", type=_steps, help="the full steps themselves, with commas")
    schedule.add_argument("--bundle", help="show the budgets of a bundle")
    schedule.add_argument("--budget", help="only this one")

    flops = _command(
        commands,
        "flops",
        _flops,
        "what a schedule saves at a published model's true size, counted without its weights",
        "lesa flops flux-dev --interval 7\n  lesa flops hunyuan-video --interval 10 --json\n"
        "  lesa flops flux-dev --bundle data/bundles/flux-digits --budget 5x    (its predictor at that width)",
    )
    flops.add_argument("family", nargs="?", help="a model; without one, all of them")
    flops.add_argument("--bundle", help="count this bundle's predictor and schedule, rank in proportion to width")
    flops.add_argument("--budget", help="of the bundle (default: its default)")
    flops.add_argument("--interval", type=int, help="steps from full to full (default: the model's)")
    flops.add_argument("--steps", type=int, help="sampler steps (default: the model's)")
    flops.add_argument("--warmup", type=int, help="leading full steps (default: the model's)")
    flops.add_argument("--json", action="store_true")

    bundle = commands.add_parser("bundle", help="look into a bundle, or verify it")
    actions = bundle.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, help_text in (
        ("show", "what it fits and how good it measured"),
        ("verify", "check every byte"),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("bundle", help="folder, or models:/name@alias")
        action.add_argument("--digest", help="SHA-256 its manifest must have")
        action.add_argument("--json", action="store_true", help="print the manifest")
        action.set_defaults(run=_bundle_show if name == "show" else _bundle_verify)

    store = commands.add_parser("store", help="verify a trajectory store")
    actions = store.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="check every trajectory against its digests")
    verify.add_argument("store", type=Path, help="a .zarr folder")
    verify.set_defaults(run=_store_verify)

    doctor = _command(
        commands,
        "doctor",
        _doctor,
        "what is installed, which device, what is reachable; whether this machine can make a workload's predictor",
        "lesa doctor\n  lesa doctor flux-dev        (GPU memory and hours, disk, network: needed against present)\n"
        "  lesa doctor --workload hunyuan-video --json",
    )
    doctor.add_argument("name", nargs="?", metavar="WORKLOAD", help="section of params.yaml; without one: facts alone")
    doctor.add_argument("--workload", help="the same")
    doctor.add_argument("--json", action="store_true")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help_text: str, examples: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=f"examples:\n  {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _bundle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", required=True, help="folder of a bundle, or models:/name@alias")
    parser.add_argument("--base", help="pipeline folder or hub id (default: where the bundle says it was)")
    parser.add_argument("--revision", help="commit of a hub id (default: the bundle's)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--allow",
        nargs="+",
        default=[],
        choices=("lora", "quantized"),
        help="accept what the bundle was not measured with",
    )


def _schedule_choice(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--budget", help="a schedule of the bundle by name (default: its default)")
    group.add_argument("--interval", type=int, help="steps from full to full; 1 is plain sampling")
    group.add_argument("--full-steps", type=_steps, help="the full steps themselves, with commas")
    group.add_argument("--min-psnr", type=float, help="the fastest budget that measured at least so many dB")
    group.add_argument("--max-loss-db", type=float, help="the fastest at most so far below the bundle's best, dB")


def _steps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of steps like 0,1,2,9") from None


def _load_bundle(source: str, digest: str | None = None) -> Bundle:
    from lesa.commands import load

    return load(source, digest)


def _sample(arguments: argparse.Namespace) -> int:
    from lesa.commands import run_sample

    return run_sample(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from lesa.commands import run_compare

    return run_compare(arguments)


def _schedule(arguments: argparse.Namespace) -> int:
    from lesa.schedule import Schedule, picture

    rows: list[tuple[str, Schedule]] = []
    if arguments.bundle is not None:
        budgets = _load_bundle(arguments.bundle).manifest.budgets
        if arguments.budget is not None and arguments.budget not in budgets:
            raise LesaError(f"budget: {arguments.budget!r} is not one of {', '.join(budgets)}")
        rows += [
            (name, budget.schedule) for name, budget in budgets.items() if arguments.budget in (None, name)
        ]
    elif arguments.budget is not None:
        raise LesaError("--budget needs --bundle")
    for interval in arguments.interval:
        schedule = Schedule.uniform(arguments.steps, interval, arguments.warmup, arguments.cooldown)
        rows.append((f"interval {interval}", schedule))
    if arguments.full_steps is not None:
        rows.append(("full steps", Schedule.explicit(arguments.steps, arguments.full_steps)))
    if not rows:
        raise LesaError("give --interval, --full-steps or --bundle")
    width = max(len(name) for name, _ in rows)
    for name, schedule in rows:
        print(f"{name:<{width}}  {picture(schedule)}  {schedule}")
    return 0


def _flops(arguments: argparse.Namespace) -> int:
    from lesa.models.published import PRESETS, family_flops
    from lesa.schedule import Schedule

    uniform = (arguments.steps, arguments.interval, arguments.warmup)
    if arguments.budget is not None and uniform != (None, None, None):
        raise LesaError("give --budget, or --interval, --steps and --warmup")
    spec, of_bundle = None, None
    if arguments.bundle is not None:
        from lesa.bundle.budgets import choose_schedule

        manifest = _load_bundle(arguments.bundle).manifest
        spec = manifest.predictor
        of_bundle, _ = choose_schedule(manifest, budget=arguments.budget)
    elif arguments.budget is not None:
        raise LesaError("--budget needs --bundle")
    names = [arguments.family] if arguments.family else list(PRESETS)
    results = []
    for name in names:
        schedule = of_bundle
        if name in PRESETS and uniform != (None, None, None):
            preset = PRESETS[name]
            usual = (preset.num_inference_steps, preset.interval, preset.warmup_steps)
            schedule = Schedule.uniform(*(b if a is None else a for a, b in zip(uniform, usual, strict=True)))
        results.append(family_flops(name, schedule, spec))
    if arguments.json:
        print(json.dumps([result.to_dict() for result in results], indent=2))
    else:
        print("\n\n".join(str(result) for result in results))
    return 0


def _bundle_show(arguments: argparse.Namespace) -> int:
    from lesa.bundle.card import card

    bundle = _load_bundle(arguments.bundle, arguments.digest)
    if arguments.json:
        print(json.dumps(bundle.manifest.to_dict(), indent=2, ensure_ascii=False))
    else:
        print(f"{bundle.path}\nmanifest sha256:{bundle.digest}\n\n{card(bundle.manifest)}", end="")
    return 0


def _bundle_verify(arguments: argparse.Namespace) -> int:
    from lesa.bundle import BundleError

    try:
        bundle = _load_bundle(arguments.bundle, arguments.digest)
    except BundleError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"path": str(bundle.path), "digest": bundle.digest, "problems": []}))
    else:
        pinned = "" if arguments.digest else " (not pinned: compare it with where you had the bundle from)"
        print(f"{bundle.path}: good, manifest sha256:{bundle.digest}{pinned}")
    return 0


def _store_verify(arguments: argparse.Namespace) -> int:
    from lesa.recording.store import TrajectoryStore

    store = TrajectoryStore.open(arguments.store)
    problems = store.verify()
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{arguments.store}: {len(store.keys())} trajectories, {len(problems)} problem(s)")
    return 1 if problems else 0


def _doctor(arguments: argparse.Namespace) -> int:
    from lesa.doctor.machine import examine, format_facts

    name = arguments.workload or arguments.name
    if arguments.workload and arguments.name not in (None, arguments.workload):
        raise LesaError(f"give one workload, got {arguments.name!r} and {arguments.workload!r}")
    facts = examine()
    if name is None:
        print(json.dumps(facts, indent=2) if arguments.json else format_facts(facts))
        return 0
    from lesa.doctor.readiness import examine_workload, format_readiness
    from lesa.params_file import load_params

    found = examine_workload(load_params("params.yaml", name))
    if arguments.json:
        print(json.dumps({**facts, **found}, indent=2))
    else:
        print(f"{format_facts(facts)}\n{format_readiness(found)}")
    return 0 if found["ready"] else 1
