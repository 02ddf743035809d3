"""MM-ID in lmms-eval: the benchmark file as it is, scored by ``idavlm eval``'s own code."""

import os
from pathlib import Path

import datasets
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from idavlm.data import ImageStore, Sample
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.scoring import score_answers
from idavlm.evaluation.tasks import Item
from idavlm.evaluation.tasks.images import image_size, with_images
from idavlm.evaluation.tasks.mmid import MMID
from idavlm.models import BoxFormat

_METRICS = {
    "matching": {"accuracy": "matching_accuracy"},
    "location": {"mean_iou": "location_mean_iou", "acc@0.5": "location_acc_at_0.5"},
    "qa": {"closest_accuracy": "qa_closest_accuracy"},
    "caption": {metric: f"caption_{metric}" for metric in ("name_precision", "name_recall", "name_f1")},
}


class MMIDTask(ConfigurableMessagesTask):
    """Items of the file that ``MMID_DATA`` names, pictures below ``MMID_IMAGES``.

    How the model writes boxes is said by ``MMID_BOXES``, a kind of :class:`idavlm.models.BoxFormat`. Pictures that are
    missing are an error, or with ``MMID_MISSING=skip`` their items are left out.
    """

    def __init__(self, config: dict | None = None) -> None:
        super().__init__(config={key: value for key, value in (config or {}).items() if key != "class"})

    def download(self, dataset_kwargs=None) -> None:
        """Build the data set; an item is its number, its type and the words of its question."""
        data, images = _setting("MMID_DATA", "the benchmark's file"), os.environ.get("MMID_IMAGES")
        items = MMID.load(Path(data), Path(images) if images else None)
        items, _ = with_images(items, os.environ.get("MMID_MISSING", "fail"))
        BoxFormat(_setting("MMID_BOXES", f"how the model writes boxes, one of {', '.join(BoxFormat.KINDS)}"))
        _ITEMS.clear()
        _ITEMS.update({item.sample.id: item for item in items})
        _PEOPLE[:] = sorted({identity.name for item in items for identity in item.sample.identities})
        rows = [
            {"id": item.sample.id, "type": item.groups["type"], "domain": item.groups["domain"]}
            | {"question": _text(item.sample), "answer": item.sample.answer or ""}
            for item in items
        ]
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset


_ITEMS: dict[str, Item] = {}
_PEOPLE: list[str] = []


def doc_to_messages(doc: dict) -> list[dict]:
    """One user turn: a line a reference photo ("Kate is <picture>"), then the question with its pictures."""
    sample = _ITEMS[doc["id"]].sample
    store, content = ImageStore(sample.image_root), []
    for identity in sample.identities:
        for path in identity.images:
            content += [_words(f"{identity.name} is "), _picture(store.open(path)), _words("\n")]
    for part in sample.messages[-1].content:
        content.append(_picture(store.open(part.image)) if part.type == "image" else _words(part.text))
    return [{"role": "user", "content": content}]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Scores of an answer, under the names of its type."""
    item = _ITEMS[doc["id"]]
    scored = score_answers(
        [item.sample],
        [Answer(item.sample.id, results[0])],
        parse_box=BoxFormat(os.environ["MMID_BOXES"]).parse,
        prose=True,
        names=_PEOPLE,
        image_size=image_size,
    )
    called = _METRICS[item.sample.task.split("_")[0]]
    return {called[metric]: score for metric, score in scored.predictions[0].scores.items() if metric in called}


def _text(sample: Sample) -> str:
    introduced = "".join(f"{who.name} is <image>\n" for who in sample.identities for _ in who.images)
    return introduced + "".join(part.text or "<image>" for part in sample.messages[-1].content)


def _words(text: str) -> dict:
    return {"type": "text", "text": text}


def _picture(picture: Image.Image) -> dict:
    return {"type": "image", "url": picture}


def _setting(name: str, meaning: str) -> str:
    if name not in os.environ:
        raise ValueError(f"{name} is not set; export it: {meaning}.")
    return os.environ[name]
