"""
Writes this folder's checkpoints, caches and logs. It was run once, with the code of version 0.1.0:

    PYTHONPATH=<the tree of 0.1.0> python tests/legacy/make.py

To run it with newer code would make the tests of this folder test nothing.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch


os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "diffusion")]


def make_text_base() -> None:
    import tiny
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    special = ["<|pad|>", "<|end|>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytewise = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<|end|>", pad_token="<|pad|>", padding_side="left"
    )
    tokenizer.save_pretrained(HERE / "base")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocab),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(HERE / "base")
    rows = [row for row in tiny.rows(40) if max(map(len, row.values())) < 60][:12]
    (HERE / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_pipeline() -> None:
    import tiny_pipelines
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=514,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=16,
        projection_dim=4,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        scaling_factor=0.5,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=4,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tiny_pipelines.clip_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.bfloat16).save_pretrained(HERE / "pipeline")


def keep(name: str, folder: Path) -> None:
    """Copies the checkpoint without `training_args.bin`, which pickles classes and is not what a run resumes from."""
    target = HERE / name
    shutil.rmtree(target, ignore_errors=True)
    unneeded = shutil.ignore_patterns("training_args.bin", "tokenizer*.json", "chat_template.jinja", "README.md")
    shutil.copytree(folder / "checkpoint-5", target / "checkpoint-5", ignore=unneeded)
    for extra in ("cache", "gold_labels.jsonl"):
        if (folder / extra).is_dir():
            shutil.copytree(folder / extra, target / extra)
        elif (folder / extra).exists():
            shutil.copy(folder / extra, target / extra)


def short(names: dict[str, list[str]], alike) -> dict:
    """The names that all of `alike` have, once, and the others of each."""
    shared = set.intersection(*(set(names[key]) for key in alike))
    own = {key: sorted(set(names[key]) - (shared if key in alike else set())) for key in names}
    return {"shared": sorted(shared), "alike": list(alike), "own": own}


def main() -> None:
    os.chdir(HERE)
    make_text_base()
    make_pipeline()
    import runs

    found = {}
    for name in runs.NAMES:
        with tempfile.TemporaryDirectory() as folder:
            if name == "fdpo":  # fills the cache, which takes a random number that dropout would otherwise have got
                runs.trainer(name, Path(folder))
            made = runs.trainer(name, Path(folder))
            made.train()
            found[name] = runs.logs(made)
            keep(name, Path(folder))
    recipes = Path(runs.trl_ext.__file__).parents[1] / "recipes"
    interface = {
        "names": {module: runs.public_names(module) for module in runs.MODULES},
        "fields": short(runs.config_fields(), runs.config_fields()),
        "options": short(
            {command: runs.options_of(command, recipes) for command in runs.COMMANDS},
            [f"{name}.py" for name in runs.METHODS],
        ),
    }
    (HERE / "interface.json").write_text(json.dumps(interface, separators=(",", ":")) + "\n")
    (HERE / "logs.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
