"""Mutated records of every format, from the file to supervision targets: used, or a DataError with file and line."""

import copy
import functools
import json
import random
import resource
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from idavlm.data import READERS, DataError, RecordDataset, RecordStream
from idavlm.experimental.small_models import small_image_processor, small_tokenizer
from idavlm.models import IDAVLMProcessor
from idavlm.models.image_batch import ImageBatch
from idavlm.models.supervision import target_identity_map
from tests.fuzz import fuzz_settings
from tests.small_models import TEXTS, record

# Records -------------------------------------------------------------------------------------------------------------

QUESTION = "Kate is <img>kate.png</img>\nTom is <img>tom.png</img>\n<img>scene.png</img>\nWhere is Kate?"
LLAVA = [{"from": "human", "value": "<image>\nWho is this?"}, {"from": "gpt", "value": "Kate."}]
YI_VL = [{"from": "human", "value": "<image_placeholder>\nWho?"}, {"from": "assistant", "value": "Kate."}]
MMID = {"id": 3, "image_1": "kate.png", "image_2": "scene.png", "image_3": "other.png", "ground_target": "Kate"}
MMID_QUESTION = "Kate is <img>image_1</img>\n<img>image_3</img> <img>image_2</img>\nWhere is she?"
WITH_IMAGE = [{"type": "image_url", "image_url": {"url": "scene.png"}}, {"type": "text", "text": "Who?"}]
GREETED = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Kate."}]
MESSAGES = [{"role": "user", "content": "<image>Who is this?"}, {"role": "assistant", "content": "Kate."}]
PARTS = [{"type": "image", "identity": "Tom"}, {"type": "image"}, {"type": "text", "text": "Who?"}]
PARTS = [{"type": "identity", "name": "Kate", "images": ["kate.png"]}, *PARTS]
SWIFT = [
    {"role": "user", "content": "<image>Find <ref-object> and <ref-object>."},
    {"role": "assistant", "content": "<bbox> and <bbox>"},
]
BOXES, UNIT_BOXES = [[1, 2, 30, 40], [30, 5, 60, 55]], [[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]]
VALID = {
    "idavlm": [
        record(),
        record(answer=False),
        {"id": "g", "messages": record()["messages"][2:], "meta": {"any": ["thing"]}},
        {
            "identities": [{"name": "Kate", "images": ["kate.png", "thin.png"]}],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "image", "image": name} for name in ("scene.png", "thin.png")]},
                {"role": "assistant", "content": [{"type": "box", "name": "Kate", "image": "thin.png"}]},
            ],
            "boxes": [{"name": "Kate", "image": name, "box": [0, 0, 1, 50]} for name in ("scene.png", "thin.png")],
        },
    ],
    "llava": [
        {"id": 1, "image": "scene.png", "conversations": LLAVA},
        [{"id": 1, "image": "scene.png", "conversations": LLAVA}, {"image": "", "conversations": GREETED}],
    ],
    "yi_vl": [{"id": 1, "image": ["scene.png"], "conversations": YI_VL}],
    "sharegpt": [{"images": ["scene.png"], "system": "Be brief.", "conversations": LLAVA}],
    "messages": [
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": WITH_IMAGE},
                {"role": "assistant", "content": [{"type": "text", "text": "Kate."}]},
            ]
        },
        {"messages": MESSAGES, "images": ["scene.png"], "identities": [{"name": "Kate", "images": ["kate.png"]}]},
        {
            "prompt": [{"role": "user", "content": PARTS}],
            "completion": MESSAGES[1:],
            "images": ["tom.png", "scene.png"],
        },
        {"prompt": "Who?", "completion": "Kate.", "image": "scene.png", "boxes": []},
    ],
    "ms_swift": [
        {"messages": SWIFT, "images": ["scene.png"], "objects": {"ref": ["Kate", "Tom"], "bbox": BOXES}},
        {
            "messages": SWIFT,
            "images": [{"path": "scene.png", "bytes": None}],
            "objects": {"ref": ["Kate", "Tom"], "bbox": UNIT_BOXES, "bbox_type": "norm1", "image_id": [0, 0]},
            "identities": [{"name": "Kate", "images": ["kate.png"]}],
        },
    ],
    "alpaca": [
        {
            "instruction": "<image>Who?",
            "input": "Be brief.",
            "output": "Kate.",
            "history": [["Hi", "Hello."], ["<image>", "A scene."]],
            "images": ["scene.png", "other.png"],
            "system": "Look.",
            "identities": [{"name": "Kate", "images": ["kate.png"]}],
            "boxes": [{"name": "Kate", "image": 0, "box": [1, 2, 30, 40]}],
        }
    ],
    "qwen_vl": [
        {
            "conversations": [
                {"from": "user", "value": QUESTION},
                {"from": "assistant", "value": "<box>(1,2),(3,4)</box>"},
            ]
        }
    ],
    "mmid": [
        {**MMID, "type": "location", "question": MMID_QUESTION, "answer": "[10, 10, 35, 55]"},
        {**MMID, "type": "matching", "question": MMID_QUESTION, "answer": "Image 2"},
        {**MMID, "type": "QA_singleimage", "question": MMID_QUESTION, "answer": "x", "false answers": "y / z/w"},
    ],
}

