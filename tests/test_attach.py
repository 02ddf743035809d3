"""attach_id_former on tiny random models of every family: nothing changes at first, then only what it should."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from idavlm import IdentityProcessor, attach_id_former, detach_id_former, load_id_former, save_id_former
from idavlm.models import AttachedOutput
from idavlm.models.attach import IDENTITY_INPUTS
from idavlm.models.token_grids import token_grids
from idavlm.modules import ResidualIDFormer
from tests.vlm_families import FAMILIES, tiny_model, tiny_processor

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
WITHOUT_GRID = {"llava_next", "llava_onevision", "smolvlm", "idefics3", "ovis2"}
"""Families whose images are split into tiles here, or whose tokens are separated by newline tokens."""

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)
"""For families that are released without a chat template (PaliGemma)."""


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    sizes = {"kate": (40, 60), "kate_2": (64, 64), "tom": (60, 48), "scene": (64, 80), "other": (48, 64)}
    return {name: Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for name, size in sizes.items()}


def question(photos, text, *, scene="scene", **references):
    parts = [
        {"type": "identity", "name": name, "images": [photos[photo] for photo in names]}
        for name, names in references.items()
    ]
    return [
        {"role": "user", "content": [*parts, {"type": "image", "image": photos[scene]}, {"type": "text", "text": text}]}
    ]


def conversations(photos):
    """Two identities with three photos; a general image; one identity."""
    return [
        question(photos, "Where is Kate?", Kate=["kate", "kate_2"], Tom=["tom"]),
        question(photos, "What is this?", scene="other"),
        question(photos, "Is Tom here?", Tom=["tom"], scene="other"),
    ]


def encode(processor, messages):
    return dict(
        processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            padding=True,
            padding_side="left",
        )
    )


def without_identities(inputs):
    return {name: value for name, value in inputs.items() if name not in IDENTITY_INPUTS}


class Attached:
    """A family's model and processor, a batch, and the outputs before anything was attached."""

    def __init__(self, family, photos):
        self.family, self.photos = family, photos
        self.processor = IdentityProcessor(tiny_processor(family))
        self.processor.chat_template = self.processor.chat_template or TEMPLATE
        self.inputs = encode(self.processor, conversations(photos))
        self.original = without_identities(self.inputs)
        self.model = tiny_model(family).eval()
        with torch.no_grad():
            self.logits = self.model(**self.original).logits
            self.answers = [self.model.generate(**self.original, **GREEDY, num_beams=beams) for beams in (1, 2)]

    def randomise(self, std=0.5):
        torch.manual_seed(1)
        for parameter in self.model.id_former.parameters():
            torch.nn.init.normal_(parameter, std=std)
        return self


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def attached(family, photos):
    state = Attached(family, photos)
    attach_id_former(state.model, num_heads=4, hidden_size=32, identity_embedding="name")
    return state


@torch.no_grad()
def test_nothing_changes_at_attachment(attached):
    model, inputs = attached.model, attached.inputs
    assert inputs["image_roles"].tolist() == [0, 0, 0, 1, 2, 0, 1]
    assert torch.equal(model(**inputs).logits, attached.logits)
    assert torch.equal(model(**attached.original).logits, attached.logits)
    for beams in (1, 2):
        for arguments in (inputs, attached.original):
            assert torch.equal(model.generate(**arguments, **GREEDY, num_beams=beams), attached.answers[beams - 1])


@torch.no_grad()
def test_samples_do_not_change_at_attachment(attached):
    """The image token is excluded, but random numbers choose the same tokens."""
    # top_k would let another token in where the image token is among the k best.
    options = {**GREEDY, "do_sample": True, "top_k": 0, "num_return_sequences": 2}
    found = []
    for arguments in (attached.inputs, attached.original):
        torch.manual_seed(0)
        found.append(attached.model.generate(**arguments, **options))
    ids, original = (each[:, attached.inputs["input_ids"].shape[1] :] for each in found)
    has_image = (original == attached.model.config.image_token_id).any(1)
    assert has_image.sum() <= 2
    assert torch.equal(ids[~has_image], original[~has_image])


