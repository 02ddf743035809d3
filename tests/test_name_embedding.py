"""identity_embedding="name": embeddings of names on image tokens, by hand and in a model; errors."""

import pytest
import torch
from PIL import Image

from idavlm import IDFormer
from idavlm.data import parse_sample
from idavlm.models import IDAVLMForConditionalGeneration
from idavlm.models.identity_names import mean_name_embeddings
from idavlm.modules.identity_map import pool_identity_map
from idavlm.utils import ImageRole
from tests.small_models import record, sample, small_model

REFERENCE, SCENE, GENERAL = ImageRole.REFERENCE, ImageRole.SCENE, ImageRole.GENERAL


@pytest.fixture(
    params=[{}, {"hidden_size": 16, "output_proj": True, "null_name_token_id": 7}], ids=["as wide", "narrower, null"]
)
def model(processor, request):
    return small_model(processor, identity_embedding="name", **request.param)


def test_mean_embeddings_of_names_by_hand():
    embeds = torch.randn(2, 6, 8)
    token_identity_index = torch.tensor([[0, 0, 0, -1, 1, 1], [-1, 0, 0, 0, -1, -1]])
    name_mask = torch.tensor([[True, True, False, False, True, False], [False, True, False, True, False, False]])
    names = mean_name_embeddings(embeds, token_identity_index, name_mask, 2)
    torch.testing.assert_close(names[0], torch.stack([embeds[0, :2].mean(0), embeds[0, 4]]))
    torch.testing.assert_close(names[1], torch.stack([embeds[1, [1, 3]].mean(0), torch.zeros(8)]))


@pytest.mark.parametrize("with_null", [False, True])
def test_tokens_by_hand(with_null):
    id_former = IDFormer(
        hidden_size=8, num_queries=4, num_heads=2, gate="none", null_token=True, identity_embedding="name"
    )
    names = torch.randn(2, 2, 8)
    null = torch.randn(8) if with_null else None
    roles = torch.tensor([SCENE, REFERENCE, REFERENCE, GENERAL])
    samples, identities = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 0])
    features = torch.randn(4, 16, 8)
    inputs = (features, roles, samples)
    # Identity 0 of sample 0 has no reference here: it gets a share of 0.
    identities[1] = 0
    tokens, maps = id_former(*inputs, identities, name_embeddings=(names, null), output_attentions=True)
    added = tokens - id_former(*inputs, identities)
    zero = torch.zeros(8) if null is None else null
    cells = maps[0][0, :, :1].view(2, 2, 2, 2).mean((1, 3)).view(4, 1)  # row, row in it, column, column in it
    torch.testing.assert_close(added[0], cells * names[0, 0] + (1 - cells) * zero)
    torch.testing.assert_close(added[1], names[0, 0].expand(4, 8))
    torch.testing.assert_close(added[2], names[1, 0].expand(4, 8))
    torch.testing.assert_close(added[3], zero.expand(4, 8))


def test_a_bank_equals_forward():
    id_former = IDFormer(
        hidden_size=8, num_queries=4, num_heads=2, gate="none", null_token=True, identity_embedding="name"
    )
    features, names, null = torch.randn(4, 16, 8), torch.randn(1, 2, 8), torch.randn(8)
    roles, index = torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.long)
    expected = id_former(features, roles, index, name_embeddings=(names, null))
    bank = [id_former.encode_references(features[:1]), id_former.encode_references(features[1:2])]
    scenes = id_former.forward_scenes(features[2:], bank, name_embeddings=(names, null))
    torch.testing.assert_close(scenes, expected[2:])


def test_pooled_maps():
    maps = torch.rand(3, 12, 3)
    shares = pool_identity_map(maps, (4, 3), (2, 3), 4)
    expected = maps[..., :2].view(3, 2, 2, 3, 2).mean(2).flatten(1, 2)
    torch.testing.assert_close(shares[..., :2], expected)
    assert (shares[..., 2:] == 0).all()
    assert pool_identity_map(maps[..., :1], (4, 3), (2, 3), 1).tolist() == [[[0.0]] * 6] * 3


def test_the_processor_finds_names(processor, root):
    encoded = processor.encode(sample(root))
    spelled = encoded["input_ids"][encoded["name_mask"]]
    assert processor.tokenizer.decode(spelled).replace(" ", "") == "KateTomKateKate"
    assert (encoded["token_identity_index"][encoded["name_mask"]] >= 0).all()


