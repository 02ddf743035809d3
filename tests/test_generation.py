"""Answers on disk: a killed run resumes, batches have similar length, scoring is a separate step."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest

from idavlm.evaluation import Answer, evaluate, generate_answers, load_answers, score_answers
from tests.evaluation_fakes import FakeModel, FakeProcessor, samples


class Counting(FakeModel):
    """Counts the prompts it received; may pause before each batch or stop after some."""

    def __init__(self, *, stop_after: int | None = None, pause: float = 0.0):
        super().__init__()
        self.batches: list[int] = []
        self.stop_after, self.pause = stop_after, pause

    def generate(self, input_ids, **options):
        if len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        time.sleep(self.pause)
        self.batches.append(len(input_ids))
        return super().generate(input_ids, **options)


def test_two_steps_are_one(tmp_path):
    given = samples()
    answers = generate_answers(FakeModel(), FakeProcessor(), given, path=tmp_path / "predictions.jsonl", batch_size=3)
    again = load_answers(tmp_path / "predictions.jsonl", given)
    assert again == answers
    scored = score_answers(given, again, parse_box=FakeProcessor().parse_box)
    assert scored.predictions == evaluate(FakeModel(), FakeProcessor(), given).predictions


def test_a_stopped_run_goes_on_and_asks_nothing_twice(tmp_path):
    path, given = tmp_path / "new" / "predictions.jsonl", [sample for sample in samples() if sample.task != "qa_single"]
    stopped = Counting(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        generate_answers(stopped, FakeProcessor(), given, path=path, batch_size=4)
    assert len(path.read_text().splitlines()) == 12
    with path.open("a") as file:
        file.write('{"id": "torn", "predic')
    resumed = Counting()
    answers = generate_answers(resumed, FakeProcessor(), given, path=path, batch_size=4)
    assert sum(stopped.batches) + sum(resumed.batches) == len(given) == 24
    assert answers == generate_answers(FakeModel(), FakeProcessor(), given)
    assert [answer.id for answer in answers] == [sample.id for sample in given]
    generate_answers(Counting(stop_after=0), FakeProcessor(), given, path=path)


def test_killed_with_sigkill(tmp_path):
    path, given = tmp_path / "predictions.jsonl", [sample for sample in samples() if sample.task == "matching"]
    program = os.fork()
    if program == 0:
        generate_answers(Counting(pause=0.05), FakeProcessor(), given, path=path, batch_size=1)
        os._exit(0)
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        time.sleep(0.005)
    os.kill(program, signal.SIGKILL)
    os.waitpid(program, 0)
    kept = path.read_bytes().count(b"\n")
    assert 3 <= kept < 8
    resumed = Counting()
    answers = generate_answers(resumed, FakeProcessor(), given, path=path, batch_size=1)
    assert sum(resumed.batches) == 8 - kept
    assert answers == generate_answers(FakeModel(), FakeProcessor(), given)


def test_batches_hold_one_task_and_the_longest_prompts_first(tmp_path):
    path = tmp_path / "predictions.jsonl"
    generate_answers(FakeModel(), FakeProcessor(), samples(), path=path, batch_size=100)
    tasks = [json.loads(line)["id"].split("-")[0] for line in path.read_text().splitlines()]
    assert tasks == sorted(tasks, key=["matching", "location", "qa_single", "caption_single"].index)


def test_answers_of_other_settings_are_not_mixed(tmp_path):
    path, options = tmp_path / "predictions.jsonl", {"settings": {"model": "one"}}
    generate_answers(FakeModel(), FakeProcessor(), samples(), path=path, **options)
    with pytest.raises(ValueError, match=r"other settings \(references: 'right' then, 'none' now\)"):
        generate_answers(FakeModel(), FakeProcessor(), samples(), path=path, references="none", **options)
    with pytest.raises(ValueError, match=r"model: 'one' then, 'two' now"):
        generate_answers(FakeModel(), FakeProcessor(), samples(), path=path, settings={"model": "two"})


def test_questions_with_choices_can_be_written_too():
    given = [sample for sample in samples() if sample.task == "qa_single"]
    chosen = generate_answers(FakeModel(), FakeProcessor(), given)
    written = generate_answers(FakeModel(), FakeProcessor(), given, write_choices=True)
    assert {answer.prediction for answer in chosen} == {None}
    assert [answer.likelihoods for answer in chosen] == [answer.likelihoods for answer in written]
    scored = score_answers(given, written, parse_box=None)
    assert scored.predictions[0].scores == {"accuracy": 1.0, "closest_accuracy": 1.0}
    nothing = score_answers(given[:1], [replace(written[0], prediction="")], parse_box=None)
    assert nothing.predictions[0].scores == {"accuracy": 1.0, "closest_accuracy": 0.0}
    open_question = replace(given[0], false_answers=[])
    assert score_answers([open_question], [Answer(open_question.id, "x")], parse_box=None).predictions[0].scores == {}


def test_errors():
    with pytest.raises(ValueError, match=r"id='matching-0' of test\.jsonl:1 is not unique"):
        generate_answers(FakeModel(), FakeProcessor(), [samples()[0]] * 2)
    with pytest.raises(ValueError, match="are not those of the 1 samples"):
        score_answers(samples()[:1], [Answer("other", "x")], parse_box=None)
    with pytest.raises(ValueError, match="parse_box=None, but some samples ask for a box"):
        score_answers([samples()[1]], [Answer("location-0", "x")], parse_box=None)
    with pytest.raises(ValueError, match="has 1 likelihoods for 4 candidates"):
        score_answers([samples()[2]], [Answer("qa_single-0", None, likelihoods=(1.0,))], parse_box=None)


def test_mixed_tasks_of_other_benchmarks_are_all_answered():
    """Batches hold one task, also if the tasks are not those of the schema."""
    described = [sample for sample in samples() if sample.task == "caption_single"][:5]
    given = [replace(sample, task=task) for sample, task in zip(described, "ababa", strict=True)]
    assert [answer.id for answer in generate_answers(FakeModel(), FakeProcessor(), given, batch_size=3)] == [
        sample.id for sample in given
    ]
