# /// script
# dependencies = [
#     "trl-ext[quantization]",
# ]
#
# [tool.uv.sources]
# trl-ext = { path = "..", editable = true }
# ///

"""
DPH-RL: GRPO that rehearses what the initial model already knew.

# First: which prompts the model masters, and answers to rehearse
```bash
trl-ext rehearsal --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name trl-lib/DeepMath-103K --reward trl.rewards:accuracy_reward --reward_threshold 1 \
    --output_dir answers
```

# Then: training on the others
```bash
accelerate launch recipes/dph_rl.py --config recipes/configs/dph_rl/lora.yaml \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name answers/exploration.jsonl --rehearsal_dataset_name answers/rehearsal.jsonl \
    --reward trl.rewards:accuracy_reward \
    --output_dir Qwen2.5-0.5B-DPH-RL
```

# With rewards of your own
```bash
accelerate launch recipes/dph_rl.py --config recipes/configs/dph_rl/qlora.yaml \
    --dataset_name answers/exploration.jsonl --rehearsal_dataset_name answers/rehearsal.jsonl \
    --reward my_rewards.py:is_right my_rewards.py:is_short
```

An interrupted run continues with `--resume_from_checkpoint true`.
"""

from common import run


if __name__ == "__main__":
    run("dph_rl")
