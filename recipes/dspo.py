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

from common import pipeline_init_kwargs, pipeline_model_config, run, train


def main(script_args, training_args, model_args, dataset_args):
    from trl_ext import DSPOTrainer

    train(DSPOTrainer, script_args, training_args, model_args, dataset_args, init_kwargs=pipeline_init_kwargs)


if __name__ == "__main__":
    from trl_ext import DSPOConfig

    run("dspo", main, DSPOConfig, pipeline_model_config())
