"""TRL's trainers train attached models and IDAVLMForConditionalGeneration on conversations with identities."""

import copy
import functools
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from idavlm import IDTrainer, IDTrainingArguments, attach_id_former
from idavlm.data.messages import conversation_to_sample, read_conversation
from idavlm.models.identity_processor import IdentityProcessor
from tests.small_models import small_model, small_processor
from tests.vlm_families import tiny_model, tiny_processor

trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

FAMILIES = ("llava", "qwen2_5_vl")
OWN = "own"
OPTIONS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "seed": 3,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def photo(number, size=(40, 40)):
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8))


def references(*names):
    return [{"type": "image", "identity": name} for name in names]


def rows():
    """Conversations as SFTTrainer takes them: the images fill the image parts in order."""
    scene, text = {"type": "image"}, "Where is Kate?"
    found = []
    for number, names in enumerate(
        [("Kate", "Tom"), ("Kate", "Kate", "Tom"), ("Tom",), (), ("Kate",), ("Tom", "Kate")]
    ):
        user = [*references(*names), scene, {"type": "text", "text": text if "Kate" in names else "What is here?"}]
        answer = f"{names[0]} is reading." if names else "Picture 1."
        images = [photo(10 * number + place) for place in range(len(names))] + [photo(number, (48, 64))]
        found.append(
            {
                "messages": [
                    {"role": "user", "content": user},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ],
                "images": images,
            }
        )
    return found


MARKED_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'][0]['text'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{% for part in message['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Marks the answers, which ``assistant_only_loss`` of TRL needs."""


def build(family, **options):
    """A model and its processor; ``gate="none"`` makes the references count from the first step."""
    if family == OWN:
        processor = small_processor(**options)
        return small_model(processor, identity_embedding="name"), processor
    processor = IdentityProcessor(tiny_processor(family), **options)
    if family == "qwen2_5_vl":
        processor.chat_template = MARKED_CHATML
    torch.manual_seed(0)
    model = attach_id_former(tiny_model(family), num_heads=4, hidden_size=32, gate="none", identity_embedding="name")
    torch.manual_seed(1)
    for name, parameter in model.id_former.named_parameters():
        if name.endswith("out_proj.weight"):  # zero at first
            torch.nn.init.normal_(parameter, std=0.2)
    return model, processor


def dataset(found):
    return datasets.Dataset.from_list(found).cast_column("images", datasets.List(datasets.Image()))


def losses_of(trainer):
    """The loss of each step."""
    losses, compute = [], trainer.compute_loss

    @functools.wraps(compute)
    def recorded(*args, **kwargs):
        loss = compute(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = recorded
    trainer.train()
    return torch.tensor(losses)


def losses_of_sft(model, processor, found, folder, **options):
    args = trl.SFTConfig(output_dir=str(folder), train_sampling_strategy="sequential", **OPTIONS, **options)
    return losses_of(trl.SFTTrainer(model, args, train_dataset=dataset(found), processing_class=processor))


def losses_of_id_trainer(model, processor, found, folder):
    encoded = []
    for row in found:
        parts = [part for part in row["messages"][0]["content"] if part["type"] == "image"]
        images = [dict(part, image=image) for part, image in zip(parts, row["images"], strict=True)]
        user = {"role": "user", "content": [*images, row["messages"][0]["content"][-1]]}
        read = read_conversation([user, row["messages"][1]])
        encoded.append(processor.encode(conversation_to_sample(read, [photo.image for photo in read.photos])))

    def collate(samples):
        batch = processor.collate(samples)
        return {name: value for name, value in batch.items() if not name.startswith("box")}

    args = IDTrainingArguments(output_dir=str(folder), train_sampling_strategy="sequential", **OPTIONS)
    return losses_of(IDTrainer(model, args, train_dataset=encoded, data_collator=collate))


@pytest.mark.parametrize("family", [*FAMILIES, OWN])
def test_sft_has_the_losses_of_id_trainer(family, tmp_path):
    model, processor = build(family)
    other = copy.deepcopy(model)
    found = losses_of_sft(model, processor, rows(), tmp_path, assistant_only_loss=True)
    expected = losses_of_id_trainer(other, processor, rows(), tmp_path)
    assert len(found) == len(expected) == OPTIONS["max_steps"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    without = [
        {**row, "messages": [{**message, "content": unnamed(message)} for message in row["messages"]]} for row in rows()
    ]
    unlike = losses_of_sft(build(family)[0], processor, without, tmp_path, assistant_only_loss=True)
    assert abs(unlike[0] - found[0]) > 1e-3, "the identities reach the model"


def unnamed(message):
    return [{name: value for name, value in part.items() if name != "identity"} for part in message["content"]]


@pytest.mark.parametrize("family", [*FAMILIES, OWN])
def test_sft_on_prompts_and_completions(family, tmp_path):
    """The same losses: identities of rendered prompts reach the model, and only completions have labels."""
    model, processor = build(family, pack_identities=True)
    other = copy.deepcopy(model)
    split = [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:], "images": row["images"]} for row in rows()
    ]
    found = losses_of_sft(model, processor, split, tmp_path)
    if family != OWN:  # completions end with a space or a line break, which encode() does not label
        assert found.isfinite().all()
        return
    torch.testing.assert_close(found, losses_of_id_trainer(other, processor, rows(), tmp_path), atol=1e-5, rtol=0)


def test_grpo_passes_the_identities_to_our_class(tmp_path, monkeypatch):
    """The rows that are scored have the references and names of the rows that were generated."""
    model, processor = build(OWN, pack_identities=True)
    seen = []
    forward = model.id_former.forward

    def recorded(features, image_roles, sample_index, identity_index=None, **options):
        names = options["name_embeddings"][0].detach()
        seen.append((image_roles, sample_index, identity_index, names))
        return forward(features, image_roles, sample_index, identity_index, **options)

    monkeypatch.setattr(model.id_former, "forward", recorded)
    prompts = [{"prompt": row["messages"][:1], "images": row["images"]} for row in rows()[:2]]
    args = trl.GRPOConfig(
        output_dir=str(tmp_path),
        num_generations=2,
        max_completion_length=3,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        **{**OPTIONS, "max_steps": 1, "per_device_train_batch_size": 4},
    )
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reward = [lambda completions, **_: [float(number) for number in range(len(completions))]]
    trl.GRPOTrainer(model, reward, args, dataset(prompts), processing_class=processor).train()
    generation, loss = seen  # rows are shuffled in between
    assert sorted(generation[0].tolist()) == sorted(loss[0].tolist()) == [0] * 10 + [1] * 4
    assert sorted(generation[2].tolist()) == sorted(loss[2].tolist())
    rows_of = {3: None, 4: None}
    for roles_and_names in (generation, loss):
        for row, count in enumerate(roles_and_names[1].bincount().tolist()):
            found, known = roles_and_names[3][row], rows_of[count]
            assert known is None or torch.equal(found, known)
            rows_of[count] = found
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_grpo_improves_the_rewards(monkeypatch, capsys):
    """50 steps with the rewards for names and boxes, on a small LLaVA with an attached ID-Former."""
    from benchmarks import grpo

    monkeypatch.setattr(sys, "argv", ["grpo", "--model", "llava"])
    grpo.main()
    rewards = [float(line.split("|")[2]) for line in capsys.readouterr().out.splitlines() if re.match(r"\| \d", line)]
    assert len(rewards) == 5
    assert rewards[-1] > rewards[0] + 0.2
