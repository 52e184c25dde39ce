"""
Every field of every configuration does something. With a value other than its default it is either refused by name in
the constructor, or a short run is another one: in what it logs, trains, writes, loads, or asks of other libraries.

The fields are those of the classes, so a new field, and a new configuration in `trl_ext.__all__`, joins by itself. Two
tests look at them:

- `test_every_option_is_read`: one run of every method with arguments that note who reads them. An option that nobody
  reads does nothing.
- `test_every_option_changes_something`: two short runs, with the option and without. The options that this project
  declares are always tried, the inherited ones with `--runslow`.

Values come from the annotation; `VALUES` has those for which that is not enough, `GIVEN` what else an option needs to
matter, and `ELSEWHERE` what a run of one process on a CPU cannot show.
"""

import contextlib
import dataclasses
import enum
import io
import os
import sys
import tempfile
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import harness
import pytest
import sampling
import tiny
import torch
import transformers
from datasets import Dataset
from methods import METHODS, ONLINE
from peft import LoraConfig

import trl_ext
from trl_ext._checks import Range, annotations_of
from trl_ext.diffusion import OnlineDiffusionConfig


sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in ("diffusion", "d2po")]

import diffusion_harness  # noqa: E402
import online  # noqa: E402
import reward_harness  # noqa: E402
import tiny_pipelines  # noqa: E402


CONFIGS = [getattr(trl_ext, name) for name in trl_ext.__all__ if name.endswith("Config")]
CONFIGS.remove(trl_ext.PreferenceConfig)  # the parent of the others, without a method

# Configurations for which the inherited options are tried as well; the others share their code.
WHOLE = {
    "FDPOConfig",
    "D2POConfig",
    "DiffusionDPOConfig",
    "DPHRLConfig",
    "FDPGConfig",
    "ScoreAsActionConfig",
}

# Every run evaluates, saves and pushes, so that options of these matter.
RUN = dict(
    max_steps=2,
    eval_strategy="steps",
    eval_steps=1,
    save_strategy="steps",
    save_steps=1,
    push_to_hub=True,
    hub_base_model_id="tester/base",  # of an adapter whose base is a local folder
    logging_steps=1,
)
METRICS = {
    "compute_metrics": lambda output, compute_result=True: {"rows": len(output.label_ids), "parts": len(list(output))},
    "per_device_eval_batch_size": 2,
}
CACHE = {"precompute_ref_log_probs": True, "reference_cache_dir": "{folder}/statistics"}
WORKER = {"dataloader_num_workers": 1}
DISCRIMINATOR = {"discriminator": "adapter", "labels_per_window": 2}
OFF_POLICY = {"num_iterations": 2, "learning_rate": 0.1}  # the second step is on samples of another policy
GRID = {"validation_prompts": ["a bold seven"], "validation_inference_steps": 1}

