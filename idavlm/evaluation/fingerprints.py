"""Fingerprints of everything that an answer depends on: model, processor and question.

They depend on content only, never on paths or dates: a copied checkpoint has the same fingerprint, one that was
retrained in the same folder has another.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idavlm.data.schema import Part, Sample
from idavlm.evaluation.choices import CHOICE_TASKS, candidates

QUESTION_PARTS = ("question", "choices", "images")
"""Parts of an item's fingerprint that do not depend on the references that the model received."""

# Where a model or processor was loaded from, by which version it was saved, and how it is computed.
_NOT_CONTENT = {
    "_attn_implementation", "_from_model_config", "_name_or_path", "architectures", "is_local", "local_files_only",
    "name_or_path", "transformers_version",
}  # fmt: skip


def model_fingerprint(model: nn.Module, processor: Any) -> dict[str, str]:
    """Fingerprints of model and processor, and the versions of the packages that prepare prompts.

    The weights are the bytes of all parameters and buffers, so the cost is that of reading them once. A model without
    ``config`` or a processor without ``save_pretrained`` is identified by its class in that respect.

    Returns:
        ``{"model_weights", "model_config", "processor", "idavlm", "transformers"}``.
    """
    configs = [getattr(model, name, None) for name in ("config", "generation_config")]
    content = [config.to_dict() if hasattr(config, "to_dict") else None for config in configs]
    return {
        "model_weights": _weights_digest(model),
        "model_config": _digest([type(model).__name__, _content(content)]),
        "processor": _processor_digest(processor),
        "idavlm": version("idavlm"),
        "transformers": version("transformers"),
    }


def item_fingerprint(sample: Sample, shown: Sample | None = None) -> dict[str, str]:
    """Fingerprint of a sample, part by part, so that a difference can be named.

    The right answer belongs to it only where it is one of the choices: its correction changes scores, not answers.

    Args:
        sample: the evaluated sample.
        shown: the sample that the model receives, if its references differ from those of ``sample``.

    Returns:
        ``question`` (task, messages, names of the identities), ``choices``, ``images`` (content of the image files of
        the messages) and ``references`` (names, and content of the reference photos). If a file cannot be read, the
        part stands for the paths, and begins with a question mark.
    """
    shown = shown or sample
    turns = [(message.role, [_part(sample, part) for part in message.content]) for message in sample.messages]
    names = [[identity.name, len(identity.images)] for identity in sample.identities]
    return {
        "question": _digest([sample.task, turns, names]),
        "choices": _digest(candidates(sample) if sample.task in CHOICE_TASKS else []),
        "images": _images_digest(sample, sample.message_images),
        "references": _images_digest(
            shown, shown.reference_images, [[identity.name, len(identity.images)] for identity in shown.identities]
        ),
    }


def changed_parts(before: Mapping[str, str], now: Mapping[str, str], parts: Iterable[str] | None = None) -> list[str]:
    """The parts (by default all) that differ between two fingerprints of an item.

    A part whose files could not be read differs from nothing, because their content is not known.
    """
    parts = [part for part in parts or before if part in before and part in now]
    return [part for part in parts if before[part] != now[part] and "?" not in before[part][:1] + now[part][:1]]


def _part(sample: Sample, part: Part) -> list:
    if part.type == "box":
        return ["box", part.name, sample.message_images.index(part.image), sample.box_of_part(part).box]
    return [part.type, part.text]


def _images_digest(sample: Sample, paths: Sequence[str], more: Sequence = ()) -> str:
    """Digest of the content of image files, and of ``more``; "?" and a digest of the paths if one cannot be read."""
    digests = []
    for path in paths:
        file = os.path.join(sample.image_root or "", path)
        try:
            status = os.stat(file)
            digests.append(_file_digest(file, status.st_ino, status.st_size, status.st_mtime_ns))
        except (OSError, ValueError):
            return f"?{_digest([list(paths), list(more)])}"
    return _digest([digests, list(more)])


@lru_cache(maxsize=100_000)
def _file_digest(path: str, inode: int, size: int, mtime: int) -> str:
    """Digest of a file. Inode, size and time identify its content while the process runs."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights_digest(model: nn.Module) -> str:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter lock
        return _digest(list(zip(tensors, pool.map(_tensor_digest, tensors.values()), strict=True)))


def _tensor_digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _digest([str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()])


def _processor_digest(processor: Any) -> str:
    if not hasattr(processor, "save_pretrained"):
        return _digest(type(processor).__name__)
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        contents = [[str(file.relative_to(folder)), file.read_bytes()] for file in files]
    return _digest(
        [name, _content(json.loads(data)) if name.endswith(".json") else hashlib.sha256(data).hexdigest()]
        for name, data in contents
    )


def _content(value: Any) -> Any:
    """A configuration without the entries that do not describe content."""
    if isinstance(value, Mapping):
        return {str(key): _content(found) for key, found in value.items() if key not in _NOT_CONTENT}
    return [_content(found) for found in value] if isinstance(value, (list, tuple)) else value


def _digest(value: Any) -> str:
    value = value if isinstance(value, (str, list, dict)) else list(value)
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
