# /// script
# dependencies = [
#     "trl-ext[quantization,tasks]",
# ]
#
# [tool.uv.sources]
# trl-ext = { path = "..", editable = true }
# ///

"""
D2PO. Without arguments: the embedded default, SmolLM2-135M on the film openings that ship with the project, with
VADER's sentiment as gold.

# QLoRA, a language model behind an OpenAI-compatible endpoint as judge, 1000 labels
```bash
OPENAI_API_KEY=... accelerate launch recipes/d2po.py --config recipes/configs/d2po/qlora.yaml \
    --model_name_or_path Qwen/Qwen2.5-7B-Instruct \
    --dataset_name trl-lib/ultrafeedback-prompt \
    --gold judge --judge_model gpt-4o-mini --label_budget 1000 \
    --output_dir Qwen2.5-7B-D2PO
```

# You are the labeler
```bash
python recipes/d2po.py --config recipes/configs/d2po/lora.yaml --dataset_name my_prompts.jsonl --gold terminal
```

# Gold labels from your own reward function
```bash
accelerate launch recipes/d2po.py --config recipes/configs/d2po/lora.yaml \
    --dataset_name my_prompts.jsonl --gold my_rewards.py:brevity
```

An interrupted run continues with `--resume_from_checkpoint true`; no label is bought twice.
"""

from common import run


if __name__ == "__main__":
    run("d2po")
