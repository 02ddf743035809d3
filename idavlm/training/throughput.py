"""Throughput of training: samples, tokens and images per second."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

NAMES = ("samples", "tokens", "images")


class Throughput:
    """Counts what all processes train on, and the time of the steps. Evaluation and saving do not count as time."""

    def __init__(self) -> None:
        self._counts: dict[str, int | Tensor] = dict.fromkeys(NAMES, 0)
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Begin to count time, unless it is counted already."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """End to count time, until the next :meth:`start`."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
        self._started = None

    def add(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Count the batches of a step. Padding is no token."""
        for batch in batches:
            ids = batch.get("input_ids")
            if ids is not None:
                self._counts["samples"] += _num_samples(batch)
                # A tensor: reading its value would make every step wait for the device.
                self._counts["tokens"] += _is_token(batch).sum()
            self._counts["images"] += _num_images(batch)

    def compute(self, accelerator) -> dict[str, float]:
        """Counts per second since the last call, over all processes; {} if no time was counted."""
        counts = torch.tensor([int(self._counts[name]) for name in NAMES], device=accelerator.device, dtype=torch.long)
        counts = accelerator.reduce(counts, reduction="sum").tolist()
        seconds = self._seconds
        self._counts, self._seconds = dict.fromkeys(NAMES, 0), 0.0
        if not seconds:
            return {}
        return {f"{name}_per_second": round(count / seconds, 3) for name, count in zip(NAMES, counts, strict=True)}


def _num_samples(batch: Mapping[str, Any]) -> int:
    if "sample_ids" in batch:
        return len(batch["sample_ids"])
    packed = batch.get("token_sample_index")
    return len(batch["input_ids"]) if packed is None else int(packed.max()) + 1


def _is_token(batch: Mapping[str, Any]) -> Tensor:
    if "token_sample_index" in batch:  # packed rows
        return batch["token_sample_index"] >= 0
    mask = batch.get("attention_mask")
    return mask if isinstance(mask, Tensor) else torch.ones_like(batch["input_ids"])


def _num_images(batch: Mapping[str, Any]) -> int:
    """Number of images of a batch; of models that split images, the number of tiles."""
    for name in ("image_roles", "image_grid_thw", "image_sizes"):
        if isinstance(batch.get(name), Tensor):
            return len(batch[name])
    pixels = batch.get("pixel_values")
    if not isinstance(pixels, Tensor):
        return 0
    return pixels.shape[0] * (pixels.shape[1] if pixels.dim() == 5 else 1)  # [B, tiles, 3, H, W] or [I, 3, H, W]
