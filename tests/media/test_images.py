"""A picture may come in many forms, and files may be anything: pictures, or an error of ours that names them."""

import base64
import os
import sys
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from media import encoded, noise, served, smooth
from packaging import version
from PIL import Image

from spa3r.data.dataset_scenes import decode_picture
from spa3r.media import images
from spa3r.media.images import to_rgb

PICTURE = noise(31, 23)
CONTENT = encoded(PICTURE)
TEXT = base64.b64encode(CONTENT).decode()


def assert_same(ours, reference=PICTURE) -> None:
    assert np.array_equal(np.asarray(to_rgb(ours)), np.asarray(reference))


# Forms ----------------------------------------------------------------------------------------------------------------

FORMS = {
    "bytes": CONTENT,
    "bytearray": bytearray(CONTENT),
    "memoryview": memoryview(CONTENT),
    "file object": BytesIO(CONTENT),
    "base64": TEXT,
    "base64 in lines": base64.encodebytes(CONTENT).decode(),
    "base64 without padding": TEXT.rstrip("="),
    "base64 of URLs": base64.urlsafe_b64encode(CONTENT).decode(),
    "data:image;": f"data:image;base64,{TEXT}",
    "data:;": f"data:;base64,{TEXT}",
    "data:application/": f"data:application/octet-stream;base64,{TEXT}",
    "data: with a charset": f"data:image/png;charset=utf-8;base64,{TEXT}",
    "DATA:": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    "data: percent-encoded": "data:image/png," + "".join(f"%{byte:02x}" for byte in CONTENT),
    "data: base64, percent-encoded": "data:image/png;base64," + TEXT.replace("+", "%2B").replace("/", "%2F"),
    "array of one": np.array(PICTURE)[None],
    "channels first, of one": np.array(PICTURE).transpose(2, 0, 1)[None],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_picture(form):
    assert_same(FORMS[form])


@pytest.mark.parametrize("name", ["a.png", "a b.png", "bücher %41 #1?.png", "noendingatall"])
def test_file_urls(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_bytes(CONTENT)
    for source in (path.as_uri(), f"file://{path}", f"file:{path}", f"FILE://localhost{path}", str(path), path):
        assert_same(source)
    monkeypatch.chdir(tmp_path)
    assert_same(name)


def test_a_file_whose_name_could_be_base64_is_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = base64.urlsafe_b64encode(encoded(noise(4, 4)))[:40].decode()
    Path(name).write_bytes(CONTENT)
    assert_same(name)


def test_urls_with_spaces_and_letters_beyond_ascii():
    paths = ["/a%20b/b%C3%BCcher.png", "/100%25.png", "/a%20b.png?x=1&y=%20%C3%A9"]
    with served(dict.fromkeys(paths, CONTENT)) as address:
        for path in ("/a b/bücher.png", *paths, "/100%.png", "/a b.png?x=1&y= é", "/a b.png?x=1&y=%20é#f"):
            assert_same(address + path)
    assert images._quoted("https://bücher.example:8080/ä") == "https://xn--bcher-kva.example:8080/%C3%A4"


def test_a_fetched_picture_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(images, "MAX_DOWNLOADED_BYTES", 100)
    with served({"/a.png": CONTENT}) as address, pytest.raises(ValueError, match=r"a.png has more than 100 bytes"):
        to_rgb(f"{address}/a.png")


# Values ---------------------------------------------------------------------------------------------------------------


def tiff(values) -> bytes:
    return encoded(Image.fromarray(values), "TIFF")


STEPS = np.linspace(0, 1, 30 * 40, dtype=np.float32).reshape(30, 40)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (torch.empty(3, 5, 5, device="meta"), "must hold its pixels one by one, got one of torch.float32 .* on meta"),
        (
            torch.rand(3, 5, 5).to_sparse(),
            r"one by one, .* torch.sparse_coo .* Pass tensor\.to_dense\(\)",
        ),
        (np.zeros((0, 5, 3), np.uint8), r"at least one pixel, got an array of shape \(0, 5, 3\)"),
        (torch.zeros(3, 5, 0), r"at least one pixel, got an array of shape \(3, 5, 0\)"),
        (np.broadcast_to(np.uint8(0), (200_000, 200_000, 3)), r"at most \d+ pixels, got an array .* Make it smaller"),
        (torch.zeros(1).expand(3, 200_000, 200_000), r"at most \d+ pixels, got an array .* Make it smaller"),
    ],
)
def test_arrays_without_pixels_or_with_too_many_are_refused(array, words):
    with pytest.raises(ValueError, match=words):
        to_rgb(array)


