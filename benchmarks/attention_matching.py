"""Matching read straight from the identity attention of a trained model, without its language model.

    python -m benchmarks.attention_matching runs/train_idformer/characters/seed-0/with-ID-Former \\
        runs/train_idformer/data/characters/test.jsonl

The answer is the picture whose patches (the eight that do most, or all) pay most attention to the reference photos. It
tells what the ID-Former finds from what the language model makes of it.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoProcessor

from idavlm.data import RecordDataset
from idavlm.models import IDAVLMForConditionalGeneration
from idavlm.utils import ImageRole


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of model and processor")
    parser.add_argument("records", type=Path, help="evaluation records")
    args = parser.parse_args()
    model = IDAVLMForConditionalGeneration.from_pretrained(args.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(args.checkpoint, backend="pil")
    samples = [sample for sample in RecordDataset(args.records) if sample.task == "matching"]
    right = {"eight strongest patches": 0, "all patches": 0}
    names = ("pixel_values", "image_roles", "sample_index", "identity_index")
    for sample in samples:
        batch = processor.collate([processor.encode(sample, add_generation_prompt=True)])
        images = {name: batch[name] for name in names}
        _, maps, _ = model.encode_images(**images, output_identity_maps=True)
        shares = maps[-1][batch["image_roles"] == ImageRole.SCENE][..., 0]
        strongest = shares.topk(min(8, shares.shape[1])).values
        for way, picture in zip(right, (strongest.mean(1).argmax(), shares.mean(1).argmax()), strict=True):
            right[way] += sample.answer == f"Picture {int(picture) + 1}"
    for way, count in right.items():
        print(f"{way}: {count / len(samples):.3f} of {len(samples)}")


if __name__ == "__main__":
    main()
