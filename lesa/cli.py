"""The `lesa` command's parser: sample, compare, look at schedules, bundles, stores and the machine."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lesa.doctor.machine import DISTRIBUTION, INSTALL, INSTALL_PIPELINE
from lesa.locks import Locked

_EXAMPLES = """\
  lesa sample "a thin seven" --bundle models:/lesa-flux-digits@champion --out images
  lesa compare --bundle data/bundles/flux-digits --seeds 8
  lesa schedule --steps 50 --interval 7 8 10
  lesa flops flux-dev --interval 7
  lesa bundle verify data/bundles/flux-digits
  lesa store verify data/trajectories/flux-digits.zarr
  lesa doctor
  lesa doctor flux-dev
  lesa migrate params.yaml
"""


# What `pip install .` brings, by import name; what else a command may miss comes with the extra `pipeline`.
_CORE = {
    "PIL", "accelerate", "diffusers", "jinja2", "numpy", "safetensors", "tokenizers", "torch", "tqdm", "transformers",
    "yaml",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did what was asked, 1 when a check failed, 2 for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        return int(getattr(importlib.import_module("lesa.commands"), arguments.run)(arguments))
    except ModuleNotFoundError as error:
        missing = (error.name or str(error)).split(".")[0]
        remedy = INSTALL if missing in _CORE else INSTALL_PIPELINE
        print(f"lesa {arguments.command}: needs {missing}, which is not installed: {remedy}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, Locked) as error:
        print(f"lesa {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lesa {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lesa",
        description="Learned stage-aware predictors that make diffusion transformers sample faster.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lesa {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    looking = (_add_schedule, _add_flops, _add_bundle, _add_store, _add_doctor)
    for add in (_add_sample, _add_compare, *looking, _add_migrate):
        add(commands)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _add_sample(commands: Any) -> None:
    parser = _command(
        commands,
        "sample",
        "draw images with a bundle, and show what was full and what was predicted",
        '  lesa sample "a thin seven" "a bold two" --bundle data/bundles/flux-digits --seed 1 --out images\n'
        '  lesa sample "a thin seven" --bundle models:/lesa-flux-digits@champion --budget 6.25x\n'
        '  lesa sample "a thin seven" --bundle data/bundles/flux-digits --steps 28   (where it was trained for that)\n'
        '  lesa sample "a thin seven" --bundle data/bundles/flux-digits --plain      (without acceleration)\n',
        run="sample",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="one image each")
    parser.add_argument("--prompt", action="append", default=[], help="the same, may be repeated")
    _bundle_arguments(parser)
    _schedule_choice(parser)
    parser.add_argument("--seed", type=int, default=0, help="noise of the first image; the next has the next")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the PNG files (default: here)")
    parser.add_argument("--overwrite", action="store_true", help="replace images of the same name in that folder")
    parser.add_argument("--steps", type=int, help="sampler steps, in the bundle's range (default: the bundle's own)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a pipeline call")
    parser.add_argument(
        "--adaptive", action="store_true", help="go on with a slower budget where errors exceed their calibrated bounds"
    )
    parser.add_argument("--plain", action="store_true", help="every step full, the bundle's call")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        "a bundle against training-free rules and solvers at equal full steps, on held-out prompts",
        "  lesa compare --bundle data/bundles/flux-digits --seeds 4 --peers data/peers/flux-digits.json\n"
        "  lesa compare --bundle models:/lesa-flux-digits@champion --prompts test.txt --json\n",
        run="compare",
    )
    _bundle_arguments(parser)
    parser.add_argument(
        "--prompts", type=Path, help="file of held-out prompts, one a line (default: the set's test.txt)"
    )
    parser.add_argument("--num-prompts", type=int, default=16, help="how many of them, from the first")
    parser.add_argument("--seeds", type=int, default=2, help="noise seeds a prompt")
    parser.add_argument("--seed", type=int, default=40_000, help="the first noise seed; training uses lower ones")
    parser.add_argument("--batch-size", type=int, default=32, help="images a pipeline call")
    parser.add_argument("--fast", action="store_true", help="leave the threshold caches out: they need tuning")
    parser.add_argument(
        "--peers", type=Path, help="also peers on steps of their own: a file of benchmarks.peers.search_peers"
    )
    parser.add_argument("--json", action="store_true", help="print every number as JSON")


def _add_schedule(commands: Any) -> None:
    parser = _command(
        commands,
        "schedule",
        "which steps are full (#) and which predicted (.)",
        "  lesa schedule --steps 50 --interval 7 8 10\n"
        "  lesa schedule --steps 50 --full-steps 0,1,2,5,9,14,20,27,35,44\n"
        "  lesa schedule --bundle data/bundles/flux-digits\n",
        run="schedule",
    )
    parser.add_argument("--steps", type=int, default=50, help="sampler steps (default 50)")
    parser.add_argument("--interval", type=int, nargs="+", default=[], help="steps from full to full; 1 is plain")
    parser.add_argument("--warmup", type=int, default=3, help="leading full steps (default 3)")
    parser.add_argument("--cooldown", type=int, default=0, help="trailing full steps (default 0)")
    parser.add_argument("--full-steps", type=_steps, help="the full steps themselves, with commas")
    parser.add_argument("--bundle", help="show the budgets of a bundle")
    parser.add_argument("--budget", help="only this one")


def _add_flops(commands: Any) -> None:
    parser = _command(
        commands,
        "flops",
        "what a schedule saves at a published model's true size, counted without its weights",
        "  lesa flops flux-dev --interval 7\n"
        "  lesa flops hunyuan-video --interval 10 --json\n"
        "  lesa flops flux-dev --bundle data/bundles/flux-digits --budget 5x    (its predictor at that width)\n",
        run="flops",
    )
    parser.add_argument("family", nargs="?", help="a model; without one, all of them")
    parser.add_argument("--bundle", help="count this bundle's predictor and schedule, rank in proportion to width")
    parser.add_argument("--budget", help="of the bundle (default: its default)")
    parser.add_argument("--interval", type=int, help="steps from full to full (default: the model's)")
    parser.add_argument("--steps", type=int, help="sampler steps (default: the model's)")
    parser.add_argument("--warmup", type=int, help="leading full steps (default: the model's)")
    parser.add_argument("--json", action="store_true", help="print every number as JSON")


def _add_bundle(commands: Any) -> None:
    show = "  lesa bundle show data/bundles/flux-digits\n  lesa bundle show models:/lesa-flux-digits@champion --json\n"
    verify = (
        "  lesa bundle verify data/bundles/flux-digits\n"
        "  lesa bundle verify data/bundles/flux-digits --digest SHA256    (of its manifest, from somewhere else)\n"
    )
    bundle = _command(commands, "bundle", "look into a bundle, or verify it", show + verify)
    actions = bundle.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, help_text, examples in (
        ("show", "what it fits and how good it measured", show),
        ("verify", "check every byte", verify),
    ):
        action = _command(actions, name, help_text, examples, run=f"bundle_{name}")
        action.add_argument("bundle", help="folder, or models:/name@alias")
        action.add_argument("--digest", help="SHA-256 its manifest must have")
        action.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_store(commands: Any) -> None:
    verify = "  lesa store verify data/trajectories/flux-digits.zarr\n"
    drop = "  lesa store drop-pruned data/trajectories/flux-digits.zarr\n"
    store = _command(commands, "store", "verify a trajectory store, or delete what was pruned from it", verify + drop)
    actions = store.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, help_text, examples in (
        ("verify", "check every trajectory against its digests", verify),
        ("drop-pruned", "delete the pruned trajectories that are kept beside the store", drop),
    ):
        action = _command(actions, name, help_text, examples, run=f"store_{name.replace('-', '_')}")
        action.add_argument("store", type=Path, help="a .zarr folder")


def _add_doctor(commands: Any) -> None:
    parser = _command(
        commands,
        "doctor",
        "what is installed, which device, what is reachable; whether this machine can make a workload's predictor",
        "  lesa doctor\n"
        "  lesa doctor flux-dev        (GPU memory and hours, disk, network: needed against present)\n"
        "  lesa doctor --workload hunyuan-video --json\n",
        run="doctor",
    )
    parser.add_argument("name", nargs="?", metavar="WORKLOAD", help="section of params.yaml; without one: facts alone")
    parser.add_argument("--workload", help="the same")
    parser.add_argument("--json", action="store_true", help="print every fact as JSON")


def _add_migrate(commands: Any) -> None:
    parser = _command(
        commands,
        "migrate",
        "rewrite a settings file of an older version; comments and order stay",
        "  lesa migrate params.yaml --check    (what would move; exit code 1 where something would)\n"
        "  lesa migrate params.yaml\n",
        run="migrate",
    )
    parser.add_argument("file", type=Path, help="the params.yaml of a repository")
    parser.add_argument("--check", action="store_true", help="change nothing")


def _command(
    commands: Any, name: str, help_text: str, examples: str, run: str | None = None
) -> argparse.ArgumentParser:
    """A command or an action of one; `run` names the function of `lesa.commands` that does it."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if run is not None:
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
    group.add_argument(
        "--max-outlier-share", type=float, help="the fastest known to give another picture in at most such a share"
    )


def _steps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of steps like 0,1,2,9") from None
