"""Packing changes the rows of a batch and nothing else: losses, gradients and tokens of samples stay the same."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    OPTConfig,
    Qwen3NextConfig,
    masking_utils,
    modeling_flash_attention_utils,
)

from idavlm import DualDataLoader, IDTrainingArguments, attach_id_former, parse_sample
from idavlm.data import PackingCollator
from idavlm.data.packing import assign_rows, tokens_of_samples, unpack
from idavlm.models.packed_attention import packed_rows
from idavlm.modules import use_workflow
from tests.conftest import randomise
from tests.distributed_run import build, exact_loss, read
from tests.interrupted_run import write_data
from tests.small_models import record, small_model
from tests.test_identity_processor import CHAT_FAMILIES
from tests.test_identity_processor import processor as identity_processor
from tests.vlm_families import tiny_model

PEOPLE = [("Kate", "Tom"), ("Tom",), ("Tom", "Kate"), ("Kate",)]
NO_MODEL_INPUTS = ("source", "sample_ids")


def records(root):
    """Four identity samples of different lengths, a general one with an image and one of text alone."""
    found = [
        parse_sample(record(number, people=people), where="t:1", image_root=root)
        for number, people in enumerate(PEOPLE)
    ]
    turns = [[{"type": "image", "image": "other.png"}, {"type": "text", "text": "What is it?"}], "What is Tom doing?"]
    for number, content in enumerate(turns):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Tom is waving."}]
        entry = {"id": f"g{number}", "source": "general", "messages": messages}
        found.append(parse_sample(entry, where="t:1", image_root=root))
    return found


def encoded(processor, samples):
    return [{"id": sample.id, "source": sample.source, **processor.encode(sample)} for sample in samples]


def packing(processor, max_length=None):
    return PackingCollator(processor.collate, pad_token_id=processor.tokenizer.pad_token_id, max_length=max_length)


def row_lengths(samples):
    """One row, and rows that hold a few samples each."""
    return None, 2 * max(len(sample["input_ids"]) for sample in samples)


def losses_and_gradients(model, batch):
    model.zero_grad()
    output = model(**{name: value for name, value in batch.items() if name not in NO_MODEL_INPUTS})
    output.loss.backward()
    losses = {name: output[name].detach() for name in ("loss", "identity_map_loss") if output.get(name) is not None}
    return losses | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected, *, tolerance=1e-10):
    assert found.keys() == expected.keys()
    assert max(value.abs().max() for value in expected.values()) > 0.01
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


# --- Rows ------------------------------------------------------------------------------------------------------------


def test_rows_hold_each_sample_once_within_the_limit():
    generator = torch.Generator().manual_seed(0)
    for number in range(50):
        lengths = torch.randint(1, 100, (1 + number,), generator=generator).tolist()
        for max_length in (max(lengths), 2 * max(lengths), 1000):
            rows = assign_rows(lengths, max_length)
            assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
            of_rows = [sum(lengths[sample] for sample in row) for row in rows]
            assert max(of_rows) <= max_length
            assert len(rows) <= 1 + 2 * sum(lengths) // max_length, "first fit leaves at most one row half empty"
            assert all(row == sorted(row) for row in rows)


def test_rows_have_nearly_equal_lengths():
    lengths = torch.randint(5, 60, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = assign_rows(lengths, 200)
    of_rows = [sum(lengths[sample] for sample in row) for row in rows]
    assert 1 - sum(lengths) / (len(rows) * max(of_rows)) < 0.03


def test_without_a_limit_there_is_one_row_in_the_order_of_the_samples():
    assert assign_rows([3, 9, 1], None) == [[0, 1, 2]]


def test_a_packed_batch_has_the_tokens_of_its_samples(root, processor):
    samples = encoded(processor, records(root))
    longest = max(len(sample["input_ids"]) for sample in samples)
    collator = packing(processor, longest + 1)
    batch = collator(samples)
    assert batch["input_ids"].shape[0] < len(samples)
    assert "attention_mask" not in batch
    order = collator.order(samples)
    assert batch["sample_ids"] == [samples[number]["id"] for number in order]
    for place, number in enumerate(order):
        sample, own = samples[number], batch["token_sample_index"] == place
        for name in ("input_ids", "token_identity_index", "name_mask"):
            assert torch.equal(batch[name][own], sample[name]), name
        assert batch["position_ids"][own].tolist() == list(range(len(sample["input_ids"])))
        assert torch.equal(batch["labels"][own][1:], sample["labels"][1:])
        assert batch["labels"][own][0] == -100
        images = batch["sample_index"] == place
        assert torch.equal(
            batch["pixel_values"][images], sample["pixel_values"].reshape(-1, *batch["pixel_values"].shape[1:])
        )
    padding = batch["token_sample_index"] < 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert (batch["input_ids"][padding] == processor.tokenizer.pad_token_id).all()
    assert ((batch["position_ids"] == 0).sum() == len(samples) + padding.any(1).sum()).item()


def test_one_sample_is_one_row_without_padding(root, processor):
    samples = encoded(processor, records(root)[:1])
    batch = packing(processor, 1000)(samples)
    assert torch.equal(batch["input_ids"][0], samples[0]["input_ids"])
    assert (batch["token_sample_index"] == 0).all()


def test_a_sample_longer_than_a_row_is_an_error_that_names_it(root, processor):
    samples = encoded(processor, records(root))
    with pytest.raises(ValueError, match=r"sample '0' has \d+ tokens, more than max_length=12, .* raise max_length"):
        packing(processor, 12)(samples)


def test_faults_of_samples_and_collators(root, processor):
    samples = encoded(processor, records(root)[:2])
    with pytest.raises(ValueError, match="samples is empty"):
        packing(processor)([])
    with pytest.raises(ValueError, match="sample '0' has no tokens"):
        packing(processor)([samples[0] | {"input_ids": samples[0]["input_ids"][:0]}])
    with pytest.raises(ValueError, match="returned no attention_mask"):
        PackingCollator(lambda samples: {"input_ids": samples[0]["input_ids"]}, pad_token_id=0)(samples)
    with pytest.raises(ValueError, match="must keep each sample in a row of its own"):
        PackingCollator(lambda samples: processor.collate(samples[:1]), pad_token_id=0)(samples)
    with pytest.raises(ValueError, match="pad_token_id=None must be an integer"):
        PackingCollator(processor.collate, pad_token_id=None)


def test_unpacking_restores_the_samples(root, processor):
    samples = encoded(processor, records(root))
    collator = packing(processor, 2 * max(len(sample["input_ids"]) for sample in samples))
    batch = collator(samples)
    tokens = tokens_of_samples(batch["token_sample_index"])
    padded = processor.collate([samples[number] for number in collator.order(samples)])
    pad = processor.tokenizer.pad_token_id
    assert torch.equal(unpack(batch["input_ids"], tokens, pad), padded["input_ids"])
    assert torch.equal((tokens >= 0).long(), padded["attention_mask"])


@pytest.mark.parametrize("index", [[[1, 1, 0]], [[0, 1, 0]], [[0, 2, 2]], [[0, 0], [0, 1]], [[0, -1, 0]]])
def test_samples_must_be_numbered_in_the_order_of_the_rows(index):
    with pytest.raises(ValueError, match="token_sample_index does not number the samples"):
        tokens_of_samples(torch.tensor(index))


# --- Losses and gradients --------------------------------------------------------------------------------------------


def own_model(processor, **options):
    model = small_model(processor, **options).double().train()
    model.loss_function = exact_loss
    model.vision_tower.eval().requires_grad_(False)  # statistics of batch norms depend on the order of the images
    return model


OPTIONS = {
    "none": {},
    "learned": {"identity_embedding": "learned", "max_identities": 2},
    "name": {"identity_embedding": "name"},
    "images": {"max_images": 4},
    "contrast": {"contrastive_loss_weight": 0.5},
    "resampler": {"connector": "resampler"},
}


@pytest.mark.parametrize(("options", "attention"), [*((options, "sdpa") for options in OPTIONS), ("name", "eager")])
def test_losses_and_all_gradients_are_those_of_the_padded_batch(root, processor, options, attention):
    samples = encoded(processor, records(root))
    model = own_model(processor, **OPTIONS[options])
    model.language_model.set_attn_implementation(attention)
    expected = losses_and_gradients(model, processor.collate(samples))
    assert ("identity_map_loss" in expected) == (options != "resampler")
    for max_length in row_lengths(samples):
        assert_equal(losses_and_gradients(model, packing(processor, max_length)(samples)), expected)


@pytest.mark.parametrize("adaptors", [{"composition": "serial"}, {"composition": "parallel"}, {"rank": 4}])
def test_inner_adaptors_on_packed_rows(root, processor, adaptors):
    samples = encoded(processor, records(root))
    options = {"layers": [0, 1], "workflows": ["grounding"], "modules_to_copy": [], **adaptors}
    model = own_model(processor, inner_adaptors=options)
    randomise(model.language_model.inner_adaptor)
    with use_workflow(model, "grounding"):
        expected = losses_and_gradients(model, processor.collate(samples))
        assert any("inner_adaptor" in name for name in expected)
        for max_length in row_lengths(samples):
            assert_equal(losses_and_gradients(model, packing(processor, max_length)(samples)), expected)


def test_gradient_checkpointing_on_packed_rows(root, processor):
    samples = encoded(processor, records(root))
    model = own_model(processor, identity_embedding="learned", max_identities=2)
    expected = losses_and_gradients(model, processor.collate(samples))
    model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(losses_and_gradients(model, packing(processor, row_lengths(samples)[1])(samples)), expected)


def test_no_token_sees_another_sample(root, processor):
    """Bit by bit: other tokens and other pixels in one sample change no logit of the others."""
    samples = encoded(processor, records(root))
    model = own_model(processor, identity_embedding="name").float().eval()
    changed = [dict(sample) for sample in samples]
    changed[0]["pixel_values"] = changed[0]["pixel_values"].flip(-1) + 1.0
    text = changed[0]["input_ids"] != processor.image_token_id
    changed[0]["input_ids"] = changed[0]["input_ids"].where(~text, (changed[0]["input_ids"] + 7) % 200)
    for max_length in row_lengths(samples):
        collator = packing(processor, max_length)
        logits = []
        for batch in (collator(samples), collator(changed)):
            batch = {name: value for name, value in batch.items() if name not in NO_MODEL_INPUTS}
            logits.append(model(**batch).logits)
        own = batch["token_sample_index"] == collator.order(samples).index(0)
        assert not torch.equal(logits[0][own], logits[1][own])
        others = ~own & (batch["token_sample_index"] >= 0)
        assert torch.equal(logits[0][others], logits[1][others])


# --- Models of transformers ------------------------------------------------------------------------------------------

REFUSED = {
    "qwen3_5": "packing: Qwen3_5TextModel has recurrent layers, whose state would pass",
}
if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # not in transformers 5.17, which packs Gemma 3
    REFUSED["gemma3"] = "loses the attention between the tokens of an image .* Gemma3ForConditionalGeneration"


def family_samples(processor, root):
    """Samples whose scenes have different sizes, so that dynamic resolutions differ."""
    return encoded(processor, records(root)[:5])


def attached(family, **options):
    model = attach_id_former(
        tiny_model(family), num_heads=4, hidden_size=32, identity_embedding="name", freeze_model=False
    )
    model.loss_function = loss_in_float64
    torch.nn.init.constant_(model.id_former.identity_embedding_gate, 0.5)
    return model.double()


def loss_in_float64(logits, labels, vocab_size, **_):
    return F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), ignore_index=-100)


@pytest.mark.parametrize("family", [family for family in CHAT_FAMILIES if family not in REFUSED])
def test_attached_families_on_packed_rows(family, root):
    processor = identity_processor(family)
    samples = family_samples(processor, root)
    model = attached(family)
    if family == "qwen3_vl_moe":
        model.set_experts_implementation("eager")  # the other takes no float64
    for max_length in row_lengths(samples)[0 if family == "llava" else 1 :]:
        collator = packing(processor, max_length)
        ordered = [samples[number] for number in collator.order(samples)]  # identity maps are summed in float32
        expected = losses_and_gradients(model, processor.collate(ordered))
        assert any("id_former" in name for name in expected)
        tolerance = 1e-7 if family == "gemma3" else 1e-10  # its norms compute in float32
        assert_equal(losses_and_gradients(model, collator(samples)), expected, tolerance=tolerance)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_be_packed_are_refused_by_name(family, root, tmp_path):
    processor = identity_processor(family)
    samples = family_samples(processor, root)
    model = attached(family)
    with pytest.raises(ValueError, match=REFUSED[family] + r".*packing=False"):
        losses_and_gradients(model, packing(processor)(samples))
    options = {"trainer": {"processing_class": processor}, "packing": True}
    with pytest.raises(ValueError, match=REFUSED[family]):
        build(tmp_path, samples, batch_size=2, accumulation=1, model=model, **options)


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
SIZES |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
WINDOW = {"sliding_window": 4, "head_dim": 8}
LANGUAGE_MODELS = {
    "llama": LlamaConfig(**SIZES),
    "mistral, sliding window": MistralConfig(**SIZES, **WINDOW),
    "gemma3, sliding window": Gemma3TextConfig(**SIZES, **WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "cohere2, sliding window": Cohere2Config(**SIZES, **WINDOW),
    "gpt2, learned positions": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=None, bos_token_id=None
    ),
}


def packed_text():
    """Three sequences in two rows, with padding at the end of the second row, and each by itself."""
    lengths, pieces = [9, 7, 12], []
    for length in lengths:
        pieces.append(torch.randint(1, 64, (1, length), generator=torch.Generator().manual_seed(length)))
    samples = [{"input_ids": piece[0], "labels": piece[0]} for piece in pieces]

    def collate(samples):
        rows = [sample["input_ids"] for sample in samples]
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
        padded = pad(rows, batch_first=True)
        return {"input_ids": padded, "labels": padded, "attention_mask": mask}

    return PackingCollator(collate, pad_token_id=0, max_length=17)(samples), pieces


def logits_of_packed_text(model):
    batch, _ = packed_text()
    index = batch["token_sample_index"]
    assert index.shape == (2, 16)
    assert (index < 0).any()
    with packed_rows(model, index, batch) as of_rows:
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **of_rows).logits, index


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_compute_each_sample_as_if_it_were_alone(name, attention):
    model = AutoModelForCausalLM.from_config(LANGUAGE_MODELS[name], attn_implementation=attention).double().eval()
    logits, index = logits_of_packed_text(model)
    tolerance = 1e-10 if attention == "sdpa" else 1e-5  # the softmax of "eager" has float32
    for sample, piece in enumerate(packed_text()[1]):
        torch.testing.assert_close(logits[index == sample], model(piece).logits[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, head_dim=16, num_heads=4),
            "Mamba2Model has recurrent",
        ),
        (Qwen3NextConfig(**SIZES, linear_num_value_heads=4, linear_num_key_heads=2), "Qwen3NextModel has recurrent"),
        (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "BloomModel takes no position_ids"),
        (
            OPTConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
            ),
            "the layer OPTDecoderLayer of OPTDecoder is not told which tokens",
        ),
    ],
    ids=["mamba2", "qwen3_next", "bloom", "opt"],
)
def test_language_models_that_would_mix_samples_are_refused_by_name(config, message):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message + r".*packing=False"):
        logits_of_packed_text(model.to_empty(device="cpu"))


def test_a_cache_is_refused():
    """With a cache, transformers does not recognise packed rows."""
    model = AutoModelForCausalLM.from_config(LANGUAGE_MODELS["llama"])
    batch, _ = packed_text()
    for name, value in (("use_cache", True), ("attention_mask", torch.ones(2, 16))):
        rows = packed_rows(model, batch["token_sample_index"], {**batch, name: value})
        with pytest.raises(ValueError, match=f"{name} cannot be combined with token_sample_index"), rows:
            pass
    rows = packed_rows(model, batch["token_sample_index"], {})
    with pytest.raises(ValueError, match="needs position_ids"), rows:
        pass


def test_layers_without_a_mask_of_samples_are_found():
    """A model that ignores position_ids in its mask, as with a cache, is an error and no silent mixture."""
    model = AutoModelForCausalLM.from_config(LANGUAGE_MODELS["llama"])
    batch, _ = packed_text()
    ids, index = batch["input_ids"], batch["token_sample_index"]
    message = "the layer LlamaDecoderLayer of LlamaModel is not told which tokens"
    with packed_rows(model, index, batch), pytest.raises(ValueError, match=message):
        model(input_ids=ids, position_ids=batch["position_ids"], use_cache=True)
    leaky = torch.ones(2, 1, 16, 16, dtype=torch.bool).tril()
    with packed_rows(model, index, batch), pytest.raises(ValueError, match=message):
        model(input_ids=ids, position_ids=batch["position_ids"], attention_mask=leaky, use_cache=False)


# --- Flash attention -------------------------------------------------------------------------------------------------


def reference_flash(query, key, value, *, softmax_scale, lengths=None):
    """Causal attention of sequences ``[B, T, H, D]`` one by one; ``lengths`` splits a packed row."""
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, 2) for x in (key, value))
    pieces = [x.transpose(1, 2).split(lengths or [x.shape[1]], 2) for x in (query, key, value)]
    found = [
        F.scaled_dot_product_attention(*piece, is_causal=True, scale=softmax_scale)
        for piece in zip(*pieces, strict=True)
    ]
    return torch.cat(found, 2).transpose(1, 2)


@pytest.fixture
def flash_attention(monkeypatch):
    """transformers' own flash attention path, with textbook attention in place of the kernels."""
    calls = []

    def plain(query, key, value, **options):
        calls.append("plain")
        return reference_flash(query, key, value, **options)

    def varlen(query, key, value, *, cu_seqlens_q, cu_seqlens_k, **options):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        calls.append("varlen")
        lengths = cu_seqlens_q.diff().tolist()
        return reference_flash(query[None], key[None], value[None], lengths=lengths, **options)[0]

    def options(*, softmax_scale, **_):
        return {"softmax_scale": softmax_scale}

    has_paged = hasattr(modeling_flash_attention_utils, "_process_with_kvcache_kwargs_fn")  # not in transformers 5.17
    functions = (plain, varlen, None, None, None), (options, None) if has_paged else options
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_: functions)
    return calls


