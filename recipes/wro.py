# /// script
# dependencies = [
#     "trl-ext[quantization]",
# ]
#
# [tool.uv.sources]
# trl-ext = { path = "..", editable = true }
# ///

"""
Win-rate optimization: RLOO whose reward is how often a completion beats samples of the reference.

# LoRA
```bash
accelerate launch recipes/wro.py --config recipes/configs/wro/lora.yaml \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name my_prompts.jsonl \
    --judge my_judge.py:prefers \
    --output_dir Qwen2.5-0.5B-WRO
```

# QLoRA
```bash
accelerate launch recipes/wro.py --config recipes/configs/wro/qlora.yaml \
    --dataset_name my_prompts.jsonl --judge my_judge.py:prefers
```
"""

from common import run


if __name__ == "__main__":
    run("wro")
