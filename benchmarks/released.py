"""The released ID-Former, reimplemented from its description as a baseline to measure and to check against.

It loops in Python over the groups of images with one role, uses ``nn.MultiheadAttention`` and returns its attention
matrix, repeats and projects the queries for every image, and repeats the references for every scene.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReleasedIDFormer(nn.Module):
    """IDA-VLM's ``attn_pool``: parameter names, shapes and computation of the release (arXiv 2407.07577)."""

    def __init__(self, *, hidden_size: int, num_queries: int, num_heads: int, vision_hidden_size: int):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(num_queries, hidden_size), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(num_queries, hidden_size))
        projected = vision_hidden_size != hidden_size
        self.kv_proj = nn.Linear(vision_hidden_size, hidden_size, bias=False) if projected else nn.Identity()
        self.attn = nn.MultiheadAttention(hidden_size, num_heads)
        self.attn1 = nn.MultiheadAttention(hidden_size, num_heads)
        self.ln_q = nn.LayerNorm(hidden_size, eps=1e-6)
        self.ln_kv = nn.LayerNorm(hidden_size, eps=1e-6)

    def forward(self, image_features: Tensor, image_roles: Tensor, sample_index: Tensor) -> Tensor:
        """``[I, P, Cv] -> [I, Q, C]``; in each sample the references must come before the scenes."""
        key_position = self._key_position(image_features.shape[1])
        patches = self.ln_kv(self.kv_proj(image_features)).permute(1, 0, 2)
        queries = self.ln_q(self.query)[:, None].repeat(1, patches.shape[1], 1)
        outputs = []
        references, start = None, 0
        groups, lengths = torch.unique_consecutive(
            torch.stack([sample_index, image_roles], dim=1), dim=0, return_counts=True
        )
        for (_, role), length in zip(groups.tolist(), lengths.tolist(), strict=True):
            images = slice(start, start + length)
            x = patches[:, images]
            if role == 1:
                keys = references[:, None].repeat(1, length, 1)
                x = x + self.attn1(x + key_position, keys, keys)[0]
            out = self.attn(queries[:, images] + self.pos_embed[:, None], x + key_position, x)[0]
            if role == 0:
                references = out.detach().permute(1, 0, 2).flatten(0, 1)
            outputs.append(out)
            start += length
        return torch.cat(outputs, dim=1).permute(1, 0, 2)

    def _key_position(self, num_patches: int) -> Tensor:
        source, target = math.isqrt(len(self.pos_embed)), math.isqrt(num_patches)
        if source == target:
            return self.pos_embed[:, None]
        image = self.pos_embed.view(1, source, source, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=(target, target), mode="bicubic", align_corners=False)
        return image.permute(0, 2, 3, 1).flatten(0, 2)[:, None]


def to_idavlm(released: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the ``state_dict`` of the released ``attn_pool`` to one of :class:`idavlm.IDFormer`.

    Its keys that start with ``resampler.``, without this prefix, are those of :class:`idavlm.Resampler`.
    """
    renamed = {
        "pos_embed": "resampler.query_position",
        "query": "resampler.query",
        "ln_q": "resampler.query_norm",
        "ln_kv": "resampler.input_norm",
        "kv_proj": "resampler.input_proj",
        "attn": "resampler.attention",
        "attn1": "identity_layers.0.attention",
    }
    state = {}
    for key, value in released.items():
        module, _, rest = key.partition(".")
        if rest.startswith("in_proj_"):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                state[f"{renamed[module]}.{name}_proj.{rest.removeprefix('in_proj_')}"] = part
        else:
            state[renamed[module] + (f".{rest}" if rest else "")] = value
    return state
