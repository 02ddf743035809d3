"""The whole model: scatter, losses, generation with and without cache, batches, saving, parts."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTModel,
)

from idavlm.data import parse_sample
from idavlm.models import IDAVLMConfig, IDAVLMForConditionalGeneration, IDAVLMModel, scatter_image_tokens
from idavlm.models.image_batch import ImageBatch
from idavlm.models.supervision import count_supervised_scenes, supervised_scenes, target_identity_map
from tests.small_models import record, sample, small_model

TRAINING_ONLY = ("labels", "boxes", "box_image", "box_identity", "source")


@pytest.fixture
def model(processor):
    return small_model(processor)


def prompts(processor, root, people=("Kate", "Tom")):
    return processor.encode(sample(root, people=people, answer=False), add_generation_prompt=True)


def inputs(batch):
    return {name: value for name, value in batch.items() if name not in TRAINING_ONLY}


def general(root):
    text = [{"type": "image", "image": "other.png"}, {"type": "text", "text": "Where is Kate?"}]
    plain = {"id": "g", "source": "general", "messages": [{"role": "user", "content": text}]}
    return parse_sample(plain | {"type": "qa_single", "answer": "x"}, where="g:1", image_root=root)


def text_only(root):
    plain = {"id": "t", "source": "general", "messages": [{"role": "user", "content": "What is Kate doing?"}]}
    return parse_sample(plain | {"type": "qa_single", "answer": "x"}, where="t:1", image_root=root)


def test_losses_and_gradients_reach_every_part(model, processor, root):
    batch = processor.collate([processor.encode(sample(root))])
    batch.pop("source", None)
    outputs = model.train()(**batch)
    assert outputs.loss.item() == pytest.approx(
        outputs.language_loss.item() + outputs.identity_map_loss.item(), rel=1e-5
    )
    assert outputs.identity_maps[0].shape == (3, 64, 3)
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_the_identity_loss_is_weighted(processor, root):
    batch = processor.collate([processor.encode(sample(root))])
    losses = [small_model(processor, identity_map_loss_weight=weight)(**batch) for weight in (0.0, 2.0)]
    assert losses[0].loss == losses[0].language_loss
    assert losses[1].loss.item() == pytest.approx((losses[1].language_loss + 2 * losses[1].identity_map_loss).item())


def test_placeholders_and_image_tokens_must_match(model, processor, root):
    batch = inputs(processor.collate([prompts(processor, root)]))
    batch["input_ids"][0, -1] = processor.image_token_id
    with pytest.raises(ValueError, match=r"13 image placeholders but there are 12 image tokens \(3 images of 4\)"):
        model(**batch)
    for name in ("pixel_values", "image_roles", "sample_index", "identity_index", "image_sizes"):
        batch.pop(name)
    with pytest.raises(ValueError, match="13 image placeholders but 0 images"):
        model(**batch)


def test_scatter_keeps_order_and_gradient():
    embeds, tokens = torch.zeros(2, 3, 4), torch.arange(12.0).view(3, 1, 4).requires_grad_()
    is_image = torch.tensor([[True, False, True], [False, True, False]])
    result = scatter_image_tokens(embeds, is_image, tokens)
    torch.testing.assert_close(result[is_image], tokens[:, 0])
    result.sum().backward()
    assert (tokens.grad == 1).all()
    with pytest.raises(ValueError, match="4 wide but the language model's embeddings are 5"):
        scatter_image_tokens(torch.zeros(2, 3, 5), is_image, tokens)


@pytest.mark.parametrize("connector", ["id_former", "resampler"])
def test_generation_with_cache_equals_without(processor, root, connector):
    model = small_model(processor, connector=connector)
    batch = inputs(processor.collate([prompts(processor, root)]))
    with_cache, without = (
        model.generate(**batch, max_new_tokens=24, min_new_tokens=24, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    torch.testing.assert_close(with_cache, without, rtol=0, atol=0)


def test_a_left_padded_batch_equals_single_samples(model, processor, root):
    encoded = [
        prompts(processor, root),
        prompts(processor, root, people=("Kate",)),
        processor.encode(general(root), add_generation_prompt=True),
        processor.encode(text_only(root), add_generation_prompt=True),
    ]
    assert len({len(one["input_ids"]) for one in encoded}) == 4
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    together = processor.collate(encoded, padding_side="left")
    answers = model.generate(**inputs(together), **options)[:, together["input_ids"].shape[1] :]
    for one, answer in zip(encoded, answers, strict=True):
        alone = inputs(processor.collate([one]))
        if len(one["pixel_values"]) == 0:
            alone = {name: alone[name] for name in ("input_ids", "attention_mask")}
        expected = model.generate(**alone, **options)[0, len(one["input_ids"]) :]
        assert answer.tolist() == expected.tolist()


def test_beams_and_several_answers_take_their_images_along(model, processor, root):
    encoded = [prompts(processor, root), prompts(processor, root, people=("Tom",))]
    batch = inputs(processor.collate(encoded, padding_side="left"))
    greedy = model.generate(**batch, max_new_tokens=6, do_sample=False)
    torch.manual_seed(0)
    several = model.generate(**batch, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3)
    assert several.tolist() == greedy.repeat_interleave(3, 0).tolist()
    assert model.generate(**batch, max_new_tokens=6, num_beams=2).shape[0] == 2


def test_saved_and_loaded_logits_are_bit_equal(model, processor, root, tmp_path):
    batch = inputs(processor.collate([prompts(processor, root)]))
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert {path.suffix for path in (tmp_path / "saved").glob("model*")} == {".safetensors"}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    assert isinstance(loaded, IDAVLMForConditionalGeneration)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    again = AutoProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    encoded = again.encode(sample(root, answer=False), add_generation_prompt=True)
    for name, value in prompts(processor, root).items():
        assert torch.equal(encoded[name], value), name
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "saved"), IDAVLMConfig)


def test_the_model_without_head_loads_the_same_checkpoint(model, processor, root, tmp_path):
    """AutoModel builds the base model; the head of the language model maps its hidden states to the logits."""
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert type(base) is IDAVLMModel
    assert base.state_dict().keys() == model.state_dict().keys()
    assert base.base_model is base
    assert not base.can_generate()
    batch = processor.collate([processor.encode(sample(root))])
    batch.pop("source", None)
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = model.eval()(**batch, labels=labels, output_hidden_states=True)
        outputs = base(**batch, output_hidden_states=True)
        logits = base.get_output_embeddings()(outputs.last_hidden_state)
    assert torch.equal(logits, expected.logits)
    for one, other in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(one, other)
    for name in ("identity_map_loss", "auxiliary_loss", "image_hidden_states"):
        assert torch.equal(outputs[name], expected[name]), name
    assert torch.equal(outputs.identity_maps[0], expected.identity_maps[0])
    with torch.no_grad():
        images_alone = base(pixel_values=batch["pixel_values"])
    assert images_alone.last_hidden_state is None
    assert len(images_alone.image_hidden_states) == len(batch["pixel_values"])


def test_loading_options(model, processor, root, tmp_path):
    batch = inputs(processor.collate([prompts(processor, root)]))
    model.save_pretrained(tmp_path)
    eager = IDAVLMForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation={"": "eager", "text_config": "eager"}
    ).eval()
    assert eager.id_former.resampler.attention.attn_implementation == "eager"
    assert eager.language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(**batch).logits, model(**batch).logits, rtol=1e-3, atol=1e-4)
    mapped = IDAVLMForConditionalGeneration.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    assert torch.equal(mapped(**batch).logits, model(**batch).logits)
    half = IDAVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(**batch).logits.isfinite().all()


def test_a_checkpoint_without_id_former_starts_a_new_one(processor, tmp_path):
    small_model(processor, connector="resampler").save_pretrained(tmp_path)
    config = IDAVLMConfig.from_pretrained(tmp_path)
    config.connector, config.connector_config = "id_former", config.connector_config | {"gate": "zero_init"}
    loaded = IDAVLMForConditionalGeneration.from_pretrained(tmp_path, config=config)
    assert (loaded.id_former.identity_layers[0].attention.out_proj.weight == 0).all()
    assert loaded.id_former.resampler.query.std().item() == pytest.approx(0.02, rel=0.5)
    assert loaded.id_former.resampler.query_position.abs().max().item() == pytest.approx(1)


def test_gradient_checkpointing_changes_nothing(model, processor, root):
    batch = processor.collate([processor.encode(sample(root))])
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.train()(**batch).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.gradient_checkpointing_enable()
    assert model.language_model.model.layers[0].gradient_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_frozen_tower_needs_no_gradient_and_can_be_run_before(model, processor, root):
    model.vision_tower.requires_grad_(False)
    batch = processor.collate([processor.encode(sample(root))])
    expected = model(**batch)
    features, grid = model.image_features(batch.pop("pixel_values"))
    assert not features.requires_grad
    assert grid == (8, 8)
    result = model(**batch, image_features=features)
    torch.testing.assert_close(result.loss, expected.loss)


@pytest.mark.parametrize("select", ["patch", "cls", "all"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_towers_with_cls_tokens(processor, select, layer):
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    )
    language_model = small_model(processor).language_model
    tokens = {"patch": 16, "cls": 1, "all": 17}[select]
    model = IDAVLMForConditionalGeneration.from_parts(
        tower,
        language_model,
        image_token_id=processor.image_token_id,
        connector="mlp2x_gelu",
        image_seq_length=tokens,
        vision_feature_layer=layer,
        vision_feature_select=select,
    )
    pixels = torch.randn(2, 3, 32, 32)
    states = tower.eval()(pixels, output_hidden_states=True)
    hidden = states.last_hidden_state if layer == -1 else states.hidden_states[layer]
    features, grid = model.eval().image_features(pixels)
    torch.testing.assert_close(features, {"patch": hidden[:, 1:], "cls": hidden[:, :1], "all": hidden}[select])
    assert grid == ((4, 4) if select == "patch" else None)
    assert model.encode_images(pixels)[0].shape == (2, tokens, 32)


@pytest.mark.parametrize(
    "language_model",
    [
        lambda n: Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=n,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
            )
        ),
        lambda n: GPT2LMHeadModel(GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=2)),
    ],
    ids=["qwen2", "gpt2"],
)
def test_other_language_models(processor, root, language_model, tmp_path):
    tower = ViTModel(
        ViTConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=64,
            patch_size=16,
        )
    )
    model = IDAVLMForConditionalGeneration.from_parts(
        tower,
        language_model(len(processor.tokenizer)),
        image_token_id=processor.image_token_id,
        num_queries=4,
        num_heads=2,
    ).eval()
    batch = inputs(processor.collate([prompts(processor, root)]))
    model.save_pretrained(tmp_path)
    loaded = IDAVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    cached, plain = (
        model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    )
    assert cached.tolist() == plain.tolist()


def test_errors_name_the_argument(processor):
    parts = small_model(processor)
    with pytest.raises(ValueError, match="image_token_id=5000 lies outside"):
        IDAVLMForConditionalGeneration.from_parts(parts.vision_tower, parts.language_model, image_token_id=5000)
    with pytest.raises(ValueError, match="needs image_seq_length, the number"):
        IDAVLMForConditionalGeneration.from_parts(
            parts.vision_tower, parts.language_model, image_token_id=5, connector="mlp2x_gelu"
        )
    with pytest.raises(ValueError, match="does not work with an ID-Former"):
        IDAVLMConfig(vision_feature_select="cls")
    with pytest.raises(ValueError, match="without sample_index"):
        parts.encode_images(torch.randn(1, 3, 64, 64), image_roles=torch.tensor([0]))
    parts.config.vision_feature_layer = -9
    with pytest.raises(ValueError, match="vision_feature_layer=-9"):
        parts.image_features(torch.randn(1, 3, 64, 64))


def test_records_to_loss_with_several_references_per_identity(processor, root):
    several = record()
    several["identities"][0]["images"] = ["kate.png", "other.png"]
    encoded = processor.encode(parse_sample(several, where="r:1", image_root=root))
    assert encoded["identity_index"].tolist() == [0, 0, 1, 0]
    assert encoded["image_roles"].tolist() == [0, 0, 0, 1]
    assert encoded["box_image"].tolist() == [3, 3]
    assert encoded["box_identity"].tolist() == [0, 1]


def test_an_identity_without_a_box_may_be_anywhere(model, processor, root):
    """Records of Qwen-VL and IDA-VLM introduce identities without boxes: NULL is then not a target in their scenes."""
    unboxed = record()
    unboxed["boxes"], unboxed["messages"] = [], unboxed["messages"][:1] + unboxed["messages"][3:]
    one_boxed = record()
    one_boxed["boxes"].pop()
    whole = record()
    losses = []
    for number, entry in enumerate((unboxed, one_boxed, whole)):
        encoded = processor.encode(parse_sample(entry, where=f"r:{number}", image_root=root))
        batch = processor.collate([encoded])
        losses.append(model(**{k: v for k, v in batch.items() if k != "source"}).identity_map_loss)
        boxes = [batch[name] for name in ("boxes", "box_image", "box_identity", "image_sizes")]
        roles = (batch[name] for name in ("image_roles", "sample_index", "identity_index"))
        targets = target_identity_map(ImageBatch(torch.zeros(3, 64, 1), (8, 8), *roles), *boxes)[-1]
        assert (targets == -1).any() == (number == 2)
        assert (targets >= 0).any() == (number > 0)
    assert losses[0] == 0
    assert losses[1] > 0


def test_an_image_that_is_shown_twice_is_supervised_twice(model, processor, root):
    """The box of an identity labels every copy of its scene, and no copy is labelled with NULL there."""
    twice = record()
    twice["messages"][2]["content"] = [{"type": "image", "image": "scene.png"}, {"type": "text", "text": "And now?"}]
    batch = processor.collate([processor.encode(parse_sample(twice, where="t:1", image_root=root))])
    assert batch["image_roles"].tolist() == [0, 0, 1, 1]
    assert sorted(zip(batch["box_identity"].tolist(), batch["box_image"].tolist(), strict=True)) == [
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 3),
    ]
    roles = (batch[name] for name in ("image_roles", "sample_index", "identity_index"))
    boxes = (batch[name] for name in ("boxes", "box_image", "box_identity", "image_sizes"))
    targets = target_identity_map(ImageBatch(torch.zeros(4, 64, 1), (8, 8), *roles), *boxes)
    assert torch.equal(targets[2], targets[3])
    assert {0, 1, -1} <= set(targets[2].tolist())


def test_supervised_scenes_hold_a_box_or_are_known_to_show_nobody():
    """Sample 0: two scenes, both identities located. Sample 1: one identity without a box. Sample 2: no references."""
    roles = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 1, 2])
    samples = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    identities = torch.tensor([0, 1, 0, 0, 0, 1, 0, 0, 0, 0])
    box_image, box_identity = torch.tensor([2, 2, 6]), torch.tensor([0, 1, 1])
    batch = {"image_roles": roles, "sample_index": samples, "identity_index": identities, "boxes": torch.zeros(3, 4)}
    batch |= {"box_image": box_image, "box_identity": box_identity}
    found = supervised_scenes(roles, samples, identities, box_image, box_identity)
    assert found.nonzero().flatten().tolist() == [2, 3, 6]
    assert count_supervised_scenes(batch) == 3
    assert count_supervised_scenes({**batch, "boxes": None}) == 0


def test_a_compiled_model_has_the_losses_of_the_eager_one(model, processor, root):
    batch = processor.collate([processor.encode(sample(root))])
    batch.pop("source", None)
    compiled = torch.compile(model.train(), backend="eager")
    for name in ("language_loss", "identity_map_loss"):
        torch.testing.assert_close(compiled(**batch)[name], model(**batch)[name], atol=1e-5, rtol=1e-5)


def test_compiled_generation_compiles_no_function_more_than_four_times(model, processor, root):
    """As often as transformers' own language models: for the prompt and for one token, each first for its length and
    then for any. The wrapper that takes the cache under its old name is not compiled.
    """
    batches = [
        inputs(processor.collate([prompts(processor, root, people=who)])) for who in (("Kate", "Tom"), ("Kate",))
    ]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = [model.generate(**batch, **options) for batch in batches]
    torch._dynamo.reset()
    clear_compilation_metrics()
    model.compile(backend="eager")
    for batch, answer in zip(batches, expected, strict=True):
        assert model.generate(**batch, **options).tolist() == answer.tolist()
    found = Counter((Path(one.co_filename).name, one.co_name) for one in get_compilation_metrics())
    assert found["modeling.py", "forward"] >= 2
    assert {
        name: count for name, count in found.items() if count > 4 or name[0] in ("_compat.py", "deprecation.py")
    } == {}
