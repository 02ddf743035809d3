"""Models of idavlm in VLMEvalKit: an answer to text and images."""

import os
import tempfile
from itertools import groupby
from pathlib import Path

import torch
from vlmeval.vlm.base import BaseModel

from idavlm.data.photos import PhotoLoader
from idavlm.evaluation.chat_messages import sample_of
from idavlm.evaluation.checkpoint import load_checkpoint
from idavlm.evaluation.generation import evaluating, generate_texts


class IDAVLM(BaseModel):
    """A checkpoint of idavlm, or any image-text model of transformers, with greedy decoding.

    A line ``Kate is <image>`` introduces an identity, in every data set of VLMEvalKit. VLMEvalKit builds models by
    name, without arguments: what is not passed is read from the environment.

    Args:
        pretrained: folder or hub name of the checkpoint; ``$IDAVLM_MODEL``. To an image-text model of transformers,
            references are further images of the prompt.
        id_former: folder of :func:`idavlm.save_id_former`, attached to ``pretrained``, a model of transformers;
            ``$IDAVLM_ID_FORMER``.
        device: device of the model; ``$IDAVLM_DEVICE``, by default cuda if available, else cpu.
        max_new_tokens: maximum length of an answer; ``$IDAVLM_MAX_NEW_TOKENS``, by default 256.

    Raises:
        ValueError: no checkpoint is named, or it cannot be loaded.
    """

    INTERLEAVE = True

    def __init__(
        self,
        pretrained: str | None = None,
        id_former: str | None = None,
        device: str | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
        pretrained = pretrained or os.environ.get("IDAVLM_MODEL")
        if not pretrained:
            raise ValueError("IDAVLM_MODEL is not set; export IDAVLM_MODEL: folder or hub name of the checkpoint.")
        id_former = id_former or os.environ.get("IDAVLM_ID_FORMER")
        device = device or os.environ.get("IDAVLM_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
        self.max_new_tokens = int(max_new_tokens or os.environ.get("IDAVLM_MAX_NEW_TOKENS", 256))
        self.model, self.processor = load_checkpoint(pretrained, id_former=id_former, device=device)

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """Answer a message.

        Args:
            message: ``{"type": "text" | "image", "value"}``; ``value`` is the text, or the file of the image. ``role``
                may be ``"system"``, otherwise it is ``"user"``.
            dataset: name of the data set; not used.

        Raises:
            ValueError: a video.
        """
        messages = []
        for role, parts in groupby(message, key=lambda part: part.get("role", "user")):
            content = [
                {"type": part["type"], "text" if part["type"] == "text" else "url": part["value"]} for part in parts
            ]
            messages.append({"role": role, "content": content})
        loader = PhotoLoader(**self.processor.image_limits)
        with tempfile.TemporaryDirectory() as folder, evaluating(self.model):
            sample = sample_of(messages, Path(folder), "0", loader=loader)
            [(text, _)] = generate_texts(self.model, self.processor, [sample], self.max_new_tokens)
        return text
