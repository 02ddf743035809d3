"""The formulas of memory and communication: they agree with measured steps of small models."""

import argparse

import pytest
import torch

from benchmarks.training_memory import measure
from idavlm.training.memory import Layers, Strategy, state_memory, step_communication


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 0.05),
        ({"num_key_value_heads": 1}, 0.05),
        ({"is_vit": True}, 0.08),
        ({"bf16": True}, 0.2),
        ({"checkpointing": True}, 0.25),
    ],
    ids=str,
)
def test_a_measured_step(options, tolerance):
    sizes = {"hidden_size": 128, "layers": 3, "batch_size": 2, "length": 256}
    found = measure(argparse.Namespace(device=torch.device("cpu"), **sizes), **options)
    _, _, kept, _, _, peak = map(float, found)
    assert peak == pytest.approx(1, abs=tolerance)
    if "checkpointing" not in options:  # what is kept outside the layers is no longer small
        assert kept == pytest.approx(1, abs=tolerance)


def test_what_the_stages_of_zero_divide():
    """1000 trained parameters on 4 ranks, as the paper on ZeRO counts: 2 + 2 + 12 bytes each."""
    expected = {0: (2000, 2000, 12000), 1: (2000, 2000, 3000), 2: (2000, 500, 3000), 3: (500, 500, 3000)}
    for stage, (weights, gradients, optimizer) in expected.items():
        strategy = Strategy(num_ranks=4, stage=stage, weight_bytes=2, compute_bytes=2, has_master_weights=True)
        found = state_memory(1000, 0, 100, strategy)
        assert (found["weights"], found["gradients"], found["optimizer state"]) == (weights, gradients, optimizer)
        assert found["gathered layers"] == (400 if stage == 3 else 0)


def test_communication_grows_with_accumulation_where_it_must():
    sent = {
        (stage, steps): step_communication(
            1000, 500, steps, Strategy(num_ranks=4, stage=stage, weight_bytes=2, compute_bytes=2)
        )
        for stage in (0, 1, 2, 3)
        for steps in (1, 4)
    }
    assert sent[0, 1] == sent[0, 4] == sent[1, 4] == sent[2, 1] == 3000
    assert sent[2, 4] == 0.75 * 2000 * 5
    assert sent[3, 1] == 0.75 * (2 * 3000 + 2000)
    assert sent[3, 4] == 4 * sent[3, 1]


def test_layers_of_an_unknown_configuration():
    from transformers import ResNetConfig, ViTConfig

    from idavlm.training.memory import layers_of

    assert layers_of(ViTConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16)) == Layers(
        12, 8, 16, 8, False
    )
    with pytest.raises(ValueError, match="ResNetConfig names no layers"):
        layers_of(ResNetConfig())
