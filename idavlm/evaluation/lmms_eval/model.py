"""Models of idavlm in lmms-eval: generation from chat messages with images."""

import tempfile
from pathlib import Path

from lmms_eval import utils
from lmms_eval.api.model import lmms
from tqdm import tqdm

from idavlm.data.photos import PhotoLoader
from idavlm.evaluation.chat_messages import sample_of
from idavlm.evaluation.checkpoint import load_checkpoint
from idavlm.evaluation.generation import evaluating, generate_texts, truncate_at


class IDAVLM(lmms):
    """A checkpoint of :class:`idavlm.IDAVLMForConditionalGeneration`, or any image-text model, with greedy decoding.

    Args:
        pretrained: folder or hub name of the checkpoint: of idavlm, or of an image-text model of transformers, to which
            references are further images of the prompt.
        id_former: folder of :func:`idavlm.save_id_former`, attached to ``pretrained``, a model of transformers.
        batch_size: samples per batch.
        device: device of the model.
        dtype: type of the weights; by default that of the checkpoint.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        id_former: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        **kwargs,
    ) -> None:
        super().__init__()
        unknown = sorted(set(kwargs) - {"max_batch_size", "system_prompt"})
        if unknown:
            raise ValueError(
                f"model_args: {unknown[0]}={kwargs[unknown[0]]!r} is not known; supported are pretrained, "
                "id_former and dtype."
            )
        if kwargs.get("system_prompt"):
            raise ValueError(f"model_args: system_prompt={kwargs['system_prompt']!r} is not supported; remove it.")
        device = "cpu" if device is None else device
        self.model, self.processor = load_checkpoint(pretrained, id_former=id_former, device=device, dtype=dtype)
        self.batch_size = int(batch_size)

    def generate_until(self, requests) -> list[str]:
        """Answer chat messages in the order of the requests; answers end at the first of the stop strings ``until``."""
        order = utils.Collator(
            [request.args for request in requests],
            lambda arguments: (-len(arguments[0]), arguments[3]),
            group_fn=lambda arguments: arguments[2],
            grouping=True,
        )
        answers: list[str] = []
        bar = tqdm(total=len(requests), desc="answers", disable=self.rank != 0)
        for chunk in order.get_batched(n=self.batch_size, batch_fn=None):
            answers += self._answer(chunk)
            bar.update(len(chunk))
        bar.close()
        return order.get_original(answers)

    def _answer(self, chunk) -> list[str]:
        options = dict(chunk[0][2])  # equal within a chunk
        if options.get("do_sample") or options.get("num_beams", 1) != 1:
            raise ValueError(
                f"generation_kwargs={options}: only greedy decoding is supported; remove do_sample and num_beams."
            )
        loader = PhotoLoader(**self.processor.image_limits)
        with tempfile.TemporaryDirectory() as folder:
            samples = []
            for number, (_, doc_to_messages, _, doc_id, task, split) in enumerate(chunk):
                messages = doc_to_messages(self.task_dict[task][split][doc_id])
                samples.append(sample_of(messages, Path(folder), str(number), loader=loader))
            with evaluating(self.model):
                written = generate_texts(self.model, self.processor, samples, int(options.get("max_new_tokens", 256)))
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(filter(None, until))
        texts = [truncate_at(text, until).strip() for text, _ in written]
        for (context, _, arguments, *_), text in zip(chunk, texts, strict=True):
            self.cache_hook.add_partial("generate_until", (context, arguments), text)
        return texts

    def loglikelihood(self, requests):
        raise NotImplementedError("likelihoods are not supported in lmms-eval; use idavlm eval.")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("tasks with several rounds are not supported.")
