"""RecordComposer: introduced identities, references, questions, and correct answers."""

from collections import Counter
from random import Random

import pytest

from idavlm.data import parse_sample
from idavlm.datasets.album import Album, AlbumImage, Appearance, IdentitySampler
from idavlm.datasets.record_composer import (
    TEST_SHARES,
    TRAIN_SHARES,
    RecordComposer,
    RecordOptions,
    drawn_names,
    own_names,
)

ACTIVITIES = ("reading", "waving", "running", "sitting", "dancing")
NAMES = [f"Name{number}" for number in range(30)]


def album(num_identities=9, num_photos=5, num_scenes=30, activity=True, sampler=None, seed=0):
    rng = Random(seed)
    keys = [f"p{number}" for number in range(num_identities)]

    def appearance(key, place, shot):
        return Appearance(key, rng.choice(ACTIVITIES) if activity else "", (place * 30, 5, place * 30 + 20, 60), shot)

    images = [
        AlbumImage(f"{key}/{number}.jpg", (appearance(key, 1, f"{key}-{number}"),))
        for key in keys
        for number in range(num_photos)
    ]
    for number in range(num_scenes):
        appearances = [
            appearance(key, place, f"{key}-{rng.randrange(num_photos)}")
            for place, key in enumerate(rng.sample(keys, rng.randint(2, 4)))
        ]
        images.append(AlbumImage(f"scene/{number}.jpg", tuple(appearances)))
    return Album(images, sampler)


def find(images, path):
    return next(image for image in images if image.path == path)


def all_images(source):
    return [*source.scenes, *(photo for photos in source.photos.values() for photo in photos)]


def identities_by_name(source, record):
    """Identities by name, according to the reference photos."""
    owner = {photo.path: key for key, photos in source.photos.items() for photo in photos}
    return {identity["name"]: {owner[path] for path in identity["images"]}.pop() for identity in record["identities"]}


@pytest.fixture(scope="module")
def source():
    return album()


@pytest.fixture(scope="module")
def training(source):
    return list(RecordComposer(source, Random(1), drawn_names(NAMES)).training(400))


@pytest.fixture(scope="module")
def evaluation(source):
    return list(RecordComposer(source, Random(2), own_names({f"p{i}": f"Name {i}" for i in range(9)})).evaluation(40))


def test_every_record_obeys_the_schema(training, evaluation):
    for record in training + evaluation:
        parse_sample(record)


def test_tasks_have_their_shares(training, evaluation):
    tasks = Counter(record["type"] for record in training)
    assert set(tasks) == set(TRAIN_SHARES)
    assert all(abs(tasks[task] / 400 - share) < 0.08 for task, share in TRAIN_SHARES.items())
    assert Counter(record["type"] for record in evaluation) == {
        task: round(40 * share) for task, share in TEST_SHARES.items()
    }


def test_shares_choose_the_tasks(source):
    composer = RecordComposer(source, Random(3), drawn_names(NAMES))
    tasks = Counter(
        record["type"] for record in composer.training(200, shares={"matching": 1, "location": 3, "qa_multi": 0})
    )
    assert set(tasks) == {"matching", "location"}
    assert 120 < tasks["location"] < 180
    shares = {"caption_multi": 1.0, "matching": 0.5}
    assert Counter(record["type"] for record in composer.evaluation(8, shares=shares)) == {
        "caption_multi": 8,
        "matching": 4,
    }
    for wrong, message in (
        ({"poem": 1}, "'poem' is not known"),
        ({"matching": -1}, "matching=-1"),
        ({"matching": 0}, "share 0"),
    ):
        with pytest.raises(ValueError, match=message):
            next(composer.training(1, shares=wrong))


def test_references_are_other_images_and_other_shots(source, training, evaluation):
    for record in training + evaluation:
        shown = {box["image"] for box in record["boxes"]}
        images = all_images(source)
        for name, key in identities_by_name(source, record).items():
            seen = {found.shot for path in shown if (found := find(images, path).appearance_of(key)) is not None}
            references = next(each["images"] for each in record["identities"] if each["name"] == name)
            shots = [find(images, path).appearances[0].shot for path in references]
            assert not shown & set(references)
            assert not seen & set(shots)
            assert len(set(shots)) == len(shots)


