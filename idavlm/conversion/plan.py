"""What a source format says of a checkpoint: everything that is needed to write it anew."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from idavlm.conversion.mapping import KeyMap
from idavlm.conversion.source import Source
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.processing import IDAVLMProcessor


@dataclass
class Plan:
    """How a checkpoint becomes a model of idavlm.

    Attributes:
        config: of the model.
        key_map: from the source's names to the model's.
        processor: goes beside the weights.
        more_processors: further ones, each in a folder of its name.
        generation: entries of the generation configuration.
    """

    config: IDAVLMConfig
    key_map: KeyMap
    processor: IDAVLMProcessor
    more_processors: dict[str, IDAVLMProcessor] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """Where parts lie that a checkpoint may lack; None where they are to be looked for beside it."""

    vision_tower: Path | None = None
    tokenizer: Path | None = None


class Format(Protocol):
    """A source format: one module each, with these names."""

    NAME: str
    """For messages."""
    LOOKS: str
    """What tells it apart, for the message about an unknown one."""
    matches: Callable[[Source], bool]
    plan: Callable[[Source, Places], Plan]
