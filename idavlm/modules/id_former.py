"""The ID-Former: image tokens of scenes that know the identities of reference photos (IDA-VLM, arXiv 2407.07577)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from idavlm.modules.identity_contrastive_loss import identity_contrastive_loss, number_identities
from idavlm.modules.identity_embedding import IdentityEmbedding
from idavlm.modules.identity_layer import IdentityLayer
from idavlm.modules.identity_map import identity_map, with_known
from idavlm.modules.image_groups import ImageGroups, attention_segments, group_images, pack_keys, select_images
from idavlm.modules.resampler import Resampler
from idavlm.ops.identity_supervision import IGNORE, NULL, identity_map_loss
from idavlm.utils import ImageRole, check_choice, check_positive


@dataclass(frozen=True, eq=False)
class IdentityTokens:
    """One identity, encoded from R photos; keep it and use it for every frame.

    Attributes:
        image_tokens: ``[R, Q, C]`` what the language model reads in place of the photos.
        keys: ``[R, K, C]`` what scenes attend to: the same tokens, or the photos' patches.
    """

    image_tokens: Tensor
    keys: Tensor

    def to(self, *args, **kwargs) -> "IdentityTokens":
        """A copy on another device or in another type; arguments as of ``Tensor.to``."""
        return IdentityTokens(self.image_tokens.to(*args, **kwargs), self.keys.to(*args, **kwargs))


class IDFormer(nn.Module):
    """Turns patches of images into tokens; a scene's patches first look at the references of its sample.

    References and general images go through the plain :class:`Resampler`. Of a scene with references, the projected
    patches ``x`` first become ``x + attention(x + position, t, t)``, where ``t`` are all reference tokens of the
    sample, and are then resampled with the same queries and weights. A scene of a sample without references is
    resampled plainly. The defaults are the released computation; every option is an ablation (``docs/id_former.md``).

    ``state_dict`` keys: ``resampler.*`` (see :class:`Resampler`); ``identity_layers.N.{attention,feed_forward}.*`` and
    ``identity_layers.N.{attention,feed_forward}_gate`` (see :class:`IdentityLayer`); ``identity_embedding.weight``;
    ``null_token``. Options that are off have no keys.

    Args:
        hidden_size: C, width of the tokens; divisible by 4 and by ``num_heads``.
        num_queries: Q, tokens an image; a square number.
        num_heads: attention heads. The release has ``hidden_size / 128``.
        vision_hidden_size: Cv, width of the patches. Where it is not given or equals ``hidden_size``, patches go in
            unprojected.
        attn_implementation: see :func:`idavlm.ops.cross_attention`.
        detach_references: keep gradients of scenes out of the reference tokens they look at.
        num_identity_layers: depth of the identity cross-attention.
        num_identity_heads: heads of the identity cross-attention; ``num_heads`` if not given. With one, all of an
            embedding decides who somebody is.
        gate: ``"zero_init"``, ``"tanh"`` or ``"none"``: how open an identity layer starts, see :class:`IdentityLayer`.
        feed_forward: ``"none"``; ``"identity"``: behind each identity cross-attention; ``"all"``: behind the
            resampler's as well, as in the paper's figure.
        intermediate_size: inner width of the feed-forward blocks; ``4 * hidden_size`` if not given.
        identity_keys: ``"tokens"``: scenes attend to resampled reference tokens; ``"patches"``: to projected patches.
        max_identities: learned embeddings that mark identity 0, 1, ... of a sample, so that a language model can
            tell who is meant; 0 for none. They are added to the image tokens of the identity's photos, and to every
            token of a scene by the share of attention that the patches in its query's cell of the grid pay to the
            identity; :class:`idavlm.IDAVLMForConditionalGeneration` adds them to its name in the prompt as well.
        token_norm, token_positions, output_proj, output_size: see :class:`Resampler`.
        null_token: a learned key in every sample that patches may attend to instead of any reference. With it the
            identity map can say "nobody".
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
        max_identities: int = 0,
        null_token: bool = False,
        token_norm: bool = False,
        token_positions: bool | str = False,
        output_proj: bool = False,
        output_size: int | None = None,
    ):
        super().__init__()
        check_positive(num_identity_layers=num_identity_layers, num_identity_heads=num_identity_heads)
        check_positive(intermediate_size=intermediate_size)
        check_positive(max_identities=max_identities or None)
        check_choice("feed_forward", feed_forward, ("none", "identity", "all"))
        check_choice("identity_keys", identity_keys, ("tokens", "patches"))
        self.detach_references = detach_references
        self.identity_keys = identity_keys
        self.resampler = Resampler(
            hidden_size=hidden_size,
            num_queries=num_queries,
            num_heads=num_heads,
            vision_hidden_size=vision_hidden_size,
            feed_forward=feed_forward == "all",
            intermediate_size=intermediate_size,
            token_norm=token_norm,
            token_positions=token_positions,
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
        width = self.resampler.output_size
        self.identity_embedding = IdentityEmbedding(max_identities, width) if max_identities else None
        self.null_token = nn.Parameter(torch.empty(1, hidden_size)) if null_token else None
        if self.null_token is not None:
            nn.init.trunc_normal_(self.null_token, std=0.02)

    def forward(
        self,
        image_features: Tensor,
        image_roles: Tensor,
        sample_index: Tensor,
        identity_index: Tensor | None = None,
        *,
        grid_size: tuple[int, int] | None = None,
        target_identity_map: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Encode the images of a batch, whatever their roles.

        Args:
            image_features: ``[I, P, Cv]`` patches of all images of the batch, row by row.
            image_roles: ``[I]`` integers, see :class:`idavlm.ImageRole`. This and the next two are read on the host:
                on the CPU they cost no synchronisation.
            sample_index: ``[I]`` the sample (row of the batch) each image belongs to; never falls. Within a sample
                roles may stand in any order.
            identity_index: ``[I]`` for references, the identity within its sample, 0, 1, ...: several photos of one
                person share it. Where it is not given every reference is an identity of its own.
            grid_size: rows and columns of patches; the square of ``P`` if not given.
            target_identity_map: ``[I, P]`` whom each patch shows, as ``targets`` of :meth:`identity_map_loss`: slots mark by
                these where they know, not by the attention (teacher forcing).
            output_attentions: also return the identity attention maps.

        Returns:
            ``[I, Q, C]`` image tokens in the order of the images. With ``output_attentions`` a pair of it and a tuple
            with one map a layer, ``[I, P, G + 1]`` float32: the share of attention, mean over heads, that a patch
            pays to each of the (at most) G identities of its sample, and in the last column to nobody. Rows sum to 1;
            images that look at no reference pay all to nobody.

        Raises:
            ValueError: ``image_features`` of another shape than ``[I, P, Cv]``; a role outside 0..2; a
                ``sample_index`` that falls; index tensors of another length than I; more identities than slots.
        """
        grid_size = self.resampler.check_features(image_features, grid_size)
        groups = group_images(
            image_roles, sample_index, identity_index, num_images=len(image_features), device=image_features.device
        )
        patches = self.resampler.project(select_images(image_features, groups.order))
        key_bias = self.resampler.key_bias(grid_size)
        plain, scenes = patches.split([groups.num_independent, len(patches) - groups.num_independent])
        plain_tokens = self.resampler.read(plain, key_bias)
        keys = self._identity_keys(plain, plain_tokens).index_select(0, groups.references)
        plain_tokens = self.resampler.finish(plain_tokens)
        if self.identity_embedding is not None:
            marks = self.identity_embedding.of(groups.identities)[:, None].expand(-1, plain_tokens.shape[1], -1)
            plain_tokens = plain_tokens.index_add(0, groups.references, marks.to(plain_tokens.dtype))
        scenes, maps = self._recognise(scenes, grid_size, keys, groups, output_attentions)
        image_tokens = torch.cat([plain_tokens, self.resampler.finish(self.resampler.read(scenes, key_bias))])
        image_tokens = self._mark(select_images(image_tokens, groups.inverse), maps, grid_size, target_identity_map)
        return (image_tokens, maps) if output_attentions else image_tokens

    def encode_references(self, image_features: Tensor, *, grid_size: tuple[int, int] | None = None) -> IdentityTokens:
        """Encode the R photos ``[R, P, Cv]`` of one identity, once, for :meth:`forward_scenes`."""
        grid_size = self.resampler.check_features(image_features, grid_size)
        patches = self.resampler.project(image_features)
        image_tokens = self.resampler.read(patches, self.resampler.key_bias(grid_size))
        return IdentityTokens(self.resampler.finish(image_tokens), self._identity_keys(patches, image_tokens))

    def forward_scenes(
        self,
        image_features: Tensor,
        identities: list[IdentityTokens],
        *,
        grid_size: tuple[int, int] | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Encode scenes that all look at the same identities, such as the frames of a video.

        Equal to :meth:`forward` on one sample of the identities' photos, in the order of the list, and these scenes.

        Args:
            image_features: ``[I, P, Cv]`` patches of the scenes.
            identities: from :meth:`encode_references`; may be empty. Their order numbers them 0, 1, ...
            grid_size: as in :meth:`forward`.
            output_attentions: as in :meth:`forward`.

        Returns:
            ``[I, Q, C]`` image tokens of the scenes; a pair with ``output_attentions``.
        """
        grid_size = self.resampler.check_features(image_features, grid_size)
        patches = self.resampler.project(image_features)
        self._check_bank(identities)
        photos = [len(identity.keys) for identity in identities]
        num_scenes = len(patches) if sum(photos) else 0  # without photos there is nobody to look at
        groups = ImageGroups(
            order=None,
            inverse=None,
            num_independent=len(patches) - num_scenes,
            identities=tuple(number for number, count in enumerate(photos) for _ in range(count)),
            references_per_sample=(sum(photos),),
            scenes_per_sample=(num_scenes,),
        )
        keys = torch.cat([identity.keys for identity in identities]) if identities else patches[:0]
        plain, scenes = patches.split([groups.num_independent, num_scenes])
        scenes, maps = self._recognise(scenes, grid_size, keys, groups, output_attentions)
        image_tokens = self.resampler.read(torch.cat([plain, scenes]), self.resampler.key_bias(grid_size))
        image_tokens = self._mark(self.resampler.finish(image_tokens), maps, grid_size)
        return (image_tokens, maps) if output_attentions else image_tokens

    def reference_tokens(self, identities: list[IdentityTokens]) -> Tensor:
        """What a language model reads for a bank of identities, as in :meth:`forward`: ``[R, Q, C]`` of all photos."""
        tokens = torch.cat([identity.image_tokens for identity in identities])
        if self.identity_embedding is None:
            return tokens
        numbers = [number for number, identity in enumerate(identities) for _ in identity.image_tokens]
        return tokens + self.identity_embedding.of(numbers)[:, None]

    def contrastive_loss(
        self,
        image_features: Tensor,
        image_roles: Tensor,
        sample_index: Tensor,
        identity_index: Tensor,
        targets: Tensor,
        *,
        grid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Supervise the identity attention over the references of the whole batch.

        Every patch that shows a known identity attends, in the first identity layer, to the references of all samples;
        the loss is the mean ``-log`` of the attention it pays to its own identity. With many identities to be told
        apart this teaches a model from scratch several times as fast as :meth:`identity_map_loss` alone, which offers a
        patch only the few of its sample. A person who is in two samples of a batch counts as two.

        Args:
            image_features, image_roles, sample_index, identity_index, grid_size: as in :meth:`forward`.
            targets: ``[I, P]``, e.g. from :func:`idavlm.identity_patch_targets`; only patches of identities count.

        Returns:
            The loss; 0 where no patch is labelled with an identity.
        """
        grid_size = self.resampler.check_features(image_features, grid_size)
        patches = self.resampler.project(image_features)
        image, patch = (targets >= 0).nonzero(as_tuple=True)
        sample_index, identity_index = sample_index.to(patches.device), identity_index.to(patches.device)
        is_reference = image_roles.to(patches.device) == ImageRole.REFERENCE
        if len(image) == 0 or not is_reference.any():
            return patches.sum() * 0
        references = patches[is_reference]
        key_bias = self.resampler.key_bias(grid_size)
        tokens = self.resampler.read(references, key_bias) if self._reads_tokens else None
        keys = self._identity_keys(references, tokens).flatten(0, 1)
        attention = self.identity_layers[0].attention
        query_bias = self.resampler.on_patches(attention.query_bias(self.resampler.position), grid_size)
        nobody = keys[:0] if self.null_token is None else self.null_token
        numbers = number_identities(
            torch.cat([sample_index[is_reference], sample_index[image]]),
            torch.cat([identity_index[is_reference], targets[image, patch]]),
        )
        owner, target = numbers.split([len(references), len(image)])
        return identity_contrastive_loss(
            attention.queries(patches[image, patch], query_bias[patch]),
            attention.keys(torch.cat([nobody, keys])),
            owner,
            target,
            num_null=len(nobody),
        )

    def identity_map_loss(self, identity_maps: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Supervise the identity attention maps: mean over layers of :func:`idavlm.identity_map_loss`.

        Without ``null_token`` the attention is a distribution over references only and cannot say "nobody": those
        patches are then left out, and only patches that show a reference teach.

        Args:
            identity_maps: from :meth:`forward` with ``output_attentions=True``.
            targets: ``[I, P]``, e.g. from :func:`idavlm.identity_patch_targets`.
        """
        if self.null_token is None:
            targets = targets.masked_fill(targets == NULL, IGNORE)
        return torch.stack([identity_map_loss(layer, targets) for layer in identity_maps]).mean()

    @property
    def _reads_tokens(self) -> bool:
        return self.identity_keys == "tokens"

    def _mark(self, image_tokens: Tensor, maps: tuple[Tensor, ...], grid_size: tuple[int, int], known=None) -> Tensor:
        """Add the slots of the identities that the cell of each token looks at, or is known to show."""
        if self.identity_embedding is None:
            return image_tokens
        seen = with_known(maps[-1], known)
        return image_tokens + self.identity_embedding.of_cells(seen, grid_size, self.resampler.query_grid)

    def _identity_keys(self, patches: Tensor, image_tokens: Tensor | None) -> Tensor:
        keys = image_tokens if self._reads_tokens else patches
        return keys.detach() if self.detach_references else keys

    def _check_bank(self, identities: list[IdentityTokens]) -> None:
        for number, identity in enumerate(identities):
            expected = (*identities[0].keys.shape[1:2], self.resampler.hidden_size)
            if identity.keys.dim() != 3 or identity.keys.shape[1:] != expected:
                raise ValueError(
                    f"identities[{number}].keys has shape {tuple(identity.keys.shape)}; expected "
                    f"[R, {', '.join(map(str, expected))}]: encode all of them with this IDFormer, at one image size."
                )

    def _recognise(
        self,
        scenes: Tensor,
        grid_size: tuple[int, int],
        keys: Tensor,
        groups: ImageGroups,
        output_attentions: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Patches of scenes ``[S, P, C]`` look at keys ``[R, K, C]``, each at those of its own sample."""
        packed = pack_keys(keys, groups, null_token=self.null_token)
        lengths, nobody = {"num_patches": scenes.shape[1], "key_length": keys.shape[1]}, self.null_token is not None
        segments = attention_segments(groups, **lengths, null_token=nobody, device=scenes.device)
        output_attentions = output_attentions or self.identity_embedding is not None
        maps = []
        for layer in self.identity_layers:
            query_bias = self.resampler.on_patches(layer.attention.query_bias(self.resampler.position), grid_size)
            scenes, sums = layer(scenes, packed, query_bias=query_bias, output_attentions=output_attentions, **segments)
            if output_attentions:
                maps.append(identity_map(sums, groups, scenes.shape[1]))
        return scenes, tuple(maps)
