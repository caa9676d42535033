"""A workload for a pipeline folder of your own: its section, its prompts, and the commands that make its predictor.

python examples/own_model.py mine data/base/my-flux prompts.txt --height 1024 --width 1024 --guidance-scale 3.5

The file of prompts has one a line; most of them train the predictor, the rest validate and test it. The section is put
at the end of params.yaml. Where it would be refused, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lesa.models.families import FAMILIES
from lesa.params_file import load_params
from lesa.recording.prompts import read_splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of the workload and of its prompt set")
    parser.add_argument("pipeline", type=Path, help="a folder under data/base that save_pretrained wrote")
    parser.add_argument("prompts", type=Path, help="a prompt a line")
    parser.add_argument("--height", type=int, required=True, help="pixels")
    parser.add_argument("--width", type=int, required=True, help="pixels")
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default bfloat16)")
    parser.add_argument("--max-sequence-length", type=int, help="text tokens")
    parser.add_argument("--root", type=Path, default=Path("."), help="the repository")
    options = parser.parse_args()

    if options.pipeline.resolve().parent != (options.root / "data/base").resolve():
        raise SystemExit(
            f"{options.pipeline}: put the folder under {options.root / 'data/base'}, which stages depend on"
        )
    lines = list(dict.fromkeys(filter(None, map(str.strip, options.prompts.read_text().splitlines()))))
    splits = split(lines)
    params, folder = options.root / "params.yaml", options.root / "data/prompts" / options.name
    pipeline_class = json.loads((options.pipeline / "model_index.json").read_text())["_class_name"]
    family = next((row.name for row in FAMILIES.values() if pipeline_class in row.pipeline_classes), None)
    if family is None:
        raise SystemExit(f"{pipeline_class}: not among the pipelines that a workload records (docs/families.md)")
    if options.num_inference_steps < 20:
        raise SystemExit("fewer than 20 steps: begin with the section of flux-schnell in params.yaml")
    text = params.read_text().rstrip("\n") + "\n\n" + section(options, family, splits)
    with tempfile.TemporaryDirectory() as scratch:  # refused here, before anything is written
        trial = Path(scratch)
        (trial / "params.yaml").write_text(text)
        write_prompts(trial / "prompts", splits)
        load_params(trial / "params.yaml", options.name)
        read_splits(trial / "prompts")
    write_prompts(folder, splits)
    params.write_text(text)
    counts = ", ".join(f"{len(prompts)} {name}" for name, prompts in splits.items())
    print(f"written: {folder} ({counts}), and workloads.{options.name} of {params}")
    print("Add this line to the list `given` of data/workloads/dvc.yaml:")
    print(f"  {options.name}: {{family: {family}, prompts: {options.name}, model: {options.pipeline.name}}}")
    print(f"Then:\n  lesa doctor {options.name}\n  make repro WORKLOAD={options.name}")


def write_prompts(folder: Path, splits: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True)
    for name, prompts in splits.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")


def split(lines: list[str]) -> dict[str, list[str]]:
    """A tenth to validate, a fifth to test, the rest to train; at least one each, two to train."""
    few, some = max(1, len(lines) // 10), max(1, len(lines) // 5)
    if len(lines) < few + some + 2:
        raise SystemExit(f"{len(lines)} prompts: at least 4 are needed, several hundred are better")
    return {"validation": lines[:few], "test": lines[few : few + some], "train": lines[few + some :]}


def section(options: argparse.Namespace, family: str, splits: dict[str, list[str]]) -> str:
    """A workload as it stands under `workloads`, the last key of the file: presets, and what is its own."""
    steps, test = options.num_inference_steps, min(64, len(splits["test"]))
    call = {
        "height": options.height,
        "width": options.width,
        "num_inference_steps": steps,
        "guidance_scale": options.guidance_scale,
        "max_sequence_length": options.max_sequence_length,
    }
    budgets = {f"{ratio}x": {"num_full": round(steps / ratio)} for ratio in (3, 5)}
    train = {"train_prompts": len(splits["train"]), "validation_prompts": len(splits["validation"])}
    own = {
        "seed": 0,
        "prompts": options.name,
        "model": {"family": family, "source": f"data/base/{options.pipeline.name}", "dtype": options.dtype},
        "call": {key: value for key, value in call.items() if value is not None},
        "schedule": {"warmup_steps": 3, "cooldown_steps": 0, "default_budget": "5x", "budgets": budgets},
    }
    preset: dict[str, dict[str, Any]] = {  # a section of params.yaml's preset `published` -> what differs from it
        "record": train,
        "search": {"samples": min(8, len(splits["train"]) - 1)},
        "predictor": {},
        "ground_truth": {},
        "closed_loop": {},
        "evaluate": {"prompts": test},
        "publish": {"gate_prompts": test},
        "resources": {},
    }
    lines = [f"  {options.name}:", *(f"    {key}: {flow(value)}" for key, value in own.items())]
    for key, changes in preset.items():
        settings = ", ".join([f"<<: *published-{key}", *(f"{name}: {value}" for name, value in changes.items())])
        lines.append(f"    {key}: {{{settings}}}")
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("...\n").strip()


if __name__ == "__main__":
    main()
