"""Training on stored features of a frozen vision tower in place of images."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from idavlm.data import RecordDataset, Sample
from idavlm.models import IDAVLMModel, IDAVLMProcessor, ImageFeatures
from idavlm.training.arguments import IDTrainingArguments
from idavlm.utils.locks import lock_beside


def use_image_features(
    model: nn.Module, processor: object, args: IDTrainingArguments, datasets: Iterable[Dataset | None]
) -> None:
    """Let ``processor`` read the features in ``args.image_features``, and write them first if the folder has none.

    Args:
        model: an :class:`idavlm.models.IDAVLMModel` with a frozen vision tower.
        processor: the processor that encodes the samples of all data sets.
        args: the training arguments.
        datasets: the data sets whose images are needed; None is left out.

    Raises:
        ValueError: features of the tower cannot take the place of the images; or the folder has features of another
            tower, or not of all images.
    """
    option = f"image_features={args.image_features!r}"
    if not isinstance(model, IDAVLMModel) or not isinstance(processor, IDAVLMProcessor):
        raise ValueError(
            f"{option} needs an IDAVLMForConditionalGeneration and its IDAVLMProcessor as processing_class, but they "
            f"are {type(model).__name__} and {type(processor).__name__}; leave it out."
        )
    if any(parameter.requires_grad for parameter in model.vision_tower.parameters()):
        raise ValueError(f"{option} needs a frozen vision tower; add freeze=['vision_tower'], or leave it out.")
    if processor.image_loader is not None:
        raise ValueError(f"{option}, but processor.image_loader is set already; set it to None.")
    samples = [sample for dataset in datasets if dataset is not None for sample in _samples(dataset, processor, option)]
    folder = Path(args.image_features)
    with args.main_process_first(local=False, desc="features of the vision tower"):
        if not (folder / "index.json").is_file():
            with lock_beside(folder):  # several runs of a study may share the folder
                if not (folder / "index.json").is_file():  # another run may have written it meanwhile
                    ImageFeatures.write(folder, model, processor, samples)
        features = ImageFeatures(folder, model, processor)
    for sample in samples:
        for path in sample.images:
            features.size(sample.image_root, path)
    processor.image_loader = features


def _samples(dataset: Dataset, processor: IDAVLMProcessor, option: str) -> Iterator[Sample]:
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _samples(part, processor, option)
    elif isinstance(dataset, Subset):
        yield from _samples(dataset.dataset, processor, option)
    elif isinstance(dataset, RecordDataset) and getattr(dataset.encode, "__self__", None) is processor:
        yield from (dataset.sample(index) for index in range(len(dataset)))
    else:
        raise ValueError(
            f"{option} needs RecordDatasets whose encode is the method of processing_class, but a data set is "
            f"{type(dataset).__name__}; leave it out, or set processor.image_loader to ImageFeatures."
        )
