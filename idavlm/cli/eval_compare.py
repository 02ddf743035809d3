"""``idavlm eval compare A B``: which of two runs is better, by how much, and where they differ."""

import argparse
from pathlib import Path

from idavlm.cli.eval_judge import add_judge_arguments, judge_client
from idavlm.data.schema import Sample
from idavlm.evaluation.answers import question_text
from idavlm.evaluation.comparing import Pair, compare_scores, comparison_table, pair_predictions
from idavlm.evaluation.comparison_page import write_comparison_page
from idavlm.evaluation.judge import judge_pairs
from idavlm.evaluation.running import load_scores
from idavlm.evaluation.tasks import TASKS


def add_arguments(tasks) -> None:
    about = "compare two runs on the same items: paired bootstrap, wins and losses, a page of pictures"
    parser = tasks.add_parser("compare", help=about, description=about)
    parser.set_defaults(run_task=run)
    parser.add_argument("a", type=Path, help="folder that idavlm eval wrote (or its scores.json)")
    parser.add_argument("b", type=Path, help="another of the same task and data")
    parser.add_argument("--names", nargs=2, metavar=("A", "B"), help="what to call them; by default their folders")
    parser.add_argument("--out", type=Path, help="an .html page of the items where they differ")
    parser.add_argument("--most", type=int, default=60, help="so many items on the page")
    add_judge_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    (a, facts), (b, other) = load_scores(arguments.a), load_scores(arguments.b)
    if facts.get("task") != other.get("task"):
        raise ValueError(f"a is of task {facts.get('task')!r}, b of {other.get('task')!r}; compare runs of one task.")
    names = tuple(arguments.names or _names(arguments.a, arguments.b))
    pairs = pair_predictions(a, b)
    left_out = len(a.predictions) + len(b.predictions) - 2 * len(pairs)
    if left_out:
        print(f"{left_out} predictions to items that only one of both has are left out.\n")
    rows = compare_scores(pairs)
    print(comparison_table(rows, *names))
    samples = _samples(facts)
    if (client := judge_client(arguments, arguments.b / "judge.jsonl")) is not None:
        types = TASKS[facts["task"]].judged
        print("\n" + _judge(client, [pair for pair in pairs if pair[0].task in types], samples, names, arguments))
    if arguments.out is not None:
        differ = write_comparison_page(arguments.out, pairs, rows, names=names, samples=samples, most=arguments.most)
        print(f"\n{differ} items differ: {arguments.out}")


def _judge(client, pairs: list[Pair], samples: dict[str, Sample], names: tuple[str, str], arguments) -> str:
    if any(a.id not in samples for a, _ in pairs):
        raise ValueError("--judge needs the questions, and the data that a was made of cannot be read any more.")
    questions = [(question_text(samples[a.id]), a.answer, a.text, b.text) for a, b in pairs]
    verdicts = judge_pairs(client, questions, workers=arguments.judge_workers, progress=True)
    count = {verdict: verdicts.count(verdict) for verdict in ("A", "B", "tie", None)}
    return (
        f"Judge {client.model}, both orders, {len(pairs)} items: {names[0]} better {count['A']}, {names[1]} better "
        f"{count['B']}, ties (or the orders disagree) {count['tie']}, no verdict {count[None]}."
    )


def _samples(facts: dict) -> dict[str, Sample]:
    """What was asked, by id; nothing where the data are gone, as pictures then are."""
    task, data, images = TASKS.get(facts.get("task", "")), Path(facts.get("data", "")), facts.get("images")
    if task is None or not data.exists():
        print("\nThe data are not where they were: questions and pictures are left out.")
        return {}
    return {item.sample.id: item.sample for item in task.load(data, Path(images) if images else None)}


def _names(a: Path, b: Path) -> tuple[str, str]:
    """The first parts in which the paths differ."""
    for one, other in zip(reversed(a.resolve().parts), reversed(b.resolve().parts), strict=False):
        if one != other:
            return one, other
    return "A", "B"
