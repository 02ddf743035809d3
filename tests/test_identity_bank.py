"""IdentityBank and ask, in own and attached models: stored photos give the answers of photos in the prompt."""

import pytest
import torch
from PIL import Image

from idavlm import IdentityBank, IdentityProcessor, ask, attach_id_former
from tests.small_models import small_model, small_processor
from tests.vlm_families import tiny_model, tiny_processor

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
CAST = {"Kate": ["kate.png", "other.png"], "Tom": ["tom.png"]}


def own():
    processor = small_processor()
    return small_model(processor, identity_embedding="learned", max_identities=2), processor


def attached(family):
    def build():
        model, processor = tiny_model(family).eval(), IdentityProcessor(tiny_processor(family))
        torch.manual_seed(0)
        attach_id_former(model, num_heads=4, gate="none", identity_embedding="name")
        return model, processor

    return build


MODELS = {"own": own, **{name: attached(name) for name in ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "mistral3")}}


@pytest.fixture(params=MODELS)
def built(request, root):
    model, processor = MODELS[request.param]()
    return model, processor, {name: [Image.open(root / photo) for photo in photos] for name, photos in CAST.items()}


def prompts(processor, photos, root, scenes=("scene.png",), names=("Kate", "Tom")):
    identities = [{"type": "identity", "name": name, "images": photos[name]} for name in names]
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    *identities,
                    {"type": "image", "image": Image.open(root / scene)},
                    {"type": "text", "text": "Where is Kate?"},
                ],
            }
        ]
        for scene in scenes
    ]
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        padding=True,
        padding_side="left",
    )


def filled(model, processor, photos):
    bank = IdentityBank(model, processor)
    for name, images in photos.items():
        bank.add(name, images)
    return bank


def tower_of(model):
    for name in ("vision_tower", "visual", "vision_model"):
        found = getattr(model, name, None) or getattr(model.base_model, name, None)
        if found is not None:
            return found
    raise AssertionError(type(model).__name__)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_answers_are_those_of_the_photos_in_the_prompt(built, root, num_beams):
    model, processor, photos = built
    bank = filled(model, processor, photos)
    inputs = prompts(processor, photos, root, scenes=("scene.png", "tom.png"))
    options = {**GREEDY, "num_beams": num_beams}
    expected = model.generate(**inputs, **options)
    answers = model.generate(**inputs, identities=bank.select("Kate", "Tom"), **options)
    assert answers.tolist() == expected.tolist()
    with torch.no_grad():
        logits = [model(**inputs, **extra).logits for extra in ({}, {"identities": bank.select()})]
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-3)


def test_the_vision_tower_encodes_every_photo_once(built, root):
    """Ten scenes and three photos: thirteen images in place of forty."""
    model, processor, photos = built
    images = []
    if type(model).__name__.startswith("Qwen"):
        count = lambda module, args, kwargs, output: images.append(len(kwargs["grid_thw"]))  # noqa: E731
    else:
        count = lambda module, args, kwargs, output: images.append(  # noqa: E731
            len(args[0] if args else kwargs["pixel_values"])
        )
    bank = filled(model, processor, photos)  # the first photos, before counting starts, set up nothing
    tower_of(model).register_forward_hook(count, with_kwargs=True)
    inputs = prompts(processor, photos, root)
    for _ in range(10):
        model.generate(**inputs, identities=bank.select("Kate", "Tom"), **GREEDY)
    scenes = sum(images)
    images.clear()
    model.generate(**inputs, **GREEDY)
    assert sum(images) % 4 == 0
    per_image = sum(images) // 4 if type(model).__name__ != "InternVLForConditionalGeneration" else None
    assert per_image is None or scenes == 10 * per_image


def test_saved_loaded_removed_merged(built, root, tmp_path):
    model, processor, photos = built
    bank = filled(model, processor, photos)
    bank.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"identities.safetensors", "identities.json"}
    loaded = IdentityBank.load(tmp_path, model, processor)
    assert loaded.names == ("Kate", "Tom")
    inputs = prompts(processor, photos, root)
    answers = [model.generate(**inputs, identities=each.select("Kate", "Tom"), **GREEDY) for each in (bank, loaded)]
    assert torch.equal(*answers)
    loaded.remove("Tom")
    assert "Tom" not in loaded
    assert len(loaded) == 1
    with pytest.raises(ValueError, match="both banks have Kate"):
        loaded.merge(bank)
    bank.remove("Kate")
    loaded.merge(bank)
    assert loaded.names == ("Kate", "Tom")


