"""Pictures: from network range to uint8, to PNG files, to captioned grids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from engine.errors import OptionError

Picture = NDArray[np.uint8]  # [H, W, C], C = 1 or 3


def from_network_range(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[C, H, W]` in [-1, 1] to `[H, W, C]` in [0, 1], clipped."""
    image: NDArray[np.float32] = x.transpose(1, 2, 0) * np.float32(0.5) + np.float32(0.5)
    return image.clip(np.float32(0), np.float32(1))


def to_network_range(picture: Picture) -> NDArray[np.float32]:
    """uint8 `[H, W, C]` to `[C, H, W]` in [-1, 1]."""
    image = picture.astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    return image * np.float32(2) - np.float32(1)


def resized(picture: Picture, height: int, width: int) -> Picture:
    """The picture in another size (Lanczos), or itself where it has that size."""
    if picture.shape[:2] == (height, width):
        return picture
    image = to_pillow(picture).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(height, width, picture.shape[2])


def to_uint8(image: NDArray[np.float32]) -> Picture:
    """[0, 1] to [0, 255], rounded half to even."""
    picture: Picture = np.rint(image * np.float32(255)).astype(np.uint8)
    return picture


def to_pillow(picture: Picture) -> Image.Image:
    """A Pillow image, mode L for one channel, RGB for three."""
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def save_png(path: Path, picture: Picture) -> None:
    """Write `[H, W, C]` as PNG, making the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pillow(picture).save(path)


def read_picture(path: Path, channels: Literal[1, 3]) -> Picture:
    """A picture file, upright as its EXIF says, gray (1) or RGB (3), transparency on white.

    Raises OptionError where the file is missing or no picture.
    """
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise OptionError(f"'{path}' is not a readable picture: {error}") from None
    flat = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    image = flat.convert("L" if channels == 1 else "RGB")
    return np.asarray(image).reshape(image.height, image.width, channels)


def grid(
    pictures: Sequence[Picture], columns: int, captions: Sequence[str] = (), scale: int = 1
) -> Image.Image:
    """Pictures of one size in rows of `columns`, enlarged `scale` times, a caption under each.

    A caption may have several lines; it is cut where it is wider than its picture.
    """
    height, width = (side * scale for side in pictures[0].shape[:2])
    font = ImageFont.load_default(size=11)
    lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    gap, line_height = 6, 14
    cell_height, cell_width = height + lines * line_height + gap, width + gap
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        left, top = gap + column * cell_width, gap + row * cell_height
        enlarged = to_pillow(picture).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top))
        if captions:
            for number, line in enumerate(captions[index].split("\n")):
                while line and draw.textlength(line, font) > width:
                    line = line[:-1]
                y = top + height + number * line_height
                draw.text((left, y), line, "black", font)
    return sheet
