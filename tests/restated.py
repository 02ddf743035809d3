"""Every option of IDFormer restated image by image: tokens and maps, with textbook attention and no ragged anything."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from idavlm import IDFormer


def restate(
    id_former: IDFormer,
    features: Tensor,
    roles: list[int],
    samples: list[int],
    identities: list[int],
    num_identities: int,
) -> tuple[Tensor, list[Tensor]]:
    """``[I, Q, C]`` tokens and ``[I, P, G + 1]`` maps, one a layer; ``identities`` is read for references only."""
    weights = dict(id_former.state_dict(keep_vars=True))
    heads = id_former.resampler.attention.num_heads
    position = weights["resampler.query_position"]
    width = position.shape[1]
    side, patch_side = round(len(position) ** 0.5), round(features.shape[1] ** 0.5)
    image = position.T.reshape(1, -1, side, side)
    patch_position = F.interpolate(image, size=(patch_side, patch_side), mode="bicubic", align_corners=False)
    patch_position = patch_position[0].flatten(1).T

    one_hot = torch.zeros_like(position)  # one block of channels per column, then one per row
    for query in range(len(position)):
        for half, place in enumerate((query % side, query // side)):
            of_half = one_hot[query, half * width // 2 : (half + 1) * width // 2]
            of_half[[channel * side // (width // 2) == place for channel in range(width // 2)]] = (side / 2) ** 0.5

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(name: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            linear(f"{name}.{part}_proj", x).chunk(heads, dim=-1)
            for part, x in (("q", query), ("k", key), ("v", value))
        )
        shares = [torch.softmax(a @ b.T / a.shape[-1] ** 0.5, dim=-1) for a, b in zip(q, k, strict=True)]
        found = torch.cat([share @ c for share, c in zip(shares, v, strict=True)], dim=-1)
        return linear(f"{name}.out_proj", found), sum(shares) / heads

    def feed_forward(name: str, x: Tensor) -> Tensor:
        if f"{name}.up_proj.weight" not in weights:
            return torch.zeros_like(x)
        return linear(f"{name}.down_proj", F.gelu(linear(f"{name}.up_proj", norm(f"{name}.norm", x))))

    def gate(name: str) -> Tensor | float:
        return torch.tanh(weights[name]) if name in weights else 1.0

    def read(x: Tensor) -> Tensor:
        query = norm("resampler.query_norm", weights["resampler.query"]) + position
        tokens = attend("resampler.attention", query, x + patch_position, x)[0]
        tokens = tokens + feed_forward("resampler.feed_forward", tokens)
        if "resampler.token_norm.weight" not in weights:
            return tokens
        added = {"sincos": position, "one_hot": one_hot}[id_former.resampler.token_position_embedding]
        return norm("resampler.token_norm", tokens) + added

    def finish(tokens: Tensor) -> Tensor:
        if "resampler.output_proj.weight" not in weights:
            return tokens
        return norm("resampler.output_norm", tokens) @ weights["resampler.output_proj.weight"].T

    def embed(image: int, shares: Tensor) -> Tensor | float:
        """Identity embedding: a reference gets its own, other images the mean of the map in the cell of each query."""
        if "identity_embedding.weight" not in weights:
            return 0.0
        embeddings = weights["identity_embedding.weight"][:num_identities]
        if roles[image] == 0:
            return embeddings[identities[image]]
        side, rows = int(len(shares) ** 0.5), int(len(position) ** 0.5)
        edges = [(math.floor(i * side / rows), math.ceil((i + 1) * side / rows)) for i in range(rows)]
        grid = shares[:, :-1].view(side, side, -1)
        cells = [grid[top:bottom, left:right].mean((0, 1)) for top, bottom in edges for left, right in edges]
        return torch.stack(cells) @ embeddings

    patches = [norm("resampler.input_norm", x @ weights["resampler.input_proj.weight"].T) for x in features]
    tokens, maps = [], [[] for _ in id_former.identity_layers]
    for number, x in enumerate(patches):
        own = [i for i, role in enumerate(roles) if role == 0 and samples[i] == samples[number]]
        keys, owner = [], []
        if "null_token" in weights:
            keys.append(weights["null_token"])
            owner.append(torch.tensor([num_identities]))
        for i in own:
            key = read(patches[i]) if id_former.identity_keys == "tokens" else patches[i]
            key = key.detach() if id_former.detach_references else key
            keys.append(key)
            owner.append(torch.full((len(key),), identities[i]))
        for layer, layer_maps in enumerate(maps):
            if roles[number] != 1 or not own:
                layer_maps.append(F.one_hot(torch.full((len(x),), num_identities), num_identities + 1).to(x))
                continue
            name = f"identity_layers.{layer}"
            found, shares = attend(f"{name}.attention", x + patch_position, torch.cat(keys), torch.cat(keys))
            x = x + gate(f"{name}.attention_gate") * found
            x = x + gate(f"{name}.feed_forward_gate") * feed_forward(f"{name}.feed_forward", x)
            layer_maps.append(shares @ F.one_hot(torch.cat(owner), num_identities + 1).to(x))
        tokens.append(finish(read(x)) + embed(number, maps[-1][-1]))
    return torch.stack(tokens), [torch.stack(layer_maps) for layer_maps in maps]
