"""``idavlm train CONFIG.yaml [key=value ...]``: train a model as a configuration file describes it."""

import argparse
from pathlib import Path

from idavlm.cli.arguments import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("config", type=path, help="YAML file of options, for example one of recipes/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="options that replace those of the file, for example learning_rate=1e-5 or lora.language_model.r=8",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print configuration, parameters, samples and memory; neither read weights nor train",
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, and save model and processor to ``output_dir``."""
    # After the arguments were parsed, because these imports take seconds.
    from transformers import set_seed

    from idavlm.training import IDTrainer, last_complete_checkpoint
    from idavlm.training.build import build
    from idavlm.training.callbacks import IMAGE_TRACKERS
    from idavlm.training.config import read_config
    from idavlm.training.dry_run import describe_run
    from idavlm.utils import write_text

    config = read_config(arguments.config, arguments.overrides)
    args = config.training
    set_seed(args.seed)  # before the model is built: new parts have random weights
    built = build(config, empty=arguments.dry_run)
    if arguments.dry_run:
        if args.process_index == 0:
            print(describe_run(config, built))
        return
    model, processor, datasets = built
    task_evaluation = _task_evaluation(config.data, processor, datasets.get("task"))
    trainer = IDTrainer(
        model,
        args,
        train_dataset=datasets["train"],
        general_dataset=datasets.get("general"),
        eval_dataset=datasets.get("eval"),
        processing_class=processor,
        task_evaluation=task_evaluation,
    )
    if task_evaluation is not None and set(IMAGE_TRACKERS) & set(args.report_to) and config.data.num_logged_samples:
        trainer.add_callback(_sample_logger(task_evaluation, config.data.num_logged_samples, trainer))
    if args.should_save:
        write_text(Path(args.output_dir) / "train_config.yaml", config.to_yaml())
    trainer.train(resume_from_checkpoint=_checkpoint(args, last_complete_checkpoint))
    trainer.save_model()
    trainer.save_state()
    # Several processes leave their group together. One that exits while another still communicates can abort it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _task_evaluation(data, processor, samples):
    """The evaluation of the live model on ``task_data``; None without it."""
    from idavlm.evaluation import TaskEvaluation

    if samples is None:
        return None
    options = {"batch_size": data.task_batch_size, "max_new_tokens": data.max_new_tokens}
    return TaskEvaluation(processor, samples, **options)


def _sample_logger(task_evaluation, count: int, trainer):
    """A callback that logs the first answers of every evaluation."""
    from idavlm.training.callbacks import LoggedSample, SampleLogger

    def take_samples() -> list[LoggedSample]:
        drawn = [
            LoggedSample(f"samples/{number}_{task}", image, text)
            for number, (task, image, text) in enumerate(task_evaluation.draw_answers(count))
        ]
        task_evaluation.result = None
        return drawn

    return SampleLogger(take_samples, trainer.callback_handler.callbacks)


def _checkpoint(args, last_complete_checkpoint) -> str | bool | None:
    """The checkpoint to resume from. ``auto`` is the newest complete one, if there is one."""
    if args.resume_from_checkpoint != "auto":
        return args.resume_from_checkpoint
    try:
        return last_complete_checkpoint(args.output_dir)
    except ValueError as error:
        print(f"resume_from_checkpoint=auto: {error} Training starts from the beginning.")
        return None
