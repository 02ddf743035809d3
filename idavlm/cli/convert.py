"""``idavlm convert SRC OUT``: convert a released checkpoint to a folder for ``from_pretrained``."""

import argparse

from idavlm.cli.arguments import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("src", type=path, help="folder of the checkpoint; its format is detected")
    parser.add_argument("out", type=path, help="folder to create; must not exist")
    parser.add_argument("--vision-tower", type=path, help="folder of the vision tower, if src only names a model")
    parser.add_argument("--tokenizer", type=path, help="folder of the tokenizer (or qwen.tiktoken), if src has none")
    parser.add_argument("--adapter", type=path, help="folder of a LoRA adapter (peft or LLaVA) to merge")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="type of the weights; by default unchanged"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> None:
    """Convert the checkpoint."""
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
