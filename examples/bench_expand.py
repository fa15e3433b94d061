"""How long `expand` takes beside `cp` of what it writes: paired runs, so that a noisy machine disturbs both alike.

    python examples/bench_expand.py [SRC] [--rounds 3] [--layers 12]

Without SRC a checkpoint of Gemma-2B-like layers with random bfloat16 weights is made (about 220 MB a layer, and half a
gigabyte of embeddings). Prints seconds for each, and the median ratio. Nothing is verified in the timed runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ckptgrow.tensors import TensorInfo, arrange

HIDDEN, WIDTH, VOCABULARY = 2048, 16384, 128_000


def make(folder: Path, layers: int) -> Path:
    """A llama-shaped checkpoint, one shard for every four layers, weights drawn once and repeated."""
    folder.mkdir()
    config = {"model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": WIDTH}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        block = f"model.layers.{layer}.mlp."
        shapes |= {f"{block}{role}_proj.weight": (WIDTH, HIDDEN) for role in ("gate", "up")}
        shapes[f"{block}down_proj.weight"] = (HIDDEN, WIDTH)
    noise = np.random.default_rng(0).standard_normal(HIDDEN * WIDTH, np.float32).view(np.uint32) >> 16
    names, weight_map = list(shapes), {}
    for i in range(0, len(names), 12):
        file = f"model-{i // 12 + 1:05}.safetensors"
        header = arrange((TensorInfo(name, "BF16", shapes[name]) for name in names[i : i + 12]), {"format": "pt"})
        with (folder / file).open("wb") as target:
            target.write(header.to_bytes())
            for info in header.tensors:
                target.write(np.resize(noise.astype(np.uint16), info.elements).tobytes())
        weight_map |= dict.fromkeys(names[i : i + 12], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def timed(command: list[str]) -> float:
    """Seconds until the command is done and its bytes are on the disk."""
    started = time.perf_counter()
    subprocess.run(command, check=True)
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Make the checkpoint if need be, then time both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary)
        source = options.src or make(folder / "base", options.layers)
        grow = [sys.executable, "-m", "ckptgrow", "expand", str(source), str(folder / "out"), "-q", "--no-verify"]
        copy = ["cp", "-r", "--reflink=never", str(folder / "kept"), str(folder / "copy")]
        subprocess.run([*grow[:-3], str(folder / "kept"), "-q", "--no-verify"], check=True)
        sizes = [sum(f.stat().st_size for f in path.iterdir()) / 1e9 for path in (source, folder / "kept")]
        print(f"{sizes[0]:.2f} GB in, {sizes[1]:.2f} GB out, {options.rounds} rounds")
        ratios = []
        for _ in range(options.rounds):
            seconds = timed(grow), timed(copy)
            ratios.append(seconds[0] / seconds[1])
            print(f"expand {seconds[0]:6.2f} s   cp of the output {seconds[1]:6.2f} s   ratio {ratios[-1]:.2f}")
            shutil.rmtree(folder / "out")
            shutil.rmtree(folder / "copy")
        print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
