"""Records composed from albums: who is asked about, what refers to whom, and that answers are right."""

from collections import Counter
from random import Random

import pytest

from idavlm.data import parse_sample
from idavlm.datasets.album import Album, Cast, Person, Picture
from idavlm.datasets.record_composer import TEST_SHARES, TRAIN_SHARES, RecordComposer, drawn_names, own_names

ACTIVITIES = ("reading", "waving", "running", "sitting", "dancing")
NAMES = [f"Name{number}" for number in range(30)]


def album(num_people=9, num_photos=5, num_scenes=30, activity=True, cast=None, seed=0):
    rng = Random(seed)
    keys = [f"p{number}" for number in range(num_people)]

    def person(key, place, shot):
        return Person(key, rng.choice(ACTIVITIES) if activity else "", (place * 30, 5, place * 30 + 20, 60), shot)

    pictures = [
        Picture(f"{key}/{number}.jpg", (person(key, 1, f"{key}-{number}"),))
        for key in keys
        for number in range(num_photos)
    ]
    for number in range(num_scenes):
        people = [
            person(key, place, f"{key}-{rng.randrange(num_photos)}")
            for place, key in enumerate(rng.sample(keys, rng.randint(2, 4)))
        ]
        pictures.append(Picture(f"scene/{number}.jpg", tuple(people)))
    return Album(pictures, cast)


def find(pictures, path):
    return next(picture for picture in pictures if picture.path == path)


def everything(of):
    return [*of.scenes, *(photo for photos in of.photos.values() for photo in photos)]


def whose(of, record):
    """Identities by name, read off the reference photos."""
    owner = {photo.path: key for key, photos in of.photos.items() for photo in photos}
    return {identity["name"]: {owner[path] for path in identity["images"]}.pop() for identity in record["identities"]}


@pytest.fixture(scope="module")
def people():
    return album()


@pytest.fixture(scope="module")
def training(people):
    return list(RecordComposer(people, Random(1), drawn_names(NAMES)).training(400))


@pytest.fixture(scope="module")
def evaluation(people):
    return list(RecordComposer(people, Random(2), own_names({f"p{i}": f"Person {i}" for i in range(9)})).evaluation(40))


def test_every_record_obeys_the_schema(training, evaluation):
    for record in training + evaluation:
        parse_sample(record)


def test_kinds_come_in_their_shares(training, evaluation):
    kinds = Counter(record["id"].rpartition("-")[0] for record in training)
    assert set(kinds) == set(TRAIN_SHARES)
    assert all(abs(kinds[kind] / 400 - share) < 0.08 for kind, share in TRAIN_SHARES.items())
    assert Counter(record["type"] for record in evaluation) == {
        k: round(40 * share) for k, share in TEST_SHARES.items()
    }


def test_references_show_other_pictures_and_other_shots(people, training, evaluation):
    for record in training + evaluation:
        shown = {box["image"] for box in record["boxes"]}
        pictures = everything(people)
        for name, key in whose(people, record).items():
            seen = {find(pictures, path).shows(key).shot for path in shown if find(pictures, path).shows(key)}
            references = next(one["images"] for one in record["identities"] if one["name"] == name)
            shots = [find(pictures, path).people[0].shot for path in references]
            assert not shown & set(references)
            assert not seen & set(shots)
            assert len(set(shots)) == len(shots)


def test_training_boxes_are_of_those_introduced_and_evaluation_boxes_of_everybody(people, training, evaluation):
    for record in training + evaluation:
        keys = whose(people, record)
        for box in record["boxes"]:
            boxes = {person.box: person.identity for person in find(everything(people), box["image"]).people}
            if box["name"] in keys:
                assert boxes[tuple(box["box"])] == keys[box["name"]]
            else:
                assert "type" in record
                assert box["name"].startswith("someone ")
    record = next(record for record in evaluation if record["type"] == "location")
    scene = find(people.scenes, record["messages"][0]["content"][0]["image"])
    assert len(record["boxes"]) == len(scene.people)


def test_matching_names_the_one_picture_that_shows_the_person(people, evaluation):
    places = Counter()
    for record in evaluation:
        if record["type"] != "matching":
            continue
        ((name, key),) = whose(people, record).items()
        content = record["messages"][0]["content"]
        paths = [part["image"] for part in content if part["type"] == "image"]
        right = [number for number, path in enumerate(paths, 1) if find(everything(people), path).shows(key)]
        assert record["answer"] == f"Picture {right[0]}"
        assert len(right) == 1
        assert len(paths) == 4
        assert sorted([record["answer"], *record["false_answers"]]) == [f"Picture {number}" for number in (1, 2, 3, 4)]
        assert content[-1] == {"type": "text", "text": f"\nWhich picture shows {name}?"}
        assert [part["text"] for part in content[:-1:2]] == ["Picture 1: ", *(f"\nPicture {n}: " for n in (2, 3, 4))]
        places[record["answer"]] += 1
    assert set(places) == {f"Picture {number}" for number in (1, 2, 3, 4)}


