"""Scores of matching and location from the identity map of a trained model, without its language model.

    python -m benchmarks.attention_matching runs/train_idformer/characters/seed-0/with-id-former \\
        runs/train_idformer/data/characters/test.jsonl

See idavlm.evaluation.score_identity_maps. Comparing the scores with those of the answers separates errors of the
ID-Former from errors of the language model.
"""

import argparse
from pathlib import Path

from idavlm import RecordDataset
from idavlm.evaluation import load_checkpoint, score_identity_maps, score_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of the model and its processor")
    parser.add_argument("records", type=Path, help="evaluation records; those of matching and location are used")
    args = parser.parse_args()
    model, processor = load_checkpoint(args.checkpoint)
    samples = list(RecordDataset(args.records))
    print(score_table({"identity map": [score_identity_maps(model, processor, samples)]}))


if __name__ == "__main__":
    main()
