"""Loads the pipeline that was passed as `model`, and prepares its denoiser for training."""

import contextlib
import copy
import logging
from pathlib import Path

import torch

from .._patches import diffusers_quantization_on_cpu, keep_quantized_weights
from ..training.adapters import (
    REFERENCE_ADAPTER,
    check_needs_no_more,
    check_starts_at_base,
    find_nonzero_adapter,
    shared_parameters,
)
from .families import PipelineFamily, family_class, get_family


logger = logging.getLogger(__name__)

POLICY_ADAPTER = "default"


def import_diffusers():
    """Imports diffusers; the `ImportError` says how to install it."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            'The diffusion trainers need diffusers. Install it with `pip install "trl-ext[diffusion]"`.'
        ) from error
    return diffusers


def free_memory() -> None:
    """Frees unreferenced memory, on the accelerator too."""
    from diffusers.training_utils import free_memory

    free_memory()


def load_pipeline(model, *, dtype, init_kwargs: dict, quantization_config=None, device=None) -> PipelineFamily:
    """
    Loads a pipeline and returns its family.

    Args:
        model (`str` or `diffusers.DiffusionPipeline`):
            Hub id, local folder, single-file checkpoint, or a pipeline, which is used as it is.
        dtype (`torch.dtype`):
            Type of the denoiser and the text encoders, unless `init_kwargs` has one. The VAE is loaded in float32.
        init_kwargs (`dict`):
            Keyword arguments of `from_pretrained`.
        quantization_config (`diffusers.BitsAndBytesConfig` or `transformers.BitsAndBytesConfig`, *optional*):
            Quantization of the denoiser.
        device (`torch.device`, *optional*):
            Device of a quantized denoiser.

    Raises:
        `ImportError`: Without diffusers.
        `TypeError`: If `model` is neither.
        `ValueError`: For an unknown pipeline class, or for options that only apply to a string.
    """
    diffusers = import_diffusers()
    if isinstance(model, diffusers.DiffusionPipeline):
        for name, value in (("model_init_kwargs", init_kwargs), ("quantization_config", quantization_config)):
            if value:
                raise ValueError(
                    f"`{name}` has no effect on a pipeline that is already loaded. Pass the pipeline's id or folder "
                    f"as `model`, or load the pipeline so and leave `{name}` out."
                )
        return get_family(model)
    if not isinstance(model, str):
        raise TypeError(
            f"`model` must be the id or folder of a pipeline, or a `diffusers.DiffusionPipeline`, got a "
            f"`{type(model).__name__}`."
        )

    init_kwargs = dict(init_kwargs)
    _check_source(model)
    if init_kwargs.get("quantization_config") is not None:
        raise ValueError(
            f"`model_init_kwargs['quantization_config']` is a `{type(init_kwargs['quantization_config']).__name__}`; "
            "it would not be known to the trainer. Pass a `BitsAndBytesConfig` as the trainer's `quantization_config`."
        )
    given = init_kwargs.pop("dtype", init_kwargs.pop("torch_dtype", None))
    if isinstance(given, str) and given != "auto":
        given = getattr(torch, given, None) or _raise_dtype(given)
    dtype = dtype if given in (None, "auto") else given
    hub = {name: init_kwargs[name] for name in _HUB_OPTIONS if name in init_kwargs}
    if is_single_file(model):
        return _load_single_file(model, dtype, init_kwargs, hub, quantization_config)
    config = diffusers.DiffusionPipeline.load_config(model, **hub)
    family = family_class(config["_class_name"])  # fails before gigabytes are downloaded
    if quantization_config is not None:
        quantized = {**hub, **{name: init_kwargs[name] for name in ("variant",) if name in init_kwargs}}
        init_kwargs[family.denoiser_name] = _load_quantized(
            family, config, model, quantization_config, dtype, device, quantized
        )
    pipeline = getattr(diffusers, config["_class_name"]).from_pretrained(
        model, dtype={"vae": torch.float32, "default": dtype}, **init_kwargs
    )
    return get_family(pipeline)


def is_single_file(model) -> bool:
    """Whether `model` names a checkpoint that has a whole pipeline in one file, as model exchanges have them."""
    return isinstance(model, str) and model.endswith((".safetensors", ".ckpt"))


def _check_source(model: str) -> None:
    is_url = model.startswith(("http://", "https://"))
    looks_local = model.startswith(("/", "./", "../", "~")) or is_single_file(model)
    if looks_local and not is_url and not Path(model).expanduser().exists():
        raise FileNotFoundError(
            f"`model={model!r}`: there is no such file or folder, seen from {Path.cwd()}. Check the path; a pipeline "
            "of the Hub has an id such as 'stabilityai/stable-diffusion-xl-base-1.0'."
        )


def _load_single_file(model: str, dtype, init_kwargs: dict, hub: dict, quantization_config) -> PipelineFamily:
    import diffusers
    from diffusers.loaders import single_file_utils

    if quantization_config is not None:
        raise ValueError(
            f"`quantization_config` is not supported with the single file {model!r}. Convert it first: "
            "`pipeline = StableDiffusionXLPipeline.from_single_file(...)` (or the pipeline that it is of) and "
            "`pipeline.save_pretrained(folder)`, and pass the folder as `model`."
        )
    try:
        config = init_kwargs.pop("config", None)
        if config is None:
            checkpoint = single_file_utils.load_single_file_checkpoint(model, **hub)
            config = single_file_utils.fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]
            del checkpoint
        name = diffusers.DiffusionPipeline.load_config(config, **hub)["_class_name"]
        family_class(name)
        # In float32, as there is one type for all components, and the VAE keeps it.
        pipeline = getattr(diffusers, name).from_single_file(model, config=config, dtype=torch.float32, **init_kwargs)
    except (OSError, single_file_utils.SingleFileComponentError) as error:
        raise ValueError(
            f"The single file {model!r} could not be loaded as the pipeline of {config!r}: {error} The configuration "
            "and the "
            "tokenizers are not in the file: give a folder or id that has them as `model_init_kwargs={'config': "
            "...}`, or load the pipeline with `from_single_file` and pass it as `model`."
        ) from error
    family = get_family(pipeline)
    for part in (family.denoiser, *family.text_encoders):
        part.to(dtype)
    return family


def restore_pipeline(family: PipelineFamily, model: str | None, init_kwargs: dict):
    """
    Returns the family's pipeline; its freed components are loaded again from `model`, the string it was loaded from.
    """
    pipeline = family.pipeline
    present = {name: component for name, component in pipeline.components.items() if component is not None}
    freed = [n for n in (*family.text_encoder_names, "vae") if n not in present]
    if model is None or not freed:
        return pipeline
    kwargs = {name: value for name, value in init_kwargs.items() if name not in ("dtype", "torch_dtype")}
    dtype = next(family.denoiser.parameters()).dtype
    return type(pipeline).from_pretrained(model, **{"dtype": dtype, **kwargs, **present})


_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")


def _raise_dtype(name):
    raise ValueError(f"`model_init_kwargs['dtype']={name!r}` is not a dtype of torch. Use 'bfloat16' or 'float32'.")


# ---- Quantization ---------------------------------------------------------------------------------------------------


def _load_quantized(family, pipeline_config, model, quantization_config, dtype, device, kwargs):
    diffusers = import_diffusers()
    config = _diffusers_quantization(quantization_config, family)
    denoiser_class = getattr(diffusers, pipeline_config[family.denoiser_name][1])
    on_cpu = torch.device(device or "cpu").type == "cpu"
    if not on_cpu:
        kwargs = {**kwargs, "device_map": {"": device}}
    with diffusers_quantization_on_cpu() if on_cpu else contextlib.nullcontext():
        denoiser = denoiser_class.from_pretrained(
            model, subfolder=family.denoiser_name, quantization_config=config, dtype=dtype, **kwargs
        )
    report_quantization(denoiser)
    return denoiser


def _diffusers_quantization(config, family: type[PipelineFamily]):
    """
    Converts `config` to that of diffusers, and skips layers for which quantization gains nothing, unless the user
    chose.
    """
    from diffusers import BitsAndBytesConfig

    values = config.to_dict() if hasattr(config, "to_dict") else None
    if type(config).__name__ == "PipelineQuantizationConfig":
        raise ValueError(
            "`quantization_config` is a `PipelineQuantizationConfig`, which is about a whole pipeline; here the "
            "denoiser alone is "
            'quantized. Pass `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", ...)`.'
        )
    if values is None or not (values.get("load_in_4bit") or values.get("load_in_8bit")):
        raise ValueError(
            "`quantization_config` must be a `BitsAndBytesConfig` with `load_in_4bit=True` or `load_in_8bit=True`, "
            f"got {config!r}."
        )
    names = ["load_in_4bit", "load_in_8bit", "llm_int8_threshold", "llm_int8_skip_modules"]
    names += ["bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"]
    values = {name: values[name] for name in names if values.get(name) is not None}
    values.setdefault("llm_int8_skip_modules", list(family.quantization_skip_modules))
    return BitsAndBytesConfig(**values)


def is_quantized(denoiser) -> bool:
    """Whether any of the denoiser's weights are quantized."""
    return getattr(denoiser, "hf_quantizer", None) is not None or bool(
        getattr(denoiser, "is_loaded_in_4bit", False) or getattr(denoiser, "is_loaded_in_8bit", False)
    )


