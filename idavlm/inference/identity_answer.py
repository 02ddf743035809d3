"""Questions about a cast, and answers with boxes and identity maps: what a chat, a web page and a server show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from idavlm.inference.batching import BatchingEngine
from idavlm.inference.generation_options import GenerationOptions
from idavlm.inference.prompts import Prompt, PromptEncoder
from idavlm.models import IdentityBank
from idavlm.models.attach import image_features_with_identities
from idavlm.models.crop_box import FULL_IMAGE
from idavlm.models.identity_names import find_names
from idavlm.modules.positions import square_grid
from idavlm.utils import ImageRole

_IMAGE_INPUTS = ("pixel_values", "image_features", "image_roles", "sample_index", "identity_index", "identities")


@dataclass(frozen=True)
class NamedBox:
    """A box of an answer.

    Attributes:
        box: ``[x1, y1, x2, y2]`` in pixels of the original image.
        name: the identity that it belongs to; None if the answer does not say.
    """

    box: tuple[float, float, float, float]
    name: str | None = None


@dataclass(frozen=True, eq=False)
class IdentityMap:
    """Identity map of one image: what share of the attention of each patch each identity gets.

    Attributes:
        image: number of the image in the prompt, references not counted.
        names: names of the identities.
        shares: ``[rows, columns, G + 1]``, mean over the identity layers. The last one is the share of the null token.
        crop_box: left, top, right and bottom of the part of the image that the patches show, relative to the image.
    """

    image: int
    names: tuple[str, ...]
    shares: Tensor
    crop_box: tuple[float, float, float, float] = FULL_IMAGE

    def share(self, name: str) -> Tensor:
        """``[rows, columns]`` share of one identity."""
        if name not in self.names:
            raise ValueError(f"name={name!r} is not in the prompt; it has {', '.join(map(repr, self.names))}.")
        return self.shares[..., self.names.index(name)]


@dataclass(frozen=True, eq=False)
class IdentityAnswer:
    """An answer about a cast.

    Attributes:
        text: the answer.
        boxes: boxes in it, in pixels of the last image of the question.
        identity_maps: one map for each image whose patches form a grid, if they were asked for.
        finish_reason: ``"stop"`` or ``"length"``.
        prompt_tokens, answer_tokens: numbers of tokens.
    """

    text: str
    boxes: tuple[NamedBox, ...]
    identity_maps: tuple[IdentityMap, ...]
    finish_reason: str
    prompt_tokens: int
    answer_tokens: int


def answer_question(
    engine: BatchingEngine,
    question: str,
    *,
    images: Sequence[Any] = (),
    identities: Mapping[str, Sequence[Any]] | None = None,
    bank: IdentityBank | None = None,
    options: GenerationOptions | None = None,
    with_identity_maps: bool = False,
    on_text: Callable[[str], None] | None = None,
    timeout: float | None = None,
) -> IdentityAnswer:
    """Ask about images and a cast, and wait for the answer.

    Threads may call it at the same time; their questions share forward passes.

    Args:
        engine: runs the model.
        question: the question.
        images: the images that the question is about: paths, PIL images or bytes.
        identities: photos of each identity by name.
        bank: encoded photos of further identities, all of which are introduced.
        options: how the answer is generated; greedily by default.
        with_identity_maps: also compute the identity maps, which takes one more forward pass.
        on_text: called with each piece of the answer as it arrives.
        timeout: seconds after which TimeoutError is raised.

    Raises:
        DataError: images, names or text that cannot be used.
        ValueError: options that the model does not have.
    """
    members = [{"type": "identity", "name": name} for name in (bank.names if bank is not None else ())]
    photos = [{"type": "identity", "name": name, "images": list(of)} for name, of in (identities or {}).items()]
    scenes = [{"type": "image", "image": image} for image in images]
    content = [*members, *photos, *scenes, {"type": "text", "text": question}]
    with engine.preparing():
        prompt = PromptEncoder(engine.processor).encode([{"role": "user", "content": content}], bank=bank)
        generation = engine.submit(prompt, options)
    if on_text is not None:
        for piece in generation:
            on_text(piece)
    text = generation.result(timeout)
    return IdentityAnswer(
        text=text,
        boxes=named_boxes(engine.processor, text, prompt),
        identity_maps=engine.run(lambda: identity_maps(engine, prompt)).result(timeout) if with_identity_maps else (),
        finish_reason=generation.finish_reason,
        prompt_tokens=prompt.num_tokens,
        answer_tokens=len(generation.tokens),
    )


def named_boxes(processor, text: str, prompt: Prompt) -> tuple[NamedBox, ...]:
    """The boxes in an answer, in pixels of the last image of the prompt, and whose they are.

    A box belongs to the identity that the text assigns it to. A box that the text assigns to no identity belongs to the
    identity that the question is about, if it names only one.
    """
    if not prompt.scene_sizes:
        return ()
    size = prompt.scene_sizes[-1]
    boxes, _ = processor.read_boxes(text, size)
    asked = {prompt.names[identity] for _, _, identity in find_names(prompt.question, list(prompt.names))}
    found = []
    for box in boxes:
        owners = [
            name
            for name in prompt.names
            if processor.read_box(
                text, size, name=name, other_names=[other for other in prompt.names if other != name]
            )[0]
            == box
        ]
        if len(owners) > 1:  # the text does not say whose it is
            owners = [name for name in owners if name in asked]
        found.append(NamedBox(tuple(box), owners[0] if len(owners) == 1 else None))
    return tuple(found)


def identity_maps(engine: BatchingEngine, prompt: Prompt) -> tuple[IdentityMap, ...]:
    """The identity maps of the images of a prompt. Call it in the thread of the model, with ``engine.run``.

    Raises:
        ValueError: the model has no ID-Former, or the prompt introduces no identity.
    """
    model, processor = engine.model, engine.processor
    if getattr(model, "id_former", None) is None:
        raise ValueError(f"{type(model).__name__} has no ID-Former, so there are no identity maps.")
    if not prompt.names:
        raise ValueError("the prompt introduces no identity, so there are no identity maps; introduce one by photos.")
    inputs = engine.collate([prompt])
    with torch.no_grad():
        seam = image_features_with_identities(model)
        if seam is None:  # a model of idavlm: [I, P, G + 1]
            named = {name: inputs[name] for name in _IMAGE_INPUTS if name in inputs}
            _, maps, grid_size = model.encode_images(**named, output_identity_maps=True)
            of_images = _mean(maps)
            grids = [grid_size or square_grid("P, the number of patches,", maps[0].shape[1])] * len(of_images)
        else:  # an attached ID-Former: [N, G + 1] for the tokens of all images
            maps = model(**inputs, output_identity_maps=True).identity_maps
            of_images = _mean(maps).split(inputs["num_image_tokens"].tolist())
            _, grids = seam.encode(inputs)
    scenes = (inputs["image_roles"] == ImageRole.SCENE).nonzero().flatten().tolist()
    found = []
    for number, image in enumerate(scenes):
        if grids[image] is not None:
            shares = of_images[image].unflatten(0, grids[image])
            box = processor.crop_box(prompt.scene_sizes[number])
            found.append(IdentityMap(number, prompt.names, shares, box))
    return tuple(found)


def _mean(maps: Sequence[Tensor]) -> Tensor:
    """Mean over the identity layers."""
    return torch.stack([layer.float() for layer in maps]).mean(0).cpu()