# Option, or `Configuration.option` -> a value other than its default, where the annotation is not enough.
VALUES: dict[str, typing.Any] = {
    "accelerator_config": {"split_batches": True},
    "alpha": 0.25,
    "anchor_cache_dir": "{folder}/anchors",
    "anchors": "self",
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "beta": 0.3,
    "bucket_group_size": 1,
    "cache_dir": "{folder}/latents",
    "chat_template_kwargs": {"greeting": "Good day."},
    "data_seed": 5,
    "dataloader_multiprocessing_context": "fork",
    "ddp_broadcast_buffers": False,
    "ddp_find_unused_parameters": False,
    "DPHRLConfig.loss_type": "grpo",
    "DiffusionDPOConfig.ddp_find_unused_parameters": True,
    "debug": "underflow_overflow",
    "discriminator": "self",
    "divergence": "js",
    "FDPGConfig.divergence": "forward_kl",
    "discriminator_batch_size": 1,
    "drop_empty_completions": True,
    "ema_decay": 0.0,
    "epsilon_high": 0.001,
    "error_space": "prediction",
    "eval_delay": 2,
    "eval_steps": 2,
    "f_divergence_type": "js_divergence",
    "generation_kwargs": {"min_new_tokens": 7},
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "h": "logit",
    "h_clip": 0.4,
    "hub_strategy": "all_checkpoints",
    "include_for_metrics": ["loss"],
    "include_num_input_tokens_seen": "all",
    "kappa": 3.0,
    "label_names": ["labels"],
    "label_smoothing": 0.1,
    "labels_per_window": 3,
    "ledger_file": "{folder}/labels.jsonl",
    "liger_kernel_config": {"rope": False},
    "log_level": "error",
    "logging_steps": 2,
    "loss_kwargs": {"variant": "tdpo1"},
    "loss_type": ["hinge"],
    "DiffusionDPOConfig.loss_type": "hinge",
    "loss_weights": [0.5],
    "lr_scheduler_kwargs": {"power": 3.0},
    "max_completion_length": 5,
    "max_grad_norm": 1e-3,
    "max_length": 24,
    "max_log_weight": 0.01,
    "D2POConfig.loss": "ipo",
    "D2POConfig.max_length": 19,
    "max_pseudo_reward": 0.01,
    "max_steps": 1,
    "metric_for_best_model": "eval_rewards/margins",
    "model_init_kwargs": {"attn_implementation": "eager"},
    "num_generations": 2,
    "num_generations_eval": 2,
    "num_kappa_samples": 2,
    "off_policy_mask_threshold": 1e-9,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "output_dir": "{folder}/other",
    "pad_to_multiple_of": 64,
    "pad_token": "<|user|>",
    "partition": "global",
    "prompt_dropout": 0.9,
    "ref_model_sync_steps": 1,
    "reference_cache_dir": "{folder}/elsewhere",
    "rehearsal_batch_size": 3,
    "rehearsal_estimator": "nll",
    "rehearsal_max_logratio": 1e-3,
    "report_to": "tensorboard",
    "resolution": 32,
    "reward_clip_range": (-0.1, 0.1),
    "reward_weights": [0.5],
    "save_steps": 2,
    "save_total_limit": 1,
    "ScoreAsActionConfig.ddp_find_unused_parameters": True,
    "ScoreAsActionConfig.epsilon": 0.5,
    "ScoreAsActionConfig.greater_is_better": False,  # of a reward it is true where nothing is said
    "ScoreAsActionConfig.metric_for_best_model": "eval_reward/gain",
    "ScoreAsActionConfig.num_generations": 4,
    "ScoreAsActionConfig.reference_images_per_prompt": 3,
    "ScoreAsActionConfig.reward_weights": [2.0],
    "skew": 0.25,
    "timestep_sampling": "logit_normal",
    "top_k": 3,
    "top_p": 0.5,
    "torch_compile_backend": "eager",
    "transformers_continuous_batching_config": {"max_memory_percent": 0.1},
    "vllm_importance_sampling_clip_min": 0.5,
    "validation_prompts": ["a bold seven"],
}
for _name in ("DPHRLConfig", "FDPGConfig", "WROConfig"):
    VALUES |= {
        f"{_name}.per_device_train_batch_size": 4,
        f"{_name}.per_device_eval_batch_size": 4,
        f"{_name}.metric_for_best_model": "eval_reward",
    }
VALUES["WROConfig.reward_weights"] = [0.5, 1.0]  # of the win rate, and of the reward beside it
SHAPES = {"aspect_buckets": True, "train_dataset": lambda: diffusion_harness.dataset(4, sizes=((16, 16), (16, 40)))}