def report_quantization(denoiser) -> None:
    """Warns if quantization covers less than half of the weights: it applies to linear layers only."""
    quantized = rest = 0
    for parameter in denoiser.parameters():
        if hasattr(parameter, "quant_state") or type(parameter).__name__ == "Int8Params":
            state = getattr(parameter, "quant_state", None)
            quantized += state.shape.numel() if state is not None else parameter.numel()
        else:
            rest += parameter.numel()
    share = quantized / max(1, quantized + rest)
    if share < 0.5:
        logger.warning(
            f"Only {share:.0%} of the denoiser's {quantized + rest:,} weights are in linear layers that quantization "
            "reaches; convolutions stay as they are. For Stable Diffusion 1.x and 2.x plain LoRA takes about as "
            "little memory and is faster."
        )


# ---- Adapters and reference -----------------------------------------------------------------------------------------


def prepare_policy(family: PipelineFamily, peft_config) -> str | None:
    """
    Makes the denoiser trainable: a new LoRA; the LoRA that it comes with, whose frozen copy becomes the reference; or
    all of its weights. Trained parameters are in float32. Returns the adapter's name, `None` under full fine-tuning.

    Raises:
        `TypeError`: If `peft_config` is not a `LoraConfig`.
        `ValueError`: For a LoRA whose targets match nothing, a second LoRA, or full fine-tuning of quantized weights.
    """
    denoiser = family.denoiser
    keep_quantized_weights(denoiser)
    for part in [family.pipeline.vae, *family.text_encoders]:
        part.requires_grad_(False).eval()
    loaded = list(getattr(denoiser, "peft_config", {}) or {})
    adapted = [
        name for name in family.text_encoder_names if getattr(getattr(family.pipeline, name), "peft_config", None)
    ]
    if adapted:
        raise ValueError(
            f"The pipeline's {' and '.join(adapted)} has an adapter, which is not trained here and would not be "
            "saved. Merge it first, with `pipeline.fuse_lora()` and `pipeline.unload_lora_weights()`."
        )
    # As in `DPOTrainer`: with dropout, policy and reference would differ before anything is learned.
    for module in denoiser.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0

    if peft_config is not None:
        if loaded:
            raise ValueError(
                f"`peft_config` was given, but the pipeline comes with the adapter(s) {', '.join(loaded)}. Leave "
                "`peft_config` out to go on training that adapter, or merge it first, with `pipeline.fuse_lora()` and "
                "`pipeline.unload_lora_weights()`."
            )
        adapter_name = _add_lora(family, peft_config)
    elif len(loaded) > 1:
        raise ValueError(f"The pipeline comes with {len(loaded)} adapters, {', '.join(loaded)}; train one at a time.")
    elif loaded:
        adapter_name = loaded[0]
        _check_starting_lora(denoiser, adapter_name)
        _fold_adapter_weight(denoiser, adapter_name)
        _copy_adapter(denoiser, adapter_name)
    elif is_quantized(denoiser):
        raise ValueError(
            "The denoiser is quantized, and quantized weights cannot be trained. Pass a `peft_config` (QLoRA), or "
            "load the denoiser without quantization for full fine-tuning."
        )
    else:
        denoiser.requires_grad_(True)
        family.freeze_unused()
        denoiser.to(torch.float32)
        return None
    family.freeze_unused()
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapter_name


