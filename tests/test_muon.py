"""Muon for matrices and AdamW for all other parameters, in one optimizer."""

import copy

import pytest
import torch
from torch import nn

from idavlm.data import RecordDataset
from idavlm.experimental.muon import MuonAdamW, muon_adamw, orthogonal
from idavlm.training import IDTrainer, IDTrainingArguments
from tests.interrupted_run import write_data
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
def test_directions_are_kept_and_get_the_same_length(shape):
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
def test_updates_match_torch_muon():
    ours, theirs = (nn.Parameter(torch.ones(6, 10)) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1}
    run(MuonAdamW([{"params": [ours], "muon": True}], **options), [ours], 5)
    run(torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options), [theirs], 5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)  # theirs computes in bfloat16
    assert (ours - 1).abs().max() > 0.02


def test_other_groups_are_updated_by_adamw():
    ours, theirs = ([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))] for _ in range(2))
    run(MuonAdamW([{"params": ours}], lr=0.1), ours, 3)
    run(torch.optim.AdamW(theirs, lr=0.1), theirs, 3)
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)


def test_a_loaded_state_continues_bit_equal():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))]
    build = lambda ps: MuonAdamW([{"params": ps[:1]}, {"params": ps[1:], "muon": True}], lr=0.1)  # noqa: E731
    optimizer = build(parameters)
    run(optimizer, parameters, 2)
    copies = copy.deepcopy(parameters)
    resumed = build(copies)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, parameters, 2, seed=1)
    run(resumed, copies, 2, seed=1)
    for left, right in zip(parameters, copies, strict=True):
        assert torch.equal(left, right)


def test_a_closure_is_evaluated_once_and_its_loss_returned():
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


def test_a_gradient_scaler_skips_updates_with_infinite_gradients():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))]
    optimizer = MuonAdamW([{"params": parameters[:1]}, {"params": parameters[1:], "muon": True}], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(parameters[0].sum() + torch.inf * parameters[1].sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(parameter, torch.ones_like(parameter)) for parameter in parameters)
    assert scaler.get_scale() == 4.0


# --- Building the optimizer of a model -------------------------------------------------------------------------------


def test_linear_layers_of_the_modules_are_trained_with_muon():
    model = small_model(small_processor())
    groups = muon_adamw(model, weight_decay=0.1, module_learning_rates={"vision_tower": 1e-4}).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon = [names[id(parameter)] for group in groups if group["muon"] for parameter in group["params"]]
    assert any(name.endswith("q_proj.weight") for name in muon)
    assert all(name.startswith("language_model.") and name.endswith("_proj.weight") for name in muon)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == (1e-4 if name.startswith("vision_tower.") else 6e-3)
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):
                assert group["weight_decay"] == 0.0
            elif name in muon:
                assert group["weight_decay"] == 0.1
            assert group["betas"] == (0.9, 0.98)


def test_several_modules_are_trained_with_muon():
    model = small_model(small_processor())
    groups = muon_adamw(model, modules=["language_model", "id_former"], betas=(0.8, 0.9)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon = {names[id(parameter)].split(".")[0] for group in groups if group["muon"] for parameter in group["params"]}
    assert muon == {"language_model", "id_former"}
    assert groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": ["tower"]}, "modules='tower' is not known"),
        ({"modules": ["connector"]}, "modules names 'connector', which IDAVLM.* does not have; it has 'vision_tower'"),
        ({"modules": ["vision_tower"]}, "modules names 'vision_tower', which has no linear layer for Muon"),
        ({"module_learning_rates": {"tower": 1.0}}, "module_learning_rates='tower' is not known"),
        ({"module_learning_rates": {"connector": 1.0}}, "module_learning_rates names 'connector'"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        muon_adamw(small_model(small_processor()), **options)


def test_the_trainer_schedules_a_passed_optimizer_and_freezes_modules(tmp_path):
    write_data(tmp_path)
    processor = small_processor()
    model = small_model(processor)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = muon_adamw(model, learning_rate=1e-2, weight_decay=0.1, module_learning_rates={"id_former": 1e-3})
    options = {"max_steps": 4, "warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup", "logging_steps": 1}
    trainer = IDTrainer(
        model,
        IDTrainingArguments(str(tmp_path / "run"), freeze=["vision_tower"], use_cpu=True, report_to=[], **options),
        train_dataset=RecordDataset(tmp_path / "train.jsonl", encode=processor.encode),
        processing_class=processor,
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2, 1e-3}
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([rates[-1] * share for share in (0.0, 0.5, 1.0, 1.0)])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("vision_tower."), name
