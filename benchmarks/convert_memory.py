"""Peak memory of a conversion, measured on a random checkpoint with the tensor names and shapes of IDA-VLM.

    python -m benchmarks.convert_memory                                 # 7 language layers; needs 13 GB in /tmp
    python -m benchmarks.convert_memory --layers 32 --vision-layers 48  # the full size; needs 41 GB

The checkpoint is written in shards, converted in a separate process, checked, and removed.
"""

import argparse
import base64
import itertools
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from idavlm.utils import markdown_table

SIZES = {"hidden": 4096, "inner": 11008, "vocab": 151936, "width": 1664, "mlp": 8192, "heads": 16, "queries": 256}
RANKS = 151643
CHILD = """
import re, sys, threading, time
from idavlm.conversion import convert
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
convert(sys.argv[1], sys.argv[2])
print(peak)
"""


def shapes(layers: int, vision_layers: int, sizes: dict[str, int]) -> dict[str, list[int]]:
    """Names and shapes of the tensors of an IDA-VLM with this number of layers."""
    c, inner, width, mlp = (sizes[name] for name in ("hidden", "inner", "width", "mlp"))
    tensors: dict[str, list[int]] = {"transformer.wte.weight": [sizes["vocab"], c]}
    for number in range(layers):
        layer = f"transformer.h.{number}."
        tensors |= {layer + "ln_1.weight": [c], layer + "ln_2.weight": [c]}
        tensors |= {layer + "attn.c_attn.weight": [3 * c, c], layer + "attn.c_attn.bias": [3 * c]}
        tensors |= {layer + "attn.c_proj.weight": [c, c], layer + "mlp.c_proj.weight": [c, inner]}
        tensors |= {layer + "mlp.w1.weight": [inner, c], layer + "mlp.w2.weight": [inner, c]}
    tensors |= {"transformer.ln_f.weight": [c], "lm_head.weight": [sizes["vocab"], c]}
    visual = "transformer.visual."
    tensors |= {visual + "positional_embedding": [256, width], visual + "conv1.weight": [width, 3, 14, 14]}
    tensors |= {visual + "proj": [c, c]}
    for name, size in (("ln_pre", width), ("ln_post", c), ("attn_pool.ln_q", c), ("attn_pool.ln_kv", c)):
        tensors |= {f"{visual}{name}.weight": [size], f"{visual}{name}.bias": [size]}
    for number in range(vision_layers):
        block = f"{visual}transformer.resblocks.{number}."
        for name, rows, columns in (
            ("attn.in_proj", 3 * width, width),
            ("attn.out_proj", width, width),
            ("mlp.c_fc", mlp, width),
            ("mlp.c_proj", width, mlp),
        ):
            tensors |= {f"{block}{name}.weight": [rows, columns], f"{block}{name}.bias": [rows]}
        tensors |= {f"{block}ln_{n}.{kind}": [width] for n in (1, 2) for kind in ("weight", "bias")}
    pool = visual + "attn_pool."
    tensors |= {pool + "pos_embed": [sizes["queries"], c], pool + "query": [sizes["queries"], c]}
    tensors |= {pool + "kv_proj.weight": [c, width]}
    for name in ("attn", "attn1"):
        tensors |= {f"{pool}{name}.in_proj_weight": [3 * c, c], f"{pool}{name}.in_proj_bias": [3 * c]}
        tensors |= {f"{pool}{name}.out_proj.weight": [c, c], f"{pool}{name}.out_proj.bias": [c]}
    return tensors


