"""The ID-Former as a residual on the image tokens of an existing vision-language model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idavlm.modules.attention import CrossAttention
from idavlm.modules.id_former import IdentityLayer
from idavlm.modules.identity_embedding import IdentityEmbedding
from idavlm.modules.identity_map import (
    NULL,
    attention_energies,
    identities_of_scenes,
    identity_contrastive_loss,
    identity_map_loss,
    teacher_forced_map,
)
from idavlm.modules.image_groups import ImageGroups, attention_segments, group_images, pack_keys
from idavlm.modules.positions import sincos_positions_2d
from idavlm.utils import IGNORE_INDEX, check_choice, check_positive, outside_compile

POSITION_GRID = 32
"""Side of the grid of positions. The position of an image token is that of the cell it lies in, at any resolution."""


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The image tokens of a batch, image after image, and where the tokens of each image begin.

    Attributes:
        tokens: ``[N, C]`` tokens of all images.
        lengths: number of tokens of each of the I images.
        grids: rows and columns of the tokens of each image, or None where they form no grid.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    grids: tuple[tuple[int, int] | None, ...]

    def __post_init__(self):
        if sum(self.lengths) != len(self.tokens) or len(self.lengths) != len(self.grids):
            raise ValueError(
                f"{len(self.lengths)} images of {sum(self.lengths)} tokens with {len(self.grids)} grids, but tokens "
                f"has shape {tuple(self.tokens.shape)}; expected one length and one grid per image."
            )
        for image, (length, grid) in enumerate(zip(self.lengths, self.grids, strict=True)):
            if grid is not None and grid[0] * grid[1] != length:
                raise ValueError(
                    f"grids[{image}]={grid} has {grid[0] * grid[1]} cells, but image {image} has {length} tokens."
                )

    def positions_of(self, images: Sequence[int]) -> Tensor:
        """The positions of the tokens of some images among all tokens."""
        starts = [0, *accumulate(self.lengths)]
        positions = [torch.arange(starts[image], starts[image + 1]) for image in images]
        return torch.cat([*positions, torch.zeros(0, dtype=torch.long)]).to(self.tokens.device, non_blocking=True)


class ResidualOutput(NamedTuple):
    """Output of :class:`ResidualIDFormer`. A tuple, in which DeepSpeed finds the tensors.

    Attributes:
        tokens: ``[N, C]`` tokens with the residual, in the order and dtype of the input.
        identity_maps: one identity map per identity layer, ``[N, G + 1]`` float32, see :meth:`IDFormer.forward`.
        map_losses: ``[I]`` loss of the identity map of each image; None without targets.
        contrastive_loss: see :meth:`IDFormer.contrastive_loss`, sum over the labelled tokens; None unless requested.
        deepstack_tokens: the DeepStack features with their residuals, level by level.
    """

    tokens: Tensor
    identity_maps: tuple[Tensor, ...]
    map_losses: Tensor | None = None
    contrastive_loss: Tensor | None = None
    deepstack_tokens: tuple[Tensor, ...] = ()


class ResidualIDFormer(nn.Module):
    """Adds to the image tokens of scenes what they have in common with the references of their sample.

    ``tokens + gate * up(attention(x + position, references, references))`` with ``x = norm(down(tokens))``, where
    ``references`` are the ``x`` of all references of the sample and a null token. Images may have any number of tokens
    and any grid. References and general images keep their tokens, and so do scenes of samples without references. With
    the default gate the module changes nothing until it is trained.

    The layers are those of :class:`IDFormer`, which resamples patches; this module works on tokens that a connector has
    made, in the width of the language model. :func:`idavlm.attach_id_former` puts it into a model of transformers.

    ``state_dict`` keys: ``input_norm.*``; ``down_proj.weight`` and ``up_proj.weight`` (only if ``hidden_size`` differs
    from ``token_size``); ``identity_layers.N.*`` (see :class:`IdentityLayer`); ``null_token``;
    ``reference_queries``, ``reference_attention.*`` (only with ``identity_keys="queries"``);
    ``identity_embedding.weight``; ``identity_embedding_gate``; ``deepstack.N.*``.

    Args:
        token_size: width of the image tokens, that of the language model.
        num_heads: number of attention heads.
        hidden_size: width of the attention; defaults to ``token_size``. A narrower one has fewer parameters.
        num_identity_layers: number of identity cross-attention layers.
        gate: ``"zero_init"``, ``"tanh"`` or ``"none"``, see :class:`IdentityLayer`.
        feed_forward: add a feed-forward block after each identity cross-attention.
        intermediate_size: inner width of the feed-forward blocks. Defaults to ``4 * hidden_size``.
        identity_keys: scenes attend to all ``"tokens"`` of the references, or to ``num_queries`` learned
            ``"queries"`` per reference, which is cheaper for images of many tokens.
        num_queries: number of learned queries per reference, for ``identity_keys="queries"``.
        null_token: add a learned key to each sample, which a token attends to if it shows no reference.
        identity_embedding: None, ``"learned"`` or ``"name"``, see :class:`IDFormer`. The embedding is multiplied by a
            learned gate that starts at 0 (by 1 with ``gate="none"``).
        max_identities: largest number of identities in a sample; needed for ``identity_embedding="learned"``.
        detach_references: stop gradients from scenes to the reference tokens that they attend to.
        num_deepstack_levels: number of levels of DeepStack features (Qwen3-VL) that get a residual of their own, with
            the same options and without an identity embedding.
        attn_implementation: backend, see :func:`idavlm.cross_attention`.

    Raises:
        ValueError: options that do not fit each other, with the argument and the remedy.
    """

    def __init__(
        self,
        *,
        token_size: int,
        num_heads: int,
        hidden_size: int | None = None,
        num_identity_layers: int = 1,
        gate: str = "zero_init",
        feed_forward: bool = False,
        intermediate_size: int | None = None,
        identity_keys: str = "tokens",
        num_queries: int | None = None,
        null_token: bool = True,
        identity_embedding: str | None = None,
        max_identities: int | None = None,
        detach_references: bool = True,
        num_deepstack_levels: int = 0,
        attn_implementation: str = "sdpa",
    ):
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_positive(token_size=token_size, hidden_size=hidden_size, num_identity_layers=num_identity_layers)
        check_positive(num_queries=num_queries, max_identities=max_identities)
        check_choice("identity_keys", identity_keys, ("tokens", "queries"))
        check_choice("identity_embedding", identity_embedding, (None, "learned", "name"))
        for name, value, needed, argument in (
            ("identity_keys", identity_keys, num_queries is not None, "num_queries"),
            ("identity_embedding", identity_embedding, max_identities is not None, "max_identities"),
        ):
            if (value in ("queries", "learned")) != needed:
                choice = "queries" if name == "identity_keys" else "learned"
                raise ValueError(
                    f"{name}={value!r} and {argument}={config[argument]}: pass {name}={choice!r} and {argument} "
                    "together, or neither."
                )
        self._config = config
        hidden_size = hidden_size or token_size
        self.token_size = token_size
        self.hidden_size = hidden_size
        self.detach_references = detach_references
        self.identity_embedding_type = identity_embedding
        is_narrow = hidden_size != token_size
        self.down_proj = nn.Linear(token_size, hidden_size, bias=False) if is_narrow else nn.Identity()
        self.input_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.identity_layers = nn.ModuleList(
            IdentityLayer(
                hidden_size=hidden_size,
                num_heads=num_heads,
                gate=gate,
                feed_forward=feed_forward,
                intermediate_size=intermediate_size,
                attn_implementation=attn_implementation,
            )
            for _ in range(num_identity_layers)
        )
        self.up_proj = nn.Linear(hidden_size, token_size, bias=False) if is_narrow else nn.Identity()
        self.null_token = nn.Parameter(torch.empty(1, hidden_size)) if null_token else None
        if null_token:
            nn.init.trunc_normal_(self.null_token, std=0.02)
        self.reference_queries = self.reference_attention = None
        if identity_keys == "queries":
            self.reference_queries = nn.Parameter(torch.empty(num_queries, hidden_size))
            nn.init.trunc_normal_(self.reference_queries, std=0.02)
            self.reference_attention = CrossAttention(
                hidden_size=hidden_size, num_heads=num_heads, attn_implementation=attn_implementation
            )
        self.identity_embedding = IdentityEmbedding(max_identities, token_size) if max_identities else None
        has_gate = identity_embedding is not None and gate != "none"
        self.identity_embedding_gate = nn.Parameter(torch.zeros(())) if has_gate else None
        of_level = config | {"identity_embedding": None, "max_identities": None, "num_deepstack_levels": 0}
        self.deepstack = nn.ModuleList(ResidualIDFormer(**of_level) for _ in range(num_deepstack_levels))
        positions = sincos_positions_2d(hidden_size, (POSITION_GRID, POSITION_GRID))
        self.register_buffer("position", positions, persistent=False)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ResidualIDFormer":
        """Build the module from a dictionary of its arguments, as :meth:`to_config` returns it."""
        return cls(**config)

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of this module as a dictionary that can be written as JSON."""
        return dict(self._config)

    def forward(
        self,
        images: ImageTokens,
        image_roles: Tensor,
        sample_index: Tensor,
        identity_index: Tensor | None = None,
        *,
        name_embeddings: Tensor | None = None,
        targets: Tensor | None = None,
        teacher_forcing: bool = False,
        with_contrastive_loss: bool = False,
        gather_references: bool = False,
        deepstack_tokens: Sequence[Tensor] = (),
    ) -> ResidualOutput:
        """Add the residual to the tokens of all images of a batch.

        Args:
            images: the tokens of all images.
            image_roles, sample_index, identity_index: ``[I]``, see :meth:`IDFormer.forward`.
            name_embeddings: ``[num_samples, G, token_size]`` embeddings of the names of each sample's identities, for
                ``identity_embedding="name"``.
            targets: ``[N]`` identity, NULL or ``IGNORE_INDEX`` of each token. They supervise the identity maps.
            teacher_forcing: the identity embedding follows ``targets`` instead of the predicted map.
            with_contrastive_loss: also compute the contrastive loss of ``targets``.
            gather_references: see :meth:`IDFormer.contrastive_loss`.
            deepstack_tokens: DeepStack features ``[N, token_size]``, one tensor per level. They are returned as they
                are if ``num_deepstack_levels=0``.

        Raises:
            ValueError: inputs that do not fit each other, with the argument and the remedy.
        """
        if images.tokens.dim() != 2 or images.tokens.shape[-1] != self.token_size:
            raise ValueError(
                f"images.tokens has shape {tuple(images.tokens.shape)}; expected [N, {self.token_size}], N tokens of "
                "width token_size."
            )
        groups = group_images(
            image_roles, sample_index, identity_index, num_images=len(images.lengths), device=images.tokens.device
        )
        tokens = images.tokens.to(self.input_norm.weight.dtype)
        normed = self.input_norm(self.down_proj(tokens))
        scenes = images.positions_of(groups.scene_images)
        position = self._token_positions(images).index_select(0, scenes)
        keys, key_lengths = self._identity_keys(normed, images, groups)
        segments = attention_segments(
            groups,
            scene_lengths=[images.lengths[image] for image in groups.scene_images],
            reference_lengths=key_lengths,
            null_token=self.null_token is not None,
            device=tokens.device,
        )
        packed = pack_keys(keys, key_lengths, groups, null_token=self.null_token)
        start = normed.index_select(0, scenes)
        change, maps = torch.zeros_like(start), []
        for layer in self.identity_layers:
            added, sums = layer(
                start + change, packed, query_position=position, output_attentions=True, residual_only=True, **segments
            )
            change = change + added
            maps.append(_map_of_all_tokens(sums.mean(1), scenes, len(tokens)))
        residual = torch.zeros_like(tokens).index_copy(0, scenes, self.up_proj(change).to(tokens.dtype))
        if self.identity_embedding_type is not None:
            identity_map = teacher_forced_map(maps[-1], targets if teacher_forcing else None)
            residual = residual + self._embed_identities(images, groups, identity_map, sample_index, name_embeddings)
        roles = (image_roles, sample_index, identity_index)
        losses: dict[str, Tensor] = {}
        if targets is not None:
            losses["map_losses"] = self._map_losses(maps, targets, images.lengths, *roles)
            if with_contrastive_loss:
                losses["contrastive_loss"] = self._contrastive_loss(
                    normed, images, groups, sample_index, targets, gather_references
                )
        levels = list(deepstack_tokens)
        if len(self.deepstack) not in (0, len(levels)):
            raise ValueError(
                f"num_deepstack_levels={len(self.deepstack)} but deepstack_tokens has {len(levels)} levels; build the "
                "module for this model."
            )
        for level, id_former in enumerate(self.deepstack):
            levels[level] = id_former(replace(images, tokens=levels[level]), *roles).tokens
        tokens = images.tokens + residual.to(images.tokens.dtype)
        return ResidualOutput(tokens, tuple(maps), **losses, deepstack_tokens=tuple(levels))

    @torch.no_grad()
    def reference_energies(self, scene: Tensor, references: Sequence[Tensor]) -> Tensor:
        """How much a scene attends to each of many references in the first identity layer, before the softmax.

        Args:
            scene: ``[L, token_size]`` image tokens of the scene.
            references: image tokens of each of the R references.

        Returns:
            ``[R + 1, L]`` see :func:`attention_energies`; the last row is the null token, ``-inf`` without one.
        """
        lengths = [len(reference) for reference in references]
        tokens = torch.cat([scene, *references]).to(self.input_norm.weight.dtype)
        normed, keys = self.input_norm(self.down_proj(tokens)).split([len(scene), sum(lengths)])
        keys, lengths = self._resampled_keys(keys, lengths)
        attention = self.identity_layers[0].attention
        null = keys[:0] if self.null_token is None else self.null_token
        projected = attention.keys(torch.cat([keys, null]))
        energies = attention_energies(attention.queries(normed), projected, [*lengths, *[1] * len(null)])
        return energies if len(null) else F.pad(energies, (0, 0, 0, 1), value=-torch.inf)

    def _map_losses(
        self,
        identity_maps: Sequence[Tensor],
        targets: Tensor,
        lengths: Sequence[int],
        image_roles: Tensor,
        sample_index: Tensor,
        identity_index: Tensor | None,
    ) -> Tensor:
        """Mean over layers of the loss of each image, ``[I]``; see :meth:`IDFormer.identity_map_loss`."""
        if not lengths:
            return torch.stack([identity_map.sum(-1) for identity_map in identity_maps]).mean(0)
        if self.null_token is None:
            targets = targets.masked_fill(targets == NULL, IGNORE_INDEX)
        num_identities = identity_maps[0].shape[-1] - 1
        has_reference = identities_of_scenes(image_roles, sample_index, identity_index, num_identities)
        padded_targets = nn.utils.rnn.pad_sequence(
            targets.split(list(lengths)), batch_first=True, padding_value=IGNORE_INDEX
        )
        losses = []
        for identity_map in identity_maps:
            padded = nn.utils.rnn.pad_sequence(identity_map.split(list(lengths)), batch_first=True)
            losses.append(identity_map_loss(padded, padded_targets, has_reference, reduction="none"))
        return torch.stack(losses).mean(0)

    def _contrastive_loss(
        self,
        normed: Tensor,
        images: ImageTokens,
        groups: ImageGroups,
        sample_index: Tensor,
        targets: Tensor,
        gather_references: bool,
    ) -> Tensor:
        """Sum over the tokens that show an identity; see :meth:`IDFormer.contrastive_loss`."""
        is_labelled = targets >= 0
        keys, key_lengths = self._identity_keys(normed, images, groups)
        # Numbered over the batch: the same identity index in different samples gives different numbers.
        num_identities = max(groups.identities, default=0) + 1
        samples = sample_index.cpu()
        owner = samples[list(groups.reference_images)] * num_identities
        owner = owner + torch.tensor(groups.identities, dtype=torch.long)
        owner = owner.repeat_interleave(torch.tensor(key_lengths, dtype=torch.long)).to(keys.device)
        sample_of_token = samples.repeat_interleave(torch.tensor(images.lengths, dtype=torch.long)).to(keys.device)
        attention = self.identity_layers[0].attention
        position = self._token_positions(images)[is_labelled]
        null = keys[:0] if self.null_token is None else self.null_token
        return identity_contrastive_loss(
            attention.queries(normed[is_labelled], position),
            attention.keys(torch.cat([null, keys])),
            owner=owner,
            target=(sample_of_token * num_identities + targets)[is_labelled],
            num_null=len(null),
            gather_references=gather_references,
        )

    def _identity_keys(self, normed: Tensor, images: ImageTokens, groups: ImageGroups) -> tuple[Tensor, list[int]]:
        """The keys of all references, packed, and the number of keys of each."""
        lengths = [images.lengths[image] for image in groups.reference_images]
        keys = normed.index_select(0, images.positions_of(groups.reference_images))
        if self.detach_references:
            keys = keys.detach()
        return self._resampled_keys(keys, lengths)

    def _resampled_keys(self, keys: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        if self.reference_attention is None:
            return keys, lengths
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=keys.device)
        keys = self.reference_attention(
            self.reference_queries, keys, cu_seqlens_k=cu_seqlens, max_seqlen_k=max(lengths, default=0)
        )
        return keys.flatten(0, 1), [len(self.reference_queries)] * len(lengths)

    def _token_positions(self, images: ImageTokens) -> Tensor:
        """The position of each token, ``[N, hidden_size]``; zeros for images whose tokens form no grid."""
        cells = [
            torch.full((length,), -1) if grid is None else cells_of_grid(grid)
            for length, grid in zip(images.lengths, images.grids, strict=True)
        ]
        index = torch.cat([*cells, torch.zeros(0, dtype=torch.long)]).to(self.position.device)
        position = self.position.to(self.input_norm.weight.dtype)
        return position[index.clamp(min=0)] * (index >= 0)[:, None]

    def _embed_identities(
        self,
        images: ImageTokens,
        groups: ImageGroups,
        identity_map: Tensor,
        sample_index: Tensor,
        name_embeddings: Tensor | None,
    ) -> Tensor:
        """The embeddings of the identities that each token shows, ``[N, token_size]``."""
        num_identities = identity_map.shape[-1] - 1
        shares = identity_map[:, :-1]
        references = images.positions_of(groups.reference_images)
        lengths = torch.tensor([images.lengths[image] for image in groups.reference_images], dtype=torch.long)
        own = torch.tensor(groups.identities, dtype=torch.long).repeat_interleave(lengths).to(shares.device)
        shares = shares.index_copy(0, references, F.one_hot(own, num_identities).to(shares)) if len(own) else shares
        if self.identity_embedding is not None:
            self.identity_embedding.check(num_identities)
            table = self.identity_embedding.table()[:num_identities]
            embedded = shares.to(table.dtype) @ table
        else:
            embedded = self._embed_names(images, shares, sample_index, name_embeddings)
        gate = self.identity_embedding_gate
        return embedded if gate is None else gate.tanh() * embedded

    def _embed_names(
        self, images: ImageTokens, shares: Tensor, sample_index: Tensor, name_embeddings: Tensor | None
    ) -> Tensor:
        num_identities = shares.shape[-1]
        if num_identities == 0:
            nothing = shares.new_zeros(len(shares), self.token_size)
            return nothing if name_embeddings is None else nothing + name_embeddings[:, :0].sum().to(nothing)
        samples = sample_index.tolist()
        if name_embeddings is None or name_embeddings.shape[1] < num_identities or len(name_embeddings) <= max(samples):
            raise ValueError(
                f"identity_embedding='name' needs name_embeddings [num_samples, G, {self.token_size}] for "
                f"{max(samples) + 1} samples of up to {num_identities} identities, but got "
                f"{None if name_embeddings is None else list(name_embeddings.shape)}; pass the name of each identity."
            )
        parts = shares.to(name_embeddings.dtype).split(images.lengths)
        embedded = [
            part @ name_embeddings[sample, :num_identities] for part, sample in zip(parts, samples, strict=True)
        ]
        return torch.cat(embedded)


@outside_compile
def cells_of_grid(grid: tuple[int, int]) -> Tensor:
    """The cell of a grid of :data:`POSITION_GRID` rows and columns in which each token of ``grid`` lies, row by row."""
    row, column = (((torch.arange(size) + 0.5) / size * POSITION_GRID).long() for size in grid)
    return (row[:, None] * POSITION_GRID + column).flatten()


def _map_of_all_tokens(shares: Tensor, scenes: Tensor, num_tokens: int) -> Tensor:
    """Identity map of all tokens ``[N, G + 1]`` from that of the tokens at ``scenes``; all others pay it to null."""
    null = F.one_hot(torch.tensor(shares.shape[-1] - 1, device=shares.device), shares.shape[-1]).to(shares)
    return null.expand(num_tokens, -1).index_copy(0, scenes, shares)
