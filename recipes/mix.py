# /// script
# dependencies = [
#     "trl-ext",
# ]
#
# [tool.uv.sources]
# trl-ext = { path = "..", editable = true }
# ///

"""
Weights for policies that were each aligned to one preference, and their mixture.

```bash
python recipes/mix.py --config recipes/configs/mix/adapters.yaml \
    --policy outputs/positive outputs/short \
    --dataset recipes/data/sentiment_pairs --split train --test_split test \
    --output_dir outputs/mixture
```
"""

import sys

from trl_ext.launch.mix import main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