def test_training_asks_who_is_in_the_pictures_or_of_everybody_introduced_never_both(people, training):
    kinds = set()
    for record in training:
        if not record["id"].startswith("matching"):
            continue
        names = {key: name for name, key in whose(people, record).items()}
        texts = [
            m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"] for m in record["messages"]
        ]
        turns = dict(zip([text.strip() for text in texts[::2]], texts[1::2], strict=True))
        paths = [part["image"] for part in record["messages"][0]["content"] if part["type"] == "image"]
        shown = [names.get(find(everything(people), path).people[0].identity, "someone") for path in paths]
        expected = " ".join(f"Picture {number}: {name}." for number, name in enumerate(shown, 1))
        roll_call = {"Who is in the pictures?": expected}
        choices = {f"Which picture shows {n}?": f"Picture {shown.index(n) + 1}" for n in names.values()}
        assert turns in (roll_call, choices)
        kinds.add(turns == roll_call)
    assert kinds == {True, False}


def test_questions_of_activities_have_the_right_answer_and_no_false_one_is_right(people, evaluation):
    asked = Counter()
    for record in evaluation:
        question = record["messages"][-1]["content"][-1]["text"].strip()
        if record["type"] not in ("qa_single", "qa_multi"):
            continue
        assert record["answer"] not in record["false_answers"]
        paths = [part["image"] for part in record["messages"][0]["content"] if part["type"] == "image"]
        name, key = next((name, key) for name, key in whose(people, record).items() if name in question)
        pictures = [find(everything(people), path) for path in paths]
        if question.startswith("In which"):
            right = [
                number
                for number, picture in enumerate(pictures, 1)
                if picture.shows(key) and f"is {name} {picture.shows(key).activity}?" in question
            ]
            assert record["answer"] == f"Picture {right[0]}"
            activity = pictures[right[0] - 1].shows(key).activity
            others = [one for picture in pictures for one in picture.people if one.identity != key]
            assert activity in {one.activity for one in others}, "the activity alone would tell"
        else:
            number = int(question.rstrip("?").split()[-1]) if "in picture" in question else 1
            assert record["answer"] == f"{name} is {pictures[number - 1].shows(key).activity}."
            assert len(record["false_answers"]) == 3
        asked[question.split()[0]] += 1
    assert set(asked) == {"In", "What"}


def test_captions_go_from_left_to_right_and_name_only_those_introduced(people, evaluation):
    for record in evaluation:
        if record["type"] == "caption_single":
            names = {key: name for name, key in whose(people, record).items()}
            scene = find(people.scenes, record["messages"][0]["content"][0]["image"])
            clauses = [f"{names.get(one.identity, 'someone')} is {one.activity}" for one in scene.people]
            expected = ", ".join(clauses[:-1]) + " and " + clauses[-1] + "."
            assert record["answer"] == expected[0].upper() + expected[1:]
        elif record["type"] == "caption_multi":
            assert record["answer"].startswith("Picture 1: ")
            assert " Picture 2: " in record["answer"]


def test_names_are_drawn_anew_or_are_ones_own(people, training, evaluation):
    named = Counter((key, name) for record in training for name, key in whose(people, record).items())
    assert len({name for key, name in named if key == "p0"}) > 15
    for record in evaluation:
        assert all(name == f"Person {key[1:]}" for name, key in whose(people, record).items())


def test_records_are_a_function_of_the_seed(people):
    first, second = (list(RecordComposer(people, Random(3), drawn_names(NAMES)).training(50)) for _ in range(2))
    assert first == second


def test_people_of_whom_there_is_nothing_to_say_are_only_located():
    composer = RecordComposer(album(activity=False), Random(0), drawn_names(NAMES))
    draft = composer._draft("location", evaluation=False)
    assert all(question.target for question in draft.questions)
    with pytest.raises(ValueError, match="add scenes"):
        composer._draft("qa_multi", evaluation=False)


def test_a_person_without_another_shot_is_an_error():
    pictures = [Picture(f"{key}.jpg", (Person(key, "waving", (0, 0, 9, 9), "a"),)) for key in "abcd"]
    composer = RecordComposer(Album(pictures), Random(0), drawn_names(NAMES))
    with pytest.raises(ValueError, match="add photos"):
        composer._draft("matching", evaluation=True)


def test_two_of_one_family_never_meet():
    families = {f"p{i}": f"family {i % 3}" for i in range(9)}
    cast = Cast(list(families), families)
    for seed in range(100):
        drawn = cast.draw(3, Random(seed))
        assert len({families[one] for one in drawn}) == 3
    with pytest.raises(ValueError, match="3 families"):
        cast.draw(4, Random(0))


def test_those_who_meet_come_from_one_circle():
    cast = Cast(list("abcdefgh"), circles=["abcd", "efgh"])
    circles = {frozenset("abcd"), frozenset("efgh")}
    drawn = [cast.draw(4, Random(seed)) for seed in range(40)]
    assert {frozenset(one) for one in drawn} == circles