# Option, or `Configuration.option` -> what else it needs to matter. Both runs have it.
GIVEN: dict[str, dict] = {
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    "anchor_column": {"train_dataset": lambda: sampling.prompts(4).add_column("other", [["an anchor"]] * 4)},
    "FDPOConfig.alpha": {"divergence": "alpha"},
    "FDPGConfig.alpha": {"divergence": "alpha"},
    "DPHRLConfig.alpha": {"divergence": "alpha"},
    "ScoreAsActionConfig.alpha": {"divergence": "alpha", "reference_images_per_prompt": 2},
    "ScoreAsActionConfig.epsilon": {"num_iterations": 2},
    "ScoreAsActionConfig.greater_is_better": {"metric_for_best_model": "eval_reward"},
    "ScoreAsActionConfig.gamma": {"divergence": "chi_po", "reference_images_per_prompt": 2},
    "ScoreAsActionConfig.reference_images_per_prompt": {"divergence": "js"},
    "ScoreAsActionConfig.skew": {"divergence": "skew_js", "reference_images_per_prompt": 2},
    "batch_eval_metrics": METRICS,
    # Segments are chosen for long rows alone.
    "attention_by_segments": {
        "train_dataset": lambda: Dataset.from_list(
            [row | {"prompt": 40 * " a b" + row["prompt"]} for row in tiny.rows(8)]
        )
    },
    "D2POConfig.attention_by_segments": {
        "train_dataset": lambda: online.prompts(16).map(lambda row: {"prompt": 40 * " a b" + row["prompt"]})
    },
    "cast_lm_head_to_fp32": {"model_init_kwargs": {"dtype": "bfloat16"}},
    "chat_template_kwargs": {
        "model": lambda: text_model(tiny.model(), tiny.CHAT_TEMPLATE + "{{ greeting }}"),
        "train_dataset": lambda: sampling.prompts(4, conversational=True),
        "eval_dataset": lambda: sampling.prompts(3, conversational=True, seed=1),
    },
    "cache_dir": {"cache_latents": True},
    "dataloader_multiprocessing_context": WORKER,
    "dataloader_persistent_workers": WORKER,
    "dataloader_prefetch_factor": WORKER,
    "disable_dropout": {"model": lambda: text_model(tiny.model(attention_dropout=0.3))},
    "drop_empty_completions": {
        "train_dataset": lambda: Dataset.from_list([*tiny.rows(8), tiny.rows(1)[0] | {"chosen": " "}])
    },
    "ema_decay": {"use_ema": True},
    "epsilon": OFF_POLICY,
    "epsilon_high": OFF_POLICY,
    "error_space": {"model": lambda: tiny_pipelines.pipeline("sd_v")},
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "gamma": {"divergence": "chi_po"},
    "RainbowPOConfig.gamma": {},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": True},
    "greater_is_better": {"metric_for_best_model": "eval_loss"},
    "h_clip": {"h": "logit"},
    "include_for_metrics": METRICS,
    "bucket_group_size": {**SHAPES, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "logging_first_step": {"logging_steps": 2},
    "max_aspect_ratio": SHAPES,
    "logit_mean": {"timestep_sampling": "logit_normal"},
    "logit_std": {"timestep_sampling": "logit_normal"},
    "loss_kwargs": {"loss": "tdpo"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "polynomial"},
    "max_log_weight": {"divergence": "forward_kl"},
    "metric_for_best_model": {"load_best_model_at_end": True, "greater_is_better": False},
    "normalize_curvature": {"divergence": "js"},
    "num_kappa_samples": {"kappa": "auto"},
    "num_train_epochs": {"max_steps": -1},
    "off_policy_mask_threshold": OFF_POLICY,
    "optim_args": {"optim": "rmsprop"},
    "precompute_ref_batch_size": CACHE,
    "reference_cache_dir": CACHE,
    "ref_model_mixup_alpha": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "ref_model_sync_steps": {"sync_ref_model": True},
    "DPHRLConfig.ref_model_mixup_alpha": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "DPHRLConfig.ref_model_sync_steps": {"beta": 0.1, "sync_ref_model": True},
    "router_aux_loss_coef": {"model": lambda: text_model(mixture_of_experts())},
    "skew": {"divergence": "skew_js"},
    "transformers_continuous_batching_config": {"use_transformers_continuous_batching": True},
    "truncation_mode": {"max_length": 24},
    "use_bias_correction_kl": {"beta": 0.5},
    "validation_guidance_scale": GRID,
    "validation_inference_steps": GRID,
    "validation_seed": GRID,
    "validation_steps": GRID,
    "warmup_steps": {"lr_scheduler_type": "linear"},
} | dict.fromkeys(
    (
        "discriminator_batch_size",
        "discriminator_ensemble_size",
        "discriminator_epochs",
        "discriminator_learning_rate",
        "discriminator_lora_alpha",
        "discriminator_lora_dropout",
        "discriminator_lora_r",
        "labels_per_window",
        "num_completions",
        "replay_decay",
        "rescore",
        "selection",
    ),
    DISCRIMINATOR,
)
# What the runs of a method that samples have beside the defaults of its own options.
SAMPLED: dict[str, dict] = {
    "DPHRLConfig": {"rehearsal_coef": 1.0},
    "FDPGConfig": {"num_generations": 4},
    "WROConfig": {"num_generations": 4, "num_anchors": 2},
}
# Option -> why a run of one process on a CPU cannot show what it does, and the test of it if there is one.
ELSEWHERE: dict[str, str] = {
    "auto_find_batch_size": "a smaller batch when memory runs out: tests/training/test_inherited_options.py",
    "dropout_samples": "how sure the disagreement is: tests/d2po/test_discriminator.py",
    "collapse_windows": "a warning: tests/d2po/test_d2po_trainer.py",
    "dataloader_pin_memory": "Transformers switches it off on a CPU",
    "ddp_backend": "several processes",
    "ddp_timeout": "several processes: tests/training/test_processes.py",
    "deepspeed": "several processes: tests/test_sharded.py",
    "dispersion_column": "a column of the data: tests/mallows/test_mallows_trainer.py",
    "do_eval": "for the user's script, as Transformers documents it",
    "do_predict": "for the user's script, as Transformers documents it",
    "do_train": "for the user's script, as Transformers documents it",
    "ds3_gather_for_generation": "ZeRO-3: tests/test_sharded.py",
    "eval_accumulation_steps": "moves predictions to the host earlier",
    "eval_use_gather_object": "several processes",
    "fsdp": "several processes: tests/test_sharded.py",
    "share_prompts": "changes what a step computes and none of its numbers: tests/preference/test_layout.py",
    "fsdp_config": "several processes: tests/test_sharded.py",
    "generation_batch_size": "memory; completions do not depend on it: tests/d2po/test_d2po_trainer.py",
    "hub_base_model_id": "written on cards: tests/test_push_to_hub.py",
    "ignore_data_skip": "resumed runs",
    "image_dir": "relative paths of images: tests/diffusion/test_data.py",
    "label_batch_size": "calls of the labeler: tests/d2po/test_labelling.py",
    "label_retries": "a labeler that fails: tests/d2po/test_labelling.py",
    "label_retry_delay": "a labeler that fails: tests/d2po/test_labelling.py",
    "label_timeout": "a labeler that is late: tests/d2po/test_labelling.py",
    "liger_kernel_config": "Liger kernels need a GPU",
    "local_rank": "set by the launcher, and deprecated",
    "log_multimodal": "images in the trackers' tables of completions",
    "log_level_replica": "several processes",
    "log_on_each_node": "several machines",
    "padding_free": "another name of `share_prompts=True`: tests/preference/test_layout.py",
    "parallelism_config": "several processes",
    "project": "read by the callback of Trackio",
    "random_crop": "images that are not square: tests/diffusion/test_data.py",
    "restore_callback_states_from_checkpoint": "resumed runs",
    "remove_unused_columns": "what a collator of the user's is given",
    "resume_from_checkpoint": "read by the launcher: tests/launch/test_runs.py",
    "run_name": "read by the trackers' callbacks",
    "save_on_each_node": "several machines",
    "skip_broken_images": "broken images: tests/diffusion/test_data.py",
    "tf32": "CUDA",
    "tie_policy": "gold ties: tests/d2po/test_d2po_trainer.py",
    "trackio_bucket_id": "read by the callback of Trackio",
    "trackio_space_id": "read by the callback of Trackio",
    "trackio_static_space_id": "read by the callback of Trackio",
    "use_cpu": "there is no other device",
    "use_liger_kernel": "Liger kernels need a GPU",
    "TDPOConfig.log_token_kl": "logged in any case",
    "verify_images": "broken images: tests/diffusion/test_data.py",
    "warm_start_epochs": "`discriminator_dataset`: tests/d2po/test_discriminator.py",
}


def text_model(model, chat_template: str = tiny.CHAT_TEMPLATE):
    """The model, with the name of a folder that has the tests' tokenizer."""
    folder = tempfile.mkdtemp(dir=os.environ["HF_DATASETS_CACHE"])
    model.save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def mixture_of_experts():
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = transformers.MixtralConfig(vocab_size=384, num_local_experts=4, output_router_logits=True, **sizes)
    return transformers.MixtralForCausalLM(config)


def is_declared_here(config: type, name: str) -> bool:
    """Whether a class of this project declares the option, rather than Transformers or TRL."""
    owner = next(cls for cls in config.__mro__ if name in vars(cls).get("__annotations__", {}))
    return owner.__module__.startswith("trl_ext")


def other_value(config: type, field: dataclasses.Field):
    """A value of the option that is neither its default nor what the runs here have."""
    for key in (f"{config.__name__}.{field.name}", field.name):
        if key in VALUES:
            return VALUES[key]
    hint = {**annotations_of(config), **config._all_inherited_annotations()}[field.name]
    marks: list = []
    if typing.get_origin(hint) is typing.Annotated:
        hint, *marks = typing.get_args(hint)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [kind for kind in (typing.get_args(hint) if union else (hint,)) if kind is not type(None)]
    now = {**usual_options(config), **RUN}.get(field.name, field.default)
    if bool in kinds:
        return not now
    choices = list(field.metadata.get("choices") or ())
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            choices += [item.value for item in kind]
        choices += [word for word in typing.get_args(kind) if isinstance(word, str)]
    if choices:
        return next(choice for choice in choices if choice not in (now, field.default))
    if int in kinds or float in kinds:
        number = now if isinstance(now, (int, float)) else 1
        tried = [number + 1, 2, 3] if int in kinds else [number / 2, number + 1, 0.5]
        ranges = [mark for mark in marks if isinstance(mark, Range)]
        return next(value for value in tried if value != now and all(range.holds(value) for range in ranges))
    assert str in kinds, f"say in `VALUES` what `{field.name}` may be, a `{hint}`"
    return "other"


# ---- Runs -----------------------------------------------------------------------------------------------------------


def method_of(config: type):
    return next((method for method in [*METHODS, *ONLINE] if config.__name__ == method.config.__name__), None)


def sampling_of(config: type) -> sampling.Sampling | None:
    """The method that samples, with the options that every run here has."""
    method = next((each for each in sampling.ROLLOUTS if each.config.__name__ == config.__name__), None)
    if method is None:
        return None
    kept = {name: value for name, value in method.options.items() if name not in own_options(method.config)}
    # The trainer accepts its configuration class: the one that notes its readers too.
    trainer = (
        method.trainer
        if config is method.config
        else type(method.trainer.__name__, (method.trainer,), {"config_class": config})
    )
    return dataclasses.replace(method, trainer=trainer, options=kept | SAMPLED.get(config.__name__, {}))


def is_rewarded(config: type) -> bool:
    """Whether the method learns from rewards of its own images."""
    return issubclass(config, OnlineDiffusionConfig)


def own_options(config: type) -> set[str]:
    return set(vars(config).get("__annotations__", {}))


def usual_options(config: type) -> dict:
    """What every run of the configuration has, beside `RUN`."""
    sampled = sampling_of(config)
    if sampled is not None:
        return sampling.options_of(sampled, "x")
    if is_rewarded(config):
        return reward_harness.options("x")
    method = method_of(config)
    return {**harness.defaults("x"), **(method.options if method else {})}


def build(config: type, base: str, folder: Path, /, **options):
    """A trainer of a run with `options` beside those of `RUN`."""
    options = {**RUN, **options}
    for name, value in options.items():
        if isinstance(value, str):
            options[name] = value.replace("{folder}", str(folder.parent))
        elif name in ("model", "train_dataset", "eval_dataset"):
            options[name] = value()
    sampled = sampling_of(config)
    if sampled is not None:
        data = dict(train_dataset=sampling.prompts(4), eval_dataset=sampling.prompts(3, seed=1))
        return sampling.trainer(sampled, options.pop("model", base), folder, **{**data, **options})
    if is_rewarded(config):
        data = dict(train_dataset=reward_harness.prompts(4), eval_dataset=reward_harness.prompts(3))
        pipeline = options.pop("model", None) or tiny_pipelines.pipeline("sd")
        options.pop("compute_metrics", None)  # the trainer does not take it
        return reward_harness.trainer(pipeline, folder, **{**data, "config_class": config, **options})
    method = method_of(config)
    if method is None:
        trainers = {"DiffusionDPOConfig": trl_ext.DiffusionDPOTrainer, "DSPOConfig": trl_ext.DSPOTrainer}
        assert config.__name__ in trainers, f"`{config.__name__}` is public: say here how a tiny run of it is built"
        data = dict(train_dataset=diffusion_harness.dataset(4), eval_dataset=diffusion_harness.dataset(3, start=20))
        pipeline = options.pop("model", None) or tiny_pipelines.pipeline("sd")
        classes = dict(trainer_class=trainers[config.__name__], config_class=config)
        return diffusion_harness.trainer(pipeline, folder, **{**data, **classes, **options})
    if not isinstance(config, type(method.config)) or config is not method.config:
        method = dataclasses.replace(method, config=config)
    model = options.pop("model", base)
    data = dict(train_dataset=tiny.dataset(8), eval_dataset=tiny.dataset(3, seed=1))
    if method.online and options.get("discriminator", "none") != "none":
        data["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"])
    return harness.trainer(method, model, folder, **{**data, **options})


