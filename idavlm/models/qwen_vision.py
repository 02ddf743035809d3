"""The vision transformer of Qwen-VL (arXiv 2308.12966) and IDA-VLM, as a transformers model."""

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPAttention

from idavlm.modules.positions import resize_positions, square_grid
from idavlm.utils import check_positive


class QwenVisionConfig(PretrainedConfig):
    """Configuration of :class:`QwenVisionModel`; the defaults are those of the release.

    Args:
        hidden_size: width of a patch.
        intermediate_size: inner width of the feed-forward blocks.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of heads; must divide ``hidden_size``.
        image_size: side of an image in pixels. Other sizes work; positions are then resized.
        patch_size: side of a patch in pixels.
        num_positions: number of learned positions; a square number, independent of the image size.
        hidden_act: activation of the feed-forward blocks.
        layer_norm_eps: epsilon of all norms.
        initializer_range: standard deviation of new weights.
    """

    model_type = "qwen_vl_vision"
    attention_dropout = 0.0  # of CLIPAttention

    hidden_size: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    num_positions: int = 256
    num_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_positive(num_attention_heads=self.num_attention_heads, patch_size=self.patch_size)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}."
            )
        square_grid("num_positions", self.num_positions)


class QwenVisionLayer(GradientCheckpointingLayer):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``.

    The release interleaves the three projections of the attention by head; here they are separate, as in CLIP.
    """

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))[0]
        return hidden_states + self.fc2(self.act(self.fc1(self.layer_norm2(hidden_states))))


class QwenVisionModel(PreTrainedModel):
    """Maps pixels ``[I, 3, H, W]`` to patches ``[I, P, C]``. It has no CLS token and no norm after the last block.

    The resampler of the release, its norm and its projection are a connector here (:class:`idavlm.Resampler` with
    ``output_proj=True``).
    """

    config_class = QwenVisionConfig
    base_model_prefix = "vision"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QwenVisionLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: QwenVisionConfig):
        super().__init__(config)
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(config.num_positions, config.hidden_size))
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(QwenVisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            initialization.normal_(self.position_embedding, std=self.config.initializer_range)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, return_dict: bool = True, **kwargs
    ) -> BaseModelOutput | tuple:
        """Encode images of one size.

        Args:
            pixel_values: ``[I, 3, H, W]``, H and W multiples of ``patch_size``.
            output_hidden_states: also return the hidden states before each block and after the last.
            return_dict: return an object instead of a tuple.
        """
        size = self.config.patch_size
        if pixel_values.dim() != 4 or pixel_values.shape[2] % size or pixel_values.shape[3] % size:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected [I, 3, H, W] with multiples of "
                f"patch_size={size} for H and W."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        grid = square_grid("num_positions", self.config.num_positions)
        positions = resize_positions(self.position_embedding, grid, tuple(patches.shape[2:]))
        hidden_states = self.pre_layernorm(rearrange(patches, "i c h w -> i (h w) c") + positions)
        states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            states.append(hidden_states)
        output = BaseModelOutput(hidden_states, tuple(states) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()
