"""A program for studies that runs in milliseconds, without torch. Its scores follow from its options and its seed."""

import argparse
import json
import os
import random
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=1)
parser.add_argument("--depth", type=int, nargs="+", default=[1])
parser.add_argument("--rate", type=float, default=0.1)
parser.add_argument("--mode", default="plain")
parser.add_argument("--fail", type=int, nargs="*", default=[], help="seeds that fail")
parser.add_argument("--seconds", type=float, default=0.0)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--records", help="file of records with ids")
parser.add_argument("--seed", type=int, required=True)
parser.add_argument("--out", type=Path, required=True)
args = parser.parse_args()

print(f"width {args.width}, seed {args.seed}")
(args.out / "checkpoint").touch()
time.sleep(args.seconds)
if args.seed in args.fail:
    raise RuntimeError(f"seed {args.seed} fails on purpose")
rng = random.Random(f"{args.width} {args.depth} {args.seed}")
ids = [f"record-{number}" for number in range(40)]
if args.records:
    ids = [json.loads(line)["id"] for line in Path(args.records).read_text().splitlines()]
predictions = [
    {
        "id": name,
        "task": "matching",
        "text": f"Picture {rng.randint(1, 4)}",
        "answer": "Picture 1",
        "scores": {"accuracy": float(rng.random() < 0.3 + 0.1 * args.width - abs(args.rate - 0.1))},
        "chance": {"accuracy": 0.25},
    }
    for name in ids
]
accuracy = sum(entry["scores"]["accuracy"] for entry in predictions) / len(ids)
(args.out / "answers.json").write_text(json.dumps({"seconds": 0.0, "predictions": predictions}))
content = {
    "metrics": {"test/matching/accuracy": accuracy, "loss_%": 1 - accuracy},
    "parameters": 1000 * args.width,
    "answers": {"test": ["answers.json"]},
    "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
}
if args.records:
    content["records"] = {"test": args.records}
(args.out / "metrics.json").write_text(json.dumps(content))
