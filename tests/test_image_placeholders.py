"""Image placeholders and image tokens: every row has the tokens of its own images, also when a cache is continued."""

import copy

import pytest
import torch
from PIL import Image

from idavlm import parse_sample
from idavlm._compat import cache_name
from idavlm.models.placeholders import rows_of_images, unread_images
from tests.small_models import record, sample, small_model, small_processor

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
ROWS = torch.tensor([[True, True, False, True, True], [False] * 5, [True, True, False, False, False]])


@pytest.fixture(scope="module")
def model(processor):
    return small_model(processor, identity_embedding="learned", max_identities=2)


def prompt(processor, *samples, padding_side="left"):
    encoded = [processor.encode(each, add_generation_prompt=True) for each in samples]
    batch = processor.collate(encoded, padding_side=padding_side)
    unused = ("labels", "source", "boxes", "box_image", "box_identity", "image_sizes")
    return {name: value for name, value in batch.items() if name not in unused}


# --- Rows ------------------------------------------------------------------------------------------------------------


def test_all_images_are_unread_without_a_cache():
    assert unread_images(ROWS, torch.tensor([0, 0, 2]), 2) is None


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([0, 2, 2], r"row 0 of input_ids holds 4 image placeholders but there are 2 image tokens \(1 images of 2\)"),
        ([0, 0, 1], r"row 1 of input_ids holds 0 image placeholders but there are 2 image tokens"),
        ([0, 0], r"row 2 of input_ids holds 2 image placeholders but there are 0 image tokens"),
        ([0, 0, 3], r"sample_index\[2\]=3 is out of range; input_ids has 3 rows"),
        ([0, 0, -1], r"sample_index\[2\]=-1 is out of range"),
        ([0, 2, 0], r"sample_index\[2\]=0 follows 2; sort the images"),
    ],
)
@pytest.mark.parametrize("is_continued", [False, True])
def test_images_of_another_row_are_named(samples, message, is_continued):
    if is_continued and "holds 0 image placeholders" in message:
        return  # these images have been read before
    with pytest.raises(ValueError, match=message):
        unread_images(ROWS, torch.tensor(samples), 2, is_continued=is_continued)


def test_with_a_cache_the_last_images_of_a_row_are_unread():
    unread = unread_images(ROWS, torch.tensor([0, 0, 0, 1, 2, 2]), 2, is_continued=True)
    assert unread.tolist() == [1, 2, 5]
    assert unread_images(ROWS[1:2], torch.tensor([0, 0]), 2, is_continued=True).tolist() == []


def test_without_sample_index_the_placeholders_tell_the_rows():
    assert rows_of_images(ROWS, 3, 2).tolist() == [0, 0, 2]
    assert rows_of_images(ROWS[1:2], 0, 2).tolist() == []
    for images, tokens in ((2, 2), (4, 2), (2, 3)):
        with pytest.raises(ValueError, match=r"hold \[4, 0, 2\] image placeholders but there are"):
            rows_of_images(ROWS, images, tokens)


@pytest.mark.parametrize("connector", ["id_former", "resampler"])
def test_a_model_does_not_read_images_of_another_row(processor, root, connector):
    """The number of all placeholders equals that of all image tokens; the rows are exchanged."""
    model = small_model(processor, connector=connector)
    inputs = prompt(processor, sample(root, answer=False), sample(root, people=("Kate",), answer=False))
    if connector == "resampler":
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "sample_index")}
    model(**inputs)
    assert inputs["sample_index"].tolist() == [0, 0, 0, 1, 1]
    inputs["sample_index"] = torch.tensor([0, 0, 1, 1, 1])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"row 0 of input_ids holds 12 image placeholders but there are 8 image"):
            call(**inputs)


# --- Placeholders without images -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str
)
def test_generation_without_the_images_of_its_placeholders_is_refused(model, processor, root, options):
    inputs = prompt(processor, sample(root, answer=False))
    model.generate(**inputs, **GREEDY, **options)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"(12|24) image placeholders but 0 images"):
        model.generate(**inputs, **GREEDY, **options)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_the_placeholder_is_never_generated(processor, root, options):
    model = small_model(processor)
    favourite = processor.image_token_id
    model.language_model.lm_head = torch.nn.Linear(32, len(processor.tokenizer))
    torch.nn.init.zeros_(model.language_model.lm_head.weight)
    with torch.no_grad():
        model.language_model.lm_head.bias.fill_(0).index_fill_(0, torch.tensor([favourite]), 50.0)
    inputs = prompt(processor, sample(root, answer=False))
    new = model.generate(**inputs, **{**GREEDY, **options})[:, inputs["input_ids"].shape[1] :]
    assert not (new == favourite).any()


# --- Conversations that go on with their cache -----------------------------------------------------------------------


def conversation(root):
    """A question about a scene with references, its answer, and a question about another scene."""
    whole = record()
    question = [{"type": "image", "image": "other.png"}, {"type": "text", "text": "And here?"}]
    answer = {"role": "assistant", "content": "Kate is here."}
    messages = [whole["messages"][0], answer, {"role": "user", "content": question}]
    return {**whole, "messages": messages, "type": "qa_single", "answer": "x", "boxes": []}


