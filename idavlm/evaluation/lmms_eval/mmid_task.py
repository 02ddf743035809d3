"""MM-ID in lmms-eval: the released benchmark file, scored by the code of ``idavlm eval``."""

import os
from pathlib import Path

import datasets
from lmms_eval.api.task import ConfigurableMessagesTask

from idavlm.data import ImageStore
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.chat_messages import messages_of
from idavlm.evaluation.tasks.base import Item, score_items
from idavlm.evaluation.tasks.identity_tasks import MMID
from idavlm.evaluation.tasks.image_files import with_images
from idavlm.models import BoxFormat

_METRICS = {
    "matching": {"accuracy": "matching_accuracy"},
    "location": {"mean_iou": "location_mean_iou", "acc@0.5": "location_acc_at_0.5"},
    "qa": {"closest_accuracy": "qa_closest_accuracy"},
    "caption": {metric: f"caption_{metric}" for metric in ("name_precision", "name_recall", "name_f1")},
}

_ITEMS: dict[str, Item] = {}
_NAMES: list[str] = []


class MMIDTask(ConfigurableMessagesTask):
    """The items of the file ``$MMID_DATA``; image paths are relative to ``$MMID_IMAGES``.

    ``$MMID_BOXES`` is the box format of the model, a kind of :class:`idavlm.models.BoxFormat`. Missing image files are
    an error; with ``MMID_MISSING=skip`` their items are left out.
    """

    def __init__(self, config: dict | None = None) -> None:
        super().__init__(config={key: value for key, value in (config or {}).items() if key != "class"})

    def download(self, dataset_kwargs=None) -> None:
        """Build the data set of ids, tasks, domains, question texts and answers."""
        data, images = _setting("MMID_DATA", "the benchmark file"), os.environ.get("MMID_IMAGES")
        items = MMID.load(Path(data), Path(images) if images else None)
        items, _ = with_images(items, os.environ.get("MMID_MISSING", "fail"))
        BoxFormat(_setting("MMID_BOXES", f"box format of the model, one of {', '.join(BoxFormat.KINDS)}"))
        _ITEMS.clear()
        _ITEMS.update({item.sample.id: item for item in items})
        _NAMES[:] = sorted({identity.name for item in items for identity in item.sample.identities})
        rows = []
        for item in items:
            introduced = [
                f"{identity.name} is <image>\n" for identity in item.sample.identities for _ in identity.images
            ]
            question = [part.text or "<image>" for part in item.sample.messages[-1].content]
            row = {
                "id": item.sample.id,
                "question": "".join([*introduced, *question]),
                "answer": item.sample.answer or "",
            }
            rows.append(row | item.groups)
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset


def doc_to_messages(doc: dict) -> list[dict]:
    """One user message: a line "Kate is <image>" per reference, then the question with its images."""
    sample = _ITEMS[doc["id"]].sample
    return messages_of(sample, ImageStore(sample.image_root).open)


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Score an answer; metrics are named after the task."""
    item = _ITEMS[doc["id"]]
    read_box = BoxFormat(os.environ["MMID_BOXES"]).read
    scored = score_items([item], [Answer(item.sample.id, results[0])], read_box, prose=True, names=_NAMES)
    names = _METRICS[item.sample.task.split("_")[0]]
    return {names[metric]: score for metric, score in scored.predictions[0].scores.items() if metric in names}


def _setting(name: str, meaning: str) -> str:
    if name not in os.environ:
        raise ValueError(f"{name} is not set; export {name}: {meaning}.")
    return os.environ[name]
