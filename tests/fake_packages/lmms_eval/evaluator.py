"""The runner: every document of a task is asked and scored."""

from dataclasses import dataclass
from statistics import fmean

from lmms_eval.models import get_model


@dataclass
class _Request:
    args: tuple


def simple_evaluate(
    model, model_args=None, tasks=None, batch_size=None, device=None, gen_kwargs=None, task_manager=None, **options
):
    arguments = dict(pair.split("=", 1) for pair in model_args.split(","))
    answering = get_model(model)(**arguments, batch_size=batch_size, device=device)
    results = {}
    for name in tasks:
        config = task_manager.configs[name]
        task = config["class"](config=config)
        docs = task.dataset[config["test_split"]]
        answering.task_dict[name] = {config["test_split"]: docs}
        generation = config["generation_kwargs"] | dict(pair.split("=", 1) for pair in gen_kwargs.split(","))
        requests = [
            _Request((doc[config["doc_to_text"]], config["doc_to_messages"], generation, number, name, "test"))
            for number, doc in enumerate(docs)
        ]
        values = {}
        for doc, answer in zip(docs, answering.generate_until(requests), strict=True):
            for metric, value in config["process_results"](doc, [answer]).items():
                values.setdefault(metric, []).append(value)
        results[name] = {f"{metric},none": fmean(found) for metric, found in values.items()}
    return {"results": results}
