"""Train an identity-aware VLM on a data set, and evaluate it.

    python examples/finetune.py config.yaml      # every flag below can be set in the file
    python examples/finetune.py --help

    # Continue from a checkpoint, for example that of `make demo`:
    python examples/finetune.py --checkpoint runs/train_idformer/characters/seed-0/with-id-former \
        --data my_folder --output_dir runs/my_model --max_steps 500 --learning_rate 1e-4 --freeze vision_tower

    # Join a pretrained vision tower and a pretrained language model by a new ID-Former:
    python examples/finetune.py --vision_tower openai/clip-vit-base-patch16 \
        --language_model Qwen/Qwen2.5-0.5B-Instruct --chat_template QWEN_CHATML \
        --model_options '{"num_queries": 64, "num_heads": 7}' --data my_folder --output_dir runs/my_model \
        --max_steps 2000 --bf16 --module_learning_rates '{"vision_tower": 1e-5}'

A data set is a folder with images/, train.jsonl, and optionally general.jsonl and test.jsonl; or a built-in data set.
The flags of training are those of transformers.TrainingArguments and of idavlm.IDTrainingArguments.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from idavlm import IDAVLMForConditionalGeneration, IDAVLMProcessor, IDTrainer, IDTrainingArguments, RecordDataset
from idavlm.data import chat_templates
from idavlm.datasets import build_characters, build_faces, build_wesnoth
from idavlm.evaluation import evaluate, load_checkpoint, score_table
from idavlm.experimental import small_models

BUILDERS = {"characters": build_characters, "wesnoth": build_wesnoth, "faces": build_faces}


@dataclass
class ModelArguments:
    checkpoint: str | None = field(default=None, metadata={"help": "Model of idavlm with its processor."})
    vision_tower: str | None = field(
        default=None, metadata={"help": "Name or path of a transformers vision model. Default: a small new ResNet."}
    )
    language_model: str | None = field(
        default=None, metadata={"help": "Name or path of a causal language model. Default: a small new Llama."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Template in idavlm.data.chat_templates. Default: that of the tokenizer."}
    )
    model_options: dict | str | None = field(
        default='{"num_queries": 16, "num_heads": 4}',
        metadata={"help": "Further arguments of IDAVLMForConditionalGeneration.from_parts, as JSON."},
    )

    def __post_init__(self):
        if isinstance(self.model_options, str):
            self.model_options = json.loads(self.model_options)
        if self.checkpoint and (self.vision_tower or self.language_model):
            raise ValueError("checkpoint is a whole model; leave out vision_tower and language_model.")


@dataclass
class DataArguments:
    data: str = field(default="characters", metadata={"help": "characters, wesnoth, faces, or a folder."})
    data_cache: str = field(default="runs/data", metadata={"help": "Folder of the built-in data sets."})
    max_test_records: int | None = field(default=None, metadata={"help": "Evaluate the first test records only."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length of the answers in the evaluation."})


def main(model_args: ModelArguments, data_args: DataArguments, training_args: IDTrainingArguments) -> None:
    set_seed(training_args.seed)

    # --- Data ---
    if data_args.data in BUILDERS:
        data = BUILDERS[data_args.data](Path(data_args.data_cache) / data_args.data)
    else:
        data = Path(data_args.data)

    # --- Model and processor ---
    if model_args.checkpoint:
        model, processor = load_checkpoint(model_args.checkpoint)
    else:
        model, processor = build_model(model_args, data)

    # --- Training ---
    has_general = (data / "general.jsonl").exists() and training_args.stage == "instruction_tuning"
    trainer = IDTrainer(
        model,
        training_args,
        train_dataset=RecordDataset(data / "train.jsonl", encode=processor.encode),
        general_dataset=RecordDataset(data / "general.jsonl", encode=processor.encode) if has_general else None,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()

    # --- Evaluation ---
    if training_args.stage == "instruction_tuning" and (data / "test.jsonl").exists():
        test = list(RecordDataset(data / "test.jsonl"))[: data_args.max_test_records]
        result = evaluate(model, processor, test, max_new_tokens=data_args.max_new_tokens)
        result.save(Path(training_args.output_dir) / "scores.json")
        print(score_table({Path(training_args.output_dir).name: [result]}))


def build_model(args: ModelArguments, data: Path) -> tuple[IDAVLMForConditionalGeneration, IDAVLMProcessor]:
    """Join a vision tower and a language model, pretrained or new and small, by a new connector."""
    # The language model, its tokenizer, and a text form of boxes that it can learn
    if args.language_model:
        tokenizer = AutoTokenizer.from_pretrained(args.language_model)
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        language_model = AutoModelForCausalLM.from_pretrained(args.language_model)
        if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
            language_model.resize_token_embeddings(len(tokenizer))
        box_format = "thousand"
    else:
        tokenizer = small_models.small_tokenizer(small_models.record_texts(RecordDataset(data / "train.jsonl")))
        language_model = small_models.small_language_model(tokenizer)
        box_format = f"bins{small_models.NUM_BOX_BINS}"

    # The vision tower and its image processor
    if args.vision_tower:
        vision_tower = args.vision_tower
        image_processor = AutoImageProcessor.from_pretrained(args.vision_tower)
    else:
        vision_tower = small_models.small_vision_tower()
        image_processor = small_models.small_image_processor(64)

    chat_template = getattr(chat_templates, args.chat_template) if args.chat_template else None
    processor = IDAVLMProcessor(image_processor, tokenizer, chat_template=chat_template, box_format=box_format)
    model = IDAVLMForConditionalGeneration.from_parts(
        vision_tower, language_model, processor=processor, **(args.model_options or {})
    )
    return model, processor


if __name__ == "__main__":
    parser = HfArgumentParser((ModelArguments, DataArguments, IDTrainingArguments), description=__doc__)
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        main(*parser.parse_yaml_file(sys.argv[1]))
    else:
        main(*parser.parse_args_into_dataclasses())
