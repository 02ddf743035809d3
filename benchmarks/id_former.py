"""Time and peak memory of IDFormer and of the released computation, forward and forward + backward.

    python -m benchmarks.id_former              # CPU, float32
    python -m benchmarks.id_former --device cuda --dtype bfloat16 --samples 8

Both have the same weights, and their outputs are compared first. All parameters need gradients; the image features do
not, since the vision tower is frozen as in the paper. "FLOPs" is the ratio of floating-point operations in matrix
products: the largest speed-up possible where these limit the time. "of matmul" is the share of the rate of one large
matrix product that IDFormer reaches. "products alone" is the share that the same matrix products and attentions reach
without anything between them, the bound for any code around them. Both are measured in turn with the modules, the large
product for about a quarter of their time, so that all see the same load of the machine.
"""

import argparse
import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.measure import argument_parser, large_matmul, peak_megabytes, time_side_by_side, tolerance
from benchmarks.released import ReleasedIDFormer, to_idavlm
from idavlm import IDFormer
from idavlm.utils import ImageRole, describe_machine, markdown_table

SMALL = {"hidden_size": 1024, "num_heads": 8, "num_queries": 64, "vision_hidden_size": 1024}
RELEASED = {"hidden_size": 4096, "num_heads": 32, "num_queries": 256, "vision_hidden_size": 1664}

HEADER = ["case", "released ms", "IDFormer ms", "speed", "FLOPs", "of matmul", "products alone"]
HEADER += ["released MB", "IDFormer MB"]

aten = torch.ops.aten
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""Operators that torch does not count."""


def batch(samples: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """``image_roles`` and ``sample_index`` of samples with these numbers of references and scenes."""
    roles = []
    for references, scenes in samples:
        roles += [ImageRole.REFERENCE] * references + [ImageRole.SCENE] * scenes
    index = [number for number, sample in enumerate(samples) for _ in range(sum(sample))]
    return torch.tensor(roles), torch.tensor(index)


def ragged(samples: int) -> list[tuple[int, int]]:
    """Samples of 1 to 6 references and 1 to 4 scenes, the same in each run."""
    draw = random.Random(0)
    return [(draw.randint(1, 6), draw.randint(1, 4)) for _ in range(samples)]


def build(
    sizes: dict[str, int], device: torch.device, dtype: torch.dtype, attn_implementation: str = "sdpa"
) -> tuple[ReleasedIDFormer, IDFormer]:
    """Both modules with the same random weights, also for projections that are initialised with zeros."""
    torch.manual_seed(0)
    released = ReleasedIDFormer(**sizes)
    for parameter in released.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    id_former = IDFormer(**sizes, attn_implementation=attn_implementation)
    id_former.load_state_dict(to_idavlm(released.state_dict()))
    return released.to(device, dtype), id_former.to(device, dtype)


def forward_backward(module: torch.nn.Module, *inputs: Tensor) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        module(*inputs).float().square().mean().backward()

    return run


def flops(function: Callable[[], object]) -> int:
    """Floating-point operations in the matrix products of ``function``."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