def test_a_float_tiff_is_as_bright_as_the_array():
    """Of values in [0, 1], as much as of [0, 255] and [0, 65535]."""
    reference = np.asarray(to_rgb(STEPS))
    assert reference.max() == 255 and reference.min() == 0
    assert np.array_equal(np.asarray(to_rgb(tiff(STEPS))), reference)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(STEPS))), reference)
    for scale in (255, 65535):
        ours = np.asarray(to_rgb(tiff(STEPS * np.float32(scale))), int)
        assert np.abs(ours - reference).max() <= 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (STEPS * 3, r"in \[0, 1\], or in \[0, 255\] or \[0, 65535\], got 6\d\d\d bytes|values in \[0, 3\]"),
        (STEPS - np.float32(0.5), r"with values in \[-0.5, 0.5\]. Scale it to \[0, 1\]"),
        (STEPS * np.float32(1e6), r"must hold values in \[0, 65535\], got \[0, 1000000\]"),
        ((STEPS * 1e6).astype(np.int32), r"must hold values in \[0, 65535\], got \[0, 1000000\]"),
        (np.where(STEPS > 0.5, np.nan, STEPS), "must hold finite values, got .* with NaN"),
    ],
)
def test_a_range_that_tells_nothing_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        to_rgb(tiff(values))


def test_16_bits_of_either_byte_order():
    values = (STEPS * 65535).astype(np.uint16)
    for order in ("<u2", ">u2"):
        assert np.array_equal(np.asarray(to_rgb(values.astype(order))), np.asarray(to_rgb(values)))
    dark = np.full((20, 20), 200, ">u2")  # of 65535
    assert np.asarray(to_rgb(dark)).max() == 1


# Formats --------------------------------------------------------------------------------------------------------------

