"""
Reads preference pairs of images from a dataset and brings both images of a pair to the same size and crop.

Rows are not copied, and an image is opened and decoded when its pair is read. Crop, flip and prompt dropout of a pair
depend on the seed, the epoch and the pair's index alone, so they are the same in every process, with any number of
workers, with and without a latent cache, and after a resume.
"""

import hashlib
import io
import logging
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import ExifTags, Image
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..training.arguments import without_format


logger = logging.getLogger(__name__)

PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")
# Columns of https://huggingface.co/datasets/yuvalkirstain/pickapic_v2; `label_0` is 1 where `jpg_0` was preferred, 0
# where `jpg_1` was, 0.5 for a tie.
PICKAPIC_COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")

# The aspect ratios of a pair may differ by this factor. Beyond it a crop shows another part of the scene, so that the
# preference, which was given to the whole images, no longer applies to what the model sees.
MAX_ASPECT_FACTOR = 1.25

# An image that covers the training size and is more than this many times as large is cropped before it is resized.
MAX_RESIZED_AREA = 8

# Rows whose image headers the constructor checks; the others are checked when they are read.
CHECKED_ROWS = 1000


def warn_once_a_run(message: str) -> None:
    """
    Warns on the first process only. Accelerate's logger needs a state that may not exist yet when a dataset is made.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        logger.warning(message)


class Repeated(int):
    """Index of a pair that is drawn once more, only to fill a batch of an evaluation; it does not count."""


class UnreadableImageError(ValueError):
    """Raised for an image that cannot be used. The message is the reason; the dataset adds row and column."""


# Values of the EXIF orientation, and what turns an image of each upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Formats that Pillow hands to another program, which would draw them at a size of its own.
_VECTOR_FORMATS = ("EPS", "WMF")


def open_image(source: Any) -> Image.Image:
    """
    Opens an image without decoding it.

    Args:
        source (`PIL.Image.Image`, `str`, `os.PathLike`, `bytes` or `dict`):
            An image, the path of a file, an encoded file, or the form of `datasets`, `{"bytes": ..., "path": ...}`.

    Raises:
        [`UnreadableImageError`]: If `source` is empty, or Pillow cannot open it.
    """
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        return source
    if source is None or (isinstance(source, (str, bytes)) and not source):
        raise UnreadableImageError("there is no image")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise UnreadableImageError(f"{source!r} is an address; download the images first and give their paths")
    if not isinstance(source, (str, os.PathLike, bytes, bytearray)):
        raise UnreadableImageError(
            f"a `{type(source).__name__}` is not an image; give a PIL image (`PIL.Image.fromarray` makes one of an "
            "array), a path, or an encoded file as bytes"
        )
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source)
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImageError(_reason(error)) from error
    if image.format in _VECTOR_FORMATS:
        raise UnreadableImageError(f"a vector graphic ({image.format}); convert it to PNG first")
    return image


def _reason(error: BaseException) -> str:
    # Pillow would name a stream by its address in memory.
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image file that Pillow can read"
    # On damaged files its decoders raise whatever they meet, such as `struct.error` and `EOFError`.
    return str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) if there is none."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, and swaps their size before that
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return value if value in _UPRIGHT else 1
    except MemoryError:
        raise
    except Exception:  # an image with a damaged EXIF block is still usable
        return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns height and width of an image after its EXIF orientation is applied, without decoding it."""
    width, height = image.size
    return (width, height) if _orientation(image) >= 5 else (height, width)


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Decodes an image to 8-bit RGB: applies its EXIF orientation, puts transparency over white, repeats grayscale, takes
    the high bytes of 16 bits and the first frame of an animation. (`convert("RGB")` would show the arbitrary colors of
    a PNG's transparent pixels.)

    Raises:
        [`UnreadableImageError`]: If it is damaged, or has no defined 8-bit form (32-bit integers, floats).
    """
    try:
        image.load()
        orientation = _orientation(image)
        upright = image if orientation == 1 else image.transpose(_UPRIGHT[orientation])
        if upright.mode.startswith("I;16"):
            upright = _eight_bits(upright)
        elif upright.mode in ("I", "F"):
            raise UnreadableImageError(
                f"its pixels are of mode {upright.mode!r} (32 bits a channel), whose range is not defined; convert it "
                "to 8 bits first"
            )
        elif upright.mode == "La":  # which Pillow converts to nothing else
            upright = upright.convert("LA")
        if upright.has_transparency_data:
            upright = _with_alpha(upright)
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert("RGB")
    except (UnreadableImageError, MemoryError):
        raise
    except Exception as error:
        raise UnreadableImageError(_reason(error)) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grayscale image of 16 bits by its high bytes, with its transparent gray as an alpha channel."""
    values = np.asarray(image)
    gray = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _with_alpha(image: Image.Image) -> Image.Image:
    """A transparent image as RGBA."""
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # A PNG of 16 bits: Pillow keeps the high bytes of its pixels, and the whole of the color that is transparent.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image.convert("RGBA")


def image_hash(source: Any) -> bytes:
    """
    Returns the SHA-256 of an image's content: of the encoded file if there is one, which needs no decoding, else of
    the pixels.
    """
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        rgb = to_rgb(source)
        return hashlib.sha256(f"pixels {rgb.size} ".encode() + rgb.tobytes()).digest()
    if isinstance(source, (bytes, bytearray)):
        return hashlib.sha256(source).digest()
    open_image(source).close()  # raises the same errors for what is no image
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def check_resolution(resolution: int | Iterable[int], multiple: int) -> tuple[int, int]:
    """
    Returns height and width of the training images in pixels.

    Args:
        resolution (`int` or pair of `int`):
            Side of a square, or height and width.
        multiple (`int`):
            Divisor of both: the VAE's downsampling factor times the denoiser's patch size.

    Raises:
        `ValueError`: If it is not a positive size, or not divisible; the message names the nearest valid sizes.
    """
    size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if len(size) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size):
        raise ValueError(
            f"`resolution` must be a positive number of pixels or a pair (height, width), got {resolution!r}."
        )
    if any(side % multiple for side in size):
        near = [sorted({max(side // multiple, 1) * multiple, math.ceil(side / multiple) * multiple}) for side in size]
        shown = " x ".join(" or ".join(map(str, options)) for options in (near[:1] if size[0] == size[1] else near))
        raise ValueError(
            f"`resolution={resolution!r}` is not divisible by {multiple}, by which this pipeline's VAE and denoiser "
            f"reduce an image. Use {shown}."
        )
    return size


@dataclass(frozen=True)
class PairDraw:
    """
    Random choices for a pair, shared by both of its images.

    Args:
        crop (`tuple[float, float]`):
            Vertical and horizontal place of the crop, in [0, 1]: 0 is top or left, 0.5 the center.
        flip (`bool`):
            Whether the images are mirrored.
        drop_prompt (`bool`):
            Whether the prompt is replaced by the empty one, as classifier-free guidance needs.
    """

    crop: tuple[float, float] = (0.5, 0.5)
    flip: bool = False
    drop_prompt: bool = False


@dataclass(frozen=True)
class SizeConditioning:
    """
    Components of SDXL's `time_ids` besides the target size, in pixels (https://huggingface.co/papers/2307.01952,
    section 2.2). Both images of a pair get those of the chosen image, as their conditioning must not differ.

    Args:
        original_size (`tuple[int, int]`):
            Height and width of the image before it was resized.
        crop_top_left (`tuple[int, int]`):
            Start of the crop in the resized (and possibly mirrored) image.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


def place_crop(
    original: tuple[int, int], size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> tuple[tuple[int, int], SizeConditioning]:
    """
    Returns the size that an image of size `original` is resized to, which covers `size` at the same aspect ratio, and
    the start of the crop. All sizes are height and width in pixels.
    """
    scale = max(wanted / side for wanted, side in zip(size, original, strict=True))
    height, width = (max(wanted, round(side * scale)) for wanted, side in zip(size, original, strict=True))
    resized = (height, width)
    top, left = (round(where * (side - wanted)) for where, side, wanted in zip(crop, resized, size, strict=True))
    return resized, SizeConditioning(original, (top, resized[1] - size[1] - left if flip else left))


def transform(
    image: Image.Image, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> np.ndarray:
    """
    Resizes an image until it covers `size` (bilinear with antialiasing, its aspect ratio kept), mirrors and crops it.

    Args:
        image (`PIL.Image.Image`):
            RGB image.
        size (`tuple[int, int]`):
            Height and width in pixels.
        crop (`tuple[float, float]`, *optional*, defaults to `(0.5, 0.5)`):
            As in [`PairDraw`], of the image before it is mirrored.
        flip (`bool`, *optional*, defaults to `False`):
            Whether to mirror it left to right.

    Returns:
        `np.ndarray`: Pixels of shape `(height, width, 3)`, 8-bit.
    """
    resized, placed = place_crop((image.height, image.width), size, crop)
    (top, left), (height, width) = placed.crop_top_left, size
    if resized[0] * resized[1] > MAX_RESIZED_AREA * height * width:
        # A thin image that covers `size` can be a thousand times larger than it: only what survives the crop is
        # resized. The pixels are the same but for rounding, by which everyday images keep to the other branch.
        rows, columns = image.height / resized[0], image.width / resized[1]
        box = (left * columns, top * rows, (left + width) * columns, (top + height) * rows)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        image, (top, left) = image.resize((width, height), Image.Resampling.BILINEAR, box=box), (0, 0)
    elif resized != placed.original_size:
        image = image.resize((resized[1], resized[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)[top : top + height, left : left + width]
    return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)


def normalize(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """
    Converts 8-bit pixels of shape `(..., height, width, 3)` to fp32 of shape `(..., 3, height, width)` in [-1, 1].
    """
    return torch.as_tensor(pixels).movedim(-1, -3).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


class ImagePreferenceDataset(torch.utils.data.Dataset):
    """
    Pairs of images with a preference, as pixels.

    The columns are `prompt`, `chosen` and `rejected`, as in TRL, whose images are PIL images, paths, encoded files as
    `bytes`, or `datasets` images; or Pick-a-Pic's own, `caption`, `jpg_0`, `jpg_1` and `label_0`, whose ties and
    unlabeled rows are left out with a warning that counts them.

    Both images of a pair are resized to cover `resolution` with their aspect ratio kept, and share crop and flip.

    An item is a `dict` of
    - `index` (`int`): of the pair in this dataset;
    - `prompt` (`str`): the prompt, or `""` if it was dropped;
    - `pixel_values` (`torch.Tensor` of shape `(2, 3, height, width)`): chosen and rejected in [-1, 1], fp32;
    - `original_size`, `crop_top_left` (`tuple[int, int]`): see [`SizeConditioning`];
    - `target_size` (`tuple[int, int]`): height and width of `pixel_values`;
    - `counted` (`bool`), with `buckets` alone: `False` if the pair only fills a batch of an evaluation.

    Args:
        dataset ([`~datasets.Dataset`]):
            Map-style dataset.
        resolution (`int` or pair of `int`):
            Side of a square, or height and width, in pixels.
        buckets (`list[tuple[int, int]]`, *optional*):
            Sizes of which each pair gets the one nearest to the shape of its images, instead of `resolution`.
        name (`str`, *optional*, defaults to `"train"`):
            Name of the split, for messages.
        multiple (`int`, *optional*, defaults to `1`):
            Divisor of height and width; see [`check_resolution`].
        random_crop (`bool`, *optional*, defaults to `False`):
            Crop at a random place instead of the center.
        random_flip (`bool`, *optional*, defaults to `False`):
            Mirror half of the pairs. Wrong for prompts that say left or right, and for text in images.
        prompt_dropout (`float`, *optional*, defaults to `0.0`):
            Share of the pairs, drawn anew each epoch, whose prompt is replaced by the empty one.
        seed (`int`, *optional*, defaults to `0`):
            Seed of crops, flips and prompt dropout.
        image_dir (`str` or `os.PathLike`, *optional*):
            Folder in which relative paths of images are looked up before the working directory.
        verify_images (`bool`, *optional*, defaults to `False`):
            Decode every image in the constructor, so that a broken one is found before the first step.
        skip_broken_images (`bool`, *optional*, defaults to `False`):
            Decode every image in the constructor and leave out the pairs that cannot be used, with a warning that
            counts them; `skipped` lists them.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset.
        `ValueError`: For missing columns, no rows, an unknown label, a prompt that is no text, an image that cannot be
            read, a pair whose aspect ratios differ by more than a factor of 1.25, or a `resolution` that does not fit.
            Unless told to verify, the constructor checks the headers of at most 1000 rows, evenly spaced; the others
            are checked when they are read. With `buckets` it reads the headers of all.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        resolution: int | Iterable[int],
        *,
        name: str = "train",
        multiple: int = 1,
        buckets: Sequence[tuple[int, int]] | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
        prompt_dropout: float = 0.0,
        seed: int = 0,
        image_dir: str | os.PathLike | None = None,
        verify_images: bool = False,
        skip_broken_images: bool = False,
    ):
        self.size = check_resolution(resolution, multiple)
        self.buckets = None if buckets is None else [check_resolution(size, multiple) for size in buckets]
        self.name = name
        self.random_crop, self.random_flip = random_crop, random_flip
        if not 0 <= prompt_dropout <= 1:
            raise ValueError(f"`prompt_dropout` is a share of the pairs, between 0 and 1; got {prompt_dropout!r}.")
        self.prompt_dropout = prompt_dropout
        self.seed = seed
        self.image_dir = None if image_dir is None else Path(image_dir).expanduser()
        if self.image_dir is not None and not self.image_dir.is_dir():
            raise ValueError(
                f"`image_dir={str(image_dir)!r}` is not a folder. Give the folder of the images' relative paths."
            )
        # Shared memory, so that persistent workers see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

        if not isinstance(dataset, datasets.Dataset):
            hint = {
                datasets.DatasetDict: "Give one of its splits, for example `dataset['train']`",
                datasets.IterableDataset: "Load it with `streaming=False`: the order of the pairs, what is drawn for "
                "each and the latent cache go by a pair's index",
            }.get(type(dataset), "Make one with `datasets.Dataset.from_list(rows)` or `datasets.load_dataset(...)`")
            raise TypeError(
                f"The {name} dataset must be a `datasets.Dataset`, got a `{type(dataset).__name__}`. {hint}."
            )
        columns = dataset.column_names
        if set(PREFERENCE_COLUMNS) <= set(columns):
            self._prompt_column, *self.image_columns = PREFERENCE_COLUMNS
            labels = None
        elif set(PICKAPIC_COLUMNS) <= set(columns):
            self._prompt_column, *self.image_columns, label_column = PICKAPIC_COLUMNS
            labels = dataset.select_columns([label_column])[:][label_column]
        else:
            missing = [column for column in PREFERENCE_COLUMNS if column not in columns]
            raise ValueError(
                f"The {name} dataset has no column {' and no column '.join(f'`{c}`' for c in missing)}; it has "
                f"{sorted(columns)}. Image preferences need `prompt`, `chosen` and `rejected`, or Pick-a-Pic's "
                f"{', '.join(f'`{c}`' for c in PICKAPIC_COLUMNS)}: rename yours with "
                "`dataset.rename_column(old, new)`."
            )
        # In this order, as a cache's list of a dataset's images goes by its fingerprint.
        dataset = without_format(dataset.select_columns([self._prompt_column, *self.image_columns]), name)
        for column in self.image_columns:
            feature = dataset.features[column]
            if isinstance(feature, datasets.Image):
                if feature.mode not in (None, "RGB"):
                    raise ValueError(
                        f"The column `{column}` of the {self.name} dataset is declared as "
                        f"`Image(mode={feature.mode!r})`, which would not be applied: images are trained as RGB. Use "
                        "`dataset.cast_column("
                        f"{column!r}, datasets.Image())`, or convert the images with `dataset.map(...)`."
                    )
                # `datasets` would decode while it reads a row, and its error would not name the row.
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset = dataset
        self._prompts = dataset.select_columns([self._prompt_column])
        # For each pair, its row in the dataset and which of the two image columns was preferred.
        self.rows, self._chosen_column = self._select(labels)
        # One message for each pair that was left out as broken.
        self.skipped: list[str] = []
        # Index of each pair's size in `buckets`, 0 until the shapes are known.
        self.bucket_of = np.zeros(len(self.rows), dtype=np.int64)
        self._check(verify_images, skip_broken_images)

    def _select(self, labels: list | None) -> tuple[np.ndarray, np.ndarray]:
        if labels is None:
            labels = [1] * len(self.dataset)
        values = np.array([np.nan if label is None else label for label in labels], dtype=np.float64)
        ties, unlabeled = values == 0.5, np.isnan(values)
        unknown = np.flatnonzero(~(ties | unlabeled | (values == 0) | (values == 1)))
        if len(unknown):
            raise ValueError(
                f"Row {unknown[0]} of the {self.name} dataset has `label_0={labels[unknown[0]]!r}`; known are 1 "
                f"(`jpg_0` was preferred), 0 (`jpg_1` was) and 0.5 (a tie). {len(unknown)} such row(s)."
            )
        kept = np.flatnonzero(~(ties | unlabeled))
        if len(kept) < len(labels):
            what = [f"{ties.sum()} ties"] * bool(ties.any()) + [f"{unlabeled.sum()} without a label"] * bool(
                unlabeled.any()
            )
            warn_once_a_run(
                f"Left out {' and '.join(what)} of the {len(labels)} rows of the {self.name} dataset; {len(kept)} "
                "pairs remain."
            )
        if len(kept) == 0:
            raise ValueError(
                f"The {self.name} dataset has no {'pairs: every row is a tie or has no label' if labels else 'rows'}. "
                "Check the split's name and any filter applied to it."
            )
        return kept, np.where(values[kept] == 1, 0, 1)

    def _check(self, verify: bool, skip: bool) -> None:
        """
        Checks the image headers of up to 1,000 rows, so that a systematic problem fails in the constructor; with
        `verify` or `skip` decodes the images of every row. With `skip` the rows that cannot be used are left out. With
        buckets it reads every header, and sorts the pairs into them.
        """
        decodes = verify or skip
        everything = decodes or self.buckets is not None
        count = len(self) if everything else min(len(self), CHECKED_ROWS)
        indices = np.linspace(0, len(self) - 1, count).astype(int).tolist()

        def check(index: int) -> tuple[int, str | None, float]:
            try:
                pair = self.pair(index)
                if decodes:
                    pair.verify()
            except ValueError as error:
                return index, str(error), math.nan
            return index, None, pair.aspect

        # All processes check the same few headers; the images of every row they share.
        state = PartialState() if everything else None
        mine = indices if state is None else indices[state.process_index :: state.num_processes]
        show = state is not None and state.is_local_main_process
        with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 4) if everything else 4) as executor:
            progress = tqdm(
                executor.map(check, mine),
                total=len(mine),
                desc="Checking images",
                unit="pair",
                disable=not show,
                leave=False,
            )
            checked = list(progress)
        if state is not None and state.num_processes > 1:
            checked = sorted(gather_object(checked))
        found = [(index, message) for index, message, _ in checked if message]
        if self.buckets is not None:
            aspects = [aspect for _, message, aspect in checked if not message]
            self.bucket_of = self._nearest_buckets(np.array(aspects))
        if not found:
            return
        shown = "\n".join(message for _, message in found[:10])
        shown += f"\n... and {len(found) - 10} more" if len(found) > 10 else ""
        if not skip or len(found) == count:
            remedy = "" if skip else ", or set `skip_broken_images=True`, which leaves out what cannot be used"
            raise ValueError(
                f"{shown}\n{len(found)} of {count} pairs checked cannot be used. Fix these rows, or take them out "
                f"with `dataset.select(...)` or `dataset.filter(...)`{remedy}."
            )
        self.skipped = [message for _, message in found]
        kept = np.setdiff1d(np.arange(len(self)), [index for index, _ in found])
        self.rows, self._chosen_column = self.rows[kept], self._chosen_column[kept]
        warn_once_a_run(
            f"{shown}\nLeft out {len(found)} of the {count} pairs of the {self.name} dataset, as "
            f"`skip_broken_images=True`; {len(kept)} remain."
        )

    # ---- Buckets ---------------------------------------------------------------------------------------------------

    def _nearest_buckets(self, aspects: np.ndarray) -> np.ndarray:
        """For each ratio of width to height the bucket whose own is nearest, by its logarithm."""
        ratios = np.log([width / height for height, width in self.buckets or [self.size]])
        return np.abs(np.log(aspects)[:, None] - ratios).argmin(1)

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width that pair `index` is brought to."""
        return self.size if self.buckets is None else self.buckets[self.bucket_of[index]]

    def describe_buckets(self) -> str:
        """The buckets that pairs are in, with their numbers, for messages."""
        counts = np.bincount(self.bucket_of, minlength=len(self.buckets or [self.size]))
        sizes = zip(self.buckets or [self.size], counts.tolist(), strict=True)
        return ", ".join(f"{width} x {height} ({count:,})" for (height, width), count in sizes if count)

    # ---- Pairs -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch(self) -> int:
        """The epoch for which is drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch for which crops, flips and dropped prompts are drawn; [`EpochCallback`] calls it."""
        self._epoch.fill_(epoch)

    def draw(self, index: int) -> PairDraw:
        """Returns the random choices for pair `index` in the current epoch."""
        generator = np.random.default_rng((self.seed, int(self._epoch), index))
        # Always draws all four, so that one option does not change the draws of another.
        top, left, flip, drop = generator.random(4)
        return PairDraw(
            crop=(top, left) if self.random_crop else (0.5, 0.5),
            flip=self.random_flip and flip < 0.5,
            drop_prompt=drop < self.prompt_dropout,
        )

    def _where(self, index: int, column: str) -> str:
        return f"Row {self.rows[index]} of the {self.name} dataset, column `{column}`"

    def columns(self, index: int) -> tuple[str, str]:
        """Columns of the chosen and of the rejected image of pair `index`."""
        chosen = self._chosen_column[index]
        return self.image_columns[chosen], self.image_columns[1 - chosen]

    def locate(self, source: Any) -> Any:
        """An image of the data; a relative path is looked up in `image_dir` first, then from the working directory."""
        if self.image_dir is None:
            return source
        if isinstance(source, dict):
            return source if source.get("bytes") else {**source, "path": self.locate(source.get("path"))}
        if isinstance(source, (str, os.PathLike)) and source and not os.path.isabs(source):
            beside = self.image_dir / source
            return str(beside) if beside.exists() else source
        return source

    def prompt(self, index: int) -> str:
        """The prompt of pair `index`, as it is in the data."""
        return self._prompt_of(index, self._prompts[int(self.rows[index])])

    def _prompt_of(self, index: int, row: dict) -> str:
        prompt = row[self._prompt_column]
        if not isinstance(prompt, str):
            raise ValueError(
                f"{self._where(index, self._prompt_column)}: the prompt must be a text, got {prompt!r}. (Pipelines "
                "take "
                'a text and no conversation; "" is the empty prompt.)'
            )
        return prompt

    def prompts(self) -> list[str]:
        """The prompts of all pairs, in order."""
        values = self._prompts[:][self._prompt_column]
        return [self._prompt_of(i, {self._prompt_column: values[row]}) for i, row in enumerate(self.rows.tolist())]

    def pair(self, index: int) -> "ImagePair":
        """
        Pair `index`, its images opened and not yet decoded.

        Raises:
            `ValueError`: Naming row, column and reason, if the pair cannot be used.
        """
        row = self.dataset[int(self.rows[index])]
        columns = self.columns(index)
        sources, images, sizes = [self.locate(row[column]) for column in columns], [], []
        for source, column in zip(sources, columns, strict=True):
            try:
                images.append(open_image(source))
                sizes.append(upright_size(images[-1]))
            except UnreadableImageError as error:
                hint = ""
                path = source.get("path") if isinstance(source, dict) and not source.get("bytes") else source
                if isinstance(path, str) and not os.path.isabs(path) and not os.path.exists(path):
                    places = [str(place) for place in (self.image_dir, Path.cwd()) if place is not None]
                    hint = f" The path is relative: it was looked up in {' and '.join(places)}"
                    hint += "." if self.image_dir else "; give the folder that it starts from as `image_dir`."
                raise UnreadableImageError(f"{self._where(index, column)}: {error}.{hint}") from error
        aspects = [width / height for height, width in sizes]
        if max(aspects) > MAX_ASPECT_FACTOR * min(aspects):
            shown = " and ".join(
                f"`{column}` {width} x {height}" for column, (height, width) in zip(columns, sizes, strict=True)
            )
            raise ValueError(
                f"Row {self.rows[index]} of the {self.name} dataset: the two images differ too much in shape "
                f"({shown}, width x height). Their aspect ratios may differ by a factor of {MAX_ASPECT_FACTOR}; here "
                f"it is {max(aspects) / min(aspects):.2f}, so that the same crop would show another part of the scene."
            )
        where = (self._where(index, columns[0]), self._where(index, columns[1]))
        prompt = self._prompt_of(index, row)
        return ImagePair(prompt, tuple(sources), tuple(images), (sizes[0], sizes[1]), where, self.size_of(index))

    def __getitem__(self, index: int) -> dict:
        draw = self.draw(index)
        pair = self.pair(index)
        placed = pair.size_conditioning(draw.crop, draw.flip)
        return {
            "prompt": "" if draw.drop_prompt else pair.prompt,
            "pixel_values": normalize(pair.pixels(draw.crop, draw.flip)),
            **self.facts(index, placed.original_size, placed.crop_top_left),
        }

    def facts(self, index: int, original_size: tuple[int, int], crop_top_left: tuple[int, int]) -> dict:
        """What an item says of a pair beside its prompt and images, with a latent cache and without."""
        facts = {
            "index": int(index),
            "original_size": original_size,
            "crop_top_left": crop_top_left,
            "target_size": self.size_of(index),
        }
        return facts if self.buckets is None else {**facts, "counted": not isinstance(index, Repeated)}


@dataclass(frozen=True)
class ImagePair:
    """
    A pair whose images are opened but not decoded; the chosen one is first in every tuple.

    Args:
        prompt (`str`):
            The prompt.
        sources (`tuple`):
            The images as they are in the data.
        images (`tuple[PIL.Image.Image, PIL.Image.Image]`):
            The images, opened.
        sizes (`tuple[tuple[int, int], tuple[int, int]]`):
            Their heights and widths in pixels.
        where (`tuple[str, str]`):
            Row and column of each, for messages.
        resolution (`tuple[int, int]`):
            Height and width that they are brought to.
    """

    prompt: str
    sources: tuple[Any, Any]
    images: tuple[Image.Image, Image.Image]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    where: tuple[str, str]
    resolution: tuple[int, int]

    @property
    def aspect(self) -> float:
        """Width over height, as the geometric mean of both images'."""
        (height, width), (other_height, other_width) = self.sizes
        return math.sqrt(width * other_width / (height * other_height))

    def size_conditioning(self, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False) -> SizeConditioning:
        """Returns the size conditioning of the chosen image, which both images get."""
        return place_crop(self.sizes[0], self.resolution, crop, flip)[1]

    def hashes(self) -> tuple[bytes, bytes]:
        """Returns the [`image_hash`] of both images."""
        return tuple(self._each(lambda side: image_hash(self.sources[side])))

    def verify(self) -> None:
        """Raises `ValueError`, naming row, column and reason, if one of the images cannot be decoded."""

        def decode(side: int) -> None:
            image = self.images[side]
            image.draft("RGB", (1, 1))  # JPEG is read whole and decoded at an eighth of its size
            to_rgb(image)

        self._each(decode)

    def pixels(self, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False) -> np.ndarray:
        """
        Both images decoded, 8-bit, of shape `(2, height, width, 3)`.

        Raises:
            `ValueError`: Naming row, column and reason, if one is damaged.
        """
        return np.stack(self._each(lambda side: transform(to_rgb(self.images[side]), self.resolution, crop, flip)))

    def _each(self, function) -> list:
        results = []
        for side, where in enumerate(self.where):
            try:
                results.append(function(side))
            except UnreadableImageError as error:
                raise UnreadableImageError(
                    f"{where}: {error}. Fix the row, take it out with `dataset.select(...)`, or set "
                    "`skip_broken_images=True`, which checks all images before the first step."
                ) from error
        return results


class PairCollator:
    """
    Collates pairs of [`ImagePreferenceDataset`] or [`~trl_ext.diffusion.latent_cache.CachedPairs`] into a batch: all
    chosen images first, then all rejected ones.

    Args:
        target_size (`tuple[int, int]`, *optional*):
            Height and width of the training images in pixels, for SDXL's `time_ids`, where an item has none.

    Returns of a call, for `B` pairs:
        `dict`:
            - `index` (`torch.Tensor` of shape `(B,)`): of each pair in the dataset;
            - `prompt` (`list[str]`): `B` texts, shared by both sides;
            - `pixel_values` (`torch.Tensor` of shape `(2B, 3, height, width)`) or, cached, `latents` of shape
              `(2B, channels, latent height, latent width)`;
            - `conditioning` (`dict[str, torch.Tensor]`), if cached: the text encoders' output for the `B` prompts;
            - `size_conditioning` (`torch.Tensor` of shape `(B, 6)`): original height and width, top and left of the
              crop, target height and width: SDXL's `time_ids`;
            - `counted` (`torch.Tensor` of shape `(B,)`), with aspect buckets: `False` for pairs that only fill the
              batch of an evaluation.

    Raises:
        `ValueError`: If the items are of several sizes.
    """

    def __init__(self, target_size: tuple[int, int] | None = None):
        self.target_size = target_size

    def __call__(self, examples: list[dict]) -> dict:
        targets = [tuple(example.get("target_size") or self.target_size or ()) for example in examples]
        if len(set(targets)) > 1:
            raise ValueError(
                f"A batch has pairs of several sizes, {sorted(set(targets))} (height, width): with aspect buckets "
                "batches must be drawn by a `BucketSampler`."
            )
        batch = {
            "index": torch.tensor([example["index"] for example in examples]),
            "prompt": [example["prompt"] for example in examples],
            "size_conditioning": torch.tensor(
                [[*e["original_size"], *e["crop_top_left"], *size] for e, size in zip(examples, targets, strict=True)],
                dtype=torch.int64,
            ),
        }
        if "counted" in examples[0]:
            batch["counted"] = torch.tensor([example["counted"] for example in examples])
        for name in ("pixel_values", "latents"):
            if name in examples[0]:
                # (B, 2, ...) -> (2B, ...), chosen first.
                batch[name] = torch.stack([example[name] for example in examples], dim=1).flatten(0, 1)
        if "conditioning" in examples[0]:
            names = examples[0]["conditioning"]
            batch["conditioning"] = {
                name: torch.stack([example["conditioning"][name] for example in examples]) for name in names
            }
        return batch


class EpochCallback(TrainerCallback):
    """
    Passes the epoch to the training dataset. Accelerate does so in one process only.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = getattr(train_dataloader, "dataset", None)
        if dataset is not None and hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))
