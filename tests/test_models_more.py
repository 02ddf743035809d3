"""Vision towers of many kinds, parts, identity embeddings, losses, adapters, and batches of text only."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    EfficientNetConfig,
    EfficientNetModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from idavlm.data import RecordDataset, parse_sample
from idavlm.experimental.small_models import small_language_model, small_vision_tower
from idavlm.models import IDAVLMForConditionalGeneration, scatter_image_tokens
from idavlm.models.identity_names import add_learned_embeddings
from idavlm.models.image_batch import ImageBatch
from idavlm.models.supervision import target_identity_map
from idavlm.models.vision import output_width, vision_features
from idavlm.modules.identity_map import pool_identity_map
from idavlm.training import IDTrainer, IDTrainingArguments
from tests.interrupted_run import write_data
from tests.small_models import record, sample, small_model

NOT_FOR_THE_MODEL = ("source",)
SIZE = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SMALLER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def batch_of(processor, *samples, **options):
    batch = processor.collate([processor.encode(one, **options) for one in samples])
    return {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}


def text_only(root):
    messages = [{"role": "user", "content": "What is Kate doing?"}, {"role": "assistant", "content": "Tom."}]
    return parse_sample({"id": "t", "source": "general", "messages": messages}, where="t:1", image_root=root)


def clip_of_images_and_text() -> CLIPModel:
    config = CLIPConfig(vision_config=SIZE, text_config=SMALLER | {"vocab_size": 9}, projection_dim=8)
    return CLIPModel(config)


def resnet() -> ResNetModel:
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[12, 24], depths=[1, 1], layer_type="basic"))


def convnext() -> ConvNextModel:
    return ConvNextModel(ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], patch_size=1))


# Tower, grid of the output and of the layer before for 32 x 32 pixels, leading tokens.
TOWERS = {
    "vit": (lambda: ViTModel(ViTConfig(**SIZE)), 4, 4, 1),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**SIZE)), 4, 4, 1),
    "clip of images and text": (clip_of_images_and_text, 4, 4, 1),
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**SIZE)), 4, 4, 0),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SIZE)), 4, 4, 1),
    "dinov2 with registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=4, **SIZE)),
        4,
        4,
        5,
    ),
    "resnet": (resnet, 4, 8, 0),
    "convnext": (convnext, 4, 8, 0),
}


def joined(tower, processor, **options):
    torch.manual_seed(0)
    language_model = small_language_model(processor.tokenizer, hidden_size=32)
    options = {"num_queries": 4, "num_heads": 2, **options}
    if options.get("connector", "id_former") == "id_former":
        options["gate"] = "none"
    return IDAVLMForConditionalGeneration.from_parts(
        tower, language_model, image_token_id=processor.image_token_id, **options
    ).eval()


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("layer", [-1, -2])
def test_towers_at_random(processor, name, layer, tmp_path):
    build, last, before, leading = TOWERS[name]
    model = joined(build(), processor, vision_feature_layer=layer)
    side = last if layer == -1 else before
    pixels = torch.randn(3, 3, 32, 32)
    features, grid = model.image_features(pixels)
    assert grid == (side, side)
    assert features.shape[:2] == (3, side * side)
    assert features.shape[2] == output_width(model.config.vision_config, layer)
    tower = model.vision_tower
    states = tower(pixels, output_hidden_states=True)
    hidden = states.last_hidden_state if layer == -1 else states.hidden_states[layer]
    hidden = hidden.flatten(2).mT if hidden.dim() == 4 else hidden[:, leading:]
    torch.testing.assert_close(features, hidden)

    roles = {"image_roles": torch.tensor([0, 1, 2]), "sample_index": torch.tensor([0, 0, 0])}
    tokens, maps, _ = model.encode_images(pixels, **roles, output_identity_maps=True)
    assert tokens.shape == (3, 4, 32)
    assert maps[0].shape == (3, side * side, 2)
    model.save_pretrained(tmp_path)
    loaded = IDAVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.vision_tower) is type(tower)
    assert torch.equal(loaded.encode_images(pixels, **roles)[0], tokens)


def test_images_of_unequal_sides(processor):
    pixels = torch.randn(1, 3, 32, 64)
    model = joined(resnet(), processor)
    assert model.image_features(pixels)[1] == (4, 8)
    assert model.encode_images(pixels)[0].shape == (1, 4, 32)
    resampler = joined(resnet(), processor, connector="resampler")
    assert resampler.encode_images(pixels)[0].shape == (1, 4, 32)


def test_features_are_rows_of_patches():
    tower = resnet().eval()
    pixels = torch.randn(1, 3, 32, 64)
    features, (rows, columns) = vision_features(tower, pixels, layer=-1, select="patch")
    feature_map = tower(pixels).last_hidden_state
    torch.testing.assert_close(features[0, 1 * columns + 3], feature_map[0, :, 1, 3])
    assert (rows, columns) == tuple(feature_map.shape[2:])


@pytest.mark.parametrize("tower", [resnet, TOWERS["vit"][0]])
def test_a_layer_the_tower_does_not_have(processor, tower):
    pixels = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"vision_feature_layer=-9: \w+ has \d hidden states"):
        vision_features(tower(), pixels, layer=-9, select="patch")
    with pytest.raises(ValueError, match="vision_feature_layer=0 must be negative"):
        joined(tower(), processor, vision_feature_layer=0)


def test_no_cls_token():
    with pytest.raises(ValueError, match="ResNetModel has no CLS token"):
        vision_features(resnet(), torch.randn(1, 3, 32, 32), layer=-1, select="cls")
    siglip = TOWERS["siglip"][0]()
    with pytest.raises(ValueError, match="SiglipVisionModel has none"):
        vision_features(siglip, torch.randn(1, 3, 32, 32), layer=-1, select="cls")


def test_the_width_of_a_tower():
    assert [output_width(resnet().config, layer) for layer in (-1, -2, -3)] == [24, 12, 8]
    with pytest.raises(ValueError, match=r"ResNetConfig has neither .* pass vision_hidden_size"):
        output_width(resnet().config, -9)
    swin = SwinConfig(embed_dim=12, depths=[1, 1], num_heads=[2, 2], image_size=32, patch_size=2, window_size=4)
    assert output_width(swin) == SwinModel(swin)(torch.randn(1, 3, 32, 32)).last_hidden_state.shape[-1]
    # This configuration does not contain the width of the features: the tower runs on the meta device.
    config = EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320, num_hidden_layers=4
    )
    assert (
        output_width(config) == EfficientNetModel(config).eval()(torch.randn(1, 3, 32, 32)).last_hidden_state.shape[1]
    )


# --- Parts -----------------------------------------------------------------------------------------------------------


def test_parts_are_taken_as_they_are(processor):
    tower, language_model = resnet(), small_language_model(processor.tokenizer, hidden_size=32)
    language_model.config.tie_word_embeddings = False
    language_model = type(language_model)(language_model.config)
    language_model.lm_head = torch.nn.Linear(32, len(processor.tokenizer), bias=False)  # a layer of the user's
    parts = (tower, language_model)
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    configs = [part.config.to_dict() for part in parts]
    model = IDAVLMForConditionalGeneration.from_parts(
        *parts, image_token_id=processor.image_token_id, num_queries=4, num_heads=2
    )
    assert (model.vision_tower, model.language_model) == parts
    for part, state, config in zip(parts, before, configs, strict=True):
        assert part.config.to_dict() == config
        for name, value in part.state_dict().items():
            assert torch.equal(value, state[name]), name


def test_adapters_of_a_given_language_model_stay_closed(processor):
    language_model = small_language_model(processor.tokenizer, hidden_size=32)
    ids = torch.randint(6, 200, (1, 7))
    expected = language_model(ids).logits
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "v_proj"]), language_model)
    model = IDAVLMForConditionalGeneration.from_parts(
        resnet(), language_model, image_token_id=processor.image_token_id, num_queries=4, num_heads=2
    )
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


def test_a_frozen_tower_keeps_its_batch_statistics(processor, root):
    model = joined(small_vision_tower(hidden_size=32), processor)
    model.vision_tower.requires_grad_(False)
    before = copy.deepcopy(model.vision_tower.state_dict())
    model.train()
    assert model.language_model.training
    model(**batch_of(processor, sample(root))).loss.backward()
    for name, value in model.vision_tower.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.vision_tower.requires_grad_(True)
    assert model.train().vision_tower.training


# --- Text alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connector", ["id_former", "resampler", "mlp2x_gelu"])
def test_text_alone_reaches_every_parameter(processor, root, connector):
    options = {"image_seq_length": 64} if connector == "mlp2x_gelu" else {}
    model = small_model(processor, connector=connector, **options).train()
    outputs = model(**batch_of(processor, text_only(root)))
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not name.startswith("language_model"):
            assert (parameter.grad == 0).all(), name
    prompt = batch_of(processor, text_only(root), add_generation_prompt=False)
    inputs = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model.eval()(**inputs).logits, model(**prompt).logits)


def test_generation_from_text_alone(processor, root):
    model = small_model(processor)
    entry = {"id": "t", "type": "qa_single", "answer": "x", "messages": [{"role": "user", "content": "Kate?"}]}
    batch = batch_of(processor, parse_sample(entry, where="t:1", image_root=root), add_generation_prompt=True)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    bare = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert model.generate(**inputs, max_new_tokens=4).tolist() == model.generate(**bare, max_new_tokens=4).tolist()


# --- Identity embeddings ------------------------------------------------------------------------------------------


def test_identity_embeddings_are_added_to_names(processor, root):
    model = small_model(processor, identity_embedding="learned", max_identities=2)
    batch = batch_of(processor, sample(root))
    assert set(batch["token_identity_index"].unique().tolist()) == {-1, 0, 1}
    embeds = model.get_input_embeddings()(batch["input_ids"])
    table = model.id_former.identity_embedding.table()
    embedded = add_learned_embeddings(embeds, batch["token_identity_index"], table)
    for identity in (0, 1):
        here = batch["token_identity_index"] == identity
        norm = embeds[here].norm(dim=-1, keepdim=True) / table[identity].norm()
        torch.testing.assert_close(embedded[here], embeds[here] + norm * table[identity])
    assert torch.equal(embedded[batch["token_identity_index"] < 0], embeds[batch["token_identity_index"] < 0])
    without_names = batch | {"token_identity_index": torch.full_like(batch["token_identity_index"], -1)}
    assert not torch.allclose(model(**batch).logits, model(**without_names).logits)
    without = small_model(processor)  # no identity embedding
    assert torch.equal(without(**batch).logits, without(**without_names).logits)


def test_teacher_forcing_follows_the_boxes(processor, root):
    """Tokens differ by identity embeddings only, in the cells that boxes cover. The loss of the maps stays."""
    model = small_model(processor, identity_embedding="learned", max_identities=2, null_token=True).eval()
    batch = {k: v for k, v in batch_of(processor, sample(root)).items() if k != "source"}
    forced, free = model(**batch, teacher_forcing=True), model(**batch)
    assert torch.equal(forced.identity_map_loss, free.identity_map_loss)
    assert not torch.equal(forced.language_loss, free.language_loss)
    without = {k: v for k, v in batch.items() if not k.startswith("box")}
    assert torch.equal(model(**without, teacher_forcing=True).logits, model(**without).logits)

    boxes = [batch[name] for name in ("boxes", "box_image", "box_identity", "image_sizes")]
    roles = tuple(batch[name] for name in ("image_roles", "sample_index", "identity_index"))
    features, grid_size = model.image_features(batch["pixel_values"])
    targets = target_identity_map(ImageBatch(features, grid_size, *roles), *boxes)
    assert {-1, 0, 1} <= set(targets.unique().tolist())
    tokens, maps = model.id_former(features, *roles, target_identity_map=targets, output_attentions=True)
    undecided = torch.full_like(targets, -100)
    assert torch.equal(
        model.id_former(features, *roles, target_identity_map=undecided), model.id_former(features, *roles)
    )
    table, cells = model.id_former.identity_embedding.table(), model.id_former.resampler.query_grid
    own = torch.nn.functional.one_hot(roles[2], 2).float()[:, None] @ table
    is_reference = (roles[0] == 0)[:, None, None]
    predicted = pool_identity_map(maps[-1], grid_size, cells, 2) @ table
    unembedded = model.id_former(features, *roles) - torch.where(is_reference, own, predicted)
    shares = torch.stack([(targets == number).float() for number in (0, 1)], dim=-1)
    open_shares = torch.where((targets == -100)[..., None], maps[-1][..., :2], shares)
    pooled = torch.nn.functional.adaptive_avg_pool2d(open_shares.mT.unflatten(2, grid_size), cells).flatten(2).mT
    torch.testing.assert_close(tokens, unembedded + torch.where(is_reference, own, pooled @ table))


def test_more_identities_than_embeddings(processor, root):
    with pytest.raises(ValueError, match="2 identities but max_identities=1"):
        small_model(processor, identity_embedding="learned", max_identities=1)(**batch_of(processor, sample(root)))
    id_former = small_model(processor, identity_embedding="learned", max_identities=1).id_former
    bank = [id_former.encode_references(torch.randn(1, 4, 32)) for _ in range(2)]
    with pytest.raises(ValueError, match="2 identities but max_identities=1"):
        id_former.forward_scenes(torch.randn(1, 4, 32), bank)


def test_generation_with_identity_embeddings(processor, root):
    model = small_model(processor, identity_embedding="learned", max_identities=2)
    one, two = (sample(root, people=people, answer=False) for people in (("Kate", "Tom"), ("Tom",)))
    batch = processor.collate(
        [processor.encode(each, add_generation_prompt=True) for each in (one, two)], padding_side="left"
    )
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "source")}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    cached = model.generate(**inputs, **options)
    assert cached.tolist() == model.generate(**inputs, **options, use_cache=False).tolist()
    length = inputs["input_ids"].shape[1]
    for row, each in enumerate((one, two)):
        alone = batch_of(processor, each, add_generation_prompt=True)
        alone.pop("labels")
        expected = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert cached[row, length:].tolist() == expected.tolist()
    beams = model.generate(**inputs, **options, num_beams=2, num_return_sequences=2)
    assert beams.shape == (4, length + 12)


# --- Scatter, losses -------------------------------------------------------------------------------------------------


def test_scatter_is_strict():
    is_image = torch.tensor([[True, False, True]])
    embeds = torch.zeros(1, 3, 4)
    for images, count in ((1, 1), (3, 1), (0, 1)):
        with pytest.raises(
            ValueError, match=rf"2 image placeholders but there are {images} image tokens \({images} im"
        ):
            scatter_image_tokens(embeds, is_image, torch.ones(images, count, 4))
    with pytest.raises(ValueError, match="3 wide but the language model's embeddings are 4"):
        scatter_image_tokens(embeds, is_image, torch.ones(2, 1, 3))
    result = scatter_image_tokens(embeds.bfloat16(), is_image, torch.ones(2, 1, 4))
    assert result.dtype == torch.bfloat16
    assert (embeds == 0).all()
    empty = scatter_image_tokens(embeds, torch.zeros(1, 3, dtype=torch.bool), torch.ones(0, 4, 4))
    assert torch.equal(empty, embeds)


def test_the_contrastive_loss_is_weighted(processor, root):
    batch = batch_of(processor, sample(root), sample(root, people=("Tom",)))
    plain, supervised = (small_model(processor, contrastive_loss_weight=weight)(**batch) for weight in (0.0, 0.5))
    assert plain.contrastive_loss is None
    assert plain.auxiliary_loss == plain.identity_map_loss
    assert supervised.identity_map_loss == plain.identity_map_loss
    assert 0 < supervised.contrastive_loss < 20
    torch.testing.assert_close(
        supervised.auxiliary_loss, supervised.identity_map_loss + 0.5 * supervised.contrastive_loss
    )
    torch.testing.assert_close(supervised.loss, supervised.language_loss + supervised.auxiliary_loss)
    alone = small_model(processor, contrastive_loss_weight=0.5, identity_map_loss_weight=0.0)(**batch)
    torch.testing.assert_close(alone.auxiliary_loss, 0.5 * supervised.contrastive_loss)
    no_boxes = batch | {name: batch[name][:0] for name in ("boxes", "box_image", "box_identity")}
    assert small_model(processor, contrastive_loss_weight=0.5)(**no_boxes).contrastive_loss == 0
    with pytest.raises(ValueError, match="contrastive_loss_weight=-1"):
        small_model(processor, contrastive_loss_weight=-1)


def test_boxes_need_what_goes_with_them(processor, root):
    batch = batch_of(processor, sample(root))
    batch.pop("image_sizes")
    with pytest.raises(ValueError, match="boxes need"):
        small_model(processor)(**batch)


def test_half_precision(processor, root):
    batch = batch_of(processor, sample(root))
    options = {"contrastive_loss_weight": 1.0, "identity_embedding": "learned", "max_identities": 2}
    expected = small_model(processor, **options)(**batch)
    model = small_model(processor, **options)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch)
    mixed.loss.backward()
    half = small_model(processor, **options).bfloat16()(**batch)
    for outputs in (mixed, half):
        for name in ("language_loss", "identity_map_loss", "contrastive_loss"):
            torch.testing.assert_close(outputs[name].float(), expected[name].float(), rtol=0.1, atol=0.1)
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


# --- Training --------------------------------------------------------------------------------------------------------


def arguments(tmp_path, **options) -> IDTrainingArguments:
    defaults = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 2}
    return IDTrainingArguments(**(defaults | {"save_strategy": "no", "per_device_train_batch_size": 2} | options))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_low_rank_adapters_train_and_are_saved(processor, root, tmp_path, checkpointing):
    write_data(tmp_path)
    records = RecordDataset(tmp_path / "train.jsonl", encode=processor.encode)
    lora = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", modules_to_save=["id_former"], r=2)
    options = {"identity_embedding": "learned", "max_identities": 2, "contrastive_loss_weight": 0.1}
    model = get_peft_model(small_model(processor, **options), lora)
    batch = batch_of(processor, sample(root))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = arguments(tmp_path, learning_rate=1e-2, gradient_checkpointing=checkpointing)
    trainer = IDTrainer(model, args, train_dataset=records, data_collator=processor.collate)
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any("lora_B" in name for name in changed)
    assert any("id_former.modules_to_save" in name for name in changed)
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    model.eval().save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    base = small_model(processor, **options)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-6)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_one_data_set_of_both_sources(processor, tmp_path):
    write_data(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text() + (tmp_path / "general.jsonl").read_text()
    (tmp_path / "both.jsonl").write_text(lines)
    records = RecordDataset(tmp_path / "both.jsonl", encode=processor.encode)
    options = {"per_device_train_batch_size": 15, "max_steps": 1, "logging_steps": 1}
    trainer = IDTrainer(
        small_model(processor), arguments(tmp_path, **options), train_dataset=records, data_collator=processor.collate
    )
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "loss_identity" in entry)
    assert logged["loss_general"] > 0
    assert logged["identity_map_loss"] > 0


def test_accumulated_batches_count_alike(processor, tmp_path):
    write_data(tmp_path)
    records = RecordDataset(tmp_path / "train.jsonl", encode=processor.encode)
    gradients = []
    for size, accumulation in ((1, 4), (4, 1)):
        model = small_model(processor, identity_map_loss_weight=0.0)
        options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": size, "max_steps": 1}
        options |= {"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "freeze": ["vision_tower"]}
        trainer = IDTrainer(
            model,
            arguments(tmp_path, **options),
            train_dataset=torch.utils.data.Subset(records, [0, 0, 0, 0]),  # of equal length
            data_collator=processor.collate,
        )
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trainer.train()
        gradients.append({name: parameter - before[name] for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_evaluation_of_several_data_sets_and_of_predictions(processor, tmp_path):
    write_data(tmp_path)
    records = RecordDataset(tmp_path / "train.jsonl", encode=processor.encode)
    calls, shapes = [], []

    def metrics(prediction):
        shapes.append((type(prediction.predictions), prediction.predictions.shape[0]))
        return {"answers": 1.0}

    trainer = IDTrainer(
        small_model(processor),
        arguments(tmp_path, per_device_eval_batch_size=2),
        eval_dataset={"a": torch.utils.data.Subset(records, [0, 1]), "b": torch.utils.data.Subset(records, [2, 3, 4])},
        data_collator=processor.collate,
        compute_metrics=metrics,
        task_evaluation=lambda model: calls.append(model.training) or {"matching": 1.0},
    )
    scores = trainer.evaluate()
    assert calls == [False]
    assert scores["eval_matching"] == 1.0
    assert {"eval_a_loss", "eval_b_loss", "eval_a_answers"} <= scores.keys()
    assert [count for _, count in shapes] == [2, 3]  # logits alone, no caches and maps
    assert record(0)["source"] == "identity"
