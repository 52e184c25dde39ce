# /// script
# dependencies = [
#     "trl-ext[quantization]",
# ]
#
# [tool.uv.sources]
# trl-ext = { path = "..", editable = true }
# ///

"""
f-DPG: a policy that approaches the reference times exp(reward / beta), under any f-divergence.

# LoRA
```bash
accelerate launch recipes/fdpg.py --config recipes/configs/fdpg/lora.yaml \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name my_prompts.jsonl \
    --reward my_rewards.py:score --divergence js \
    --output_dir Qwen2.5-0.5B-FDPG
```

# QLoRA
```bash
accelerate launch recipes/fdpg.py --config recipes/configs/fdpg/qlora.yaml \
    --dataset_name my_prompts.jsonl --reward my_rewards.py:score --divergence js
```
"""

from common import run


if __name__ == "__main__":
    run("fdpg")
