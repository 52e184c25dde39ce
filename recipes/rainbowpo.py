# /// script
# dependencies = [
#     "trl-ext[quantization]",
# ]
#
# [tool.uv.sources]
# trl-ext = { path = "..", editable = true }
# ///

"""
RainbowPO. Without arguments: the embedded default, SmolLM2-135M on the pairs that ship with the project.

# Full training
```bash
accelerate launch recipes/rainbowpo.py --config recipes/configs/rainbowpo/full.yaml \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --output_dir Qwen2.5-0.5B-RainbowPO
```

# LoRA, and QLoRA with --load_in_4bit
```bash
accelerate launch recipes/rainbowpo.py \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --learning_rate 5.0e-5 \
    --use_peft --load_in_4bit --dtype bfloat16 \
    --output_dir Qwen2.5-0.5B-RainbowPO
```
"""

from common import run


if __name__ == "__main__":
    run("rainbowpo")