class _Products(TorchDispatchMode):
    """Keeps the calls of all operators whose floating-point operations :func:`flops` counts."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in flop_registry or func.overloadpacket in CPU_ATTENTION:
            self.calls.append((func, args, kwargs))
        return func(*args, **kwargs)


def products_alone(function: Callable[[], object]) -> Callable[[], None]:
    """Only the matrix products and attentions of ``function``, one after the other, on the same operands."""
    with _Products() as products:
        function()

    @torch.no_grad()
    def run() -> None:
        for operator, args, kwargs in products.calls:
            operator(*args, **kwargs)

    return run


def compare(name: str, functions: dict[str, Callable], args: argparse.Namespace) -> list[object]:
    """One row of a table with the columns ``HEADER``."""
    device, dtype, rounds = args.device, args.dtype, args.rounds
    operations = {key: flops(function) for key, function in functions.items()}
    matmul, matmul_operations = large_matmul(device, dtype)
    repeats = max(1, round(operations["IDFormer"] / 4 / matmul_operations))

    def matmuls() -> None:
        for _ in range(repeats):
            matmul()

    measured = {**functions, "products": products_alone(functions["IDFormer"]), "matmul": matmuls}
    times = time_side_by_side(measured, device, rounds)
    at_full_rate = operations["IDFormer"] / (repeats * matmul_operations) * times["matmul"]
    del measured  # it keeps the operands of the products
    megabytes = {key: peak_megabytes(function, device) for key, function in functions.items()}
    return [
        name,
        *(f"{times[key]:.1f}" for key in functions),
        f"{times['released'] / times['IDFormer']:.2f}x",
        f"{operations['released'] / operations['IDFormer']:.2f}x",
        f"{at_full_rate / times['IDFormer']:.0%}",
        f"{at_full_rate / times['products']:.0%}",
        *(f"{megabytes[key]:.0f}" for key in functions),
    ]


def measure_case(
    name: str, sizes: dict[str, int], num_patches: int, samples: list[tuple[int, int]], args: argparse.Namespace
) -> list[list[object]]:
    released, id_former = build(sizes, args.device, args.dtype, args.attn_implementation)
    roles, index = batch(samples)
    features = torch.randn(len(roles), num_patches, sizes["vision_hidden_size"], device=args.device, dtype=args.dtype)
    inputs = (features, roles, index)
    with torch.no_grad():
        torch.testing.assert_close(id_former(*inputs), released(*inputs), **tolerance(args.dtype))
        functions = {"released": lambda: released(*inputs), "IDFormer": lambda: id_former(*inputs)}
        rows = [compare(f"{name}, forward", functions, args)]
    functions = {"released": forward_backward(released, *inputs), "IDFormer": forward_backward(id_former, *inputs)}
    return [*rows, compare(f"{name}, forward + backward", functions, args)]


@torch.no_grad()
def measure_video(
    name: str, sizes: dict[str, int], num_patches: int, frames: int, args: argparse.Namespace
) -> list[object]:
    """Frames that arrive one by one and share three references. The released code encodes these for every frame."""
    released, id_former = build(sizes, args.device, args.dtype, args.attn_implementation)
    shape = (num_patches, sizes["vision_hidden_size"])
    references = torch.randn(3, *shape, device=args.device, dtype=args.dtype)
    scenes = torch.randn(frames, 1, *shape, device=args.device, dtype=args.dtype)
    identities = [id_former.encode_references(reference[None]) for reference in references]
    roles, index = batch([(3, 1)])
    functions = {
        "released": lambda: [released(torch.cat([references, scene]), roles, index) for scene in scenes],
        "IDFormer": lambda: [id_former.forward_scenes(scene, identities) for scene in scenes],
    }
    return compare(name, functions, args)


def main() -> None:
    parser = argument_parser(__doc__, rounds=7)
    parser.add_argument("--samples", type=int, default=8, help="samples at hidden size 1024 (default: %(default)s)")
    parser.add_argument(
        "--released-samples", type=int, default=1, help="samples at hidden size 4096; 0: none (default: %(default)s)"
    )
    parser.add_argument("--attn-implementation", default="sdpa", help="backend of IDFormer (default: %(default)s)")
    args = parser.parse_args()

    rows = measure_case(f"C 1024, {args.samples} x (3 + 1)", SMALL, 256, [(3, 1)] * args.samples, args)
    rows += measure_case(f"C 1024, {args.samples} x (1..6 + 1..4)", SMALL, 256, ragged(args.samples), args)
    rows += [measure_video("C 1024, 8 frames, 3 references", SMALL, 256, 8, args)]
    if args.released_samples:
        samples = [(3, 1)] * args.released_samples
        rows += measure_case(f"C 4096, {args.released_samples} x (3 + 1)", RELEASED, 1024, samples, args)
    print(f"{describe_machine(args.device)}; {args.dtype}; median of {args.rounds} rounds\n")
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()
