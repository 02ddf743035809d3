"""``idavlm eval TASK``: generate the answers of a model to a task, or load answers, and score them."""

import argparse
import time
from functools import partial
from typing import Any

import torch

from idavlm.cli import eval_compare
from idavlm.cli.arguments import name, path, positive_int
from idavlm.cli.model_arguments import add_class_argument
from idavlm.evaluation.answers import load_answers
from idavlm.evaluation.baselines import check_wrong_references
from idavlm.evaluation.checkpoint import load_checkpoint
from idavlm.evaluation.judge import judge_answers
from idavlm.evaluation.task_run import TaskRun
from idavlm.evaluation.tasks import TASKS
from idavlm.evaluation.tasks.image_files import MISSING, with_sizes
from idavlm.models import BoxFormat
from idavlm.utils import first_line, lock_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand per task, and ``compare``."""
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for task in TASKS.values():
        _add_task(tasks.add_parser(task.name, help=task.description, description=task.description), task)
    eval_compare.add_arguments(tasks)


def run(arguments: argparse.Namespace) -> int | None:
    """Run the chosen subcommand."""
    return arguments.run_task(arguments)


def _add_task(parser: argparse.ArgumentParser, task) -> None:
    parser.set_defaults(run_task=_run_task)
    parser.add_argument("data", type=path, help="file or folder of the data")
    parser.add_argument("--images", type=path, help="folder that image paths are relative to")
    answers = parser.add_mutually_exclusive_group(required=True)
    answers.add_argument(
        "--model", type=name, help="checkpoint of idavlm, or any vision-language model of transformers"
    )
    parser.add_argument(
        "--id-former", type=name, help="folder of an ID-Former to attach to --model, a model of transformers"
    )
    add_class_argument(parser)
    answers.add_argument("--predictions", type=path, help='answers of any model: [{"id", "prediction"}], JSON or JSONL')
    parser.add_argument("--out", type=path, required=True, help="folder for predictions, scores and report")
    parser.add_argument(
        "--missing", choices=MISSING, default="fail", help="fail or skip items if image files or answers are missing"
    )
    default = "all" if task.max_references is None else str(task.max_references)
    parser.add_argument(
        "--max-references",
        type=positive_int,
        help=f"use at most this many reference photos of an identity; by default {default}",
    )
    parser.add_argument("--baselines", action="store_true", help="also evaluate without references and with wrong ones")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="samples per batch")
    parser.add_argument("--device", type=name, help="device of the model; by default cuda if available, else cpu")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=task.max_new_tokens, help="maximum length of an answer"
    )
    if task.boxes:
        kinds = ", ".join(BoxFormat.KINDS)
        parser.add_argument("--boxes", metavar="KIND", help=f"box format ({kinds}); by default that of the processor")
    if task.judged:
        eval_compare.add_judge_arguments(parser)


def _run_task(arguments: argparse.Namespace) -> None:
    box_kind = getattr(arguments, "boxes", None)
    if box_kind is not None:
        BoxFormat(box_kind)  # an unknown kind is an error before answers are generated
    with lock_folder(arguments.out):
        try:
            _evaluate(arguments, box_kind)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_what_is_kept(arguments)) from None


def _evaluate(arguments: argparse.Namespace, box_kind: str | None) -> None:
    task = TASKS[arguments.task]
    sources = {"images": arguments.images, "missing": arguments.missing, "max_references": arguments.max_references}
    task_run = TaskRun(task, arguments.data, arguments.out, **sources)
    client = eval_compare.judge_client(arguments, arguments.out / "judge.jsonl") if task.judged else None
    if arguments.predictions is not None:
        items, answers, box_kind = _load_answers(arguments, task_run, box_kind)
        answers_by_references = {"right": answers}
        read_box = None if box_kind is None else task.box_reader(BoxFormat(box_kind))
    else:
        items = task_run.load_items()
        answers_by_references, processor = _generate_answers(arguments, task_run, items)
        read_box = task.box_reader(processor if box_kind is None else BoxFormat(box_kind))
        box_kind = processor.box_format if box_kind is None else box_kind
    facts = {"answered by": f"`{arguments.predictions or arguments.model}`", "boxes": box_kind}
    judge = None
    if client is not None:
        judge = partial(judge_answers, client, tasks=task.judged, workers=arguments.judge_workers, progress=True)
        facts["judged by"] = client.model
    start = time.perf_counter()
    results = {
        references: task_run.score(items, answers, read_box, references=references, judge=judge, **facts)
        for references, answers in answers_by_references.items()
    }
    facts["scored in"] = f"{time.perf_counter() - start:.1f} s"
    report = task_run.report(items, results, model=str(arguments.predictions or arguments.model), **facts)
    print(report.read_text(encoding="utf-8"), report, sep="\n")


def _load_answers(
    arguments: argparse.Namespace, task_run: TaskRun, box_kind: str | None
) -> tuple[list, list, str | None]:
    """Items, the answers of ``--predictions``, and their box format."""
    if arguments.baselines:
        raise ValueError("--baselines needs a model to generate answers; pass --model instead of --predictions.")
    for option in ("id_former", "id_former_class"):
        if (value := getattr(arguments, option)) is not None:
            flag = f"--{option.replace('_', '-')} {value}"
            raise ValueError(f"{flag} is part of a model; pass --model, not --predictions.")
    items = task_run.load_items(need_images=False)
    if arguments.missing == "skip":
        answered = {answer.id for answer in load_answers(arguments.predictions)}
        items = [item for item in items if item.sample.id in answered]
        if not items:
            raise ValueError(
                f"{arguments.predictions} answers no item of {arguments.data}; pass the data it belongs to."
            )
    answers = load_answers(arguments.predictions, [item.sample for item in items])
    if not any(item.asks_for_boxes for item in items):
        return items, answers, box_kind
    if box_kind is None:
        raise ValueError(f"--boxes is missing; pass the box format of the model, one of {', '.join(BoxFormat.KINDS)}.")
    if box_kind != "pixels":
        items, unknown = with_sizes(items, answers, arguments.missing)
        kept = {item.sample.id for item in items}
        answers = [answer for answer in answers if answer.id in kept]
        if unknown:
            print(f"The size of {len(unknown)} images is unknown, {len(items)} items are left:", *unknown, sep="\n  ")
    return items, answers, box_kind


def _generate_answers(arguments: argparse.Namespace, task_run: TaskRun, items: list) -> tuple[dict, Any]:
    """Answers of the checkpoint for each choice of references, and its processor."""
    if arguments.baselines:
        if not any(item.sample.identities for item in items):
            raise ValueError(f"{arguments.data}: no item introduces an identity by references; omit --baselines.")
        check_wrong_references([item.sample for item in items], identity_key=task_run.task.identity_key)
    device = arguments.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    classes = {"id_former": arguments.id_former, "id_former_class": arguments.id_former_class}
    model, processor = load_checkpoint(arguments.model, **classes, device=device)
    options = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens, "name": arguments.model}
    choices = ("right", "none", "wrong") if arguments.baselines else ("right",)
    try:
        answers = {
            references: task_run.generate(items, model, processor, references=references, **options)
            for references in choices
        }
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"--batch-size={arguments.batch_size} is too large for {device} ({first_line(error)}); reduce it."
        ) from error
    return answers, processor


def _what_is_kept(arguments: argparse.Namespace) -> str:
    files = {arguments.out / "predictions.jsonl": "answers", arguments.out / "judge.jsonl": "replies of the judge"}
    if getattr(arguments, "judge_cache", None) is not None:
        files[arguments.judge_cache] = "replies of the judge"
    kept = [f"The {what} so far are kept in {file}" for file, what in files.items() if file.is_file()]
    return f"{'. '.join(kept) or 'No answers were generated yet'}. Repeat the command to continue."
