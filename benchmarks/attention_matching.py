"""Accuracy of matching read from the identity map of a trained model, without its language model.

    python -m benchmarks.attention_matching runs/train_idformer/characters/seed-0/with-ID-Former \\
        runs/train_idformer/data/characters/test.jsonl

The prediction is the image whose patches attend most to the references: by the mean of the eight highest shares of
attention, or by the mean over all patches. Comparing it with the model's answers separates errors of the ID-Former from
errors of the language model.
"""

import argparse
import re
from pathlib import Path

import torch
from transformers import AutoProcessor

from idavlm import IDAVLMForConditionalGeneration, RecordDataset
from idavlm.utils import ImageRole, markdown_table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of the model and its processor")
    parser.add_argument("records", type=Path, help="evaluation records; those of the task matching are used")
    args = parser.parse_args()
    model = IDAVLMForConditionalGeneration.from_pretrained(args.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(args.checkpoint, backend="pil")
    samples = [sample for sample in RecordDataset(args.records) if sample.task == "matching"]
    correct = {"eight strongest patches": 0, "all patches": 0}
    for sample in samples:
        batch = processor.collate([processor.encode(sample, add_generation_prompt=True)])
        output = model(**batch, output_identity_maps=True)
        is_scene = batch["image_roles"] == ImageRole.SCENE
        shares = output.identity_maps[-1][is_scene][..., 0]  # [scenes, P]: attention to the only identity
        strongest = shares.topk(min(8, shares.shape[1])).values
        answer = int(re.search(r"\d+", sample.answer)[0])  # the answer names an image by its number, from 1
        for method, scores in zip(correct, (strongest.mean(1), shares.mean(1)), strict=True):
            correct[method] += int(scores.argmax()) + 1 == answer
    rows = [[method, f"{count / len(samples):.3f}", len(samples)] for method, count in correct.items()]
    print(markdown_table(["identity map", "accuracy", "records"], rows))


if __name__ == "__main__":
    main()
