"""Reward functions score texts and conversations, and leave out examples without the answer."""

import pytest

from idavlm.training.rewards import box_iou_reward, choice_reward, name_reward, presence_reward


def said(text):
    return [{"role": "assistant", "content": text}]


def test_names():
    completions = [
        "It is Kate.",
        "Tom, I think.",
        "Kate or Tom",
        "Kateryna",
        said("KATE!"),
        said("Kate and Tom"),
        "Kate",
    ]
    names = ["Kate", "Kate", "Kate", "Kate", "Kate", ["Kate", "Tom"], None]
    introduced = [["Kate", "Tom"]] * 7
    assert name_reward(completions, names, introduced) == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, None]
    assert name_reward(["Kate or Tom"], ["Kate"]) == [1.0]
    assert name_reward(["Rene\u0301e is here"], ["Ren\u00e9e"]) == [1.0]


def test_presence():
    completions = ["Yes, she is.", "She is not here.", said("No."), "I cannot say", "Yes"]
    assert presence_reward(completions, [True, True, False, True, None]) == [1.0, 0.0, 1.0, 0.0, None]


def test_choice():
    completions = ["Image 2", "the first one", said("Picture 3."), "none of them", "Image 1"]
    assert choice_reward(completions, [2, 2, 3, 1, None]) == [1.0, 0.0, 1.0, 0.0, None]


def test_boxes():
    reward = box_iou_reward("pixels")
    right, size = [10, 10, 30, 30], [100, 100]
    completions = ["[10, 10, 30, 30]", "[10, 10, 30, 20]", said("[50, 50, 60, 60]"), "over there", "[0, 0, 1, 1]"]
    rewards = reward(completions, box=[right] * 4 + [None], image_size=[size] * 5, prompts=["?"] * 5)
    assert rewards[:4] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert rewards[4] is None
    both = "Tom [0, 0, 5, 5] Kate [10, 10, 30, 30]"
    assert reward([both], box=[right], image_size=[size], names=["Kate"]) == [1.0]
    assert box_iou_reward("thousand")(["(100,100),(300,300)"], box=[right], image_size=[size])[0] == pytest.approx(
        1, abs=0.02
    )
