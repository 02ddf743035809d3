"""Features stored on disk equal those of the tower, and are refused if they come from another one."""

import errno
import json
import os
import pickle
import re
import shutil
from dataclasses import replace

import pytest
import torch

from idavlm.data import DataError, RecordDataset, RecordImages, parse_sample
from idavlm.evaluation import evaluate, identity_maps
from idavlm.experimental.small_models import small_image_processor
from idavlm.models import ImageFeatures, image_features
from idavlm.training import IDTrainer, IDTrainingArguments
from tests.interrupted_run import write_data
from tests.small_models import IMAGES, draw_images, sample, small_model, small_processor


@pytest.fixture
def model(processor):
    return small_model(processor)


@pytest.fixture
def stored(processor, model, root, tmp_path):
    """A processor like ``processor`` that uses stored features."""
    stored = small_processor()
    stored.image_loader = ImageFeatures.write(tmp_path / "features", model, processor, [sample(root)], batch_size=2)
    return stored


@pytest.fixture
def text():
    """A sample without images."""
    messages = [{"role": "user", "content": "What is Tom doing?"}, {"role": "assistant", "content": "Tom is waving."}]
    return parse_sample({"id": "text", "source": "general", "messages": messages}, where="test.jsonl:2")


def test_losses_and_gradients_are_those_of_the_images(model, processor, stored, root, text):
    model.vision_tower.requires_grad_(False)
    results = []
    for prepare in (processor, stored):
        model.zero_grad()
        batch = prepare.collate([prepare.encode(sample(root)), prepare.encode(text)])
        result = model(**batch)
        result.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": result.loss.detach(), **gradients})
    assert ("pixel_values" in batch) < ("image_features" in batch)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_batch_of_text_alone(model, stored, text):
    batch = stored.collate([stored.encode(text)])
    assert batch["image_features"].shape == (0, 64, 32)
    assert model(**batch).loss.isfinite()


def test_answers_and_maps_are_those_of_the_images(model, processor, stored, root):
    asked = [sample(root, answer=False)]
    expected, result = (evaluate(model, one, asked, max_new_tokens=6) for one in (processor, stored))
    assert result.predictions == expected.predictions
    (expected, grid), (maps, same_grid) = (identity_maps(model, one, asked[0]) for one in (processor, stored))
    assert grid == same_grid == (8, 8)
    assert abs(maps[0] - expected[0]).max() < 1e-5


def test_they_are_opened_again_from_disk(model, processor, stored, root):
    folder = stored.image_loader.folder
    again = ImageFeatures(folder, model, processor)
    seen, size = again(root, "scene.png")
    assert torch.equal(seen, stored.image_loader(root, "scene.png")[0])
    assert size == (60, 80)
    assert again.shape == (3, 64, 32)


def test_images_within_records_have_no_features(model, processor, stored, root, tmp_path):
    held = replace(sample(root), image_root=RecordImages(root))
    for use in (
        lambda: stored.encode(held),
        lambda: ImageFeatures.write(tmp_path / "others", model, processor, [held]),
    ):
        with pytest.raises(DataError, match=r"'kate.png' is held by its record or is a URL; ImageFeatures needs image"):
            use()


def test_the_processor_is_saved_without_them(stored, tmp_path):
    stored.save_pretrained(tmp_path / "processor")
    assert type(stored).from_pretrained(tmp_path / "processor").image_loader is None


def test_features_of_another_tower_are_refused(model, processor, stored):
    with torch.no_grad():
        next(model.vision_tower.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"another vision tower.*write them again"):
        ImageFeatures(stored.image_loader.folder, model, processor)


def test_an_incomplete_set_is_refused(model, processor, stored, root, monkeypatch):
    folder = stored.image_loader.folder
    succeeds = iter([True, False])

    def broken(pixels):
        if next(succeeds):
            return type(model).image_features(model, pixels)
        raise RuntimeError("killed")

    monkeypatch.setattr(model, "image_features", broken)
    with pytest.raises(RuntimeError, match="killed"):
        ImageFeatures.write(folder, model, processor, [sample(root)], batch_size=1)
    with pytest.raises(FileNotFoundError, match=r"index\.json does not exist; ImageFeatures\.write"):
        ImageFeatures(folder, model, processor)


def test_an_image_without_features(stored, root):
    other = sample(root)
    other.identities[0].images[0] = "other.png"
    with pytest.raises(DataError, match=r"image 'other\.png' below .* has no features in"):
        stored.encode(other)


def test_a_grid_that_is_not_square(model, processor, root, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "image_features", lambda pixels: (torch.zeros(len(pixels), 8, 32), (2, 4)))
    with pytest.raises(
        ValueError, match=r"an image has a grid of \(2, 4\) patches; stored features need a square grid"
    ):
        ImageFeatures.write(tmp_path / "features", model, processor, [sample(root)])


