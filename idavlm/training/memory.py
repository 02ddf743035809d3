"""Memory and communication of a training step on one rank, from formulas.

All sizes are bytes. docs/scaling.md compares the formulas with measured steps and lists large models.
"""

from dataclasses import dataclass

ADAM_STATE = 8
"""Bytes of the two moments of AdamW per trained parameter, in float32."""
MASTER_WEIGHT = 4
"""Bytes of the float32 copy that DeepSpeed keeps of each trained parameter in half precision."""


@dataclass(frozen=True)
class Layers:
    """The layers of a transformer, for the size of its activations.

    Attributes:
        num_layers, hidden_size, intermediate_size: of the layers.
        kv_size: width of keys and of values; ``hidden_size`` without grouped queries.
        is_gated: whether the MLP is gated, as in Llama; otherwise it has two layers, as in a ViT.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    kv_size: int
    is_gated: bool

    def kept_bytes(self, strategy: "Strategy") -> float:
        """Bytes per token that one layer keeps for the backward pass, with fused attention and without dropout."""
        # Norms compute in float32 and keep their input. RMSNorm also keeps what it multiplies with its weight.
        norms = 2 * self.hidden_size * (4 + (strategy.weight_bytes if self.is_gated else 0))
        # Linear layers keep the outputs of both norms. Attention keeps q, k, v and its output, which the output
        # projection keeps in another layout.
        attention = 5 * self.hidden_size + 2 * self.kv_size
        # Gated: gate, its activation, up, and their product. Otherwise: before and after the activation.
        mlp = (4 if self.is_gated else 2) * self.intermediate_size
        return norms + (attention + mlp) * strategy.compute_bytes

    def num_weights(self) -> int:
        """Weights of the linear layers of one layer."""
        attention = 2 * self.hidden_size * (self.hidden_size + self.kv_size)
        return attention + (3 if self.is_gated else 2) * self.hidden_size * self.intermediate_size


def layers_of(config) -> Layers:
    """The layers of a configuration of transformers: of a language model or of a vision transformer.

    Raises:
        ValueError: it describes no transformer with these sizes, for example a ResNet.
    """

    def size(*names: str) -> int | None:
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if isinstance(value, int)), None)

    num_layers, hidden_size = size("num_hidden_layers", "depth", "n_layer"), size("hidden_size", "embed_dim", "n_embd")
    heads = size("num_attention_heads", "num_heads", "n_head")
    if None in (num_layers, hidden_size, heads):
        raise ValueError(f"{type(config).__name__} names no layers, hidden_size and heads of a transformer.")
    head_size = size("head_dim") or hidden_size // heads
    kv_size = head_size * (size("num_key_value_heads") or heads)
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None) or "silu"
    is_gated = "silu" in str(activation) or "num_key_value_heads" in vars(config)
    return Layers(num_layers, hidden_size, size("intermediate_size", "n_inner") or 4 * hidden_size, kv_size, is_gated)


@dataclass(frozen=True)
class Strategy:
    """How a training run is split over ranks, and what it keeps.

    Attributes:
        num_ranks: number of processes.
        stage: what is partitioned: 0 nothing (DDP), 1 optimizer state, 2 also gradients, 3 also weights (FSDP is 3).
        weight_bytes: per parameter; 4 for float32, 2 for bfloat16.
        frozen_bytes: per frozen parameter.
        compute_bytes: per value of the forward pass; 2 with ``bf16``.
        has_master_weights: whether the optimizer keeps float32 copies, as DeepSpeed does with ``bf16``.
        optimizer_bytes: per trained parameter.
        checkpointing: whether activations are computed again in the backward pass.
    """

    num_ranks: int = 1
    stage: int = 0
    weight_bytes: float = 4
    frozen_bytes: float = 4
    compute_bytes: int = 4
    has_master_weights: bool = False
    optimizer_bytes: float = ADAM_STATE
    checkpointing: bool = False


def state_memory(trained: int, frozen: int, largest_layer: int, strategy: Strategy) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer state on one rank.

    Args:
        trained, frozen: numbers of parameters.
        largest_layer: parameters of the largest layer; stage 3 gathers the layer that runs and the next one.
        strategy: how the run is split.
    """
    ranks = strategy.num_ranks
    weights = trained * strategy.weight_bytes + frozen * strategy.frozen_bytes
    gathered = 0.0
    if strategy.stage == 3 and ranks > 1:
        weights /= ranks
        gathered = 2 * largest_layer * strategy.compute_bytes
    gradients = trained * strategy.weight_bytes / (ranks if strategy.stage >= 2 else 1)
    per_parameter = strategy.optimizer_bytes + (MASTER_WEIGHT if strategy.has_master_weights else 0)
    optimizer = trained * per_parameter / (ranks if strategy.stage >= 1 else 1)
    return {"weights": weights, "gathered layers": gathered, "gradients": gradients, "optimizer state": optimizer}


def activation_memory(layers: Layers, num_tokens: int, strategy: Strategy) -> float:
    """Bytes that the layers keep for the backward pass of ``num_tokens``, which include padding.

    Mixed precision also keeps the weights in the type of the computation. With checkpointing, each layer keeps its
    input, and one layer at a time everything.
    """
    has_copies = strategy.compute_bytes < strategy.weight_bytes
    copies = layers.num_weights() * strategy.compute_bytes if has_copies else 0
    of_one = num_tokens * layers.kept_bytes(strategy) + copies
    if not strategy.checkpointing:
        return layers.num_layers * of_one
    return checkpoint_memory(layers, num_tokens, strategy) + of_one


def checkpoint_memory(layers: Layers, num_tokens: int, strategy: Strategy) -> float:
    """Bytes of the inputs of all layers, which checkpointing keeps. They have the type of the weights."""
    return num_tokens * layers.num_layers * layers.hidden_size * strategy.weight_bytes


def logits_memory(num_tokens: int, vocab_size: int, strategy: Strategy) -> float:
    """Bytes of the logits of ``num_tokens``: as computed, in float32 for the loss, and their gradient."""
    return num_tokens * vocab_size * (strategy.compute_bytes + 4 + 4)


def language_model_memory(
    layers: Layers, num_tokens: int, num_logits: int, vocab_size: int, strategy: Strategy
) -> float:
    """Peak of activations and logits. With checkpointing, logits are freed before the first layer is computed again."""
    logits = logits_memory(num_logits, vocab_size, strategy)
    activations = activation_memory(layers, num_tokens, strategy)
    if not strategy.checkpointing:
        return activations + logits
    inputs = checkpoint_memory(layers, num_tokens, strategy)
    return inputs + max(activations - inputs, logits)


def step_communication(trained: int, frozen: int, accumulation: int, strategy: Strategy) -> float:
    """Bytes that one rank sends in an optimizer step of ``accumulation`` micro-batches.

    DDP reduces the gradients once per step (a ring sends each byte twice); ZeRO-1 and 2 reduce-scatter them and gather
    the new weights, ZeRO-2 after every micro-batch; stage 3 gathers all weights twice per micro-batch, and
    reduce-scatters the gradients.
    """
    share = (strategy.num_ranks - 1) / strategy.num_ranks
    gradients = trained * strategy.weight_bytes
    if strategy.stage == 0:
        return 2 * share * gradients
    if strategy.stage == 1:
        return 2 * share * gradients
    if strategy.stage == 2:
        return share * gradients * (accumulation + 1)
    weights = (trained + frozen) * strategy.compute_bytes
    return share * accumulation * (2 * weights + gradients)
