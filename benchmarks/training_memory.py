"""Memory of training steps: the formulas of ``idavlm.training.memory`` against measured small models.

    python -m benchmarks.training_memory
    python -m benchmarks.training_memory --large      # 7B and 34B on 8 to 64 GPUs, from the formulas alone

Measured are the tensors that a forward pass keeps for its backward pass, and the peak of two micro-batches with the
gradients. Weights and optimizer state are there before. The models are a Llama and a ViT with random weights. With
``--device cuda`` the peak is that of the allocator.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from benchmarks.measure import peak_megabytes
from idavlm.training.memory import (
    Layers,
    Strategy,
    activation_memory,
    checkpoint_memory,
    language_model_memory,
    layers_of,
    state_memory,
    step_communication,
)
from idavlm.utils import describe_machine, markdown_table

VOCAB_SIZE = 1000
LARGE = {
    "7B (Qwen2-7B)": (Layers(28, 3584, 18944, 512, True), 7_600_000_000, 152_064),
    "34B (Yi-34B)": (Layers(60, 7168, 20480, 1024, True), 34_400_000_000, 64_000),
}
"""Layers, parameters and vocabulary of large language models."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--large", action="store_true", help="print the table of large models, and measure nothing")
    args = parser.parse_args()
    if args.large:
        print(large_models())
        return
    rows = []
    for name, options in (
        ("Llama, float32", {}),
        ("Llama, grouped queries", {"num_key_value_heads": 1}),
        ("Llama, bf16 autocast", {"bf16": True}),
        ("Llama, checkpointing", {"checkpointing": True}),
        ("Llama, bf16 and checkpointing", {"bf16": True, "checkpointing": True}),
        ("ViT, float32", {"is_vit": True}),
        ("ViT, bf16 autocast", {"is_vit": True, "bf16": True}),
    ):
        rows.append([name, *measure(args, **options)])
    print(f"{describe_machine()}, torch {torch.__version__}\n")
    header = ["model", "kept: formula", "measured", "ratio", "peak with gradients: formula", "measured", "ratio"]
    print(markdown_table(header, rows))


def large_models() -> str:
    """Memory in GiB and communication in GB per optimizer step of one rank, on 8, 16, 32 and 64 ranks."""
    rows = []
    for name, (layers, num_parameters, vocab_size) in LARGE.items():
        of_lora = 64 * layers.num_layers * _lora_width(layers)
        for method, stage, trained, frozen, frozen_bytes in (
            ("all parameters, ZeRO-2", 2, num_parameters, 0, 2),
            ("all parameters, ZeRO-3", 3, num_parameters, 0, 2),
            ("LoRA, DDP or ZeRO-2", 2, of_lora, num_parameters, 2),
            ("LoRA, ZeRO-3", 3, of_lora, num_parameters, 2),
            ("QLoRA, DDP or ZeRO-2", 2, of_lora, num_parameters, 0.55),
        ):
            memory, sent = [], []
            for ranks in (8, 16, 32, 64):
                strategy = Strategy(
                    num_ranks=ranks,
                    stage=stage,
                    weight_bytes=2,
                    frozen_bytes=frozen_bytes,
                    compute_bytes=2,
                    has_master_weights=True,
                    checkpointing=True,
                )
                found = sum(state_memory(trained, frozen, layers.num_weights(), strategy).values())
                found += language_model_memory(layers, 2048, 512, vocab_size, strategy)
                memory.append(f"{found / 2**30:.0f}")
                sent.append(step_communication(trained, frozen, 8, strategy) / 1e9)
            rows.append([name, method, *memory, f"{sent[0]:.1f}", f"{sent[-1]:.1f}"])
    header = ["model", "method", "8 GPUs", "16", "32", "64", "sent, 8 GPUs", "64"]
    return markdown_table(header, rows)


def _lora_width(layers: Layers) -> int:
    """Inputs and outputs of the seven linear layers of a layer, which a rank is multiplied with."""
    attention = 4 * layers.hidden_size + 2 * (layers.hidden_size + layers.kv_size)
    return attention + 3 * (layers.hidden_size + layers.intermediate_size)


def measure(
    args: argparse.Namespace,
    *,
    bf16: bool = False,
    checkpointing: bool = False,
    is_vit: bool = False,
    num_key_value_heads: int = 4,
) -> list[str]:
    """Formula, measured value and ratio of the kept tensors and of the peak, in MiB."""
    model, inputs = build(args, is_vit=is_vit, num_key_value_heads=num_key_value_heads)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    strategy = Strategy(compute_bytes=2 if bf16 else 4, checkpointing=checkpointing)
    layers, num_tokens = layers_of(model.config), args.batch_size * args.length
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    kept = (checkpoint_memory if checkpointing else activation_memory)(layers, num_tokens, strategy)
    logits = 0 if is_vit else num_tokens
    gradients = state_memory(num_parameters, 0, 0, strategy)["gradients"]

    def forward() -> Tensor:
        with torch.autocast(args.device.type, torch.bfloat16, enabled=bf16):
            output = model(**inputs)
        return output.last_hidden_state.float().pow(2).mean() if is_vit else output.loss

    def step() -> None:
        for _ in range(2):  # the second micro-batch finds the gradients of the first one
            forward().backward()
        model.zero_grad()

    expected = gradients + language_model_memory(layers, num_tokens, logits, VOCAB_SIZE, strategy)
    found = []
    for formula, measured in ((kept, kept_megabytes(forward, model)), (expected, peak_megabytes(step, args.device))):
        found += [f"{formula / 2**20:.1f}", f"{measured:.1f}", f"{formula / 2**20 / measured:.2f}"]
    return found


def build(args: argparse.Namespace, *, is_vit: bool, num_key_value_heads: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random weights and a batch for it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers, "num_attention_heads": 4}
    if is_vit:
        side = int(args.length**0.5) * 4
        config = ViTConfig(**sizes, intermediate_size=4 * args.hidden_size, image_size=side, patch_size=4)
        model = ViTModel(config, add_pooling_layer=False)
        inputs = {"pixel_values": torch.randn(args.batch_size, 3, side, side)}
    else:
        config = LlamaConfig(
            **sizes,
            intermediate_size=int(2.6875 * args.hidden_size),
            num_key_value_heads=num_key_value_heads,
            vocab_size=VOCAB_SIZE,
        )
        model = LlamaForCausalLM(config)
        ids = torch.randint(0, VOCAB_SIZE, (args.batch_size, args.length))
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    inputs = {name: value.to(args.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return model.to(args.device).train(), inputs


def kept_megabytes(forward: Callable[[], Tensor], model: nn.Module) -> float:
    """MiB of the tensors that a forward pass keeps for the backward pass, without parameters and logits."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # a storage that is freed could be counted under the address of a later one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and VOCAB_SIZE not in tensor.shape:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values()) / 2**20


if __name__ == "__main__":
    main()