def test_meta_tells_who_the_names_are_and_who_is_absent(source):
    options = RecordOptions(num_identities=3, train_absent_share=0.5, test_absent_share=0.5)
    composer = RecordComposer(source, Random(4), drawn_names(NAMES), options=options)
    images, num_absent = {image.path: image for image in all_images(source)}, 0
    for record in [*composer.training(100), *composer.evaluation(20)]:
        people = identities_by_name(source, record)
        content = record["messages"][0]["content"]
        shown = [images[part["image"]] for part in content if part["type"] == "image"]
        absent = [name for name, key in people.items() if not any(image.appearance_of(key) for image in shown)]
        assert record["meta"] == {"people": people, "distractors": absent}
        num_absent += bool(absent)
    assert num_absent > 20


def test_training_boxes_are_of_introduced_identities_and_evaluation_boxes_of_all(source, training, evaluation):
    for record in training + evaluation:
        keys = identities_by_name(source, record)
        for box in record["boxes"]:
            boxes = {each.box: each.identity for each in find(all_images(source), box["image"]).appearances}
            if box["name"] in keys:
                assert boxes[tuple(box["box"])] == keys[box["name"]]
            else:
                assert "answer" in record
                assert box["name"].startswith("someone ")
    record = next(record for record in evaluation if record["type"] == "location")
    scene = find(source.scenes, record["messages"][0]["content"][0]["image"])
    assert len(record["boxes"]) == len(scene.appearances)


def test_boxes_have_the_activity_as_label_and_location_asks_for_it(source, training, evaluation):
    """In training, each introduced identity is asked for twice; captions are also of single photos."""
    images = {image.path: image for image in all_images(source)}
    for record in [*training, *evaluation]:
        for box in record["boxes"]:
            activities = {each.box: each.activity for each in images[box["image"]].appearances}
            assert box["label"] == activities[tuple(box["box"])]
        if record["type"] == "location" and "answer" not in record:
            questions = [message["content"] for message in record["messages"][::2]]
            texts = [text if isinstance(text, str) else text[-1]["text"].strip() for text in questions]
            names = [identity["name"] for identity in record["identities"]]
            asked = [text.format(name) for name in names for text in ("Where is {}?", "What is {} doing?")]
            assert sorted(texts) == sorted(asked)
    captions = [record for record in training if record["type"] == "caption_single"]
    assert {len(images[record["messages"][0]["content"][0]["image"]].appearances) for record in captions} >= {1, 2}


def test_the_answer_to_matching_is_the_one_image_of_the_identity(source, evaluation):
    places = Counter()
    for record in evaluation:
        if record["type"] != "matching":
            continue
        ((name, key),) = identities_by_name(source, record).items()
        content = record["messages"][0]["content"]
        paths = [part["image"] for part in content if part["type"] == "image"]
        right = [number for number, path in enumerate(paths, 1) if find(all_images(source), path).appearance_of(key)]
        assert record["answer"] == f"Picture {right[0]}"
        assert len(right) == 1
        assert len(paths) == 4
        assert sorted([record["answer"], *record["false_answers"]]) == [f"Picture {number}" for number in (1, 2, 3, 4)]
        assert content[-1] == {"type": "text", "text": f"\nWhich picture shows {name}?"}
        assert [part["text"] for part in content[:-1:2]] == ["Picture 1: ", *(f"\nPicture {n}: " for n in (2, 3, 4))]
        places[record["answer"]] += 1
    assert set(places) == {f"Picture {number}" for number in (1, 2, 3, 4)}


def test_training_asks_a_roll_call_or_for_each_introduced_identity_never_both(source, training):
    is_roll_call = set()
    for record in training:
        if record["type"] != "matching":
            continue
        names = {key: name for name, key in identities_by_name(source, record).items()}
        texts = [
            m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"] for m in record["messages"]
        ]
        turns = dict(zip([text.strip() for text in texts[::2]], texts[1::2], strict=True))
        paths = [part["image"] for part in record["messages"][0]["content"] if part["type"] == "image"]
        shown = [names.get(find(all_images(source), path).appearances[0].identity, "someone") for path in paths]
        expected = " ".join(f"Picture {number}: {name}." for number, name in enumerate(shown, 1))
        roll_call = {"Who is in the pictures?": expected}
        choices = {f"Which picture shows {n}?": f"Picture {shown.index(n) + 1}" for n in names.values()}
        assert turns in (roll_call, choices)
        is_roll_call.add(turns == roll_call)
    assert is_roll_call == {True, False}


