"""Builds tuning data from annotations: in parts, in parallel, resumable, with the same bytes for any number of workers.

A source divides its annotations into units (a question, an image, a film). Units are grouped into parts. A part is
built by one worker, which depends on nothing but the source, the seed and the number of the part. A complete part is
one file; a build that was killed continues with the parts that are missing. At the end the parts are joined in order.
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from idavlm.datasets.dataset_folder import DESCRIPTION
from idavlm.datasets.tuning.annotations import Report
from idavlm.datasets.tuning.image_files import SCENE_MODES, PartImages
from idavlm.datasets.tuning.splits import HELD_OUT, SPLITS, check_splits, record_keys
from idavlm.utils import check_choice, check_positive, lock_folder, write_text

ENGINES = ("local", "ray")
"""What runs the workers: processes of this machine, or Ray Data on the cluster that ``RAY_ADDRESS`` names."""

PROBLEMS = "problems.jsonl"
"""File of a built data set with the faults of its annotations."""

VERSION = 1
"""Version of the contents. Increase it whenever a builder writes something else for the same options."""

_PARTS = "parts"
_PLAN = "plan.json"


class TuningSource(Protocol):
    """Annotations that records are built from; the base class of the sources.

    Attributes:
        name: name of the source.
        image_root: folder of its images.
        options: everything but the code that the records depend on, as JSON values.
        reader: reader of the records: ``"idavlm"``, or ``"qwen_vl"`` for records as IDA-VLM published them.
        units_per_part: number of units that one worker builds at a time.
    """

    name: str
    image_root: Path
    options: dict[str, Any]
    reader: str
    units_per_part: int

    def __len__(self) -> int:
        """Number of units."""
        ...

    def compose(self, unit: int, images: PartImages, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the records of a unit, each with its split; count in ``report`` what is left out."""
        ...

    def read_embedded(self, path: str) -> bytes | None:
        """Return the bytes of an image that the annotations hold; None if it is a file below ``image_root``."""
        return None