def test_flash_attention_gets_the_lengths_of_the_samples(root, processor, flash_attention):
    samples = encoded(processor, records(root))
    model = own_model(processor, identity_embedding="name")
    expected = losses_and_gradients(model, processor.collate(samples))
    model.language_model.config._attn_implementation = "flash_attention_2"
    assert_equal(losses_and_gradients(model, packing(processor)(samples)), expected)
    assert set(flash_attention) == {"varlen"}
    assert flash_attention


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_flash_attention_in_the_language_model_of_a_family(family, root, flash_attention):
    processor = identity_processor(family)
    samples = family_samples(processor, root)
    model = attached(family)
    expected = losses_and_gradients(model, processor.collate(samples))
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    assert_equal(losses_and_gradients(model, packing(processor)(samples)), expected)
    assert set(flash_attention) == {"varlen"}


def test_flash_attention_needs_one_row(root, processor, flash_attention, tmp_path):
    """transformers recognises packed rows for flash attention in batches of one row only."""
    samples = encoded(processor, records(root))
    model = own_model(processor)
    model.language_model.config._attn_implementation = "flash_attention_2"
    longest = max(len(sample["input_ids"]) for sample in samples)
    message = r"max_length=\d+: with attn_implementation='flash_attention_2'.* leave max_length out"
    with pytest.raises(ValueError, match=message):
        losses_and_gradients(model, packing(processor, longest)(samples))
    with pytest.raises(ValueError, match=message):
        build(tmp_path, samples, batch_size=2, accumulation=1, model=model, packing=True, max_length=longest)


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def gradients_of_run(folder, dataset, **options):
    trainer, seen = build(folder, dataset, **options)
    trainer.train()
    return seen.steps, [entry for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.parametrize(("max_length", "batch_size", "accumulation"), [(None, 8, 1), (200, 4, 2)])
def test_training_on_packed_rows_has_the_same_gradients(data, tmp_path, max_length, batch_size, accumulation):
    """Rows hold samples of both sources, whose losses have different weights."""
    identity, general = read(data, "train"), read(data, "general")
    samples = [identity[0], general[0], identity[1], general[1], general[2], identity[2], identity[3], general[3]]
    split = {"batch_size": batch_size, "accumulation": accumulation}
    (expected,), (logged,), _ = gradients_of_run(tmp_path / "padded", samples, **split)
    (found,), (entry,), _ = gradients_of_run(tmp_path / "packed", samples, packing=True, max_length=max_length, **split)
    assert_equal(found, expected)
    for name in ("loss", "loss_identity", "loss_general", "identity_map_loss"):
        assert entry[name] == pytest.approx(logged[name], rel=1e-6), name


@pytest.mark.parametrize("mode", ["joint", "interleave"])
def test_both_loaders_pack(data, tmp_path, mode):
    """In joint batches the samples of a row are of both sources; each token counts for its own."""
    identity, general = read(data, "train"), read(data, "general")
    options = {"batch_size": 4, "accumulation": 1, "mixing_mode": mode, "max_steps": 2}
    options |= {"mixing_ratio": 0.1 if mode == "joint" else 0.5, "trainer": {"general_dataset": general}}
    expected, logged, _ = gradients_of_run(tmp_path / "padded", identity, **options)
    found, entries, trainer = gradients_of_run(tmp_path / "packed", identity, packing=True, max_length=200, **options)
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)
    for entry, other in zip(entries, logged, strict=True):
        assert entry.keys() == other.keys()
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert any("loss_general" in entry for entry in entries)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch
    own = ["identity", "general"].index
    if mode == "joint":
        order = [own("general" if name.startswith("g") else "identity") for name in batch["sample_ids"]]
        assert batch["sample_source"].tolist() == order
        assert order != sorted(order), "packing has changed the order"


