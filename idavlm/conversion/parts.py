"""Parts that several formats have: Llama, a vision tower of transformers, tokenizers, image processors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, LlamaConfig, PretrainedConfig

from idavlm._compat import pil_image_processor
from idavlm.conversion.errors import ConversionError, first_line
from idavlm.conversion.mapping import Rule
from idavlm.conversion.plan import Places
from idavlm.conversion.source import Source, WeightFile, weight_files

TOWER = "vision_tower."
"""Put before the names of a tower that is read from a folder of its own."""

_LLAMA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "max_position_embeddings",
    "attention_bias",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def llama_config(config: dict[str, Any], vocab_size: int) -> LlamaConfig:
    """The language model of a Llama-like checkpoint, with so many embeddings."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    options = {name: config[name] for name in _LLAMA if name in config}
    return LlamaConfig(**{**options, "vocab_size": vocab_size}, rope_parameters=rope)


def embeddings_for(config: dict[str, Any], tokenizer) -> int:
    """As many as the checkpoint has, and at least one for every token of the tokenizer."""
    return max(config["vocab_size"], len(tokenizer))


def tower_folder(source: Source, places: Places, named: str | None) -> Path:
    """The folder with configuration (and perhaps weights) of the vision tower.

    Args:
        source: the checkpoint.
        places: a folder given by the user comes first.
        named: what the configuration says: a path, relative to the checkpoint, or the name of a model on a hub.
    """
    beside = [] if named is None else [source.folder / named, Path(named)]
    for folder in [places.vision_tower] if places.vision_tower is not None else beside:
        if (folder / "config.json").is_file():
            return folder
    if places.vision_tower is not None:
        raise ConversionError(f"vision_tower={str(places.vision_tower)!r} has no config.json; give the tower's folder.")
    raise ConversionError(
        f"{source.folder}: its vision tower {named!r} is not a folder beside it; fetch that model and give its folder "
        "with vision_tower= (--vision-tower)."
    )


def tower_config(folder: Path) -> PretrainedConfig:
    """Configuration of the vision model in ``folder``; of a model of images and text, of its vision part."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return getattr(config, "vision_config", config)


def add_tower_weights(source: Source, folder: Path) -> None:
    """Take the tower's files in, its names as ``vision_tower.*``."""
    source.add([WeightFile(path, prefix=TOWER, infix="vision_model.") for path in weight_files(folder)])


def tower_rules(config: PretrainedConfig, prefix: str) -> list[Rule]:
    """Names below ``prefix`` (a regular expression) to those that transformers gives this tower today."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        names = AutoModel.from_config(config).state_dict()
    head = "vision_model." if all(name.startswith("vision_model.") for name in names) else ""
    return [
        # Of CLIP as a whole: the text half, and what compares the two.
        Rule(prefix + r"(text_model|text_projection|visual_projection|logit_scale|logit_bias)(\..*)?", {}),
        Rule(prefix + r"(?:.*\.)?position_ids", {}),
        Rule(prefix + r"(?:vision_model\.)?(.*)", {rf"vision_tower.{head}\1": None}),
    ]


def read_tokenizer(source: Source, places: Places, **options):
    """The checkpoint's tokenizer, with a padding token.

    Raises:
        ConversionError: none there, or one that cannot be read.
    """
    folder = places.tokenizer or source.folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        raise ConversionError(
            f"{folder}: no tokenizer that can be read ({first_line(error)}). Give its folder with tokenizer= "
            "(--tokenizer); a tokenizer.model needs pip install 'idavlm[convert]'."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def token_ids(source: Source, tokenizer, *, ends: Sequence[str] = ()) -> dict[str, Any]:
    """Entries of the generation configuration: where an answer begins, ends and is padded.

    Args:
        source: its ``generation_config.json`` says which tokens end an answer, if it is there.
        tokenizer: its end of sequence does so too.
        ends: further tokens that do, if the tokenizer has them.
    """
    path = source.folder / "generation_config.json"
    stated = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    stated = stated if isinstance(stated, list) else [stated]
    vocabulary = tokenizer.get_vocab()
    found = [*stated, tokenizer.eos_token_id, *(vocabulary.get(token) for token in ends)]
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted({token for token in found if token is not None}) or None,
        "pad_token_id": tokenizer.pad_token_id,
    }


def add_image_token(tokenizer, token: str) -> int:
    """Id of the image placeholder, which becomes a token of its own."""
    from transformers import AddedToken

    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(token)


def gap_behind(tokenizer, token: str) -> str:
    """What to write behind a special token, so that text there is cut into tokens as at the beginning of a text.

    The authors of LLaVA tokenise what lies between images piece by piece; a SentencePiece tokenizer begins every piece
    with a mark for a space, but behind a special token only where it is asked to.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    return " " if ids(f"{token}a")[1:] != ids("a") == ids(f"{token} a")[1:] else ""


def read_image_processor(*folders: Path):
    """The image processor of the first folder that has one."""
    for folder in folders:
        if (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file():
            return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    raise ConversionError(f"{folders[-1]}: no preprocessor_config.json; fetch it, it belongs to the vision tower.")


def padding_to_square(image_processor):
    """The same image processor, which first pads pictures to squares, in the mean colour, as LLaVA-1.5 does."""
    names = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor", "do_resize")
    names += ("do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    options = image_processor.to_dict()
    options = {name: options[name] for name in names if options.get(name) is not None}
    return pil_image_processor("llava", "LlavaImageProcessor")(**options, do_pad=True)


def square_image_processor(image_size: int):
    """Whole pictures as squares of ``image_size`` pixels, whatever their shape, in CLIP's colours."""
    size = {"height": image_size, "width": image_size}
    return pil_image_processor("clip", "CLIPImageProcessor")(size=size, crop_size=size, do_center_crop=False)


def tokens_of_image(config: PretrainedConfig, *, with_cls: bool = False) -> int:
    return (config.image_size // config.patch_size) ** 2 + int(with_cls)
