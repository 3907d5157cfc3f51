"""Photos become arrays; what is damaged is named."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.errors import ArtifactError, OptionError
from engine.training.config import DataConfig
from engine.training.data import batch_indices, load_dataset, to_network_range

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def write_idx(folder: Path, pixels: np.ndarray, labels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, magic, array in ((IMAGES, 0x0803, pixels), (LABELS, 0x0801, labels)):
        header = struct.pack(f">I{array.ndim}I", magic, *array.shape)
        (folder / name).write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
    return folder


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    pixels = np.arange(6 * 28 * 28).reshape(6, 28, 28) % 256
    return write_idx(tmp_path / "idx", pixels, np.array([0, 1, 2, 0, 1, 2]))


def load(folder: Path, **options: object):
    return load_dataset(DataConfig.parse({"path": str(folder), "channels": 1, **options}))


def test_idx_images_are_padded_with_black_and_keep_their_pixels(idx: Path) -> None:
    dataset = load(idx, labels=["bag", "boot", "coat"])
    assert dataset.images.shape == (6, 1, 32, 32)
    assert dataset.names == ("bag", "boot", "coat")
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.images[1, 0, 2:30, 2:30].ravel()[:3].tolist() == [16, 17, 18]
    assert dataset.images[:, :, :2].max() == dataset.images[:, :, 30:].max() == 0


def test_idx_images_larger_than_the_resolution_are_resized(idx: Path) -> None:
    assert load(idx, resolution=16, channels=3).images.shape == (6, 3, 16, 16)


def test_idx_classes_without_names_are_numbered_and_too_few_names_are_refused(idx: Path) -> None:
    assert load(idx).names == ("0", "1", "2")
    with pytest.raises(OptionError, match=r"data.labels must name 3 classes, got 1"):
        load(idx, labels=["bag"])


def truncate(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def flip(raw: bytes) -> bytes:
    return raw[:40] + bytes([raw[40] ^ 0x10]) + raw[41:]


def shorten(raw: bytes) -> bytes:
    return gzip.compress(gzip.decompress(raw)[:-5])


def other_magic(raw: bytes) -> bytes:
    return gzip.compress(b"\0\0\x0c\x03" + gzip.decompress(raw)[4:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is damaged"),
        (flip, "is damaged"),
        (lambda raw: b"not gzip", "is damaged"),
        (shorten, "its header says"),
        (other_magic, "does not start with 0x00000803"),
    ],
)
def test_a_damaged_idx_file_is_named(
    idx: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = idx / IMAGES
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactError, match=message) as raised:
        load(idx)
    assert str(path) in str(raised.value)


def test_missing_labels_and_a_wrong_count_of_labels_are_named(idx: Path) -> None:
    write_idx(idx, np.zeros((5, 28, 28)), np.zeros(4))
    with pytest.raises(ArtifactError, match="holds 5 images but 4 labels"):
        load(idx)
    (idx / LABELS).unlink()
    with pytest.raises(ArtifactError, match=f"{LABELS}' does not exist"):
        load(idx)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, every mode that a shop's folder holds; the coat is red on its left half."""
    folder = tmp_path / "photos"
    for name in ("bag", "coat"):
        (folder / name).mkdir(parents=True)
    coat = Image.new("RGB", (40, 40), "white")
    coat.paste((255, 0, 0), (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: red comes to the top
    coat.save(folder / "coat" / "rotated.jpg", exif=exif, quality=95)
    for mode in ("RGB", "RGBA", "P", "L", "LA", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new("RGB", (30, 20), "gray").convert(mode).save(folder / "bag" / f"{mode}.{suffix}")
    (folder / "bag" / "notes.txt").write_text("not a photo")
    return folder


def test_image_folders_give_a_class_a_folder_and_upright_pictures_of_any_mode(photos: Path) -> None:
    dataset = load(photos, channels=3, resolution=16)
    assert dataset.names == ("bag", "coat")
    assert dataset.images.shape == (7, 3, 16, 16)
    assert dataset.labels.tolist() == [0] * 6 + [1]
    red, green, _ = dataset.images[-1].astype(int)
    assert green[:6].max() < 60, "the upper half is red"
    assert green[10:].min() > 200, "the lower half is white"
    assert red.min() > 200


def test_a_cut_out_product_stands_on_white(photos: Path) -> None:
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(photos / "coat" / "zz.png")
    assert load(photos, channels=3).images[-1].min() == 255


def test_a_corrupt_image_is_skipped_by_name_or_refused_if_there_are_too_many(photos: Path) -> None:
    (photos / "bag" / "torn.png").write_bytes((photos / "bag" / "RGB.png").read_bytes()[:40])
    (photos / "bag" / "text.jpg").write_text("not a picture")
    dataset = load(photos, max_skipped=0.5)
    assert sorted(dataset.skipped) == ["bag/text.jpg", "bag/torn.png"]
    assert len(dataset.images) == 7
    with pytest.raises(ArtifactError, match=r"2 of 9 images .*bag/text.jpg.*data.max_skipped"):
        load(photos)


def test_a_folder_that_is_missing_or_holds_no_photos_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist; name one with --data"):
        load(tmp_path / "missing")
    with pytest.raises(ArtifactError, match=r"neither idx \.gz files nor a folder of readable"):
        load(tmp_path)


def test_every_epoch_has_every_photo_once_in_an_order_of_its_own() -> None:
    epochs = [[batch_indices(24, 8, 3, step) for step in range(3 * e, 3 * e + 3)] for e in (0, 1)]
    orders = [np.concatenate(epoch).tolist() for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24))
    assert orders[0] != orders[1]
    assert batch_indices(24, 8, 3, 4).tolist() == orders[1][8:16]


def test_network_range_is_minus_one_to_one() -> None:
    assert to_network_range(np.array([0, 255], np.uint8)).tolist() == [-1, 1]


def test_hidden_folders_are_no_classes_and_an_empty_class_is_named(photos: Path) -> None:
    (photos / ".cache").mkdir()
    assert load(photos).names == ("bag", "coat")
    with pytest.raises(OptionError, match="image folders name their classes"):
        load(photos, labels=["x", "y"])
    (photos / "dress").mkdir()
    with pytest.raises(ArtifactError, match="classes without a readable image: dress"):
        load(photos)
