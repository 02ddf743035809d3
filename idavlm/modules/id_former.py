"""The ID-Former: image tokens of scenes that carry the identities of reference photos (IDA-VLM, arXiv 2407.07577)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idavlm.modules.attention import CrossAttention, FeedForward, saves_memory
from idavlm.modules.identity_embedding import IdentityEmbedding
from idavlm.modules.identity_map import (
    NULL,
    attention_energies,
    identities_of_scenes,
    identity_contrastive_loss,
    identity_map_from_attention,
    identity_map_loss,
    pool_identity_map,
    teacher_forced_map,
)
from idavlm.modules.image_groups import ImageGroups, attention_segments, group_images, pack_keys, select_images
from idavlm.modules.resampler import Resampler
from idavlm.utils import IGNORE_INDEX, ImageRole, check_choice, check_positive
from idavlm.utils.sharding import reads_parameter


@dataclass(frozen=True, eq=False)
class IdentityTokens:
    """One identity, encoded from R reference photos. Encode it once and reuse it for any number of scenes.

    Attributes:
        image_tokens: ``[R, Q, C]`` tokens that the language model reads in place of the reference photos.
        keys: ``[R, K, C]`` tokens or patches that scenes attend to.
    """

    image_tokens: Tensor
    keys: Tensor

    def to(self, *args, **kwargs) -> "IdentityTokens":
        """Copy to another device or dtype; takes the arguments of ``Tensor.to``."""
        return IdentityTokens(self.image_tokens.to(*args, **kwargs), self.keys.to(*args, **kwargs))


class IdentityLayer(nn.Module):
    """One identity cross-attention: ``patches + g * attention(patches + position, keys, keys)``.

    Args:
        hidden_size: width C.
        num_heads: number of attention heads.
        gate: how much the layer contributes at the start of training. ``"zero_init"`` (released): ``g = 1``, and the
            output projection of the attention starts at zero. ``"tanh"``: ``g = tanh(a)`` with a learned scalar ``a``
            that starts at 0 (Flamingo). ``"none"``: ``g = 1`` and ordinary initialisation.
        feed_forward: add ``patches + g' * FeedForward(patches)`` after the attention, with a gate of the same kind.
        intermediate_size: inner width of the feed-forward block. Defaults to ``4 * hidden_size``.
        attn_implementation: backend, see :func:`idavlm.cross_attention`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        gate: str = "zero_init",
        feed_forward: bool = False,
        intermediate_size: int | None = None,
        attn_implementation: str = "sdpa",
    ):
        super().__init__()
        check_choice("gate", gate, ("zero_init", "tanh", "none"))
        self.attention = CrossAttention(
            hidden_size=hidden_size, num_heads=num_heads, attn_implementation=attn_implementation
        )
        zero_init = gate == "zero_init"
        self.feed_forward = FeedForward(hidden_size, intermediate_size, zero_init=zero_init) if feed_forward else None
        if zero_init:
            nn.init.zeros_(self.attention.out_proj.weight)
        self.attention_gate = nn.Parameter(torch.zeros(())) if gate == "tanh" else None
        self.feed_forward_gate = nn.Parameter(torch.zeros(())) if gate == "tanh" and feed_forward else None

    def forward(
        self,
        patches: Tensor,
        keys: Tensor,
        *,
        query_position: Tensor,
        output_attentions: bool = False,
        residual_only: bool = False,
        **segments,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from the patches of scenes to the references of their samples.

        Args:
            patches: ``[S, P, C]`` patches of scenes, or ``[T, C]`` packed.
            keys: ``[T, C]`` packed reference tokens.
            query_position: ``[P, C]`` positions of the patches, or ``[T, C]``.
            output_attentions: also return the attention weights, summed over groups of keys.
            residual_only: return what the layer adds to the patches, instead of the sum.
            segments: ``cu_seqlens_q``, ``key_groups``, ... of :func:`idavlm.cross_attention`, which group by sample.

        Returns:
            Patches in the shape of the input, and the weights ``[S * P, H, G + 1]`` or None.
        """
        result = self.attention(
            patches, keys, query_position=query_position, output_attentions=output_attentions, **segments
        )
        attended, attentions = result if output_attentions else (result, None)
        residual = _gated(attended, self.attention_gate)
        output = patches + residual
        if self.feed_forward is not None:
            transformed = _gated(self.feed_forward(output), self.feed_forward_gate)
            residual, output = residual + transformed, output + transformed
        return residual if residual_only else output, attentions


class IDFormer(nn.Module):
    """Turns the patches of images into tokens; the patches of scenes first attend to the references of their sample.

    References and general images pass through the :class:`Resampler`. In a scene of a sample with references, the
    projected patches ``x`` become ``x + attention(x + position, t, t)``, where ``t`` are all reference tokens of the
    sample. They are then resampled with the same queries and weights. A scene of a sample without references is
    resampled as a general image. The defaults are the released computation; every option is an ablation.

    ``state_dict`` keys: ``resampler.*`` (see :class:`Resampler`); ``identity_layers.N.{attention,feed_forward}.*`` and
    ``identity_layers.N.{attention,feed_forward}_gate`` (see :class:`IdentityLayer`); ``identity_embedding.weight``;
    ``null_token``. Options that are off have no keys.

    Args:
        hidden_size, num_queries, vision_hidden_size, token_position_embedding, output_proj, output_size: see
            :class:`Resampler`.
        num_heads: number of attention heads. The release has ``hidden_size / 128``.
        attn_implementation: backend, see :func:`idavlm.cross_attention`.
        detach_references: stop gradients from scenes to the reference tokens that they attend to.
        num_identity_layers: number of identity cross-attention layers.
        num_identity_heads: number of heads of the identity cross-attention. Defaults to ``num_heads``.
        gate: ``"zero_init"``, ``"tanh"`` or ``"none"``, see :class:`IdentityLayer`.
        feed_forward: ``"none"``; ``"identity"`` after each identity cross-attention; ``"all"`` after the resampler's
            cross-attention as well, as in the paper's figure.
        intermediate_size: inner width of the feed-forward blocks. Defaults to ``4 * hidden_size``.
        identity_keys: scenes attend to resampled reference ``"tokens"`` or to projected reference ``"patches"``.
        null_token: add a learned key to each sample, which a patch attends to if it shows no reference. The identity
            map can then say "null".
        identity_embedding: embedding that tells the identities of a sample apart. It is added to the tokens of each
            reference, and to each token of a scene in proportion to the identity map of the token's cell. None: no
            embedding (as released). ``"learned"``: an :class:`IdentityEmbedding`. ``"name"``: the embedding of the
            identity's name in the language model, which :meth:`forward` receives as ``name_embeddings``.
        max_identities: largest number of identities in a sample; needed for ``identity_embedding="learned"``.

    Raises:
        ValueError: options that do not fit each other, with the argument and the remedy.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_queries: int,
        num_heads: int,
        vision_hidden_size: int | None = None,
        attn_implementation: str = "sdpa",
        detach_references: bool = True,
        num_identity_layers: int = 1,
        num_identity_heads: int | None = None,
        gate: str = "zero_init",
        feed_forward: str = "none",
        intermediate_size: int | None = None,
        identity_keys: str = "tokens",
        null_token: bool = False,
        identity_embedding: str | None = None,
        max_identities: int | None = None,
        token_position_embedding: str | None = None,
        output_proj: bool = False,
        output_size: int | None = None,
    ):
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_positive(num_identity_layers=num_identity_layers, num_identity_heads=num_identity_heads)
        check_positive(intermediate_size=intermediate_size, max_identities=max_identities)
        check_choice("feed_forward", feed_forward, ("none", "identity", "all"))
        check_choice("identity_keys", identity_keys, ("tokens", "patches"))
        check_choice("identity_embedding", identity_embedding, (None, "learned", "name"))
        if (identity_embedding == "learned") != (max_identities is not None):
            raise ValueError(
                f"identity_embedding={identity_embedding!r} and max_identities={max_identities}: pass "
                "identity_embedding='learned' and max_identities together, or neither."
            )
        self._config = config
        self.detach_references = detach_references
        self.identity_keys = identity_keys
        self.identity_embedding_type = identity_embedding
        self.resampler = Resampler(
            hidden_size=hidden_size,
            num_queries=num_queries,
            num_heads=num_heads,
            vision_hidden_size=vision_hidden_size,
            feed_forward=feed_forward == "all",
            intermediate_size=intermediate_size,
            token_position_embedding=token_position_embedding,
            output_proj=output_proj,
            output_size=output_size,
            attn_implementation=attn_implementation,
        )
        self.identity_layers = nn.ModuleList(
            IdentityLayer(
                hidden_size=hidden_size,
                num_heads=num_identity_heads or num_heads,
                gate=gate,
                feed_forward=feed_forward != "none",
                intermediate_size=intermediate_size,
                attn_implementation=attn_implementation,
            )
            for _ in range(num_identity_layers)
        )
        has_table = identity_embedding == "learned"
        self.identity_embedding = IdentityEmbedding(max_identities, self.resampler.output_size) if has_table else None
        self.null_token = nn.Parameter(torch.empty(1, hidden_size)) if null_token else None
        if null_token:
            nn.init.trunc_normal_(self.null_token, std=0.02)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "IDFormer":
        """Build an ID-Former from a dictionary of its arguments, as :meth:`to_config` returns it."""
        return cls(**config)

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of this ID-Former as a dictionary that can be written as JSON."""
        return dict(self._config)

    def forward(
        self,
        image_features: Tensor,
        image_roles: Tensor,
        sample_index: Tensor,
        identity_index: Tensor | None = None,
        *,
        grid_size: tuple[int, int] | None = None,
        target_identity_map: Tensor | None = None,
        name_embeddings: tuple[Tensor, Tensor | None] | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Encode all images of a batch, whatever their roles.

        Args:
            image_features: ``[I, P, Cv]`` patches of all images of the batch, row by row.
            image_roles: ``[I]`` integers, see :class:`ImageRole`. This tensor and the next two are read on the host;
                keep them on the CPU to avoid a synchronisation.
            sample_index: ``[I]`` sample (row of the batch) of each image; must not decrease. Within a sample the roles
                may stand in any order.
            identity_index: ``[I]`` for references, the identity within its sample: 0, 1, ... Several references of one
                identity share it. Without it, each reference is an identity of its own.
            grid_size: rows and columns of the patches. Defaults to the square grid of P patches.
            target_identity_map: ``[I, P]`` ground truth for teacher forcing, see :func:`identity_patch_targets`. The
                identity embedding follows it instead of the predicted map, except where it is ``IGNORE_INDEX``.
            name_embeddings: for ``identity_embedding="name"``: ``[B, G, output_size]`` embeddings of the names of each
                sample's identities, and the embedding ``[output_size]`` for null, or None for zeros. Without
                ``name_embeddings`` the tokens carry no identity embedding.
            output_attentions: also return the identity maps.

        Returns:
            ``[I, Q, output_size]`` image tokens in the order of the images. With ``output_attentions`` a pair of the
            tokens and a tuple with one identity map per identity layer, ``[I, P, G + 1]`` float32: the share of
            attention, averaged over heads, that a patch pays to each identity of its sample, and in the last column to
            null. Rows sum to 1. G is the largest number of identities in a sample. Images that attend to no reference
            have all of it in the last column.

        Raises:
            ValueError: ``image_features`` is not ``[I, P, Cv]``, a role is outside 0..2, ``sample_index`` decreases,
                an index tensor does not have I entries, or a sample has more than ``max_identities`` identities.
        """
        reads_parameter(self, self.resampler.query)
        grid_size = self.resampler.check_features(image_features, grid_size)
        groups = group_images(
            image_roles, sample_index, identity_index, num_images=len(image_features), device=image_features.device
        )
        independent, project_scenes = self._project_patches(image_features, groups)
        key_bias = self.resampler.key_bias(grid_size)
        independent_tokens = self.resampler.resample(independent, key_bias)
        keys = self._identity_keys(independent, independent_tokens).index_select(0, groups.references)
        del independent
        scenes = project_scenes()
        scenes, maps = self._attend_to_references(scenes, grid_size, keys, groups, output_attentions)
        image_tokens = torch.cat([independent_tokens, self.resampler.resample(scenes, key_bias)])
        image_tokens = select_images(self.resampler.project_tokens(image_tokens), groups.inverse)
        image_tokens = self._add_identity_embedding(
            image_tokens, maps, grid_size, groups, sample_index, target_identity_map, name_embeddings
        )
        return (image_tokens, maps) if output_attentions else image_tokens

    def encode_references(self, image_features: Tensor, *, grid_size: tuple[int, int] | None = None) -> IdentityTokens:
        """Encode the R reference photos ``[R, P, Cv]`` of one identity for :meth:`forward_scenes`."""
        grid_size = self.resampler.check_features(image_features, grid_size)
        patches = self.resampler.project_patches(image_features)
        image_tokens = self.resampler.resample(patches, self.resampler.key_bias(grid_size))
        keys = self._identity_keys(patches, image_tokens)
        return IdentityTokens(self.resampler.project_tokens(image_tokens), keys)

    def forward_scenes(
        self,
        image_features: Tensor,
        identities: list[IdentityTokens],
        *,
        grid_size: tuple[int, int] | None = None,
        name_embeddings: tuple[Tensor, Tensor | None] | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Encode scenes that all attend to the same identities, such as the frames of a video.

        Equal to :meth:`forward` on one sample of the references, in the order of the list, and of these scenes.

        Args:
            image_features: ``[I, P, Cv]`` patches of the scenes.
            identities: from :meth:`encode_references`; may be empty. Their order numbers them 0, 1, ...
            grid_size, output_attentions: see :meth:`forward`.
            name_embeddings: see :meth:`forward`; the first has shape ``[1, G, output_size]``.

        Returns:
            As :meth:`forward`, for the scenes.
        """
        grid_size = self.resampler.check_features(image_features, grid_size)
        patches = self.resampler.project_patches(image_features)
        self._check_identities(identities)
        num_references = [len(identity.keys) for identity in identities]
        num_scenes = len(patches) if sum(num_references) else 0  # without references there is nothing to attend to
        groups = ImageGroups(
            order=None,
            inverse=None,
            num_independent=len(patches) - num_scenes,
            identities=tuple(number for number, count in enumerate(num_references) for _ in range(count)),
            references_per_sample=(sum(num_references),),
            scenes_per_sample=(num_scenes,),
        )
        keys = torch.cat([identity.keys for identity in identities]) if identities else patches[:0]
        independent, scenes = patches.split([groups.num_independent, num_scenes])
        scenes, maps = self._attend_to_references(scenes, grid_size, keys, groups, output_attentions)
        tokens = self.resampler.resample(torch.cat([independent, scenes]), self.resampler.key_bias(grid_size))
        sample_index = torch.zeros(len(patches), dtype=torch.long)
        image_tokens = self._add_identity_embedding(
            self.resampler.project_tokens(tokens), maps, grid_size, groups, sample_index, None, name_embeddings
        )
        return (image_tokens, maps) if output_attentions else image_tokens

    def reference_tokens(self, identities: list[IdentityTokens]) -> Tensor:
        """Return the tokens ``[R, Q, output_size]`` that the language model reads for the references of a bank.

        Equal to the tokens of :meth:`forward` for these references; a learned identity embedding is included.
        """
        tokens = torch.cat([identity.image_tokens for identity in identities])
        if self.identity_embedding is None:
            return tokens
        self.identity_embedding.check(len(identities))
        numbers = [number for number, identity in enumerate(identities) for _ in identity.image_tokens]
        return tokens + self.identity_embedding(torch.tensor(numbers, device=tokens.device))[:, None]

    def identity_map_loss(
        self,
        identity_maps: tuple[Tensor, ...],
        targets: Tensor,
        image_roles: Tensor,
        sample_index: Tensor,
        identity_index: Tensor | None = None,
        *,
        reduction: str = "mean",
    ) -> Tensor:
        """Supervise the identity maps: mean over layers of :func:`idavlm.identity_map_loss`.

        Without ``null_token`` the attention is a distribution over references only and cannot express null. NULL
        targets are then left out, and only patches that show a reference are supervised.

        Args:
            identity_maps: from :meth:`forward` with ``output_attentions=True``.
            targets: ``[I, P]``, for example from :func:`idavlm.identity_patch_targets`.
            image_roles, sample_index, identity_index: those that were passed to :meth:`forward`.
            reduction: ``"mean"`` over images, or ``"none"`` for the loss of each image ``[I]``.
        """
        if self.null_token is None:
            targets = targets.masked_fill(targets == NULL, IGNORE_INDEX)
        num_identities = identity_maps[0].shape[-1] - 1
        has_reference = identities_of_scenes(image_roles, sample_index, identity_index, num_identities)
        losses = [identity_map_loss(layer, targets, has_reference, reduction=reduction) for layer in identity_maps]
        return torch.stack(losses).mean(0)

    def contrastive_loss(
        self,
        image_features: Tensor,
        image_roles: Tensor,
        sample_index: Tensor,
        identity_index: Tensor,
        targets: Tensor,
        *,
        grid_size: tuple[int, int] | None = None,
        reduction: str = "mean",
        gather_references: bool = False,
    ) -> Tensor:
        """Supervise the first identity layer over the references of the whole batch.

        Each patch that shows an identity attends to the references of all samples. The loss is the mean negative log
        share of attention that it pays to its own identity. With many identities to tell apart, a model that starts
        from scratch learns several times as fast as from :meth:`identity_map_loss` alone. An individual that occurs in
        two samples of a batch counts as two identities.

        All modules run whatever the batch holds, so that ZeRO-3 gathers the same parameters on every process.

        Args:
            image_features, image_roles, sample_index, identity_index, grid_size: see :meth:`forward`.
            targets: ``[I, P]``, for example from :func:`idavlm.identity_patch_targets`. Only identities count.
            reduction: ``"mean"`` or ``"sum"`` over the patches that show an identity.
            gather_references: attend to the references of all processes, as CLIP compares with the texts of all
                processes. All of them must call this method, and the backward pass of all must reach its result.

        Returns:
            The loss; 0 if no patch is labelled with an identity.
        """
        check_choice("reduction", reduction, ("mean", "sum"))
        grid_size = self.resampler.check_features(image_features, grid_size)
        patches = self.resampler.project_patches(image_features)
        image, patch = (targets >= 0).nonzero(as_tuple=True)
        sample_index, identity_index = sample_index.to(patches.device), identity_index.to(patches.device)
        is_reference = image_roles.to(patches.device) == ImageRole.REFERENCE
        references = patches[is_reference]
        key_bias = self.resampler.key_bias(grid_size)
        tokens = self.resampler.resample(references, key_bias) if self.identity_keys == "tokens" else None
        keys = self._identity_keys(references, tokens)
        attention = self.identity_layers[0].attention
        position = self.resampler.resize_to_patches(self.resampler.position, grid_size)
        null = keys.new_zeros(0, keys.shape[-1]) if self.null_token is None else self.null_token
        # Numbered over the batch: the same identity index in different samples gives different numbers.
        num_identities = (
            int(torch.cat([identity_index[is_reference], targets.flatten()]).max()) + 1 if len(image) else 1
        )
        owner = (sample_index * num_identities + identity_index)[is_reference]
        loss = identity_contrastive_loss(
            attention.queries(patches[image, patch], position[patch]),
            attention.keys(torch.cat([null, keys.flatten(0, 1)])),
            owner=owner.repeat_interleave(keys.shape[1]),
            target=sample_index[image] * num_identities + targets[image, patch],
            num_null=len(null),
            gather_references=gather_references,
        )
        return loss / max(len(image), 1) if reduction == "mean" else loss

    def _project_patches(self, image_features: Tensor, groups: ImageGroups) -> tuple[Tensor, Callable[[], Tensor]]:
        """Patches of the images that are resampled independently, and a function that returns those of the scenes."""
        sizes = [groups.num_independent, len(image_features) - groups.num_independent]
        if groups.order is not None and saves_memory(image_features):
            independent, scenes = (
                lambda index=index: self.resampler.project_patches(image_features.index_select(0, index))
                for index in groups.order.split(sizes)
            )
            return independent(), scenes
        independent, scenes = self.resampler.project_patches(select_images(image_features, groups.order)).split(sizes)
        return independent, lambda: scenes

    @torch.no_grad()
    def reference_energies(self, scene: Tensor, references: Sequence[Tensor]) -> Tensor:
        """How much a scene attends to each of many references in the first identity layer, before the softmax.

        Args:
            scene: ``[P, Cv]`` patches of the scene.
            references: patches ``[P, Cv]`` of each of the R references.

        Returns:
            ``[R + 1, P]`` see :func:`attention_energies`; the last row is the null token, ``-inf`` without one.
        """
        patches = self.resampler.project_patches(torch.stack([scene, *references]))
        grid_size = self.resampler.check_features(scene[None], None)
        tokens = self.resampler.resample(patches[1:], self.resampler.key_bias(grid_size))
        keys = self._identity_keys(patches[1:], tokens)
        attention = self.identity_layers[0].attention
        position = self.resampler.resize_to_patches(self.resampler.position, grid_size)
        null = keys[:0, 0] if self.null_token is None else self.null_token
        projected = attention.keys(torch.cat([keys.flatten(0, 1), null]))
        lengths = [keys.shape[1]] * len(keys) + [1] * len(null)
        energies = attention_energies(attention.queries(patches[0], position), projected, lengths)
        return energies if len(null) else F.pad(energies, (0, 0, 0, 1), value=-torch.inf)

    def _identity_keys(self, patches: Tensor, image_tokens: Tensor | None) -> Tensor:
        keys = image_tokens if self.identity_keys == "tokens" else patches
        return keys.detach() if self.detach_references else keys

    def _check_identities(self, identities: list[IdentityTokens]) -> None:
        for number, identity in enumerate(identities):
            expected = (*identities[0].keys.shape[1:2], self.resampler.hidden_size)
            if identity.keys.dim() != 3 or identity.keys.shape[1:] != expected:
                raise ValueError(
                    f"identities[{number}].keys has shape {tuple(identity.keys.shape)}; expected "
                    f"[R, {', '.join(map(str, expected))}]: encode all of them with this IDFormer, at one image size."
                )

    def _attend_to_references(
        self, scenes: Tensor, grid_size: tuple[int, int], keys: Tensor, groups: ImageGroups, output_attentions: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Let the patches of scenes ``[S, P, C]`` attend to the keys ``[R, K, C]`` of their own sample."""
        has_null = self.null_token is not None
        packed = pack_keys(keys.flatten(0, 1), keys.shape[1], groups, null_token=self.null_token)
        segments = attention_segments(
            groups,
            scene_lengths=scenes.shape[1],
            reference_lengths=keys.shape[1],
            null_token=has_null,
            device=scenes.device,
        )
        needs_maps = output_attentions or self.identity_embedding_type is not None
        position = self.resampler.resize_to_patches(self.resampler.position, grid_size)
        maps = []
        for layer in self.identity_layers:
            scenes, sums = layer(scenes, packed, query_position=position, output_attentions=needs_maps, **segments)
            if needs_maps:
                maps.append(identity_map_from_attention(sums, groups, scenes.shape[1]))
        return scenes, tuple(maps)

    def _add_identity_embedding(
        self,
        image_tokens: Tensor,
        maps: tuple[Tensor, ...],
        grid_size: tuple[int, int],
        groups: ImageGroups,
        sample_index: Tensor,
        target_identity_map: Tensor | None,
        name_embeddings: tuple[Tensor, Tensor | None] | None,
    ) -> Tensor:
        """Add the embeddings of the identities to tokens ``[I, Q, C]``, in the order of the batch.

        A token of a reference gets the embedding of its identity. A token of another image gets the embeddings of all
        identities, weighted by the identity map of its cell, and the null embedding for the rest.
        """
        if self.identity_embedding is not None:
            embeddings, null = self.identity_embedding.table(), None
        elif name_embeddings is not None:
            embeddings, null = name_embeddings
            embeddings = embeddings[sample_index.to(embeddings.device)]  # [I, G, C]
        else:
            return image_tokens
        identity_map = teacher_forced_map(maps[-1], target_identity_map)
        num_identities = identity_map.shape[-1] - 1
        if self.identity_embedding is not None:
            self.identity_embedding.check(num_identities)
        elif num_identities > embeddings.shape[1]:
            raise ValueError(
                f"name_embeddings has {embeddings.shape[1]} names per sample but a sample has {num_identities} "
                "identities; pass the name of each identity."
            )
        num_columns = embeddings.shape[-2]
        shares = image_tokens.new_zeros(*image_tokens.shape[:2], 0)
        if num_columns:
            shares = pool_identity_map(identity_map, grid_size, self.resampler.query_grid, num_columns)
        if groups.references is not None and len(groups.references) and num_columns:
            own = (
                F.one_hot(groups.reference_identities, num_columns).to(shares)[:, None].expand(-1, shares.shape[1], -1)
            )
            packed = select_images(shares, groups.order).index_copy(0, groups.references, own)
            shares = select_images(packed, groups.inverse)
        shares = shares.to(embeddings.dtype)
        image_tokens = image_tokens + shares @ embeddings
        return image_tokens if null is None else image_tokens + (1 - shares.sum(-1, keepdim=True)) * null


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else gate.tanh() * x