def _add_lora(family: PipelineFamily, peft_config) -> str:
    from peft import LoraConfig

    if not isinstance(peft_config, LoraConfig):
        raise TypeError(
            f"`peft_config` must be a `peft.LoraConfig`, got a `{type(peft_config).__name__}`: diffusers' format, "
            "which pipelines load, is LoRA's."
        )
    if peft_config.modules_to_save:
        raise ValueError(
            f"`modules_to_save={peft_config.modules_to_save!r}` of the `LoraConfig` is not supported: diffusers' LoRA "
            "format has no place for whole modules. Leave it out."
        )
    _check_lora_config(peft_config, is_fresh=True)
    config = copy.deepcopy(peft_config)
    if config.target_modules is None:
        config.target_modules = list(family.lora_target_modules)
    denoiser = family.denoiser
    try:
        denoiser.add_adapter(config, adapter_name=POLICY_ADAPTER)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        linear = sorted({n.split(".")[-1] for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear)})
        targets = config.target_modules
        raise ValueError(
            f"`target_modules={targets if isinstance(targets, str) else sorted(targets)!r}` of the `LoraConfig` "
            f"matches no layer of the `{type(denoiser).__name__}`. Leave it out for {family.lora_target_modules}, or "
            f"choose from the linear layers, whose names end in {', '.join(linear)}."
        ) from error
    changed = find_nonzero_adapter(denoiser, POLICY_ADAPTER)
    if changed is not None:
        raise ValueError(
            f"`init_lora_weights={config.init_lora_weights!r}` of the `LoraConfig` makes a LoRA that changes "
            f"`{changed}` before training, so that the model without it is not what training starts from. Use "
            "`init_lora_weights=True`."
        )
    return POLICY_ADAPTER


