"""Formats of released checkpoints: what a format defines, and the parts that several formats share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer

from idavlm.conversion.checkpoint_files import SourceCheckpoint
from idavlm.conversion.config_files import GENERATION, check_fields, is_there, read_json
from idavlm.conversion.errors import ConversionError, errors_of, shown
from idavlm.conversion.key_mapping import KeyMap
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.processing import IDAVLMProcessor
from idavlm.utils import first_line


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


TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
MAX_NEW_TOKENS = 256
"""Largest number of tokens that a tokenizer may have beyond the embeddings of its checkpoint."""


def read_tokenizer(source: SourceCheckpoint):
    """Tokenizer of the checkpoint, with a padding token.

    Raises:
        ConversionError: there is none that can be loaded and used.
    """
    folder = source.tokenizer or source.folder
    for name in TOKENIZER_FILES:
        if is_there(folder / name):
            read_json(folder / name)
    remedy = "Pass its folder with tokenizer= (--tokenizer); a tokenizer.model needs pip install 'idavlm[convert]'."
    with errors_of(folder, "has no tokenizer that can be loaded", remedy):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        tokenizer.decode(tokenizer("Who is this?").input_ids)
        template = tokenizer.chat_template
    tokens = {}
    for token, number in tokenizer.get_vocab().items():
        if tokens.setdefault(number, token) != token:
            raise ConversionError(
                f"{folder}: its tokenizer gives {shown(tokens[number])} and {shown(token)} the same id {number}. "
                "Download it again."
            )
    if template is not None and not isinstance(template, str):
        raise ConversionError(f"{folder}: its tokenizer has chat_template={shown(template)}; expected one template.")
    return tokenizer


def check_image_token(source: SourceCheckpoint, tokenizer, token: str) -> None:
    """Check that an image placeholder in a text becomes one token.

    Raises:
        ConversionError: it does not.
    """
    folder = source.tokenizer or source.folder
    with errors_of(folder, "has a tokenizer that fails on text", "Pass that of the checkpoint (--tokenizer)."):
        ids = tokenizer(f"Who is this? {token}{token} Who?").input_ids
        count = ids.count(tokenizer.convert_tokens_to_ids(token))
    if count != 2:
        raise ConversionError(
            f"{folder}: its tokenizer has the image placeholder {token!r}, but finds {count} of 2 in a text. Pass the "
            "tokenizer of the checkpoint with tokenizer= (--tokenizer)."
        )


def num_embeddings(path: Path, vocab_size: int, tokenizer) -> int:
    """Number of embeddings: ``vocab_size``, the number of the checkpoint, or more if the tokenizer has new tokens.

    Raises:
        ConversionError: so many new tokens that the tokenizer belongs to another model.
    """
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size + MAX_NEW_TOKENS:
        raise ConversionError(
            f"{path}: vocab_size={vocab_size}, but the tokenizer has ids up to {needed - 1}; pass the tokenizer of the "
            "checkpoint with tokenizer= (--tokenizer)."
        )
    return max(vocab_size, needed)


def check_image_processor(path: Path, image_processor, image_size: int) -> None:
    """Check that an image processor brings an image to the size of the vision tower.

    Args:
        path: its file, for messages.
        image_processor: image processor of transformers.
        image_size: side of an image in pixels.

    Raises:
        ConversionError: it fails, or returns another size or values that are not finite.
    """
    with errors_of(path, "describes an image processor that fails", "Use the file of the vision tower."):
        pixels = image_processor([Image.new("RGB", (96, 48), "white")], return_tensors="pt")["pixel_values"]
        found, is_finite = tuple(pixels.shape), bool(torch.isfinite(pixels).all())
    if found != (1, 3, image_size, image_size) or not is_finite:
        values = "" if is_finite else " with values that are not finite"
        raise ConversionError(
            f"{path}: an image becomes pixels of shape {found}{values}; expected {(1, 3, image_size, image_size)}, "
            f"because the vision tower has image_size={image_size}. Use the file of the vision tower."
        )


def idavlm_config(source: SourceCheckpoint, **options) -> IDAVLMConfig:
    """Configuration with these arguments.

    Raises:
        ConversionError: they do not fit each other.
    """
    try:
        return IDAVLMConfig(**options)
    except ValueError as error:
        raise ConversionError(f"{source.config_path}: {first_line(error)}") from error


def generation_tokens(source: SourceCheckpoint, tokenizer, *, ends: Sequence[str] = ()) -> dict[str, Any]:
    """Beginning, end and padding tokens for the generation configuration.

    Args:
        source: end tokens of its ``generation_config.json`` are included, if the file exists.
        tokenizer: its end-of-sequence token is included.
        ends: further end tokens, included if the tokenizer has them.
    """
    path = source.folder / "generation_config.json"
    configured = None
    if is_there(path):
        generation = read_json(path)
        check_fields(path, generation, GENERATION)
        configured = generation.get("eos_token_id")
    configured = configured if isinstance(configured, list) else [configured]
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in configured if token is not None and token > max(vocabulary.values())]
    if unknown:
        raise ConversionError(f"{path}: eos_token_id has {unknown[0]}, which is not a token of the tokenizer.")
    found = [*configured, tokenizer.eos_token_id, *(vocabulary.get(token) for token in ends)]
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted({token for token in found if token is not None}) or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
