"""``idavlm eval compare A B``: compare two runs by score and list the items where they differ."""

import argparse
import os
from pathlib import Path

from idavlm.cli.arguments import name, path, positive_int
from idavlm.data.errors import quote
from idavlm.data.schema import Sample
from idavlm.evaluation.answers import question_text
from idavlm.evaluation.comparison import (
    Pair,
    compare_scores,
    comparison_table,
    pair_predictions,
    write_comparison_page,
)
from idavlm.evaluation.fingerprints import changed_parts, item_fingerprint
from idavlm.evaluation.judge import JudgeClient, judge_pairs
from idavlm.evaluation.task_run import load_scores
from idavlm.evaluation.tasks import TASKS
from idavlm.utils import lock_folder


def add_arguments(tasks) -> None:
    """Add the subcommand ``compare`` to the subparsers ``tasks``."""
    description = "compare two runs on the same items: paired bootstrap, wins and losses, a page of examples"
    parser = tasks.add_parser("compare", help=description, description=description)
    parser.set_defaults(run_task=run)
    parser.add_argument("a", type=path, help="folder that idavlm eval wrote (or its scores.json)")
    parser.add_argument("b", type=path, help="another run of the same task and data")
    parser.add_argument(
        "--names", type=name, nargs=2, metavar=("A", "B"), help="names of the runs; by default their folders"
    )
    parser.add_argument("--out", type=path, help=".html page of the items where they differ")
    parser.add_argument("--max-items", type=positive_int, default=60, help="maximum number of items on the page")
    add_judge_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the comparison and write the page."""
    (a, facts), (b, other) = load_scores(arguments.a), load_scores(arguments.b)
    if facts["task"] not in TASKS:
        raise ValueError(
            f"{arguments.a} is of task {quote(facts['task'])}, which is not known; pass a run of idavlm eval."
        )
    if facts["task"] != other["task"]:
        raise ValueError(f"a is of task {facts['task']!r}, b of {other['task']!r}; pass runs of the same task.")
    for folder, result in ((arguments.a, a), (arguments.b, b)):
        if not all(prediction.item for prediction in result.predictions):
            raise ValueError(
                f"{folder} does not say which questions it scores, as it comes from an earlier version; repeat idavlm "
                "eval with --predictions."
            )
    names = tuple(arguments.names) if arguments.names is not None else _names(arguments.a, arguments.b)
    pairs = pair_predictions(a, b)
    left_out = len(a.predictions) + len(b.predictions) - 2 * len(pairs)
    if left_out:
        print(f"{left_out} predictions are left out, because only one of the runs has their item.\n")
    rows = compare_scores(pairs)
    print(comparison_table(rows, *names))
    if arguments.judge is None and arguments.out is None:
        return
    samples = _samples(facts, pairs, arguments.a)
    if arguments.judge is not None:
        folder = arguments.b if arguments.b.is_dir() else arguments.b.parent
        with lock_folder(folder):
            client = judge_client(arguments, folder / "judge.jsonl")
            judged = [pair for pair in pairs if pair[0].task in TASKS[facts["task"]].judged]
            print("\n" + _judge(client, judged, samples, names, arguments))
    if arguments.out is not None:
        options = {"names": names, "samples": samples, "max_items": arguments.max_items}
        differ = write_comparison_page(arguments.out, pairs, rows, **options)
        print(f"\n{differ} items differ: {arguments.out}")


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--judge`` and its options."""
    group = parser.add_argument_group("judge", "an OpenAI-compatible endpoint: OPENAI_BASE_URL and OPENAI_API_KEY")
    group.add_argument("--judge", type=name, metavar="MODEL", help="name of the judge model")
    group.add_argument("--judge-cache", type=path, help="file of replies; by default judge.jsonl next to the scores")
    group.add_argument("--judge-rate", type=float, metavar="N", help="maximum number of requests per minute")
    group.add_argument(
        "--judge-workers", type=positive_int, default=4, metavar="N", help="number of concurrent requests"
    )
    group.add_argument("--judge-timeout", type=float, default=60.0, metavar="SECONDS")


def judge_client(arguments: argparse.Namespace, cache: Path) -> JudgeClient | None:
    """The client, or None without ``--judge``."""
    if arguments.judge is None:
        return None
    return JudgeClient(
        arguments.judge,
        cache=cache if arguments.judge_cache is None else arguments.judge_cache,
        requests_per_minute=arguments.judge_rate,
        timeout=arguments.judge_timeout,
    )


def _judge(
    client: JudgeClient, pairs: list[Pair], samples: dict[str, Sample], names: tuple[str, str], arguments
) -> str:
    if any(a.id not in samples for a, _ in pairs):
        raise ValueError(
            f"--judge needs the questions, but the data of run {names[0]} is not available; restore its path."
        )
    questions = [(question_text(samples[a.id]), a.answer, a.text, b.text) for a, b in pairs]
    try:
        verdicts = judge_pairs(client, questions, workers=arguments.judge_workers, progress=True)
    except KeyboardInterrupt:
        kept = f"The replies of the judge so far are kept in {client.cache}. Repeat the command to continue."
        raise KeyboardInterrupt(kept) from None
    count = {verdict: verdicts.count(verdict) for verdict in ("A", "B", "tie", None)}
    return (
        f"Judge {client.model}, both orders, {len(pairs)} items: {names[0]} better {count['A']}, {names[1]} better "
        f"{count['B']}, ties (or the orders disagree) {count['tie']}, no verdict {count[None]}."
    )


def _samples(facts: dict, pairs: list[Pair], run: Path) -> dict[str, Sample]:
    """Evaluated samples by id; {} if the data is no longer available.

    Raises:
        ValueError: the data has changed since ``run`` was scored.
    """
    task, data, images = TASKS[facts["task"]], Path(facts["data"]), facts["images"]
    if not os.path.exists(data):  # also for a path that is too long
        print("\nThe data is no longer available at its path: questions and images are left out.")
        return {}
    samples = {item.sample.id: item.sample for item in task.load(data, Path(images) if images else None)}
    for prediction, _ in pairs:
        sample = samples.get(prediction.id)
        changed = ["item"] if sample is None else changed_parts(prediction.item, item_fingerprint(sample))
        if changed:
            raise ValueError(
                f"{data} has changed since {run} was scored ({' and '.join(changed)} of item {quote(prediction.id)}); "
                "restore it, or repeat idavlm eval."
            )
    return samples


def _names(a: Path, b: Path) -> tuple[str, str]:
    """The last components in which the paths differ."""
    for part_a, part_b in zip(reversed(a.resolve().parts), reversed(b.resolve().parts), strict=False):
        if part_a != part_b:
            return part_a, part_b
    return "A", "B"
