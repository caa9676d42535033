"""The whole flow at FLUX.1-dev's true size, with random weights: record, both training steps, bundle, enable.

python -m benchmarks.true_size.flow                                  # one GPU of 80 GB, about 30 GB of disk
python -m benchmarks.true_size.flow --scale small --device cpu       # the same on a tiny model, in a minute

The stages' own code runs in a folder of its own: a Ray actor (with the GPU, where there is one) records four
trajectories into a Zarr store, `train_stage1` and `train_stage2` train on them, a bundle is written and enabled, and
the pipeline is called plain and accelerated. Weights are random and training is a few iterations: this shows that the
path holds at this size and what it takes in time, disk and memory; it says nothing of quality. The text encoders are
shallow (as wide as the transformer wants them). Results: benchmarks/results/true_size_flow.json.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.results_files import facts
from benchmarks.true_size.models import preset_at
from benchmarks.true_size.pipeline import write_flux_pipeline
from lesa.atomic import require_space, write_json
from lesa.doctor.estimate import estimate_costs
from lesa.models.pipelines import pick_device
from lesa.models.published import PIXELS_PER_TOKEN, Preset
from lesa.params import Workload
from lesa.params_file import load_params

OUT = Path("benchmarks/results/true_size_flow.json")
WORK = Path("data/benchmarks/true-size-flow")  # ignored by git
DISK = {"true": 32 << 30, "small": 64 << 20}  # bytes: pipeline, store, checkpoints
NAME = "true-size"
SAMPLE_EVERY = 0.2  # seconds between two looks at the GPU's memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything, print, and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.true_size.flow",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--scale", default="true", choices=("true", "small"))
    parser.add_argument("--token-fraction", type=float, default=0.125, help="of the tokens that are kept")
    parser.add_argument("--iterations", type=int, default=2, help="optimiser steps of either training step")
    parser.add_argument("--work", type=Path, default=WORK, help="scratch folder; it must not exist yet")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU, also where there are more
    try:
        device = pick_device(options.device)
        if options.scale == "true" and device.type != "cuda":
            raise ValueError("--scale true needs a GPU; --scale small runs the same code here")
        if options.work.exists():
            raise ValueError(f"--work: {options.work} exists; remove it or name another folder")
        require_space(options.work, DISK[options.scale])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    work, out = options.work.absolute(), options.out.absolute()
    work.mkdir(parents=True)
    try:
        record = {
            **facts("benchmarks.true_size.flow", arguments, device),
            "scale": options.scale,
            **flow(work, preset_at("flux-dev", options.scale), device, options),
        }
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record, sort_keys=False)
    print(json.dumps(record, indent=2))
    return 0


def flow(work: Path, preset: Preset, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Every part in its order, with `work` as the repository root."""
    import lesa
    from flows import record, train_stage1, train_stage2
    from flows.tracking.revisions import revisions
    from flows.tracking.run import tracked_run
    from lesa.models.pipelines import load_pipeline, sample
    from lesa.publishing.bounds import bounds_by_budget
    from lesa.publishing.build import make_bundle
    from lesa.recording.dataset import kept_splits
    from lesa.training.jobs import load_predictor

    phases = Phases(device)
    log = logging.getLogger("benchmarks.true_size.flow")
    with contextlib.chdir(work):
        workload = phases.run("write_pipeline", lambda: prepare(work, preset, device, options))
        recorded = phases.run("record", lambda: record.record_with_ray(workload, log))
        for stage, train in (("train_stage1", train_stage1.train), ("train_stage2", train_stage2.train)):
            with tracked_run(stage, experiment=NAME, params={}, tags={}, root=work) as tracker:
                phases.run(stage, lambda train=train, tracker=tracker: train.fn(workload, tracker))  # type: ignore[misc]
        pipe = phases.run("load_pipeline", lambda: load_pipeline(workload.model, workload.resources.device))
        splits = kept_splits(workload.recording)
        created = revisions(work)
        predictor = load_predictor(workload.paths.closed_loop)
        bounds = phases.run("error_bounds", lambda: bounds_by_budget(pipe, workload, predictor, *splits))
        bundle = phases.run(
            "make_bundle",
            lambda: make_bundle(
                workload.paths.bundle,
                workload,
                pipe,
                predictor,
                *splits,
                quality={},
                error_bounds=bounds,
                evaluation={},
                created_from=created,
            ),
        )
        prompt, seed = splits[1].prompts[0], 0
        draw = lambda: sample(pipe, [prompt], [seed], workload.call, output_type="latent")  # noqa: E731
        draw()
        plain = phases.run("sample_plain", draw)
        lesa.enable(pipe, bundle.path)
        accelerated = phases.run("sample_accelerated", draw)
        run = lesa.summary(pipe)
        lesa.disable(pipe)
        again = draw()
        store = workload.paths.trajectories
        return {
            "model": {"preset": preset.name, "size": preset.size, "folder_bytes": size_of(Path(workload.model.source))},
            "recorded": recorded,
            "recording": recording_rate(store),
            "store_bytes": size_of(store),
            "store_bytes_estimated": estimate_costs(workload).store,
            "token_fraction": workload.record.token_fraction,
            "bundle_bytes": size_of(bundle.path),
            "run": {"full": run.num_full, "steps": len(run.steps), "kept_bytes": run.peak_bytes},
            "finite": bool(torch.isfinite(plain).all() and torch.isfinite(accelerated).all()),
            "plain_again_is_the_same": bool(torch.equal(plain, again)),
            "phases": phases.done,
        }


