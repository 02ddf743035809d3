"""Vision towers and stored features that several training runs share.

A study trains many ID-Formers on the same frozen tower. :func:`train_shared_tower` trains the tower once,
:func:`copy_tower` takes that of a trained model, and :func:`store_features` encodes the images once. Each returns a
folder below ``root`` whose name holds a hash of everything that the contents depend on, so other data, options,
versions of libraries or code lead to another folder. Runs may ask at the same time; the first one builds.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ResNetModel, set_seed

from idavlm.data import RecordDataset, Sample
from idavlm.datasets.dataset_folder import build_once
from idavlm.experimental import small_models, tower_pretraining
from idavlm.experimental.small_models import small_language_model, small_processor, small_vision_tower
from idavlm.experimental.tower_pretraining import pretrain_tower
from idavlm.models import IDAVLMForConditionalGeneration, IDAVLMProcessor, ImageFeatures
from idavlm.models.pretrained import resolve_pretrained
from idavlm.utils.locks import lock_beside

CODE = (tower_pretraining, small_models)
"""A tower is trained again if the source of one of these modules changes."""


def train_shared_tower(
    root: Path,
    data: Path,
    *,
    seed: int,
    steps: int,
    image_size: int,
    hidden_size: int,
    device: str,
    bf16: bool,
    augment: bool = False,
) -> Path:
    """The folder of a small vision tower that is trained from boxes, see :func:`pretrain_tower`.

    Args:
        root: folder of all shared towers and features.
        data: folder with ``train.jsonl``.
        seed: seed of the initial weights and of the batches.
        steps: steps of tower pretraining.
        image_size: width and height of the images in pixels.
        hidden_size: width of the patches.
        device: ``"cpu"`` or ``"cuda"``.
        bf16: run the tower in bfloat16.
        augment: train it on random views of the images.
    """
    samples = list(RecordDataset(data / "train.jsonl"))
    facts = {"seed": seed, "steps": steps, "image_size": image_size, "hidden_size": hidden_size}
    facts |= {"device": device, "bf16": bf16, "augment": augment, "data": _digest(samples, data / "train.jsonl")}
    facts |= {package: version(package) for package in ("torch", "transformers", "pillow")}
    facts |= {code.__name__: hashlib.sha256(Path(code.__file__).read_bytes()).hexdigest() for code in CODE}

    def train(folder: Path) -> dict[str, Any]:
        set_seed(seed)
        tower = small_vision_tower(hidden_size=hidden_size, layer_type="basic")
        model, processor = _model_around(tower, samples, image_size)
        options = {"steps": steps, "seed": seed, "bf16": bf16, "augment": augment}
        log = pretrain_tower(model.to(device), processor, samples, **options)
        model.vision_tower.save_pretrained(folder)
        return {"log": log}

    return _build_shared(root, "tower", facts, train)


def copy_tower(root: Path, checkpoint: str) -> Path:
    """The folder of the vision tower of a trained model, in float32.

    Args:
        root: folder of all shared towers and features.
        checkpoint: folder of the model, or ``"idavlm-tiny"``.
    """

    def copy(folder: Path) -> dict[str, Any]:
        model = IDAVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        model.vision_tower.save_pretrained(folder)
        return {}

    weights = Path(resolve_pretrained(checkpoint)) / "model.safetensors"
    facts = {"checkpoint": checkpoint, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    return _build_shared(root, "tower", facts, copy)


def store_features(root: Path, tower: Path, samples: list[Sample], *, image_size: int, device: str) -> Path:
    """The folder of the :class:`idavlm.models.ImageFeatures` of all images of ``samples``.

    Args:
        root: folder of all shared towers and features.
        tower: folder of the tower, from :func:`train_shared_tower` or :func:`copy_tower`.
        samples: their images are encoded.
        image_size: width and height of the images in pixels.
        device: ``"cpu"`` or ``"cuda"``.
    """
    roots = sorted({str(sample.image_root) for sample in samples})  # features are found by the path of an image
    facts = {"tower": tower.name, "image_size": image_size, "images": _digest(samples), "roots": roots}

    def write(folder: Path) -> dict[str, Any]:
        # One sample, because the tokenizer that it is for is not used.
        model, processor = _model_around(ResNetModel.from_pretrained(tower), samples[:1], image_size)
        ImageFeatures.write(folder, model.to(device), processor, samples)
        return {}

    return _build_shared(root, "features", facts, write)


def _model_around(
    tower: PreTrainedModel, samples: list[Sample], image_size: int
) -> tuple[IDAVLMForConditionalGeneration, IDAVLMProcessor]:
    """A model and a processor of which only what concerns the vision tower is used."""
    processor = small_processor(samples, image_size=image_size)
    language_model = small_language_model(processor.tokenizer, num_hidden_layers=1)
    options = {"connector": "resampler", "num_queries": 16, "num_heads": 4}
    return IDAVLMForConditionalGeneration.from_parts(tower, language_model, processor=processor, **options), processor


def _build_shared(root: Path, name: str, facts: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder below ``root`` that ``build`` fills, once for equal ``facts``. An interrupted build leaves nothing."""
    folder = root / f"{name}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]}"
    with lock_beside(folder):
        is_new = not folder.exists()
        build_once(folder, name, 1, facts, build)
    print(f"{folder}: {'written' if is_new else 'found, with the same data and options'}", flush=True)
    return folder


def _digest(samples: Iterable[Sample], *files: Path) -> str:
    """Hash of the contents of ``files``, and of all images of ``samples`` with their names."""
    images = {(path, Path(sample.image_root, path)) for sample in samples for path in sample.images}
    found = hashlib.sha256()
    for name, path in [*((file.name, file) for file in files), *sorted(images)]:
        found.update(f"{name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()
