"""Inference for many callers: batched answers are those of one caller, options belong to rows, banks are deleted."""

import gc
import threading
import time
import weakref

import pytest
import torch
from PIL import Image

from idavlm import IdentityBank, IdentityProcessor, add_inner_adaptors, ask, attach_id_former
from idavlm.data import DataError
from idavlm.inference import (
    BankStore,
    BatchingEngine,
    Cancelled,
    DeadlineExceeded,
    EngineClosed,
    GenerationOptions,
    NamedBox,
    PromptEncoder,
    PromptTooLong,
    TooManyBanks,
    answer_question,
    draw_boxes,
    draw_identity_map,
    identity_maps,
    named_boxes,
)
from idavlm.inference.generation_options import choose_token
from idavlm.inference.text_stream import TextStream
from tests.small_models import small_model, small_processor
from tests.vlm_families import tiny_model, tiny_processor


def talkative(model):
    """Random weights whose answers depend on the prompt."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def own():
    processor = small_processor()
    return talkative(small_model(processor, identity_embedding="learned", max_identities=2)), processor


def attached(family):
    model, processor = tiny_model(family).eval(), IdentityProcessor(tiny_processor(family))
    torch.manual_seed(0)
    attach_id_former(model, num_heads=4, gate="none", identity_embedding="name")
    return talkative(model), processor


MODELS = {"own": own, "qwen2_5_vl": lambda: attached("qwen2_5_vl"), "llava": lambda: attached("llava")}


@pytest.fixture(scope="module", params=MODELS)
def built(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def small():
    return own()


@pytest.fixture
def engine(small):
    with BatchingEngine(*small, max_wait=0.05) as engine:
        yield engine


def turn(text, *parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def of_cast(root, number):
    """Photos and a scene that differ from number to number."""
    files = ["kate.png", "tom.png", "other.png", "scene.png"]
    photos = [Image.open(root / files[(number + shift) % 4]).rotate(7 * number) for shift in range(3)]
    return {"Kate": photos[:2], "Tom": photos[2:]}, photos[0].rotate(90)


def test_answers_of_a_batch_are_those_of_single_questions(built, root):
    """With photos, with a bank, and without identities, in one batch of prompts of several lengths."""
    model, processor = built
    casts = [of_cast(root, number) for number in range(4)]
    questions = [f"Where is Kate{' and Tom' * number}?" for number in range(4)]
    options = {"max_new_tokens": 8}
    expected = [
        ask(model, processor, question, images=[scene], identities=cast, **options)
        for question, (cast, scene) in zip(questions, casts, strict=True)
    ]
    expected.append(ask(model, processor, "What is Tom doing?", **options))
    assert len(set(expected)) > 3, "answers that are all alike would prove nothing"
    batches = []
    with BatchingEngine(model, processor, on_batch=batches.append) as engine:
        bank = IdentityBank(model, processor)
        for name, photos in casts[1][0].items():
            bank.add(name, photos)
        encoder = PromptEncoder(processor)
        prompts = []
        for number, (question, (cast, scene)) in enumerate(zip(questions, casts, strict=True)):
            identities = [
                {"type": "identity", "name": name} | ({} if number == 1 else {"images": photos})
                for name, photos in cast.items()
            ]
            parts = [*identities, {"type": "image", "image": scene}]
            prompts.append(encoder.encode(turn(question, *parts), bank=bank if number == 1 else None))
        prompts.append(encoder.encode(turn("What is Tom doing?")))
        assert prompts[1].stored[0] is bank.photos("Kate")[0]
        running = threading.Event()
        blocked = engine.run(running.wait)  # all requests wait before the first batch
        generations = [engine.submit(prompt, GenerationOptions(**options)) for prompt in prompts]
        running.set()
        answers = [generation.result(60) for generation in generations]
    assert blocked.done()
    assert answers == expected
    assert [report.rows for report in batches] == [5]


def test_pieces_are_the_answer(engine):
    prompt = PromptEncoder(engine.processor).encode(turn("Where is Kate?"))
    for options in ({"max_new_tokens": 12}, {"max_new_tokens": 12, "temperature": 1.5, "seed": 1}):
        generation = engine.submit(prompt, GenerationOptions(**options))
        pieces = list(generation)
        assert "".join(pieces) == generation.result() == generation.text
        assert len(pieces) > 1
        assert generation.finish_reason in ("stop", "length")


def test_options_belong_to_rows(engine):
    """A seeded row draws the same tokens alone and among others, and greedy rows stay greedy."""
    prompt = PromptEncoder(engine.processor).encode(turn("What is Tom doing?"))
    sampled = GenerationOptions(max_new_tokens=10, temperature=1.2, top_p=0.95, seed=5)
    greedy = GenerationOptions(max_new_tokens=10)
    alone = [engine.submit(prompt, options).result(60) for options in (sampled, greedy)]
    running = threading.Event()
    engine.run(running.wait)
    others = [
        engine.submit(prompt, GenerationOptions(max_new_tokens=3, temperature=2.0, seed=seed)) for seed in range(3)
    ]
    both = [engine.submit(prompt, options) for options in (sampled, greedy)]
    running.set()
    assert [generation.result(60) for generation in both] == alone
    assert alone[0] != alone[1]
    assert all(len(other.tokens) <= 3 and other.is_done for other in others)


def test_long_answers_make_room_and_continue(small):
    """Slices of two tokens: the answers are those of an uninterrupted batch, and the last request does not wait."""
    model, processor = small
    prompt = PromptEncoder(processor).encode(turn("Where is Kate?"))
    with BatchingEngine(model, processor) as engine:
        expected = engine.submit(prompt, GenerationOptions(max_new_tokens=24)).result(60)
    order = []

    def note(name):
        return lambda piece: order.append(name) if piece is None else None

    with BatchingEngine(model, processor, slice_tokens=2, max_batch_size=1) as engine:
        running = threading.Event()
        engine.run(running.wait)
        long = engine.submit(prompt, GenerationOptions(max_new_tokens=24), on_text=note("long"))
        short = engine.submit(prompt, GenerationOptions(max_new_tokens=2), on_text=note("short"))
        running.set()
        assert long.result(60) == expected
        assert short.is_done
    assert order == ["short", "long"] or len(long.tokens) <= 2


def test_a_row_that_fails_is_alone(engine, monkeypatch):
    prompts = [PromptEncoder(engine.processor).encode(turn(f"Where is Kate {number}?")) for number in range(5)]
    expected = [engine.submit(prompt, GenerationOptions(max_new_tokens=4)).result(60) for prompt in prompts]
    collate = engine.collate

    def broken(batch):
        if any(prompt.question == "Where is Kate 3?" for prompt in batch):
            raise RuntimeError("cannot be collated")
        return collate(batch)

    monkeypatch.setattr(engine, "collate", broken)
    running = threading.Event()
    engine.run(running.wait)
    generations = [engine.submit(prompt, GenerationOptions(max_new_tokens=4)) for prompt in prompts]
    running.set()
    for number, generation in enumerate(generations):
        if number == 3:
            with pytest.raises(RuntimeError, match="cannot be collated"):
                generation.result(60)
        else:
            assert generation.result(60) == expected[number]


def test_deadlines_cancellation_and_the_end(small):
    engine = BatchingEngine(*small)
    prompt = PromptEncoder(engine.processor).encode(turn("Where is Kate?"))
    late = engine.submit(prompt, GenerationOptions(max_new_tokens=400), deadline=time.monotonic() - 1)
    with pytest.raises(DeadlineExceeded, match="before the answer began"):
        late.result(60)
    cancelled = engine.submit(prompt, GenerationOptions(max_new_tokens=2000, temperature=2.0))
    next(iter(cancelled))
    cancelled.cancel()
    with pytest.raises(Cancelled):
        cancelled.result(60)
    last = engine.submit(prompt, GenerationOptions(max_new_tokens=4))
    engine.close()
    assert last.is_done
    assert last.error is None, "requests that were submitted are completed"
    for call in (lambda: engine.submit(prompt), lambda: engine.run(print)):
        with pytest.raises(EngineClosed):
            call()


def test_logits_that_are_not_finite_are_an_error(small):
    model, processor = own()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with BatchingEngine(model, processor) as engine, pytest.raises(RuntimeError, match="NaN or infinite"):
        engine.submit(PromptEncoder(processor).encode(turn("Where is Kate?"))).result(60)


def test_workflows_do_not_share_a_batch():
    processor = small_processor()
    model = small_model(processor)
    add_inner_adaptors(model.language_model, layers=[0, 1], workflows=["grounding", "chat"])
    talkative(model)
    prompt = PromptEncoder(processor).encode(turn("Where is Kate?"))
    batches = []
    with BatchingEngine(model, processor, on_batch=batches.append) as engine:
        assert engine.workflows == ("grounding", "chat", "text")
        running = threading.Event()
        engine.run(running.wait)
        names = ["grounding", "text", "chat", "grounding"]
        generations = [engine.submit(prompt, GenerationOptions(max_new_tokens=6, workflow=name)) for name in names]
        running.set()
        answers = [generation.result(60) for generation in generations]
        with pytest.raises(ValueError, match="workflow='walk' is not known"):
            engine.submit(prompt, GenerationOptions(workflow="walk"))
    expected = [ask(model, processor, "Where is Kate?", max_new_tokens=6, workflow=name) for name in names]
    assert answers == expected
    assert len(set(expected)) == 3
    assert [report.rows for report in batches] == [2, 1, 1]


def test_text_without_space_at_its_ends_or_stop_strings(processor):
    """Pieces never hold what turns out to be the beginning of a stop string."""
    tokenizer = processor.tokenizer
    ids = tokenizer("  Kate is reading. Tom is waving. Where is Kate?")["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True).strip()
    for stop, expected in (
        ((), whole),
        (("Tom is",), "Kate is reading."),
        (("reading. Tom", "waving"), "Kate is"),
        (("waving. Where was",), whole),
    ):
        stream = TextStream(tokenizer, stop)
        pieces = []
        for token in ids:
            pieces.append(stream.add(token))
            if stream.is_stopped:
                break
        pieces.append(stream.finish())
        assert "".join(pieces) == stream.text == expected
        assert stream.is_stopped == (expected != whole)


def test_characters_of_several_tokens_are_whole():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    text = "Zoë 张伟 🙂!"
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_tokens_are_chosen_as_the_options_say():
    scores = torch.tensor([2.0, 1.9, 0.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)

    def drawn(answer=(), **options):
        options = GenerationOptions(**options)
        return [choose_token(scores, options, list(answer), generator) for _ in range(200)]

    assert set(drawn()) == {0}
    assert set(drawn(temperature=1.0)) == {0, 1, 2}
    assert set(drawn(temperature=1.0, top_p=0.9)) == {0, 1}
    assert set(drawn(temperature=1.0, top_p=0.3)) == {0}
    assert set(drawn([0], presence_penalty=0.5)) == {1}
    assert set(drawn([0, 1, 1], frequency_penalty=0.2)) == {0}
    assert not torch.equal(scores.argsort(), torch.arange(4)), "the scores are not changed"
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"stop": ("",)}, {"temperature": 1e9}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            GenerationOptions(**wrong)


def test_prompts_that_cannot_be_used(small, root):
    model, processor = small
    encoder = PromptEncoder(processor, max_tokens=40)
    identity = {"type": "identity", "name": "Kate"}
    with pytest.raises(PromptTooLong, match="more than the 40"):
        encoder.encode(turn("Where is Kate? " * 8))
    with pytest.raises(PromptTooLong, match="characters"):
        encoder.encode(turn("Where is Kate? " * 1000))
    with pytest.raises(DataError, match="without images; add images, or name a bank"):
        encoder.encode(turn("Where is Kate?", identity))
    with pytest.raises(DataError, match="is not in the bank"):
        encoder.encode(turn("Where is Kate?", identity), bank=IdentityBank(model, processor))
    with pytest.raises(DataError, match="no user turn"):
        encoder.encode([{"role": "system", "content": "Be brief."}])
    photos = [root / "kate.png"]
    three = [{"type": "identity", "name": name, "images": photos} for name in ("Kate", "Tom", "Bob")]
    prompt = PromptEncoder(processor).encode(turn("Where is Kate?", *three))
    with BatchingEngine(model, processor) as engine, pytest.raises(ValueError, match="max_identities=2"):
        engine.submit(prompt)


def test_members_of_a_bank_are_introduced_in_the_first_turn(small, root):
    model, processor = small
    bank = IdentityBank(model, processor)
    bank.add("Kate", [root / "kate.png"])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is Kate?"},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "And now?"},
    ]
    prompt = PromptEncoder(processor).encode(messages, bank=bank)
    with_photos = [dict(message) for message in messages]
    with_photos[1]["content"] = [
        {"type": "identity", "name": "Kate", "images": [root / "kate.png"]},
        {"type": "text", "text": "Where is Kate?"},
    ]
    expected = PromptEncoder(processor).encode(with_photos)
    assert torch.equal(prompt.encoded["input_ids"], expected.encoded["input_ids"])
    assert prompt.names == ("Kate",)
    assert prompt.question == "And now?"
    assert messages[1]["content"] == "Where is Kate?", "the messages are not changed"


def test_boxes_belong_to_whom_the_answer_or_the_question_names(small, root):
    _, processor = small
    photos = [root / "kate.png"]
    identities = [{"type": "identity", "name": name, "images": photos} for name in ("Kate", "Tom")]
    scene = {"type": "image", "image": root / "scene.png"}
    of_kate, of_both = (
        PromptEncoder(processor).encode(turn(text, *identities, scene))
        for text in ("Where is Kate?", "Where are they?")
    )
    width, height = Image.open(root / "scene.png").size
    left = (0.0, 0.0, width * 15 / 31, float(height))
    right = (width * 16 / 31, 0.0, float(width), float(height))
    assert named_boxes(processor, "0 0 15 31", of_kate) == (NamedBox(left, "Kate"),)
    assert named_boxes(processor, "0 0 15 31", of_both) == (NamedBox(left, None),)
    both = named_boxes(processor, "Kate: 0 0 15 31\nTom: 16 0 31 31", of_both)
    assert both == (NamedBox(left, "Kate"), NamedBox(right, "Tom"))
    assert named_boxes(processor, "by the door", of_kate) == ()
    drawn = draw_boxes(Image.new("RGB", (width, height), "white"), both, ["Kate", "Tom"])
    colours = [drawn.getpixel((x, height - 1)) for x in (1, width - 1)]
    assert len({*colours, (255, 255, 255)}) == 3


def test_an_answer_with_identity_maps(built, root):
    model, processor = built
    cast, scene = of_cast(root, 1)
    with BatchingEngine(model, processor) as engine:
        pieces = []
        answer = answer_question(
            engine,
            "Where is Kate?",
            images=[scene],
            identities=cast,
            options=GenerationOptions(max_new_tokens=6),
            with_identity_maps=True,
            on_text=pieces.append,
            timeout=60,
        )
        bank = IdentityBank(model, processor)
        for name, photos in cast.items():
            bank.add(name, photos)
        with_bank = answer_question(
            engine, "Where is Kate?", images=[scene], bank=bank, with_identity_maps=True, timeout=60,
            options=GenerationOptions(max_new_tokens=6),
        )  # fmt: skip
        prompt = PromptEncoder(processor).encode(turn("Where?"))
        with pytest.raises(ValueError, match="introduces no identity"):
            engine.run(lambda: identity_maps(engine, prompt)).result(60)
    assert "".join(pieces) == answer.text == with_bank.text
    (found,) = answer.identity_maps
    assert found.names == ("Kate", "Tom")
    assert found.shares.shape[2] == 3
    torch.testing.assert_close(found.shares.sum(-1), torch.ones(found.shares.shape[:2]))
    torch.testing.assert_close(found.shares, with_bank.identity_maps[0].shares, atol=1e-4, rtol=1e-3)
    drawn = draw_identity_map(scene, found, "Kate")
    assert drawn.size == scene.size
    assert drawn.tobytes() != scene.convert("RGB").tobytes()
    with pytest.raises(ValueError, match="name='Bob' is not in the prompt"):
        found.share("Bob")


def test_banks_are_kept_where_asked_and_deleted_for_good(engine, root, tmp_path):
    store = BankStore(engine, folder=tmp_path / "banks", max_banks=2)
    photos = {"Kate": [root / "kate.png", root / "other.png"], "Tom": [root / "tom.png"]}
    store.create("office", photos, keep=True)
    store.create("visit", photos)
    assert store.names() == ["office", "visit"]
    assert [path.name for path in (tmp_path / "banks").iterdir()] == ["office"], "only the one that asked for it"
    again = BankStore(engine, folder=tmp_path / "banks")
    assert again.names() == ["office"]
    loaded = again.get("office").bank
    kept = store.get("office").bank
    for name in photos:
        of_both = zip(loaded.photos(name), kept.photos(name), strict=True)
        assert all(torch.equal(mine.features, other.features) for mine, other in of_both)
    for call, error in (
        (lambda: store.create("third", photos), TooManyBanks),
        (lambda: store.create("office", photos), FileExistsError),
        (lambda: store.create("../out", photos), ValueError),
        (lambda: store.create("empty", {}), ValueError),
        (lambda: BankStore(engine).create("kept", photos, keep=True), PermissionError),
        (lambda: store.get("nowhere"), KeyError),
        (lambda: store.delete("nowhere"), KeyError),
    ):
        with pytest.raises(error):
            call()
    alive = [weakref.ref(photo) for name in photos for photo in kept.photos(name)]
    del kept, of_both  # a zip holds the pair that it returned last
    store.delete("office")
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    assert list((tmp_path / "banks").iterdir()) == []
    (tmp_path / "banks" / ".unfinished-1").mkdir()
    BankStore(engine, folder=tmp_path / "banks")
    assert list((tmp_path / "banks").iterdir()) == [], "what a killed process left is removed"
