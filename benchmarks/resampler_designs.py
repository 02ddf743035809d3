"""Alternative computations of the resampler, compared with the one in the library.

    python -m benchmarks.resampler_designs

All compute the same values from the same weights. The "absorbed" designs use that the queries are the same for every
image: since ``q (W_k x) = (W_k^T q) x``, keys need not be computed, and values neither by the same argument. This takes
fewer operations while heads x queries < hidden size. Their drawbacks: they access the weights of the projections
directly, which bypasses LoRA and quantised layers, and they materialise the attention matrix.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import argument_parser, peak_megabytes, time_side_by_side, tolerance
from idavlm import Resampler
from idavlm.utils import describe_machine, markdown_table


def library(resampler: Resampler, x: Tensor, key_bias: Tensor) -> Tensor:
    """The design of :class:`idavlm.Resampler`."""
    return resampler.resample(x, key_bias)


def positions_added(resampler: Resampler, x: Tensor, key_bias: Tensor) -> Tensor:
    """Keys are projected from ``x + position``, as in ``nn.MultiheadAttention``."""
    attention, grid = resampler.attention, (int(x.shape[1] ** 0.5),) * 2
    queries = resampler.query_norm(resampler.query) + resampler.position
    q, k, v = (
        attention._split_heads(y).transpose(-3, -2)
        for y in (
            attention.q_proj(queries),
            attention.k_proj(x + resampler.resize_to_patches(resampler.position, grid)),
            attention.v_proj(x),
        )
    )
    out = F.scaled_dot_product_attention(q.expand(len(x), -1, -1, -1), k, v)
    return attention.out_proj(out.transpose(1, 2).flatten(-2))


def one_kv_matmul(resampler: Resampler, x: Tensor, key_bias: Tensor) -> Tensor:
    """One projection computes both keys and values."""
    attention = resampler.attention
    queries = resampler.query_norm(resampler.query) + resampler.position
    weight = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
    bias = torch.cat([key_bias + attention.k_proj.bias, attention.v_proj.bias.expand_as(key_bias)], dim=-1)
    k, v = F.linear(x, weight).add_(bias).chunk(2, dim=-1)
    q, k, v = (attention._split_heads(y).transpose(-3, -2) for y in (attention.q_proj(queries), k, v))
    out = F.scaled_dot_product_attention(q.expand(len(x), -1, -1, -1), k, v)
    return attention.out_proj(out.transpose(1, 2).flatten(-2))


def chunks_of_eight(resampler: Resampler, x: Tensor, key_bias: Tensor) -> Tensor:
    """The design of the library, for eight images at a time."""
    return torch.cat([resampler.resample(images, key_bias) for images in x.split(8)])


def _absorbed_weights(resampler: Resampler, x: Tensor, key_bias: Tensor) -> Tensor:
    """Attention weights ``[I, H * Q, P]``, computed without keys."""
    attention = resampler.attention
    queries = resampler.query_norm(resampler.query) + resampler.position
    q = attention._split_heads(attention.q_proj(queries)).transpose(0, 1) * (x.shape[-1] // attention.num_heads) ** -0.5
    absorbed = (q @ attention.k_proj.weight.view(attention.num_heads, -1, x.shape[-1])).flatten(0, 1)
    bias = (q @ attention._split_heads(key_bias).permute(1, 2, 0)).flatten(0, 1)
    images = len(x)
    scores = torch.baddbmm(bias.expand(images, -1, -1), absorbed.expand(images, -1, -1), x.transpose(1, 2))
    return scores.softmax(dim=-1)


def absorbed_keys(resampler: Resampler, x: Tensor, key_bias: Tensor) -> Tensor:
    """The projection of the keys is applied to the queries."""
    attention = resampler.attention
    weights = _absorbed_weights(resampler, x, key_bias).unflatten(1, (attention.num_heads, -1))
    v = attention._split_heads(attention.v_proj(x)).transpose(1, 2)
    return attention.out_proj((weights @ v).transpose(1, 2).flatten(-2))


def absorbed_keys_and_values(resampler: Resampler, x: Tensor, key_bias: Tensor) -> Tensor:
    """In addition, the projection of the values is applied to the averaged patches."""
    attention = resampler.attention
    averaged = torch.bmm(_absorbed_weights(resampler, x, key_bias), x).unflatten(1, (attention.num_heads, -1))
    weights = attention.v_proj.weight.chunk(attention.num_heads)
    out = torch.cat([F.linear(averaged[:, head], weight) for head, weight in enumerate(weights)], dim=-1)
    return attention.out_proj(out + attention.v_proj.bias)


DESIGNS: dict[str, Callable] = {
    "library": library,
    "positions added to the keys' input": positions_added,
    "one matmul for keys and values": one_kv_matmul,
    "chunks of eight images": chunks_of_eight,
    "absorbed keys": absorbed_keys,
    "absorbed keys and values": absorbed_keys_and_values,
}


def main() -> None:
    parser = argument_parser(__doc__, rounds=9)
    parser.add_argument("--hidden-size", type=int, default=1024, help="width of the tokens (default: %(default)s)")
    parser.add_argument("--num-heads", type=int, default=8, help="attention heads (default: %(default)s)")
    parser.add_argument("--num-queries", type=int, default=64, help="tokens per image (default: %(default)s)")
    parser.add_argument("--num-patches", type=int, default=256, help="patches per image (default: %(default)s)")
    parser.add_argument("--images", type=int, default=32, help="images per batch (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    resampler = Resampler(hidden_size=args.hidden_size, num_queries=args.num_queries, num_heads=args.num_heads)
    resampler.to(args.device, args.dtype)
    shape = (args.images, args.num_patches, args.hidden_size)
    features = torch.randn(*shape, device=args.device, dtype=args.dtype)
    grid = (int(args.num_patches**0.5),) * 2

    def run(design: Callable, train: bool) -> Tensor:
        with torch.set_grad_enabled(train):
            out = design(resampler, resampler.project_patches(features), resampler.key_bias(grid))
        if train:
            resampler.zero_grad(set_to_none=True)
            out.float().square().mean().backward()
        return out

    expected = run(library, False)
    rows = []
    for direction, train in (("forward", False), ("forward + backward", True)):
        for design in DESIGNS.values():
            torch.testing.assert_close(run(design, train), expected, **tolerance(args.dtype))
        functions = {name: lambda design=design, train=train: run(design, train) for name, design in DESIGNS.items()}
        times = time_side_by_side(functions, args.device, args.rounds)
        for name, function in functions.items():
            megabytes = peak_megabytes(function, args.device)
            rows.append(
                [name, direction, f"{times[name]:.1f}", f"{times['library'] / times[name]:.2f}x", f"{megabytes:.0f}"]
            )
    sizes = f"{list(shape)} patches, {args.num_heads} heads, {args.num_queries} queries"
    print(f"{describe_machine(args.device)}; {args.dtype}; {sizes}; median of {args.rounds} rounds\n")
    print(markdown_table(["design", "direction", "ms", "speed", "MB"], rows))


if __name__ == "__main__":
    main()