@torch.no_grad()
def test_the_image_token_is_not_generated(attached):
    """Not with identities; without them, the model does what it did before."""
    model, token = attached.randomise(0.02).model, attached.model.config.image_token_id
    wants_images = {"sequence_bias": {(token,): 1e4}, "max_new_tokens": 3, "min_new_tokens": 3}
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "top_k": 2}):
        answers = []
        for cache in (True, False):
            torch.manual_seed(0)
            ids = model.generate(**attached.inputs, **wants_images, **options, use_cache=cache)
            answers.append(ids[:, attached.inputs["input_ids"].shape[1] :])
        assert not any((answer == token).any() for answer in answers)
    length = attached.inputs["input_ids"].shape[1]
    assert (model.generate(**attached.original, **wants_images)[:, length:] == token).all()
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model.generate(**attached.original, **wants_images, use_cache=False)


@torch.no_grad()
def test_identities_change_their_own_rows_only(attached):
    model = attached.randomise().model
    logits = model(**attached.inputs).logits
    change = (logits - attached.logits).abs().amax((1, 2))
    assert (change > 1e-3).tolist() == [True, False, True]
    assert torch.equal(model(**attached.original).logits, attached.logits), "without identities nothing changes"
    # Other photos of Tom in the last row: the rows before stay as they are.
    other = conversations(attached.photos)
    other[2] = question(attached.photos, "Is Tom here?", Tom=["kate_2"], scene="other")
    tom, kate = encode(attached.processor, conversations(attached.photos)[2]), encode(attached.processor, other[2])
    rows = [model(**inputs).logits[0, -1] for inputs in (tom, kate)]
    assert not torch.allclose(*rows, atol=1e-4)
    torch.testing.assert_close(rows[0], logits[2, -1], atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_generation_with_and_without_cache_and_beams(attached):
    model = attached.randomise().model
    cached = model.generate(**attached.inputs, **GREEDY)
    assert torch.equal(cached, model.generate(**attached.inputs, **GREEDY, use_cache=False))
    beams = model.generate(**attached.inputs, **GREEDY, num_beams=2, num_return_sequences=2)
    for row, messages in enumerate(conversations(attached.photos)):
        alone = encode(attached.processor, messages)
        expected = model.generate(**alone, **GREEDY, num_beams=2, num_return_sequences=2)
        length = alone["input_ids"].shape[1]
        assert (
            expected[:, length:].tolist()
            == beams[2 * row : 2 * row + 2, attached.inputs["input_ids"].shape[1] :].tolist()
        )


def test_gradients_reach_the_attachment_and_nothing_else(attached):
    model = attached.randomise(std=0.1).model.train()
    labels = attached.inputs["input_ids"].clone()
    model(**{**attached.inputs, "labels": labels}).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"id_former.{name}" for name, _ in model.id_former.named_parameters()}


@torch.no_grad()
def test_saved_loaded_copied_detached(attached, tmp_path):
    model = attached.randomise().model
    logits = model(**attached.inputs).logits
    save_id_former(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"id_former.safetensors", "id_former.json"}
    copied = copy.deepcopy(model)
    for parameter in copied.id_former.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(model(**attached.inputs).logits, logits), "a copy has an ID-Former of its own"
    assert torch.equal(copied(**attached.inputs).logits, attached.logits)
    assert "ResidualIDFormer" in repr(model)
    detach_id_former(model)
    assert torch.equal(model(**attached.original).logits, attached.logits)
    assert not hasattr(model, "id_former")
    assert all(parameter.requires_grad for parameter in model.parameters())
    load_id_former(model, tmp_path)
    assert torch.equal(model(**attached.inputs).logits, logits)