def run(trainer, config: type) -> typing.Any:
    trainer.train()
    is_text = sampling_of(config) or method_of(config)
    output = trainer.predict(tiny.dataset(3, seed=1) if is_text else diffusion_harness.dataset(2, start=30))
    trainer.save_model()
    return output


@contextlib.contextmanager
def other_libraries(seen: dict) -> Iterator[None]:
    """No Hub and no tracker; notes what a run asks of other libraries."""
    from transformers import trainer as module

    def noted(name: str, original: Callable, only: tuple[str, ...] | None = None, without: tuple[str, ...] = ()):
        def call(*args, **kwargs):
            shown = {k: describe(v) for k, v in kwargs.items() if (only is None or k in only) and k not in without}
            words = [value for value in args if isinstance(value, str)] if only is None else []
            seen.setdefault(name, []).append(str([words, sorted(shown.items())]))
            return original(*args, **kwargs)

        return call

    job = mock.Mock(is_done=lambda: False)
    hub = mock.Mock()
    hub.create_repo = noted("create_repo", lambda *args, **kwargs: types.SimpleNamespace(repo_id="tester/run"))
    upload = ("commit_message", "path_in_repo", "revision", "token")
    hub.upload_folder = noted("upload_folder", lambda *args, **kwargs: job, upload)
    data = ("sampler", "batch_sampler", "collate_fn", "worker_init_fn", "dataset", "generator")
    loader, mapped = torch.utils.data.DataLoader.__init__, Dataset.map
    note_loader = noted("DataLoader", lambda **kwargs: None, without=data)
    note_map = noted("map", lambda **kwargs: None, only=("num_proc",))

    def init(self, *args, **kwargs):
        note_loader(**kwargs)
        loader(self, *args, **kwargs)

    def map_rows(self, *args, **kwargs):
        note_map(**kwargs)
        kwargs.pop("num_proc", None)  # noted, and too slow for a test
        return mapped(self, *args, **kwargs)

    replaced: list[tuple] = [
        (module, "hf_api", lambda *args, **kwargs: hub),
        (module, "PushInProgress", lambda jobs: job),
        (module, "get_reporting_integration_callbacks", lambda names: seen.update(trackers=list(names)) or []),
        (module, "Accelerator", noted("Accelerator", module.Accelerator)),
        (module, "clear_device_cache", noted("clear_device_cache", module.clear_device_cache)),
        (module, "enable_full_determinism", noted("full_determinism", transformers.set_seed)),
        (module, "DebugUnderflowOverflow", noted("debug", lambda model: None)),
        (torch, "compile", noted("compile", lambda model=None, **kwargs: model)),
        (torch.utils.data.DataLoader, "__init__", init),
        (Dataset, "map", map_rows),
    ]
    tokens = types.SimpleNamespace(generated_tokens=[7, 8, 9])
    batches = noted("generate_batch", lambda *args, **kwargs: dict.fromkeys(range(len(args[1])), tokens))
    replaced.append((transformers.GenerationMixin, "generate_batch", batches))  # it takes half of the memory
    for owner in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoProcessor):
        original = owner.from_pretrained
        replaced.append((owner, "from_pretrained", noted(f"{owner.__name__}.from_pretrained", original)))
    with contextlib.ExitStack() as stack:
        for owner, name, instead in replaced:
            stack.enter_context(mock.patch.object(owner, name, instead))
        yield


