"""Collator: encoded samples to a batch."""

import pytest
import torch

from idavlm.data import Collator


def encoded(tokens, images, box_image=(), *, size=4, **more):
    return {
        "input_ids": torch.arange(1, tokens + 1),
        "labels": torch.arange(11, tokens + 11),
        "token_identity_index": torch.arange(tokens),
        "name_mask": torch.arange(tokens) == 1,
        "pixel_values": torch.full((images, 3, size, size), float(tokens)),
        "image_roles": torch.arange(images) % 2,
        "identity_index": torch.zeros(images, dtype=torch.long),
        "image_sizes": torch.full((images, 2), 30),
        "boxes": torch.ones(len(box_image), 4),
        "box_image": torch.as_tensor(box_image, dtype=torch.long),
        "box_identity": torch.zeros(len(box_image), dtype=torch.long),
        **more,
    }


def test_a_batch_of_unequal_samples():
    batch = Collator(0)([encoded(2, 2, [1]), encoded(3, 0, size=0), encoded(1, 1, [0, 0])])
    assert batch["input_ids"].tolist() == [[1, 2, 0], [1, 2, 3], [1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[11, 12, -100], [11, 12, 13], [11, -100, -100]]
    assert batch["token_identity_index"].tolist() == [[0, 1, -1], [0, 1, 2], [0, -1, -1]]
    assert batch["name_mask"].tolist() == [[False, True, False], [False, True, False], [False] * 3]
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    assert batch["sample_index"].tolist() == [0, 0, 2]
    assert batch["box_image"].tolist() == [1, 2, 2]
    assert batch["image_sizes"].shape == (3, 2)
    assert "source" not in batch


def test_left_padding_and_sources():
    samples = [encoded(1, 0, source="identity"), encoded(2, 0, source="general")]
    batch = Collator(9, padding_side="left")(samples)
    assert batch["input_ids"].tolist() == [[9, 1], [1, 2]]
    assert batch["labels"].tolist() == [[-100, 11], [11, 12]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert batch["pixel_values"].shape == (0, 3, 4, 4)
    assert batch["source"] == ["identity", "general"]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "samples is empty"),
        ([encoded(1, 1), encoded(1, 1, size=8)], r"samples\[0\] are 4 x 4, images of samples\[1\] are 8 x 8 pixels"),
        ([{"input_ids": torch.tensor([1])}], r"samples\[0\] lacks box_identity"),
        ([encoded(1, 1, depth=1)], r"samples\[0\] has unknown fields depth"),
        ([encoded(1, 1, labels=torch.tensor([1, 2]))], r"\['labels'\] has shape \[2\]; expected 1 as in input_ids"),
        ([encoded(1, 1, labels=[1])], r"\['labels'\] is list; expected torch.int64 \[T\]"),
        ([encoded(1, 1, boxes=torch.ones(1, 3))], r"\['boxes'\] has shape \[1, 3\]; expected 4 as in \['N', 4\]"),
        ([encoded(1, 1, boxes=torch.ones(1, 4))], r"\['box_image'\] has shape \[0\]; expected 1 as in boxes"),
        ([encoded(1, 1, pixel_values=torch.zeros(1, 3, 4, 4).half())], r"is torch.float16 .*expected torch.float32"),
        ([encoded(1, 1, pixel_values=torch.zeros(1, 1, 4, 4))], r"expected 3 as in \['I', 3, 'H', 'W'\]"),
        (
            [encoded(1, 1, image_roles=torch.tensor([0, 1]))],
            r"\['image_roles'\] has shape \[2\]; expected 1 as",
        ),
        ([encoded(0, 1)], r"samples\[0\] has no tokens"),
        (
            [encoded(1, 1, box_image=torch.tensor([1]), boxes=torch.ones(1, 4), box_identity=torch.tensor([0]))],
            "out of range; the sample has 1 images",
        ),
        ([encoded(1, 0, source="general"), encoded(1, 0)], "1 of 2 samples have 'source'"),
    ],
)
def test_wrong_samples_are_named(samples, message):
    with pytest.raises(ValueError, match=message):
        Collator(0)(samples)


def test_collator_options_are_checked():
    with pytest.raises(ValueError, match="pad_token_id=None must be an integer"):
        Collator(None)
    with pytest.raises(ValueError, match="padding_side='both' is not known"):
        Collator(0, "both")