def parsed(entry, root):
    return parse_sample(entry, where="t:1", image_root=root)


@pytest.fixture(scope="module")
def turns(processor, root):
    """Inputs of the first turn with its answer, and of both turns."""
    whole = conversation(root)
    answered = {**whole, "messages": whole["messages"][:2]}
    for name in ("type", "answer"):
        answered.pop(name)
    start = processor.collate([processor.encode(parsed(answered, root))])
    both = prompt(processor, parsed(whole, root))
    length = start["input_ids"].shape[1]
    assert torch.equal(both["input_ids"][:, :length], start["input_ids"])
    return {name: start[name] for name in both}, both


def filled_cache(model, start):
    with torch.no_grad():
        return model(**start, use_cache=True)[cache_name()]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_new_scene_is_read_although_the_cache_is_filled(model, turns, num_beams):
    """The answer equals that of the whole conversation without a cache, and depends on the new scene."""
    start, both = turns
    options = {**GREEDY, "num_beams": num_beams, "output_scores": True, "return_dict_in_generate": True}
    cache = filled_cache(model, start)
    if num_beams == 2:
        cache.batch_repeat_interleave(2)
    continued = model.generate(**both, **options, **{cache_name(): copy.deepcopy(cache)})
    whole = model.generate(**both, **options)
    assert continued.sequences.tolist() == whole.sequences.tolist()
    torch.testing.assert_close(continued.scores[0], whole.scores[0], atol=1e-4, rtol=1e-4)
    black = {**both, "pixel_values": both["pixel_values"].clone()}
    black["pixel_values"][-1] = -1
    changed = model.generate(**black, **options, **{cache_name(): copy.deepcopy(cache)})
    assert not torch.allclose(changed.scores[0], continued.scores[0], atol=1e-3)


def test_new_scenes_need_the_references_again(model, turns):
    start, both = turns
    new = {name: value[-1:] for name, value in both.items() if name in ("pixel_values", "image_roles")}
    new |= {"sample_index": both["sample_index"][-1:], "identity_index": both["identity_index"][-1:]}
    inputs = {**both, **new}
    with pytest.raises(ValueError, match="image 0 is a scene of sample 0, whose references are not among the images"):
        model.generate(**inputs, **GREEDY, **{cache_name(): filled_cache(model, start)})


def test_new_placeholders_without_new_images_are_refused(model, turns):
    start, both = turns
    inputs = {name: both[name] for name in ("input_ids", "attention_mask", "token_identity_index", "name_mask")}
    with pytest.raises(ValueError, match="4 image placeholders but 0 images"):
        model.generate(**inputs, **GREEDY, **{cache_name(): filled_cache(model, start)})


def test_general_images_of_a_second_turn_may_come_alone(root):
    """The processor is called on text, as for any transformers model."""
    processor = small_processor()
    model = small_model(processor, connector="resampler")
    images = [Image.open(root / name) for name in ("scene.png", "other.png")]
    first = processor(images=images[:1], text="<image>What is this?")
    second = processor(images=images[1:], text="<image>And this?")
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    mask = torch.ones_like(ids)
    options = {**GREEDY, "output_scores": True, "return_dict_in_generate": True}
    whole = processor(images=images, text="<image>What is this?<image>And this?")
    expected = model.generate(**{**whole, "input_ids": ids, "attention_mask": mask}, **options)
    for new in (dict(second), dict(whole)):
        cache = filled_cache(model, dict(first))
        new |= {"input_ids": ids, "attention_mask": mask}
        continued = model.generate(**new, **options, **{cache_name(): cache})
        torch.testing.assert_close(continued.scores[0], expected.scores[0], atol=1e-4, rtol=1e-4)


def test_what_a_cache_cannot_continue_is_refused(processor, turns):
    start, both = turns
    named = small_model(processor, identity_embedding="name")
    with pytest.raises(ValueError, match="identity_embedding='name' reads the names of the whole prompt"):
        named.generate(**both, **GREEDY, **{cache_name(): filled_cache(named, start)})
    numbered = small_model(processor, max_images=4)
    cache = filled_cache(numbered, start)
    numbered.generate(**both, **GREEDY, **{cache_name(): copy.deepcopy(cache)})
    images = ("pixel_values", "image_roles", "sample_index", "identity_index")
    inputs = {name: value[-1:] if name in images else value for name, value in both.items()}
    with pytest.raises(ValueError, match=r"max_images=4 numbers the images of a conversation"):
        numbered.generate(**inputs, **GREEDY, **{cache_name(): cache})


def test_identities_of_tokens_cover_the_prompt(model, turns):
    _, both = turns
    inputs = {**both, "token_identity_index": both["token_identity_index"][:, :-1]}
    with pytest.raises(ValueError, match=r"token_identity_index has shape .*; pass one index per token"):
        model.generate(**inputs, **GREEDY)