def test_questions_of_activities_have_the_right_answer_and_no_false_one_is_right(source, evaluation):
    asked = Counter()
    for record in evaluation:
        question = record["messages"][-1]["content"][-1]["text"].strip()
        if record["type"] not in ("qa_single", "qa_multi"):
            continue
        assert record["answer"] not in record["false_answers"]
        paths = [part["image"] for part in record["messages"][0]["content"] if part["type"] == "image"]
        name, key = next((name, key) for name, key in identities_by_name(source, record).items() if name in question)
        images = [find(all_images(source), path) for path in paths]
        if question.startswith("In which"):
            right = [
                number
                for number, image in enumerate(images, 1)
                if image.appearance_of(key) and f"is {name} {image.appearance_of(key).activity}?" in question
            ]
            assert record["answer"] == f"Picture {right[0]}"
            activity = images[right[0] - 1].appearance_of(key).activity
            others = [each for image in images for each in image.appearances if each.identity != key]
            assert activity in {each.activity for each in others}, "the activity alone would determine the answer"
        else:
            number = int(question.rstrip("?").split()[-1]) if "in picture" in question else 1
            assert record["answer"] == f"{name} is {images[number - 1].appearance_of(key).activity}."
            assert len(record["false_answers"]) == 3
        asked[question.split()[0]] += 1
    assert set(asked) == {"In", "What"}


def test_captions_go_from_left_to_right_and_name_introduced_identities_only(source, evaluation):
    for record in evaluation:
        if record["type"] == "caption_single":
            names = {key: name for name, key in identities_by_name(source, record).items()}
            scene = find(source.scenes, record["messages"][0]["content"][0]["image"])
            clauses = [f"{names.get(each.identity, 'someone')} is {each.activity}" for each in scene.appearances]
            expected = ", ".join(clauses[:-1]) + " and " + clauses[-1] + "."
            assert record["answer"] == expected[0].upper() + expected[1:]
        elif record["type"] == "caption_multi":
            assert record["answer"].startswith("Picture 1: ")
            assert " Picture 2: " in record["answer"]


def test_names_are_drawn_per_record_or_fixed(source, training, evaluation):
    named = Counter((key, name) for record in training for name, key in identities_by_name(source, record).items())
    assert len({name for key, name in named if key == "p0"}) > 15
    for record in evaluation:
        assert all(name == f"Name {key[1:]}" for name, key in identities_by_name(source, record).items())


def test_records_are_a_function_of_the_seed(source):
    first, second = (list(RecordComposer(source, Random(3), drawn_names(NAMES)).training(50)) for _ in range(2))
    assert first == second


def test_identities_without_activities_are_only_located():
    composer = RecordComposer(album(activity=False), Random(0), drawn_names(NAMES))
    draft = composer._draft("location", evaluation=False)
    assert all(question.target for question in draft.questions)
    with pytest.raises(ValueError, match="add scenes"):
        composer._draft("qa_multi", evaluation=False)


def test_an_identity_without_another_shot_is_an_error():
    images = [AlbumImage(f"{key}.jpg", (Appearance(key, "waving", (0, 0, 9, 9), "a"),)) for key in "abcd"]
    composer = RecordComposer(Album(images), Random(0), drawn_names(NAMES))
    with pytest.raises(ValueError, match="add photos"):
        composer._draft("matching", evaluation=True)


def test_two_identities_of_one_family_are_never_drawn_together():
    families = {f"p{i}": f"family {i % 3}" for i in range(9)}
    sampler = IdentitySampler(list(families), families)
    for seed in range(100):
        drawn = sampler.draw(3, Random(seed))
        assert len({families[identity] for identity in drawn}) == 3
    with pytest.raises(ValueError, match="3 families"):
        sampler.draw(4, Random(0))