def make_checkpoint(folder: Path, args: argparse.Namespace, sizes: dict[str, int]) -> list[int]:
    """Write the checkpoint and return the size of each shard in bytes."""
    all_shapes = shapes(args.layers, args.vision_layers, sizes)
    shards: list[dict[str, list[int]]] = [{}]
    for name, shape in all_shapes.items():
        size = sum(math.prod(other) for other in shards[-1].values())
        if size and 2 * (size + math.prod(shape)) > args.shard_gb * 1.05e9:
            shards.append({})
        shards[-1][name] = shape
    noise = torch.randn(2**20).bfloat16()
    weight_map, sizes_written = {}, []
    for number, shard in enumerate(shards, 1):
        stem, suffix = ("pytorch_model", "bin") if args.format == "bin" else ("model", "safetensors")
        path = folder / f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        tensors = {}
        for name, shape in shard.items():
            count = math.prod(shape)
            tensors[name] = noise.repeat(-(-count // len(noise)))[:count].view(shape)
        torch.save(tensors, path) if suffix == "bin" else save_file(tensors, path)
        weight_map |= dict.fromkeys(shard, path.name)
        sizes_written.append(path.stat().st_size)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    visual = {"image_size": 448, "patch_size": 14, "width": sizes["width"], "layers": args.vision_layers}
    visual |= {"heads": sizes["heads"], "mlp_ratio": sizes["mlp"] / sizes["width"] + 1e-5}
    visual |= {"output_dim": sizes["hidden"], "n_queries": sizes["queries"], "image_start_id": RANKS + 214}
    config = {"model_type": "qwen", "visual": visual, "vocab_size": sizes["vocab"], "hidden_size": sizes["hidden"]}
    config |= {"intermediate_size": 2 * sizes["inner"], "num_hidden_layers": args.layers, "layer_norm_epsilon": 1e-6}
    config |= {"num_attention_heads": sizes["hidden"] // 128, "kv_channels": 128, "no_bias": True}
    (folder / "config.json").write_text(json.dumps(config))
    byte_strings = (bytes(token) for length in (1, 2, 3) for token in itertools.product(range(256), repeat=length))
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(byte_strings))
    (folder / "qwen.tiktoken").write_text("".join(itertools.islice(lines, RANKS)))
    return sizes_written


def check(source: Path, out: Path, layers: int) -> None:
    """Check that the fused projection of the last layer was split into q, k and v, bit for bit."""
    index = json.loads(next(source.glob("*.index.json")).read_text())["weight_map"]
    name = f"transformer.h.{layers - 1}.attn.c_attn.weight"
    path = source / index[name]
    fused = torch.load(path, mmap=True, weights_only=True)[name] if path.suffix == ".bin" else _read(path, name)
    places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for letter, expected in zip("qkv", fused.chunk(3), strict=True):
        target = f"language_model.model.layers.{layers - 1}.self_attn.{letter}_proj.weight"
        assert torch.equal(_read(out / places[target], target), expected), target


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as opened:
        return opened.get_tensor(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the checkpoints")
    parser.add_argument("--layers", type=int, default=7, help="of the language model")
    parser.add_argument("--vision-layers", type=int, default=8, help="of the vision tower")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="size of a shard in GB")
    parser.add_argument("--format", choices=("bin", "safetensors"), default="bin", help="of the checkpoint")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="convert_memory_"))
    try:
        (folder / "source").mkdir()
        written = make_checkpoint(folder / "source", args, SIZES)
        largest_tensor = 2 * max(math.prod(shape) for shape in shapes(args.layers, args.vision_layers, SIZES).values())
        start = time.perf_counter()
        command = [sys.executable, "-c", CHILD, str(folder / "source"), str(folder / "out")]
        anonymous = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]) * 1024
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        check(folder / "source", folder / "out", args.layers)
        bound = 1.3 * max(written) + largest_tensor
        rows = [
            ["largest shard", f"{max(written) / 1e9:.2f}"],
            ["largest tensor", f"{largest_tensor / 1e9:.2f}"],
            ["peak resident memory, with mapped files", f"{peak / 1e9:.2f}"],
            ["peak resident memory, without mapped files", f"{anonymous / 1e9:.2f}"],
            ["limit: 1.3 x largest shard + largest tensor", f"{bound / 1e9:.2f}"],
        ]
        print(f"{len(written)} shards converted in {seconds:.0f} s\n\n{markdown_table(['', 'GB'], rows)}\n")
        print(f"The peak is {'within' if peak <= bound else 'ABOVE'} the limit.")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
