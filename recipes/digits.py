"""
Handwritten digits for the diffusion demonstration: the images, their captions, a ruler and a reader.

The images are scikit-learn's 1797 handwritten digits (8 x 8, UCI's optical recognition set, part of the package, so
nothing is downloaded), redrawn at 32 x 32 with pens of different widths: the outline of the ink is kept and moved
outward or inward by a fraction of a pixel.
"""

import numpy as np


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = (
    "a handwritten {}",
    "the digit {}",
    "a drawing of the number {}",
    "{}, written with a pen",
    "a small {} on white paper",
    "the number {} in black ink",
)
SIZE = 32  # pixels
SCALE = 3  # pixels of a drawing per pixel of the original
FINE = 4  # outlines and widths are taken on a grid this much finer than the pixels
EDGE = 0.35  # softness of a stroke's edge, in pixels


def caption(digit: int, wording: int) -> str:
    return WORDINGS[wording].format(NAMES[digit])


class Digits:
    """
    The real digits, as distances to the outline of their ink.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split: 80 % of the digits are for training, 20 % are held out.

    Attributes:
        labels (`np.ndarray` of shape `(1797,)`):
            The digit of each image.
        train, test (`np.ndarray`):
            Indices of the two parts.
    """

    def __init__(self, seed: int = 0):
        from scipy import ndimage
        from sklearn.datasets import load_digits

        data = load_digits()
        self.labels = data.target
        order = np.random.default_rng(seed).permutation(len(self.labels))
        self.train, self.test = np.split(order, [int(0.8 * len(order))])
        distances = []
        for image in data.images / data.images.max():
            fine = ndimage.zoom(np.pad(image, 1), SCALE * FINE, order=3, grid_mode=True, mode="grid-constant")
            inside = np.pad(fine, (SIZE * FINE - len(fine)) // 2) > 0.45
            distances.append(ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside))
        self._distances = (np.stack(distances) / FINE).astype(np.float32)

    def draw(self, indices: np.ndarray, pen: float | np.ndarray) -> np.ndarray:
        """
        The digits at `indices`, their outline moved outward by `pen` pixels (inward if negative; one number, or one
        for each image): float32 images of shape `(N, 32, 32)`, 0 is ink and 1 is paper.
        """
        outline = self._distances[indices] + np.reshape(np.asarray(pen, dtype=np.float32), (-1, 1, 1))
        paper = 1 / (1 + np.exp(np.clip(outline / EDGE, -30, 30)))
        return paper.reshape(-1, SIZE, FINE, SIZE, FINE).mean((2, 4))


def stroke_width(images: np.ndarray) -> np.ndarray:
    """
    Mean width of the strokes in pixels, shape `(N,)`, from images of shape `(N, H, W)`, 0 is ink and 1 is paper.

    Four times the mean distance of a point of ink to the nearest paper, which for a stroke of constant width is that
    width. Ink is what is darker than half-way between the image's darkest and lightest point, so a paler or a darker
    pen measures the same. Images with next to no contrast have no stroke: their width is 0.
    """
    from scipy import ndimage

    widths = np.zeros(len(images))
    for i, image in enumerate(images):
        fine = ndimage.zoom(image, FINE, order=1, grid_mode=True, mode="nearest")
        darkest, lightest = fine.min(), fine.max()
        if lightest - darkest > 0.3:
            ink = np.pad(fine < (darkest + lightest) / 2, 1)
            # Distances are between centers of grid cells; the edge of the ink is half a cell nearer.
            widths[i] = 4 * (ndimage.distance_transform_edt(ink)[ink].mean() - 0.5) / FINE
    return widths


class Reader:
    """
    A support vector classifier that reads digits, trained on the real ones of `digits.train`, each drawn with four
    random pens, so that it knows thin strokes as well as bold ones. It sees 16 x 16 pixels.
    """

    def __init__(self, digits: Digits, seed: int = 0):
        from sklearn.svm import SVC

        pens = np.random.default_rng(seed).uniform(-1.3, 1.8, (4, len(digits.train)))
        images = np.concatenate([digits.draw(digits.train, pen) for pen in pens])
        self._model = SVC(C=10.0).fit(self._features(images), np.tile(digits.labels[digits.train], len(pens)))

    @staticmethod
    def _features(images: np.ndarray) -> np.ndarray:
        half = SIZE // 2
        return images.reshape(-1, half, 2, half, 2).mean((2, 4)).reshape(-1, half * half)

    def read(self, images: np.ndarray) -> np.ndarray:
        """The digits read from images of shape `(N, 32, 32)`, shape `(N,)`."""
        return self._model.predict(self._features(images))
