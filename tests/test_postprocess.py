"""Post-processing against SciPy, scikit-image and Pillow, and what it does to damaged pictures."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import tritonclient.grpc as triton
from conftest import LABELS
from PIL import Image, ImageEnhance
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_nl_means, richardson_lucy
from tritonclient.utils import InferenceServerException

from engine import enhance, filters
from engine.errors import OptionError
from engine.ground import white_background
from engine.images import Picture
from engine.pipeline import Pipeline
from engine.postprocess import OFF, OPERATIONS, PostProcess, postprocess, upscaled
from engine.request import MAX_SIDE, Request, resolve
from serving.client import Client
from serving.server import Server

ON: dict[str, float] = {
    "median_px": 2, "mean_px": 1, "bilateral": 0.5, "non_local_means": 0.4, "white_balance": 0.8,
    "contrast": 1.3, "clahe": 0.5, "saturation": 1.4, "deblur_px": 1.2, "sharpen": 0.7,
    "sharpen_edges": 2.0, "white_background": 0.1, "upscale": 2,
}  # fmt: skip
NEUTRAL = {name: field.default for name, field in PostProcess.model_fields.items()}
FLOAT = ("mean_px", "white_balance", "contrast", "saturation", "deblur_px", "sharpen",
         "sharpen_edges")  # fmt: skip
SIZES = [(1, 1), (1, 7), (5, 3), (32, 32), (33, 47)]
EDGE_PX = 8  # where a reference continues the picture beyond its border otherwise than OpenCV


def random_picture(height: int, width: int, channels: int, seed: int = 0) -> Picture:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels))
    return values.astype(np.uint8)


def product(channels: int, side: int = 96) -> Picture:
    """A round, striped product on a light ground that is a little darker to the right."""
    y, x = np.mgrid[:side, :side].astype(float)
    inside = np.hypot(x - side / 2, y - side / 2) < side / 3
    stripes = 0.4 + 0.2 * np.sign(np.sin(x / 3)) + 0.1 * np.sin(y / 5)
    colours = np.array([1.0, 0.7, 0.4])[:channels] if channels == 3 else np.ones(1)
    ground = 0.92 - 0.05 * x / side
    picture = np.where(inside[..., None], stripes[..., None] * colours, ground[..., None])
    return np.rint(picture * 255).astype(np.uint8)


def inside(side: int = 96, margin_px: float = 0) -> np.ndarray:
    y, x = np.mgrid[:side, :side].astype(float)
    return np.hypot(x - side / 2, y - side / 2) < side / 3 + margin_px


def noisy(picture: Picture, sigma: float) -> Picture:
    noise = np.random.default_rng(1).normal(0, sigma, picture.shape)
    return (picture + noise).round().clip(0, 255).astype(np.uint8)


def specked(picture: Picture) -> Picture:
    specks = np.random.default_rng(2).random((*picture.shape[:2], 1))
    return np.where(specks < 0.03, 0, np.where(specks > 0.97, 255, picture)).astype(np.uint8)


def blurred(picture: Picture, sigma: float) -> Picture:
    return (
        ndimage.gaussian_filter(picture.astype(float), (sigma, sigma, 0)).round().astype(np.uint8)
    )


def tinted(picture: Picture) -> Picture:
    return (picture * np.array([1.0, 0.85, 0.7])).round().astype(np.uint8)


def faded(picture: Picture) -> Picture:
    return (picture.mean() + (picture - picture.mean()) * 0.6).round().astype(np.uint8)


def pale(picture: Picture) -> Picture:
    gray = picture @ np.array(filters.LUMA)
    return (gray[..., None] + (picture - gray[..., None]) * 0.5).round().astype(np.uint8)


def apart(ours: np.ndarray, reference: np.ndarray, edge_px: int = 0) -> float:
    """The largest distance in gray levels, without the border where it is given."""
    inner = slice(edge_px, -edge_px or None)
    return float(np.abs(ours.astype(float) - reference)[inner, inner].max())


def sharpness(picture: Picture) -> float:
    return float(ndimage.laplace(picture.astype(float), mode="nearest").var())


# ---- neutral, shapes, determinism


def test_every_field_has_an_operation_in_the_order_of_the_fields() -> None:
    assert list(PostProcess.model_fields) == list(OPERATIONS) == list(ON)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ON)
def test_a_neutral_strength_gives_the_same_array(name: str, channels: int) -> None:
    picture = random_picture(17, 12, channels)
    before = picture.copy()
    assert postprocess(picture, PostProcess.parse({name: NEUTRAL[name]})) is picture
    assert OPERATIONS[name](picture, NEUTRAL[name]) is picture
    assert np.array_equal(picture, before)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ON)
def test_every_operation_takes_every_size_and_leaves_its_input(
    name: str, size: tuple[int, int], channels: int
) -> None:
    picture = random_picture(*size, channels)
    before = picture.copy()
    picture.flags.writeable = False
    result = postprocess(picture, PostProcess.parse({name: ON[name]}))
    factor = 2 if name == "upscale" else 1
    assert result.shape == (factor * size[0], factor * size[1], channels)
    assert result.dtype == np.uint8
    assert np.array_equal(picture, before)


@pytest.mark.parametrize("name", FLOAT)
def test_a_float_picture_gives_what_its_uint8_form_gives(name: str) -> None:
    picture = random_picture(24, 31, 3)
    image = picture.astype(np.float32) / np.float32(255)
    result = OPERATIONS[name](image, ON[name])
    assert result.dtype == np.float32
    assert 0 <= result.min() <= result.max() <= 1
    assert apart(OPERATIONS[name](picture, ON[name]), result * 255) <= 0.5 + 1e-3  # one rounding
    assert OPERATIONS[name](image, NEUTRAL[name]) is image


@pytest.mark.parametrize("name", ["saturation", "white_balance"])
def test_a_gray_picture_has_no_colour_to_change(name: str) -> None:
    picture = random_picture(8, 8, 1)
    assert np.array_equal(OPERATIONS[name](picture, ON[name]), picture)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = cv2.getNumThreads()
    yield cv2.setNumThreads
    cv2.setNumThreads(before)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ON)
def test_the_bytes_do_not_depend_on_threads_or_memory_order(
    name: str, channels: int, threads: Callable[[int], None]
) -> None:
    picture = noisy(product(channels, 200), 8)
    options = PostProcess.parse({name: ON[name]})
    planes = np.ascontiguousarray(picture.transpose(2, 0, 1)).transpose(1, 2, 0)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results += [postprocess(picture, options), postprocess(planes, options)]
    assert len({result.tobytes() for result in results}) == 1


SCRIPT = """
import hashlib, sys, numpy as np
from engine.postprocess import PostProcess, postprocess
picture = np.load(sys.argv[1])
result = postprocess(picture, PostProcess.model_validate(sys.argv[2]))
print(hashlib.sha256(result.tobytes()).hexdigest(), "cv2" in sys.modules)
"""


def elsewhere(picture: Picture, options: PostProcess, folder: Path) -> list[str]:
    np.save(folder / "picture.npy", picture)
    command = [sys.executable, "-c", SCRIPT, str(folder / "picture.npy"), str(options)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_all_at_once_are_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    from hashlib import sha256

    picture, options = noisy(product(3), 8), PostProcess.parse(ON)
    digest = sha256(postprocess(picture, options).tobytes()).hexdigest()
    assert elsewhere(picture, options, tmp_path) == [digest, "True"]


def test_opencv_is_imported_by_the_first_picture_that_needs_it_only(tmp_path: Path) -> None:
    assert elsewhere(product(3), OFF, tmp_path)[1] == "False"
    command = [sys.executable, "-c", "import sys, vitrine, engine.pipeline; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "engine.filters" in done.stdout.split()
    assert "cv2" not in done.stdout.split()


def test_the_operations_apply_in_the_order_of_the_fields() -> None:
    picture = expected = noisy(product(3), 8)
    for name, strength in ON.items():
        expected = OPERATIONS[name](expected, strength)
    backwards = PostProcess.parse(dict(reversed(ON.items())))
    assert np.array_equal(postprocess(picture, backwards), expected)


# ---- each against a reference


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("radius_px", [1, 3, 7])
def test_median_is_scipys(radius_px: int, channels: int) -> None:
    picture, side = random_picture(40, 33, channels), 2 * radius_px + 1
    reference = ndimage.median_filter(picture, (side, side, 1), mode="nearest")
    assert np.array_equal(filters.median(picture, radius_px), reference)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("radius_px", [1, 3, 7])
def test_mean_is_scipys(radius_px: int, channels: int) -> None:
    picture, side = random_picture(40, 33, channels), 2 * radius_px + 1
    reference = ndimage.uniform_filter(picture.astype(float), (side, side, 1), mode="mirror")
    assert apart(filters.mean(picture, radius_px), reference) <= 0.5 + 1e-3  # one rounding


@pytest.mark.parametrize("channels", [1, 3])
def test_bilateral_is_its_definition(channels: int) -> None:
    picture, radius_px = noisy(product(channels), 8), 4  # OpenCV's: 1.5 deviations, rounded
    x = picture.astype(float)
    around = np.pad(x, ((radius_px, radius_px), (radius_px, radius_px), (0, 0)), mode="reflect")
    total, weights = np.zeros_like(x), np.zeros((*x.shape[:2], 1))
    for dy, dx in np.ndindex(2 * radius_px + 1, 2 * radius_px + 1):
        far_px = np.hypot(dy - radius_px, dx - radius_px)
        if far_px <= radius_px:
            there = around[dy : dy + x.shape[0], dx : dx + x.shape[1]]
            far = np.abs(there - x).sum(axis=2, keepdims=True) / 32  # 0.5 * 64 gray levels
            weight = np.exp(-((far_px / filters.BILATERAL_SIGMA_PX) ** 2) / 2 - far**2 / 2)
            total, weights = total + weight * there, weights + weight
    assert apart(filters.bilateral(picture, 0.5), total / weights) <= 0.5 + 1e-2  # one rounding


@pytest.mark.parametrize("channels", [1, 3])
def test_non_local_means_cleans_as_well_as_scikit_images(channels: int) -> None:
    clean = product(channels)
    picture, axis = noisy(clean, 10), 2 if channels == 3 else None
    strength = 0.4 * filters.NON_LOCAL_MEANS_H / 255
    reference = denoise_nl_means(
        picture.squeeze(), filters.PATCH_PX, filters.SEARCH_PX // 2, strength, channel_axis=axis
    )
    ours = peak_signal_noise_ratio(clean, filters.non_local_means(picture, 0.4))
    theirs = peak_signal_noise_ratio(clean.squeeze() / 255, reference, data_range=1)
    assert ours > theirs - 2  # it weighs patches otherwise: measured 1.6 dB apart


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("amount", [0.5, 2.0])
def test_sharpen_is_the_unsharp_mask_of_scipys_blur(amount: float, channels: int) -> None:
    picture = product(channels)
    x = picture.astype(float)
    blur = ndimage.gaussian_filter(x, (1, 1, 0), mode="mirror", truncate=4)
    reference = np.clip(x + amount * (x - blur), 0, 255)
    assert apart(filters.sharpen(picture, amount), reference) <= 0.5 + 1e-2  # rounding, float32


def test_sharpen_edges_is_sharpen_at_a_steep_edge_and_nothing_on_a_flat_surface() -> None:
    picture = np.full((32, 32, 1), 60, np.uint8)
    picture[:, 16:] = 190  # a slope of 130 / 255 / 2 by Sobel, above that of full weight
    edges, all_over = filters.sharpen_edges(picture, 1.5), filters.sharpen(picture, 1.5)
    assert np.array_equal(edges[:, 15:17], all_over[:, 15:17])
    assert np.array_equal(edges[:, :14], picture[:, :14])
    assert sharpness(edges) > sharpness(picture)


def test_sharpen_edges_leaves_the_noise_that_sharpen_enlarges() -> None:
    flat = noisy(np.full((64, 64, 3), 128, np.uint8), 3)
    assert filters.sharpen(flat, 2).std() > 2 * flat.std()
    assert filters.sharpen_edges(flat, 2).std() < 1.05 * flat.std()


def test_deblur_is_scikit_images_richardson_lucy() -> None:
    picture = blurred(product(1, 128), 1)
    offsets = np.arange(-4, 5)
    line = np.exp(-(offsets**2) / 2)
    spread = np.outer(line, line) / line.sum() ** 2
    reference = richardson_lucy(picture[..., 0] / 255, spread, filters.DEBLUR_STEPS)
    ours = filters.deblur(picture, 1)[..., 0]
    # The borders differ (zero there, mirrored here) and creep inwards by 8 px a step, fading.
    assert apart(ours, 255 * reference, edge_px=32) <= 0.5 + 1e-2


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.7])
@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_and_saturation_are_pillows(factor: float, channels: int) -> None:
    picture = product(channels)
    image = Image.fromarray(picture[..., 0] if channels == 1 else picture)
    for ours, theirs in (
        (enhance.contrast, ImageEnhance.Contrast), (enhance.saturation, ImageEnhance.Color),
    ):  # fmt: skip
        reference = np.asarray(theirs(image).enhance(factor)).reshape(picture.shape)
        # Pillow rounds the mean or the gray (0.5 times |1 - factor|) and cuts the result (1).
        assert apart(ours(picture, factor), reference) <= 1.5 + 0.5 * abs(1 - factor)


def test_clahe_of_a_gray_picture_is_opencvs_and_raises_local_contrast() -> None:
    picture = faded(noisy(product(1, 128), 4))
    reference = cv2.createCLAHE(enhance.CLIP_LIMIT, (8, 8)).apply(picture[..., 0])
    assert np.array_equal(enhance.clahe(picture, 1.0)[..., 0], reference)

    def local(image: Picture) -> float:
        return float(ndimage.generic_filter(image[::4, ::4, 0].astype(float), np.std, 5).mean())

    assert local(picture) < local(enhance.clahe(picture, 0.5)) < local(enhance.clahe(picture, 1.0))


def test_clahe_moves_all_channels_of_a_pixel_alike() -> None:
    picture = faded(product(3))
    change = enhance.clahe(picture, 0.5).astype(int) - picture
    assert np.ptp(change, axis=2).max() <= 1  # roundings
    assert np.abs(change).max() > 3


def test_white_balance_makes_the_channel_means_of_a_gray_card_equal() -> None:
    card = noisy(np.full((48, 48, 3), 150, np.uint8), 6)
    means = enhance.white_balance(tinted(card), 1.0).mean(axis=(0, 1))
    assert np.ptp(tinted(card).mean(axis=(0, 1))) > 40
    assert np.ptp(means) < 2  # the brightest, which are balanced, stand out by smoothed noise


def test_white_balance_leaves_a_white_ground_and_its_red_product() -> None:
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[8:24, 8:24] = (180, 20, 30)
    assert np.array_equal(enhance.white_balance(picture, 1.0), picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_white_background_is_255_outside_and_unchanged_inside(channels: int) -> None:
    picture = noisy(product(channels), 2)
    whitened = white_background(picture, 0.08)
    assert (whitened[~inside(margin_px=2)] == 255).all()
    assert np.array_equal(whitened[inside(margin_px=-6)], picture[inside(margin_px=-6)])


def test_white_background_leaves_light_parts_that_the_product_encloses() -> None:
    picture = product(3)
    picture[44:52, 44:52] = picture[0, 0]
    assert np.array_equal(white_background(picture, 0.08)[46:50, 46:50], picture[46:50, 46:50])


def test_white_background_takes_specks_on_the_ground_away() -> None:
    picture = product(3)
    picture[4:7, 4:7] = 30
    assert (white_background(picture, 0.08)[:10, :10] == 255).all()


def test_white_background_leaves_a_picture_without_a_plain_ground() -> None:
    picture = random_picture(64, 64, 3)
    assert np.array_equal(white_background(picture, 0.1), picture)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_upscale_keeps_the_picture_and_a_pure_white_ground(factor: int) -> None:
    picture = white_background(product(3), 0.08)
    large = upscaled(picture, factor)
    back = large.reshape(96, factor, 96, factor, 3).mean(axis=(1, 3))
    assert peak_signal_noise_ratio(picture, back, data_range=255) > 30
    rows = slice(0, 8 * factor)  # the product begins at row 16
    assert (large[rows] == 255).all()
    stripe = np.full((16, 16, 1), 255, np.uint8)
    stripe[:, :8] = 0
    assert (upscaled(stripe, factor)[:, 9 * factor :] == 255).all()


# ---- each on the damage that it is for


@pytest.mark.parametrize(
    ("damage", "options", "gain_db"),
    [
        (specked, "median_px=1", 3),
        (lambda picture: noisy(picture, 40), "mean_px=1", 1),
        (lambda picture: noisy(picture, 10), "bilateral=0.5", 3),
        (lambda picture: noisy(picture, 10), "non_local_means=0.4", 3),
        (tinted, "white_balance=1", 3),
        (faded, "contrast=1.6667", 10),
        (pale, "saturation=2", 10),
        (lambda picture: blurred(picture, 1), "deblur_px=1", 1.5),
        (lambda picture: blurred(picture, 1), "sharpen=1.5", 1),
        (lambda picture: blurred(picture, 1), "sharpen_edges=4", 0.5),
    ],
)
def test_a_damaged_picture_comes_nearer_to_the_whole_one(
    damage: Callable[[Picture], Picture], options: str, gain_db: float
) -> None:
    whole = product(3)
    damaged = damage(whole)
    mended = postprocess(damaged, PostProcess.model_validate(options))
    before, after = (peak_signal_noise_ratio(whole, picture) for picture in (damaged, mended))
    assert after > before + gain_db


@pytest.mark.parametrize("options", ["sharpen=1", "sharpen_edges=2", "deblur_px=1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sharpening_raises_the_variance_of_the_laplacian(options: str, channels: int) -> None:
    picture = blurred(product(channels), 0.7)
    sharp = postprocess(picture, PostProcess.model_validate(options))
    assert sharpness(sharp) > 1.2 * sharpness(picture)


@pytest.mark.parametrize("options", ["bilateral=0.5", "non_local_means=0.4", "median_px=1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_denoising_takes_noise_and_keeps_an_edge(options: str, channels: int) -> None:
    clean = np.full((64, 64, channels), 50, np.uint8)
    clean[:, 32:] = 200
    smooth = postprocess(noisy(clean, 10), PostProcess.model_validate(options)).astype(float)
    for flat in (smooth[:, :30], smooth[:, 34:]):
        assert flat.std() < 0.6 * 10
    rise = smooth[:, 32].mean() - smooth[:, 31].mean()
    assert rise > 0.9 * 150


# ---- as an option of a request


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", OFF),
        ("sharpen=0.5,upscale=2", PostProcess(sharpen=0.5, upscale=2)),
        (" clahe = 0.3 , contrast=1 ", PostProcess(clahe=0.3)),
        ({"sharpen": 1}, PostProcess(sharpen=1)),
        (PostProcess(deblur_px=0.1 + 0.2), PostProcess(deblur_px=0.1 + 0.2)),
    ],
)
def test_a_request_takes_a_text_a_table_or_the_options(text: object, expected: PostProcess) -> None:
    assert Request.of({"postprocess": text}).postprocess == expected
    assert PostProcess.model_validate(str(expected)) == expected
    assert PostProcess.model_validate(expected.model_dump()) == expected


FORM = "the form is KEY=VALUE,KEY=VALUE, such as sharpen=0.5,contrast=1.1"
WRONG = [
    (
        "sharp=1",
        "unknown key 'postprocess.sharp'; allowed: median_px, mean_px, bilateral, "
        "non_local_means, white_balance, contrast, clahe, saturation, deblur_px, sharpen, "
        "sharpen_edges, white_background, upscale",
    ),
    ("sharpen=9", "postprocess.sharpen must be 0..4, got 9"),
    ("white_background=0.6", "postprocess.white_background must be 0..0.5, got 0.6"),
    ("upscale=0", "postprocess.upscale must be 1..4, got 0"),
    ("median_px=1.5", "postprocess.median_px must be a whole number, got 1.5"),
    ("sharpen=strong", "postprocess.sharpen must be a number, got 'strong'"),
    ("sharpen=", "postprocess.sharpen must be a number, got ''"),
    ("sharpen=nan", "postprocess.sharpen must be a finite number, got nan"),
    ("sharpen=1e999", "postprocess.sharpen must be a finite number, got inf"),
    ("sharpen", f"postprocess: {FORM}, got 'sharpen'"),
    ("sharpen=1,", f"postprocess: {FORM}, got 'sharpen=1,'"),
    (
        "sharpen=1,sharpen=2",
        "postprocess: 'sharpen' stands there twice, and once is allowed, got 'sharpen=1,sharpen=2'",
    ),
]


@pytest.mark.parametrize(("text", "message"), [*WRONG, (5, f"postprocess: {FORM}, got 5")])
def test_a_wrong_text_is_refused_with_what_is_allowed(text: object, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        Request.of({"label": "bag", "postprocess": text})
    assert str(raised.value) == message


def test_upscaling_beyond_the_largest_picture_is_refused(diffusion: Pipeline) -> None:
    wide = diffusion.model.image.model_copy(update={"width": MAX_SIDE // 2})
    model = diffusion.model.model_copy(update={"image": wide})
    assert resolve(Request.of({"label": "bag", "postprocess": "upscale=2"}), model)
    with pytest.raises(OptionError) as raised:
        resolve(Request.of({"label": "bag", "postprocess": "upscale=3"}), model)
    assert str(raised.value) == (
        "postprocess.upscale makes sides of at most 8192, got 3 times 16x4096; take 2 or less"
    )


TEXT = "sharpen=1.5,contrast=1.2,upscale=2"


@pytest.mark.parametrize("pipeline", ["diffusion", "gan"])
def test_a_request_is_finished_as_it_asked_whatever_its_neighbours_asked(
    pipeline: str, request: pytest.FixtureRequest
) -> None:
    model: Pipeline = request.getfixturevalue(pipeline)
    plain = {"label": "boot", "seed": 4}
    asked = [{**plain, "postprocess": TEXT}, plain, {**plain, "postprocess": "clahe=1"}]
    finished, off, other = model.generate(Request.of(values) for values in asked)
    assert np.array_equal(finished, postprocess(off, PostProcess.model_validate(TEXT)))
    assert np.array_equal(other, postprocess(off, PostProcess(clahe=1)))
    assert finished.shape == (32, 32, 1)
    assert off.shape == (16, 16, 1)


def test_the_command_writes_what_the_pipeline_makes(
    gan_artifact: Path, gan: Pipeline, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "vitrine", "generate", str(gan_artifact), "--label", "bag",
        "--output", str(tmp_path), "--postprocess",
    ]  # fmt: skip
    subprocess.run([*command, TEXT], check=True, capture_output=True)
    (expected,) = gan.generate([Request.of({"label": "bag", "postprocess": TEXT})])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "0.png")), expected[..., 0])
    refused = subprocess.run([*command, "sharpen=9"], check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "postprocess.sharpen must be 0..4, got 9" in refused.stderr


@pytest.mark.parametrize("name", ["diffusion", "gan"])
def test_a_served_picture_is_the_in_process_one_byte_for_byte(
    name: str, client: Client, request: pytest.FixtureRequest
) -> None:
    pipeline: Pipeline = request.getfixturevalue(name)
    texts = [TEXT, "", "clahe=1", str(PostProcess.parse(ON))]
    asked = [(label, seed, text) for seed, text in enumerate(texts) for label in LABELS]
    futures = [
        client.submit(f"tiny-{name}", label, seed=seed, postprocess=text)
        for label, seed, text in asked
    ]
    for (label, seed, text), future in zip(asked, futures, strict=True):
        values = {"label": label, "seed": seed, "postprocess": text}
        (expected,) = pipeline.generate([Request.of(values)])
        assert future.result(60).tobytes() == expected.tobytes()
        assert future.result().shape == expected.shape
    options = PostProcess(sharpen=1.5, contrast=1.2, upscale=2)
    typed = client.generate(f"tiny-{name}", LABELS[0], seed=0, postprocess=options)
    assert np.array_equal(typed, futures[0].result())


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_text_is_refused_by_the_server(server: Server, text: str, message: str) -> None:
    tensor = triton.InferInput("label", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"bag"]], np.object_))
    with (
        contextlib.closing(triton.InferenceServerClient(server.grpc_url)) as connection,
        pytest.raises(InferenceServerException) as raised,
    ):
        connection.infer("tiny-diffusion", [tensor], parameters={"postprocess": text})
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert message in raised.value.message()


def test_the_client_refuses_a_wrong_text_itself(client: Client) -> None:
    with pytest.raises(OptionError, match=r"postprocess\.sharpen must be 0\.\.4, got 9"):
        client.submit("tiny-gan", "bag", postprocess="sharpen=9")
