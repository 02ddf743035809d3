"""``idavlm convert SRC OUT``: a released checkpoint to a folder that ``from_pretrained`` loads."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", type=Path, help="folder of the checkpoint; its format is told by what is in it")
    parser.add_argument("out", type=Path, help="folder to make; it must not be there")
    parser.add_argument("--vision-tower", type=Path, help="folder of the vision tower, where src only names a model")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (or qwen.tiktoken), where src has none")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter to merge, of peft or of LLaVA")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights; else as they are")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> None:
    from idavlm.conversion import convert

    out = convert(
        arguments.src,
        arguments.out,
        vision_tower=arguments.vision_tower,
        tokenizer=arguments.tokenizer,
        adapter=arguments.adapter,
        dtype=arguments.dtype,
        progress=not arguments.quiet,
    )
    print(f"{out}: load it with IDAVLMForConditionalGeneration.from_pretrained and IDAVLMProcessor.from_pretrained")