def test_maps_and_losses(attached):
    model = attached.randomise(std=0.2).model
    inputs, num_images = attached.inputs, len(attached.inputs["image_roles"])
    output = model(**inputs, output_identity_maps=True)
    assert isinstance(output, AttachedOutput)
    (identity_map,) = output.identity_maps
    assert identity_map.shape == (int(inputs["num_image_tokens"].sum()), 3)
    torch.testing.assert_close(identity_map.sum(-1), torch.ones(len(identity_map)))
    boxes = {
        "original_image_sizes": torch.full((num_images, 2), 64),
        "boxes": torch.tensor([[0.0, 0.0, 32.0, 64.0], [32.0, 0.0, 64.0, 64.0], [0.0, 0.0, 64.0, 64.0]]),
        "box_image": torch.tensor([3, 3, 6]),
        "box_identity": torch.tensor([0, 1, 0]),
    }
    labels = inputs["input_ids"]
    output = model(**{**inputs, **boxes, "labels": labels})
    expected = 0 if attached.family in WITHOUT_GRID else 0.01
    assert output.identity_map_loss >= expected
    torch.testing.assert_close(output.loss, output.language_loss + output.auxiliary_loss)
    torch.testing.assert_close(output.language_loss, model(**{**inputs, "labels": labels}).loss)
    if attached.family not in WITHOUT_GRID:
        output.auxiliary_loss.backward()
        assert model.id_former.down_proj.weight.grad.abs().sum() > 0


def test_inputs_that_do_not_fit_are_named(attached):
    model, inputs = attached.model, attached.inputs
    with pytest.raises(ValueError, match="num_image_tokens is missing, but image_roles"):
        model(**{**inputs, "num_image_tokens": None})
    exchanged = {**inputs, "sample_index": torch.tensor([0, 0, 0, 0, 1, 1, 2])}
    with pytest.raises(ValueError, match=r"the rows of input_ids hold .* image placeholders, but by sample_index"):
        model(**exchanged)
    fewer = {name: inputs[name][:-1] for name in ("image_roles", "sample_index", "identity_index", "num_image_tokens")}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"image tokens|image placeholders"):
            call(**{**inputs, **fewer})
    with pytest.raises(ValueError, match="already has an id_former"):
        attach_id_former(model)


# --- One family is enough --------------------------------------------------------------------------------------------


@pytest.fixture
def llava(photos):
    state = Attached("llava", photos)
    attach_id_former(state.model, num_heads=4)
    return state


def test_a_model_is_pickled(llava):
    fresh = tiny_model("llava").eval()
    attach_id_former(fresh, num_heads=4, gate="none")
    expected = fresh(**llava.inputs).logits
    fresh = tiny_model("llava").eval()  # a forward pass leaves hooks of transformers that cannot be pickled
    torch.manual_seed(0)
    attach_id_former(fresh, num_heads=4, gate="none")
    loaded = pickle.loads(pickle.dumps(fresh))
    assert torch.equal(loaded(**llava.inputs).logits, fresh(**llava.inputs).logits)
    assert loaded.forward.owner is loaded
    assert expected.shape == loaded(**llava.inputs).logits.shape
    torch.save(loaded.state_dict(), io.BytesIO())