def test_the_shortlist_ranks_all_identities(built, root):
    model, processor, photos = built
    bank = filled(model, processor, photos)
    ranked = bank.shortlist(Image.open(root / "scene.png"), count=5)
    assert sorted(name for name, _ in ranked) == ["Kate", "Tom"]
    assert ranked[0][1] >= ranked[1][1]
    assert len(bank.shortlist(Image.open(root / "scene.png"), count=1)) == 1


def test_ask_answers_in_one_call(built, root):
    model, processor, photos = built
    answer = ask(
        model,
        processor,
        "Where is Kate?",
        images=[root / "scene.png"],
        identities={name: [root / photo for photo in images] for name, images in CAST.items()},
        max_new_tokens=6,
    )
    inputs = prompts(processor, photos, root)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.decode(ids, skip_special_tokens=True).strip()
    assert isinstance(ask(model, processor, "What is Tom doing?", max_new_tokens=2), str)


def test_what_does_not_fit_is_named(root, tmp_path):
    model, processor = own()
    photos = {name: [Image.open(root / photo) for photo in images] for name, images in CAST.items()}
    bank = filled(model, processor, photos)
    with pytest.raises(ValueError, match="name='Kate' is in the bank already"):
        bank.add("Kate", photos["Kate"])
    with pytest.raises(ValueError, match="images of 'Bob' is empty"):
        bank.add("Bob", [])
    for call in (bank.remove, bank.select):
        with pytest.raises(KeyError, match="name='Bob' is not in the bank; it has Kate, Tom"):
            call("Bob")
    inputs = prompts(processor, photos, root)
    with pytest.raises(
        ValueError, match=r"sample 0 has references of identities \[0, 0, 1\], but the selected .* Tom \(1\)"
    ):
        model.generate(**inputs, identities=bank.select("Tom"), **GREEDY)
    bank.save(tmp_path)
    other = small_model(small_processor(), identity_embedding="learned", max_identities=2)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)
    with pytest.raises(ValueError, match="belongs to another idavlm model"):
        IdentityBank.load(tmp_path, other, processor)
    with pytest.raises(FileNotFoundError, match=r"identities\.json does not exist"):
        IdentityBank.load(tmp_path / "nowhere", model, processor)
    smol, smol_processor = attached("idefics3")()
    smol_bank = filled(smol, smol_processor, photos)
    with pytest.raises(ValueError, match="idefics3 encodes the images of a sample together"):
        smol.generate(**prompts(smol_processor, photos, root), identities=smol_bank.select(), **GREEDY)


def test_the_identity_map_of_a_bank_is_that_of_the_model(root):
    processor = small_processor()
    model = small_model(processor, num_identity_heads=1)
    photos = {name: [Image.open(root / photo) for photo in photos] for name, photos in CAST.items()}
    inputs = prompts(processor, photos, root)
    names = ("pixel_values", "image_roles", "sample_index", "identity_index")
    with torch.no_grad():
        _, maps, grid_size = model.encode_images(**{name: inputs[name] for name in names}, output_identity_maps=True)
    bank_map = filled(model, processor, photos).identity_map(Image.open(root / "scene.png"))
    assert bank_map.names == ("Kate", "Tom")
    assert bank_map.grid_size == grid_size
    torch.testing.assert_close(bank_map.log_shares.exp().T, maps[0][-1, :, :2])


def test_the_identity_map_of_a_bank_has_a_grid_or_none(built, root):
    model, processor, photos = built
    bank = filled(model, processor, photos)
    bank_map = bank.identity_map(Image.open(root / "scene.png"))
    assert bank_map.log_shares.shape[0] == 2
    assert (bank_map.log_shares.exp().sum(0) < 1 + 1e-5).all()
    if bank_map.grid_size is not None:
        assert bank_map.grid_size[0] * bank_map.grid_size[1] == bank_map.log_shares.shape[1]
    bank.remove("Kate")
    bank.remove("Tom")
    with pytest.raises(ValueError, match="the bank is empty"):
        bank.identity_map(Image.open(root / "scene.png"))
