"""Shared helpers of the tests."""

import pytest
import torch

from idavlm import IDFormer


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter a value, so that no path is closed by a zero initialisation."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.fixture
def small_id_former():
    """An IDFormer small enough for float64 and gradcheck; every option may be given."""

    def build(*, dtype: torch.dtype = torch.float64, random: bool = True, **options) -> IDFormer:
        module = IDFormer(hidden_size=16, num_queries=4, num_heads=2, vision_hidden_size=12, **options)
        return (randomise(module) if random else module).to(dtype)

    return build
