"""A workload for a pipeline folder of your own: its section, its prompts, and the commands that make its predictor.

python examples/own_model.py mine /models/my-flux prompts.txt --height 1024 --width 1024 --guidance-scale 3.5

The file of prompts has one a line; most of them train the predictor, the rest validate and test it. The section is put
at the end of params.yaml. Where it would be refused, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import yaml

from lesa.models.families import FAMILIES
from lesa.params_file import load_params
from lesa.recording.prompts import read_splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of the workload and of its prompt set")
    parser.add_argument("pipeline", type=Path, help="a folder that save_pretrained wrote")
    parser.add_argument("prompts", type=Path, help="a prompt a line")
    parser.add_argument("--height", type=int, required=True, help="pixels")
    parser.add_argument("--width", type=int, required=True, help="pixels")
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--max-sequence-length", type=int, help="text tokens")
    parser.add_argument("--root", type=Path, default=Path("."), help="the repository")
    options = parser.parse_args()

    lines = list(dict.fromkeys(filter(None, map(str.strip, options.prompts.read_text().splitlines()))))
    splits = split(lines)
    params, folder = options.root / "params.yaml", options.root / "data/prompts" / options.name
    text = params.read_text().rstrip("\n") + "\n\n" + indented({options.name: section(options, splits)})
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
    print("Now add it to the workloads whose model is a folder, in a list of data/workloads/dvc.yaml. Then:")
    print(f"  lesa doctor {options.name}\n  make repro WORKLOAD={options.name}")


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


def section(options: argparse.Namespace, splits: dict[str, list[str]]) -> dict[str, object]:
    """What a workload must say; all other settings have their defaults (lesa/params.py) or come from a preset."""
    pipeline_class = json.loads((options.pipeline / "model_index.json").read_text())["_class_name"]
    families = [row.name for row in FAMILIES.values() if pipeline_class in row.pipeline_classes]
    if not families:
        raise SystemExit(f"{pipeline_class}: not among the pipelines that a workload records (docs/families.md)")
    steps = options.num_inference_steps
    call = {
        "height": options.height,
        "width": options.width,
        "num_inference_steps": steps,
        "guidance_scale": options.guidance_scale,
        "max_sequence_length": options.max_sequence_length,
    }
    train, test = len(splits["train"]), min(64, len(splits["test"]))
    budgets = {f"{ratio}x": {"num_full": round(steps / ratio)} for ratio in ((3, 5) if steps >= 20 else (2,))}
    return {
        "prompts": options.name,
        "model": {"family": families[0], "source": str(options.pipeline.resolve())},
        "call": {key: value for key, value in call.items() if value is not None},
        "schedule": {"default_budget": list(budgets)[-1], "budgets": budgets},
        "record": {"train_prompts": train, "validation_prompts": len(splits["validation"])},
        "search": {"samples": min(8, train - 1)},
        "evaluate": {"prompts": test},
        "publish": {"gate_prompts": test},
    }


def indented(workload: dict[str, object]) -> str:
    """YAML as it stands under `workloads`, the last key of the file."""
    text = yaml.safe_dump(workload, sort_keys=False)
    return "".join(f"  {line}\n" for line in text.splitlines())


if __name__ == "__main__":
    main()
