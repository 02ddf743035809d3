"""Throughput of training: what is counted."""

import torch
from accelerate import Accelerator

from idavlm.training.throughput import Throughput


def counts(*batches) -> dict[str, int]:
    throughput = Throughput()
    throughput.add(batches)
    return {name: int(value) for name, value in throughput._counts.items()}


def test_padding_is_not_counted():
    ids = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "image_roles": torch.tensor([0, 1, 2])}
    assert counts(batch) == {"samples": 2, "tokens": 5, "images": 3}
    assert counts({"input_ids": ids}) == {"samples": 2, "tokens": 8, "images": 0}


def test_packed_rows_hold_several_samples():
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long)}
    batch["token_sample_index"] = torch.tensor([[0, 0, 1, 1], [2, 2, 2, -1]])
    assert counts(batch) == {"samples": 3, "tokens": 7, "images": 0}
    assert counts(batch | {"sample_ids": ["a", "b", "c"]}) == {"samples": 3, "tokens": 7, "images": 0}


def test_tiles_of_images_are_counted():
    tiles = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "pixel_values": torch.zeros(2, 5, 3, 4, 4)}
    assert counts(tiles)["images"] == 10


def test_time_between_stop_and_start_does_not_count():
    throughput, accelerator = Throughput(), Accelerator(cpu=True)
    assert throughput.compute(accelerator) == {}
    throughput.start()
    throughput.add([{"input_ids": torch.zeros(2, 4, dtype=torch.long)}])
    throughput.stop()
    seconds = throughput._seconds
    throughput.stop()
    assert throughput._seconds == seconds
    rates = throughput.compute(accelerator)
    assert rates["samples_per_second"] == round(2 / seconds, 3)
    assert throughput.compute(accelerator) == {}
