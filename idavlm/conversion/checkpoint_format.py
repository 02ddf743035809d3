"""Formats of released checkpoints: what a format defines, and the parts that several formats share."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer

from idavlm.conversion.checkpoint_files import ConversionError, SourceCheckpoint, first_line
from idavlm.conversion.key_mapping import KeyMap
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
