"""Generated samples go to the tracker that is running, through transformers' own callbacks."""

from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from idavlm.training.callbacks import LoggedSample, SampleLogger


class Tracker(SimpleNamespace):
    """Stands for the modules ``wandb`` and ``trackio``."""

    def __init__(self):
        super().__init__(logged=[])

    def Image(self, image, caption):
        return (image.size, caption)

    def log(self, values):
        self.logged.append(values)


def callback_of(kind: type, attribute: str, tracker):
    callback = kind.__new__(kind)  # its constructor needs the package
    setattr(callback, attribute, tracker)
    return callback


@pytest.mark.parametrize(("kind", "attribute"), [(WandbCallback, "_wandb"), (TrackioCallback, "_trackio")])
def test_images_with_captions(kind, attribute):
    """Once per evaluation, and by the first process only."""
    tracker = Tracker()
    waiting = [LoggedSample("samples/0_location", Image.new("RGB", (8, 6)), "Where is Kate?")]

    def take():
        samples = list(waiting)
        waiting.clear()
        return samples

    logger = SampleLogger(take, [callback_of(kind, attribute, tracker)])
    state = TrainerState(global_step=7)
    for logs in ({"loss": 1.0}, {"eval_location": 0.5}, {"eval_location": 0.5}):
        logger.on_log(None, state, TrainerControl(), logs=logs)
    assert tracker.logged == [{"samples/0_location": ((8, 6), "Where is Kate?"), "train/global_step": 7}]
    waiting.append(LoggedSample("samples/0_location", Image.new("RGB", (8, 6)), "Where is Tom?"))
    state.is_world_process_zero = False
    logger.on_log(None, state, TrainerControl(), logs={"eval_location": 0.5})
    assert len(tracker.logged) == 1


def test_a_tracker_is_needed():
    with pytest.raises(
        ValueError, match="no tracker takes images; set report_to to one of tensorboard, wandb, trackio"
    ):
        SampleLogger(list, [])


def test_the_callbacks_of_transformers_have_these_writers():
    """What the logger uses of them is private, so a version that renames it must fail here."""
    assert "tb_writer" in TensorBoardCallback.__init__.__code__.co_varnames
    for kind, attribute in ((WandbCallback, "_wandb"), (TrackioCallback, "_trackio")):
        assert attribute in kind.__init__.__code__.co_names