def test_identities_of_a_draw_come_from_one_pool():
    sampler = IdentitySampler(list("abcdefgh"), pools=["abcd", "efgh"])
    pools = {frozenset("abcd"), frozenset("efgh")}
    drawn = [sampler.draw(4, Random(seed)) for seed in range(40)]
    assert {frozenset(identities) for identities in drawn} == pools


def shown_by(source, path):
    return {appearance.identity for appearance in find(all_images(source), path).appearances}


def test_options_set_photos_choices_and_identities():
    source = album(num_photos=9)
    options = RecordOptions(max_references=3, num_choices=6, num_identities=5)
    composer = RecordComposer(source, Random(3), drawn_names(NAMES), options=options)
    for record in composer.evaluation(20):
        assert all(len(identity["images"]) == 3 for identity in record["identities"])
        images = [part for part in record["messages"][0]["content"] if part["type"] == "image"]
        if record["type"] == "matching":
            assert len(images) == 6
            assert len(record["false_answers"]) == 5
        if record["type"] in ("location", "qa_single"):
            introduced = identities_by_name(source, record)
            assert len(introduced) == 5
            assert len(set(introduced.values()) & shown_by(source, images[0]["image"])) == min(
                5, len(shown_by(source, images[0]["image"]))
            ), "identities of the scene first, distractors after them"
        parse_sample(record)
    counts = Counter(len(record["identities"]) for record in composer.training(300) if record["type"] == "location")
    assert set(counts) == {1, 2, 3, 4, 5}, "training introduces as many as the test"
    photos = Counter(len(identity["images"]) for record in composer.training(300) for identity in record["identities"])
    assert set(photos) == {1, 2, 3}


def test_questions_about_identities_that_are_not_in_the_scene(source):
    """They have their share, the right answer, no box, and never a cue in the number of identities."""
    options = RecordOptions(train_absent_share=0.5, test_absent_share=0.4)
    test = list(RecordComposer(source, Random(4), drawn_names(NAMES), options=options).evaluation(500))
    absent = Counter()
    for record in test:
        if record["type"] not in ("location", "qa_single"):
            continue
        sample, introduced = parse_sample(record), identities_by_name(source, record)
        assert len(introduced) == 2
        words = sample.messages[0].content[-1].text.replace("?", " ").split()
        name = next(name for name in introduced if name in words)
        is_absent = introduced[name] not in shown_by(source, sample.message_images[0])
        absent[record["type"], is_absent] += 1
        if record["type"] == "location":
            assert (record["answer"] == "Not here.") == is_absent
            assert (sample.target_box is None) == is_absent
        else:
            assert (record["answer"] == f"{name} is not here.") == is_absent
            assert (f"{name} is not here." in record["false_answers"]) != is_absent
    for task in ("location", "qa_single"):
        share = absent[task, True] / (absent[task, True] + absent[task, False])
        assert abs(share - 0.4) < 0.08
    train = list(RecordComposer(source, Random(5), drawn_names(NAMES), options=options).training(300))
    located = [parse_sample(record) for record in train if record["type"] == "location"]
    with_absent = [any("Not here." in part.text for m in s.messages for part in m.content) for s in located]
    assert abs(sum(with_absent) / len(with_absent) - 0.5) < 0.15
    assert not any(
        "ot here" in str(record) for record in RecordComposer(source, Random(6), drawn_names(NAMES)).training(300)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_references": 0}, "max_references=0 must be an integer of at least 1"),
        ({"num_choices": 9}, "num_choices=9 must be an integer from 2 to 8"),
        ({"test_absent_share": 1.5}, "test_absent_share=1.5 must be a share from 0 to 1"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        RecordOptions(**options)
    with pytest.raises(ValueError, match="max_references=3 needs num_photos=5 or more, but it is 4"):
        RecordOptions(max_references=3).check_photos(4)


def test_absent_identities_are_of_other_families():
    sampler = IdentitySampler(["a1", "a2", "b", "c"], {"a1": "a", "a2": "a"})
    drawn = {identity for seed in range(50) for identity in sampler.draw_absent(["a1"], 1, Random(seed))}
    assert drawn == {"b", "c"}
    with pytest.raises(ValueError, match="cannot be drawn; add identities"):
        sampler.draw_absent(["a1", "b", "c"], 1, Random(0))
