"""Where the configurations and the data of the recipes are, in the wheel or in a clone."""

from pathlib import Path


_PACKAGE = Path(__file__).resolve().parent

# The folder that has `recipes/`: the package itself where a wheel is installed, and the project's folder in a clone or
# an editable installation. Relative paths of data are looked up here as well, so that `recipes/data/sentiment_pairs`
# is found from anywhere.
ROOT = _PACKAGE if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent
