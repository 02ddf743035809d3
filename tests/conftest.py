"""Shared helpers of the tests."""

import os

import pytest
import torch

# Without a GPU kernels are interpreted; Triton asks when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from idavlm import IDFormer
from idavlm.ops.cross_attention import sdpa
from tests.small_models import IMAGES, draw_images, small_processor

# Tensors of tests are small: threads would mostly wait for one another, for minutes where other work shares the cores.
torch.set_num_threads(1)


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


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder with the images that the records of ``tests.small_models`` refer to."""
    return draw_images(tmp_path_factory.mktemp("images"), IMAGES)


@pytest.fixture(scope="module")
def processor():
    return small_processor()


def use_padded_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``"sdpa"`` use the path of accelerators on the CPU: one padded call with a mask."""
    monkeypatch.setattr(sdpa, "_bucketed", sdpa._padded)
