"""The text of an answer while its tokens arrive: whole characters, without what may turn out to be a stop string."""

from collections.abc import Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes the tokens of one answer in pieces that never change afterwards.

    White space at both ends of the answer is left out, as :func:`idavlm.ask` does. The pieces together are the answer.

    Args:
        tokenizer: tokenizer of the model.
        stop: strings that end the answer.

    Attributes:
        text: the pieces so far.
        is_stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.text = ""
        self.is_stopped = False
        self._ids: list[int] = []
        # Decoding begins a few tokens before the new ones: some tokenizers drop the space before a first word.
        self._context, self._decoded = 0, 0
        self._held_back = ""

    def add(self, token: int) -> str:
        """Add a token and return the piece of text that is now certain; "" if there is none."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._decoded])
        after = self._decode(self._ids[self._context :])
        if after.endswith(REPLACEMENT) or len(after) <= len(before):  # a part of a character, or a special token
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return self._release(after[len(before) :], is_last=False)

    def finish(self) -> str:
        """End the answer and return the rest of its text."""
        before = self._decode(self._ids[self._context : self._decoded])
        after = self._decode(self._ids[self._context :])
        self._context = self._decoded = len(self._ids)
        return self._release(after[len(before) :], is_last=True)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _release(self, new: str, *, is_last: bool) -> str:
        if self.is_stopped:
            return ""
        text = self._held_back + new
        places = [text.find(stop) for stop in self.stop if stop in text]
        if places:
            text, self.is_stopped, is_last = text[: min(places)], True, True
        if not self.text:
            text = text.lstrip()
        end = len(text.rstrip())
        if not is_last:
            end = min(end, len(text) - self._length_of_begun_stop(text))
        # White space before what is held back may be the end of the answer.
        end = len(text[:end].rstrip())
        self._held_back = "" if is_last else text[end:]
        self.text += text[:end]
        return text[:end]

    def _length_of_begun_stop(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        lengths = (length for stop in self.stop for length in range(min(len(stop) - 1, len(text)), 0, -1))
        return max((length for length in lengths if any(s.startswith(text[-length:]) for s in self.stop)), default=0)
