"""Answers on disk: a killed run resumes, answers are kept for equal content only, scoring is a separate step."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch

from idavlm.data import DataError, Identity, Message, Part
from idavlm.evaluation import (
    Answer,
    evaluate,
    generate_answers,
    generation,
    load_answers,
    load_checkpoint,
    score_answers,
    text_perplexity,
)
from idavlm.evaluation.fingerprints import item_fingerprint, model_fingerprint
from tests.evaluation_fakes import FakeModel, FakeProcessor, draw_images, samples
from tests.small_models import small_model, small_processor


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
    scored = score_answers(given, again, read_box=FakeProcessor().read_box)
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
    scored = score_answers(given, written, read_box=None)
    assert scored.predictions[0].scores == {"accuracy": 1.0, "closest_accuracy": 1.0}
    nothing = score_answers(given[:1], [replace(written[0], prediction="")], read_box=None)
    assert nothing.predictions[0].scores == {"accuracy": 1.0, "closest_accuracy": 0.0}
    open_question = replace(given[0], false_answers=[])
    assert score_answers([open_question], [Answer(open_question.id, "x")], read_box=None).predictions[0].scores == {}


def test_errors():
    with pytest.raises(ValueError, match=r"id='matching-0' of test\.jsonl:1 is not unique"):
        generate_answers(FakeModel(), FakeProcessor(), [samples()[0]] * 2)
    with pytest.raises(ValueError, match="are not those of the 1 samples"):
        score_answers(samples()[:1], [Answer("other", "x")], read_box=None)
    with pytest.raises(ValueError, match="read_box=None, but some samples ask for a box"):
        score_answers([samples()[1]], [Answer("location-0", "x")], read_box=None)
    with pytest.raises(ValueError, match="has 1 likelihoods for 4 candidates"):
        score_answers([samples()[2]], [Answer("qa_single-0", None, likelihoods=(1.0,))], read_box=None)


def test_mixed_tasks_of_other_benchmarks_are_all_answered():
    """Batches hold one task, also if the tasks are not those of the schema."""
    described = [sample for sample in samples() if sample.task == "caption_single"][:5]
    given = [replace(sample, task=task) for sample, task in zip(described, "ababa", strict=True)]
    assert [answer.id for answer in generate_answers(FakeModel(), FakeProcessor(), given, batch_size=3)] == [
        sample.id for sample in given
    ]


@pytest.fixture
def described(tmp_path):
    """Four samples with image files, one per task."""
    given = samples(4, image_root=tmp_path / "images")[:4]
    draw_images(tmp_path / "images", given)
    return given


def kept(path, given, **options) -> None:
    """Assert that all answers at ``path`` are kept."""
    generate_answers(Counting(stop_after=0), FakeProcessor(), given, path=path, **options)


def asked(sample, text: str):
    *parts, _ = sample.messages[-1].content
    return replace(sample, messages=[Message("user", [*parts, Part("text", text=text)])])


def drawn(sample, path: str) -> None:
    """Replace an image by one of the same size."""
    data = (sample.image_root / path).read_bytes()
    (sample.image_root / path).write_bytes(data[:-20] + bytes(255 - value for value in data[-20:-12]) + data[-12:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [asked(s[0], "Which one?"), *s[1:]], r"1 items that .* \('matching-0': question\)"),
        (lambda s: [replace(s[0], task="caption_multi"), *s[1:]], r"\('matching-0': question\)"),
        (lambda s: [*s[:2], replace(s[2], false_answers=s[2].false_answers[::-1]), s[3]], r"'qa_single-0': choices"),
        (lambda s: [*s[:2], replace(s[2], answer="Kate is tall."), s[3]], r"'qa_single-0': choices"),
        (lambda s: [replace(s[0], identities=[Identity("Kat", s[0].identities[0].images)]), *s[1:]],
         r"'matching-0': question, references"),
        (lambda s: [replace(s[0], identities=[Identity("Kate", s[0].identities[0].images[:1])]), *s[1:]],
         r"'matching-0': question, references"),
        (lambda s: drawn(s[1], s[1].message_images[0]) or s,
         r"3 items that have changed since \('location-0': images; 'qa_single-0': images; .*: images\)"),
        (lambda s: drawn(s[1], s[1].reference_images[1]) or s, r"4 items .*'matching-0': references"),
        (lambda s: (s[0].image_root / s[1].message_images[0]).unlink() or s, r"3 items"),
    ],
    ids=["text", "task", "order of choices", "a choice", "name", "photos", "image replaced", "photo replaced", "gone"],
)  # fmt: skip
def test_answers_to_items_that_changed_are_refused(tmp_path, described, change, message):
    path = tmp_path / "predictions.jsonl"
    generate_answers(Counting(), FakeProcessor(), described, path=path)
    before = path.read_bytes()
    kept(path, described)
    with pytest.raises(ValueError, match=message + r".*; choose another folder, or delete .*predictions\.jsonl"):
        generate_answers(Counting(), FakeProcessor(), change(described), path=path)
    assert path.read_bytes() == before, "neither reused nor overwritten"


def test_answers_are_kept_if_only_scoring_or_the_place_changes(tmp_path, described):
    path = tmp_path / "predictions.jsonl"
    generate_answers(Counting(), FakeProcessor(), described, path=path)
    corrected = [replace(described[3], answer="Kate is tall.", where="new.jsonl:9"), *described[:3]]
    kept(path, corrected)
    moved = shutil.move(tmp_path / "images", tmp_path / "moved")
    moved = [replace(sample, image_root=moved) for sample in described]
    kept(path, moved)
    kept(path, moved[:2])
    more = Counting()
    generate_answers(more, FakeProcessor(), [*moved, asked(replace(moved[3], id="new"), "Describe it.")], path=path)
    assert sum(more.batches) == 1


def test_wrong_references_belong_to_the_answers(tmp_path, described):
    """They are taken from the other samples, so a change of another sample may change them."""
    given = samples(8)[::4]
    path = tmp_path / "predictions.jsonl"
    generate_answers(Counting(), FakeProcessor(), given, path=path, references="wrong")
    kept(path, given, references="wrong")
    with pytest.raises(ValueError, match="references"):
        kept(path, [given[0], *samples(12)[28::4]], references="wrong")
    assert [answer.item["references"] for answer in load_answers(path, given)]


def test_own_answers_are_not_scored_on_edited_questions(tmp_path, described):
    path = tmp_path / "predictions.jsonl"
    generate_answers(Counting(), FakeProcessor(), described, path=path)
    load_answers(path, described)
    with pytest.raises(DataError, match=r"predictions\.jsonl:1: the answer to id='matching-0' .* before the question"):
        load_answers(path, [asked(described[0], "Which one?"), *described[1:]])


def test_answers_of_unknown_settings_are_refused(tmp_path):
    path = tmp_path / "predictions.jsonl"
    generate_answers(Counting(), FakeProcessor(), samples(), path=path)
    settings = tmp_path / "predictions.settings.json"
    content = settings.read_text()
    settings.write_text(content.replace('"idavlm": "', '"idavlm": "0.'))
    with pytest.raises(ValueError, match=r"other settings \(idavlm: '0\..* then, '.*' now\); choose another folder"):
        kept(path, samples())
    settings.write_text("[]")
    with pytest.raises(ValueError, match=r"predictions\.settings\.json holds a JSON list"):
        kept(path, samples())
    settings.unlink()
    with pytest.raises(ValueError, match=r"predictions\.settings\.json is missing, so it is not known"):
        kept(path, samples())
    path.write_text("")
    generate_answers(Counting(), FakeProcessor(), samples(), path=path)
    assert settings.read_text() == content


def test_the_fingerprint_of_a_model_is_its_content(tmp_path):
    processor = small_processor()
    model = small_model(processor)
    model.save_pretrained(tmp_path / "a")
    processor.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = load_checkpoint(tmp_path / "a"), load_checkpoint(tmp_path / "b")
    now = model_fingerprint(*first)
    assert now == model_fingerprint(*second)
    first[0].save_pretrained(tmp_path / "c")
    first[1].save_pretrained(tmp_path / "c")
    assert now == model_fingerprint(*load_checkpoint(tmp_path / "c"))

    def changed() -> set[str]:
        after = model_fingerprint(*second)
        return {name for name in now if now[name] != after[name]}

    weight = second[0].language_model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    assert changed() == {"model_weights"}
    second[0].vision_tower.config.num_channels = 4
    second[1].chat_template += " "
    assert changed() == {"model_weights", "model_config", "processor"}
    second = load_checkpoint(tmp_path / "b")
    second[0].generation_config.stop_strings = ["."]
    assert changed() == {"model_config"}
    second = (second[0].bfloat16(), load_checkpoint(tmp_path / "a")[1])
    assert "model_weights" in changed()
    second[1].image_processor.image_mean = [0.4, 0.5, 0.5]
    assert "processor" in changed()
    second[1].tokenizer.add_tokens(["Bartholomew"])
    assert "processor" in changed()


def test_every_part_of_a_question_is_in_its_fingerprint():
    parts = [item_fingerprint(sample) for sample in samples()]
    assert len({tuple(part.values()) for part in parts}) == len(parts)
    assert all(part["images"][0] == "?" for part in parts), "the files do not exist"


def test_two_runs_into_one_file_at_the_same_time(tmp_path):
    path = tmp_path / "predictions.jsonl"

    class Second(FakeModel):
        def generate(self, input_ids, **options):
            with pytest.raises(ValueError, match=rf"predictions\.jsonl is in use by process {os.getpid()}"):
                generate_answers(FakeModel(), FakeProcessor(), samples(), path=path)
            return super().generate(input_ids, **options)

    generate_answers(Second(), FakeProcessor(), samples(), path=path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["predictions.jsonl", "predictions.settings.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_of_the_sample(tmp_path, root, value):
    """Of text that is generated, and of candidates that are ranked; also if only one sample of the batch has them."""
    processor = small_processor()
    model = small_model(processor)
    given = [replace(sample, identities=[], source="general") for sample in samples()]
    words = [Message("user", [Part("text", text="Where is Kate?")])]
    given = [replace(sample, messages=words) for sample in given if sample.task in ("qa_single", "caption_single")]
    evaluate(model, processor, given, max_new_tokens=2)

    def broken(module, inputs, output):
        output.logits[-1, -1, 7] = value
        return output

    message = r"^test\.jsonl:\d+: the model computes logits that are NaN or infinite"
    with model.register_forward_hook(broken), pytest.raises(ValueError, match=message):
        evaluate(model, processor, given[1::2], max_new_tokens=2)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight[:] = value
    with pytest.raises(ValueError, match=r"^test\.jsonl:3: the model computes likelihoods that are NaN or infinite"):
        evaluate(model, processor, given[::2])
    with pytest.raises(ValueError, match="language_model has a mean loss of nan"):
        text_perplexity(model.language_model, processor.tokenizer, num_windows=1, length=8)
    with pytest.raises(ValueError, match=r"'qa_single-0' has likelihoods \[.*\], which cannot be compared"):
        score_answers(given[:1], [Answer("qa_single-0", None, likelihoods=(value, 0.0, 1.0, 2.0))], read_box=None)


def test_texts_of_no_length_are_an_error():
    with pytest.raises(ValueError, match="max_new_tokens=0 must be an integer of at least 1"):
        generation.generate_texts(FakeModel(), FakeProcessor(), samples()[:1], 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"likelihoods": 5}, r"likelihoods=5 must be a list of finite numbers"),
        ({"likelihoods": []}, "must be a list of finite"), ({"likelihoods": "abcd"}, "must be a list of finite"),
        ({"likelihoods": [1, None, 2, 3]}, "must be a list of finite"), ({"likelihoods": {"a": 1}}, "must be a list"),
        ({"likelihoods": [float("nan")] * 4}, "must be a list of finite"), ({"likelihoods": [True] * 4}, "finite"),
        ({"likelihoods": [float("-inf")] * 4}, "must be a list of finite"),
        ({"likelihoods": [1.0] * 3}, "3 likelihoods for the 4 candidates of id='qa_single-0'"),
        ({"image_size": 5}, r"image_size=5 must be height and width"), ({"image_size": [1]}, "height and width"),
        ({"image_size": [0, 4]}, "must be height and width"), ({"image_size": ["1", 2]}, "must be height and width"),
        ({"image_size": [True, True]}, "must be height"), ({"image_size": {}}, "must be height and width"),
        ({"prediction": 3}, "is not an answer"), ({"prediction": ["x"]}, "is not an answer"),
        ({"prediction": None}, "is not an answer"), ({"prediction": "\ud800"}, "prediction=.* must be valid Unicode"),
        ({"id": ["x"]}, "id=.* must be a string or an integer"), ({"id": 1.5}, "must be a string or an integer"),
        ({"id": True}, "must be a string or an integer"), ({"id": None}, "is not an answer"),
        ({"question": 3}, "question=3 must be a string"), ({"item": 3}, "item=3 must be the fingerprints"),
        ({"id": "x" * 9999}, r"id='x{200}'\.\.\. is not among the samples"),
    ],
)  # fmt: skip
def test_answers_of_wrong_types_are_named(tmp_path, change, message):
    path = tmp_path / "answers.jsonl"
    path.write_text("\n" + json.dumps({"id": "qa_single-0", "prediction": "x"} | change))
    with pytest.raises(DataError, match=rf"answers\.jsonl:2: .*{message}"):
        load_answers(path, samples()[2:3])


def test_an_answer_without_text_fits_choices_only(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"id": "caption_single-0", "likelihoods": [1.0]}))
    with pytest.raises(DataError, match=r"answers\.jsonl:1: .* has likelihoods, but its task .* add a prediction"):
        load_answers(path, samples()[3:4])
    with pytest.raises(ValueError, match=r"test\.jsonl:4 of task 'caption_single' has no prediction"):
        score_answers(samples()[3:4], [Answer("caption_single-0", None)], read_box=None)
