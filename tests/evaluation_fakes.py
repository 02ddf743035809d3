"""A processor and a model without weights: the model recognises identities by the folder of their references."""

import re
from types import SimpleNamespace

import torch
from PIL import Image

from idavlm.data import parse_sample

ACTIVITIES = ("reading", "waving", "running", "sleeping")


def samples(number: int = 8, image_root=None) -> list:
    """One sample of each of four tasks per identity; references of identity 3 are ``p3/0.png``, ``p3/1.png``."""
    found = []
    for identity in range(number):
        others = [(identity + step) % number for step in (1, 2, 3)]
        place = identity % 4
        order = [*others[:place], identity, *others[place:]]
        identities = [{"name": "Kate", "images": [f"p{identity}/0.png", f"p{identity}/1.png"]}]
        images = [
            part
            for at, shown in enumerate(order)
            for part in (
                {"type": "text", "text": f"{'' if at == 0 else chr(10)}Picture {at + 1}: "},
                {"type": "image", "image": f"p{shown}/2.png"},
            )
        ]
        scene = f"s/{'-'.join(f'p{shown}' for shown in order)}.png"
        boxes = [
            {"name": "Kate" if shown == identity else f"other {at}", "image": scene, "box": box_at(at)}
            for at, shown in enumerate(order)
        ]
        questions = {
            "matching": ([*images, text("\nWhich picture shows Kate?")], f"Picture {place + 1}"),
            "location": ([{"type": "image", "image": scene}, text("\nWhere is Kate?")], ""),
            "qa_single": ([{"type": "image", "image": scene}, text("\nWhat is Kate doing?")], doing(place)),
            "caption_single": ([{"type": "image", "image": scene}, text("\nDescribe the picture.")], doing(place)),
        }
        for task, (content, answer) in questions.items():
            record = {"id": f"{task}-{identity}", "source": "identity", "identities": identities, "type": task}
            record |= {"messages": [{"role": "user", "content": content}], "answer": answer}
            if task == "location":
                record |= {"target": "Kate", "boxes": boxes}
            if task == "matching":
                record["false_answers"] = [f"Picture {at + 1}" for at in range(4) if at != place]
            if task == "qa_single":
                record["false_answers"] = [doing(at) for at in range(4) if at != place]
            found.append(parse_sample(record, where=f"test.jsonl:{len(found) + 1}", image_root=image_root))
    return found


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def doing(place: int) -> str:
    return f"Kate is {ACTIVITIES[place]}."


def box_at(place: int) -> list[float]:
    return [32.0 * place, 20.0, 32.0 * place + 30, 110.0]


def draw_images(root, all_samples) -> None:
    for number, path in enumerate(sorted({image for sample in all_samples for image in sample.images})):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 128), (40 * number % 256, 90 * number % 256, 160)).save(root / path)


class FakeProcessor:
    """Characters are tokens; images stand in the text by their paths. 0 is padding, 1 the end."""

    tokenizer = SimpleNamespace(
        batch_decode=lambda ids, skip_special_tokens: ["".join(chr(i) for i in row if i > 1) for row in ids.tolist()]
    )

    def encode(self, sample, *, add_generation_prompt=False):
        prompt = "".join(f"{identity.name} is <{path}>\n" for identity in sample.identities for path in identity.images)
        turns = [
            ("".join(part.text or f"<{part.image}>" for part in turn.content), turn.role) for turn in sample.messages
        ]
        ids = [ord(letter) for letter in prompt]
        labels = [-100] * len(ids)
        for content, role in turns:
            new = [ord(letter) for letter in content] + [1 if role == "assistant" else ord("@")]
            ids += new
            labels += new if role == "assistant" else [-100] * len(new)
        assert add_generation_prompt == (turns[-1][1] == "user")
        sizes = torch.tensor([[128, 128]] * len(sample.images))
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "image_sizes": sizes}

    def collate(self, encoded, *, padding_side):
        longest = max(len(sample["input_ids"]) for sample in encoded)
        batch = {"source": ["identity"] * len(encoded), "boxes": None}
        for name, fill in (("input_ids", 0), ("labels", -100)):
            rows = []
            for sample in encoded:
                padding = torch.full((longest - len(sample[name]),), fill)
                pair = (padding, sample[name]) if padding_side == "left" else (sample[name], padding)
                rows.append(torch.cat(pair))
            batch[name] = torch.stack(rows)
        return batch

    def read_box(self, text, image_size, *, name="", other_names=()):
        assert image_size == (128, 128)
        numbers = re.findall(r"\d+", text)
        return ([float(number) for number in numbers], None) if len(numbers) == 4 else (None, "none")


class FakeModel(torch.nn.Module):
    """Answers right if a reference shows an identity of the image, with the first choice otherwise.

    Args:
        return_prompt: whether ``generate`` returns the prompt before the answer.
        mute: whether all answers are unparsable.
    """

    device = torch.device("cpu")

    def __init__(self, *, return_prompt: bool = True, mute: bool = False):
        super().__init__()
        self.return_prompt, self.mute = return_prompt, mute

    def answer(self, prompt: str) -> str:
        if self.mute:
            return "I cannot say"
        reference = re.search(r"Kate is <(p\d+)/", prompt)
        shown = re.findall(r"p\d+", prompt[prompt.index("Picture 1") :] if "Picture 1" in prompt else prompt)
        scene = re.search(r"<s/(.*)\.png>", prompt)
        shown = scene[1].split("-") if scene else shown
        place = shown.index(reference[1]) if reference and reference[1] in shown else 0
        if "Which" in prompt:
            return f"Picture {place + 1}"
        return " ".join(f"{edge:.0f}" for edge in box_at(place)) if "Where" in prompt else doing(place)

    def generate(self, input_ids, image_sizes=None, *, max_new_tokens, do_sample, num_beams, logits_processor):
        assert not self.training
        assert not do_sample
        prompts = FakeProcessor.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        answers = [[*map(ord, self.answer(prompt)[:max_new_tokens]), 1] for prompt in prompts]
        longest = max(map(len, answers))
        new = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers])
        return torch.cat([input_ids, new], 1) if self.return_prompt else new

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 256)
        for row, ids in enumerate(input_ids.tolist()):
            start = ids.index(ord("@")) + 1
            prompt = "".join(map(chr, ids[:start]))
            for step, letter in enumerate(self.answer(prompt)):
                if start + step - 1 < logits.shape[1]:
                    logits[row, start + step - 1, ord(letter)] = 9.0
        return SimpleNamespace(logits=logits)
