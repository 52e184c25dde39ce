# /// script
# dependencies = [
#     "trl-ext[diffusion,quantization]",
# ]
#
# [tool.uv.sources]
# trl-ext = { path = "..", editable = true }
# ///

"""
DSPO of a text-to-image pipeline. To see it work without downloading anything: `recipes/diffusion_demo.py`.

The dataset has images in the columns `chosen` and `rejected` (or files named there) and a text in `prompt`, or is
Pick-a-Pic. Configurations with published settings are in `recipes/configs/dspo`.

# LoRA
```bash
accelerate launch recipes/dspo.py --config recipes/configs/dspo/sd15_lora.yaml \
    --dataset_name my_pairs.jsonl \
    --output_dir sd15-DSPO
```

# QLoRA
```bash
accelerate launch recipes/dspo.py --config recipes/configs/dspo/sdxl_qlora.yaml \
    --dataset_name my_pairs.jsonl \
    --output_dir SDXL-DSPO
```
"""

from common import run


if __name__ == "__main__":
    run("dspo")