def describe(value) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return str([describe(item) for item in value])
    if isinstance(value, dict):
        return str({key: describe(item) for key, item in value.items()})
    return str(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


def shape(output) -> str:
    if isinstance(output, (list, tuple)):
        return str([shape(part) for part in output])
    return str(getattr(output, "shape", output))


def plain(entry: dict) -> dict:
    machine = (*harness.MACHINE_KEYS, "step_time")
    return {key: value for key, value in entry.items() if not any(word in key for word in machine)}


class Runs:
    """Runs of configurations and what is to be seen of them, each made once."""

    def __init__(self, model: str, folder: Path):
        self.model, self.folder = model, folder
        self.done: dict[str, dict] = {}
        self.count = 0

    def effects(self, config: type, options: dict) -> dict:
        key = f"{config.__name__}{sorted(options.items(), key=str)}"
        if key not in self.done:
            self.count += 1
            folder = self.folder / str(self.count) / "run"
            folder.mkdir(parents=True)
            try:
                self.done[key] = self._effects(config, folder, options)
            except (ValueError, TypeError, ImportError, RuntimeError) as error:
                self.done[key] = {"error": error}
        return self.done[key]

    def _effects(self, config: type, folder: Path, options: dict) -> dict:
        seen: dict = {}
        verbosity = transformers.utils.logging.get_verbosity()
        printed = io.StringIO()
        try:
            # What `torch_compile` leaves in the environment would be in every later run.
            with mock.patch.dict(os.environ), other_libraries(seen), contextlib.redirect_stdout(printed):
                torch.manual_seed(0)
                trainer = build(config, self.model, folder, **options)
                seen["verbosity"] = transformers.utils.logging.get_verbosity()
                output = run(trainer, config)
        finally:
            transformers.utils.logging.set_verbosity(verbosity)
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        files = (path for path in folder.parent.rglob("*") if path.is_file())
        blocks = (vars(module) for module in trainer.model.modules())
        checkpointing = [
            block.get("_gradient_checkpointing_func") for block in blocks if block.get("gradient_checkpointing")
        ]
        return seen | {
            "prediction": (plain(output.metrics), shape(output.predictions), shape(output.label_ids)),
            "log": [plain(entry) for entry in trainer.state.log_history],
            "weights": sum(p.detach().double().abs().sum().item() for p in trainer.model.parameters()),
            "optimizer": (type(optimizer).__name__, describe(settings), [len(g["params"]) for g in optimizer.param_groups]),
            "callbacks": [type(callback).__name__ for callback in trainer.callback_handler.callbacks],
            "files": sorted(str(path.relative_to(folder.parent)) for path in files),
            "images": {path.name: path.read_bytes() for path in folder.rglob("*.png") if "curves" not in path.name},
            "best": (trainer.state.best_metric, trainer.state.best_global_step),
            "tables": printed.getvalue().count("\u250f"),  # the corner of a table of completions
            "padding": getattr(trainer.processing_class, "pad_token", None),
            "checkpointing": [describe(getattr(function, "keywords", {})) for function in checkpointing],
            "cache": getattr(getattr(trainer.model, "config", None), "use_cache", None),
        }  # fmt: skip

    def try_option(self, config: type, name: str) -> str:
        """`"refused"`, or what the option changes; `""` if that is nothing."""
        field = next(field for field in dataclasses.fields(config) if field.name == name)
        given = GIVEN.get(f"{config.__name__}.{name}", GIVEN.get(name, {}))
        is_refused = any(option in config.refused_options() for option in given)
        if is_refused or ("compute_metrics" in given and sampling_of(config)):
            given = {}
        changed = self.effects(config, {**given, name: other_value(config, field)})
        error = changed.get("error")
        if error is not None:
            if name not in str(error):
                raise error
            return "refused"
        before = self.effects(config, given)
        if "error" in before and name not in str(before["error"]):  # anything would differ from it
            raise before["error"]
        return ", ".join(key for key in {**before, **changed} if before.get(key) != changed.get(key))


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory) -> Runs:
    return Runs(tiny_folder, tmp_path_factory.mktemp("options"))