def test_samples_without_images(model, processor, tmp_path):
    with pytest.raises(ValueError, match="samples hold no images"):
        ImageFeatures.write(tmp_path / "features", model, processor, [])


def test_pixels_and_features_in_one_batch(processor, stored, root):
    with pytest.raises(ValueError, match=r"samples\[1\] lacks pixel_values"):
        processor.collate([processor.encode(sample(root)), stored.encode(sample(root))])


def test_the_type_of_the_tower_is_kept(processor, root, tmp_path):
    model = small_model(processor).to(torch.bfloat16)
    features = ImageFeatures.write(tmp_path / "features", model, processor, [sample(root)])
    assert json.loads((tmp_path / "features" / "index.json").read_text())["dtype"] == "bfloat16"
    assert features(root, "kate.png")[0].dtype == torch.bfloat16


# The files of the images and of the features -------------------------------------------------------------------------


@pytest.fixture
def written(processor, model, root, tmp_path):
    """A folder of images of its own, with features."""
    folder = shutil.copytree(root, tmp_path / "images")
    return folder, ImageFeatures.write(tmp_path / "features", model, processor, [sample(folder)])


def replaced(folder, name, *, keep_time: bool = False):
    """Write another image of the same size in place of an image."""
    path = folder / name
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_replaced_image_is_an_error(written, model, processor, keep_time):
    folder, features = written
    features(folder, "scene.png")
    replaced(folder, "scene.png", keep_time=keep_time)
    for loader in (features, ImageFeatures(features.folder, model, processor)):
        for _ in range(2):
            with pytest.raises(DataError, match=r"image 'scene\.png' below .* features of another version of the file"):
                loader(folder, "scene.png")
        loader(folder, "kate.png")
    draw_images(folder, ["scene.png"], size=(30, 20))
    with pytest.raises(DataError, match="another version of the file") as error:
        features(folder, "scene.png")
    assert (error.value.kind, error.value.file) == ("image", "scene.png")


def test_a_copied_or_touched_image_keeps_its_features(written, monkeypatch):
    """The hash is compared once."""
    folder, features = written
    expected, size = features(folder, "scene.png")
    os.utime(folder / "scene.png")
    shutil.copy(folder / "kate.png", folder / "copy.png")
    (folder / "copy.png").replace(folder / "kate.png")
    hashed = []
    monkeypatch.setattr(
        image_features, "_sha256", lambda file, sha256=image_features._sha256: hashed.append(file) or sha256(file)
    )
    for _ in range(2):
        found, found_size = features(folder, "scene.png")
        assert torch.equal(found, expected)
        assert found_size == size == (60, 80)
        features(folder, "kate.png")
        features(folder, "tom.png")
    assert hashed == [folder / "scene.png", folder / "kate.png"]


def test_the_images_themselves_are_not_needed(written):
    folder, features = written
    shutil.rmtree(folder)
    assert features(folder, "scene.png")[1] == (60, 80)


def test_original_sizes_are_in_the_index(written):
    folder, features = written
    index = json.loads((features.folder / "index.json").read_text())
    assert {key: entry[1:3] for key, entry in index["images"].items()} == {
        str(folder / name): [60, 80] for name in IMAGES[:3]
    }


def test_an_image_that_changes_while_features_are_computed(written, model, processor, monkeypatch):
    folder, features = written
    load = processor.load_image

    def load_and_replace(root, path):
        loaded = load(root, path)
        if path == "scene.png":
            replaced(folder, path)
        return loaded

    monkeypatch.setattr(processor, "load_image", load_and_replace)
    with pytest.raises(DataError, match=r"image 'scene\.png' below .* changed while its features were computed"):
        ImageFeatures.write(features.folder, model, processor, [sample(folder)])
    with pytest.raises(FileNotFoundError, match=r"index\.json does not exist"):
        ImageFeatures(features.folder, model, processor)


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["features", "index"])
def test_a_full_disk(processor, model, root, tmp_path, monkeypatch, what):
    """The error names the folder and the bytes, and nothing incomplete is left."""
    folder = tmp_path / "features"
    ImageFeatures.write(folder, model, processor, [sample(root)])
    num_bytes = (folder / "features.bin").stat().st_size
    if what == "features":
        monkeypatch.setattr(os, "posix_fallocate", no_space)
    else:
        num_bytes = len((folder / "index.json").read_text())
        monkeypatch.setattr("pathlib.Path.write_text", no_space)
    message = f"No space left on device: the features need {num_bytes:,} more bytes in {folder}, where "
    with pytest.raises(OSError, match=re.escape(message)) as error:
        ImageFeatures.write(folder, model, processor, [sample(root)])
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in folder.iterdir()] == (["features.bin"] if what == "index" else [])
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"index\.json does not exist"):
        ImageFeatures(folder, model, processor)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, None])
