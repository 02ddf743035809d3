"""Scores of answers, the baselines, and the run over all samples."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from idavlm.data import Identity
from idavlm.evaluation import (
    EvaluationResult,
    bootstrap_mean,
    box_iou,
    check_wrong_references,
    evaluate,
    names_in,
    score_box,
    score_description,
    score_matching,
    with_wrong_references,
    without_references,
)
from tests.evaluation_fakes import FakeModel, FakeProcessor, samples


def test_score_of_a_matching_answer():
    assert score_matching("Image 2", "Picture 2") == {"accuracy": 1}
    assert score_matching("Picture 1 or 2", "Picture 2") is None
    assert score_matching("Kate", "Picture 2") is None
    with pytest.raises(ValueError, match="answer='Kate' names no image"):
        score_matching("Picture 1", "Kate")


def test_iou_of_known_boxes():
    assert box_iou([0, 0, 10, 10], [0, 0, 10, 10]) == 1
    assert box_iou([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3)
    assert box_iou([0, 0, 10, 10], [10, 0, 20, 10]) == 0
    assert box_iou([3, 3, 3, 3], [3, 3, 3, 3]) == 0
    assert score_box([0, 0, 10, 5], [0, 0, 10, 10]) == {"mean_iou": 0.5, "acc@0.5": 1}


sides = st.lists(st.integers(0, 12), min_size=2, max_size=2, unique=True).map(sorted)
boxes = st.tuples(sides, sides).map(lambda b: [b[0][0], b[1][0], b[0][1], b[1][1]])


@given(boxes, boxes)
def test_iou_is_that_of_counted_pixels(first, second):
    masks = []
    for x1, y1, x2, y2 in (first, second):
        masks.append(torch.zeros(12, 12, dtype=torch.bool))
        masks[-1][y1:y2, x1:x2] = True
    expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    assert box_iou(first, second) == pytest.approx(float(expected))
    assert box_iou(first, second) == box_iou(second, first)


def test_names_are_whole_words_and_the_longest():
    names = ["Ann", "Anna", "Ranger", "Elvish Ranger", "C.J."]
    assert names_in("Anna and C.J. see an Elvish Ranger.", names) == {"Anna", "Elvish Ranger", "C.J."}
    assert names_in("anna, Annabel and Ann's hat", names) == {"Ann"}
    assert names_in("Anna", []) == set()


def test_score_of_a_description():
    gold, names = "Kate is waving and Tom is reading.", ["Kate", "Tom", "Mia"]
    full = {"name_precision": 1, "name_recall": 1, "name_f1": 1, "clause_recall": 1}
    assert score_description(gold, gold, names) == full
    assert score_description("Tom is  reading and Kate is waving", gold, names) == full
    assert score_description("Kate is reading and Tom is waving.", gold, names) == {**full, "clause_recall": 0}
    assert score_description("Kate is waving and Mia is reading.", gold, names) == dict.fromkeys(full, 0.5)
    assert score_description("someone is waving", gold, names) == dict.fromkeys(full, 0)
    assert score_description("someone is waving", "someone is reading", names) == full
    assert score_description("Mia is waving", "someone is waving", names) == {**full, "name_precision": 0, "name_f1": 0}


@pytest.mark.parametrize("more", ["", "Someone is sitting, "])
def test_images_of_a_description_do_not_mix(more):
    gold = f"Picture 1: {more}Kate is waving. Picture 2: {more}Kate is reading."
    swapped = f"Picture 1: {more}Kate is reading. Picture 2: {more}Kate is waving."
    renamed = f"Image 1: {more}Kate is waving; image 2: {more}Kate is reading."
    assert score_description(swapped, gold, ["Kate"])["clause_recall"] == 0
    assert score_description(renamed, gold, ["Kate"])["clause_recall"] == 1


@pytest.mark.parametrize("model", [FakeModel(), FakeModel(return_prompt=False)])
def test_a_model_that_recognises_scores_full(model):
    result = evaluate(model, FakeProcessor(), samples(), batch_size=3)
    for task, summary in result.summary.items():
        assert set(summary["metrics"].values()) == {1.0}, task
        assert (summary["n"], summary["unparsed"]) == (8, 0)
    assert [prediction.id for prediction in result.predictions] == [sample.id for sample in samples()]
    chance = {task: summary["chance"] for task, summary in result.summary.items()}
    assert chance == {
        "matching": {"accuracy": 0.25},
        "location": {"mean_iou": 0.25, "acc@0.5": 0.25},
        "qa_single": {"accuracy": 0.25},
        "caption_single": {},
    }


@pytest.mark.parametrize("references", ["none", "wrong"])
def test_without_the_right_references_it_guesses(references):
    """The fake then answers with the first choice, right for two of eight identities; every answer can be parsed."""
    result = evaluate(FakeModel(), FakeProcessor(), samples(), references=references)
    for task, metric in (("matching", "accuracy"), ("location", "acc@0.5"), ("qa_single", "accuracy")):
        assert result.summary[task]["metrics"][metric] <= 0.25, task
    assert result.summary["caption_single"]["metrics"]["name_recall"] == 1
    assert result.summary["caption_single"]["metrics"]["clause_recall"] <= 0.25


@pytest.mark.parametrize(("right", "total"), [(468, 585), (20, 22), (67, 67), (0, 5), (1, 1)])
def test_intervals_are_those_of_the_exact_bootstrap_distribution(right, total):
    """The mean of a resample of zeros and ones is binomial; quantiles of 2,000 draws differ from its by chance only."""
    shares = [math.comb(total, k) * (right / total) ** k * (1 - right / total) ** (total - k) for k in range(total + 1)]
    cumulative = np.cumsum(shares)
    interval = bootstrap_mean([1.0] * right + [0.0] * (total - right))
    assert (interval.mean, interval.n) == (right / total, total)
    for bound, share in ((interval.low, 0.025), (interval.high, 0.975)):
        lowest, highest = (np.searchsorted(cumulative, share + error) / total for error in (-0.012, 0.012))
        assert lowest - 1e-9 <= bound <= min(highest, 1) + 1e-9


def test_unparsed_answers_are_counted_and_score_0():
    result = evaluate(FakeModel(mute=True), FakeProcessor(), samples())
    for task in ("matching", "location"):
        assert result.summary[task]["unparsed"] == 8
        assert set(result.summary[task]["metrics"].values()) == {0.0}
    assert result.predictions[1].box is None


def test_a_tie_of_candidates_is_wrong():
    model = FakeModel()
    model.answer = lambda prompt: ""
    sample = [replace(samples()[2], answer="Kate is mad.", false_answers=["Kate is sad."])]
    assert evaluate(model, FakeProcessor(), sample).predictions[0].scores == {"accuracy": 0}


def test_long_answers_are_cut_and_the_mode_comes_back():
    model = FakeModel().train()
    model.frozen = torch.nn.BatchNorm1d(1).eval()
    result = evaluate(model, FakeProcessor(), samples(), max_new_tokens=4)
    assert model.training
    assert not model.frozen.training
    assert result.predictions[0].text == "Pict"


def test_a_result_survives_the_disk(tmp_path):
    result = evaluate(FakeModel(), FakeProcessor(), samples())
    assert EvaluationResult.load(result.save(tmp_path / "new" / "scores.json")) == result


def test_predictions_are_stored_with_their_task(tmp_path):
    result = evaluate(FakeModel(), FakeProcessor(), samples())
    stored = json.loads(result.save(tmp_path / "scores.json").read_text())["predictions"]
    assert [prediction["task"] for prediction in stored] == [sample.task for sample in samples()]
    assert all("type" not in prediction for prediction in stored)


def test_samples_that_cannot_be_evaluated_are_named():
    with pytest.raises(ValueError, match=r"test.jsonl:1 is a training sample"):
        evaluate(FakeModel(), FakeProcessor(), [replace(samples()[0], task=None, answer=None)])
    with pytest.raises(ValueError, match=r"test.jsonl:1 is a training sample"):  # training records may have a task
        evaluate(FakeModel(), FakeProcessor(), [replace(samples()[0], answer=None)])
    with pytest.raises(ValueError, match=r"test.jsonl:3 of type 'qa_single' has no false_answers"):
        evaluate(FakeModel(), FakeProcessor(), [replace(samples()[2], false_answers=[])])
    with pytest.raises(ValueError, match="references='no' is not known"):
        evaluate(FakeModel(), FakeProcessor(), samples(), references="no")


def test_without_references_the_question_stays():
    sample = samples()[0]
    bare = without_references(sample)
    assert (bare.identities, bare.source, bare.messages) == ([], "general", sample.messages)
    assert len(sample.identities) == 1


def test_wrong_references_show_no_identity_of_the_sample():
    given = samples(12)
    wrong = with_wrong_references(given)
    assert wrong == with_wrong_references(given)
    for sample, before in zip(wrong, samples(12), strict=True):
        assert [identity.name for identity in sample.identities] == ["Kate"]
        shown = {image.split("/")[0] for image in before.images}
        images = sample.identities[0].images
        assert len(images) == 2
        assert len({image.split("/")[0] for image in images} - shown) == 1
    assert given == samples(12)


def test_references_shared_in_a_chain_are_one_identity():
    """Sample 1 links the references of samples 0 and 2, so only sample 3 shows another identity."""
    images = [["a", "b"], ["b", "c"], ["c", "d"], ["x", "y"]]
    given = [
        replace(samples()[0], identities=[Identity("Kate", paths)], messages=samples()[2].messages) for paths in images
    ]
    wrong = [sample.identities[0].images for sample in with_wrong_references(given)]
    assert wrong[:3] == [["x", "y"]] * 3
    assert wrong[3] != ["x", "y"]
    with pytest.raises(
        ValueError, match=r"wrong references for 'Kate' of test\.jsonl:1 .* introduce 1; pass samples with more"
    ):
        with_wrong_references(given[:3])


def test_too_few_identities_for_wrong_references_are_found_before_training():
    """Without a model; and before the first answer, if the check was forgotten."""
    check_wrong_references(samples(12))
    few = samples(12)[:4]  # all of identity 0
    with pytest.raises(ValueError, match=r"need another identity .* introduce 1; pass samples with more identities"):
        check_wrong_references(few)
    with pytest.raises(ValueError, match="pass samples with more identities"):
        evaluate(None, FakeProcessor(), few, references="wrong")


def test_two_identities_of_a_sample_get_two_others():
    pair = [Identity("Kate", ["a"]), Identity("Tom", ["b"])]
    base = samples()[2]
    given = [
        replace(base, identities=pair),
        *(replace(base, identities=[Identity("Mia", [image])]) for image in ("c", "c", "d")),
    ]
    first = with_wrong_references(given)[0].identities
    assert {image for identity in first for image in identity.images} == {"c", "d"}
