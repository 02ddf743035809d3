"""Formats of released checkpoints: what a format defines, and the parts that several formats share."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PretrainedConfig

from idavlm._compat import auto_image_processor, pil_image_processor
from idavlm.conversion.checkpoint_files import ConversionError, SourceCheckpoint, first_line
from idavlm.conversion.key_mapping import KeyMap, Rule
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.processing import IDAVLMProcessor


@dataclass
class ConversionPlan:
    """Everything that is needed to write a checkpoint as a model of idavlm.

    Attributes:
        config: configuration of the model.
        key_map: maps tensors of the source to tensors of the model.
        processor: processor, saved next to the weights.
        more_processors: further processors, each saved in a subfolder of its name.
        generation: entries of the generation configuration.
    """

    config: IDAVLMConfig
    key_map: KeyMap
    processor: IDAVLMProcessor
    more_processors: dict[str, IDAVLMProcessor] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointFormat:
    """A released format.

    Attributes:
        name: name of the system, for messages.
        signature: what identifies the format, for messages.
        matches: whether a checkpoint has this format.
        plan: plans the conversion of a checkpoint.
    """

    name: str
    signature: str
    matches: Callable[[SourceCheckpoint], bool]
    plan: Callable[[SourceCheckpoint], ConversionPlan]


def llama_config(config: dict[str, Any], vocab_size: int) -> LlamaConfig:
    """Configuration of the language model of a Llama-like checkpoint with ``vocab_size`` embeddings."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    names = LlamaConfig.__annotations__.keys() & config.keys() - {"vocab_size", "rope_parameters", "use_cache"}
    return LlamaConfig(**{name: config[name] for name in names}, vocab_size=vocab_size, rope_parameters=rope)


def num_embeddings(config: dict[str, Any], tokenizer) -> int:
    """Number of embeddings: that of the checkpoint, but at least one per token of the tokenizer."""
    return max(config["vocab_size"], len(tokenizer))


def tower_folder(source: SourceCheckpoint, named: str | None) -> Path:
    """Find the folder with the configuration (and possibly weights) of the vision tower.

    Args:
        source: the checkpoint; its ``vision_tower`` takes precedence.
        named: the tower in the configuration: a path relative to the checkpoint, or a name on the hub.

    Raises:
        ConversionError: no such folder.
    """
    if source.vision_tower is not None:
        if (source.vision_tower / "config.json").is_file():
            return source.vision_tower
        raise ConversionError(
            f"vision_tower={str(source.vision_tower)!r} has no config.json; pass the folder of the tower."
        )
    for folder in [] if named is None else [source.folder / named, Path(named)]:
        if (folder / "config.json").is_file():
            return folder
    raise ConversionError(
        f"{source.folder}: its vision tower {named!r} is not a local folder; download that model and pass its folder "
        "with vision_tower= (--vision-tower)."
    )


def tower_config(folder: Path) -> PretrainedConfig:
    """Configuration of the vision model in ``folder``, or of the vision part of an image-text model."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return getattr(config, "vision_config", config)


def tower_rules(config: PretrainedConfig, prefix: str) -> list[Rule]:
    """Rules from names below ``prefix`` (a regular expression) to the names in the installed transformers."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        names = AutoModel.from_config(config).state_dict()
    head = "vision_model." if all(name.startswith("vision_model.") for name in names) else ""
    return [
        # A complete CLIP also has the text tower and the projections; they are not needed.
        Rule(prefix + r"(text_model|text_projection|visual_projection|logit_scale|logit_bias)(\..*)?", {}),
        Rule(prefix + r"(?:.*\.)?position_ids", {}),
        Rule(prefix + r"(?:vision_model\.)?(.*)", {rf"vision_tower.{head}\1": None}),
    ]


def read_tokenizer(source: SourceCheckpoint):
    """Tokenizer of the checkpoint, with a padding token.

    Raises:
        ConversionError: there is none that can be loaded.
    """
    folder = source.tokenizer or source.folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConversionError(
            f"{folder}: no tokenizer that can be loaded ({first_line(error)}). Pass its folder with tokenizer= "
            "(--tokenizer); a tokenizer.model needs pip install 'idavlm[convert]'."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def generation_tokens(source: SourceCheckpoint, tokenizer, *, ends: Sequence[str] = ()) -> dict[str, Any]:
    """Beginning, end and padding tokens for the generation configuration.

    Args:
        source: end tokens of its ``generation_config.json`` are included, if the file exists.
        tokenizer: its end-of-sequence token is included.
        ends: further end tokens, included if the tokenizer has them.
    """
    path = source.folder / "generation_config.json"
    configured = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    configured = configured if isinstance(configured, list) else [configured]
    vocabulary = tokenizer.get_vocab()
    found = [*configured, tokenizer.eos_token_id, *(vocabulary.get(token) for token in ends)]
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted({token for token in found if token is not None}) or None,
        "pad_token_id": tokenizer.pad_token_id,
    }


def add_image_token(tokenizer, token: str) -> int:
    """Add ``token`` as a special token unless it exists; returns its id."""
    from transformers import AddedToken

    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(token)


def space_after(tokenizer, token: str) -> str:
    """Text to insert after a special token so that the following text is tokenized as at the beginning of a text.

    The code of LLaVA tokenizes the text between images piece by piece. A SentencePiece tokenizer starts every piece
    with a space marker, but after a special token only if there is a space.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    return " " if ids(f"{token}a")[1:] != ids("a") == ids(f"{token} a")[1:] else ""


def read_image_processor(*folders: Path):
    """Image processor of the first folder that has one."""
    for folder in folders:
        if (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file():
            return auto_image_processor().from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    raise ConversionError(f"{folders[-1]}: no preprocessor_config.json; download that of the vision tower.")


def pad_to_square(image_processor):
    """The same image processor with padding to squares in the mean colour first, as in LLaVA-1.5."""
    names = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor", "do_resize")
    names += ("do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    options = image_processor.to_dict()
    options = {name: options[name] for name in names if options.get(name) is not None}
    return pil_image_processor("llava", "LlavaImageProcessor")(**options, do_pad=True)


def square_image_processor(image_size: int):
    """Image processor that resizes to squares of ``image_size`` pixels without cropping, normalized as in CLIP."""
    size = {"height": image_size, "width": image_size}
    return pil_image_processor("clip", "CLIPImageProcessor")(size=size, crop_size=size, do_center_crop=False)


def num_image_tokens(config: PretrainedConfig, *, with_cls: bool = False) -> int:
    """Number of patches of an image, plus one for the class token if it is used."""
    return (config.image_size // config.patch_size) ** 2 + int(with_cls)
