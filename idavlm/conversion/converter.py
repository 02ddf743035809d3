"""``convert``: write a released checkpoint as a folder for ``from_pretrained``, file by file and resumable."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from idavlm.conversion.checkpoint_files import (
    SourceCheckpoint,
    WeightFile,
    size_of,
    weight_files,
    write_safetensors,
)
from idavlm.conversion.checkpoint_format import CheckpointFormat, ConversionPlan
from idavlm.conversion.config_files import read_config
from idavlm.conversion.errors import ConversionError, errors_of, listed, shown
from idavlm.conversion.key_mapping import KeyMap, Transform
from idavlm.conversion.llava import IAA, LLAVA, TRANSFORMERS_LLAVA, YI_VL
from idavlm.conversion.lora import Deltas, add_adapter_files, merge_delta, read_adapter
from idavlm.conversion.qwen_vl import QWEN_VL
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.modeling import IDAVLMForConditionalGeneration

FORMATS: tuple[CheckpointFormat, ...] = (QWEN_VL, IAA, YI_VL, LLAVA, TRANSFORMERS_LLAVA)
FLOATING_POINT = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LANGUAGE_HEAD, INPUT_EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
STATE = "conversion.json"
"""File in the folder of an unfinished conversion that identifies the conversion."""


def convert(
    src: str | Path,
    out: str | Path,
    *,
    vision_tower: str | Path | None = None,
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> Path:
    """Convert a released checkpoint to a model and a processor of idavlm.

    The format is detected from the configuration and the names of tensors. Tensors are read and written one at a time,
    so that memory holds one tensor and one memory-mapped file. The checkpoint is validated before anything is written.
    Output is written to ``<out>.partial``; the same call resumes an interrupted conversion at the next file.

    Args:
        src: folder of the checkpoint.
        out: folder to create; may exist if it is empty.
        vision_tower: folder of the vision tower, if the checkpoint refers to a model of the hub.
        tokenizer: folder of the tokenizer (or a ``qwen.tiktoken`` file), if the checkpoint has none.
        adapter: folder of a LoRA adapter to merge, of peft or of LLaVA (with ``non_lora_trainables.bin``).
        dtype: type of the weights, for example ``"bfloat16"``; by default unchanged.
        progress: show a progress bar.

    Returns:
        ``out``.

    Raises:
        ConversionError: an unknown format; missing, unexpected or misshaped tensors; a configuration with values that
            are not supported or contradict the tensors; files that are truncated or contain code; too little disk
            space. Nothing is written then.
        FileExistsError: ``out`` is not empty, or ``<out>.partial`` belongs to another conversion.
    """
    src, out = Path(src), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out={str(out)!r} exists and is not overwritten; choose another folder, or remove it.")
    if not src.is_dir():
        raise ConversionError(f"{src}: no such folder.")
    supported = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    dtype = supported.get(dtype, dtype)
    if dtype not in (None, *supported.values()):
        raise ValueError(f"dtype={dtype!r} is not supported; choose 'float32', 'float16' or 'bfloat16', or None.")
    source = SourceCheckpoint(src, read_config(src), vision_tower and Path(vision_tower), tokenizer and Path(tokenizer))
    source.add([WeightFile(path) for path in weight_files(src)])
    if adapter is not None:
        add_adapter_files(source, Path(adapter))
    plan = detect_format(source).plan(source)
    deltas = {} if adapter is None else read_adapter(Path(adapter), source, plan.key_map)
    outputs = plan_files(source, plan.key_map, dtype)
    tie_head(source, plan.config, outputs, deltas)
    check_complete(source, plan.config, outputs)
    plan.config.dtype = _main_dtype(outputs)

    partial = out.with_name(out.name + ".partial")
    remaining = [output for output in outputs if not (partial / output.name).exists()]
    total, left = (sum(output.size for output in group) for group in (outputs, remaining))
    _check_disk_space(out, left)
    _open_partial(partial, source, outputs)
    try:
        with tqdm(total=total, initial=total - left, unit="B", unit_scale=True, disable=not progress) as bar:
            for output in remaining:
                write_safetensors(partial / output.name, output.header, _stream(output, dtype, deltas, bar))
        _write_configuration(partial, plan, outputs)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
        (out / STATE).unlink()
    except Exception:
        shutil.rmtree(partial)
        raise
    return out


def detect_format(source: SourceCheckpoint) -> CheckpointFormat:
    """The first format that matches the checkpoint."""
    for checkpoint_format in FORMATS:
        if checkpoint_format.matches(source):
            return checkpoint_format
    supported = "; ".join(f"{supported.name}: {supported.signature}" for supported in FORMATS)
    raise ConversionError(
        f"{source.folder}: unknown format. Found model_type={shown(source.config.get('model_type'))}, architectures="
        f"{shown(source.config.get('architectures'))} and {listed(source.tensors)} tensors. Supported formats: "
        f"{supported}."
    )


@dataclass
class OutputFile:
    """A file to write.

    Attributes:
        source: file that its tensors are read from.
        header: names of its tensors with ``meta`` tensors.
        origins: name of a tensor -> its name in ``source``, and its transform.
        name: file name.
    """

    source: WeightFile
    header: dict[str, Tensor]
    origins: dict[str, tuple[str, Transform | None]]
    name: str = ""

    @property
    def size(self) -> int:
        """Size of the tensors in bytes."""
        return size_of(self.header.values())


def plan_files(source: SourceCheckpoint, key_map: KeyMap, dtype: torch.dtype | None) -> list[OutputFile]:
    """Plan one output file per file of ``source``; files whose tensors are all dropped have none.

    Raises:
        ConversionError: a name that no rule of ``key_map`` matches, or a shape that its transform does not support.
    """
    unknown: list[str] = []
    outputs: list[OutputFile] = []
    for file, tensors in zip(source.files, source.headers, strict=True):
        header, origins = {}, {}
        for name, tensor in tensors.items():
            targets = key_map(name)
            if targets is None:
                unknown.append(name)
                continue
            for target, transform in targets.items():
                try:
                    header[target] = transform_tensor(tensor, transform, dtype)
                except (RuntimeError, IndexError, AttributeError) as error:
                    raise ConversionError(f"{name}: shape {tuple(tensor.shape)} cannot become {target}.") from error
                origins[target] = (name, transform)
        if file.overrides:
            for earlier in outputs:
                if file.unties and LANGUAGE_HEAD not in header and INPUT_EMBEDDINGS in header:
                    _keep_as_head(earlier, outputs)
                earlier.header = {name: tensor for name, tensor in earlier.header.items() if name not in header}
        # Sorted by the size of the type, so that the offset of every tensor is a multiple of it.
        header = dict(sorted(header.items(), key=lambda item: -item[1].element_size()))
        outputs.append(OutputFile(file, header, origins))
    if unknown:
        raise ConversionError(
            f"{source.folder}: tensors that are not part of this format: {listed(unknown)}; check that the "
            "checkpoint is unmodified."
        )
    outputs = [output for output in outputs if output.header]
    for number, output in enumerate(outputs, 1):
        several = len(outputs) > 1
        output.name = f"model-{number:05d}-of-{len(outputs):05d}.safetensors" if several else "model.safetensors"
    return outputs


def _keep_as_head(output: OutputFile, outputs: list[OutputFile]) -> None:
    """Make the embeddings of a file, which an adapter replaces, the head of a checkpoint that has no other head."""
    if INPUT_EMBEDDINGS in output.header and not any(LANGUAGE_HEAD in other.header for other in outputs):
        output.header[LANGUAGE_HEAD] = output.header[INPUT_EMBEDDINGS]
        output.origins[LANGUAGE_HEAD] = output.origins[INPUT_EMBEDDINGS]


def tie_head(source: SourceCheckpoint, config: IDAVLMConfig, outputs: list[OutputFile], deltas: Deltas) -> None:
    """Set ``tie_word_embeddings``. As in transformers, a head in the files that differs from the embeddings counts."""
    tied = bool(source.config.get("tie_word_embeddings") or config.text_config.tie_word_embeddings)
    origins = {name: output.origins[name][0] for output in outputs for name in output.header}
    if tied and {LANGUAGE_HEAD, INPUT_EMBEDDINGS} <= origins.keys():
        is_changed = not deltas.keys().isdisjoint((origins[LANGUAGE_HEAD], origins[INPUT_EMBEDDINGS]))
        tied = not is_changed and torch.equal(_read(outputs, LANGUAGE_HEAD), _read(outputs, INPUT_EMBEDDINGS))
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = tied


def transform_tensor(tensor: Tensor, transform: Transform | None, dtype: torch.dtype | None) -> Tensor:
    """Apply a transform, then convert floating-point tensors to ``dtype``."""
    tensor = tensor if transform is None else transform(tensor)
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def check_complete(source: SourceCheckpoint, config: IDAVLMConfig, outputs: list[OutputFile]) -> None:
    """Compare the tensors to write with the tensors of the model.

    The model is built without values from the configuration as it will be saved, and its vision tower encodes an image.

    Raises:
        ConversionError: the configuration describes no model; or lists all tensors that are missing, unexpected,
            duplicate, or of another shape or type.
    """
    path = source.config_path
    with errors_of(path, "describes no model that can be built", "Check the file."), torch.device("meta"):
        saved = IDAVLMConfig.from_dict(json.loads(config.to_json_string()))
        model = IDAVLMForConditionalGeneration(saved)
    expected = model.state_dict()
    count = Counter(name for output in outputs for name in output.header)
    found = {name: tensor for output in outputs for name, tensor in output.header.items()}
    tied = {LANGUAGE_HEAD} if config.text_config.tie_word_embeddings else set()
    common = expected.keys() & found.keys()
    problems = {
        "missing": expected.keys() - found.keys() - tied,
        "unexpected": found.keys() - expected.keys(),
        "of another shape": [
            f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in common
            if found[name].shape != expected[name].shape
        ],
        "of another type": [
            f"{name} {_type_name(found[name])} instead of {_type_name(expected[name])}"
            for name in common
            if expected[name].is_floating_point() != (found[name].dtype in FLOATING_POINT)
        ],
        "duplicate": [name for name in count if count[name] > 1],
    }
    if any(problems.values()):
        listing = "; ".join(f"{problem}: {listed(names)}" for problem, names in problems.items() if names)
        raise ConversionError(
            f"{source.folder}: {len(expected)} tensors expected, {len(found)} found, named as in the converted model. "
            f"{listing}. Check that the checkpoint is complete and that {path} belongs to it."
        )
    _check_vision(path, saved, model)


def _check_vision(path: Path, config: IDAVLMConfig, model: IDAVLMForConditionalGeneration) -> None:
    """Encode an image without values, and compare the number of tokens with the configuration."""
    size = config.vision_config.image_size
    with (
        errors_of(path, f"describes a vision tower that fails on images of {size} x {size}", "Check the file."),
        torch.no_grad(),
    ):
        features, _ = model.eval().image_features(torch.zeros(1, 3, size, size, device="meta"))
    if model.connector is not None and config.connector != "resampler" and features.shape[1] != config.image_seq_length:
        raise ConversionError(
            f"{path}: an image has {features.shape[1]} tokens, but image_size={size} and patch_size="
            f"{config.vision_config.patch_size} mean {config.image_seq_length}. This vision tower is not supported."
        )


def _read(outputs: list[OutputFile], name: str) -> Tensor:
    """A tensor of the source, as it is on disk."""
    output = next(output for output in outputs if name in output.header)
    with output.source.open() as tensors:
        return tensors[output.origins[name][0]]()


def _type_name(tensor: Tensor) -> str:
    return "floating point" if tensor.dtype in FLOATING_POINT else str(tensor.dtype).removeprefix("torch.")


def _stream(output: OutputFile, dtype: torch.dtype | None, deltas: Deltas, bar) -> Iterator[tuple[str, Tensor]]:
    with output.source.open() as tensors:
        for name in output.header:
            old_name, transform = output.origins[name]
            tensor = transform_tensor(merge_delta(deltas, old_name, tensors[old_name]()), transform, dtype)
            yield name, tensor
            bar.update(size_of([tensor]))


def _write_configuration(folder: Path, plan: ConversionPlan, outputs: list[OutputFile]) -> None:
    """Write index, configurations and processors."""
    if len(outputs) > 1:
        index = {
            "metadata": {"total_size": sum(output.size for output in outputs)},
            "weight_map": {name: output.name for output in outputs for name in output.header},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    plan.config.architectures = [IDAVLMForConditionalGeneration.__name__]
    plan.config.save_pretrained(folder)
    GenerationConfig(**plan.generation).save_pretrained(folder)
    plan.processor.save_pretrained(folder)
    for name, processor in plan.more_processors.items():
        processor.save_pretrained(folder / name)


def _open_partial(partial: Path, source: SourceCheckpoint, outputs: list[OutputFile]) -> None:
    """Create the folder of the unfinished output, or reuse it if it belongs to the same conversion.

    A fingerprint of the files that are read and written identifies the conversion.
    """
    stats = [(file.path.resolve(), file.path.stat()) for file in source.files]
    written = [
        [output.name, name, list(tensor.shape), str(tensor.dtype)]
        for output in outputs
        for name, tensor in output.header.items()
    ]
    state = {
        "read": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "written": hashlib.sha256(json.dumps(written).encode()).hexdigest(),
    }
    if partial.exists():
        path = partial / STATE
        if not path.is_file() or path.read_text(encoding="utf-8") != json.dumps(state):
            raise FileExistsError(
                f"{partial}: belongs to another conversion, or its source has changed; remove it and start again."
            )
        return
    partial.mkdir(parents=True)
    (partial / STATE).write_text(json.dumps(state))


def _check_disk_space(out: Path, needed: int) -> None:
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    needed += 64 * 2**20  # for tokenizer and configurations
    if free < needed:
        raise ConversionError(
            f"out={str(out)!r}: needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; free disk space."
        )


def _main_dtype(outputs: list[OutputFile]) -> torch.dtype:
    """Type of most of the bytes, which becomes the default of ``from_pretrained``."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in (tensor for output in outputs for tensor in output.header.values()):
        if tensor.is_floating_point():
            sizes[tensor.dtype] += size_of([tensor])
    return sizes.most_common(1)[0][0]
