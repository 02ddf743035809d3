"""Records of tables: parquet files, datasets.Dataset, streams, and the images that they hold."""

import base64
import functools
import http.server
import io
import json
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from idavlm.data import DataError, ImageStore, RecordDataset, RecordImages, RecordStream
from idavlm.data.table_records import take_images
from idavlm.training import IDTrainer, IDTrainingArguments
from idavlm.training.checkpoints import describe_dataset
from tests.small_models import IMAGES, draw_images, small_model, small_processor

datasets = pytest.importorskip("datasets")

SIZE = (20, 10)


def png(colour, size=SIZE):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def first_pixel(image):
    return image.getpixel((0, 0))


def rows(count=3):
    """Records with images as datasets stores them."""
    return [
        {
            "id": f"r{number}",
            "messages": [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "Kate."}],
            "images": [{"bytes": png((number, 0, 0)), "path": None}],
        }
        for number in range(count)
    ]


def features(of_images):
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    return datasets.Features({"id": datasets.Value("string"), "messages": [turn], "images": of_images})


@pytest.fixture(scope="module", params=["bytes", "Image", "undecoded Image", "struct"])
def table(request):
    """One data set per way of storing images."""
    kinds = {
        "bytes": [datasets.Value("binary")],
        "Image": [datasets.Image()],
        "undecoded Image": [datasets.Image(decode=False)],
        "struct": [{"bytes": datasets.Value("binary"), "path": datasets.Value("string")}],
    }
    found = rows()
    if request.param == "bytes":
        found = [{**row, "images": [row["images"][0]["bytes"]]} for row in found]
    return datasets.Dataset.from_list(found, features=features(kinds[request.param]))


def check(data):
    """Samples with one image each, whose colour is the number of the sample."""
    assert len(data) == 3
    for number in range(3):
        sample = data.sample(number)
        assert (sample.id, sample.images) == (f"r{number}", ["image 0"])
        assert first_pixel(ImageStore(sample.image_root).open("image 0")) == (number, 0, 0)
        assert ImageStore(sample.image_root).size("image 0") == (10, 20)


def test_a_dataset_with_images(table):
    check(RecordDataset(table, reader="messages"))


def test_parquet_files_and_folders(table, tmp_path):
    table.to_parquet(tmp_path / "all.parquet")
    check(RecordDataset(tmp_path / "all.parquet", reader="messages"))
    (tmp_path / "parts").mkdir()
    for part in range(3):
        table.select([part]).to_parquet(tmp_path / "parts" / f"{part}.parquet")
    data = RecordDataset(tmp_path / "parts", reader="messages")
    check(data)
    assert data.sample(0).image_root.root == tmp_path / "images"


def test_a_stream(table):
    stream = RecordStream(table.to_iterable_dataset(num_shards=3), reader="messages")
    samples = list(stream)
    assert [sample.id for sample in samples] == ["r0", "r1", "r2"]
    assert [first_pixel(ImageStore(sample.image_root).open("image 0"))[0] for sample in samples] == [0, 1, 2]
    assert [sample.id for sample in stream] == ["r0", "r1", "r2"], "a second pass"


def test_workers_divide_the_shards_of_a_stream():
    table = datasets.Dataset.from_list(rows(6))
    stream = RecordStream(table.to_iterable_dataset(num_shards=2), reader="messages", encode=identifier)
    loader = DataLoader(
        stream,
        batch_size=1,
        num_workers=2,
        collate_fn=list,
        multiprocessing_context="fork",
    )
    assert sorted(entry["id"] for batch in loader for entry in batch) == [f"r{number}" for number in range(6)]


def identifier(sample):
    """An encoded sample without tensors."""
    return {"name": sample.id}


def test_a_shuffled_stream_has_another_order_in_every_epoch():
    table = datasets.Dataset.from_list(rows(8))
    stream = RecordStream(table.to_iterable_dataset(num_shards=8).shuffle(seed=1, buffer_size=4), reader="messages")
    first = [sample.id for sample in stream]
    stream.set_epoch(1)
    second = [sample.id for sample in stream]
    assert first != second
    assert sorted(first) == sorted(second)
    stream.set_epoch(0)
    assert [sample.id for sample in stream] == first


