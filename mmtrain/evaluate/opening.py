"""Pictures of examples, decoded when they are asked about."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mmtrain.data import images
from mmtrain.errors import ContentError
from mmtrain.evaluate.examples import Picture


def open_pictures(pictures: Sequence[Picture]) -> list[Image.Image]:
    """Decode the pictures of an example, RGB.

    Raises:
        ContentError: one is not there or damaged; names it.
    """
    out = []
    for picture in pictures:
        name = f"picture {picture}" if isinstance(picture, Path) else "a stored picture"
        try:
            blob = picture.read_bytes() if isinstance(picture, Path) else picture
            out.append(images.open_picture(blob))
        except (OSError, images.DecodeError) as error:
            raise ContentError(f"{name} cannot be read: {error}") from error
    return out