@dataclass(frozen=True)
class _Job:
    """What a worker needs: it is sent to every process once."""

    source: TuningSource
    out: Path
    scenes: str
    num_units: int

    @property
    def num_parts(self) -> int:
        return -(-self.num_units // self.source.units_per_part)

    def units(self, part: int) -> range:
        first = part * self.source.units_per_part
        return range(first, min(first + self.source.units_per_part, self.num_units))

    def path(self, part: int) -> Path:
        return self.out / _PARTS / f"{part:06d}.jsonl"

    def build(self, part: int) -> int:
        """Build a part unless it is there, and return the number of its units."""
        units = self.units(part)
        if self.path(part).is_file():
            return len(units)
        report = Report()
        images = PartImages(self.source.image_root, self.out / "images", part, self.scenes, self.source.read_embedded)
        lines = []
        for unit in units:
            for split, record in self.source.compose(unit, images, report):
                lines.append(f"{split}\t{json.dumps(record, ensure_ascii=False)}\n")
                report.counts[f"records of {split}"] += 1
        facts = {"dropped": report.dropped, "problems": report.problems, "counts": report.counts}
        lines.append(f"report\t{json.dumps(facts, ensure_ascii=False)}\n")
        write_text(self.path(part), "".join(lines))
        return len(units)


def build_tuning_data(
    source: TuningSource,
    out: str | Path,
    *,
    scenes: str = "link",
    workers: int = 1,
    engine: str = "local",
    limit: int | None = None,
    compare: Sequence[str | Path] = (),
    progress: bool = False,
) -> dict[str, Any]:
    """Build a data set from annotations.

    Writes ``train.jsonl`` and ``val.jsonl`` (training records), ``test.jsonl`` (evaluation records), ``images/`` (the
    image root), ``problems.jsonl`` (faults of the annotations), ``held_out.json`` (keys of the splits ``val`` and
    ``test``) and ``dataset.json`` (options and counts). The same source and options produce the same bytes, whatever
    the number of workers and however often the build was interrupted. A folder that is complete is left as it is.

    Args:
        source: the annotations, for example :class:`idavlm.datasets.tuning.VCR`.
        out: folder of the data set: missing, empty, or of an interrupted build with the same options.
        scenes: ``"link"`` to link images of the source (they take no space), ``"copy"`` to copy them.
        workers: number of processes.
        engine: one of :data:`ENGINES`.
        limit: build from this number of units only, to try things out; None for all.
        compare: folders of other built data sets, which are checked together with this one for images and persons in
            two splits.
        progress: show a progress bar.

    Returns:
        The contents of ``dataset.json``.

    Raises:
        ValueError: an option is invalid, or ``out`` holds something else.
        DataError: an image or a person is in two splits.
    """
    check_positive(workers=workers)
    check_choice("scenes", scenes, SCENE_MODES)
    check_choice("engine", engine, ENGINES)
    num_units = len(source)
    if limit is not None:
        check_positive(limit=limit)
        num_units = min(num_units, limit)
    out = Path(out)
    job = _Job(source, out, scenes, num_units)
    plan = {"name": source.name, "version": VERSION, "reader": source.reader, "units": num_units}
    plan["options"] = source.options
    with lock_folder(out):
        description = _read_description(out, plan)
        if description is None:
            _prepare(out, plan)
            missing = [part for part in range(job.num_parts) if not job.path(part).is_file()]
            done = num_units - sum(len(job.units(part)) for part in missing)
            with tqdm(total=num_units, initial=done, desc=source.name, unit="unit", disable=not progress) as bar:
                try:
                    for count in _run(job, missing, workers, engine):
                        bar.update(count)
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(
                        f"The parts so far are kept in {out / _PARTS}. Repeat the command to continue."
                    ) from None
            description = _join(job, plan)
        shutil.rmtree(out / _PARTS, ignore_errors=True)
    if source.reader == "idavlm":
        check_splits([out, *compare])
    return description


def _read_description(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """``dataset.json`` of a complete data set with this plan; None if it is to be built."""
    path = out / DESCRIPTION
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    _check_plan(out, {name: found.get(name) for name in plan}, plan)
    return found


def _prepare(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or check that the parts in the folder were built by the same one."""
    path = out / _PARTS / _PLAN
    if path.is_file():
        _check_plan(out, json.loads(path.read_text(encoding="utf-8")), plan)
        return
    others = [entry.name for entry in out.iterdir() if entry.name not in (".lock", _PARTS)]
    if others:
        raise ValueError(
            f"out={str(out)!r} holds {others[0]!r}, which is no part of a build; pass a new or empty folder."
        )
    write_text(path, json.dumps(plan, ensure_ascii=False))


def _check_plan(out: Path, found: dict[str, Any], plan: dict[str, Any]) -> None:
    if found == json.loads(json.dumps(plan)):
        return
    flat, expected = ({**each, **(each.get("options") or {})} for each in (found, plan))
    changed = [name for name in expected if name != "options" and flat.get(name) != expected[name]]
    raise ValueError(
        f"out={str(out)!r} was built with other options ({', '.join(changed) or 'options'} differ); pass them again, "
        "or pass a new folder."
    )


def _run(job: _Job, missing: list[int], workers: int, engine: str) -> Iterator[int]:
    """Build parts; yield the number of units of each as it is complete."""
    if engine == "ray":
        yield from _run_on_ray(job, missing, workers)
        return
    if workers == 1:
        yield from map(job.build, missing)
        return
    # Workers that are forked share the memory of the annotations. They use no torch, whose threads they would lack.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,)) as pool:
        futures = [pool.submit(_build_in_worker, part) for part in missing]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise ValueError(
                f"workers={workers}: a worker was killed, probably because memory is short; pass fewer workers. "
                "Complete parts are kept."
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_worker_job: _Job | None = None


def _start_worker(job: _Job) -> None:
    global _worker_job
    _worker_job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent was killed; it would wait for further parts for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _build_in_worker(part: int) -> int:
    return _worker_job.build(part)


def _build_on_ray(row: dict[str, Any], job: _Job) -> dict[str, Any]:
    """Build the part of a row of Ray Data."""
    return {"units": job.build(int(row["part"]))}


def _run_on_ray(job: _Job, missing: list[int], workers: int) -> Iterator[int]:
    try:
        import ray
    except ImportError:
        raise ImportError("engine='ray' needs Ray; install idavlm[ray].") from None
    if not missing:
        return
    parts = ray.data.from_items([{"part": part} for part in missing], override_num_blocks=len(missing))
    built = parts.map(_build_on_ray, fn_kwargs={"job": job}, compute=ray.data.TaskPoolStrategy(size=workers))
    for row in built.iter_rows():
        yield row["units"]


def _join(job: _Job, plan: dict[str, Any]) -> dict[str, Any]:
    """Join the parts to the files of the data set. The description, which marks it as complete, is written last."""
    out = job.out
    report = Report()
    held_out: dict[str, dict[str, None]] = {split: {} for split in SPLITS[1:]}
    files = {split: (out / f"{split}.jsonl.part").open("w", encoding="utf-8") for split in SPLITS}
    problems = (out / f"{PROBLEMS}.part").open("w", encoding="utf-8")
    num_problems = 0
    try:
        for part in range(job.num_parts):
            with job.path(part).open(encoding="utf-8", newline="\n") as lines:
                for line in lines:
                    kind, _, content = line.partition("\t")
                    if kind == "report":
                        facts = json.loads(content)
                        report.dropped.update(facts["dropped"])
                        report.counts.update(facts["counts"])
                        num_problems += len(facts["problems"])
                        for message in facts["problems"]:
                            problems.write(json.dumps({"problem": message}, ensure_ascii=False) + "\n")
                        continue
                    files[kind].write(content)
                    if kind in held_out:
                        held_out[kind].update(dict.fromkeys(record_keys(json.loads(content))))
    finally:
        for file in (*files.values(), problems):
            file.close()
    for split in SPLITS:
        part = out / f"{split}.jsonl.part"
        if part.stat().st_size:
            part.replace(out / f"{split}.jsonl")
        else:
            part.unlink()
    (out / f"{PROBLEMS}.part").replace(out / PROBLEMS)
    write_text(out / HELD_OUT, json.dumps({split: list(keys) for split, keys in held_out.items()}, indent=1) + "\n")
    description = plan | {
        "records": {split: report.counts.pop(f"records of {split}", 0) for split in SPLITS},
        "counts": _sorted(report.counts),
        "dropped": _sorted(report.dropped),
        "problems": num_problems,
    }
    write_text(out / DESCRIPTION, json.dumps(description, indent=1, ensure_ascii=False) + "\n")
    return json.loads(json.dumps(description))


def _sorted(counts: Counter) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