KINDS = ("AVIF", "HEIF", "JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "ICO")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_pictures_end_in_one_error_that_names_the_file(kind, tmp_path):
    images._register_heif()
    content, rng, file = encoded(noise(80, 60), kind), np.random.default_rng(0), tmp_path / "photo.jpg"
    failed = 0
    for cut in range(0, len(content), max(1, len(content) // 20)):
        garbled = content[:cut] + rng.bytes(30) + content[cut + 30 :]
        for damaged in (content[:cut], garbled):
            file.write_bytes(damaged)
            try:
                assert to_rgb(file).mode == "RGB"
            except ValueError as error:
                assert str(file) in str(error) and " object at 0x" not in str(error)
                failed += 1
            for reader in (to_rgb, decode_picture):  # of bytes, as rows hold them
                try:
                    reader(damaged)
                except ValueError as error:
                    assert f"{len(damaged)} bytes" in str(error)
    assert failed > 10


def damaged_avif() -> bytes:
    content = bytearray(encoded(smooth(64, 48), "AVIF"))
    content[-len(content) // 3 :] = bytes(len(content[-len(content) // 3 :]))
    return bytes(content)


@pytest.mark.skipif(
    version.parse(PIL.__version__) < version.parse("12.2"),
    reason="older Pillow refuses the file when it opens it",
)
def test_a_damaged_avif_fails_deep_inside():
    with pytest.raises(ValueError, match=r"can't be decoded: \d+ bytes \(.*It is damaged or not a picture") as caught:
        to_rgb(damaged_avif())
    assert isinstance(caught.value.__cause__, RuntimeError)  # what the other readers are tried with


@pytest.mark.parametrize("name", ["photo.heic", "photo.HEIF", "photo.jpg", "photo"])
def test_heic_is_read_whatever_its_name(name, tmp_path):
    images._register_heif()
    (tmp_path / name).write_bytes(encoded(smooth(64, 48), "HEIF", quality=95))
    ours = np.asarray(to_rgb(tmp_path / name), int)
    assert np.abs(ours - np.asarray(smooth(64, 48))).mean() < 4


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg"])
def test_without_its_package_heic_is_told_apart_from_damage(name, tmp_path, monkeypatch):
    images._register_heif()
    (tmp_path / name).write_bytes(encoded(smooth(64, 48), "HEIF"))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF")
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    for source in (tmp_path / name, (tmp_path / name).read_bytes()):
        with pytest.raises(ValueError, match=r'HEIC picture: pip install "spa3r\[heic\]"') as caught:
            to_rgb(source)
        assert "damaged" not in str(caught.value)


# Limits ---------------------------------------------------------------------------------------------------------------


def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)  # 50 KB
    words = r"at most 268435456 pixels, got \S+bomb.png of 20000 x 20000 .*SPA3R_MAX_IMAGE_PIXELS"
    for source in (bomb, str(bomb), bomb.read_bytes()):
        with pytest.raises(ValueError, match=words.replace(r"\S+bomb.png", ".*")):
            to_rgb(source)
    small = tmp_path / "small.png"
    small.write_bytes(CONTENT)
    for source in (small, CONTENT, Image.open(small)):
        with pytest.raises(ValueError, match=r"at most 712 pixels, got .* of 31 x 23"):
            to_rgb(source, max_pixels=712)
        to_rgb(source, max_pixels=713)
    monkeypatch.setattr(images, "MAX_PIXELS", 712)
    with pytest.raises(ValueError, match="at most 712 pixels"):
        to_rgb(CONTENT)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF", "JPEG", "PNG", "BMP", "PPM", "JPEG2000"])
def test_beyond_pils_own_limit_is_not_beyond_ours(kind, monkeypatch, tmp_path):
    """As a phone's pictures of 200 megapixels are, here with smaller numbers."""
    images._register_heif()
    content = encoded(noise(80, 60), kind)
    reference = np.asarray(to_rgb(content))
    (tmp_path / "photo").write_bytes(content)
    monkeypatch.setattr(images, "_PILS_OWN_LIMIT", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for source in (content, BytesIO(content), tmp_path / "photo"):
        assert np.array_equal(np.asarray(to_rgb(source)), reference)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 999)  # someone's wish
    with pytest.raises(ValueError, match=r"decompression bomb.*Raise PIL.Image.MAX_IMAGE_PIXELS"):
        to_rgb(content)


@pytest.mark.slow
def test_a_picture_of_200_megapixels(tmp_path):
    Image.new("L", (16_320, 12_240), 77).save(tmp_path / "phone.jpg")
    picture = to_rgb(tmp_path / "phone.jpg")
    assert picture.size == (16_320, 12_240) and picture.getpixel((9, 9)) == (77, 77, 77)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "photo.png")
    words = r"photo.png can't be opened: it is a pipe, socket or device"
    told = []

    def read():
        with pytest.raises(ValueError, match=words) as caught:
            to_rgb(tmp_path / "photo.png")
        told.append(caught.value)

    thread = threading.Thread(target=read, daemon=True)  # it would wait for ever
    thread.start()
    thread.join(20)
    assert told
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(ValueError, match=f"{path} can't be opened: it is a pipe, socket or device"):
            to_rgb(path)


# Messages -------------------------------------------------------------------------------------------------------------

LONG = base64.b64encode(os.urandom(3 * 2**20)).decode()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (f"data:image;base64,{LONG}", r"can't be decoded: data:image;base64,"),
        (f"data:image/png;base64{LONG}", "which has no comma"),
        (LONG, "doesn't exist. Check the path"),
        (TEXT[:200] + LONG, r"can't be decoded: iVBORw0KGgo"),
        (f"file://{LONG}", "doesn't exist. Check the path"),
        (f"http://127.0.0.1:9/{LONG}", "can't be downloaded"),
        (LONG.encode(), r"can't be decoded: 4194304 bytes"),
        (" " * 10**6 + "!", "doesn't exist"),
        ("a\0b", "doesn't exist"),
        ({"base64": LONG}, "got dict"),
    ],
    ids=lambda value: "",
)
def test_no_message_repeats_a_payload(source, words):
    with pytest.raises(ValueError, match=words) as caught:
        to_rgb(source)
    assert len(str(caught.value)) < 600
