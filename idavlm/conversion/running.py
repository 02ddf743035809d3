"""``convert``: a released checkpoint to a folder that ``from_pretrained`` loads, streamed file by file."""

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

from idavlm.conversion import iaa, llava, qwen_vl, transformers_llava, yi_vl
from idavlm.conversion.adapters import Adapter, read_adapter, take_in
from idavlm.conversion.checking import Work, check_complete, converted, planned_work
from idavlm.conversion.errors import ConversionError, listed
from idavlm.conversion.mapping import Transform
from idavlm.conversion.plan import Format, Places, Plan
from idavlm.conversion.source import Source, WeightFile, read_source
from idavlm.conversion.writer import size_of, write_safetensors
from idavlm.models.modeling import IDAVLMForConditionalGeneration

FORMATS: tuple[Format, ...] = (qwen_vl, iaa, yi_vl, llava, transformers_llava)
STATE = "conversion.json"
"""In the unfinished folder: what is being converted."""


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

    The format is told by configuration and names of tensors. Files are read and written one tensor at a time: the
    memory needed is one file, mapped, and a tensor. All that can be wrong is found before anything is written. The
    result grows in ``<out>.partial``; where a conversion was killed, the same call goes on at the file it had reached.

    Args:
        src: folder of the checkpoint.
        out: folder to make; it must not exist, or be empty.
        vision_tower: folder of the vision tower, where the checkpoint names a model of a hub.
        tokenizer: folder of the tokenizer (or a ``qwen.tiktoken``), where the checkpoint has none.
        adapter: folder of a LoRA adapter, of peft or of LLaVA (with ``non_lora_trainables.bin``), to be merged.
        dtype: of the weights written, e.g. ``"bfloat16"``; as they are if not given.
        progress: show a progress bar.

    Returns:
        ``out``.

    Raises:
        ConversionError: an unknown format, missing, extra or misshaped tensors, files that are cut off or hold code,
            no room on the disk. Nothing is left behind then.
        FileExistsError: ``out`` is there and not empty, or ``<out>.partial`` is of another conversion.
    """
    src, out = Path(src), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out={str(out)!r} is there already; it is not overwritten. Give another, or remove it.")
    source = read_source(src)
    if adapter is not None:
        take_in(source, Path(adapter))
    places = Places(*(None if path is None else Path(path) for path in (vision_tower, tokenizer)))
    try:
        plan = format_of(source).plan(source, places)
    except KeyError as error:
        raise ConversionError(f"{src}: its config.json has no {error}.") from error
    merged = Adapter({}) if adapter is None else read_adapter(Path(adapter), source, plan.key_map)
    dtype = _dtype_of(dtype)
    works, headers = planned_work(source, plan.key_map, dtype)
    check_complete(source, plan.config, headers)
    jobs = _jobs(source, works, headers)
    plan.config.dtype = _main_type(headers)

    partial = out.with_name(out.name + ".partial")
    todo = [job for job in jobs if not (partial / job.name).exists()]
    total, left = (sum(job.size for job in some) for some in (jobs, todo))
    _check_room(out, left)
    _enter(partial, _state(source, jobs))
    try:
        with tqdm(total=total, initial=total - left, unit="B", unit_scale=True, disable=not progress) as bar:
            for job in todo:
                write_safetensors(partial / job.name, job.header, _stream(job, dtype, merged, bar))
        _write_rest(partial, plan, jobs)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
        (out / STATE).unlink()
    except Exception:
        shutil.rmtree(partial)
        raise
    return out


def format_of(source: Source) -> Format:
    """The first format that knows the checkpoint."""
    for known in FORMATS:
        if known.matches(source):
            return known
    expected = "; ".join(f"{known.NAME}: {known.LOOKS}" for known in FORMATS)
    raise ConversionError(
        f"{source.folder}: no known format. Found model_type={source.config.get('model_type')!r}, architectures="
        f"{source.config.get('architectures')!r} and {listed(source.tensors)} tensors. Known are {expected}."
    )


@dataclass(frozen=True)
class _Job:
    """One file to write: its name, its header, and for each tensor where it comes from."""

    name: str
    file: WeightFile
    header: dict[str, Tensor]
    origins: dict[str, tuple[str, Transform | None]]

    @property
    def size(self) -> int:
        return size_of(self.header.values())


def _jobs(source: Source, works: list[Work], headers: list[dict[str, Tensor]]) -> list[_Job]:
    """One file for each that is read; none for a file all of whose tensors are left out (the text half of CLIP)."""
    kept = [entry for entry in zip(source.files, works, headers, strict=True) if entry[2]]
    jobs = []
    for number, (file, work, header) in enumerate(kept, 1):
        name = f"model-{number:05d}-of-{len(kept):05d}.safetensors" if len(kept) > 1 else "model.safetensors"
        # Wide types first, so that every tensor of the file lies at a multiple of its type's size.
        ordered = dict(sorted(header.items(), key=lambda item: -item[1].element_size()))
        origins = {new: (old, how) for old, targets in work.items() for new, how in targets.items()}
        jobs.append(_Job(name, file, ordered, origins))
    return jobs


def _stream(job: _Job, dtype: torch.dtype | None, adapter: Adapter, bar) -> Iterator[tuple[str, Tensor]]:
    with job.file.open() as tensors:
        for new in job.header:
            old, how = job.origins[new]
            tensor = converted(adapter.merge(old, tensors[old]), how, dtype)
            yield new, tensor
            bar.update(size_of([tensor]))


def _write_rest(folder: Path, plan: Plan, jobs: list[_Job]) -> None:
    """Index, configurations, processors."""
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


def _state(source: Source, jobs: list[_Job]) -> dict:
    """What must be the same for an unfinished conversion to be gone on with: what is read, and what is written."""
    stats = [(file.path.resolve(), file.path.stat()) for file in source.files]
    written = [
        [job.name, name, list(tensor.shape), str(tensor.dtype)] for job in jobs for name, tensor in job.header.items()
    ]
    return {
        "read": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "written": hashlib.sha256(json.dumps(written).encode()).hexdigest(),
    }


def _enter(partial: Path, state: dict) -> None:
    """Make the unfinished folder, or go on with one of the same conversion."""
    if partial.exists():
        path = partial / STATE
        if not path.is_file() or json.loads(path.read_text()) != state:
            raise FileExistsError(
                f"{partial}: is of another conversion, or its source has changed since; remove it and begin again."
            )
        return
    partial.mkdir(parents=True)
    (partial / STATE).write_text(json.dumps(state))


def _check_room(out: Path, needed: int) -> None:
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    needed += 64 * 2**20  # tokenizer, configurations
    if free < needed:
        raise ConversionError(f"out={str(out)!r}: needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there.")


def _main_type(headers: list[dict[str, Tensor]]) -> torch.dtype:
    """The type of most of the bytes; ``from_pretrained`` loads in it unless told otherwise."""
    sizes: Counter[torch.dtype] = Counter()
    for header in headers:
        for tensor in header.values():
            if tensor.is_floating_point():
                sizes[tensor.dtype] += size_of([tensor])
    return sizes.most_common(1)[0][0]


def _dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (None, torch.float32, torch.float16, torch.bfloat16) or (dtype is not None and found is None):
        raise ValueError(f"dtype={dtype!r} is not known; choose 'float32', 'float16' or 'bfloat16', or leave it out.")
    return found
