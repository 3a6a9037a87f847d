"""Griffe extension: paragraphs `field: text` of a dataclass docstring become its "Attributes" section."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension

FIELD = re.compile(r"(\w+)(?:, \w+)*: ")


class FieldSections(Extension):
    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        if cls.docstring is None:
            return
        paragraphs = re.split(r"\n\s*\n", cls.docstring.value)
        for i, paragraph in enumerate(paragraphs):
            start = FIELD.match(paragraph)
            if start and start[1] in cls.members:
                paragraphs[i] = "Attributes:\n" + re.sub(r"(?m)^", "    ", paragraph)
        cls.docstring.value = "\n\n".join(paragraphs)
