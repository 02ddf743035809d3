"""Reward functions for reinforcement learning on identity tasks, as TRL's ``GRPOTrainer`` takes them.

A reward function is called with ``completions`` and, by keyword, the columns of the data set, one value per completion.
It returns one reward per completion; None where the example lacks what the reward needs, which TRL leaves out.
"""

from collections.abc import Callable, Sequence
from typing import Any

from idavlm.models import BoxFormat
from idavlm.models.boxes import box_iou as intersection_over_union
from idavlm.utils.answer_parsing import parse_image_number, parse_yes_no
from idavlm.utils.answer_text import name_matches, plain_answer

Reward = Callable[..., list[float | None]]


def name_reward(completions: Sequence[Any], names: Sequence[Any], introduced: Sequence[Any] | None = None, **columns):
    """1 for a completion that mentions the right names and no other introduced name, 0 otherwise.

    Args:
        completions: texts, or conversations of one assistant message.
        names: column of the right name, or of the list of right names, of each example.
        introduced: column of all names that the prompt introduces. Without it, other names are not penalised.
    """
    introduced = [None] * len(completions) if introduced is None else introduced
    rewards = []
    for completion, right, all_names in zip(completions, names, introduced, strict=True):
        if right is None:
            rewards.append(None)
            continue
        text = plain_answer(_text(completion))
        right = [right] if isinstance(right, str) else list(right)
        wrong = [name for name in all_names or () if name not in right]
        rewards.append(float(set(name_matches(text, [*right, *wrong])) == set(right)))
    return rewards


def presence_reward(completions: Sequence[Any], present: Sequence[bool | None], **columns) -> list[float | None]:
    """1 if the completion says correctly whether the identity is in the scene, 0 otherwise, also for a refusal.

    Args:
        completions: texts, or conversations of one assistant message: "Yes", "She is not here", ...
        present: column that says whether the identity is there.
    """
    verdicts = [parse_yes_no(_text(completion)) for completion in completions]
    return [
        None if is_there is None else float(said == is_there) for said, is_there in zip(verdicts, present, strict=True)
    ]


def choice_reward(completions: Sequence[Any], choice: Sequence[int | None], **columns) -> list[float | None]:
    """1 if the completion chooses the right one of several numbered images, 0 otherwise.

    Args:
        completions: texts, or conversations of one assistant message: "Image 2", "the second one", ...
        choice: column of the right number, counted from 1.
    """
    chosen = [parse_image_number(_text(completion)) for completion in completions]
    return [None if right is None else float(said == right) for said, right in zip(chosen, choice, strict=True)]


def box_iou_reward(box_format: str = "thousand") -> Reward:
    """Return a reward function: intersection over union of the box in the completion and the right one.

    A completion without a box, or with numbers that cannot be of the format, has the reward 0. The function takes the
    columns ``box`` (pixels ``[x1, y1, x2, y2]`` of the original image), ``image_size`` (its height and width) and,
    optionally, ``names``: of several boxes in a completion, the one that follows the name counts.

    Args:
        box_format: how the model writes boxes, see :class:`idavlm.models.BoxFormat`.
    """
    boxes = BoxFormat(box_format)

    def box_iou(completions, box, image_size, names=None, **columns):
        names = [None] * len(completions) if names is None else names
        rewards = []
        for completion, right, size, name in zip(completions, box, image_size, names, strict=True):
            if right is None:
                rewards.append(None)
                continue
            found = boxes.parse(_text(completion), tuple(size), name=name if isinstance(name, str) else "")
            rewards.append(0.0 if found is None else intersection_over_union(found, right))
        return rewards

    return box_iou  # trainers log rewards by the name of the function


def _text(completion: Any) -> str:
    """The text of a completion: a string, or the messages of a conversation."""
    if isinstance(completion, str):
        return completion
    parts = []
    for message in completion:
        content = message["content"]
        parts += [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return "".join(parts)
