"""Muon for matrices, AdamW for the rest, as one optimiser."""

import copy

import pytest
import torch
from torch import nn

from idavlm.experimental.muon import orthogonal
from idavlm.training import IDTrainer, IDTrainingArguments, MuonAdamW
from tests.small_models import small_model, small_processor


def gradients(parameters, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield [torch.randn(p.shape, generator=generator) for p in parameters]


def run(optimizer, parameters, steps, seed=0):
    for step in gradients(parameters, steps, seed):
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7)])
def test_directions_are_kept_and_come_to_one_length(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonal(matrix) @ right.T
    assert inner.diagonal().min() > 0.6
    assert inner.diagonal().max() < 1.3
    torch.testing.assert_close(inner - inner.diagonal().diag(), torch.zeros_like(inner), rtol=0, atol=2e-5)


def test_a_zero_gradient_changes_nothing():
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_matrices_go_where_torch_muon_takes_them():
    ours, theirs = (nn.Parameter(torch.ones(6, 10)) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1}
    run(MuonAdamW([{"params": [ours], "muon": True}], **options), [ours], 5)
    run(torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options), [theirs], 5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)  # theirs computes in bfloat16
    assert (ours - 1).abs().max() > 0.02


def test_all_else_is_adamw():
    ours, theirs = ([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))] for _ in range(2))
    run(MuonAdamW([{"params": ours}], lr=0.1), ours, 3)
    run(torch.optim.AdamW(theirs, lr=0.1), theirs, 3)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_a_state_that_is_loaded_goes_on_bit_for_bit():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))]
    build = lambda ps: MuonAdamW([{"params": ps[:1]}, {"params": ps[1:], "muon": True}], lr=0.1)  # noqa: E731
    optimizer = build(parameters)
    run(optimizer, parameters, 2)
    copies = copy.deepcopy(parameters)
    resumed = build(copies)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, parameters, 2, seed=1)
    run(resumed, copies, 2, seed=1)
    for one, other in zip(parameters, copies, strict=True):
        assert torch.equal(one, other)


def test_a_closure_is_evaluated_once_and_its_loss_given():
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = MuonAdamW([{"params": [parameter], "muon": True}], lr=0.1)
    calls = []

    def closure():
        calls.append(1)
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert len(calls) == 1
    assert not torch.equal(parameter, torch.ones(2, 2))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        MuonAdamW([{"params": [nn.Parameter(torch.ones(3))], "muon": True}], lr=0.1)


def test_the_trainer_gives_linear_layers_of_the_modules_to_muon(tmp_path):
    processor = small_processor()
    model = small_model(processor)
    options = {"muon_modules": ["language_model"], "module_learning_rates": {"vision_tower": 1e-4}, "report_to": []}
    trainer = IDTrainer(model, IDTrainingArguments(str(tmp_path), **options), data_collator=processor.collate)
    groups = trainer.create_optimizer().param_groups
    muon = {id(p) for group in groups if group["muon"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in muon}
    assert any(name.endswith("q_proj.weight") for name in names)
    assert all(name.startswith("language_model.") and name.endswith("_proj.weight") for name in names)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"muon_modules": ["tower"]}, "muon_modules='tower'"), ({"muon_modules": ["id_former"], "optim": "sgd"}, "sgd")],
)
def test_arguments_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        IDTrainingArguments(str(tmp_path), report_to=[], **options)