def test_peft_below_and_above_the_attachment(photos, tmp_path):
    """LoRA on the language model; the ID-Former is trained and saved in full by modules_to_save."""
    from peft import LoraConfig, get_peft_model

    state = Attached("llava", photos)
    attach_id_former(state.model, num_heads=4)
    config = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", modules_to_save=["id_former"])
    model = get_peft_model(state.model, config)
    assert torch.equal(model(**state.inputs).logits, state.logits)
    model(**state.inputs, labels=state.inputs["input_ids"]).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert sum("id_former.modules_to_save" in name for name in trained) == len(list(tiny_id_former().parameters()))
    assert any("lora_B" in name for name in trained)
    assert not any("original_module" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        logits = model(**state.inputs).logits
        assert not torch.allclose(logits, state.logits)
        save_id_former(model, tmp_path)
        other = tiny_model("llava").eval()
        load_id_former(other, tmp_path)
        torch.testing.assert_close(other(**state.inputs).logits, logits)


def tiny_id_former():
    return ResidualIDFormer(token_size=64, num_heads=4)


def test_lora_that_leaves_the_attachment_out_is_warned_about(photos):
    """peft freezes everything but LoRA: a fresh ID-Former would stay at its random start."""
    from peft import LoraConfig, get_peft_model

    state = Attached("llava", photos)
    attach_id_former(state.model, num_heads=4)
    model = get_peft_model(state.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.train()
    with pytest.warns(UserWarning, match=r"id_former is frozen.*modules_to_save=\['id_former'\]"):
        model(**state.inputs, labels=state.inputs["input_ids"])


def test_identity_embeddings_alone_are_no_frozen_attachment(photos):
    """With the output projections frozen at zero, the identity embeddings still act and are trained."""
    state = Attached("llava", photos)
    attach_id_former(state.model, num_heads=4, gate="none", identity_embedding="learned", max_identities=4)
    attention = state.model.id_former.identity_layers[0].attention
    torch.nn.init.zeros_(attention.out_proj.weight)
    attention.out_proj.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.model.train()(**state.inputs, labels=state.inputs["input_ids"]).loss.backward()
    assert state.model.id_former.identity_embedding.weight.grad.abs().sum() > 0


def test_bfloat16_and_checkpointing(photos):
    state = Attached("qwen2_5_vl", photos)
    model = state.model.bfloat16().train()
    expected = model(**state.original).logits
    attach_id_former(model, num_heads=4, dtype=torch.float32)
    model.gradient_checkpointing_enable()
    assert torch.equal(model(**state.inputs).logits, expected)
    model(**state.inputs, labels=state.inputs["input_ids"]).loss.backward()
    assert model.id_former.identity_layers[0].attention.out_proj.weight.grad.abs().sum() > 0


def test_compiled_equals_eager(llava):
    model = llava.randomise().model
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**llava.inputs).logits, model(**llava.inputs).logits)


def test_deepstack_features_have_a_residual_of_their_own(photos):
    state = Attached("qwen3_vl", photos)
    attach_id_former(state.model, num_heads=4, residual_on="all_features")
    with torch.no_grad():
        assert torch.equal(state.model(**state.inputs).logits, state.logits)
        assert len(state.model.id_former.deepstack) > 0
        for parameter in state.model.id_former.deepstack.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        assert not torch.allclose(state.model(**state.inputs).logits, state.logits)
    with pytest.raises(ValueError, match=r"residual_on='all_features', but Llava.* has no DeepStack features"):
        attach_id_former(tiny_model("llava"), num_heads=4, residual_on="all_features")


def test_a_model_without_image_features_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no get_image_features"):
        attach_id_former(LlamaForCausalLM(config))


def test_an_id_former_of_another_model_is_refused(llava, tmp_path):
    save_id_former(llava.model, tmp_path)
    torch.manual_seed(5)
    other = type(llava.model)(llava.model.config)
    with pytest.raises(ValueError, match="belongs to another llava model: the embeddings differ"):
        load_id_former(other, tmp_path)
    with pytest.raises(ValueError, match="model_type='llava', but this model has 'qwen2_vl'"):
        load_id_former(tiny_model("qwen2_vl"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"id_former\.json does not exist"):
        load_id_former(tiny_model("llava"), tmp_path / "nowhere")
    half = llava.model.half()
    load_id_former(detach_id_former(half), tmp_path)  # another precision of the same model


def test_grids_are_those_of_the_released_layouts():
    """Rows and columns where the tokens form a grid; None for tiles and newline tokens."""
    config = tiny_model("llava").config
    entries = [torch.zeros(16, 4)] * 2
    assert token_grids(config, (16, 16), entries, {}) == ((4, 4), (4, 4))
    config = tiny_model("internvl").config
    assert token_grids(config, (4, 12), torch.zeros(4, 4, 8), {}) == ((2, 2), None)
    config = tiny_model("qwen2_5_vl").config
    grids = {"image_grid_thw": torch.tensor([[1, 4, 8], [2, 4, 4]])}
    assert token_grids(config, (8, 8), [], grids) == ((2, 4), None)
    assert token_grids(tiny_model("llava_next").config, (40,), [torch.zeros(40, 4)], {}) == (None,)