def test_faults_in_a_table_are_named_and_skipped():
    table = datasets.Dataset.from_list([*rows(2), {**rows(1)[0], "messages": []}])
    with pytest.raises(DataError, match=r"^dataset\[2\]: messages has no user turn"):
        RecordDataset(table, reader="messages")
    with pytest.warns(UserWarning, match="the data set: 1 skipped"):
        assert len(RecordDataset(table, reader="messages", on_error="skip")) == 2
    stream = RecordStream(table.to_iterable_dataset(), reader="messages")
    with pytest.raises(DataError, match=r"^stream\[2\]: messages has no user turn"):
        list(stream)
    stream = RecordStream(table.to_iterable_dataset(), reader="messages", on_error="skip")
    with pytest.warns(UserWarning, match=r"skipped: stream\[2\]"):
        assert len(list(stream)) == 2
    assert stream.error_counts == {"record": 1}


def test_columns_that_the_reader_does_not_use():
    table = datasets.Dataset.from_list([{**row, "license": "CC"} for row in rows()])
    with pytest.raises(DataError, match=r"dataset\[0\]: the reader does not use the fields 'license'"):
        RecordDataset(table, reader="messages")
    with pytest.warns(UserWarning, match="does not use the fields 'license' in 3 records"):
        data = RecordDataset(table, reader="messages", unused_fields="warn")
    assert data.unused_field_counts == {"license": 3}
    stream = RecordStream(table.to_iterable_dataset(), reader="messages", unused_fields="warn")
    with pytest.warns(
        UserWarning, match=r"stream\[0\]: the reader 'messages' does not use the fields 'license'"
    ) as found:
        assert len(list(stream)) == 3
    assert len(found) == 1


def test_records_of_the_schema_in_a_table():
    """Arrow fills the fields that only other parts have with null. Boxes name the image by its stored path."""
    record = {
        "identities": [{"name": "Kate", "images": [{"bytes": png("red"), "path": "k.png"}]}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "image",
                        "image": {"bytes": png("blue"), "path": "/home/me/s.png"},
                        "text": None,
                        "name": None,
                    },
                    {"type": "text", "text": "Where is Kate?", "image": None},
                ],
            },
            {"role": "assistant", "content": [{"type": "box", "name": "Kate", "text": None}]},
        ],
        "boxes": [{"name": "Kate", "image": "s.png", "box": [1.0, 2.0, 3.0, 4.0]}],
    }
    sample = RecordDataset(datasets.Dataset.from_list([record, record])).sample(1)
    assert sample.images == ["k.png", "s.png"]
    assert first_pixel(ImageStore(sample.image_root).open("s.png")) == (0, 0, 255)
    assert sample.boxes[0].image == "s.png"


def test_a_table_of_paths(tmp_path):
    Image.new("RGB", SIZE, "red").save(tmp_path / "a.png")
    messages = rows(1)[0]["messages"]
    for images in (["a.png"], [{"bytes": None, "path": "a.png"}]):
        data = RecordDataset(datasets.Dataset.from_list([{"messages": messages, "images": images}]), tmp_path,
                             reader="messages")  # fmt: skip
        assert data.sample(0).image_root == tmp_path
        assert first_pixel(ImageStore(data.sample(0).image_root).open("a.png")) == (255, 0, 0)
    data = RecordDataset(datasets.Dataset.from_list([{"messages": messages, "images": ["a.png"]}]), reader="messages")
    assert data.sample(0).image_root is None


def test_images_with_equal_or_foreign_paths_get_numbers():
    one, two = png("red"), png("blue")
    record = [{"bytes": one, "path": "x.png"}, {"bytes": two, "path": "x.png"}, {"bytes": one, "path": "../../y.png"}]
    taken, images = take_images({"images": record, "other": two})
    assert taken == {"images": ["image 0", "image 1", "y.png"], "other": "image 3"}
    assert images == {"image 0": one, "image 1": two, "y.png": one, "image 3": two}
    photo = Image.new("RGB", SIZE)
    assert take_images([photo]) == (["image 0"], {"image 0": photo})
    assert take_images({"a": {"path": "x"}, "b": {"path": "x", "c": 1}}) == ({"a": "x", "b": {"path": "x", "c": 1}}, {})


