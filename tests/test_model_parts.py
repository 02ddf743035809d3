"""What a newcomer passes to ``from_parts`` and to the processor: checked at construction, said once, never changed."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, LlavaConfig, LlavaForConditionalGeneration, PretrainedConfig

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

    class Flattening:
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