def _check_lora_config(config, is_fresh: bool) -> None:
    check_needs_no_more(config, is_fresh)
    check_starts_at_base(config, is_fresh)
    if getattr(config, "trainable_token_indices", None):
        raise ValueError(
            f"`trainable_token_indices={config.trainable_token_indices!r}` of the `LoraConfig` is not supported: it "
            "trains embeddings beside the LoRA. Leave it out."
        )


def _lora_layers(denoiser, adapter_name: str) -> list:
    return [module for module in denoiser.modules() if adapter_name in getattr(module, "lora_A", {})]


def _check_starting_lora(denoiser, adapter_name: str) -> None:
    """
    Raises `ValueError` unless the adapter that the pipeline comes with is a LoRA that is in use and can be trained on.
    """
    from peft import LoraConfig

    config, layers = denoiser.peft_config[adapter_name], _lora_layers(denoiser, adapter_name)
    if not isinstance(config, LoraConfig) or not layers:
        raise ValueError(
            f"The pipeline's adapter {adapter_name!r} is no LoRA, which alone can be trained on. Merge it first, with "
            "`pipeline.fuse_lora()` and `pipeline.unload_lora_weights()`."
        )
    _check_lora_config(config, is_fresh=False)
    if any(layer.merged for layer in layers):
        raise ValueError(
            f"The pipeline's LoRA {adapter_name!r} is fused into the weights and still attached, so that it would not "
            "be trained. Call `pipeline.unload_lora_weights()` to train a new one on top of it (with `peft_config`), "
            "or `pipeline.unfuse_lora()` to go on training it."
        )
    if any(layer.disable_adapters or adapter_name not in layer.active_adapters for layer in layers):
        raise ValueError(
            f"The pipeline's LoRA {adapter_name!r} is switched off. Call `pipeline.enable_lora()` to go on training "
            "it, or `pipeline.unload_lora_weights()` and give a `peft_config` to train a new one."
        )