# Mutations -----------------------------------------------------------------------------------------------------------

IMAGES = ["kate.png", "scene.png", "thin.png", "tiny.png", "strip.png", "deep.png", "float.tif", "cut.png", "text.png"]
IMAGES += ["missing.png", "folder", "../outside.png", "/etc/passwd", "C:x", "http://x/y.png", "data:,", "a" * 5000, "."]
STRINGS = [*IMAGES, "", " ", "Kate", "kate", "Kate ", "Tom", "\ud83d", "\udc00x", "\0", "é", "e\u0301", "😀", "\u2028"]
STRINGS += ["<image>", "<ima", "ge>", "<|end|>", "<|assistant|>", "<|user|>Hi", "<img>", "</img>", "<img></img>"]
STRINGS += ["Kate is <img>kate.png</img>\n", "Kate is <img>", "[", "[1, 2, 3, 4]", "[0, 0, 1e400, 5]", "Image 1", " / "]
STRINGS += ["{{ x }}", "{% if %}", "{name}", "{", "x" * 3000, " " * 3000, "<image>" * 300, "\n\n", "@digits@", "\ufeff"]
STRINGS += [
    "<ref-object>",
    "<bbox>",
    "小明是<img>kate.png</img>",
    "Kate is <img>kate.png</img>, Tom is <img>tom.png</img>",
]
STRINGS += ["user", "assistant", "system", "human", "gpt", "text", "image", "box", "identity", "general", "location"]
STRINGS += [
    "norm1",
    "real",
    "matching",
    "qa_single",
    "image_url",
    "image_1",
    "<img>image_1</img>",
    "<img>image_9</img>",
]
NUMBERS = [0, 1, -1, 2, 10, 60, 80, 59.9999999, 79.9999999, 1e-9, 1e-40, 1e-300, 0.5, 1e10, 2**31, 2**63, 2**64, 1e308]
NUMBERS += [10**400, float("nan"), float("inf"), float("-inf"), 10.0000001, 10, 35, 55, 200, 199.99999999, True, False]
OTHERS = [None, [], {}, [[]], [None], ["x"], {"x": 1}, [0, 0, 1, 50], [1, 2, 3], "@nested@", "@digits@"]
KEYS = ["id", "source", "type", "identities", "messages", "boxes", "meta", "answer", "false_answers", "target", "name"]
KEYS += ["images", "image", "role", "content", "text", "box", "from", "value", "conversations", "system", "url", "x"]
KEYS += ["prompt", "completion", "objects", "ref", "bbox", "bbox_type", "image_id", "relative", "identity", "history"]
KEYS += [
    "instruction",
    "input",
    "output",
    "image_url",
    "question",
    "false answers",
    "ground_target",
    "image_1",
    "image_2",
    "\ud83d",
    "",
]


def value_of(rng: random.Random):
    return copy.deepcopy(rng.choice(rng.choice([STRINGS, NUMBERS, OTHERS])))


def containers_of(value):
    """All objects and lists within a record."""
    if isinstance(value, (dict, list)):
        yield value
        for entry in value.values() if isinstance(value, dict) else value:
            yield from containers_of(entry)


def changed_text(rng: random.Random, text: str) -> str:
    start, end = sorted(rng.randint(0, len(text)) for _ in range(2))
    if rng.random() < 0.5:
        return text[:start] + rng.choice(STRINGS) + text[start:]
    return text[:start] + rng.choice(["", *STRINGS]) + text[end:]


def changed_number(rng: random.Random, number):
    if number != number or abs(number) > 2**64:
        return rng.choice(NUMBERS)
    return rng.choice([-number, number * 1e-8, number + 1e-7, number + rng.choice([1, 10, 1e-9]), rng.choice(NUMBERS)])


