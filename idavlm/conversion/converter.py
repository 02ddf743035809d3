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
    ConversionError,
    SourceCheckpoint,
    WeightFile,
    listed,
    read_checkpoint,
    size_of,
    write_safetensors,
)
from idavlm.conversion.checkpoint_format import CheckpointFormat, ConversionPlan, PartFolders
from idavlm.conversion.key_mapping import KeyMap, Transform
from idavlm.conversion.llava import IAA, LLAVA, YI_VL
from idavlm.conversion.lora import LoraAdapter, add_adapter_files, read_adapter
from idavlm.conversion.qwen_vl import QWEN_VL
from idavlm.conversion.transformers_llava import TRANSFORMERS_LLAVA
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.modeling import IDAVLMForConditionalGeneration

FORMATS: tuple[CheckpointFormat, ...] = (QWEN_VL, IAA, YI_VL, LLAVA, TRANSFORMERS_LLAVA)
STATE = "conversion.json"
"""File in the folder of an unfinished conversion that identifies the conversion."""

Targets = dict[str, dict[str, Transform | None]]
"""For each tensor of a file: new names with their transforms."""


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
        ConversionError: an unknown format; missing, unexpected or misshaped tensors; files that are truncated or
            contain code; too little disk space. Nothing is written then.
        FileExistsError: ``out`` is not empty, or ``<out>.partial`` belongs to another conversion.
    """
    src, out = Path(src), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out={str(out)!r} exists and is not overwritten; choose another folder, or remove it.")
    source = read_checkpoint(src)
    if adapter is not None:
        add_adapter_files(source, Path(adapter))
    folders = PartFolders(*(None if path is None else Path(path) for path in (vision_tower, tokenizer)))
    try:
        plan = detect_format(source).plan(source, folders)
    except KeyError as error:
        raise ConversionError(f"{src}: its config.json has no {error}.") from error
    lora = LoraAdapter({}) if adapter is None else read_adapter(Path(adapter), source, plan.key_map)
    dtype = _parse_dtype(dtype)
    targets, headers = plan_files(source, plan.key_map, dtype)
    check_complete(source, plan.config, headers)
    jobs = _plan_jobs(source, targets, headers)
    plan.config.dtype = _main_dtype(headers)

    partial = out.with_name(out.name + ".partial")
    remaining = [job for job in jobs if not (partial / job.name).exists()]
    total, left = (sum(job.size for job in group) for group in (jobs, remaining))
    _check_disk_space(out, left)
    _open_partial(partial, _state(source, jobs))
    try:
        with tqdm(total=total, initial=total - left, unit="B", unit_scale=True, disable=not progress) as bar:
            for job in remaining:
                write_safetensors(partial / job.name, job.header, _stream(job, dtype, lora, bar))
        _write_configuration(partial, plan, jobs)
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
    supported = "; ".join(f"{each.name}: {each.signature}" for each in FORMATS)
    raise ConversionError(
        f"{source.folder}: unknown format. Found model_type={source.config.get('model_type')!r}, architectures="
        f"{source.config.get('architectures')!r} and {listed(source.tensors)} tensors. Supported formats: {supported}."
    )


def plan_files(
    source: SourceCheckpoint, key_map: KeyMap, dtype: torch.dtype | None
) -> tuple[list[Targets], list[dict]]:
    """Plan the conversion of each file of ``source``.

    Returns:
        The targets of the tensors of each file, and the header of each file to write.

    Raises:
        ConversionError: a name that no rule of ``key_map`` matches, or a shape that its transform does not support.
    """
    unknown, all_targets, headers = [], [], []
    for file, header in zip(source.files, source.headers, strict=True):
        file_targets: Targets = {}
        written: dict[str, Tensor] = {}
        for name, tensor in header.items():
            targets = key_map(name)
            if targets is None:
                unknown.append(name)
                continue
            file_targets[name] = targets
            for target, transform in targets.items():
                try:
                    written[target] = transform_tensor(tensor, transform, dtype)
                except (RuntimeError, IndexError, AttributeError) as error:
                    raise ConversionError(f"{name}: shape {tuple(tensor.shape)} cannot become {target}.") from error
        if file.overrides:
            headers = [{name: tensor for name, tensor in earlier.items() if name not in written} for earlier in headers]
        all_targets.append(file_targets)
        headers.append(written)
    if unknown:
        raise ConversionError(
            f"{source.folder}: tensors that are not part of this format: {listed(unknown)}; check that the "
            "checkpoint is unmodified."
        )
    return all_targets, headers


def transform_tensor(tensor: Tensor, transform: Transform | None, dtype: torch.dtype | None) -> Tensor:
    """Apply a transform, then convert floating-point tensors to ``dtype``."""
    tensor = tensor if transform is None else transform(tensor)
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def check_complete(source: SourceCheckpoint, config: IDAVLMConfig, headers: list[dict[str, Tensor]]) -> None:
    """Compare the tensors to write with the tensors of the model.

    Raises:
        ConversionError: lists all tensors that are missing, unexpected, duplicate or of another shape.
    """
    expected = model_shapes(config)
    found: dict[str, Tensor] = {}
    duplicate = []
    for header in headers:
        duplicate += header.keys() & found.keys()
        found |= header
    tied = {"language_model.lm_head.weight"} if config.text_config.tie_word_embeddings else set()
    missing = expected.keys() - found.keys() - tied
    unexpected = found.keys() - expected.keys()
    misshaped = {
        f"{name} {tuple(found[name].shape)} instead of {expected[name]}"
        for name in expected.keys() & found.keys()
        if tuple(found[name].shape) != expected[name]
    }
    problems = [
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", misshaped),
        ("duplicate", duplicate),
    ]
    if any(names for _, names in problems):
        listing = "; ".join(f"{what}: {listed(names)}" for what, names in problems if names)
        raise ConversionError(
            f"{source.folder}: {len(expected)} tensors expected, {len(found)} found, named as in the converted model. "
            f"{listing}. Check that the checkpoint is complete and that config.json belongs to it."
        )


def model_shapes(config: IDAVLMConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the model, computed without allocating them."""
    with torch.device("meta"):
        state = IDAVLMForConditionalGeneration(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@dataclass(frozen=True)
class _Job:
    """A file to write: its name, its header, and for each tensor its source tensor and transform."""

    name: str
    file: WeightFile
    header: dict[str, Tensor]
    origins: dict[str, tuple[str, Transform | None]]

    @property
    def size(self) -> int:
        return size_of(self.header.values())


def _plan_jobs(source: SourceCheckpoint, targets: list[Targets], headers: list[dict[str, Tensor]]) -> list[_Job]:
    """One output file per input file; none if all tensors of the input file are dropped."""
    kept = [entry for entry in zip(source.files, targets, headers, strict=True) if entry[2]]
    jobs = []
    for number, (file, file_targets, header) in enumerate(kept, 1):
        name = f"model-{number:05d}-of-{len(kept):05d}.safetensors" if len(kept) > 1 else "model.safetensors"
        # Sorted by the size of the type, so that the offset of every tensor is a multiple of it.
        ordered = dict(sorted(header.items(), key=lambda item: -item[1].element_size()))
        origins = {
            new: (old, transform) for old, new_names in file_targets.items() for new, transform in new_names.items()
        }
        jobs.append(_Job(name, file, ordered, origins))
    return jobs


def _stream(job: _Job, dtype: torch.dtype | None, lora: LoraAdapter, bar) -> Iterator[tuple[str, Tensor]]:
    with job.file.open() as tensors:
        for new in job.header:
            old, transform = job.origins[new]
            tensor = transform_tensor(lora.merge(old, tensors[old]), transform, dtype)
            yield new, tensor
            bar.update(size_of([tensor]))


def _write_configuration(folder: Path, plan: ConversionPlan, jobs: list[_Job]) -> None:
    """Write index, configurations and processors."""
    if len(jobs) > 1:
        index = {
            "metadata": {"total_size": sum(job.size for job in jobs)},
            "weight_map": {name: job.name for job in jobs for name in job.header},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    plan.config.architectures = [IDAVLMForConditionalGeneration.__name__]
    plan.config.save_pretrained(folder)
    GenerationConfig(**plan.generation).save_pretrained(folder)
    plan.processor.save_pretrained(folder)
    for name, processor in plan.more_processors.items():
        processor.save_pretrained(folder / name)


def _state(source: SourceCheckpoint, jobs: list[_Job]) -> dict:
    """Fingerprint of the files that are read and written; an interrupted conversion resumes only if it is equal."""
    stats = [(file.path.resolve(), file.path.stat()) for file in source.files]
    written = [
        [job.name, name, list(tensor.shape), str(tensor.dtype)] for job in jobs for name, tensor in job.header.items()
    ]
    return {
        "read": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "written": hashlib.sha256(json.dumps(written).encode()).hexdigest(),
    }


def _open_partial(partial: Path, state: dict) -> None:
    """Create the folder of the unfinished output, or reuse it if it belongs to the same conversion."""
    if partial.exists():
        path = partial / STATE
        if not path.is_file() or json.loads(path.read_text()) != state:
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


def _main_dtype(headers: list[dict[str, Tensor]]) -> torch.dtype:
    """Type of most of the bytes, which becomes the default of ``from_pretrained``."""
    sizes: Counter[torch.dtype] = Counter()
    for header in headers:
        for tensor in header.values():
            if tensor.is_floating_point():
                sizes[tensor.dtype] += size_of([tensor])
    return sizes.most_common(1)[0][0]


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (None, torch.float32, torch.float16, torch.bfloat16) or (dtype is not None and found is None):
        raise ValueError(f"dtype={dtype!r} is not supported; choose 'float32', 'float16' or 'bfloat16', or None.")
    return found
