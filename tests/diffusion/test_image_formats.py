"""
Every form in which an image comes: its file format, the mode of its pixels, transparency, orientation and damage. What
is trained on is right, or the row and column are named.
"""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PIL

from trl_ext.diffusion.data import ImagePreferenceDataset, UnreadableImageError, open_image, to_rgb, upright_size


WHITE, RED, GREEN = (255, 255, 255), (255, 0, 0), (0, 255, 0)


def encoded(image: PIL.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(seed: int = 0, size: tuple[int, int] = (16, 24)) -> PIL.Image:
    """Random pixels; `size` is height and width."""
    return PIL.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels: np.ndarray, color: int, transparent: tuple[int, ...] = (), depth: int = 16) -> bytes:
    """A PNG that Pillow does not write: `pixels` of shape (height, width, channels), and a transparent color."""
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in pixels)
    key = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    parts = (chunk(b"IHDR", header), key, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pixels(source) -> list[tuple[int, ...]]:
    """Colors of an image as it is trained, row by row."""
    return [tuple(color) for color in np.asarray(to_rgb(open_image(source))).reshape(-1, 3).tolist()]


def pair(source: bytes) -> Dataset:
    return Dataset.from_list([{"prompt": "p", "chosen": source, "rejected": encoded(noise())}])


# ---- Modes and transparency -----------------------------------------------------------------------------------------


def two_colors(mode: str) -> PIL.Image:
    image = PIL.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("RGB", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("CMYK", "TIFF"),
        ("YCbCr", "TIFF"),
        ("RGBA", "WEBP"),
        ("RGB", "BMP"),
    ],
)
def test_colors_are_those_of_the_file(mode, format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert pixels(encoded(two_colors(mode), format, **options)) == pytest.approx(np.array([RED, GREEN]), abs=3)


@pytest.mark.parametrize("color", [(0, 255, 255, 0), (255, 255, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0)])
def test_cmyk_jpeg_is_not_inverted(color):
    """Photoshop's inverted CMYK and plain CMYK alike: no ink is white."""
    image = PIL.new("CMYK", (16, 16), color)
    expected = np.array([255 * (1 - ink / 255) * (1 - color[3] / 255) for ink in color[:3]])
    assert np.abs(np.array(pixels(encoded(image, "JPEG", quality=100))) - expected).max() <= 4


@pytest.mark.parametrize(
    ("values", "color", "expected"),
    [
        ([[0x8040], [0xFFFF]], 0, [(0x80,) * 3, WHITE]),
        ([[0x8040, 0xFFFF], [0x8040, 0]], 4, [(0x80,) * 3, WHITE]),
        ([[0x8040, 0x10FF, 0], [0xFFFF] * 3], 2, [(0x80, 0x10, 0), WHITE]),
        ([[0x8040, 0x10FF, 0, 0xFFFF], [0, 0, 0, 0]], 6, [(0x80, 0x10, 0), WHITE]),
    ],
    ids=["gray", "gray and alpha", "rgb", "rgb and alpha"],
)
def test_sixteen_bits_are_their_high_bytes(values, color, expected):
    assert pixels(png(np.array([values]), color)) == expected


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("color", [0, 2], ids=["gray", "rgb"])
def test_a_transparent_color_lies_over_white(color, depth):
    """A PNG without an alpha channel may name one color as transparent, in its own number of bits."""
    channels, scale = {0: 1, 2: 3}[color], 2 ** (depth - 8)
    values = np.array([[[0x30 * scale] * channels, [0x70 * scale] * channels]])
    found = pixels(png(values, color, (0x30 * scale,) * channels, depth))
    assert found == [WHITE, (0x70,) * 3]


def test_a_palette_may_be_partly_transparent():
    image = PIL.new("P", (2, 1))
    image.putpalette([*RED, *GREEN, *[0] * 762])
    image.putpixel((1, 0), 1)
    found = pixels(encoded(image, transparency=bytes([0, 128])))
    assert found[0] == WHITE and found[1] == pytest.approx((127, 255, 127), abs=1)


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_alpha_of_images_in_memory(mode):
    hidden = PIL.new("LA", (1, 1), (40, 0)) if mode in ("LA", "La") else PIL.new("RGBA", (1, 1), (*RED, 0))
    assert pixels(hidden.convert(mode)) == [WHITE]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBX", "HSV", "I;16", "I;16B"])
def test_black_stays_black(mode):
    black = PIL.new(mode, (1, 1), (0, 255) if mode == "LA" else 0)
    assert pixels(black) == [(0, 0, 0)]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode):
    with pytest.raises(ValueError, match=rf"Row 0 .*`chosen`.*mode '{mode}'.*convert it to 8 bits"):
        ImagePreferenceDataset(pair(encoded(PIL.new(mode, (24, 16)), "TIFF")), 8, verify_images=True)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(format):
    frames = [PIL.new("RGB", (4, 4), color) for color in (RED, GREEN)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).n_frames == 2
    assert set(pixels(data)) == {RED}


