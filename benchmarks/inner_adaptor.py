"""The cost of inner adaptors: the text workflow against the bare base model, other workflows by number of adaptors.

    python -m benchmarks.inner_adaptor              # CPU, float32
    python -m benchmarks.inner_adaptor --device cuda --dtype bfloat16 --hidden-size 4096 --layers 32 --length 1024

"prefill" is one pass over a prompt without a cache, "decode" one token at a time with a cache. "expected" is the ratio
of floating-point operations in matrix products, and "overhead" the measured ratio relative to it. "MB" is the peak
memory of activations; weights have a column of their own.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.id_former import flops
from benchmarks.measure import argument_parser, peak_megabytes, time_side_by_side
from idavlm import add_inner_adaptors
from idavlm._compat import cache_name
from idavlm.modules.inner_adaptor import use_workflow
from idavlm.utils import describe_machine, markdown_table


def build_base(args: argparse.Namespace) -> nn.Module:
    """A Llama with random weights. Its vocabulary is small, so that the layers dominate the time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 64,
        max_position_embeddings=2 * args.length,
    )
    return LlamaForCausalLM(config).to(args.device, args.dtype).eval()


def adapted(base: nn.Module, number: int) -> nn.Module:
    """A copy of the base with ``number`` evenly spaced inner adaptors in the workflow "multimodal"."""
    num_layers = len(base.model.layers)
    layers = [round((index + 1) * num_layers / number) - 1 for index in range(number)]
    return add_inner_adaptors(copy.deepcopy(base), layers=layers, workflows=("multimodal",))


def prefill(model: nn.Module, ids: Tensor, workflow: str | None = None) -> Callable[[], Tensor]:
    """One pass over the prompts without a cache."""

    @torch.no_grad()
    def run() -> Tensor:
        with _in_workflow(model, workflow):
            return model(input_ids=ids, use_cache=False).logits

    return run


def decode(model: nn.Module, ids: Tensor, steps: int, workflow: str | None = None) -> Callable[[], Tensor]:
    """``steps`` passes over one token per prompt, with a cache."""

    @torch.no_grad()
    def run() -> Tensor:
        cache, logits = {cache_name(): DynamicCache(config=model.config)}, None
        with _in_workflow(model, workflow):
            for step in range(steps):
                logits = model(input_ids=ids[:, step : step + 1], use_cache=True, **cache).logits
        return logits

    return run


def _in_workflow(model: nn.Module, workflow: str | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if workflow is None else use_workflow(model, workflow)


def weight_megabytes(model: nn.Module) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / 2**20


def text_rows(base: nn.Module, ids: Tensor, args: argparse.Namespace) -> list[list[object]]:
    """The text workflow against the base; their logits must be equal to the bit."""
    model, rows = adapted(base, args.layers // 2), []
    for name, functions in {
        "prefill": {"base": prefill(base, ids), "text": prefill(model, ids, workflow="text")},
        "decode": {"base": decode(base, ids, args.steps), "text": decode(model, ids, args.steps, workflow="text")},
    }.items():
        assert torch.equal(*(function() for function in functions.values()))
        times = time_side_by_side(functions, args.device, args.rounds)
        peaks = {key: peak_megabytes(function, args.device) for key, function in functions.items()}
        time_overhead, memory_overhead = (f"{100 * (x['text'] / x['base'] - 1):+.1f}%" for x in (times, peaks))
        rows.append(
            [
                name,
                *(f"{time:.1f}" for time in times.values()),
                time_overhead,
                *(f"{peak:.2f}" for peak in peaks.values()),
                memory_overhead,
            ]
        )
    return rows


def multimodal_rows(base: nn.Module, ids: Tensor, args: argparse.Namespace) -> list[list[object]]:
    """The multimodal workflow against the base, by number of adaptors."""
    numbers = [number for number in (1, 2, 4, 8, 16) if number <= args.layers]
    models = {number: adapted(base, number) for number in numbers}
    functions = {0: prefill(base, ids)} | {number: prefill(model, ids) for number, model in models.items()}
    times = time_side_by_side(functions, args.device, args.rounds)
    operations = {number: flops(function) for number, function in functions.items()}
    rows = []
    for number, function in functions.items():
        ratio, expected = times[number] / times[0], operations[number] / operations[0]
        rows.append(
            [
                number,
                f"{times[number]:.1f}",
                f"{ratio:.3f}x",
                f"{expected:.3f}x",
                f"{100 * (ratio / expected - 1):+.1f}%",
                f"{peak_megabytes(function, args.device):.2f}",
                f"{weight_megabytes(models.get(number, base)):.0f}",
            ]
        )
    return rows


def main() -> None:
    parser = argument_parser(__doc__, rounds=15)
    parser.add_argument("--hidden-size", type=int, default=512, help="of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of the model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="prompts (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="tokens to decode (default: %(default)s)")
    args = parser.parse_args()
    print(describe_machine(args.device))
    print(
        f"Llama of {args.layers} layers of width {args.hidden_size}, {args.dtype}; prefill of {args.batch} x "
        f"{args.length} tokens, decoding of {args.steps}; median of {args.rounds} rounds\n"
    )
    base = build_base(args)
    ids = torch.randint(0, 1024, (args.batch, args.length), device=args.device)
    header = ("text workflow", "base ms", "text ms", "overhead", "base MB", "text MB", "overhead")
    print(markdown_table(header, text_rows(base, ids, args)), end="\n\n")
    header = ("adaptors, prefill", "ms", "ratio", "expected", "overhead", "MB", "weights MB")
    print(markdown_table(header, multimodal_rows(base, ids, args)))


if __name__ == "__main__":
    main()
