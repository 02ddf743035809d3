"""The resampler: learned queries summarise the patches of an image as a fixed number of tokens."""

import torch
from torch import Tensor, nn

from idavlm.modules.attention import CrossAttention, FeedForward
from idavlm.modules.positions import one_hot_positions_2d, resize_positions, sincos_positions_2d, square_grid
from idavlm.utils import check_choice, check_positive


class Resampler(nn.Module):
    """One cross-attention from learned queries to patches (Qwen-VL, arXiv 2308.12966).

    ``x = input_norm(input_proj(image_features))``;
    ``tokens = attention(query_norm(query) + position, x + resized position, x)``.
    The queries lie on a square grid with fixed 2-D sine-cosine positions. The positions are resized to the grid of the
    patches for the keys; values carry no positions. The queries are projected once, however many images there are.

    ``state_dict`` keys: ``query`` ``[Q, C]``; ``query_position`` ``[Q, C]`` (buffer); ``query_norm.*``;
    ``input_proj.weight`` ``[C, Cv]`` (only if the widths differ); ``input_norm.*``; ``attention.*`` (see
    :class:`CrossAttention`); ``feed_forward.*`` (only with ``feed_forward=True``); ``token_norm.*`` (only with
    ``token_position_embedding``); ``output_norm.*`` and ``output_proj.weight`` ``[output_size, C]`` (only with
    ``output_proj=True``).

    Args:
        hidden_size: width C of the tokens; divisible by 4 and by ``num_heads``.
        num_queries: number Q of tokens per image; a square number.
        num_heads: number of attention heads.
        vision_hidden_size: width Cv of the patches. If it is None or equals ``hidden_size``, patches are not projected,
            as in the release.
        feed_forward: add ``tokens + FeedForward(tokens)``, which the paper's figure shows and the release lacks.
        intermediate_size: inner width of the feed-forward block. Defaults to ``4 * hidden_size``.
        token_position_embedding: ``None`` (as released), ``"sincos"`` or ``"one_hot"``. Normalises the tokens and adds
            the fixed 2-D position of each query, so that the language model can tell where in the image a token comes
            from. ``"one_hot"`` uses orthogonal codes for rows and columns, see :func:`one_hot_positions_2d`.
        output_proj: normalise and project the tokens for the language model, as the release does. The references that
            scenes attend to in an ID-Former are the tokens before this projection.
        output_size: width of the projected tokens, needs ``output_proj``. Defaults to C. A narrow module in front of a
            wide language model is fast and needs little data.
        attn_implementation: backend, see :func:`idavlm.cross_attention`.

    Raises:
        ValueError: sizes that do not fit each other, with the argument and the remedy.
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
        token_position_embedding: str | None = None,
        output_proj: bool = False,
        output_size: int | None = None,
        attn_implementation: str = "sdpa",
    ):
        super().__init__()
        check_positive(hidden_size=hidden_size, num_queries=num_queries, vision_hidden_size=vision_hidden_size)
        check_positive(output_size=output_size)
        check_choice("token_position_embedding", token_position_embedding, (None, "sincos", "one_hot"))
        self.hidden_size = hidden_size
        self.output_size = output_size or hidden_size
        if self.output_size != hidden_size and not output_proj:
            raise ValueError(
                f"output_size={output_size} differs from hidden_size={hidden_size}, which needs a projection; set "
                "output_proj=True."
            )
        self.num_queries = num_queries
        self.vision_hidden_size = vision_hidden_size or hidden_size
        self.token_position_embedding = token_position_embedding
        self.query_grid = square_grid("num_queries", num_queries)
        if token_position_embedding == "one_hot":
            one_hot_positions_2d(hidden_size, self.query_grid)  # too narrow: an error now, not at the first batch
        self.query = nn.Parameter(torch.empty(num_queries, hidden_size))
        self.register_buffer("query_position", sincos_positions_2d(hidden_size, self.query_grid))
        self.query_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.input_proj = nn.Identity()
        if self.vision_hidden_size != hidden_size:
            self.input_proj = nn.Linear(self.vision_hidden_size, hidden_size, bias=False)
        self.input_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attention = CrossAttention(
            hidden_size=hidden_size, num_heads=num_heads, attn_implementation=attn_implementation
        )
        self.feed_forward = FeedForward(hidden_size, intermediate_size) if feed_forward else None
        self.token_norm = nn.LayerNorm(hidden_size, eps=1e-6) if token_position_embedding else None
        self.output_norm = nn.LayerNorm(hidden_size, eps=1e-6) if output_proj else None
        self.output_proj = nn.Linear(hidden_size, self.output_size, bias=False) if output_proj else None
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, image_features: Tensor, *, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Resample each image independently.

        Args:
            image_features: ``[I, P, Cv]`` patches, row by row.
            grid_size: rows and columns of the patches. Defaults to the square grid of P patches.

        Returns:
            ``[I, Q, output_size]`` image tokens.
        """
        grid_size = self.check_features(image_features, grid_size)
        return self.project_tokens(self.resample(self.project_patches(image_features), self.key_bias(grid_size)))

    def check_features(self, image_features: Tensor, grid_size: tuple[int, int] | None) -> tuple[int, int]:
        """Check that the features are ``[I, P, Cv]`` on a grid of P cells, and return its rows and columns."""
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
                f"{num_patches} patches; pass the rows and columns of the patches."
            )
        return tuple(grid_size)

    @property
    def position(self) -> Tensor:
        """``query_position`` in the dtype of the parameters; mixed precision may have converted only these."""
        return self.query_position.to(self.query.dtype)

    @property
    def token_position(self) -> Tensor:
        """The position ``[Q, C]`` that ``token_position_embedding`` adds to the tokens."""
        if self.token_position_embedding == "sincos":
            return self.position
        return one_hot_positions_2d(self.hidden_size, self.query_grid, dtype=self.query.dtype, device=self.query.device)

    def resize_to_patches(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Resize ``[Q, C]`` from the grid of the queries to the grid of the patches, ``[P, C]``."""
        return resize_positions(x, self.query_grid, grid_size)

    def project_patches(self, image_features: Tensor) -> Tensor:
        """Project and normalise patches, ``[I, P, Cv]`` to ``[I, P, C]``."""
        return self.input_norm(self.input_proj(image_features))

    def key_bias(self, grid_size: tuple[int, int]) -> Tensor:
        """Return the positions of the patches, projected for the keys, ``[P, C]``.

        Projection and resizing commute. The grid of the queries is usually smaller, so it is projected first.
        """
        return self.resize_to_patches(self.attention.key_bias(self.position), grid_size)

    def resample(self, patches: Tensor, key_bias: Tensor) -> Tensor:
        """Resample ``[I, P, C]`` from :meth:`project_patches` to tokens ``[I, Q, C]``, not yet projected."""
        tokens = self.attention(self.query_norm(self.query) + self.position, patches, key_bias=key_bias)
        if self.feed_forward is not None:
            tokens = tokens + self.feed_forward(tokens)
        if self.token_position_embedding is not None:
            tokens = self.token_norm(tokens) + self.token_position
        return tokens

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """Apply the output projection, if there is one: ``[I, Q, C]`` to ``[I, Q, output_size]``."""
        return tokens if self.output_proj is None else self.output_proj(self.output_norm(tokens))