def cases() -> Iterator:
    for config in CONFIGS:
        for field in dataclasses.fields(config):
            here = is_declared_here(config, field.name)
            parents = (
                cls
                for cls in config.__mro__[1:]
                if cls in CONFIGS or cls.__name__ in ("PreferenceConfig", "DiffusionConfig")
            )
            inherited = any(field.name in {f.name for f in dataclasses.fields(parent)} for parent in parents)
            redeclared = field.name in vars(config).get("__annotations__", {})
            if (
                not field.init
                or field.name in ELSEWHERE
                or f"{config.__name__}.{field.name}" in ELSEWHERE
                or (inherited and not redeclared and config.__name__ not in WHOLE)
            ):
                continue
            yield pytest.param(
                config, field.name, marks=[] if here else [pytest.mark.slow], id=f"{config.__name__}-{field.name}"
            )


@pytest.mark.parametrize("config, name", cases())
def test_every_option_changes_something(config, name, runs):
    assert runs.try_option(config, name), f"`{name}` of `{config.__name__}` changes nothing, and is not refused"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_same_options_change_nothing(config, runs):
    """What differs between two runs with the same options would pass for the effect of any option."""
    first, second = runs.effects(config, {}), runs.effects(config, {"max_steps": RUN["max_steps"]})
    assert "error" not in first
    assert {key for key in {**first, **second} if first.get(key) != second.get(key)} == set()


# ---- Who reads an option --------------------------------------------------------------------------------------------

# Files and functions that look at every option, and do nothing with most of them.
_LOOK_AT_ALL = ("training/config.py", "/_checks.py", "/model_card.py", "/dataclasses.py", "/copy.py", "/pytest.py")
_LOOK_AT_ONCE = ("__post_init__", "_validate_args", "to_dict", "to_sanitized_dict", "_check_options", "__setattr__")
# Options that are done with when the configuration is made.
AT_ONCE: dict[str, str] = {
    "use_transformers_paged": "deprecated; sets `use_transformers_continuous_batching`",
    "bf16": "sets `mixed_precision`",
    "fp16": "sets `mixed_precision`",
    "gradient_checkpointing": "sets `activation_checkpointing`",
    "optim_target_modules": "refused unless `optim` projects layers",
    "torch_compile": "sets `torch_compile_backend`",
}


def recording(config: type) -> tuple[type, dict[str, set[str]]]:
    """A subclass whose instances note which code reads which option."""
    names = {field.name for field in dataclasses.fields(config)}
    reads: dict[str, set[str]] = defaultdict(set)

    class Recorded(config):
        def __getattribute__(self, name):
            if name in names:
                code = sys._getframe(1).f_code
                if not code.co_filename.endswith(_LOOK_AT_ALL) and code.co_name not in _LOOK_AT_ONCE:
                    reads[name].add(f"{Path(code.co_filename).name}: {code.co_name}")
            return super().__getattribute__(name)

    Recorded.__name__ = config.__name__
    Recorded.__qualname__ = f"Recorded{config.__name__}"
    globals()[Recorded.__qualname__] = Recorded  # so that `training_args.bin` can be written
    return Recorded, reads


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_option_is_read(config, tiny_folder, tmp_path):
    """One run: whoever builds the trainer, trains, evaluates, predicts, saves or pushes reads the option, or nobody."""
    recorded, reads = recording(config)
    options = {} if config.__name__ != "D2POConfig" else DISCRIMINATOR
    with other_libraries({}):
        trainer = build(recorded, tiny_folder, tmp_path / "run", **options)
        reads_before = set(reads)
        run(trainer, config)
    assert reads_before < set(reads)
    unread = {field.name for field in dataclasses.fields(config) if field.init} - set(reads)
    excused = {*ELSEWHERE, *AT_ONCE, *config.refused_options(), *(name for name, _ in config.dependent_options())}
    excused = {name.removeprefix(f"{config.__name__}.") for name in excused | set(GIVEN)}
    assert unread <= excused, f"nobody reads {sorted(unread - excused)}"
