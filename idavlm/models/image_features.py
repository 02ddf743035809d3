"""Features of a frozen vision tower, computed once per image and stored on disk."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from idavlm.data import DataError, Sample
from idavlm.utils import check_positive


class ImageFeatures:
    """A folder with the features of many images, mapped into memory and shared by processes.

    ``features.bin`` holds the features ``[images, P, Cv]``; ``index.json`` lists the images and identifies the vision
    tower. With a frozen tower, training and evaluation can use them in place of image files::

        processor.image_loader = ImageFeatures.write(folder, model, processor, samples)

    Args:
        folder: folder that :meth:`write` has written.
        model, processor: must have the vision tower and the preparation of images that made the features.

    Attributes:
        shape: ``(images, P, Cv)``.

    Raises:
        FileNotFoundError: ``folder`` holds no complete set of features.
        ValueError: the features come from another tower or another preparation of images.
    """

    def __init__(self, folder: str | Path, model, processor):
        self.folder = Path(folder)
        index = self.folder / "index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{index} does not exist; ImageFeatures.write({str(folder)!r}, ...) makes it.")
        content = json.loads(index.read_text())
        if content["tower"] != _fingerprint(model, processor):
            raise ValueError(
                f"{folder} holds features of another vision tower, or of images that were prepared differently; write "
                "them again with this model and processor."
            )
        self.shape = tuple(content["shape"])
        self._rows = content["images"]
        dtype = getattr(torch, content["dtype"])
        self._features = _mapped(self.folder / "features.bin", self.shape, dtype, write=False)

    @classmethod
    def write(
        cls, folder: str | Path, model, processor, samples: Iterable[Sample], *, batch_size: int = 64
    ) -> "ImageFeatures":
        """Compute the features of each image of ``samples`` once, and open them.

        Raises:
            DataError: an image cannot be read.
            ValueError: the patches are not a square grid, so the model could not recover their positions.
        """
        check_positive(batch_size=batch_size)
        folder, sizes, features = Path(folder), [], None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
        images = list(dict.fromkeys((sample.image_root, path) for sample in samples for path in sample.images))
        if not images:
            raise ValueError("samples hold no images; pass the samples whose images will be used.")
        was_training = model.training
        model.eval()
        try:
            for start in range(0, len(images), batch_size):
                loaded = [processor.load_image(*image) for image in images[start : start + batch_size]]
                with torch.no_grad():
                    pixels = torch.stack([pixels for pixels, _ in loaded]).to(model.device)
                    batch, grid_size = model.image_features(pixels)
                if grid_size is None or grid_size[0] != grid_size[1]:
                    raise ValueError(f"an image has a grid of {grid_size} patches; stored features need a square grid.")
                if features is None:
                    shape = (len(images), *batch.shape[1:])
                    features = _mapped(folder / "features.bin", shape, batch.dtype, write=True)
                features[start : start + len(batch)] = batch
                sizes += [size for _, size in loaded]
        finally:
            model.train(was_training)
        rows = {_key(*image): [row, *size] for row, (image, size) in enumerate(zip(images, sizes, strict=True))}
        dtype = str(features.dtype).removeprefix("torch.")
        content = {"tower": _fingerprint(model, processor), "shape": shape, "images": rows, "dtype": dtype}
        complete = folder / f"index.json.{os.getpid()}"  # written last: an incomplete set has no index
        complete.write_text(json.dumps(content))
        complete.replace(folder / "index.json")
        return cls(folder, model, processor)

    def __call__(self, root: Path | None, path: str) -> tuple[Tensor, tuple[int, int]]:
        """Return the features ``[P, Cv]`` of an image, and the (height, width) of the original.

        Raises:
            DataError: there are no features of this image.
        """
        try:
            row, height, width = self._rows[_key(root, path)]
        except KeyError:
            raise DataError(
                f"image {path!r} below {root} has no features in {self.folder}; write the features of all samples.",
                kind="image",
                file=path,
            ) from None
        return self._features[row], (height, width)


def _key(root: Path | None, path: str) -> str:
    return str(Path(root or "", path))


def _mapped(path: Path, shape: Iterable[int], dtype: torch.dtype, *, write: bool) -> Tensor:
    return torch.from_file(str(path), shared=write, size=math.prod(shape), dtype=dtype).view(*shape)


def _fingerprint(model, processor) -> str:
    """Return a hash of everything that the features depend on."""
    config = model.config
    digest = hashlib.sha256(repr((config.vision_feature_layer, config.vision_feature_select)).encode())
    digest.update(processor.image_processor.to_json_string().encode())
    for name, tensor in model.vision_tower.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
