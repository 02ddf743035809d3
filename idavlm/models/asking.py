"""One question about images, with references: from a model and its processor to the answer in one call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from idavlm.models.identity_bank import IdentityBank


def ask(
    model,
    processor,
    question: str,
    *,
    images: Sequence[Any] = (),
    identities: Mapping[str, Sequence[Any]] | None = None,
    bank: IdentityBank | None = None,
    max_new_tokens: int = 64,
    **options: Any,
) -> str:
    """Answer a question about images.

    Args:
        model: an :class:`idavlm.IDAVLMForConditionalGeneration`, or a model with an attached ID-Former.
        processor: its processor, an :class:`idavlm.IDAVLMProcessor` or :class:`idavlm.IdentityProcessor`.
        question: the question.
        images: the images that the question is about: paths, PIL images or bytes.
        identities: reference photos of each identity by name, ``{"Kate": ["kate_1.jpg", "kate_2.jpg"]}``.
        bank: an :class:`IdentityBank` that holds these identities with these photos; the vision tower then does not
            encode the photos again.
        max_new_tokens: largest number of tokens of the answer.
        options: further arguments of ``generate``; greedy decoding by default.

    Returns:
        The answer. ``processor.parse_box(answer, image_size)`` finds a box in it.
    """
    content = [
        {"type": "identity", "name": name, "images": list(photos)} for name, photos in (identities or {}).items()
    ]
    content += [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": question})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    options = {"do_sample": False, **options}
    if bank is not None and identities:
        options["identities"] = bank.select(*identities)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    finally:
        model.train(was_training)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
