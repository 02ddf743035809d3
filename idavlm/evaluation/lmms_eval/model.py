"""idavlm's models in lmms-eval: generation from chat messages with pictures."""

import tempfile
from pathlib import Path

from lmms_eval import utils
from lmms_eval.api.model import lmms
from tqdm import tqdm

from idavlm.evaluation.generation import cut_at, evaluating, generate_texts
from idavlm.evaluation.lmms_eval.messages import sample_of
from idavlm.models import IDAVLMForConditionalGeneration, IDAVLMProcessor


class IDAVLM(lmms):
    """A checkpoint of :class:`idavlm.IDAVLMForConditionalGeneration`, answering greedily.

    Args:
        pretrained: checkpoint.
        batch_size: answers at once.
        device: of the model.
        dtype: of its weights; that of the checkpoint if not given.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str | None = None, dtype: str | None = None, **kwargs
    ) -> None:
        super().__init__()
        unknown = sorted(set(kwargs) - {"max_batch_size", "system_prompt"})
        if unknown:
            raise ValueError(
                f"model_args: {unknown[0]}={kwargs[unknown[0]]!r} is not known; known are pretrained, dtype."
            )
        options = {"dtype": dtype} if dtype else {}
        self.model = IDAVLMForConditionalGeneration.from_pretrained(pretrained, **options).to(device or "cpu")
        self.processor = IDAVLMProcessor.from_pretrained(pretrained)
        self.batch_size = int(batch_size)

    def generate_until(self, requests) -> list[str]:
        """Answers to chat messages, in the order of the requests, cut at the first of ``until``."""
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
        options = dict(chunk[0][2])  # the same for all of a chunk
        if options.get("do_sample") or options.get("num_beams", 1) != 1:
            raise ValueError(
                f"generation_kwargs={options}: idavlm answers greedily; leave do_sample and num_beams out."
            )
        with tempfile.TemporaryDirectory() as folder:
            samples = [
                sample_of(doc_to_messages(self.task_dict[task][split][doc_id]), Path(folder), str(number))
                for number, (_, doc_to_messages, _, doc_id, task, split) in enumerate(chunk)
            ]
            with evaluating(self.model):
                written = generate_texts(self.model, self.processor, samples, int(options.get("max_new_tokens", 256)))
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(filter(None, until))
        texts = [cut_at(text, until).strip() for text, _ in written]
        for (context, _, given, *_), text in zip(chunk, texts, strict=True):
            self.cache_hook.add_partial("generate_until", (context, given), text)
        return texts

    def loglikelihood(self, requests):
        raise NotImplementedError("idavlm in lmms-eval generates; likelihoods of candidates: idavlm eval mmid.")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("idavlm in lmms-eval answers tasks of one round.")
