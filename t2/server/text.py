"""From tokens to text as it grows: whole characters only, and nothing of what may become a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
"""What tokenizers put for bytes that are no whole character yet."""


class GrowingText:
    """The text of an answer, token by token.

    Tokens are decoded with some before them, since a token's text depends on those (a space, an accent).

    Args:
        stops: strings that end the text, without being part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._start = self._read = 0
        self._pending = ""
        self.stopped = False
        self.length = 0
        """Characters that were given out."""

    def _decoded(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self._ids.append(token)
        before, now = self._decoded(self._start, self._read), self._decoded(self._start, len(self._ids))
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._given(now[len(before) :], last=False)

    def end(self) -> str:
        """What was held back."""
        before, now = self._decoded(self._start, self._read), self._decoded(self._start, len(self._ids))
        self._read = len(self._ids)
        return self._given(now[len(before) :], last=True)

    def _given(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._pending + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._pending = text[: min(found)], ""
        else:
            held = 0 if last else self._may_begin_a_stop(text)
            text, self._pending = text[: len(text) - held], text[len(text) - held :]
        self.length += len(text)
        return text

    def _may_begin_a_stop(self, text: str) -> int:
        """Characters at the end that a stop string may begin with."""
        return max(
            (n for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )
