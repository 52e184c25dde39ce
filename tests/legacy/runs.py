"""
The runs whose checkpoints and caches of version 0.1.0 lie in this folder, by the public names of 0.1.0 alone.

Everything that the stored files depend on is stored beside them: the base models, the tokenizer, the pairs. `make.py`
wrote them.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

from datasets import Dataset
from peft import LoraConfig

import trl_ext
from trl_ext import (
    D2POConfig,
    D2POTrainer,
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    FDPOConfig,
    FDPOTrainer,
    MallowsDPOConfig,
    MallowsDPOTrainer,
)
from trl_ext.d2po import RewardFunctionLabeller


HERE = Path(__file__).resolve().parent
NAMES = ("fdpo", "mallows", "d2po", "diffusion_dpo")
# Step of the stored checkpoint, inside a logging window (of 3 steps) and, for D2PO, inside a window of pairs (of 4
# steps).
STOP, STEPS = 5, 8


def options(folder: Path, **given) -> dict:
    """Options of a short fp32 run on CPU, on padded rows: packed ones, which 0.1.0 had not, draw dropout elsewhere."""
    defaults = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        logging_steps=3,
        save_strategy="steps",
        save_steps=STOP,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=3,
    )
    if "share_prompts" in FDPOConfig.__dataclass_fields__ and "resolution" not in given:
        defaults["share_prompts"] = False
    return {**defaults, **given}


def lora(**given) -> LoraConfig:
    return LoraConfig(
        **{"r": 1, "lora_alpha": 2, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"], **given}
    )


def pairs() -> Dataset:
    lines = (HERE / "pairs.jsonl").read_text().splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def pictures() -> Dataset:
    """Pairs of images; the same pictures whatever the version of Pillow, which the cache is told apart by."""
    import numpy as np
    from datasets import Features, Image, Value
    from PIL import Image as PIL

    def picture(seed, bright):
        pixels = np.random.default_rng(seed).integers(0, 80, (16, 16, 3)) + (160 if bright else 0)
        return PIL.fromarray(pixels.astype(np.uint8))

    rows = [
        {"prompt": f"picture {i}", "chosen": picture(2 * i, True), "rejected": picture(2 * i + 1, False)}
        for i in range(6)
    ]
    return Dataset.from_list(
        rows, features=Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    )


def vowels(prompts, completions, **columns) -> list[float]:
    """The gold function of D2PO: vowels, then whatever else there is, so that ties are rare."""
    texts = [text.encode() for text in completions]
    return [sum(letter in b"aeiou" for letter in text) + sum(text) % 97 / 97 for text in texts]


def trainer(name: str, folder: Path):
    """
    The trainer of run `name`, in `folder`, whose subfolder `cache` holds its cache. The working directory must be this
    folder: models go by relative names, so that no stored file names a machine's path.
    """
    cache = str(folder / "cache")
    if name == "fdpo":
        args = FDPOConfig(
            **options(folder, precompute_ref_log_probs=True, reference_cache_dir=cache, disable_dropout=False),
            divergence="js",
            beta=0.5,
        )
        return FDPOTrainer("base", args=args, train_dataset=pairs(), peft_config=lora())
    if name == "mallows":
        args = MallowsDPOConfig(**options(folder, precompute_ref_log_probs=True, reference_cache_dir=cache), beta=0.5)
        return MallowsDPOTrainer("base", args=args, train_dataset=pairs(), peft_config=lora())
    if name == "d2po":
        args = D2POConfig(
            **options(folder, window_size=8, labels_per_window=3, max_completion_length=6),
            beta=0.5,
            discriminator_learning_rate=1e-2,
            discriminator_epochs=2,
            discriminator_batch_size=4,
            discriminator_lora_r=1,
        )
        return D2POTrainer(
            "base",
            args=args,
            train_dataset=pairs().select_columns(["prompt"]),
            peft_config=lora(),
            gold_labeller=RewardFunctionLabeller(vowels),
        )
    args = DiffusionDPOConfig(
        **options(folder, resolution=16, cache_latents=True, cache_dir=cache, model_init_kwargs={"dtype": "float32"}),
        use_ema=True,
        beta=100.0,
    )
    return DiffusionDPOTrainer(
        "pipeline",
        args=args,
        train_dataset=pictures(),
        peft_config=lora(target_modules=["to_q", "to_v"], lora_dropout=0.0),
    )


def logs(made) -> list[dict]:
    """What the run logged, without what measures the machine."""
    machine = ("runtime", "per_second", "total_flos")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in machine)}
        for entry in made.state.log_history
    ]


# Modules of 0.1.0 that have public names, the command lines of its clone, and those of what it installs.
MODULES = ["", ".d2po", ".diffusion", ".evaluation", ".kernels", ".losses", ".preference"]
METHODS = ("fdpo", "tdpo", "mallows", "rainbowpo", "simper", "d2po", "diffusion_dpo", "dspo")
SCRIPTS = [f"{name}.py" for name in (*METHODS, "quickstart", "diffusion_demo", "make_sentiment_pairs")]
SCRIPTS += [f"benchmarks/{name}.py" for name in ("step_cost", "paired_head", "diffusion_cost")]
SCRIPTS += [f"experiments/{name}.py" for name in ("claims", "d2po_word_collector", "mallows_dispersion")]
COMMANDS = [
    *SCRIPTS,
    *(f"d2po.py --loss {name}" for name in ("fdpo", "tdpo", "rainbowpo")),
    "trl-ext evaluate",
]


def public_names(module: str) -> list[str]:
    return sorted(importlib.import_module("trl_ext" + module).__all__)


def config_fields() -> dict[str, list[str]]:
    """Class -> its options."""
    classes = [getattr(trl_ext, name) for name in trl_ext.__all__ if name.endswith("Config")]
    return {cls.__name__: sorted(option.name for option in dataclasses.fields(cls)) for cls in classes}


def help_of(command: str, recipes: Path, option: str = "--help") -> str:
    """What `command --help` prints, or `--help-all` where it names that: a script of `recipes`, or `trl-ext`."""
    script, *arguments = command.split()
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [script, *arguments, option]),
        mock.patch.object(sys, "path", [str((recipes / script).parent), str(recipes), *sys.path]),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        if script == "trl-ext":
            importlib.import_module("trl_ext.cli").main()
        else:
            runpy.run_path(str(recipes / script), run_name="__main__")
    text = printed.getvalue()
    return help_of(command, recipes, "--help-all") if option == "--help" and "--help-all shows" in text else text


def options_of(command: str, recipes: Path) -> list[str]:
    lines = re.findall(r"^  (?:-\w[\w ]*, )?(--\w+)", help_of(command, recipes), flags=re.MULTILINE)
    return sorted(set(lines))
