# /// script
# dependencies = [
#     "trl-ext[diffusion,quantization]",
# ]
#
# [tool.uv.sources]
# trl-ext = { path = "..", editable = true }
# ///

"""
Score as Action: online rewards for a text-to-image pipeline. To see it work without downloading anything:
`recipes/reward_demo.py`.

The dataset has prompts in the column `prompt`; reward functions get its other columns by name. Configurations are in
`recipes/configs/score_as_action`.

# LoRA
```bash
accelerate launch recipes/score_as_action.py --config recipes/configs/score_as_action/sd15_lora.yaml \
    --dataset_name my_prompts.jsonl \
    --reward my_rewards.py:is_bright \
    --output_dir sd15-bright
```

# QLoRA, with PickScore as the reward
```bash
accelerate launch recipes/score_as_action.py --config recipes/configs/score_as_action/flux_qlora.yaml \
    --dataset_name my_prompts.jsonl \
    --pick_score yuvalkirstain/PickScore_v1 laion/CLIP-ViT-H-14-laion2B-s32B-b79K \
    --output_dir FLUX-PickScore
```
"""

from common import run


if __name__ == "__main__":
    run("score_as_action")
