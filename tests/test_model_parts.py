"""What a newcomer passes to ``from_parts`` and to the processor: checked at construction, said once, never changed."""

import copy
import json
import re

import pytest
import torch
from transformers import (
    ImageProcessingMixin,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)

from idavlm import IDFormer, add_inner_adaptors
from idavlm.experimental.small_models import (
    small_image_processor,
    small_language_model,
    small_tokenizer,
    small_vision_tower,
)
from idavlm.models import IDAVLMConfig, IDAVLMForConditionalGeneration, IDAVLMProcessor
from tests.small_models import TEXTS, sample, small_model, small_processor


def parts(processor):
    return small_vision_tower(hidden_size=32), small_language_model(processor.tokenizer, hidden_size=32)


def test_num_queries_is_said_once(root):
    processor = small_processor(image_seq_length=None)
    with pytest.raises(ValueError, match=r"image_seq_length is not set; .*from_parts"):
        processor.encode(sample(root))
    model = IDAVLMForConditionalGeneration.from_parts(
        *parts(processor), processor=processor, num_queries=9, num_heads=2
    )
    assert model.config.image_token_id == processor.image_token_id
    assert processor.image_seq_length == model.config.image_seq_length == 9
    assert model(**processor.collate([processor.encode(sample(root))])).loss.isfinite()


def test_the_processor_may_say_it(root):
    processor = small_processor(image_seq_length=4)
    model = IDAVLMForConditionalGeneration.from_parts(*parts(processor), processor=processor, num_heads=2)
    assert model.id_former.resampler.num_queries == 4
    with pytest.raises(ValueError, match="num_queries=9 but the processor has image_seq_length=4"):
        IDAVLMForConditionalGeneration.from_parts(*parts(processor), processor=processor, num_queries=9, num_heads=2)


def test_what_from_parts_needs(processor):
    with pytest.raises(ValueError, match="pass one of the two"):
        IDAVLMForConditionalGeneration.from_parts(*parts(processor), num_queries=4, num_heads=2)
    with pytest.raises(ValueError, match="num_queries is not set"):
        IDAVLMForConditionalGeneration.from_parts(
            *parts(processor), processor=small_processor(image_seq_length=None), num_heads=2
        )


def test_a_whole_vlm_is_not_a_language_model(processor):
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16}
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        text_config=LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
    )
    llava = LlavaForConditionalGeneration(config)
    with pytest.raises(
        ValueError, match="language_model=LlavaForConditionalGeneration is a whole vision-language model"
    ):
        IDAVLMForConditionalGeneration.from_parts(
            small_vision_tower(), llava, image_token_id=5, num_queries=4, num_heads=2
        )
    with pytest.raises(ValueError, match="language_model=LlamaModel has no language modelling head"):
        IDAVLMForConditionalGeneration.from_parts(
            small_vision_tower(), LlamaModel(config.text_config), image_token_id=5, num_queries=4, num_heads=2
        )


def test_image_processors_of_several_sizes_are_refused():
    keeps_aspect = type(small_image_processor(64))(size={"shortest_edge": 64}, do_center_crop=False)
    with pytest.raises(ValueError, match=r"does not bring all images to one size.*CLIPImageProcessor, Siglip"):
        IDAVLMProcessor(keeps_aspect, small_tokenizer(TEXTS, vocab_size=320))

    class Flattening(ImageProcessingMixin):
        """Like Qwen2-VL: patches of all images in one row."""

        def __call__(self, images, return_tensors=None):
            return {"pixel_values": torch.zeros(12, 1176)}

    with pytest.raises(ValueError, match="image_processor=Flattening does not bring"):
        IDAVLMProcessor(Flattening(), small_tokenizer(TEXTS, vocab_size=320))


@pytest.mark.parametrize("connector", ["id_former", "resampler", "mlp2x_gelu"])
@pytest.mark.parametrize("inner_adaptors", [None, {"every": 1}])
def test_building_a_model_does_not_change_its_config(processor, connector, inner_adaptors):
    options = {} if connector == "mlp2x_gelu" else {"num_queries": 4, "num_heads": 2}
    tower, language_model = parts(processor)
    config = IDAVLMConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        connector=connector,
        connector_config=options,
        image_token_id=5,
        image_seq_length=64 if connector == "mlp2x_gelu" else None,
        inner_adaptors=inner_adaptors,
    )
    before = copy.deepcopy(config.to_dict())
    IDAVLMForConditionalGeneration(config, tower, language_model)
    assert config.to_dict() == before


def test_a_language_model_with_adaptors_needs_a_config_that_says_so(processor):
    tower, language_model = parts(processor)
    add_inner_adaptors(language_model, every=1)
    config = IDAVLMConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        connector_config={"num_queries": 4, "num_heads": 2},
        image_token_id=5,
    )
    with pytest.raises(ValueError, match="inner_adaptors=None but the language model has inner adaptors"):
        IDAVLMForConditionalGeneration(config, tower, language_model)
    model = IDAVLMForConditionalGeneration.from_parts(
        tower, language_model, image_token_id=5, num_queries=4, num_heads=2
    )
    assert model.config.inner_adaptors["layers"] == [0, 1]


