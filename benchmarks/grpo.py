"""TRL's GRPOTrainer with the rewards for names and boxes, on a tiny model: does the reward rise?

    python -m benchmarks.grpo               # IDAVLMForConditionalGeneration
    python -m benchmarks.grpo --model llava # LLaVA with an attached ID-Former

First, SFTTrainer trains the form of an answer, such as "Kate 1 1 4 7", with names and boxes at random. Then
GRPOTrainer rewards the right name, and the intersection over union with the right box. All prompts have the same
answer, so the program tests the path of prompts, identities and rewards, and not what a tiny model can see. With
coordinates in eighths, the IoU of the right answer is 0.80.
"""

import argparse
import random
import tempfile
import time

import torch
from datasets import Dataset, Image, List
from PIL import Image as PILImage
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PrinterCallback,
)
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from idavlm import (
    IDAVLMForConditionalGeneration,
    IDAVLMProcessor,
    IdentityProcessor,
    attach_id_former,
)
from idavlm.experimental.small_models import (
    small_image_processor,
    small_language_model,
    small_tokenizer,
    small_vision_tower,
)
from idavlm.models import BoxFormat
from idavlm.training.rewards import box_iou_reward, name_reward
from idavlm.utils import describe_machine, markdown_table

COLOURS = {"Kate": (220, 30, 30), "Tom": (30, 30, 220)}
BOXES = [[4, 8, 28, 56], [36, 8, 60, 56]]
SIZE = (64, 64)
FORM = "bins8"
QUESTION = "Who is it, and where?"


def own_model():
    """A small model of this package with its processor."""
    processor = IDAVLMProcessor(small_image_processor(64), tokenizer(), box_format=FORM, pack_identities=True)
    model = IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=32),
        small_language_model(processor.tokenizer, hidden_size=64),
        processor=processor,
        num_queries=4,
        num_heads=2,
        gate="none",
        null_token=True,
        identity_embedding="name",
    )
    return model, processor


def llava_model():
    """A small LLaVA with an attached ID-Former; all of it is trained."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=32, patch_size=16, hidden_size=32, intermediate_size=64, **small)
    made = tokenizer()
    text = LlamaConfig(vocab_size=len(made), hidden_size=64, intermediate_size=128, **small)
    text.eos_token_id, text.pad_token_id, text.bos_token_id = made.eos_token_id, made.pad_token_id, None
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=made.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
    )
    options = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    wrapped = LlavaProcessor(
        small_image_processor(32), made, image_token="<image>", chat_template=made.chat_template, **options
    )
    model = LlavaForConditionalGeneration(config)
    attach_id_former(model, num_heads=2, hidden_size=32, identity_embedding="name", gate="none", freeze_model=False)
    return model, IdentityProcessor(wrapped, box_format=FORM, pack_identities=True)


def tokenizer():
    """A tokenizer with the words of the task; GRPO pads prompts on the left."""
    answers = [answer(name, box) for name in COLOURS for box in BOXES]
    made = small_tokenizer([QUESTION, *answers, "Kate is", "Tom is"] * 20, vocab_size=340)
    made.padding_side = "left"
    return made


def answer(name: str, box: list[int]) -> str:
    return f"{name} {BoxFormat(FORM).write(name, box, SIZE)}"


def example(name: str, box: list[int]) -> dict:
    """A prompt in the form of TRL, with the columns of the rewards."""
    scene = PILImage.new("RGB", SIZE, "white")
    scene.paste(COLOURS[name], tuple(box))
    parts = [*({"type": "image", "identity": person} for person in COLOURS), {"type": "image"}]
    return {
        "prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}],
        "images": [*(PILImage.new("RGB", SIZE, colour) for colour in COLOURS.values()), scene],
        "names": name,
        "introduced": list(COLOURS),
        "box": box,
        "image_size": list(SIZE),
    }


def random_answers(number: int) -> list[dict]:
    """Conversations whose answers have the right form and nothing else."""
    rng, found = random.Random(0), []
    for _ in range(number):
        asked = example(rng.choice(list(COLOURS)), rng.choice(BOXES))
        text = answer(rng.choice(list(COLOURS)), rng.choice(BOXES))
        reply = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        found.append({"messages": [*asked["prompt"], reply], "images": asked["images"]})
    return found


def dataset(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("own", "llava"), default="own")
    parser.add_argument("--sft-steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=50, help="steps of GRPO (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, processor = own_model() if arguments.model == "own" else llava_model()
    options = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
    }
    start = time.perf_counter()
    sft = SFTConfig(
        **options,
        max_steps=arguments.sft_steps,
        learning_rate=3e-3,
        per_device_train_batch_size=8,
        assistant_only_loss=True,
    )
    warm_up = SFTTrainer(model, sft, train_dataset=dataset(random_answers(64)), processing_class=processor)
    warm_up.remove_callback(PrinterCallback)
    warm_up.train()
    middle = time.perf_counter()
    grpo = GRPOConfig(
        **options,
        max_steps=arguments.steps,
        learning_rate=1e-3,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=12,
        beta=0.0,
    )
    rewards = [name_reward, box_iou_reward(FORM)]
    prompts = dataset([example("Kate", BOXES[0])] * 16)
    trainer = GRPOTrainer(model, rewards, grpo, prompts, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    names = {"reward": "reward", "name": "rewards/name_reward/mean", "IoU": "rewards/box_iou/mean"}
    logged = [
        [float(entry[name]) for name in names.values()] for entry in trainer.state.log_history if "reward" in entry
    ]
    size = max(len(logged) // 5, 1)
    rows = []
    for first in range(0, len(logged), size):
        part = logged[first : first + size]
        means = [sum(column) / len(part) for column in zip(*part, strict=True)]
        rows.append([f"{first + 1}-{first + len(part)}", *(f"{mean:.2f}" for mean in means)])
    print(describe_machine())
    print(f"SFT {middle - start:.0f} s, GRPO {time.perf_counter() - middle:.0f} s; at most 2 = right name + IoU of 1")
    print(markdown_table(["steps", *names], rows))


if __name__ == "__main__":
    main()
