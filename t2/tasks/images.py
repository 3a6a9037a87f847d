"""Images of a task's problems, read when a model is to look at them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from t2.weights.files import FileFormatError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class StoredImage:
    """An image that stays where it is until it is asked for: the images of a data set need not fit in memory.

    key: tells it from the data set's other images, on any machine.
    where: for people.
    read: the bytes of its file.
    """

    key: str
    where: str
    read: Callable[[], bytes] = field(compare=False, repr=False)

    @classmethod
    def of_file(cls, path: Path) -> StoredImage:
        """Raises FileNotFoundError if there is no such file."""
        if not path.is_file():
            raise FileNotFoundError(f"images: file {path} does not exist")
        return cls(path.name, str(path), path.read_bytes)


def open_image(image: Image | Path | str | StoredImage) -> Image:
    """The image in RGB.

    Raises:
        FileNotFoundError: its file does not exist.
        FileFormatError: what is there is no image, or damaged.
        ImportError: pillow is not installed.
    """
    try:
        from PIL import Image as pillow
    except ImportError as error:
        raise ImportError("images need the package pillow: pip install 't2kernels[vision]'") from error
    if isinstance(image, pillow.Image):
        return image.convert("RGB")
    if not isinstance(image, str | Path | StoredImage):
        raise TypeError(f"images: expected PIL images, paths or StoredImages, got {type(image).__name__}")
    stored = image if isinstance(image, StoredImage) else StoredImage.of_file(Path(image).expanduser())
    try:
        return pillow.open(io.BytesIO(stored.read())).convert("RGB")
    except FileNotFoundError:
        raise
    except Exception as error:  # pillow's decoders raise whatever the damage happens to hit
        raise FileFormatError(f"{stored.where}: expected an image, got what pillow can't read: {error}") from error