def mutate(rng: random.Random, value) -> None:
    """Change one entry of a record in place."""
    container = rng.choice([entry for entry in containers_of(value) if entry] or [value])
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    if not keys:
        return
    key = rng.choice(keys)
    old, action = container[key], rng.random()
    if action < 0.4:
        if isinstance(old, str):
            container[key] = changed_text(rng, old)
        elif isinstance(old, (int, float)):
            container[key] = changed_number(rng, old)
        else:
            container[key] = value_of(rng)
    elif action < 0.65:
        container[key] = value_of(rng)
    elif action < 0.75:
        del container[key]
    elif action < 0.85:
        container[key] = copy.deepcopy(rng.choice(list(containers_of(value))))
    elif isinstance(container, dict):
        container[rng.choice(KEYS)] = container.pop(key) if rng.random() < 0.5 else value_of(rng)
    else:
        container.insert(key, copy.deepcopy(old) if rng.random() < 0.5 else value_of(rng))


def line_of(rng: random.Random, reader: str) -> str:
    """A mutated record as JSON without line breaks; now and then the JSON is mutated as well."""
    entry = copy.deepcopy(rng.choice(VALID[reader]))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        mutate(rng, entry)
    line = json.dumps(entry).replace('"@nested@"', "[" * 3000 + "]" * 3000).replace('"@digits@"', "9" * 5000)
    if rng.random() < 0.05:
        line = changed_text(rng, line)
    if rng.random() < 0.05 and line.startswith("{"):
        line = '{"id": 1, ' + line[1:]
    return line.replace("\n", " ").encode("utf-8", "replace").decode()


# From the file to the targets ----------------------------------------------------------------------------------------


def draw(folder: Path) -> None:
    """Write the images that valid and mutated records refer to."""
    (folder / "folder").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in {"kate": (40, 30), "tom": (64, 64), "scene": (80, 60), "other": (30, 90)}.items():
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(folder / f"{name}.png")
    for name, size in {"thin": (1, 200), "tiny": (1, 1), "strip": (1, 5000)}.items():
        Image.new("RGB", size).save(folder / f"{name}.png")
    Image.fromarray(rng.integers(0, 65535, (9, 7), np.uint16)).save(folder / "deep.png")
    Image.new("F", (8, 8)).save(folder / "float.tif")
    (folder / "cut.png").write_bytes((folder / "scene.png").read_bytes()[:500])
    (folder / "text.png").write_text("no image at all")


