"""Product photos as arrays: idx `.gz` files (Fashion-MNIST) and image folders."""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from engine.errors import ArtifactError, OptionError
from engine.training.config import DataConfig

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_IDX_IMAGES, _IDX_LABELS = 0x0803, 0x0801


@dataclass(frozen=True)
class Dataset:
    """Images uint8 `[N, C, H, W]`, labels int64 `[N]`, class names, and files that were skipped."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def load_dataset(config: DataConfig) -> Dataset:
    """Read the folder that the config names, as idx files or as a folder of images a class.

    Raises ArtifactError for a missing, damaged or empty folder, and where more images than
    `max_skipped` are unreadable; OptionError where class names do not fit the data.
    """
    folder = Path(config.path)
    if not folder.is_dir():
        raise ArtifactError(
            f"data folder '{folder}' does not exist; name one with --data or data.path"
        )
    if any(folder.glob("*-idx3-ubyte.gz")):
        return _load_idx(folder, config)
    return _load_image_folders(folder, config)


def _load_idx(folder: Path, config: DataConfig) -> Dataset:
    pixels = read_idx(folder / "train-images-idx3-ubyte.gz", _IDX_IMAGES)
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", _IDX_LABELS).astype(np.int64)
    if not len(pixels) or len(pixels) != len(labels):
        raise ArtifactError(f"'{folder}' holds {len(pixels)} images but {len(labels)} labels")
    classes = int(labels.max()) + 1
    names = config.labels or tuple(str(index) for index in range(classes))
    if len(names) < classes:
        raise OptionError(f"data.labels must name {classes} classes, got {len(names)}")
    images = _fit(pixels, config.resolution)
    return Dataset(np.repeat(images[:, None], config.channels, axis=1), labels, names)


def read_idx(path: Path, magic: int) -> NDArray[np.uint8]:
    """Read one idx `.gz` file (format: the MNIST page of LeCun et al.).

    Raises ArtifactError for a file that is missing, not gzip, cut short or of another kind.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"idx file '{path}' does not exist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ArtifactError(f"idx file '{path}' is damaged: {error}; fetch it again") from None
    dimensions = magic & 0xFF
    header = 4 + 4 * dimensions
    if len(raw) < header or struct.unpack(">I", raw[:4])[0] != magic:
        raise ArtifactError(f"idx file '{path}' does not start with {magic:#010x}")
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(raw) != expected:
        raise ArtifactError(
            f"idx file '{path}' holds {len(raw)} bytes, its header says {expected}; fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _fit(pixels: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    """Gray images `[N, H, W]` on black `[N, resolution, resolution]`; larger ones are resized."""
    height, width = pixels.shape[1:]
    if max(height, width) > resolution:
        size = (resolution, resolution)
        resized = [
            Image.fromarray(image).resize(size, Image.Resampling.LANCZOS) for image in pixels
        ]
        return np.stack([np.asarray(image) for image in resized])
    top, left = (resolution - height) // 2, (resolution - width) // 2
    fitted = np.zeros((len(pixels), resolution, resolution), np.uint8)
    fitted[:, top : top + height, left : left + width] = pixels
    return fitted


def _load_image_folders(folder: Path, config: DataConfig) -> Dataset:
    classes = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    images, labels, skipped = [], [], []
    for index, class_folder in enumerate(classes):
        for path in sorted(class_folder.rglob("*")):
            if path.suffix.lower() not in SUFFIXES:
                continue
            try:
                images.append(_read_image(path, config))
                labels.append(index)
            # a damaged PNG chunk is a SyntaxError to Pillow
            except (OSError, SyntaxError, Image.DecompressionBombError, ValueError):
                skipped.append(str(path.relative_to(folder)))
    if not images:
        raise ArtifactError(
            f"'{folder}' holds neither idx .gz files nor a folder of readable images a class"
        )
    share = len(skipped) / (len(images) + len(skipped))
    if share > config.max_skipped:
        raise ArtifactError(
            f"{len(skipped)} of {len(images) + len(skipped)} images in '{folder}' are unreadable "
            f"({', '.join(skipped[:3])}), more than data.max_skipped = {config.max_skipped}; "
            "mend them or raise data.max_skipped"
        )
    names = tuple(path.name for path in classes)
    empty = [name for index, name in enumerate(names) if index not in labels]
    if empty:
        raise ArtifactError(f"'{folder}' has classes without a readable image: {', '.join(empty)}")
    if config.labels:
        raise OptionError("data.labels is for idx files; image folders name their classes")
    return Dataset(np.stack(images), np.asarray(labels, np.int64), names, tuple(skipped))


def _read_image(path: Path, config: DataConfig) -> NDArray[np.uint8]:
    """One image as `[C, resolution, resolution]`: upright, centre-cropped, antialiased."""
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I"):  # 16 bits a pixel: Pillow's convert would cut at 255
            upright = Image.fromarray((np.asarray(upright) // 256).clip(0, 255).astype(np.uint8))
        if upright.has_transparency_data:  # a cut-out product stands on white
            cutout = upright.convert("RGBA")
            white = Image.new("RGBA", cutout.size, "white")
            upright = Image.alpha_composite(white, cutout)
        upright = upright.convert("RGB" if config.channels == 3 else "L")
    size = (config.resolution, config.resolution)
    fitted = np.asarray(ImageOps.fit(upright, size, Image.Resampling.LANCZOS))
    return fitted.reshape(*size, config.channels).transpose(2, 0, 1)


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
    """The rows of step `step`: every epoch is a new order, a function of (seed, epoch) alone."""
    epoch_steps = max(count // batch_size, 1)
    epoch, position = divmod(step, epoch_steps)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return order[position * batch_size : (position + 1) * batch_size]


def to_network_range(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 in [0, 255] to float32 in [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)
