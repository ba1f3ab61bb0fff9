"""Every kind of picture becomes the same views; what is no picture is refused by name."""

import base64
import json
import os
import subprocess
import sys
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from media import data_url, encoded, noise, served, smooth
from packaging import version
from PIL import Image
from PIL.Image import Resampling
from safetensors import safe_open
from tiny import GOLDEN, golden
from transformers import AutoImageProcessor

from spa3r import Spa3RConfig, Spa3RImageProcessor, Spa3VLMProcessor
from spa3r.media import resampling
from spa3r.media.images import to_rgb

SIZE = 56
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def processor():
    return Spa3RImageProcessor(size=SIZE)


PILLOW_LEVELS = 0 if version.parse(PIL.__version__) >= version.parse("13") else 2
"""By so much, of 255, do older ones resample some pictures otherwise than the one that made the golden views."""


def golden_cases() -> list[dict]:
    with safe_open(GOLDEN / "preprocess.safetensors", "pt") as file:
        return json.loads(file.metadata()["cases"])


def views_of(processor, images, **kwargs) -> list[np.ndarray]:
    """Processed views as the models would see them, 8-bit."""
    batch = processor(images, **kwargs)
    return processor.unpack(batch["view_pixel_values"], batch["view_grid_hw"])


def assert_same_pictures(ours, reference) -> None:
    assert np.array_equal(np.asarray(to_rgb(ours)), np.asarray(reference.convert("RGB")))


# Pinned ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", golden_cases(), ids=lambda case: f"{case['index']}-{case['source_mode']}-{case['mode']}"
)
def test_views_are_the_released_codes_to_the_bit(case):
    tensors = golden("preprocess", f"{case['index']}.")
    processor = Spa3RImageProcessor(size=case["target_size"], mode=case["mode"])
    source = Image.fromarray(tensors["source"].numpy())
    assert (source.mode, list(source.size)) == (case["source_mode"], case["source_wh"])
    view = processor.process_view(source)
    expected = tensors["views"].permute(1, 2, 0).numpy()
    assert [view.height, view.width] == case["view_hw"] == list(expected.shape[:2])
    np.testing.assert_allclose(np.asarray(view, int), expected, rtol=0, atol=PILLOW_LEVELS)
    batch = processor(source)
    assert (batch["view_grid_hw"] * 14).tolist() == [case["view_hw"]]
    unpacked = processor.unpack(batch["view_pixel_values"], batch["view_grid_hw"])[0]
    np.testing.assert_allclose(unpacked.astype(int), expected, rtol=0, atol=PILLOW_LEVELS)


class Qwen:
    """Stands for a VLM's processor that makes a token of 2 x 2 patches of 14 pixels."""

    class image_processor:
        patch_size, merge_size = 14, 2


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: str(case["index"]))
def test_the_vlm_sees_views_cut_to_whole_tokens(case):
    tensors = golden("preprocess", f"{case['index']}.")
    processor = Spa3VLMProcessor(Qwen(), Spa3RImageProcessor(size=case["target_size"], mode=case["mode"]))
    (view,), (seen,) = processor._load_views([tensors["source"].numpy()])
    height, width = case["vlm_image_hw"]
    assert (seen.height, seen.width) == (height, width)
    assert np.array_equal(np.asarray(seen), np.asarray(view)[:height, :width])


# Layout ---------------------------------------------------------------------------------------------------------------