def test_a_packed_joint_batch_of_the_dual_loader_knows_the_source_of_each_sample(data, processor):
    loaders = [
        DataLoader(read(data, name), batch_size=3, collate_fn=packing(processor, 200)) for name in ("train", "general")
    ]
    batch = next(iter(DualDataLoader(*loaders, mode="joint")))
    expected = [int(name.startswith("g")) for name in batch["sample_ids"]]
    assert batch["sample_source"].tolist() == expected
    assert sorted(expected) == [0, 0, 0, 1, 1, 1]


def test_a_model_of_transformers_as_it_is_trains_on_packed_rows(root, tmp_path):
    """Without an ID-Former: IDTrainer passes the positions on, here in three dimensions."""
    processor = identity_processor("qwen2_5_vl")
    samples = encoded(processor, records(root)[4:] * 2)
    runs = []
    for packed in (False, True):
        model = tiny_model("qwen2_5_vl").double()
        model.loss_function = loss_in_float64
        options = {"trainer": {"processing_class": processor}, "packing": packed}
        (gradients,), _, _ = gradients_of_run(
            tmp_path / str(packed), samples, batch_size=4, accumulation=1, model=model, **options
        )
        runs.append(gradients)
    assert_equal(runs[1], runs[0])


def test_evaluation_is_not_packed(data, tmp_path):
    samples = [*read(data, "train")][:3]
    found = []
    for packed in (False, True):
        trainer, _ = build(
            tmp_path, samples, batch_size=2, accumulation=1, packing=packed, trainer={"eval_dataset": samples}
        )
        assert "attention_mask" in next(iter(trainer.get_eval_dataloader()))
        found.append({name: value for name, value in trainer.evaluate().items() if "loss" in name})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 100}, "max_length=100 is the length of packed rows and has no effect without packing"),
        ({"packing": True, "max_length": 0}, "max_length=0 must be an integer of at least 1"),
        ({"packing": True, "stage": "identity_pretraining"}, "packing=True has no effect with stage="),
    ],
)
def test_options_that_cannot_take_effect(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        IDTrainingArguments(str(tmp_path), use_cpu=True, **options)


def test_packing_needs_a_padding_token(data, tmp_path):
    collate = {"processing_class": None, "data_collator": lambda samples: samples}
    with pytest.raises(ValueError, match="packing=True needs the padding token of a tokenizer"):
        build(tmp_path, read(data, "train"), batch_size=2, accumulation=1, packing=True, trainer=collate)
