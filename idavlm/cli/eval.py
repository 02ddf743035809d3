"""``idavlm eval TASK`` asks a model the questions of a task, or reads its answers, and scores them."""

import argparse
import time
from functools import partial
from pathlib import Path

from idavlm.cli import eval_compare
from idavlm.cli.eval_judge import add_judge_arguments, judge_client
from idavlm.evaluation.judge import judge_answers
from idavlm.evaluation.running import TaskRun, read_predictions
from idavlm.evaluation.tasks import TASKS
from idavlm.evaluation.tasks.images import with_sizes
from idavlm.models import BoxFormat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand a task, and ``compare``."""
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for task in TASKS.values():
        _add_task(tasks.add_parser(task.name, help=task.about, description=task.about), task)
    eval_compare.add_arguments(tasks)


def run(arguments: argparse.Namespace) -> int | None:
    """Generate (unless answers are given), score, report."""
    return arguments.run_task(arguments)


def _add_task(parser: argparse.ArgumentParser, task) -> None:
    parser.set_defaults(run_task=_run_task)
    parser.add_argument("data", type=Path, help="file or folder of the task")
    parser.add_argument("--images", type=Path, help="folder the pictures stand below")
    answers = parser.add_mutually_exclusive_group(required=True)
    answers.add_argument("--model", help="checkpoint that answers; a run that was stopped goes on")
    answers.add_argument("--predictions", type=Path, help='answers of any model: [{"id", "prediction"}], JSON or JSONL')
    parser.add_argument("--out", type=Path, required=True, help="folder for predictions, scores and report")
    parser.add_argument("--missing", choices=("fail", "skip"), default="fail", help="pictures (or answers) not there")
    parser.add_argument("--baselines", action="store_true", help="ask again without references, and with wrong ones")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--max-new-tokens", type=int, default=task.max_new_tokens)
    if task.boxes:
        parser.add_argument(
            "--boxes", choices=BoxFormat.KINDS, help="how the model writes boxes; by default as its processor does"
        )
    if task.judged:
        add_judge_arguments(parser)


def _run_task(arguments: argparse.Namespace) -> None:
    task = TASKS[arguments.task]
    run = TaskRun(task, arguments.data, arguments.out, arguments.images, arguments.missing)
    kind = getattr(arguments, "boxes", None)
    if arguments.predictions is not None:
        items, answers, kind = _read(arguments, run, kind)
        asked = {"right": answers}
    else:
        items = run.items()
        asked, kind = _ask(arguments, run, items, kind)
    parse_box = BoxFormat(kind).parse if kind else None
    facts = {"answered by": f"`{arguments.predictions or arguments.model}`", "boxes": kind}
    judge = None
    if task.judged and (client := judge_client(arguments, arguments.out / "judge.jsonl")) is not None:
        options = {"workers": arguments.judge_workers, "progress": True}
        judge = partial(judge_answers, client, types=task.judged, **options)
        facts["judged by"] = client.model
    start = time.perf_counter()
    results = {
        references: run.score(items, answers, parse_box, references=references, judge=judge, **facts)
        for references, answers in asked.items()
    }
    facts["scored"] = f"{len(items)} items in {time.perf_counter() - start:.1f} s"
    report = run.report(items, results, **facts)
    print(report.read_text(encoding="utf-8"), report, sep="\n")


def _read(arguments: argparse.Namespace, run: TaskRun, kind: str | None) -> tuple[list, list, str | None]:
    """Items, any model's answers to them, and how these write boxes."""
    if arguments.baselines:
        raise ValueError("--baselines asks a model; it does not go with --predictions.")
    items, answers = read_predictions(arguments.predictions, run.items(pictures=False), arguments.missing)
    if not any(item.sample.task == "location" for item in items):
        return items, answers, kind
    if kind is None:
        raise ValueError(f"--boxes: say how the model writes boxes ({', '.join(BoxFormat.KINDS)}); it is not guessed.")
    if kind != "pixels":
        items, answers, unknown = with_sizes(items, answers, arguments.missing)
        if unknown:
            print(
                f"The size of {len(unknown)} pictures is not known, {len(items)} items are left:", *unknown, sep="\n  "
            )
    return items, answers, kind


def _ask(arguments: argparse.Namespace, run: TaskRun, items: list, kind: str | None) -> tuple[dict, str]:
    """A checkpoint's answers, by the references it was shown, and how it writes boxes."""
    import torch

    from idavlm.models import IDAVLMForConditionalGeneration, IDAVLMProcessor

    if arguments.baselines and not any(item.sample.identities for item in items):
        raise ValueError("--baselines: nobody is introduced by reference photos here, so there are none to take away.")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = IDAVLMForConditionalGeneration.from_pretrained(arguments.model).to(device)
    processor = IDAVLMProcessor.from_pretrained(arguments.model)
    options = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens, "name": arguments.model}
    shown = ("right", "none", "wrong") if arguments.baselines else ("right",)
    answers = {
        references: run.generate(items, model, processor, references=references, **options) for references in shown
    }
    return answers, kind or processor.box_format