def test_a_cache_of_loaded_images_finds_the_images_of_records_that_are_read_again():
    data = RecordDataset(datasets.Dataset.from_list(rows()), reader="messages")
    loads = []

    @functools.cache
    def load(root, path):
        loads.append(path)
        return first_pixel(ImageStore(root).open(path))

    for _ in range(2):
        assert [load(sample.image_root, "image 0")[0] for sample in data] == [0, 1, 2]
    assert len(loads) == 3
    photo = Image.new("RGB", SIZE)
    assert RecordImages(None, {"a": photo}) == RecordImages(None, {"a": photo})
    assert RecordImages(None, {"a": photo}) != RecordImages(None, {"a": photo.copy()})
    assert RecordImages(None) != RecordImages(None, allow_urls=True)
    assert RecordImages(None) != "a"


def test_a_broken_image_of_a_table_is_an_error_of_its_record():
    row = {**rows(1)[0], "images": [{"bytes": png("red")[:40], "path": None}]}

    def encode(sample):
        return {"image": ImageStore(sample.image_root).open(sample.images[0])}

    data = RecordDataset(datasets.Dataset.from_list([row]), reader="messages", encode=encode)
    with pytest.raises(DataError, match=r"^dataset\[0\]: image 'image 0' is not an image or is damaged") as caught:
        data[0]
    assert caught.value.kind == "image"


def test_opening_a_table_does_not_read_its_images(monkeypatch):
    """The bytes would otherwise be read once more than needed; here they are no image, and are not looked at."""
    seen = []

    def recorded(record):
        taken, images = take_images(record)
        seen.extend(images.values())
        return taken, images

    monkeypatch.setattr("idavlm.data.dataset.take_images", recorded)
    data = RecordDataset(datasets.Dataset.from_list(rows()), reader="messages")
    assert seen == [b""] * 3
    data.sample(1)
    assert seen[3] == png((1, 0, 0))


def test_a_transform_of_the_data_set_is_refused():
    table = datasets.Dataset.from_list(rows()).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match=r"the data set has a transform .*; apply it with map\(\), or remove it"):
        RecordDataset(table, reader="messages")


def test_selected_columns_and_indices_are_followed():
    table = datasets.Dataset.from_list([{**row, "license": "CC"} for row in rows(5)])
    table = table.select([4, 0]).with_format("torch", columns=["id", "messages", "images"])
    data = RecordDataset(table, reader="messages")
    assert [sample.id for sample in data] == ["r4", "r0"]


