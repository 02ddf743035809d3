"""What inner adaptors cost: the text workflow against the bare base, others against the number of layers.

    python -m benchmarks.inner_adaptor              # CPU, float32
    python -m benchmarks.inner_adaptor --device cuda --dtype bfloat16 --hidden-size 4096 --layers 32 --length 1024

"reading" is one pass over a prompt without a cache, "writing" a token at a time with one. "expected" is the ratio of
floating-point operations in matrix products, which is what adaptors add; "over" is how far the measured ratio lies
above it. Megabytes are the most that tensors made on the way held at one time; weights are counted by themselves.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.id_former import flops
from benchmarks.measure import argument_parser, describe_machine, markdown_table, peak_megabytes, time_side_by_side
from idavlm import add_inner_adaptors
from idavlm._compat import cache_name


def build_base(args: argparse.Namespace) -> nn.Module:
    """A Llama with random weights and a small vocabulary, so that layers are what is measured."""
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
    """With so many adaptors, spread evenly, in workflow "multimodal"."""
    count = len(base.model.layers)
    layers = [round((place + 1) * count / number) - 1 for place in range(number)]
    return add_inner_adaptors(copy.deepcopy(base), layers=layers, workflows=("multimodal",))


def reading(model: nn.Module, ids: Tensor, **options) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        return model(input_ids=ids, use_cache=False, **options).logits

    return run


def writing(model: nn.Module, ids: Tensor, steps: int, **options) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        cache, logits = {cache_name(): DynamicCache(config=model.config)}, None
        for place in range(steps):
            token = ids[:, place : place + 1]
            logits = model(input_ids=token, use_cache=True, **cache, **options).logits
        return logits

    return run


def megabytes(model: nn.Module) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / 2**20


def text_rows(base: nn.Module, ids: Tensor, args: argparse.Namespace) -> list[list[object]]:
    """The text workflow does what the base does, to the bit, in the same time and memory."""
    model, rows = adapted(base, args.layers // 2), []
    for name, way in (("reading", reading), ("writing", lambda *a, **o: writing(*a, args.steps, **o))):
        functions = {"base": way(base, ids), "text": way(model, ids, workflow="text")}
        assert torch.equal(*(function() for function in functions.values()))
        times = time_side_by_side(functions, args.device, args.rounds)
        peaks = {key: peak_megabytes(function, args.device) for key, function in functions.items()}
        over = [f"{100 * (of['text'] / of['base'] - 1):+.1f}%" for of in (times, peaks)]
        rows.append([name, *(f"{time:.1f}" for time in times.values()), over[0]])
        rows[-1] += [*(f"{peak:.2f}" for peak in peaks.values()), over[1]]
    return rows


def multimodal_rows(base: nn.Module, ids: Tensor, args: argparse.Namespace) -> list[list[object]]:
    """Against the bare base, by the number of adaptors."""
    numbers = [number for number in (1, 2, 4, 8, 16) if number <= args.layers]
    models = {number: adapted(base, number) for number in numbers}
    functions = {0: reading(base, ids)} | {number: reading(models[number], ids) for number in numbers}
    times = time_side_by_side(functions, args.device, args.rounds)
    operations = {number: flops(function) for number, function in functions.items()}
    rows = []
    for number, function in functions.items():
        ratio, expected = times[number] / times[0], operations[number] / operations[0]
        rows.append([number, f"{times[number]:.1f}", f"{ratio:.3f}x", f"{expected:.3f}x"])
        rows[-1] += [f"{100 * (ratio / expected - 1):+.1f}%", f"{peak_megabytes(function, args.device):.2f}"]
        rows[-1] += [f"{megabytes(models.get(number, base)):.0f}"]
    return rows


def main() -> None:
    parser = argument_parser(__doc__, rounds=15)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16, help="tokens that are written")
    args = parser.parse_args()
    print(describe_machine(args.device))
    print(
        f"Llama of {args.layers} layers of width {args.hidden_size}, {args.dtype}; {args.batch} x {args.length} tokens "
        f"read, {args.steps} written; medians of {args.rounds} rounds\n"
    )
    base = build_base(args)
    ids = torch.randint(0, 1024, (args.batch, args.length), device=args.device)
    header = ("text workflow", "base ms", "text ms", "over", "base MB", "text MB", "over")
    print(markdown_table(header, text_rows(base, ids, args)), end="\n\n")
    header = ("adaptors, reading", "ms", "ratio", "expected", "over", "MB", "weights MB")
    print(markdown_table(header, multimodal_rows(base, ids, args)))


if __name__ == "__main__":
    main()
