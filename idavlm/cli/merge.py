"""``idavlm merge ADAPTER --out OUT``: merge a LoRA adapter into the model that it was trained on."""

import argparse
import shutil
from pathlib import Path

from idavlm.cli.arguments import name, path

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "identity_processor.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("adapter", type=path, help="folder of save_lora, or a checkpoint of IDTrainer")
    parser.add_argument("--out", type=path, required=True, help="folder to create; must not exist")
    parser.add_argument(
        "--model", type=name, help="the model without the adapter; by default the one that the adapter names"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="type of the weights; by default unchanged"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the merged model with its processor."""
    if arguments.out.exists():
        raise ValueError(f"--out {arguments.out} exists; pass a folder that does not.")
    # After the check, because these imports take seconds.
    from idavlm.training.lora import load_lora, merge_lora, save_merged

    options = {} if arguments.dtype is None else {"dtype": arguments.dtype}
    adapted = load_lora(arguments.adapter, arguments.model, **options)
    source = arguments.model or adapted.peft_config["default"].base_model_name_or_path
    save_merged(merge_lora(adapted), arguments.out)
    for folder in (arguments.adapter, Path(source)):
        if _copy_processor(folder, arguments.out):
            print(f"{arguments.out}: the merged model, with the processor of {folder}")
            return
    if Path(source).is_dir():
        print(f"{arguments.out}: the merged model. Neither {arguments.adapter} nor {source} has a processor to copy.")
        return
    from transformers import AutoProcessor

    AutoProcessor.from_pretrained(source).save_pretrained(arguments.out)
    print(f"{arguments.out}: the merged model, with the processor of {source}")


def _copy_processor(folder: Path, out: Path) -> bool:
    """Copy the files of a processor; False if the folder has none."""
    files = [file for pattern in PROCESSOR_FILES for file in sorted(folder.glob(pattern))]
    for file in files:
        shutil.copy(file, out)
    return bool(files)
