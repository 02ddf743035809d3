"""A bank of named identities whose reference photos are encoded once and reused for any number of prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from idavlm.models.attach import image_features_with_identities
from idavlm.models.same_model import check_same_model, model_probe
from idavlm.models.stored_photos import SelectedIdentities, StoredPhoto

FEATURES, INDEX = "identities.safetensors", "identities.json"
"""Files that :meth:`IdentityBank.save` writes."""


@dataclass(frozen=True, eq=False)
class BankIdentityMap:
    """The identity map of an image over all identities of a bank.

    Attributes:
        names: the G names of the bank.
        log_shares: ``[G, P]`` logarithm of the share of attention that each patch (or image token of an attached model)
            pays to the photos of each identity. The rest of a patch's attention goes to the null token.
        grid_size: rows and columns of the patches, row by row; None where the image tokens form no grid.
    """

    names: tuple[str, ...]
    log_shares: Tensor
    grid_size: tuple[int, int] | None


class IdentityBank:
    """Names and encoded reference photos.

    The vision tower encodes every photo once. Prompts introduce identities as before, and ``generate`` reuses what the
    bank holds instead of encoding the photos of every prompt again::

        bank = IdentityBank(model, processor)
        bank.add("Kate", ["kate_1.jpg", "kate_2.jpg"])
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        model.generate(**inputs, identities=bank.select("Kate"))

    Args:
        model: an :class:`idavlm.IDAVLMForConditionalGeneration` with an ID-Former, or a model with an attached one.
        processor: its processor.
    """

    def __init__(self, model, processor):
        self.model = model
        self.processor = processor
        self._photos: dict[str, tuple[StoredPhoto, ...]] = {}

    def __len__(self) -> int:
        return len(self._photos)

    def __contains__(self, name: object) -> bool:
        return name in self._photos

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all identities, in the order in which they were added."""
        return tuple(self._photos)

    def add(self, name: str, images: Sequence[Any]) -> None:
        """Encode the reference photos of an identity.

        Args:
            name: a name that the bank does not have yet.
            images: paths, PIL images or bytes, as in messages.

        Raises:
            ValueError: the bank has the name already, or there is no photo.
        """
        if name in self._photos:
            raise ValueError(f"name={name!r} is in the bank already; remove it first.")
        if not images:
            raise ValueError(f"images of {name!r} is empty; pass at least one photo.")
        part = {"type": "identity", "name": name, "images": list(images)}
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [part]}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            photos, _ = _encode(self.model, inputs)
        self._photos[name] = tuple(photos)

    def photos(self, name: str) -> tuple[StoredPhoto, ...]:
        """The encoded photos of an identity. Raises KeyError if the bank does not have it."""
        self._check(name)
        return self._photos[name]

    def remove(self, name: str) -> None:
        """Remove an identity. Raises KeyError if the bank does not have it."""
        self._check(name)
        del self._photos[name]

    def merge(self, other: "IdentityBank") -> None:
        """Add the identities of another bank of the same model.

        Raises:
            ValueError: a name is in both banks, or the other bank belongs to another model.
        """
        check_same_model(model_probe(other.model), model_probe(self.model), "other")
        both = sorted(self._photos.keys() & other._photos.keys())
        if both:
            raise ValueError(f"both banks have {', '.join(both)}; remove them from one of the banks.")
        self._photos.update(other._photos)

    def select(self, *names: str) -> SelectedIdentities:
        """Return identities for ``generate``, in the order of ``names``; all of them without arguments."""
        names = names or self.names
        for name in names:
            self._check(name)
        return SelectedIdentities(tuple(names), tuple(self._photos[name] for name in names))

    def save(self, folder: str | Path) -> None:
        """Write ``identities.safetensors`` and ``identities.json``. Features can identify a person as a photo can."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors, names = {}, []
        for number, (name, photos) in enumerate(self._photos.items()):
            sizes = [photo.size for photo in photos]
            names.append({"name": name, "photos": len(photos), "deepstack": len(photos[0].deepstack), "sizes": sizes})
            for index, photo in enumerate(photos):
                tensors[f"{number}.{index}"] = photo.features.cpu().contiguous()
                for level, features in enumerate(photo.deepstack):
                    tensors[f"{number}.{index}.{level}"] = features.cpu().contiguous()
        save_file(tensors, folder / FEATURES, metadata={"format": "pt"})
        content = {"model": model_probe(self.model), "identities": names}
        (folder / INDEX).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, model, processor) -> "IdentityBank":
        """Load a bank that :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder holds no bank.
            ValueError: the bank was made by another model.
        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"{folder / INDEX} does not exist; IdentityBank.save(folder) writes it.")
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        check_same_model(content["model"], model_probe(model), folder)
        tensors = {name: tensor.to(model.device) for name, tensor in load_file(folder / FEATURES).items()}
        bank = cls(model, processor)
        for number, identity in enumerate(content["identities"]):
            bank._photos[identity["name"]] = tuple(
                StoredPhoto(
                    tensors[f"{number}.{index}"],
                    tuple(tensors[f"{number}.{index}.{level}"] for level in range(identity["deepstack"])),
                    size if size is None else tuple(size),
                )
                for index, size in enumerate(identity.get("sizes") or [None] * identity["photos"])
            )
        return bank

    def shortlist(self, image: Any, count: int) -> list[tuple[str, float]]:
        """Return the ``count`` identities that the image most likely shows, with their scores, best first.

        The score of an identity is the largest logarithm of the share of attention that a patch would pay to its photos
        if the whole bank were introduced, in the first identity layer of the ID-Former. Use it to choose whom to
        introduce when the bank holds more identities than fit into the prompt.
        """
        identity_map = self.identity_map(image)
        scores = identity_map.log_shares.amax(1).tolist()
        best = sorted(zip(identity_map.names, scores, strict=True), key=lambda entry: -entry[1])
        return best[:count]

    def identity_map(self, image: Any) -> "BankIdentityMap":
        """Which identity of the whole bank each part of an image shows. The vision tower encodes one image.

        The map is that of the first identity layer of the ID-Former, as if the whole bank were introduced, however many
        identities it has.

        Raises:
            ValueError: the bank is empty.
        """
        if not self._photos:
            raise ValueError("the bank is empty; add identities with bank.add(name, photos).")
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "image": image}]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            photos, grids = _encode(self.model, inputs)
            references = [photo.features for of_identity in self._photos.values() for photo in of_identity]
            energies = self.model.id_former.reference_energies(photos[0].features, references)
        *of_photos, null = energies
        of_photos = iter(of_photos)
        of_identities = [
            torch.stack([next(of_photos) for _ in photos]).logsumexp(0) for photos in self._photos.values()
        ]
        log_shares = torch.stack([*of_identities, null]).log_softmax(0)[:-1]
        return BankIdentityMap(self.names, log_shares, grids[0])

    def _check(self, name: str) -> None:
        if name not in self._photos:
            raise KeyError(f"name={name!r} is not in the bank; it has {', '.join(self._photos) or 'no identity'}.")


def _encode(model, inputs) -> tuple[list[StoredPhoto], Sequence[tuple[int, int] | None]]:
    """Features of each image of ``inputs``, before the ID-Former, and their rows and columns where they form a grid."""
    inputs = inputs.to(model.device)
    seam = image_features_with_identities(model)
    if seam is None:
        features, grid_size = model.image_features(inputs["pixel_values"])
        return [StoredPhoto(photo) for photo in features], [grid_size] * len(features)
    encoded, grids = seam.encode(inputs)
    sizes = inputs["original_image_sizes"].tolist() if "original_image_sizes" in inputs else [None] * len(encoded)
    photos = [
        StoredPhoto(tokens, tuple(levels), None if size is None else tuple(size))
        for (tokens, levels), size in zip(encoded, sizes, strict=True)
    ]
    return photos, grids
