"""The progress bar of a training run."""

from pathlib import Path

from transformers import ProgressCallback

LABELS = {"loss_identity": "identity", "loss_general": "general", "identity_map_loss": "identity map"}
"""Label in the progress bar of each log entry that is shown."""


class SourceProgress(ProgressCallback):
    """A progress bar that shows the loss of each source and the name of the output folder.

    It replaces transformers' ``ProgressCallback``, which prints every log entry as a dictionary.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(Path(args.output_dir).name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or logs is None:
            return
        losses = {label: f"{logs[name]:.3f}" for name, label in LABELS.items() if name in logs}
        if losses:
            self.training_bar.set_postfix(losses)
        scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if scores:
            values = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            self.training_bar.write(f"{self.training_bar.desc}step {state.global_step}: {values}")
