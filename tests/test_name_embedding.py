"""Names' own embeddings as marks: by hand, in a model, and where they cannot be made."""

import pytest
import torch
from PIL import Image

from idavlm.data import parse_sample
from idavlm.models import IDAVLMForConditionalGeneration
from idavlm.models.name_marks import name_marks
from idavlm.modules.identity_map import cell_shares
from idavlm.utils import ImageRole
from tests.small_models import record, sample, small_model

REFERENCE, SCENE, GENERAL = (int(role) for role in ImageRole)


@pytest.fixture(
    params=[{}, {"hidden_size": 16, "output_proj": True, "null_name_token_id": 7}], ids=["as wide", "narrower, nobody"]
)
def model(processor, request):
    return small_model(processor, names_as_marks=True, **request.param)


def test_marks_by_hand():
    embeds = torch.randn(2, 6, 8)
    token_identity_index = torch.tensor([[0, 0, 0, -1, 1, 1], [-1, 0, 0, 0, -1, -1]])
    name_mask = torch.tensor([[True, True, False, False, True, False], [False, True, False, True, False, False]])
    roles = (
        torch.tensor([REFERENCE, SCENE, REFERENCE, GENERAL]),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([1, 0, 0, 0]),
    )
    seen = torch.rand(4, 16, 3).softmax(-1)
    seen[3] = torch.tensor([0.0, 0.0, 1.0])
    marks = name_marks(embeds, (token_identity_index, name_mask), roles, seen, None, (2, 2))
    kate, tom, other = embeds[0, :2].mean(0), embeds[0, 4], embeds[1, [1, 3]].mean(0)
    cells = seen[1, :, :2].view(2, 2, 2, 2, 2).mean((1, 3)).view(4, 2)  # row, row in it, column, column in it
    torch.testing.assert_close(marks[0], tom.expand(4, 8))
    torch.testing.assert_close(marks[1], cells[:, :1] * kate + cells[:, 1:] * tom)
    torch.testing.assert_close(marks[2], other.expand(4, 8))
    assert (marks[3] == 0).all()
    nobody = torch.randn(8)
    told = name_marks(embeds, (token_identity_index, name_mask), roles, seen, None, (2, 2), nobody)
    torch.testing.assert_close(told[[0, 2]], marks[[0, 2]])
    torch.testing.assert_close(told[1] - marks[1], (1 - cells.sum(-1, keepdim=True)) * nobody)
    torch.testing.assert_close(told[3], nobody.expand(4, 8))


def test_shares_of_cells():
    seen = torch.rand(3, 12, 3)
    shares = cell_shares(seen, (4, 3), (2, 3), 4)
    expected = seen[..., :2].view(3, 2, 2, 3, 2).mean(2).flatten(1, 2)
    torch.testing.assert_close(shares[..., :2], expected)
    assert (shares[..., 2:] == 0).all()
    assert cell_shares(seen[..., :1], (4, 3), (2, 3), 1).tolist() == [[[0.0]] * 6] * 3


def test_names_are_marked_by_the_processor(processor, root):
    encoded = processor.encode(sample(root))
    spelled = encoded["input_ids"][encoded["name_mask"]]
    assert processor.tokenizer.decode(spelled).replace(" ", "") == "KateTomKateKate"
    assert (encoded["token_identity_index"][encoded["name_mask"]] >= 0).all()


def test_a_model_reads_names_where_boxes_say(model, processor, root):
    """Teacher forcing, so that who is where is known; the word for nobody is checked by hand above."""
    model.config.null_name_token_id = None
    batch = processor.collate([processor.encode(sample(root))])
    read = []
    hook = model.language_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch, teacher_forcing=True)
        tokens = model.encode_images(
            **{name: batch[name] for name in ("pixel_values", "image_roles", "sample_index", "identity_index")}
        )[0]
        embeds = model.get_input_embeddings()(batch["input_ids"])
    hook.remove()
    added = read[0][batch["input_ids"] == processor.image_token_id].view(3, 4, -1) - tokens
    kate, tom = (
        embeds[batch["name_mask"] & (batch["token_identity_index"] == identity)].mean(0, keepdim=True)
        for identity in (0, 1)
    )
    torch.testing.assert_close(added[0], kate.expand(4, -1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(added[1], tom.expand(4, -1), atol=1e-5, rtol=1e-4)
    # Kate stands on the left of the picture, Tom on the right: columns of the 2 x 2 tokens.
    left, right = added[2].view(2, 2, -1).unbind(1)
    for here, mine, other in ((left, kate, tom), (right, tom, kate)):
        assert ((here @ mine.T) / mine.norm() ** 2 > (here @ other.T) / other.norm() ** 2).all()


def test_samples_of_a_batch_do_not_touch_each_other(model, processor, root):
    other = parse_sample(record(1, people=("Tom",)), where="test.jsonl:2", image_root=root)
    text = {"id": "2", "source": "general", "messages": record()["messages"][2:]}
    shown = [{"type": "image", "image": "other.png"}, {"type": "text", "text": "What is Tom doing?"}]
    general = {"id": "3", "source": "general", "messages": [{"role": "user", "content": shown}, text["messages"][1]]}
    others = [parse_sample(one, where="test.jsonl:3", image_root=root) for one in (text, general)]
    samples = [sample(root), other, *others]
    encoded = [processor.encode(one) for one in samples]
    together = model(**processor.collate(encoded)).logits
    for row, one in enumerate(encoded):
        alone = model(**processor.collate([one])).logits[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generation(model, processor, root, options):
    asked = sample(root, answer=False)
    batch = processor.collate([processor.encode(asked, add_generation_prompt=True)] * 2, padding_side="left")
    for name in ("labels", "boxes", "box_image", "box_identity"):
        batch.pop(name)
    expected = model.generate(
        **batch, max_new_tokens=6, do_sample=False, use_cache=True, num_beams=options.get("num_beams", 1)
    )
    result = model.generate(**batch, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(result, expected)
    assert torch.equal(result[0], result[1])


def test_pictures_without_anybody_need_no_names(model, processor, root):
    """transformers' usual call, which knows nothing of names."""
    with Image.open(root / "scene.png") as picture:
        batch = processor(images=[picture], text="Kate <image>")
    assert model(**batch).logits.isfinite().all()


def test_gradients_reach_the_identity_attention(model, processor, root):
    model(**processor.collate([processor.encode(sample(root))]) | {"boxes": None}).loss.backward()
    assert model.id_former.identity_layers[0].attention.q_proj.weight.grad.abs().sum() > 0


def test_saved_and_loaded(model, processor, root, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = IDAVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.names_as_marks
    batch = processor.collate([processor.encode(sample(root))])
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_what_cannot_be_marked(model, processor, root):
    batch = processor.collate([processor.encode(sample(root))])
    with pytest.raises(ValueError, match="names_as_marks=True needs token_identity_index, name_mask"):
        model(**batch | {"name_mask": None})
    with pytest.raises(ValueError, match="names_as_marks=True needs connector='id_former'"):
        small_model(processor, connector="resampler", names_as_marks=True)
    with pytest.raises(ValueError, match="null_name_token_id=3 needs names_as_marks=True"):
        small_model(processor, null_name_token_id=3)
    with pytest.raises(ValueError, match="takes the place of its max_identities"):
        small_model(processor, names_as_marks=True, max_identities=4)
