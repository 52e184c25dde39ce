# /// script
# dependencies = [
#     "trl-ext[diffusion,quantization]",
# ]
#
# [tool.uv.sources]
# trl-ext = { path = "..", editable = true }
# ///

"""
Diffusion-DPO of a text-to-image pipeline. To see it work without downloading anything: `recipes/diffusion_demo.py`.

The dataset has images in the columns `chosen` and `rejected` (or files named there) and a text in `prompt`, or is
Pick-a-Pic. Configurations with published settings are in `recipes/configs/diffusion_dpo`.

# LoRA
```bash
accelerate launch recipes/diffusion_dpo.py --config recipes/configs/diffusion_dpo/sd15_lora.yaml \
    --dataset_name my_pairs.jsonl \
    --output_dir sd15-DPO
```

# QLoRA
```bash
accelerate launch recipes/diffusion_dpo.py --config recipes/configs/diffusion_dpo/flux_qlora.yaml \
    --dataset_name my_pairs.jsonl \
    --output_dir FLUX-DPO
```

# Full training
```bash
accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/diffusion_dpo.py \
    --config recipes/configs/diffusion_dpo/sdxl_full.yaml \
    --output_dir SDXL-DPO
```
"""

from common import run


if __name__ == "__main__":
    run("diffusion_dpo")