def test_patches_are_channel_row_column_and_normalized(processor):
    (view,) = [processor.process_view(smooth(80, 61))]
    batch = processor(smooth(80, 61))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(np.array(view)).float() / 255 - mean) / std).permute(2, 0, 1)
    rows, columns = batch["view_grid_hw"][0].tolist()
    assert (rows, columns) == (3, 4) and batch["view_pixel_values"].dtype == torch.float32
    for index, patch in enumerate(batch["view_pixel_values"]):
        y, x = 14 * (index // columns), 14 * (index % columns)
        assert torch.allclose(patch.view(3, 14, 14), pixels[:, y : y + 14, x : x + 14], atol=1e-6)


def test_unpack_inverts_pack_for_mixed_sizes_and_half_precision(processor):
    pictures = [noise(80, 61, 0), noise(40, 90, 1), noise(200, 30, 2)]
    batch = processor([pictures[:1], pictures[1:]])
    views = [np.asarray(processor.process_view(picture)) for picture in pictures]
    for ours, view in zip(processor.unpack(batch["view_pixel_values"], batch["view_grid_hw"]), views, strict=True):
        assert np.array_equal(ours, view)
    half = processor.unpack(batch["view_pixel_values"].bfloat16(), batch["view_grid_hw"])
    assert all(np.abs(ours.astype(int) - view).max() <= 2 for ours, view in zip(half, views, strict=True))


@pytest.mark.parametrize(
    ("images", "views_per_scene"),
    [
        (noise(40, 40), [1]),
        ([noise(40, 40)], [1]),
        ([noise(40, 40), noise(30, 60)], [2]),
        ([[noise(40, 40)], [noise(30, 60), noise(60, 30), noise(99, 98)], [noise(28, 28)] * 2], [1, 3, 2]),
        (([noise(40, 40)], (noise(30, 60),)), [1, 1]),
        ((picture for picture in [noise(40, 40)] * 3), [3]),
        (np.zeros((5, 30, 40, 3), np.uint8), [5]),
        (torch.rand(4, 3, 30, 40), [4]),
        ([np.zeros((30, 40), np.uint8), noise(30, 30), torch.rand(3, 20, 20)], [3]),
        ([noise(30, 40)] * 64, [64]),
        ([torch.rand(2, 3, 30, 40), torch.rand(1, 3, 28, 28)], [2, 1]),
        ([[torch.rand(2, 3, 30, 40), noise(30, 40)], [noise(40, 30)]], [3, 1]),
        (np.zeros((2, 3, 30, 40, 3), np.uint8), [3, 3]),
    ],
    ids=(
        "one flat1 flat2 ragged tuples generator array4d tensor4d mixed_types sixty_four tensors4d nested4d array5d"
    ).split(),
)
def test_scenes_from_every_nesting(processor, images, views_per_scene):
    batch = processor(images)
    assert batch["views_per_scene"].tolist() == views_per_scene
    assert len(batch["view_grid_hw"]) == sum(views_per_scene)
    assert batch["view_pixel_values"].shape == (batch["view_grid_hw"].prod(-1).sum(), 3 * 14 * 14)
    assert (batch["view_pixel_values"] != 0).any() and batch["view_pixel_values"].isfinite().all()


def test_packed_scenes_are_the_scenes_one_after_the_other(processor):
    scenes = [[noise(40, 40, 0)], [noise(30, 60, 1), noise(60, 30, 2)]]
    packed, alone = processor(scenes), [processor(scene) for scene in scenes]
    for key in packed:
        assert torch.equal(packed[key], torch.cat([batch[key] for batch in alone]))


@pytest.mark.parametrize(
    ("size_wh", "mode", "view_hw"),
    [
        ((4000, 20), "crop", (14, SIZE)),
        ((20, 4000), "crop", (SIZE, SIZE)),
        ((4000, 20), "pad", (SIZE, SIZE)),
        ((20, 4000), "pad", (SIZE, SIZE)),
        ((14, 14), "crop", (SIZE, SIZE)),
        ((56, 35), "crop", (28, SIZE)),  # 35 / 14 = 2.5 rounds to the even 2
        ((56, 49), "crop", (SIZE, SIZE)),  # 3.5 rounds to the even 4
    ],
)
def test_extreme_shapes(processor, size_wh, mode, view_hw):
    picture = Image.new("RGB", size_wh, (10, 200, 30))
    (view,) = views_of(processor, picture, mode=mode)
    assert view.shape == (*view_hw, 3)
    coloured = (view == (10, 200, 30)).all(-1)
    assert coloured.all() if mode == "crop" else (coloured.any() and ((view == 255).all(-1) | coloured).all())


def test_crop_takes_the_middle_and_pad_centres(processor):
    striped = Image.fromarray(np.repeat(np.uint8([10, 100, 200]), 40)[:, None].repeat(40, 1))  # 40 x 120: three bands
    (cropped,) = views_of(processor, striped)
    assert cropped[[8, 28, 48], 28, 0].tolist() == [100, 100, 100]
    (padded,) = views_of(processor, striped, mode="pad")
    assert padded[28, [2, 28, 54], 0].tolist() == [255, 100, 255]


# Sources of one picture -----------------------------------------------------------------------------------------------


PICTURE = noise(31, 23)
ARRAY = np.array(PICTURE)
FLOATS = ARRAY.astype(np.float32) / 255
SOURCES = {
    "opened": Image.open(BytesIO(encoded(PICTURE))),
    "data_url": data_url(PICTURE),
    "data_url_in_lines": data_url(PICTURE).replace("base64,", "base64,\n"),
    "hwc": ARRAY,
    "chw": ARRAY.transpose(2, 0, 1),
    "fortran": np.asfortranarray(ARRAY),
    "float32": FLOATS,
    "float64_chw": FLOATS.transpose(2, 0, 1).astype(np.float64),
    "int64": ARRAY.astype(np.int64),
    "uint16": ARRAY.astype(np.uint16) * 257,
    "rgba_opaque": np.concatenate([ARRAY, np.full_like(ARRAY[..., :1], 255)], -1),
    "tensor": torch.from_numpy(ARRAY),
    "tensor_chw": torch.from_numpy(ARRAY).permute(2, 0, 1),
    "tensor_float": torch.from_numpy(FLOATS).permute(2, 0, 1),
    "tensor_grad": torch.tensor(FLOATS, requires_grad=True),
    "tensor_uint16": torch.from_numpy(ARRAY.astype(np.uint16) * 257),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_picture(kind):
    assert_same_pictures(SOURCES[kind], PICTURE)


@pytest.mark.parametrize("source", [Path, str], ids=["path", "string"])
def test_files_give_the_same_picture(source, tmp_path):
    PICTURE.save(tmp_path / "a picture é.png")
    assert_same_pictures(source(tmp_path / "a picture é.png"), PICTURE)


def test_half_precision_tensors_are_pictures():
    picture = smooth(31, 23)
    for dtype in (torch.float16, torch.bfloat16):
        ours = np.asarray(to_rgb(torch.from_numpy(np.array(picture)).to(dtype) / 255), int)
        assert np.abs(ours - np.asarray(picture)).max() <= 1


GRAY = noise(31, 23, channels=1)


@pytest.mark.parametrize(
    "source",
    [
        np.array(GRAY),
        np.array(GRAY)[..., None],
        np.array(GRAY)[None],
        torch.from_numpy(np.array(GRAY)),
        torch.from_numpy(np.array(GRAY))[None] / 255,
        np.array(GRAY).astype(np.uint16) * 257,
    ],
    ids="hw hw1 1hw tensor tensor_float uint16".split(),
)
def test_gray_arrays(source):
    assert_same_pictures(source, GRAY)


# Odd but good ---------------------------------------------------------------------------------------------------------


def through_file(picture: Image.Image, kind: str = "PNG", **kwargs) -> Image.Image:
    return Image.open(BytesIO(encoded(picture, kind, **kwargs)))


def on_white(picture: Image.Image) -> Image.Image:
    """The definition: color x alpha + white x (1 - alpha)."""
    pixels = np.asarray(picture.convert("RGBA"), np.float64)
    alpha = pixels[..., 3:] / 255
    return Image.fromarray((pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))


def palette(transparent: bool) -> Image.Image:
    picture = smooth(40, 30).quantize(16)
    if transparent:
        picture.info["transparency"] = 3
    return through_file(picture)


TRANSPARENT = {
    "RGBA": partial(noise, 40, 30, channels=4),
    "LA": partial(noise, 40, 30, channels=2),
    "P_transparent": partial(palette, True),
    "RGB_with_transparent_colour": lambda: through_file(smooth(40, 30), transparency=(0, 0, 90)),
    "RGBA_file": lambda: through_file(noise(40, 30, channels=4)),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
@pytest.mark.parametrize("source", [lambda p: p, data_url], ids=["picture", "data_url"])
def test_transparency_is_blended_on_white(kind, source):
    picture = TRANSPARENT[kind]()
    assert picture.has_transparency_data
    ours, reference = (np.asarray(p, int) for p in (to_rgb(source(picture)), on_white(picture)))
    assert np.abs(ours - reference).max() <= 1
    assert np.abs(ours - np.asarray(picture.convert("RGB"), int)).max() > 10  # dropping alpha is something else


def test_rgba_arrays_are_blended_on_white():
    picture = noise(40, 30, channels=4)
    for array in (np.array(picture), np.array(picture).transpose(2, 0, 1), torch.from_numpy(np.array(picture)) / 255):
        assert_same_pictures(array, to_rgb(picture))


STEPS = np.linspace(0, 65535, 40 * 30).round().reshape(30, 40)
ODD = {
    "L": (GRAY, GRAY),
    "1": (GRAY.convert("1"), GRAY.convert("1").convert("L")),
    "1_array": (np.array(GRAY.convert("1")), GRAY.convert("1").convert("L")),
    "P": (palette(False), palette(False).convert("RGB")),
    "I;16_file": (
        through_file(Image.fromarray(STEPS.astype(np.uint16))),
        Image.fromarray(np.uint8((STEPS / 257).round())),
    ),
    "I;16_dark": (Image.fromarray(np.uint16(STEPS / 257)), Image.fromarray(np.uint8((STEPS / 257 // 1 / 257).round()))),
    "uint16_dark": (np.uint16(STEPS / 257), Image.fromarray(np.uint8((STEPS / 257 // 1 / 257).round()))),
    "I": (Image.fromarray(STEPS.astype(np.int32)), Image.fromarray(np.uint8((STEPS / 257).round()))),
    "I_of_8_bits": (GRAY.convert("I"), GRAY),
    "F": (GRAY.convert("F"), GRAY),
    "CMYK": (through_file(smooth(40, 30).convert("CMYK"), "JPEG"), None),
    "YCbCr": (smooth(40, 30).convert("YCbCr"), smooth(40, 30).convert("YCbCr").convert("RGB")),
    "GIF": (through_file(smooth(40, 30).quantize(64), "GIF"), smooth(40, 30).quantize(64).convert("RGB")),
    "WEBP": (through_file(smooth(40, 30), "WEBP", lossless=True), smooth(40, 30)),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_pictures(kind, processor):
    source, reference = ODD[kind]
    if reference is None:
        assert source.mode == "CMYK"
        assert np.abs(np.asarray(to_rgb(source), int) - np.asarray(smooth(40, 30), int)).mean() < 8
    else:
        assert_same_pictures(source, reference)
    (view,) = views_of(processor, source)
    assert view.shape[1] == SIZE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("source", ["opened", "path", "data_url"])
def test_a_camera_held_sideways_gives_upright_pictures(orientation, source, tmp_path):
    upright = smooth(48, 32)
    # What the camera stores so that the tag turns it upright: the inverse of what each tag asks for.
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(stored, "PNG", exif=exif)
    (tmp_path / "picture.png").write_bytes(content)
    picture = {
        "opened": lambda: Image.open(BytesIO(content)),
        "path": lambda: tmp_path / "picture.png",
        "data_url": lambda: "data:image/png;base64," + base64.b64encode(content).decode(),
    }[source]()
    assert_same_pictures(picture, upright)
    jpeg = to_rgb(Image.open(BytesIO(encoded(stored, "JPEG", exif=exif, quality=95))))
    assert jpeg.size == upright.size
    assert np.abs(np.asarray(jpeg, int) - np.asarray(upright, int)).mean() < 4


def test_the_callers_picture_is_left_alone(processor):
    picture = noise(40, 30, channels=4)
    before, array = picture.copy(), np.full((30, 40, 3), 7, np.int64)
    processor([picture, array])
    assert picture.mode == "RGBA" and np.array_equal(np.asarray(picture), np.asarray(before)) and (array == 7).all()


def test_pictures_from_the_web():
    picture = noise(40, 30, channels=4)
    with served({"/a.png": encoded(picture), "/b.png": b"<html>moved</html>"}) as address:
        assert_same_pictures(f"{address}/a.png", to_rgb(picture))
        with pytest.raises(ValueError, match=r"can't be decoded: http://\S+/b.png \(.* It is damaged or not a picture"):
            to_rgb(f"{address}/b.png")
        words = r"http://\S+/c.png can't be downloaded \(.*404.* Check the address and the network"
        with pytest.raises(ValueError, match=words):
            to_rgb(f"{address}/c.png")
    with pytest.raises(ValueError, match="can't be downloaded"):
        to_rgb(f"{address}/a.png")


# Bad ------------------------------------------------------------------------------------------------------------------

GOOD = noise(30, 30)
CUT = encoded(noise(90, 60), "JPEG")[:3000]
ONE_VIEW = "`images` must hold at least one picture for every scene, got none for scene {}. Give at least one picture"
BOTH = "`images` must hold either pictures or lists of pictures, got both. Put every scene's pictures in a list"
SHAPE = r"must have shape \(H, W\), \(H, W, 1\|3\|4\) or \(1\|3\|4, H, W\), got "
FINITE = r"A picture must hold finite values, got .* with NaN or infinite pixels"
RANGE = r"A floating point picture must hold values in \[0, 1\], got \[{}\]. Divide by 255, or pass uint8"
INTEGERS = r"An integer picture must hold values in \[0, 65535\], got \[{}\]. Pass uint8"
SMALL = r"Every picture must be at least one patch, 14 x 14 pixels, got .* of {} \(width x height\)"
TYPE = "A picture must be a PIL image, a path, a URL, base64, bytes, an array or a tensor, got {}."


def filled(value, dtype=np.float32, shape=(30, 30, 3)):
    array = np.full(shape, 0.5).astype(dtype)
    array[3, 4] = value
    return array


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], ONE_VIEW.format(0)),
        ([[]], ONE_VIEW.format(0)),
        ([[GOOD], []], ONE_VIEW.format(1)),
        (np.zeros((0, 30, 30, 3), np.uint8), ONE_VIEW.format(0)),
        ([GOOD, [GOOD]], BOTH),
        ([[GOOD], GOOD], BOTH),
        (None, "`images` must be pictures, or lists of pictures, got NoneType"),
        (3, "`images` must be pictures, or lists of pictures, got int"),
        ([None], TYPE.format("NoneType")),
        ([{"path": "a.png"}], TYPE.format("dict")),
        ([b"png"], r"can't be decoded: 3 bytes \(cannot identify image file\)"),
        ([[[GOOD]]], TYPE.format("list")),
        (np.zeros(30), SHAPE + r"\(30,\)"),
        (np.zeros((30, 30, 2)), SHAPE + r"\(30, 30, 2\)"),
        (np.zeros((30, 30, 5)), SHAPE + r"\(30, 30, 5\)"),
        ([[torch.zeros(1, 2, 3, 30, 30)]], SHAPE + r"\(2, 3, 30, 30\)"),
        ([torch.zeros(2, 3, 30, 30), GOOD], BOTH),
        ([torch.zeros(0, 3, 30, 30)], ONE_VIEW.format(0)),
        (filled(np.nan), FINITE),
        (filled(np.inf), FINITE),
        (torch.from_numpy(filled(-np.inf)).half(), FINITE),
        (Image.fromarray(filled(np.nan, shape=(30, 30))), FINITE),
        (filled(1.5), RANGE.format("0.5, 1.5")),
        (filled(-0.2), RANGE.format("-0.2, 0.5")),
        (np.full((30, 30), 255.0), RANGE.format("255, 255")),
        (filled(-1, np.int64), INTEGERS.format("-1, 0")),
        (filled(70000, np.int32), INTEGERS.format("0, 70000")),
        (np.full((30, 30), 1j), "must hold integers or floats, got complex128"),
        (noise(13, 30), SMALL.format("13 x 30")),
        (noise(30, 13), SMALL.format("30 x 13")),
        (np.zeros((1, 1, 3), np.uint8), SMALL.format("1 x 1")),
        (np.zeros((0, 30, 3), np.uint8), r"A picture must have at least one pixel, got an array of shape \(0, 30, 3\)"),
        (["data:image/png;base64,AAAA"], r"can't be decoded: data:image/png;base64,AAAA \("),
        (["data:image/png;base64," + "A" * 4000], r"can't be decoded: data:image/png;base64,A{18}\.\.\. \("),
    ],
)
def test_what_makes_no_views_is_refused(processor, images, words):
    with pytest.raises(ValueError, match=words):
        processor(images)


@pytest.mark.parametrize("source", [Path, str], ids=["path", "string"])
def test_truncated_files_are_named(processor, tmp_path, source):
    file = tmp_path / "cut.jpg"
    file.write_bytes(CUT)
    words = r"The picture can't be decoded: \S+cut\.jpg \(.*truncated.*\)\. It is damaged or not a picture: leave"
    with pytest.raises(ValueError, match=words):
        processor([GOOD, source(file)])


def test_a_truncated_picture_that_was_opened_but_not_read(processor):
    with pytest.raises(ValueError, match=r"The picture can't be decoded: a PIL image \(.*truncated"):
        processor([GOOD, Image.open(BytesIO(CUT))])


def test_files_that_are_no_pictures_are_named(processor, tmp_path):
    (tmp_path / "text.jpg").write_text("This is no picture.")
    with pytest.raises(ValueError, match=r"The picture can't be decoded: \S+text\.jpg \("):
        processor(tmp_path / "text.jpg")
    with pytest.raises(ValueError, match=r"The picture \S+ can't be opened: Is a directory\. Give a file"):
        processor(tmp_path)
    (tmp_path / "photo.heic").write_text("No decoder knows this.")
    with pytest.raises(ValueError, match=r"photo\.heic \(.*It is damaged or not a picture"):
        processor(tmp_path / "photo.heic")
    with pytest.raises(ValueError, match=r"The picture \S+missing\.jpg doesn't exist\. Check the path\."):
        processor([[GOOD], [str(tmp_path / "missing.jpg")]])


def test_decompression_bombs_are_refused(processor, tmp_path, monkeypatch):
    noise(60, 60).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"can't be decoded: \S+bomb\.png \(.*decompression bomb"):
        processor(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": 520}, "`size` must be a positive multiple of `patch_size` = 14, got 520"),
        ({"size": 0}, "`size` must be a positive multiple of `patch_size` = 14, got 0"),
        ({"size": 56, "patch_size": 16}, "multiple of `patch_size` = 16, got 56"),
        ({"mode": "stretch"}, "`mode` must be 'crop', 'pad' or 'pretraining', got 'stretch'"),
    ],
)
def test_settings_are_checked(fields, words):
    with pytest.raises(ValueError, match=words):
        Spa3RImageProcessor(**fields)


def test_tall_pictures_are_cropped_before_they_are_resized(processor, monkeypatch):
    """As if all rows had been made, to the bit; also where the picture is wider than the view, which Pillow makes."""
    pictures = [noise(14, 900), noise(20, 3000, 1), noise(31, 57, 2), noise(90, 400, 3), noise(15, 5000, 4)]
    for resample in (Resampling.BICUBIC, Resampling.BILINEAR, Resampling.LANCZOS):
        whole = [processor(picture, resample=resample)["view_pixel_values"] for picture in pictures]
        monkeypatch.setattr(resampling, "PLAIN_PIXELS", 0)
        rows = [processor(picture, resample=resample)["view_pixel_values"] for picture in pictures]
        monkeypatch.undo()
        assert all(torch.equal(ours, reference) for ours, reference in zip(rows, whole, strict=True))


def test_a_tall_picture_takes_little_memory(tmp_path):
    """Of 14 x 65 000 pixels, 2.4 million rows would be made. The environment may set the limit on pixels."""
    Image.new("RGB", (14, 65_000), (10, 200, 30)).save(tmp_path / "tall.png")
    program = (
        "import resource, sys; from spa3r import Spa3RImageProcessor; from PIL import Image\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); view = Spa3RImageProcessor().process_view(sys.argv[1])\n"
        "assert view.size == (518, 518) and view.getpixel((5, 5)) == (10, 200, 30)\n"
        "from spa3r.media.images import MAX_PIXELS\n"
        "print((peak() - before) // 1024, MAX_PIXELS)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "tall.png")]
    environment = os.environ | {"SPA3R_MAX_IMAGE_PIXELS": "910000"}  # what it has
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    mebibytes, limit = map(int, told.split())
    assert mebibytes < 200 and limit == 910_000


def test_a_view_that_nobody_can_use_is_refused(processor):
    with pytest.raises(ValueError, match=r"at most 16777216 pixels, got 56 x \d+ of .* of 14 x 200000 .*`mode` 'crop'"):
        processor(Image.new("L", (14, 200_000)), mode="pretraining")


def test_settings_of_a_call(processor):
    picture = noise(80, 61)
    pixels = processor(picture, do_normalize=False)["view_pixel_values"]
    mean, std = (torch.tensor(values).repeat_interleave(14 * 14) for values in (MEAN, STD))
    assert torch.allclose((pixels - mean) / std, processor(picture)["view_pixel_values"], atol=1e-6)
    raw = processor(picture, do_normalize=False, do_rescale=False)["view_pixel_values"]
    assert torch.allclose(raw / 255, pixels, atol=1e-7) and raw.max() > 200 and (raw == raw.round()).all()
    own = processor(picture, image_mean=[0, 0, 0], image_std=[1, 1, 1])["view_pixel_values"]
    assert torch.equal(own, pixels)

    for size in (28, {"height": 28, "width": 28}):
        assert processor(picture, size=size)["view_grid_hw"].tolist() == [[2, 2]]  # 61 / 80 x 28 = 21.4, 1.5 patches
    assert processor(picture, size=112)["view_grid_hw"].tolist() == [[6, 8]]
    assert processor.size == SIZE

    exact = noise(42, 28)
    assert np.array_equal(views_of(processor, exact, do_resize=False)[0], np.asarray(exact))
    intrinsics = np.eye(3)
    unchanged = Spa3RImageProcessor(do_resize=False).process_intrinsics(intrinsics, (28, 42))
    assert np.array_equal(unchanged, intrinsics)

    bilinear = processor(picture, resample=Resampling.BILINEAR, do_normalize=False, do_rescale=False)
    reference = np.asarray(picture.resize((56, 42), Resampling.BILINEAR))
    assert np.array_equal(
        Spa3RImageProcessor(do_normalize=False, do_rescale=False).unpack(**strip(bilinear))[0], reference
    )
    assert torch.equal(processor(picture, resample=3)["view_pixel_values"], processor(picture)["view_pixel_values"])


def strip(batch) -> dict:
    return {key: batch[key] for key in ("view_pixel_values", "view_grid_hw")}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 30}, "`size` must be a positive multiple of `patch_size` = 14, got 30"),
        ({"size": {"height": 28, "width": 42}}, r"`size` must be a number, or \{'height': n, 'width': n\} of one"),
        ({"size": {"shortest_edge": 28}}, r"got \{'shortest_edge': 28\}.*`mode` determines"),
        ({"do_resize": False}, r"`do_resize=False` .* multiples of the patch, 14 pixels, got .* of 30 x 30"),
        ({"do_rescale": False}, "`do_rescale=False` must come with `do_normalize=False`, got True"),
        ({"do_normalize": "no"}, "`do_normalize` must be True or False, got 'no'"),
        ({"resample": Resampling.NEAREST}, r"`resample` must be one of .*BILINEAR \(2\), BICUBIC \(3\), LANCZOS"),
        ({"resample": "bicubic"}, "`resample` must be one of .*, got 'bicubic'"),
        ({"image_std": [0, 1, 1]}, "`image_std` must hold three finite numbers above 0"),
    ],
)
def test_settings_of_a_call_are_checked(processor, settings, words):
    with pytest.raises(ValueError, match=words):
        processor(GOOD, **settings)


def test_mode_is_checked_in_every_call(processor):
    with pytest.raises(ValueError, match="`mode` must be 'crop', 'pad' or 'pretraining', got 'fit'"):
        processor(GOOD, mode="fit")


# Outputs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cls"), [("pt", torch.Tensor), ("np", np.ndarray), (None, np.ndarray)])
def test_kinds_of_tensors(processor, kind, cls):
    batch, reference = (
        processor([[GOOD], [GOOD, noise(60, 30)]], return_tensors=kind),
        processor([[GOOD], [GOOD, noise(60, 30)]]),
    )
    assert list(batch) == processor.model_input_names
    for key, value in batch.items():
        assert isinstance(value, cls) and np.array_equal(value, reference[key].numpy())


@pytest.mark.parametrize("args", [("meta",), ("meta", torch.bfloat16), (torch.device("meta"),)])
def test_layout_stays_where_it_is(processor, args):
    batch = processor([GOOD, GOOD])
    batch["image_tokens_per_scene"] = torch.tensor([3])
    moved = batch.to(*args)
    assert moved is batch and moved["view_pixel_values"].device.type == "meta"
    assert moved["view_pixel_values"].dtype == (torch.bfloat16 if len(args) == 2 else torch.float32)
    assert moved["view_grid_hw"].tolist() == [[4, 4], [4, 4]] and moved["views_per_scene"].tolist() == [2]
    assert moved["image_tokens_per_scene"].device.type == "cpu"
    assert {moved[key].dtype for key in moved if key != "view_pixel_values"} == {torch.int64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_pixels_are_cast(processor, dtype):
    batch = processor(GOOD).to(dtype)
    assert [value.dtype for value in batch.values()] == [dtype, torch.int64, torch.int64]
    assert [value.dtype for value in processor(GOOD).to(dtype=dtype).values()] == [dtype, torch.int64, torch.int64]


def test_save_and_load(tmp_path):
    fields = {"size": 64, "patch_size": 16, "mode": "pad", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    processor = Spa3RImageProcessor(**fields)
    processor.save_pretrained(tmp_path)
    Spa3RConfig(hidden_size=96).save_pretrained(tmp_path)
    for loaded in (Spa3RImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is Spa3RImageProcessor
        assert {key: getattr(loaded, key) for key in fields} == fields
        ours, reference = loaded([noise(90, 40)]), processor([noise(90, 40)])
        assert all(torch.equal(ours[key], reference[key]) for key in reference)
    assert Spa3RImageProcessor.from_pretrained(tmp_path, mode="crop").mode == "crop"
    assert not {"do_resize", "resample"} & processor.to_dict().keys()  # files stay as they were
    Spa3RImageProcessor(resample=Resampling.BILINEAR, do_normalize=False).save_pretrained(tmp_path)
    loaded = Spa3RImageProcessor.from_pretrained(tmp_path)
    assert (loaded.resample, loaded.do_normalize, loaded.do_resize) == (Resampling.BILINEAR, False, True)
    assert vars(Spa3RImageProcessor())["size"] == 518


@pytest.mark.parametrize("mode", ["crop", "pad", "pretraining"])
@pytest.mark.parametrize("size", [(320, 240), (240, 320), (160, 160), (300, 100)])
def test_intrinsics_follow_the_picture(size, mode):
    """A bright spot stays where its ray meets the picture, also when that is resized, cropped or padded."""
    processor, (width, height) = Spa3RImageProcessor(size=140, mode=mode), size
    intrinsics = np.array([[200.0, 0, width / 2 + 5], [0, 210.0, height / 2 - 3], [0, 0, 1]])
    ray = np.array([0.1, -0.05, 1.0])
    x, y, _ = intrinsics @ ray
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4] = 255
    spot = np.argwhere(pixels[..., 0]).mean(0) + 0.5 - (y, x)  # whole pixels miss the point a little
    view = np.asarray(processor.process_view(pixels), np.float64)[..., 0]
    if mode == "pad":  # the margins are white too
        new_size, (left, top), _ = processor._placement(width, height, None)
        inside = np.zeros_like(view)
        inside[top : top + new_size[1], left : left + new_size[0]] = 1
        view = view * inside
    rows, columns = np.mgrid[: view.shape[0], : view.shape[1]] + 0.5
    found = np.array([(rows * view).sum(), (columns * view).sum()]) / view.sum()
    changed = processor.process_intrinsics(intrinsics, (height, width))
    x, y, _ = changed @ ray
    assert np.abs(found - spot * (changed[1, 1] / 210, changed[0, 0] / 200) - (y, x)).max() < 0.1
    as_tensor = processor.process_intrinsics(torch.from_numpy(intrinsics).float()[None], (height, width))
    assert as_tensor.dtype == torch.float32 and np.allclose(as_tensor[0].numpy(), changed, atol=1e-4)


@pytest.mark.parametrize(
    ("size_wh", "resized_h", "view_h"),
    [
        ((1296, 968), 386, 378),
        ((1752, 1168), 345, 336),
        ((640, 480), 388, 378),
        ((480, 640), 690, 686),
        ((518, 518), 518, 518),
    ],
)
def test_pretraining_cuts_what_a_multiple_of_the_patch_leaves(size_wh, resized_h, view_h):
    """Width to 518, height cut to an integer, then the middle of it."""
    picture = smooth(*size_wh)
    resized = np.asarray(picture.resize((518, resized_h), Image.Resampling.BICUBIC))
    top = (resized_h - view_h) // 2
    view = Spa3RImageProcessor(mode="pretraining").process_view(picture)
    assert np.array_equal(np.asarray(view), resized[top : top + view_h])


@pytest.mark.parametrize("mode", ["crop", "pad", "pretraining"])
def test_a_square_picture_of_the_wanted_size_is_not_touched(mode):
    picture = noise(112, 112)
    assert np.array_equal(np.asarray(Spa3RImageProcessor(size=112, mode=mode).process_view(picture)), picture)


def test_a_small_picture_is_named(processor, tmp_path):
    noise(5, 50).save(tmp_path / "thin.png")
    for picture in (tmp_path / "thin.png", to_rgb(tmp_path / "thin.png")):
        with pytest.raises(ValueError, match=r"got \S+thin\.png of 5 x 50 \(width x height\)\. Leave it out"):
            processor(picture)


@pytest.mark.parametrize("rescale, normalize", ((True, True), (True, False), (False, False)))
def test_every_level_is_normalized_to_the_bit(rescale, normalize):
    processor = Spa3RImageProcessor(size=28, patch_size=14, do_rescale=rescale, do_normalize=normalize)
    levels = np.arange(28 * 28 * 3, dtype=np.int64).reshape(28, 28, 3) % 256
    got = processor([[Image.fromarray(levels.astype(np.uint8))]])["view_pixel_values"].numpy()
    mean, std = np.float32(processor.image_mean), np.float32(processor.image_std)
    pixels = levels.astype(np.float32) / np.float32(255 if rescale else 1)
    pixels = (pixels - mean) / std if normalize else pixels
    wanted = np.stack([pixels[y : y + 14, x : x + 14].transpose(2, 0, 1).reshape(-1) for y in (0, 14) for x in (0, 14)])
    assert np.array_equal(got, wanted)