def test_image_seq_length_and_num_queries_are_one_number():
    with pytest.raises(ValueError, match="num_queries=4 but image_seq_length=9"):
        IDAVLMConfig(connector_config={"num_queries": 4}, image_seq_length=9)
    assert IDAVLMConfig(connector_config={"num_queries": 4}).image_seq_length == 4


def test_an_id_former_from_the_config_of_a_model(processor):
    model = small_model(processor)
    copied = IDFormer.from_config(model.id_former.to_config())
    copied.load_state_dict(model.id_former.state_dict())
    assert isinstance(model.config, PretrainedConfig)


WRONG_TYPES = {
    "vision_config": ["resnet", 3, ["clip"]],
    "text_config": ["llama", 3, []],
    "connector": [None, 3, ["id_former"]],
    "connector_config": ["num_queries", 3, [4]],
    "id_former_class": [3, ["my_package.MyIDFormer"]],
    "image_token_id": ["<image>", 3.0, True, [3]],
    "image_seq_length": ["4", 4.0, True, [4]],
    "vision_feature_layer": [None, "-2", -2.0, [-2]],
    "vision_feature_select": [None, 1, ["patch"]],
    "identity_map_loss_weight": [None, "1", [1.0], True],
    "contrastive_loss_weight": [None, "1", [1.0], True],
    "null_name_token_id": ["the", 3.0],
    "inner_adaptors": ["every", 4, [4]],
    "max_images": ["4", 4.0, True],
}
OUT_OF_RANGE = {
    "connector": ["", "mlp0x_gelu", "perceiver"],
    "image_token_id": [-1],
    "image_seq_length": [0, -4],
    "vision_feature_layer": [0, 1],
    "vision_feature_select": ["", "CLS"],
    "identity_map_loss_weight": [-1, float("nan"), float("inf")],
    "contrastive_loss_weight": [-0.5, float("nan")],
    "null_name_token_id": [-1],
    "max_images": [0, -1],
}


def test_every_field_of_the_configuration_is_checked():
    """A value of the wrong type or out of range is an error that names the field and the value."""
    assert WRONG_TYPES.keys() == set(IDAVLMConfig.__annotations__)
    for field, values in WRONG_TYPES.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"^{field}=.*{re.escape(repr(value))} has the wrong type; expected "):
                IDAVLMConfig(**{field: value})
    for field, values in OUT_OF_RANGE.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"^{field}={re.escape(repr(value))} "):
                IDAVLMConfig(**{field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"connector_config": {"num_querys": 4}},
            "connector_config: 'num_querys' is not an argument of IDFormer; known: h",
        ),
        (
            {"connector_config": {"num_queries": "4"}},
            "connector_config: num_queries='4' has the wrong type; expected int",
        ),
        (
            {"connector_config": {"num_heads": None}},
            "connector_config: num_heads=None has the wrong type; expected int",
        ),
        (
            {"connector_config": {"null_token": "no"}},
            "connector_config: null_token='no' has the wrong type; expected bool",
        ),
        ({"connector_config": {"output_size": 4}}, "connector_config: 'output_size' is not an argument"),
        (
            {"connector": "resampler", "connector_config": {"gate": "tanh"}},
            "connector_config: 'gate' is not an argument of Resampler",
        ),
        (
            {"connector": "linear", "connector_config": {"num_queries": 4}},
            "connector_config: 'num_queries' is not an argument of build_connector; known: vision_hidden",
        ),
        ({"inner_adaptors": {"each": 4}}, "inner_adaptors: 'each' is not an argument of add_inner_adaptors"),
        ({"inner_adaptors": {"layers": ["1"]}}, "inner_adaptors: layers=.'1'. has the wrong type"),
        ({"inner_adaptors": {"every": True}}, "inner_adaptors: every=True has the wrong type"),
        (
            {"text_config": {"model_type": "llama", "vocab_size": 64}, "image_token_id": 64},
            "image_token_id=64 lies outside the vocab_size=64 of text_config",
        ),
        ({"text_config": {}}, "text_config has no 'model_type'"),
        ({"text_config": {"model_type": 3}}, "text_config has no 'model_type'"),
        ({"text_config": {"model_type": "none"}}, "text_config describes no model of type 'none'"),
        (
            {"text_config": {"model_type": "llama", "hidden_size": "64"}},
            "text_config describes no model of type 'llama' .*'hidden_size' expected int, got str",
        ),
        (
            {"vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 0}},
            "vision_config describes no model of type 'clip_vision_model'",
        ),
    ],
)
def test_the_parts_of_the_configuration_are_checked(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        IDAVLMConfig(**options)


def test_a_configuration_file_with_a_wrong_value_is_refused(processor, tmp_path):
    """Loading reports the field as building does."""
    small_model(processor).config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    original = json.loads(path.read_text())
    assert IDAVLMConfig.from_pretrained(tmp_path).to_dict() == IDAVLMConfig(**original).to_dict()
    for field, values in WRONG_TYPES.items():
        path.write_text(json.dumps({**original, field: values[-1]}))
        with pytest.raises(ValueError, match=f"^{field}="):
            IDAVLMConfig.from_pretrained(tmp_path)
