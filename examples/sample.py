"""Draw images with a diffusers pipeline that a bundle accelerates, and show what each step did.

python examples/sample.py data/base/flux-digits data/bundles/flux-digits --prompt "a thin seven" --out images
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import lesa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="pipeline folder or hub id of an image model")
    parser.add_argument("bundle", help="folder of a bundle, or models:/name@alias")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--budget", help="a schedule of the bundle, such as 5x (default: the bundle's)")
    parser.add_argument("--min-psnr", type=float, help="instead: the fastest that measured so many dB")
    parser.add_argument("--allow", nargs="*", default=[], help="lora, quantized, pipeline")
    parser.add_argument("--adaptive", action="store_true", help="slow down where the errors ask for it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for plain.png and lesa.png")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(options.pipeline, dtype=dtype).to(device)
    choice = {"budget": options.budget, "min_psnr": options.min_psnr}
    lesa.enable(pipe, options.bundle, allow=options.allow, adaptive=options.adaptive, **choice)
    call = lesa.call_kwargs(pipe)  # the size, steps and guidance that the bundle was made for

    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("lesa", "plain"):
        if name == "plain":
            print(lesa.summary(pipe))
            lesa.disable(pipe)  # as it was, bit for bit
        begin = time.perf_counter()
        noise = torch.Generator().manual_seed(options.seed)
        image = pipe(options.prompt, generator=noise, **call).images[0]
        image.save(options.out / f"{name}.png")
        print(f"{name}: {time.perf_counter() - begin:.2f} s")


if __name__ == "__main__":
    main()
