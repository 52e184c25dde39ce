"""
Preference pairs from critiques and edits: samples a pipeline, asks a vision-language model behind an endpoint what is
wrong with each image, and then what to change, has an instruction editor change it, and lets a reward model order the
two.

    python3 recipes/rich_pairs.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --prompts prompts.jsonl --critic Qwen/Qwen2.5-VL-7B-Instruct --critic_url http://localhost:8000/v1 \
        --editor timbrooks/instruct-pix2pix --reward yuvalkirstain/PickScore_v1 --output_dir outputs/rich-pairs
    trl-ext diffusion_dpo --config sd15_lora --dataset_name outputs/rich-pairs/pairs.parquet --safeguard_mu 0.9

Prompts and images are sent to the critic's endpoint; its key is read from the variable that `--critic_key_env` names.
Every answer is kept in `output_dir` before it is used, and the same command goes on after an interruption without
paying for one again. `trl_ext.diffusion.make_rich_pairs` does the same in Python, with any functions as its parts.
"""

import argparse
import json
from pathlib import Path


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="text-to-image pipeline that is sampled: Hub id or folder")
    parser.add_argument("--prompts", required=True, help="data file or Hub id with a column `prompt`")
    parser.add_argument("--prompts_split", default="train", help="split of the prompts, also `train[:500]`")
    parser.add_argument("--critic", required=True, help="vision-language model, as the endpoint knows it")
    parser.add_argument("--critic_url", required=True, help="OpenAI-compatible endpoint of the critic")
    parser.add_argument("--critic_key_env", default="OPENAI_API_KEY", help="variable with the endpoints' key")
    parser.add_argument("--instructor", help="model that turns critiques into instructions; default: the critic")
    parser.add_argument("--instructor_url", help="endpoint of the instructor; default: the critic's")
    parser.add_argument(
        "--one_question", action="store_true", help="ask the critic for critique and instructions at once"
    )
    parser.add_argument("--editor", required=True, help="instruction editor of diffusers: Hub id or folder")
    parser.add_argument("--reward", help="CLIP model that orders the pairs: Hub id or folder; none with `--keep all`")
    parser.add_argument("--keep", choices=["either", "better", "all"], default="either", help="which pairs are kept")
    parser.add_argument("--margin", type=float, default=0.0, help="least difference of the two rewards")
    parser.add_argument("--max_edits", type=int, default=1, help="instructions of a critique that are applied")
    parser.add_argument("--samples_per_prompt", type=int, default=1, help="images of each prompt")
    parser.add_argument("--round_trip_rejected", action="store_true", help="put the originals through the editor, too")
    parser.add_argument("--model_options", type=json.loads, default={}, help="JSON: arguments of the pipeline's call")
    parser.add_argument("--editor_options", type=json.loads, default={}, help="JSON: arguments of the editor's call")
    parser.add_argument("--dtype", default="auto", help="dtype of pipeline and editor")
    parser.add_argument("--batch_size", type=int, default=8, help="images that go through the parts together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    parser.add_argument("--output_dir", required=True, help="folder of the pairs, and of the ledger of answers")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_args(arguments)
    import torch
    from diffusers import DiffusionPipeline

    from trl_ext.diffusion import (
        CLIPReward,
        EndpointCritic,
        EndpointInstructor,
        PipelineEditor,
        PipelineSampler,
        make_rich_pairs,
    )
    from trl_ext.training.named_datasets import load_split

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {} if options.dtype == "auto" else {"torch_dtype": getattr(torch, options.dtype)}
    base, editor = (
        DiffusionPipeline.from_pretrained(name, **dtype).to(device) for name in (options.model, options.editor)
    )
    prompts = load_split(options.prompts, options.prompts_split, option="prompts")
    key = {"api_key_env": options.critic_key_env}
    if options.one_question:
        if options.instructor or options.instructor_url:
            raise SystemExit(
                "`--instructor` and `--instructor_url` have no effect with `--one_question`. Leave them out."
            )
        asked = {"with_instructions": True, "max_instructions": options.max_edits}
        critic, instructor = EndpointCritic(options.critic, options.critic_url, **asked, **key), None
    else:
        critic = EndpointCritic(options.critic, options.critic_url, **key)
        instructor = EndpointInstructor(
            options.instructor or options.critic,
            options.instructor_url or options.critic_url,
            max_instructions=options.max_edits,
            **key,
        )
    is_pick = options.reward is not None and "pickscore" in options.reward.lower()
    pairs = make_rich_pairs(
        prompts,
        sample=PipelineSampler(base, options.batch_size, **options.model_options),
        critic=critic,
        instructor=instructor,
        editor=PipelineEditor(editor, **options.editor_options),
        reward=None if options.reward is None else CLIPReward(options.reward, use_logit_scale=is_pick, device=device),
        keep=options.keep,
        margin=options.margin,
        max_edits=options.max_edits,
        samples_per_prompt=options.samples_per_prompt,
        round_trip_rejected=options.round_trip_rejected,
        batch_size=options.batch_size,
        cache_dir=options.output_dir,
        seed=options.seed,
    )
    target = Path(options.output_dir) / "pairs.parquet"
    pairs.to_parquet(str(target))
    print(f"{pairs.info.description}\nThe pairs are in {target}.")


if __name__ == "__main__":
    main()
