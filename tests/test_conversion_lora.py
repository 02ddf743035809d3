"""LLaVA of transformers with a Chinese-CLIP tower; LoRA of both halves, merged as peft merges it; LLaVA's own LoRA."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from idavlm import IDAVLMForConditionalGeneration, IDAVLMProcessor
from idavlm._compat import auto_image_processor
from idavlm.conversion import ConversionError, config_files, convert
from idavlm.data import chat_templates
from tests.released import IMAGE, OWN_TEMPLATE, language_model, llava_tokenizer, released, tower, transformers_llava

TOKENS = 4
BATCH = {
    "input_ids": torch.tensor([[5, *[IMAGE] * TOKENS, 7, 8, 9, 2], [6, *[IMAGE] * TOKENS, 11, 12, 13, 2]]),
    "pixel_values": torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)),
}
LORA = {"r": 4, "lora_alpha": 8, "modules_to_save": ["multi_modal_projector"]}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LLaVA put together from three parts, a LoRA adapter trained on both halves, and the two merged by peft."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("chinese-clip")
    llava = transformers_llava(folder / "base")
    trained = get_peft_model(llava, LoraConfig(target_modules=TARGETS, **LORA))
    train(trained, BATCH)
    trained.save_pretrained(folder / "adapter")
    trained.merge_and_unload().save_pretrained(folder / "merged")
    for path in (folder / "base").glob("*"):
        if not (folder / "merged" / path.name).exists():
            shutil.copy(path, folder / "merged")
    return folder


def train(model, batch):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits_of(folder, model_class=IDAVLMForConditionalGeneration):
    with torch.no_grad():
        return model_class.from_pretrained(folder).eval()(**BATCH).logits


def test_transformers_llava_converts_with_and_without_an_adapter(folders, tmp_path):
    base = logits_of(folders / "base", LlavaForConditionalGeneration)
    merged = logits_of(folders / "merged", LlavaForConditionalGeneration)
    assert (base - merged).abs().max() > 0.1, "the adapter learned something"
    for name, adapter, expected in (("base", None, base), ("merged", None, merged), ("base", "adapter", merged)):
        out = tmp_path / f"{name}-{adapter}"
        convert(folders / name, out, adapter=adapter and folders / adapter, progress=False)
        torch.testing.assert_close(logits_of(out), expected, atol=1e-5, rtol=1e-5)
    processor = IDAVLMProcessor.from_pretrained(out)
    assert processor.chat_template == OWN_TEMPLATE
    assert (processor.image_token_id, processor.image_seq_length) == (IMAGE, TOKENS)
    state = IDAVLMForConditionalGeneration.from_pretrained(out).state_dict()
    assert {"vision_tower", "connector", "language_model"} == {name.partition(".")[0] for name in state}


FOR_PARTS = "{% for m in messages %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}"
FOR_PARTS += "{% endfor %}{% endfor %}"


def test_what_transformers_processor_saves_is_read(folders, tmp_path):
    """All settings are in ``processor_config.json``; the template supports lists of parts and would drop text."""
    base = shutil.copytree(folders / "base", tmp_path / "base")
    image_processor = auto_image_processor().from_pretrained(base)
    (base / "preprocessor_config.json").unlink()
    made = llava_tokenizer()
    made.chat_template = None
    saved = LlavaProcessor(image_processor, made, patch_size=14, chat_template=FOR_PARTS)
    saved.save_pretrained(base)
    processor = IDAVLMProcessor.from_pretrained(convert(base, tmp_path / "out", progress=False))
    assert processor.chat_template == chat_templates.QWEN_CHATML
    assert processor.image_processor.crop_size == image_processor.crop_size
    (base / "config.json").write_text((base / "config.json").read_text().replace('"qwen2"', '"mistral"'))
    with pytest.raises(ConversionError, match="no chat_template that supports text messages"):
        convert(base, tmp_path / "other")


def test_our_model_of_the_same_parts_trains_with_lora_on_both_sides_and_merges(tmp_path):
    model = IDAVLMForConditionalGeneration.from_parts(
        tower(),
        language_model(),
        image_token_id=IMAGE,
        connector="mlp2x_gelu",
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = get_peft_model(
        model, LoraConfig(target_modules=TARGETS, r=4, lora_alpha=8, modules_to_save=["connector"])
    )
    train(trained, BATCH)
    merged = trained.merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = merged(**BATCH).logits
    assert torch.equal(logits_of(tmp_path), expected)
    after = IDAVLMForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"connector.0.weight", "language_model.model.layers.1.mlp.up_proj.weight"} <= changed
    assert any(name.startswith("vision_tower.encoder.layers.0") for name in changed)


@pytest.fixture
def llava_lora(tmp_path):
    """LLaVA-1.5's LoRA: its own base without projector, the projector in ``non_lora_trainables.bin``."""
    base = released("llava-1.5", tmp_path)
    weights = torch.load(base / "pytorch_model.bin", weights_only=True)
    lora = tmp_path / "lora"
    lora.mkdir()
    shutil.copy(base / "config.json", lora)
    projector = {name: weights.pop(name) * 2 for name in list(weights) if "mm_projector" in name}
    torch.save(weights, base / "pytorch_model.bin")
    config = json.loads((base / "config.json").read_text())
    base_config = {name: value for name, value in config.items() if not name.startswith("mm_")}
    (base / "config.json").write_text(json.dumps({**base_config, "model_type": "llama"}))
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in projector.items()}, lora / "non_lora_trainables.bin"
    )
    low_rank = {}
    for name, tensor in weights.items():
        if "_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            low_rank[f"{module}.lora_A.weight"] = torch.randn(2, tensor.shape[1]) / 8
            low_rank[f"{module}.lora_B.weight"] = torch.randn(tensor.shape[0], 2) / 8
    torch.save(low_rank, lora / "adapter_model.bin")
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return base, lora, weights, projector, low_rank


