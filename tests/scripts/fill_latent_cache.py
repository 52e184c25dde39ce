"""
Fills a latent cache slowly, a file an entry, for a test to kill it on the way: `fill_latent_cache.py FOLDER PAIRS`.
"""

import sys
import time
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "diffusion")]

import tiny_pipelines  # noqa: E402
from test_latent_cache import options_of, pairs  # noqa: E402

from trl_ext.diffusion import get_family, latent_cache  # noqa: E402
from trl_ext.diffusion.data import ImagePreferenceDataset  # noqa: E402


latent_cache.SHARD_SECONDS = 0.0
family = get_family(tiny_pipelines.pipeline("sd"))
encode = family.encode_images


def encode_slowly(pixels):
    time.sleep(0.2)
    return encode(pixels)


images = ImagePreferenceDataset(pairs(int(sys.argv[2])), tiny_pipelines.RESOLUTION)
options = {**options_of(family), "encode_images": encode_slowly}
latent_cache.cache_latents(images, sys.argv[1], batch_size=2, **options)
