"""The resampler: learned queries read an image's patches into a fixed number of tokens."""

import torch
from torch import Tensor, nn

from idavlm.modules.cross_attention import CrossAttention
from idavlm.modules.feed_forward import FeedForward
from idavlm.modules.positions import one_hot_positions_2d, resize_positions, sincos_positions_2d, square_grid
from idavlm.utils import check_choice, check_positive


class Resampler(nn.Module):
    """One cross-attention from learned queries to patches (Qwen-VL, arXiv 2308.12966).

    ``x = input_norm(input_proj(image_features))``;
    ``tokens = attention(query_norm(query) + position, x + resized position, x)``.
    The queries lie on a square grid with fixed 2-D sine-cosine positions, resized to the grid of the patches for the
    keys; values carry no positions. The queries are projected once, however many images there are.

    ``state_dict`` keys: ``query`` ``[Q, C]``; ``query_position`` ``[Q, C]`` (buffer); ``query_norm.*``;
    ``input_proj.weight`` ``[C, Cv]`` (only with ``vision_hidden_size``); ``input_norm.*``; ``attention.*`` (see
    :class:`CrossAttention`); ``feed_forward.*`` (only with ``feed_forward=True``); ``token_norm.*`` (only with
    ``token_norm=True``); ``output_norm.*`` and ``output_proj.weight`` ``[output_size, C]`` (only with
    ``output_proj=True``).

    Args:
        hidden_size: C, width of the tokens; divisible by 4 and by ``num_heads``.
        num_queries: Q, tokens an image; a square number.
        num_heads: attention heads.
        vision_hidden_size: Cv, width of the patches. Where it is not given or equals ``hidden_size``, patches go in
            unprojected, as released.
        feed_forward: add ``tokens + FeedForward(tokens)``, drawn in the paper's figure, absent from the release.
        intermediate_size: inner width of the feed-forward block; ``4 * hidden_size`` if not given.
        token_norm: normalise the tokens, before positions and marks are added: attention to patches of a trained tower
            gives them any strength, and a mark would drown. As released they are not.
        token_positions: add to every token where its query lies, so that a language model can tell where in the image
            it reads: True adds ``query_position``, whose neighbours are alike; ``"one_hot"`` a direction of its own for
            every row and column, which a frozen language model tells apart sooner. As released they have none.
        output_proj: what the release has behind the resampler: a norm and a linear layer of the tokens that go to the
            language model. Scenes of an ID-Former look at references as they are before it.
        output_size: width of the tokens that go to the language model, where it is another one than C: a narrow module
            before a wide language model is fast, and learns from little. It needs ``output_proj``.
        attn_implementation: see :func:`idavlm.ops.cross_attention`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_queries: int,
        num_heads: int,
        vision_hidden_size: int | None = None,
        feed_forward: bool = False,
        intermediate_size: int | None = None,
        token_norm: bool = False,
        token_positions: bool | str = False,
        output_proj: bool = False,
        output_size: int | None = None,
        attn_implementation: str = "sdpa",
    ):
        super().__init__()
        check_positive(hidden_size=hidden_size, num_queries=num_queries, vision_hidden_size=vision_hidden_size)
        check_positive(output_size=output_size)
        check_choice("token_positions", token_positions, (False, True, "one_hot"))
        self.hidden_size = hidden_size
        self.output_size = output_size or hidden_size
        if self.output_size != hidden_size and not output_proj:
            raise ValueError(
                f"output_size={output_size} but hidden_size={hidden_size} and no output_proj; set output_proj=True, "
                "which takes tokens from one width to the other."
            )
        self.num_queries = num_queries
        self.vision_hidden_size = vision_hidden_size or hidden_size
        self.token_positions = token_positions
        self.query_grid = square_grid("num_queries", num_queries)
        if token_positions == "one_hot":
            one_hot_positions_2d(hidden_size, self.query_grid)  # too narrow is an error now, not at the first batch
        self.query = nn.Parameter(torch.empty(num_queries, hidden_size))
        self.register_buffer("query_position", sincos_positions_2d(hidden_size, self.query_grid))
        self.query_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.input_proj = (
            nn.Identity()
            if self.vision_hidden_size == hidden_size
            else nn.Linear(self.vision_hidden_size, hidden_size, bias=False)
        )
        self.input_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attention = CrossAttention(
            hidden_size=hidden_size, num_heads=num_heads, attn_implementation=attn_implementation
        )
        self.feed_forward = FeedForward(hidden_size, intermediate_size) if feed_forward else None
        self.token_norm = nn.LayerNorm(hidden_size, eps=1e-6) if token_norm else None
        self.output_norm = nn.LayerNorm(hidden_size, eps=1e-6) if output_proj else None
        self.output_proj = nn.Linear(hidden_size, self.output_size, bias=False) if output_proj else None
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, image_features: Tensor, *, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Read every image on its own.

        Args:
            image_features: ``[I, P, Cv]`` patches, row by row.
            grid_size: rows and columns of patches; the square of ``P`` if not given.

        Returns:
            ``[I, Q, C]`` image tokens (``output_size`` wide).
        """
        grid_size = self.check_features(image_features, grid_size)
        return self.finish(self.read(self.project(image_features), self.key_bias(grid_size)))

    def check_features(self, image_features: Tensor, grid_size: tuple[int, int] | None) -> tuple[int, int]:
        """Check ``image_features`` and give the rows and columns of its patches."""
        if image_features.dim() != 3 or image_features.shape[-1] != self.vision_hidden_size:
            raise ValueError(
                f"image_features has shape {tuple(image_features.shape)}; expected [I, P, {self.vision_hidden_size}], "
                "the last being vision_hidden_size."
            )
        num_patches = image_features.shape[1]
        if grid_size is None:
            return square_grid("P, the number of patches of image_features,", num_patches)
        if not isinstance(grid_size, (tuple, list)) or len(grid_size) != 2:
            raise ValueError(f"grid_size={grid_size!r} must be a pair (rows, columns).")
        check_positive(**{"grid_size[0]": grid_size[0], "grid_size[1]": grid_size[1]})
        if grid_size[0] * grid_size[1] != num_patches:
            raise ValueError(
                f"grid_size={tuple(grid_size)} has {grid_size[0] * grid_size[1]} cells but image_features has "
                f"{num_patches} patches; give the rows and columns of the patches."
            )
        return tuple(grid_size)

    @property
    def position(self) -> Tensor:
        """``query_position`` in the type of the parameters, which mixed precision may have changed alone."""
        return self.query_position.to(self.query.dtype)

    @property
    def token_position(self) -> Tensor:
        """``[Q, C]`` what ``token_positions`` adds."""
        if self.token_positions != "one_hot":
            return self.position
        like = {"dtype": self.query.dtype, "device": self.query.device}
        return one_hot_positions_2d(self.hidden_size, self.query_grid, **like)

    def on_patches(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Resize ``x`` ``[Q, C]`` from the grid of the queries to the patches' ``[P, C]``."""
        return resize_positions(x, self.query_grid, grid_size)

    def project(self, image_features: Tensor) -> Tensor:
        """``[I, P, Cv] -> [I, P, C]`` projected and normalised patches."""
        return self.input_norm(self.input_proj(image_features))

    def key_bias(self, grid_size: tuple[int, int]) -> Tensor:
        """Positions of the patches, projected for the keys: ``[P, C]``.

        Projecting and resizing commute; the grid of the queries is the smaller one, so it is projected.
        """
        return self.on_patches(self.attention.key_bias(self.position), grid_size)

    def read(self, patches: Tensor, key_bias: Tensor) -> Tensor:
        """``[I, P, C]`` projected patches with the :meth:`key_bias` of their grid to ``[I, Q, C]`` tokens."""
        tokens = self.attention(self.query_norm(self.query) + self.position, patches, key_bias=key_bias)
        if self.feed_forward is not None:
            tokens = tokens + self.feed_forward(tokens)
        if self.token_norm is not None:
            tokens = self.token_norm(tokens)
        return tokens + self.token_position if self.token_positions else tokens

    def finish(self, tokens: Tensor) -> Tensor:
        """What :meth:`read` gives, as the language model gets it: ``[I, Q, output_size]``."""
        return tokens if self.output_proj is None else self.output_proj(self.output_norm(tokens))