# ---- Orientation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_orientation_in_every_format(format, orientation):
    """
    The stored image is what the orientation undoes. The size is known before decoding, from TIFF too, which Pillow
    turns itself: taken twice, the height of such a file would be its width.
    """
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # `PIL.Image.Transpose` that makes the stored one
    upright = PIL.new("RGB", (24, 16), RED)
    upright.paste(GREEN, (0, 0, 12, 8))
    stored = upright if orientation == 1 else upright.transpose(PIL.Transpose(undone[orientation]))
    exif = PIL.Exif()
    exif[0x0112] = orientation
    options = (
        {"quality": 100, "subsampling": 0} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    )
    data = encoded(stored, format, exif=exif, **options)
    image = open_image(data)
    assert upright_size(image) == (16, 24)
    assert np.abs(np.asarray(to_rgb(image), int) - np.asarray(upright, int)).max() <= 3
    assert upright_size(image) == (16, 24)  # after decoding, too
    pairs = ImagePreferenceDataset(pair(data), 16)  # beside an image of 24 x 16
    assert pairs[0]["original_size"] == (16, 24)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0no TIFF at all",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + 3 * b"\x12\x01\x03\0\xff\xff\xff\xff\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
    ],
    ids=["empty", "cut", "garbage", "endless", "orientation 99"],
)
def test_an_image_with_broken_exif_is_taken_as_it_is(exif, format):
    data = encoded(noise(), format, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert upright_size(open_image(data)) == (16, 24)
        assert to_rgb(open_image(data)).size == (24, 16)


# ---- Damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_a_file_cut_anywhere_is_named(format, share):
    image = noise(size=(64, 96))
    data = encoded(image.convert("P") if format == "GIF" else image, format)
    with pytest.raises(ValueError, match="Row 0 of the train dataset, column `chosen`"):
        ImagePreferenceDataset(pair(data[: int(share * len(data))]), 16, verify_images=True)


@pytest.mark.parametrize("error", [EOFError("no more"), struct.error("4 bytes"), zlib.error("bad"), IndexError("3")])
def test_whatever_a_decoder_raises_is_named(error, monkeypatch):
    """Pillow's decoders raise more than `OSError`: the WebP one `EOFError`, others `struct.error`."""

    def load(self):
        raise error

    monkeypatch.setattr(PIL.Image, "load", load)
    with pytest.raises(UnreadableImageError, match=f"{type(error).__name__}.*{error}"):
        to_rgb(noise())


def test_a_lack_of_memory_is_no_broken_image(monkeypatch):
    """It says nothing of the row, which `skip_broken_images` would leave out."""

    def load(self):
        raise MemoryError

    monkeypatch.setattr(PIL.Image, "load", load)
    with pytest.raises(MemoryError):
        to_rgb(noise())


def test_a_decompression_bomb_is_refused_by_its_header():
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"")
    with pytest.raises(ValueError, match=r"Row 0 .*`chosen`.*900000000 pixels"):
        ImagePreferenceDataset(pair(bomb), 16)
    assert PIL.MAX_IMAGE_PIXELS is not None


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 16\n%%EndComments\nshowpage\n",
        b"<svg xmlns='x'/>",
        b"%PDF-1.7",
    ],
    ids=["eps", "svg", "pdf"],
)
def test_vector_graphics_are_refused_and_no_program_is_started(data, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("Ghostscript"))
    with pytest.raises(ValueError, match=r"Row 0 .*`chosen`: (a vector graphic|not an image file)"):
        ImagePreferenceDataset(pair(data), 16, verify_images=True)


# ---- Sources --------------------------------------------------------------------------------------------------------


def test_sources_of_one_image(tmp_path):
    data = encoded(noise())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source in (data, bytearray(data), str(path), path, noise(), {"bytes": data}, {"path": str(path)}):
        assert pixels(source) == pixels(data)


@pytest.mark.parametrize(
    "source",
    [np.zeros((16, 24, 3), np.uint8), torch.zeros(3, 16, 24), [[0, 1]], 3, memoryview(b"x")],
    ids=lambda source: type(source).__name__,
)
def test_arrays_are_refused_with_the_way_to_convert_them(source):
    with pytest.raises(UnreadableImageError, match=f"`{type(source).__name__}` is not an image.*fromarray"):
        open_image(source)


@pytest.mark.parametrize("kind", ["folder", "empty file", "null character", "device"])
def test_paths_that_are_no_images(kind, tmp_path):
    path = tmp_path / "a.png"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"")
    source = {"null character": "a\0.png", "device": "/dev/null"}.get(kind, str(path))
    noise().save(tmp_path / "b.png")
    dataset = Dataset.from_list([{"prompt": "p", "chosen": source, "rejected": str(tmp_path / "b.png")}])
    with pytest.raises(ValueError, match="Row 0 of the train dataset, column `chosen`"):
        ImagePreferenceDataset(dataset, 16)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_mode_that_the_column_declares_is_refused(mode):
    """`datasets` would convert to it, and here the file's own pixels are read."""
    features = Features(prompt=Value("string"), chosen=Image(mode=mode), rejected=Image(mode=mode))
    data = {"bytes": encoded(noise()), "path": None}
    dataset = Dataset.from_list([{"prompt": "p", "chosen": data, "rejected": data}], features=features)
    with pytest.raises(ValueError, match=rf"`chosen` of the train dataset.*Image\(mode='{mode}'\).*cast_column"):
        ImagePreferenceDataset(dataset, 16)
    assert (
        len(ImagePreferenceDataset(dataset.cast_column("chosen", Image()).cast_column("rejected", Image()), 16)) == 1
    )
