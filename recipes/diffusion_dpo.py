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

from common import pipeline_init_kwargs, pipeline_model_config, run, train


def main(script_args, training_args, model_args, dataset_args):
    from trl_ext import DiffusionDPOTrainer

    train(DiffusionDPOTrainer, script_args, training_args, model_args, dataset_args, init_kwargs=pipeline_init_kwargs)


if __name__ == "__main__":
    from trl_ext import DiffusionDPOConfig

    run("diffusion_dpo", main, DiffusionDPOConfig, pipeline_model_config())
