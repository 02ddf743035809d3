"""4-bit weights of bitsandbytes: of the pretrained parts only, saved and loaded as one, trained beside new modules."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlamaForCausalLM, ViTModel

from idavlm import IDAVLMConfig, IDAVLMForConditionalGeneration, add_inner_adaptors
from idavlm.cli.main import main
from idavlm.models.quantized_parts import is_quantized
from idavlm.training import LoRAArguments, QuantizationArguments, add_lora, dequantize, quantization, save_lora
from idavlm.training.quantization import quantization_config
from tests.small_models import small_model, small_processor
from tests.test_lora import CLOSE, LANGUAGE, TOWER, batch_of, data, logits, train, trainer_of  # noqa: F401
from tests.vlm_families import tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
NEW = ("connector", "id_former", "image_index_embedding", "inner_adaptor", "lm_head")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a model with an ID-Former, and of its two parts alone."""
    folder = tmp_path_factory.mktemp("base")
    model = small_model(small_processor(), tower="vit", max_images=4)
    model.save_pretrained(folder / "whole")
    model.vision_tower.save_pretrained(folder / "tower")
    model.language_model.save_pretrained(folder / "language")
    return folder


def quantized_layers(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def load(folder, *parts, **options):
    arguments = QuantizationArguments(parts=list(parts or (LANGUAGE, TOWER)))
    config = quantization_config(arguments, IDAVLMConfig.from_pretrained(folder, **options))
    return IDAVLMForConditionalGeneration.from_pretrained(folder, quantization_config=config, **options)


@pytest.mark.parametrize("parts", [(LANGUAGE,), (TOWER,), (LANGUAGE, TOWER)])
def test_only_the_pretrained_parts_are_quantised(base, parts):
    model = load(base / "whole", *parts)
    layers = quantized_layers(model)
    assert {part for part in (LANGUAGE, TOWER) if any(name.startswith(f"{part}.") for name in layers)} == set(parts)
    assert not any(new in name.split(".") for name in layers for new in NEW)
    expected = {
        name
        for part in parts
        for name, module in small_model(small_processor(), tower="vit").named_modules()
        if name.startswith(f"{part}.") and type(module) is nn.Linear and not name.endswith("lm_head")
    }
    assert layers == expected


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_models_of_transformers(family, tmp_path):
    """The connector between the parts keeps its type."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    config = quantization_config(QuantizationArguments(parts=[TOWER]), model.config)
    layers = quantized_layers(AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config))
    assert layers
    assert not any("language_model" in name or "text_model" in name or "projector" in name for name in layers)
    assert not any("connector" in name.split(".") or name == "lm_head" for name in layers)


def test_quantised_parts_are_saved_and_loaded_as_one(base, root, tmp_path):
    options = {"quantization_config": quantization_config(QuantizationArguments(double_quant=False))}
    processor = small_processor()
    model = IDAVLMForConditionalGeneration.from_parts(
        ViTModel.from_pretrained(base / "tower", **options),
        LlamaForCausalLM.from_pretrained(base / "language", **options),
        processor=processor,
        num_heads=2,
        max_images=4,
    )
    assert model.is_loaded_in_4bit
    expected = logits(model, batch_of(root))
    model.save_pretrained(tmp_path)
    loaded = IDAVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert quantized_layers(loaded) == quantized_layers(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tuned = add_lora(loaded, {LANGUAGE: LoRAArguments(r=2)})
    torch.testing.assert_close(logits(tuned, batch_of(root)), expected, **CLOSE)


def test_parts_that_are_quantised_in_different_ways_are_an_error(base):
    tower = ViTModel.from_pretrained(base / "tower", quantization_config=quantization_config(QuantizationArguments()))
    config = quantization_config(QuantizationArguments(quant_type="fp4"))
    language_model = LlamaForCausalLM.from_pretrained(base / "language", quantization_config=config)
    with pytest.raises(ValueError, match="language_model is quantised with bnb_4bit_quant_type=fp4, but vision_tower"):
        IDAVLMForConditionalGeneration.from_parts(
            tower, language_model, image_token_id=5, connector="mlp2x_gelu", image_seq_length=16
        )


@pytest.mark.parametrize(("rank", "is_saved"), [(2, False), (2, True), (None, True)])
def test_a_checkpoint_with_inner_adaptors(base, root, data, tmp_path, rank, is_saved):  # noqa: F811
    """The adaptors are trained on a quantised base without peft; nothing else moves."""
    options = {"inner_adaptors": {"every": 1, "rank": rank}}
    folder = base / "whole"
    if is_saved:
        IDAVLMForConditionalGeneration.from_pretrained(folder, **options).save_pretrained(tmp_path / "saved")
        folder, options = tmp_path / "saved", {}
    model = load(folder, **options)
    layers = quantized_layers(model)
    assert layers
    assert not any("inner_adaptor" in name for name in layers)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(False)
    trainer_of(model, data, tmp_path / "run", workflow="grounding").train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("inner_adaptor.grounding." in name for name in moved)
    again = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint-2")
    for workflow in ("grounding", "text"):
        expected = logits(model, batch_of(root), workflow=workflow)
        torch.testing.assert_close(logits(again, batch_of(root), workflow=workflow), expected, **CLOSE)


def test_new_modules_on_a_quantised_base_are_trained_without_peft(base, data, tmp_path):  # noqa: F811
    model = load(base / "whole")
    for part in (model.vision_tower, model.language_model):
        part.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer_of(model, data, tmp_path).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.partition(".")[0] for name in moved} == {"id_former", "image_index_embedding"}
    assert model.is_quantized
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_of(model, data, tmp_path)


def test_all_layers_quantised_for_inference(base, root):
    """Plain BitsAndBytesConfig quantises new modules as well: they can be used, and not be trained in full."""
    model = small_model(small_processor(), tower="vit", connector="mlp2x_gelu", image_seq_length=16)
    model.save_pretrained(base / "mlp")
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = model.encode_images(pixel_values)[0]
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = IDAVLMForConditionalGeneration.from_pretrained(base / "mlp", quantization_config=config)
    assert any(name.startswith("connector.") for name in quantized_layers(loaded))
    found = loaded.encode_images(pixel_values)[0]
    assert (found - expected).norm() < 0.3 * expected.norm()
    with pytest.raises(ValueError, match="connector has 4-bit weights and cannot be trained in full"):
        add_lora(loaded, {LANGUAGE: LoRAArguments()}, modules_to_save=["connector"])


@pytest.mark.parametrize("inner_adaptors", [None, {"every": 1, "rank": 2}])
def test_dequantised_models_compute_the_same(base, root, tmp_path, inner_adaptors):
    model = load(base / "whole", inner_adaptors=inner_adaptors)
    add_lora(model, {TOWER: LoRAArguments()}).unload()
    expected = logits(model, batch_of(root))
    plain = dequantize(model)
    assert not is_quantized(plain)
    torch.testing.assert_close(logits(plain, batch_of(root)), expected, **CLOSE)
    plain.save_pretrained(tmp_path)
    again = IDAVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert not is_quantized(again)
    assert torch.equal(logits(again, batch_of(root)), logits(plain, batch_of(root)))
    assert next(plain.to(torch.bfloat16).parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has no 4-bit weights"):
        dequantize(plain)


def test_an_evaluation_does_not_end_the_training(base, root):
    """On some CPUs bitsandbytes rearranges weights in evaluation, after which no gradient passes through them."""
    model = load(base / "whole", LANGUAGE)
    logits(model, batch_of(root))
    tuned = add_lora(model, {TOWER: LoRAArguments(r=2), LANGUAGE: LoRAArguments(r=2)})
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    logits(tuned, batch_of(root))
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    train(tuned, batch_of(root), steps=2)
    moved = [name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("vision_tower" in name for name in moved), "its gradient passes through the language model"


def test_merging_qlora(base, root, tmp_path):
    """The merged model is that of training: the base in 4 bits, then the change, without rounding to 4 bits again."""
    tuned = add_lora(load(base / "whole"), {LANGUAGE: LoRAArguments(r=2), TOWER: LoRAArguments(r=2)})
    train(tuned, batch_of(root))
    save_lora(tuned, tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    merged = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert not is_quantized(merged)
    torch.testing.assert_close(logits(merged, batch_of(root)), logits(tuned, batch_of(root)), **CLOSE)


def test_adaptors_on_a_quantised_language_model(base, data):  # noqa: F811
    """A layer of 4-bit weights cannot be copied and trained; a low rank shares it."""
    config = quantization_config(QuantizationArguments())
    model = LlamaForCausalLM.from_pretrained(base / "language", quantization_config=config)
    with pytest.raises(ValueError, match="is quantised and cannot be trained; set a rank"):
        add_inner_adaptors(model, every=1)
    with pytest.raises(ValueError, match="is quantised and cannot be trained; set a rank"):
        load(base / "whole", inner_adaptors={"every": 1})
    assert add_inner_adaptors(model, every=1, rank=2).inner_adaptor is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": []}, r"parts=\[\] quantises nothing"),
        ({"parts": ["connector"]}, "parts='connector' is not known"),
        ({"quant_type": "int8"}, "quant_type='int8' is not known"),
        ({"compute_dtype": "int8"}, "compute_dtype='int8' is not known"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizationArguments(**options)


def test_a_part_without_linear_layers(monkeypatch):
    model = small_model(small_processor())
    with pytest.raises(ValueError, match="'vision_tower', but its ResNetModel has no linear layers"):
        quantization_config(QuantizationArguments(), model.config)
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r"idavlm\[qlora\]"):
        quantization_config(QuantizationArguments())