def prepare(work: Path, preset: Preset, device: torch.device, options: argparse.Namespace) -> Workload:
    """A repository root with the pipeline's folder, prompts and one workload."""
    lengths = write_flux_pipeline(work / "data/base" / NAME, preset, device)
    lines = {
        "train": ["a thin seven", "a bold two", "a plain nine"],
        "validation": ["a bold four"],
        "test": ["a thin one"],
    }
    folder = work / "data/prompts" / NAME
    folder.mkdir(parents=True)
    for split, prompts in lines.items():
        (folder / f"{split}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    _, rows, columns = preset.grid
    channels = preset.config["num_attention_heads"] * preset.config["attention_head_dim"]
    loop = {"iterations": options.iterations, "batch_size": 1, "checkpoint_every": options.iterations}
    settings = {
        "resources": {
            "device": device.type,
            "record": {"actors": 1, "timeout_s": 1800},
            **{stage: {"workers": 1} for stage in ("search", "ground_truth", "closed_loop")},
        },
        "prompts": NAME,
        "model": {"family": "flux", "source": f"data/base/{NAME}", "dtype": "bfloat16"},
        "call": {
            "height": rows * PIXELS_PER_TOKEN,
            "width": columns * PIXELS_PER_TOKEN,
            "num_inference_steps": preset.num_inference_steps,
            "guidance_scale": 3.5,
            "max_sequence_length": max(lengths, preset.text_tokens),
        },
        "schedule": {"default_budget": "5x", "budgets": {"5x": {"interval": 7}}},
        "record": {
            "train_prompts": len(lines["train"]),
            "validation_prompts": len(lines["validation"]),
            "token_fraction": options.token_fraction,
        },
        "predictor": {
            "kind": "per_step",
            "history_sizes": [2, 2, 2],
            "projection": "low_rank",
            "rank": channels // 4,
        },
        "ground_truth": loop,
        "closed_loop": {**loop, "gradient_checkpointing": True},
    }
    document = {"default_workload": NAME, "workloads": {NAME: settings}}
    (work / "params.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return load_params(work / "params.yaml")


@dataclass
class Phases:
    """Seconds and peak memory of each part."""

    device: torch.device
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.perf_counter()
        with self._memory() as peak:
            result = work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.done[name] = {"seconds": time.perf_counter() - started, **peak}
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # the next part may run in another process
        return result

    @contextlib.contextmanager
    def _memory(self) -> Iterator[dict[str, int]]:
        """Peak of the whole GPU, other processes' share included; on a CPU, of this process so far."""
        peak: dict[str, int] = {}
        if self.device.type != "cuda":
            yield peak
            peak["process_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return
        over = threading.Event()
        peak["gpu_peak_bytes"] = 0

        def watch() -> None:
            while not over.wait(SAMPLE_EVERY):
                free, total = torch.cuda.mem_get_info(self.device)
                peak["gpu_peak_bytes"] = max(peak["gpu_peak_bytes"], total - free)

        torch.cuda.reset_peak_memory_stats(self.device)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield peak
        finally:
            over.set()
            watcher.join()
            peak["process_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)


def recording_rate(store: Path) -> dict[str, float]:
    """Seconds a trajectory between the first and the last commit: without start and loading, for one actor."""
    times = sorted(path.stat().st_mtime for path in store.glob("*/zarr.json"))
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    return {"trajectories": len(times), "seconds_each": seconds, "per_hour": 3600 / seconds}


def size_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    raise SystemExit(main())