class Check:
    """Reads records below a folder with several processors in turn: images stretched, cropped and padded."""

    def __init__(self, folder: Path) -> None:
        self.root, self.file = folder / "images", folder / "r.json"
        draw(self.root)
        kind, tokenizer = type(small_image_processor(32)), small_tokenizer(TEXTS, vocab_size=320)
        crop = {"height": 32, "width": 32}
        self.processors = [
            IDAVLMProcessor(kind(size=size, crop_size=crop, do_center_crop="height" not in size), tokenizer, **options)
            for size, options in (
                (crop, {"image_seq_length": 4, "box_format": "bins32", "max_length": 600}),
                ({"shortest_edge": 32}, {"image_seq_length": 4, "box_format": "qwen"}),
                ({"shortest_edge": 20}, {"image_seq_length": 1, "box_format": "square"}),
            )
        ]
        for processor in self.processors:
            processor.image_loader = functools.lru_cache(maxsize=None)(processor.load_image)

    def __call__(self, rng: random.Random, reader: str) -> str:
        """Read one mutated record and return the outcome: ``"used"`` or the kind of the DataError."""
        line, processor = line_of(rng, reader), rng.choice(self.processors)
        is_list = rng.random() < 0.3
        self.file.write_text(f"[{line}]" if is_list else f"\n{line}\n", encoding="utf-8")
        try:
            unused = rng.choice(["raise", "warn"])
            data = RecordDataset(self.file, self.root, encode=processor.encode, reader=reader, unused_fields=unused)
            batches = [[data[index] for index in range(len(data))]]
            prompts = [data.sample(index) for index in range(len(data)) if data.sample(index).is_evaluation]
            batches += [[processor.encode(sample, add_generation_prompt=True)] for sample in prompts]
        except DataError as error:
            self.check_message(str(error))
            return error.kind
        for encoded in batches:
            self.check_targets(processor.collate(encoded))
        return "used"

    def of_table(self, rng: random.Random) -> str:
        """Read a table of mutated records, which holds images, as a whole and as a stream."""
        datasets = pytest.importorskip("datasets")
        reader, processor = rng.choice(sorted(VALID)), rng.choice(self.processors)
        entry = copy.deepcopy(rng.choice([entry for entry in VALID[reader] if isinstance(entry, dict)]))
        self.hold_images(rng, entry)
        for _ in range(rng.choice([0, 1, 1, 2])):
            mutate(rng, entry)
        try:
            table = datasets.Dataset.from_list([entry, entry])
        except (ArithmeticError, TypeError, ValueError):  # of pyarrow: values of several types, large integers
            return "no table"
        try:
            data = RecordDataset(table, self.root, encode=processor.encode, reader=reader)
            processor.collate([data[0], data[1]])
            streamed = RecordStream(table.to_iterable_dataset(), self.root, encode=processor.encode, reader=reader)
            assert [list(sample) for sample in streamed] == [list(data[0])] * 2
        except DataError as error:
            problem = error
        else:
            return "used"
        assert str(problem).startswith(("dataset[", "stream[", "no record of the data set")), problem
        return problem.kind

    def hold_images(self, rng: random.Random, value) -> None:
        """Replace some paths of images within a record by the images."""
        for container in list(containers_of(value)):
            for key in list(container) if isinstance(container, dict) else range(len(container)):
                path = container[key]
                is_file = isinstance(path, str) and path in IMAGES and (self.root / path).is_file()
                if is_file and key not in ("name", "url") and rng.random() < 0.5:
                    data = (self.root / path).read_bytes()
                    container[key] = {"bytes": data, "path": rng.choice([path, None, "/x/y.png"])}

    def check_targets(self, batch: dict) -> None:
        images = ImageBatch(
            features=torch.zeros(len(batch["image_roles"]), 16, 1),
            grid_size=(4, 4),
            **{name: batch[name] for name in ("image_roles", "sample_index", "identity_index")},
        )
        fields = [batch[name] for name in ("boxes", "box_image", "box_identity", "image_sizes")]
        assert target_identity_map(images, *fields).shape == (len(batch["image_roles"]), 16)

    def check_message(self, message: str) -> None:
        assert message.startswith((f"{self.file}:", f"{self.file}[", f"no record of {self.file}", str(self.file))), (
            message
        )
        assert len(message) < 2500 + 3 * len(str(self.file)), message
        assert message.encode()  # it can be printed


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    return Check(tmp_path_factory.mktemp("records"))


@pytest.mark.filterwarnings("ignore")
@fuzz_settings(300)
@given(rng=st.randoms(use_true_random=False), reader=st.sampled_from(sorted(READERS)))
def test_a_mutated_record_is_used_or_a_data_error(check, rng, reader):
    check(rng, reader)


@pytest.mark.filterwarnings("ignore")
@fuzz_settings(20)
@given(rng=st.randoms(use_true_random=False))
def test_a_mutated_table_is_used_or_a_data_error(check, rng):
    check.of_table(rng)


@pytest.mark.filterwarnings("ignore")
@fuzz_settings(15)
@given(rng=st.randoms(use_true_random=False), reader=st.sampled_from(sorted(READERS)))
def test_mutated_records_among_valid_ones_are_skipped(check, rng, reader):
    processor = check.processors[0]
    lines = [json.dumps(VALID[reader][0])]
    for _ in range(8):
        lines += [line_of(rng, reader), lines[0]]
    check.file.write_text("\n".join(lines), encoding="utf-8")
    data = RecordDataset(check.file, check.root, encode=processor.encode, reader=reader, on_error="skip")
    batch = processor.collate([data[index] for index in range(len(data))])
    assert len(batch["input_ids"]) >= 9
    assert data.errors.total <= 8


def run(count: int, seed: int) -> Counter:
    """Read ``count`` mutated records of all formats in turn; returns how often each outcome occurred.

    Every tenth record is a table. Fails if one takes more than 10 seconds of CPU time, or all more than 1 GB.
    """
    rng, outcomes, readers = random.Random(seed), Counter(), sorted(READERS)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check = Check(Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            reader = readers[number % len(readers)]
            state, start = rng.getstate(), time.process_time()
            try:
                outcome = f"table: {check.of_table(rng)}" if number % 10 == 9 else f"{reader}: {check(rng, reader)}"
            except Exception:
                rng.setstate(state)
                print(f"record {number}, {reader}: {check.file.read_text()[:3000]}")
                raise
            outcomes[outcome] += 1
            assert time.process_time() - start < 10, f"record {number} ({outcome}) took more than 10 seconds"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert peak < 1_000_000, f"{count} records took {peak} KB"
        outcomes["KB of memory at most"] = peak
    return outcomes