def test_image_tokens_contain_names_where_boxes_are(model, processor, root):
    """With teacher forcing the map is known. The null embedding is checked by hand above."""
    model.config.null_name_token_id = None
    batch = processor.collate([processor.encode(sample(root))])
    inputs_embeds = []
    hook = model.language_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs_embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch, teacher_forcing=True)
        tokens = model.encode_images(
            **{name: batch[name] for name in ("pixel_values", "image_roles", "sample_index", "identity_index")}
        )[0]
        embeds = model.get_input_embeddings()(batch["input_ids"])
    hook.remove()
    added = inputs_embeds[0][batch["input_ids"] == processor.image_token_id].view(3, 4, -1) - tokens
    kate, tom = (
        embeds[batch["name_mask"] & (batch["token_identity_index"] == identity)].mean(0, keepdim=True)
        for identity in (0, 1)
    )
    torch.testing.assert_close(added[0], kate.expand(4, -1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(added[1], tom.expand(4, -1), atol=1e-5, rtol=1e-4)
    # Kate is in the left half of the scene, Tom in the right half: columns of the 2 x 2 tokens.
    left, right = added[2].view(2, 2, -1).unbind(1)
    for half, present, absent in ((left, kate, tom), (right, tom, kate)):
        assert ((half @ present.T) / present.norm() ** 2 > (half @ absent.T) / absent.norm() ** 2).all()


def test_samples_of_a_batch_do_not_affect_each_other(model, processor, root):
    other = parse_sample(record(1, people=("Tom",)), where="test.jsonl:2", image_root=root)
    text = {"id": "2", "source": "general", "messages": record()["messages"][2:]}
    content = [{"type": "image", "image": "other.png"}, {"type": "text", "text": "What is Tom doing?"}]
    general = {"id": "3", "source": "general", "messages": [{"role": "user", "content": content}, text["messages"][1]]}
    others = [parse_sample(entry, where="test.jsonl:3", image_root=root) for entry in (text, general)]
    encoded = [processor.encode(entry) for entry in (sample(root), other, *others)]
    together = model(**processor.collate(encoded)).logits
    for row, entry in enumerate(encoded):
        alone = model(**processor.collate([entry])).logits[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generation(model, processor, root, options):
    question = sample(root, answer=False)
    batch = processor.collate([processor.encode(question, add_generation_prompt=True)] * 2, padding_side="left")
    for name in ("labels", "boxes", "box_image", "box_identity"):
        batch.pop(name)
    expected = model.generate(
        **batch, max_new_tokens=6, do_sample=False, use_cache=True, num_beams=options.get("num_beams", 1)
    )
    result = model.generate(**batch, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(result, expected)
    assert torch.equal(result[0], result[1])


def test_images_without_identities_need_no_names(model, processor, root):
    """The usual call of transformers processors, which knows nothing of names."""
    with Image.open(root / "scene.png") as image:
        batch = processor(images=[image], text="Kate <image>")
    assert model(**batch).logits.isfinite().all()


def test_gradients_reach_the_identity_attention(model, processor, root):
    model(**processor.collate([processor.encode(sample(root))]) | {"boxes": None}).loss.backward()
    assert model.id_former.identity_layers[0].attention.q_proj.weight.grad.abs().sum() > 0


def test_saved_and_loaded(model, processor, root, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = IDAVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.connector_config["identity_embedding"] == "name"
    batch = processor.collate([processor.encode(sample(root))])
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_errors(model, processor, root):
    batch = processor.collate([processor.encode(sample(root))])
    with pytest.raises(ValueError, match="identity_embedding='name' needs token_identity_index and name_mask"):
        model(**batch | {"name_mask": None})
    with pytest.raises(ValueError, match="null_name_token_id=3 needs an ID-Former with identity_embedding='name'"):
        small_model(processor, null_name_token_id=3)
    with pytest.raises(ValueError, match="identity_embedding='name' and max_identities=4"):
        small_model(processor, identity_embedding="name", max_identities=4)
    features, index = torch.randn(3, 64, 32), torch.zeros(3, dtype=torch.long)
    names = (torch.randn(1, 1, model.id_former.resampler.output_size), None)
    with pytest.raises(ValueError, match="name_embeddings has 1 names per sample but a sample has 2 identities"):
        model.id_former(features, torch.tensor([0, 0, 1]), index, name_embeddings=names)