def test_file_systems_without_reservation_get_a_file_of_zeros_first(
    processor, model, root, tmp_path, monkeypatch, code
):
    expected = ImageFeatures.write(tmp_path / "reserved", model, processor, [sample(root)])
    if code is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", lambda *args: (_ for _ in ()).throw(OSError(code, "no")))
    features = ImageFeatures.write(tmp_path / "zeros", model, processor, [sample(root)])
    assert torch.equal(features(root, "scene.png")[0], expected(root, "scene.png")[0])


def test_space_is_reserved_before_features_are_written(processor, model, root, tmp_path):
    features = ImageFeatures.write(tmp_path / "features", model, processor, [sample(root)])
    found = (features.folder / "features.bin").stat()
    assert found.st_blocks * 512 >= found.st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "features.bin").write_bytes(b"1234"), "has 4 bytes, .* are expected"),
        (lambda folder: (folder / "features.bin").unlink(), "has 0 bytes, .* are expected"),
        (lambda folder: (folder / "index.json").write_text("{"), r"index\.json is damaged"),
        (lambda folder: (folder / "index.json").write_text("[]"), r"index\.json is damaged"),
        (lambda folder: (folder / "index.json").write_text("{}"), r"index\.json is damaged"),
        (lambda folder: (folder / "index.json").write_text('{"tower": "x"}'), "has version 1, this version .* reads"),
    ],
)
def test_a_damaged_folder_is_refused(stored, model, processor, change, message):
    """A mapped file that is too short would kill the process."""
    folder = stored.image_loader.folder
    change(folder)
    with pytest.raises(ValueError, match=message):
        ImageFeatures(folder, model, processor)


def test_features_and_another_image_processor(stored):
    with pytest.raises(ValueError, match="image_loader holds images that the present image_processor prepared"):
        stored.image_processor = small_image_processor(32)
    stored.image_loader = None
    stored.image_processor = small_image_processor(32)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_data(folder)
    return folder


def trainer_with_features(data, tmp_path, *, freeze=("vision_tower",), **options):
    processor = small_processor()
    arguments = IDTrainingArguments(
        str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=2,
        freeze=list(freeze),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    train, general = (RecordDataset(data / f"{name}.jsonl", encode=processor.encode) for name in ("train", "general"))
    model = small_model(processor)
    return IDTrainer(
        model, arguments, train_dataset=train, general_dataset=general, eval_dataset=train, processing_class=processor
    )


def losses_of(trainer):
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor([*logged, trainer.evaluate()["eval_loss"]])


def test_one_training_option_stores_and_uses_the_features(data, tmp_path):
    """The losses are those of the images; a second run reads the stored features and needs no image at all."""
    expected = losses_of(trainer_with_features(data, tmp_path))
    option = {"image_features": str(tmp_path / "features")}
    trainer = trainer_with_features(data, tmp_path, **option)
    assert "image_features" in next(iter(trainer.get_train_dataloader()))
    torch.testing.assert_close(losses_of(trainer), expected, rtol=1e-4, atol=1e-5)
    shutil.rmtree(data / "images")
    torch.testing.assert_close(
        losses_of(trainer_with_features(data, tmp_path, **option)), expected, rtol=1e-4, atol=1e-5
    )


def test_worker_processes_map_the_features(data, tmp_path):
    """Processes that are spawned get a pickled copy, which maps the file again."""
    option = {"image_features": str(tmp_path / "features"), "dataloader_num_workers": 1}
    trainer = trainer_with_features(data, tmp_path, **option)
    features = trainer.processing_class.image_loader
    sent = pickle.dumps(features)
    assert len(sent) < 20_000, "the features themselves are not copied"
    for found, expected in zip(
        pickle.loads(sent)(data / "images", "kate.png"), features(data / "images", "kate.png"), strict=True
    ):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    single = trainer_with_features(data, tmp_path, image_features=str(tmp_path / "features"))
    batches = [next(iter(one.get_train_dataloader())) for one in (trainer, single)]
    assert torch.equal(batches[0]["image_features"], batches[1]["image_features"])


def test_what_the_training_option_refuses(data, tmp_path):
    option = {"image_features": str(tmp_path / "features")}
    with pytest.raises(ValueError, match=r"image_features=.* needs a frozen vision tower; add freeze"):
        trainer_with_features(data, tmp_path, freeze=(), **option)
    trainer_with_features(data, tmp_path, **option)
    draw_images(data / "images", ["new.png"])
    text = (data / "train.jsonl").read_text().replace("scene.png", "new.png")
    (data / "train.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"image 'new.png' below .* has no features in .*features"):
        trainer_with_features(data, tmp_path, **option)