def test_files_that_are_no_parquet(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(DataError, match=r"x.parquet cannot be read as parquet .*; repair it") as caught:
        RecordDataset(tmp_path / "x.parquet")
    assert caught.value.kind == "json"
    with pytest.raises(DataError, match=r"none.parquet does not exist or holds no .parquet files"):
        RecordDataset(tmp_path / "none.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty does not exist or holds no .parquet files"):
        RecordDataset(tmp_path / "empty")


def test_a_stream_must_be_a_stream():
    with pytest.raises(ValueError, match=r"records is Dataset; pass a datasets.IterableDataset, or use RecordDataset"):
        RecordStream(datasets.Dataset.from_list(rows()))


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"need the package datasets; install idavlm\[data\]"):
        RecordDataset(tmp_path / "x.parquet")


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """Address of a server that answers every request for a ``.png`` with one image."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path.endswith(".png") else 404)
            self.end_headers()
            self.wfile.write(png("green"))

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def test_urls_are_loaded_only_if_they_are_allowed(server, tmp_path):
    inline = "data:image/png;base64," + base64.b64encode(png("red")).decode()
    records = [
        {"image": image, "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A."}]}
        for image in (f"{server}/a.png", inline)
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(DataError, match=r"r.jsonl:1: .* is a URL; .*or pass allow_urls=True to RecordDataset"):
        RecordDataset(tmp_path / "r.jsonl", reader="llava")
    data = RecordDataset(tmp_path / "r.jsonl", reader="llava", allow_urls=True)
    for sample, colour in zip(data, ((0, 128, 0), (255, 0, 0)), strict=True):
        store = ImageStore(sample.image_root)
        assert first_pixel(store.open(sample.images[0])) == colour
        assert store.has(sample.images[0])
        assert store.size(sample.images[0]) == (10, 20)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("file:///etc/passwd", "must begin with https:// or http://"),
        ("data:image/png;base64,??", "is not valid base64 text"),
        ("http://127.0.0.1:1/a.png", "cannot be downloaded"),
        ("http://", "cannot be downloaded"),
    ],
)
def test_urls_that_cannot_be_loaded(path, problem):
    with pytest.raises(DataError, match=problem) as caught:
        ImageStore(RecordImages(None, allow_urls=True)).open(path)
    assert caught.value.kind == "image"


def test_a_status_of_the_server_is_named(server):
    with pytest.raises(DataError, match=r"a.txt' cannot be downloaded .*404"):
        ImageStore(RecordImages(None, allow_urls=True)).open(f"{server}/a.txt")


# --- Resuming --------------------------------------------------------------------------------------------------------


def test_the_description_of_a_data_set_follows_its_content(tmp_path):
    tables = {name: datasets.Dataset.from_list(rows(count)) for name, count in (("a", 3), ("b", 3), ("c", 2))}
    described = {name: describe_dataset(RecordDataset(table, reader="messages")) for name, table in tables.items()}
    assert described["a"] == described["b"] != described["c"]
    assert described["a"].startswith("RecordDataset of 3 samples, fingerprint ")
    tables["a"].to_parquet(tmp_path / "a.parquet")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "x.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    one, two = (RecordDataset(path, reader="messages") for path in (tmp_path / "a.parquet", tmp_path / "copy"))
    assert describe_dataset(one) == describe_dataset(two)
    assert "file hash" in describe_dataset(one)
    stream = RecordStream(tables["a"].to_iterable_dataset(num_shards=2), reader="messages")
    assert describe_dataset(stream).startswith("RecordStream, stream of 2 shards")


def test_data_sets_of_tables_can_be_pickled():
    """As for worker processes that are spawned."""
    data = RecordDataset(datasets.Dataset.from_list(rows()), reader="messages")
    stream = RecordStream(datasets.Dataset.from_list(rows()).to_iterable_dataset(), reader="messages")
    for again in (pickle.loads(pickle.dumps(data)), pickle.loads(pickle.dumps(stream))):
        assert [sample.id for sample in again] == ["r0", "r1", "r2"]
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again._valid, data._valid)


def table_of_training_records(folder):
    """Eight records with their images."""
    draw_images(folder, IMAGES)
    photos = {name: {"bytes": (folder / name).read_bytes(), "path": name} for name in IMAGES}
    rows = []
    for number in range(8):
        people = [("Kate", "Tom"), ("Tom",)][number % 2]
        identities = [{"name": name, "images": [photos[f"{name.lower()}.png"]]} for name in people]
        question, answer = f"<image>What is {people[0]} doing?", f"{people[0]} is reading."
        rows.append(
            {
                "id": str(number),
                "identities": identities,
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                "images": [photos["scene.png"]],
                "boxes": [{"name": people[0], "image": "scene.png", "box": [10, 10, 35, 55]}],
            }
        )
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_a_resumed_run_reads_the_samples_that_follow(tmp_path, kind):
    table = table_of_training_records(tmp_path / "images")
    processor = small_processor()

    def train(folder, **resume):
        if kind == "table":
            data = RecordDataset(table, reader="messages", encode=processor.encode)
        else:
            shuffled = table.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=4)
            data = RecordStream(shuffled, reader="messages", encode=processor.encode)
        arguments = IDTrainingArguments(
            str(tmp_path / folder), max_steps=6, save_steps=3, per_device_train_batch_size=2, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, accelerator_config={"dispatch_batches": False},
        )  # fmt: skip
        trainer = IDTrainer(small_model(processor), arguments, train_dataset=data, processing_class=processor)
        trainer.train(**resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, trainer.model.state_dict()

    losses, weights = train("whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed, resumed_weights = train("resumed", resume_from_checkpoint=True)
    assert resumed == losses
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_a_table_and_a_file_encode_to_the_same_tensors(tmp_path):
    table = table_of_training_records(tmp_path / "images")
    processor = small_processor()
    rows = [
        {
            **row,
            "identities": [
                {"name": identity["name"], "images": [photo["path"] for photo in identity["images"]]}
                for identity in row["identities"]
            ],
            "images": ["scene.png"],
        }
        for row in table.to_list()
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = RecordDataset(tmp_path / "r.jsonl", reader="messages", encode=processor.encode)
    tables = RecordDataset(table, reader="messages", encode=processor.encode)
    for one, two in zip(files, tables, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name], name