def _fold_adapter_weight(denoiser, adapter_name: str) -> None:
    """
    Moves the weight that `pipeline.set_adapters` gave a LoRA into its factor B: the model stays the same, and so does
    what is saved, which has no place for such a weight.
    """
    for layer in _lora_layers(denoiser, adapter_name):
        weighted = layer.scaling[adapter_name]
        layer.set_scale(adapter_name, 1.0)
        ratio = weighted / layer.scaling[adapter_name]
        if ratio != 1.0:
            for parameter in layer.lora_B[adapter_name].parameters():
                parameter.data = parameter.data.float() * ratio


def _copy_adapter(denoiser, adapter_name: str) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(denoiser.peft_config[adapter_name])
    config.lora_dropout = 0.0  # the reference has none
    denoiser.add_adapter(config, adapter_name=REFERENCE_ADAPTER)
    state = get_peft_model_state_dict(denoiser, adapter_name=adapter_name)
    set_peft_model_state_dict(denoiser, state, adapter_name=REFERENCE_ADAPTER)
    for name, parameter in denoiser.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            parameter.data = parameter.data.float()  # as the policy's; otherwise the two would differ by rounding
    denoiser.set_adapter(adapter_name)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(f".{adapter_name}." in name and "lora_" in name)


def prepare_reference(
    family: PipelineFamily, ref_model, adapter_name: str | None, autocast_dtype: torch.dtype | None = None
):
    """
    Returns the separate reference model, frozen: the user's, or under full fine-tuning a copy of the denoiser. Returns
    `None` if the denoiser, with another adapter or none, is the reference.

    A reference in half precision beside a policy in float32 is converted to float32, as beta multiplies the rounding
    of its activations, unless mixed precision, in `autocast_dtype`, rounds both alike.

    Raises:
        `TypeError`, `ValueError`: If `ref_model` is neither a denoiser nor a pipeline of the policy's kind.
    """
    denoiser = family.denoiser
    if ref_model is None:
        return None if adapter_name is not None else copy.deepcopy(denoiser).requires_grad_(False).eval()
    diffusers = import_diffusers()
    if isinstance(ref_model, diffusers.DiffusionPipeline):
        ref_model = getattr(ref_model, family.denoiser_name, ref_model)
    if type(ref_model) is not type(denoiser):
        raise TypeError(
            f"`ref_model` must be a `{type(denoiser).__name__}`, or a pipeline with one, as the policy is; got a "
            f"`{type(ref_model).__name__}`."
        )
    shared = shared_parameters(denoiser, ref_model, trained_only=True)
    if ref_model is denoiser or shared:
        what = (
            "is the very model"
            if ref_model is denoiser
            else f"shares {len(shared)} tensors ({shared[0]}, ...) with the model"
        )
        raise ValueError(
            f"`ref_model` {what} that is trained, so it would change with it. Leave `ref_model` out, and the model "
            "that training starts from is the reference."
        )
    for option in ("in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim"):
        own, other = denoiser.config.get(option), ref_model.config.get(option)
        if own != other:
            raise ValueError(
                f"`ref_model` has {option}={other}, the policy {own}: they cannot be given the same inputs. Give a "
                "reference of the policy's kind."
            )
    is_half = ref_model.dtype in (torch.float16, torch.bfloat16)
    is_as_policy = ref_model.dtype in (denoiser.dtype, autocast_dtype)
    if is_half and denoiser.dtype == torch.float32 and not is_as_policy and not is_quantized(ref_model):
        dtype = str(ref_model.dtype).removeprefix("torch.")
        logger.warning(
            f"`ref_model` is in {dtype} and the policy is not, so the reference is converted to float32: its rounding, "
            f"times `beta`, would drown the loss. With mixed precision in {dtype} it stays as it is."
        )
        ref_model = ref_model.float()
    return ref_model.requires_grad_(False).eval()