def test_loras_of_llavas_format_are_merged(llava_lora, tmp_path):
    base, lora, weights, projector, low_rank = llava_lora
    convert(base, tmp_path / "out", adapter=lora, vision_tower=base / "clip-vision-tiny", progress=False)
    state = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    for name, tensor in weights.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in low_rank:
            delta = low_rank[f"{module}.lora_B.weight"] @ low_rank[f"{module}.lora_A.weight"]
            tensor = (tensor.float() + 2 * delta).bfloat16()
        assert torch.equal(state[f"language_model.{name}"][: len(tensor)], tensor), name
    for name, tensor in projector.items():
        assert torch.equal(state[name.replace("model.mm_projector", "connector")], tensor)


def test_patterns_of_ranks_and_alphas_apply_as_in_peft(folders, tmp_path):
    """Of several patterns that match, the first one in the file counts; peft sorts them."""
    llava = LlavaForConditionalGeneration.from_pretrained(folders / "base")
    patterns = {
        "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 64, "up_proj": 2},
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 8, "q_proj": 2},
    }
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **patterns}
    tuned = get_peft_model(llava, LoraConfig(target_modules=["q_proj", "up_proj"], **options))
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        merged = tuned.merge_and_unload().eval()(**BATCH).logits
    convert(folders / "base", tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    torch.testing.assert_close(logits_of(tmp_path / "out"), merged, atol=1e-5, rtol=1e-5)


def test_the_configuration_of_an_adapter_is_checked(folders, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(folders / "adapter", adapter)
    path = adapter / "adapter_config.json"
    original = json.loads(path.read_text())
    for field, value, message in (
        *((field, "no such value", f"{field}='no such value'; expected ") for field in config_files.ADAPTER),
        ("lora_alpha", 0, "lora_alpha=0; expected a number greater than 0"),
        ("r", 3, r"has rank 3, but in .*adapter_model\.safetensors lora_A has shape \(4, \d+\)"),
        ("rank_pattern", {"up_proj": 3}, r"up_proj has rank 3, but in"),
        ("alpha_pattern", {"(": 3}, r"alpha_pattern has '\(', which is no regular expression"),
        ("alpha_pattern", {"up_proj": None}, r"alpha_pattern=\{'up_proj': None\}; expected"),
        ("peft_type", "IA3", r"\{'peft_type': 'IA3'\} is not supported; merge the adapter with peft"),
        ("use_dora", True, r"\{'use_dora': True\} is not supported"),
        ("layer_replication", [[0, 2]], "'layer_replication': .* is not supported"),
    ):
        path.write_text(json.dumps({**original, field: value}))
        pattern = "'peft_type': 'no such value'" if (field, value) == ("peft_type", "no such value") else message
        with pytest.raises(ConversionError, match=rf"adapter_config\.json: .*{pattern}"):
            convert(folders / "base", tmp_path / "out", adapter=adapter, progress=False)
    assert not (tmp_path / "out").exists()


def test_the_pairs_of_an_adapter_are_checked(folders, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(folders / "adapter", adapter)
    path = adapter / "adapter_model.safetensors"
    original = load_file(path)
    name = next(name for name in original if name.endswith("lora_A.weight"))
    for tensor, message in (
        (torch.zeros(3, original[name].shape[1]), "has rank 4, but in .* lora_A has shape"),
        (torch.zeros(0, original[name].shape[1]), "has rank 4, but in .* lora_A has shape"),
        (original[name].long(), "expected lora_A and lora_B of linear layers, found 1"),
        (torch.zeros(4, 7), "has a low-rank update of shape"),
    ):
        save_file({**original, name: tensor}, path)
        with pytest.raises(ConversionError, match=message):
            convert(folders / "base", tmp_path / "out", adapter=adapter, progress=False)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConversionError, match=r"adapter_model\.safetensors is not a complete safetensors file"):
        convert(folders / "base", tmp_path / "out", adapter=adapter, progress=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused(llava_lora, folders, tmp_path):
    _, lora, *_ = llava_lora
    with pytest.raises(ConversionError, match="an adapter without its model"):
        convert(lora, tmp_path / "out")
    tensors = load_file(folders / "adapter" / "adapter_model.safetensors")
    other = tmp_path / "other"
    shutil.copytree(folders / "adapter", other)
    tensors["base_model.model.model.language_model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=r"layers\.7\.mlp\.up_proj has lora_A only"):
        convert(folders / "base", tmp_path / "out", adapter=other)
    tensors["base_model.model.model.language_model.layers.7.mlp.up_proj.lora_B.weight"] = torch.zeros(48, 4)
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=r"layers\.7\.mlp\.up_proj is not a layer of"):
        convert(folders / "base", tmp_path / "out", adapter=other)
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out").exists()


# Heads that are tied to the embeddings


@pytest.fixture(params=[("llava", "text"), ("llava",), ("text",)], ids="-".join)
def tied(request, tmp_path):
    """A LLaVA with one weight for embeddings and head; the flag stands in its configuration, in that of the text."""
    weights = transformers_llava(tmp_path / "base").state_dict()
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    config["tie_word_embeddings"] = "llava" in request.param
    config["text_config"]["tie_word_embeddings"] = "text" in request.param
    path.write_text(json.dumps(config))
    weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    return tmp_path / "base"


def add_parts(folder, other):
    """Copy what ``save_pretrained`` of a model does not write."""
    for path in other.glob("*"):
        if not (folder / path.name).exists():
            shutil.copy(path, folder)


def is_tied(folder):
    model = IDAVLMForConditionalGeneration.from_pretrained(folder)
    is_same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings == model.config.text_config.tie_word_embeddings == is_same
    return is_same


def test_a_tied_head_stays_tied(tied, tmp_path):
    convert(tied, tmp_path / "out", progress=False)
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tied, LlavaForConditionalGeneration))
    assert is_tied(tmp_path / "out")
    weights = load_file(tied / "model.safetensors")  # some programs write the weight twice
    name = next(name for name in weights if "embed_tokens" in name)
    save_file({**weights, "lm_head.weight": weights[name].clone()}, tied / "model.safetensors", {"format": "pt"})
    convert(tied, tmp_path / "twice", progress=False)
    assert torch.equal(logits_of(tmp_path / "twice"), logits_of(tmp_path / "out"))
    assert is_tied(tmp_path / "twice")


@pytest.mark.filterwarnings("ignore:.*tied:UserWarning", "ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}],
    ids=["layers", "head", "embeddings"],
)
def test_adapters_of_tied_models_and_merged_checkpoints_load_equal(tied, options, tmp_path):
    """Where an adapter replaces the head or the embeddings, the other one stays as it was."""
    llava = LlavaForConditionalGeneration.from_pretrained(tied)
    tuned = get_peft_model(llava, LoraConfig(target_modules=["q_proj", "up_proj"], r=4, lora_alpha=8, **options))
    train(tuned, BATCH)
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload().eval()
    with torch.no_grad():
        expected = merged(**BATCH).logits
    merged.save_pretrained(tmp_path / "merged")
    add_parts(tmp_path / "merged", tied)
    convert(tied, tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    convert(tmp_path / "merged", tmp_path / "out-merged", progress=False)
    for out in (tmp_path / "out", tmp_path / "out-merged"):
        torch.testing.assert_close(logits_of(out), expected, atol=1e-5, rtol=1e-5)
        assert is_tied(out) == (not options)


def test_an_update_of_a_tied_head_is_no_update_of_the_embeddings(tied, tmp_path):
    llava = LlavaForConditionalGeneration.from_pretrained(tied)
    tuned = get_peft_model(llava, LoraConfig(target_modules=["lm_head"], r=4, lora_alpha=8))
    train(tuned, BATCH)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ConversionError, match="A head that is tied to the embeddings is no layer of its own"):
        convert(tied, tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    weights = load_file(tied / "model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    save_file({**weights, "lm_head.weight": weights[name].clone()}, tied / "model.safetensors", {"format": "pt"})
    convert(tied, tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(tmp_path / "out"), tuned.eval()(**BATCH).logits, atol=1e-5, rtol=1e-5)
