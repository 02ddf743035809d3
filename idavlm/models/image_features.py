"""What a vision tower that no longer changes sees in pictures, computed once and kept on disk."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from idavlm.data import DataError, Sample
from idavlm.utils import check_positive


class ImageFeatures:
    """A folder of features: mapped into memory, so that it may be larger than that and be shared by processes.

    ``features.bin`` holds ``[pictures, P, Cv]`` as they lie in memory; ``index.json`` whose they are, and of which
    tower; ``shape`` is ``(pictures, P, Cv)``. Once the tower is frozen, training and evaluation read these in place of
    pictures::

        ImageFeatures.write(folder, model, processor, samples)
        processor.image_features = ImageFeatures(folder, model, processor)

    Args:
        folder: what :meth:`write` has written.
        model, processor: for whom; the tower and the preparation of pictures must be those of then.

    Raises:
        FileNotFoundError: there is no whole set of features in ``folder``.
        ValueError: the features are of another tower, or of pictures that were prepared otherwise.
    """

    def __init__(self, folder: str | Path, model, processor):
        self.folder = Path(folder)
        index = self.folder / "index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{index} does not exist; ImageFeatures.write({str(folder)!r}, ...) makes it.")
        content = json.loads(index.read_text())
        if content["tower"] != _fingerprint(model, processor):
            raise ValueError(
                f"{folder} holds features of another vision tower, or of pictures that were prepared otherwise; write "
                "them anew with this model and processor."
            )
        self.shape = tuple(content["shape"])
        self._rows = content["pictures"]
        dtype = getattr(torch, content["dtype"])
        self._features = _mapped(self.folder / "features.bin", self.shape, dtype, write=False)

    @classmethod
    def write(
        cls, folder: str | Path, model, processor, samples: Iterable[Sample], *, batch_size: int = 64
    ) -> "ImageFeatures":
        """Let the model's vision tower see every picture of ``samples`` once.

        Returns:
            The features, opened.

        Raises:
            DataError: a picture that cannot be read, by its name.
            ValueError: patches that are no square grid; the model could not tell how they stand.
        """
        check_positive(batch_size=batch_size)
        folder, sizes, features = Path(folder), [], None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
        pictures = list(dict.fromkeys((sample.image_root, path) for sample in samples for path in sample.images))
        if not pictures:
            raise ValueError("samples hold no pictures; give those that will be read.")
        was_training = model.training
        model.eval()
        try:
            for start in range(0, len(pictures), batch_size):
                loaded = [processor.load_image(*picture) for picture in pictures[start : start + batch_size]]
                seen = _look(model, torch.stack([pixels for pixels, _ in loaded]))
                if features is None:
                    shape = (len(pictures), *seen.shape[1:])
                    features = _mapped(folder / "features.bin", shape, seen.dtype, write=True)
                features[start : start + len(seen)] = seen
                sizes += [size for _, size in loaded]
        finally:
            model.train(was_training)
        rows = {_key(*picture): [row, *size] for row, (picture, size) in enumerate(zip(pictures, sizes, strict=True))}
        content = {"tower": _fingerprint(model, processor), "shape": shape, "pictures": rows}
        content["dtype"] = str(features.dtype).removeprefix("torch.")
        whole = folder / f"index.json.{os.getpid()}"  # written last: half a set has no index
        whole.write_text(json.dumps(content))
        whole.replace(folder / "index.json")
        return cls(folder, model, processor)

    def __call__(self, root: Path | None, path: str) -> tuple[Tensor, tuple[int, int]]:
        """``[P, Cv]`` features of a picture, and the (height, width) of the original."""
        try:
            row, height, width = self._rows[_key(root, path)]
        except KeyError:
            raise DataError(
                f"image {path!r} below {root} has no features in {self.folder}; write them of all samples.",
                kind="image",
                file=path,
            ) from None
        return self._features[row], (height, width)


@torch.no_grad()
def _look(model, pixels: Tensor) -> Tensor:
    seen, grid_size = model.image_features(pixels.to(model.device))
    if grid_size is None or grid_size[0] != grid_size[1]:
        raise ValueError(f"a picture is {grid_size} patches; features are kept of square grids alone.")
    return seen.cpu()


def _key(root: Path | None, path: str) -> str:
    return str(Path(root or "", path))


def _mapped(path: Path, shape: Iterable[int], dtype: torch.dtype, *, write: bool) -> Tensor:
    return torch.from_file(str(path), shared=write, size=math.prod(shape), dtype=dtype).view(*shape)


def _fingerprint(model, processor) -> str:
    """Of all that features depend on."""
    digest = hashlib.sha256()
    for part in _parts(model, processor):
        digest.update(part)
    return digest.hexdigest()


def _parts(model, processor) -> Iterator[bytes]:
    config = model.config
    yield repr((config.vision_feature_layer, config.vision_feature_select)).encode()
    yield processor.image_processor.to_json_string().encode()
    for name, tensor in model.vision_tower.state_dict().items():
        yield name.encode()
        yield tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
