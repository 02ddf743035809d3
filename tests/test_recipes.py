"""Every recipe trains a tiny stand-in in the released format for two steps, and its output can be loaded."""

import functools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_bitsandbytes_available

from idavlm import IDAVLMForConditionalGeneration, IdentityProcessor, RecordDataset, load_id_former
from idavlm.cli.main import main
from idavlm.conversion import convert
from idavlm.evaluation import load_checkpoint
from idavlm.training.config_file import OptionFile
from tests.released import FIXTURES, SPECIALS, released, tiny_tokenizer
from tests.training_runs import train, write_llava, write_records
from tests.vlm_families import tiny_model, tiny_processor

RECIPES = Path(__file__).parent.parent / "recipes"
WITHOUT_GPU = {"deepspeed": None, "tf32": None, "bf16": False}
"""Options of the recipes that need a GPU, or that only cost time without one."""


class Stand:
    """Tiny stand-ins of the released models, data, and the outputs of the recipes; each is made once.

    A recipe may start from the output of another one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        data = write_records(folder / "data")
        self.identity = {"train_data": data / "train.jsonl"}
        self.general = {"general_data": data / "general.jsonl"}
        self.llava_records = {"train_data": {"path": data / "llava.jsonl", "reader": "llava"}}

    def output(self, recipe: str) -> Path:
        """The output folder of a recipe, which is run if it was not."""
        out = self.folder / recipe
        if not out.exists():
            options = OPTIONS[recipe](self)
            assert train(RECIPES / f"{recipe}.yaml", **WITHOUT_GPU, **options, output_dir=out) == 0
        return out

    @functools.cached_property
    def qwen_vl(self) -> Path:
        """Qwen-VL-Chat: IDA-VLM without the ID-Former."""
        source = released("ida-vlm", self.folder / "qwen")
        weights = torch.load(source / "pytorch_model.bin", weights_only=True)
        torch.save(
            {name: tensor for name, tensor in weights.items() if ".attn1." not in name}, source / "pytorch_model.bin"
        )
        return convert(source, self.folder / "qwen_vl", progress=False)

    @functools.cached_property
    def yi_vl(self) -> Path:
        return convert(released("yi-vl", self.folder / "yi"), self.folder / "yi_vl", progress=False)

    @functools.cached_property
    def llava_1_5(self) -> Path:
        return convert(released("llava-1.5", self.folder / "llava"), self.folder / "llava_1_5", progress=False)

    @functools.cached_property
    def iaa(self) -> Path:
        return convert(released("iaa", self.folder / "360"), self.folder / "iaa", progress=False)

    @functools.cached_property
    def llama_3(self) -> Path:
        """The language model that IAA starts from."""
        config = json.loads((FIXTURES / "iaa-tiny" / "config.json").read_text())
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: config[name] for name in (*names, "num_key_value_heads", "max_position_embeddings")}
        folder = self.folder / "llama_3"
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
        tiny_tokenizer(SPECIALS["iaa"], config["vocab_size"]).save_pretrained(folder)
        return folder

    @functools.cached_property
    def chinese_clip_llava(self) -> Path:
        return write_llava(self.folder / "chinese_clip_llava")

    def family(self, family: str) -> Path:
        """A model of transformers; its processor is that of :func:`processors_of_families`."""
        folder = self.folder / family
        tiny_model(family).save_pretrained(folder)
        return folder


OPTIONS = {
    "ida_vlm_stage1": lambda stand: {"model": stand.qwen_vl, **stand.identity, **stand.general},
    "ida_vlm_stage2": lambda stand: {"model": stand.output("ida_vlm_stage1"), **stand.identity, **stand.general},
    "ida_vlm_stage1_no_id_former": lambda stand: {"model": stand.qwen_vl, **stand.identity},
    "ida_vlm_stage2_no_id_former": lambda stand: {
        "model": stand.output("ida_vlm_stage1_no_id_former"),
        **stand.identity,
    },
    "iaa_align": lambda stand: {
        "vision_tower": FIXTURES / "llava-1.5-tiny" / "clip-vision-tiny",
        "language_model": stand.llama_3,
        "model_options.image_seq_length": 16,
        **stand.llava_records,
    },
    "iaa_instruct": lambda stand: {"model": stand.output("iaa_align"), **stand.llava_records},
    "iaa_ground": lambda stand: {
        "model": stand.output("iaa_instruct"),
        "processor": stand.iaa / "grounding",
        **stand.identity,
    },
    "yi_vl_finetune": lambda stand: {"model": stand.yi_vl, **stand.llava_records},
    "yi_vl_lora": lambda stand: {"model": stand.yi_vl, **stand.llava_records},
    "yi_vl_qlora": lambda stand: {"model": stand.yi_vl, **stand.llava_records},
    "llava_qwen2_chinese_clip": lambda stand: {"model": stand.chinese_clip_llava, **stand.llava_records},
    "personal_knowledge": lambda stand: {"model": stand.llava_1_5, **stand.llava_records, **stand.general},
    "attach_qwen3_vl": lambda stand: {"model": stand.family("qwen3_vl"), **stand.identity},
    "attach_smolvlm": lambda stand: {"model": stand.family("smolvlm"), **stand.identity, **stand.general},
}
"""What a user passes to each recipe."""

FAMILIES = {"attach_qwen3_vl": "qwen3_vl", "attach_smolvlm": "smolvlm"}


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    return Stand(tmp_path_factory.mktemp("recipes"))


@pytest.fixture
def processors_of_families(monkeypatch):
    """``AutoProcessor`` builds the tiny processors: without torchvision it cannot load those of models with videos."""

    def use(family: str) -> None:
        monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: tiny_processor(family))

    return use


def test_all_recipes_are_tested():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == OPTIONS.keys()


@pytest.mark.parametrize("recipe", OPTIONS)
def test_recipe(recipe, stand, processors_of_families):
    if recipe == "yi_vl_qlora" and not is_bitsandbytes_available():
        pytest.skip("bitsandbytes is not installed")
    if recipe in FAMILIES:
        processors_of_families(FAMILIES[recipe])
    out = stand.output(recipe)
    logged = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert len(losses) == 2
    assert all(torch.tensor(losses).isfinite())
    options = OptionFile(RECIPES / f"{recipe}.yaml").values
    if options.get("lora"):
        assert (out / "adapter_model.safetensors").is_file()
    elif recipe in FAMILIES:
        model = AutoModelForImageTextToText.from_pretrained(out)
        assert load_id_former(model, out).id_former is not None
    else:
        load_checkpoint(out)


def test_the_merged_chinese_clip_llava_is_one_of_transformers(stand, tmp_path):
    """Train, merge, load with transformers alone: the logits are those of the model with its adapter."""
    from idavlm.training.lora import load_lora

    adapter = stand.output("llava_qwen2_chinese_clip")
    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert type(merged).__name__ == "LlavaForConditionalGeneration"
    adapted = load_lora(adapter).eval()
    processor = IdentityProcessor.from_pretrained(tmp_path / "merged")
    file = stand.llava_records["train_data"]
    sample = RecordDataset(file["path"], reader="llava", encode=processor.encode)[0]
    batch = processor.collate([{name: value for name, value in sample.items() if name not in ("id", "source")}])
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, adapted(**batch).logits, atol=1e-5, rtol=1e-5)
        base = AutoModelForImageTextToText.from_pretrained(stand.chinese_clip_llava).eval()
        assert not torch.allclose(merged(**batch).logits, base(**batch).logits, atol=1e-5)


def test_the_released_layers_get_adapters(stand):
    """LoRA of the Chinese-CLIP recipe is on all linear layers of language model and tower, the projector in full."""
    config = json.loads((stand.output("llava_qwen2_chinese_clip") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (32, 64)
    assert config["modules_to_save"] == ["model.multi_modal_projector"]


def test_an_id_former_starts_as_the_model_before(stand):
    """Stage 1 of IDA-VLM with an ID-Former starts from the resampler of Qwen-VL-Chat."""
    model = IDAVLMForConditionalGeneration.from_pretrained(stand.output("ida_vlm_stage1"))
    assert model.config.connector == "id_former"
    assert model.id_former.resampler.num_queries == 16
