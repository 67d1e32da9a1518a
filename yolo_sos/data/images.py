# yolo-sos, AGPL-3.0
"""Image files: their size, and those that Ultralytics leaves out of a data set without an error."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from ultralytics.data.utils import exif_size


def image_size(path: Path, *, whole: bool = False) -> tuple[int, int]:
    """Return width and height of an image in pixels, as Ultralytics loads it: turned as its EXIF data say.

    Args:
        path (Path): The image.
        whole (bool): Decode the whole image, which finds one that is cut short.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read; names the file.
    """
    try:
        if not path.stat().st_size:
            raise ValueError("the file is empty")
        with Image.open(path) as image:
            if whole:
                image.load()
            return exif_size(image)
    except FileNotFoundError:
        raise
    except Exception as e:  # Pillow raises errors of any kind; of an unknown format, Ultralytics an ImportError
        reason = "it has no format that Pillow knows" if isinstance(e, ImportError) else e
        raise ValueError(f"{path}: not a readable image: {reason}") from e


def check_complete(given: Iterable[str | Path], read: Iterable[str | Path], source: str | Path) -> None:
    """Check that Ultralytics has read all images of a split, since it leaves some out without an error.

    The images given are those of the split, the images read those of Ultralytics' data set; errors name the source.

    Raises:
        ValueError: If images are missing; names the first, and what is wrong with it.
    """
    files = {Path(file) for file in given}
    if dropped := sorted(files - {Path(file) for file in read}):
        try:
            width, height = image_size(dropped[0], whole=True)
            small = f"of {width} x {height} pixels, where Ultralytics takes 10 x 10 or more"
            reason = f"{dropped[0]}: {small if min(width, height) < 10 else 'its format or its labels are not valid'}"
        except ValueError as e:
            reason = str(e)
        raise ValueError(
            f"{source}: Ultralytics would leave {len(dropped)} of {len(files)} images out without an error; repair or "
            f"remove them, such as {reason}"
        )
