"""What a run shows."""

from pathlib import Path

from transformers import ProgressCallback


class SourceProgress(ProgressCallback):
    """The progress bar, named after the run's folder, with the losses of each source for printed dictionaries."""

    SHOWN = {"loss_identity": "identity", "loss_general": "general", "identity_map_loss": "attention"}  # noqa: RUF012

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(Path(args.output_dir).name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or logs is None:
            return
        shown = {label: f"{logs[name]:.3f}" for name, label in self.SHOWN.items() if name in logs}
        if shown:
            self.training_bar.set_postfix(shown)
        evaluated = {name: value for name, value in logs.items() if name.startswith("eval_")}
        if evaluated:
            values = ", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in evaluated.items())
            self.training_bar.write(f"{self.training_bar.desc}step {state.global_step}: {values}")
