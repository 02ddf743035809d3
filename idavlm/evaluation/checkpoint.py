"""Load a model and its processor from one checkpoint."""

from pathlib import Path

import torch

from idavlm.models import IDAVLMForConditionalGeneration, IDAVLMProcessor


def load_checkpoint(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> tuple[IDAVLMForConditionalGeneration, IDAVLMProcessor]:
    """Load a model and its processor; the processor first, as its files are small.

    Args:
        path: folder or hub name of the checkpoint.
        device: device of the model.
        dtype: type of the weights; by default that of the checkpoint.

    Raises:
        ValueError: ``path`` has no processor that can be loaded.
        OSError: ``path`` has no model.
    """
    try:
        if Path(path).is_dir() and not (Path(path) / "processor_config.json").is_file():
            raise FileNotFoundError("it has no processor_config.json")
        processor = IDAVLMProcessor.from_pretrained(path)
    except Exception as error:  # transformers raises many types, depending on which file is missing
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: no processor can be loaded ({reason}). A checkpoint holds model and processor; save the "
            f"processor that the model was trained with by processor.save_pretrained({str(path)!r})."
        ) from error
    options = {} if dtype is None else {"dtype": dtype}
    return IDAVLMForConditionalGeneration.from_pretrained(path, **options).to(device), processor
