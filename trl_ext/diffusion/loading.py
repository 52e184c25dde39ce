"""From what a user passes as the model to a pipeline whose denoiser can be trained."""

import contextlib
import copy
import logging

import torch

from .._patches import keep_quantized_weights
from .families import PipelineFamily, family_class, get_family
from .paired_denoiser import REFERENCE_ADAPTER


logger = logging.getLogger(__name__)

POLICY_ADAPTER = "default"


def import_diffusers():
    """diffusers, or an `ImportError` that says how to get it."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            'The diffusion trainers need diffusers. Install it with `pip install "trl-ext[diffusion]"`.'
        ) from error
    return diffusers


def free_memory() -> None:
    """Gives back what nothing refers to any more, on the accelerator too."""
    from diffusers.training_utils import free_memory

    free_memory()


def load_pipeline(model, *, dtype, init_kwargs: dict, quantization_config=None, device=None) -> PipelineFamily:
    """
    The pipeline and its family.

    Args:
        model (`str` or `diffusers.DiffusionPipeline`):
            Hub id, local folder, or a pipeline, which is used as it is.
        dtype (`torch.dtype`):
            Of the denoiser and the text encoders, unless `init_kwargs` has one. The VAE is loaded in float32.
        init_kwargs (`dict`):
            Keyword arguments of `from_pretrained`.
        quantization_config (`diffusers.BitsAndBytesConfig` or `transformers.BitsAndBytesConfig`, *optional*):
            Quantise the denoiser as it is loaded.
        device (`torch.device`, *optional*):
            Where a quantised denoiser is put.

    Raises:
        `ImportError`: Without diffusers.
        `TypeError`: If `model` is neither.
        `ValueError`: For a pipeline class that is not known, or options that go with a string only.
    """
    diffusers = import_diffusers()
    if isinstance(model, diffusers.DiffusionPipeline):
        for name, value in (("model_init_kwargs", init_kwargs), ("quantization_config", quantization_config)):
            if value:
                raise ValueError(
                    f"`{name}` has no effect on a pipeline that is already loaded. Pass the pipeline's id or folder as "
                    f"`model`, or load the pipeline so and leave `{name}` out."
                )
        return get_family(model)
    if not isinstance(model, str):
        raise TypeError(
            f"`model` must be the id or folder of a pipeline, or a `diffusers.DiffusionPipeline`, got a "
            f"`{type(model).__name__}`."
        )

    init_kwargs = dict(init_kwargs)
    given = init_kwargs.pop("dtype", init_kwargs.pop("torch_dtype", None))
    if isinstance(given, str) and given != "auto":
        given = getattr(torch, given, None) or _raise_dtype(given)
    dtype = dtype if given in (None, "auto") else given
    hub = {name: init_kwargs[name] for name in _HUB_OPTIONS if name in init_kwargs}
    config = diffusers.DiffusionPipeline.load_config(model, **hub)
    family = family_class(config["_class_name"])  # before gigabytes are fetched
    if quantization_config is not None:
        quantized = {**hub, **{name: init_kwargs[name] for name in ("variant",) if name in init_kwargs}}
        init_kwargs[family.denoiser_name] = _load_quantized(
            family, config, model, quantization_config, dtype, device, quantized
        )
    pipeline = getattr(diffusers, config["_class_name"]).from_pretrained(
        model, dtype={"vae": torch.float32, "default": dtype}, **init_kwargs
    )
    return get_family(pipeline)


def restore_pipeline(family: PipelineFamily, model: str | None, init_kwargs: dict):
    """The family's pipeline, whose freed components are loaded again from `model`, the string it was loaded from."""
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


# ---- Quantisation ------------------------------------------------------------------------------------------------------


def _load_quantized(family, pipeline_config, model, quantization_config, dtype, device, kwargs):
    diffusers = import_diffusers()
    config = _diffusers_quantization(quantization_config, family)
    denoiser_class = getattr(diffusers, pipeline_config[family.denoiser_name][1])
    on_cpu = torch.device(device or "cpu").type == "cpu"
    if not on_cpu:
        kwargs = {**kwargs, "device_map": {"": device}}
    with _quantize_on_cpu() if on_cpu else contextlib.nullcontext():
        denoiser = denoiser_class.from_pretrained(
            model, subfolder=family.denoiser_name, quantization_config=config, dtype=dtype, **kwargs
        )
    keep_quantized_weights(denoiser)
    report_quantization(denoiser)
    return denoiser


def _diffusers_quantization(config, family: type[PipelineFamily]):
    """`config` as diffusers', which skips what gains nothing unless the user says what to skip."""
    from diffusers import BitsAndBytesConfig

    values = config.to_dict() if hasattr(config, "to_dict") else None
    if values is None or not (values.get("load_in_4bit") or values.get("load_in_8bit")):
        raise ValueError(
            f"`quantization_config` must be a `BitsAndBytesConfig` with `load_in_4bit=True` or `load_in_8bit=True`, got "
            f"{config!r}."
        )
    names = ("load_in_4bit", "load_in_8bit", "llm_int8_threshold", "llm_int8_skip_modules")
    names += ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage")
    values = {name: values[name] for name in names if values.get(name) is not None}
    values.setdefault("llm_int8_skip_modules", list(family.quantization_skip_modules))
    return BitsAndBytesConfig(**values)


@contextlib.contextmanager
def _quantize_on_cpu():
    """
    Lets diffusers load a 4-bit model where there is no accelerator. bitsandbytes has CPU kernels, and transformers uses
    them; diffusers 0.42 still refuses.
    """
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as Quantizer

    originals = Quantizer.validate_environment, Quantizer.update_device_map
    Quantizer.validate_environment = lambda self, *args, **kwargs: None
    Quantizer.update_device_map = lambda self, device_map: {"": "cpu"} if device_map is None else device_map
    try:
        yield
    finally:
        Quantizer.validate_environment, Quantizer.update_device_map = originals


def is_quantized(denoiser) -> bool:
    """Whether some of the denoiser's weights are quantised."""
    return getattr(denoiser, "hf_quantizer", None) is not None or bool(
        getattr(denoiser, "is_loaded_in_4bit", False) or getattr(denoiser, "is_loaded_in_8bit", False)
    )


def report_quantization(denoiser) -> None:
    """Says what quantisation was good for: it reaches linear layers only, and a U-Net can be mostly convolutions."""
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
            f"Only {share:.0%} of the denoiser's {quantized + rest:,} weights are in linear layers that quantisation "
            "reaches; convolutions stay as they are. For Stable Diffusion 1.x and 2.x plain LoRA takes about as little "
            "memory and is faster."
        )


# ---- Adapters and reference --------------------------------------------------------------------------------------------


def prepare_policy(family: PipelineFamily, peft_config) -> str | None:
    """
    Makes the denoiser trainable: a new LoRA; or the one that it comes with, whose frozen copy becomes the reference; or
    all of it. Trained parameters are in float32. Returns the adapter's name, `None` under full fine-tuning.

    Raises:
        `TypeError`: If `peft_config` is not a LoRA's.
        `ValueError`: For a LoRA whose targets match nothing, one beside another, or full fine-tuning of quantised weights.
    """
    denoiser = family.denoiser
    for part in [family.pipeline.vae, *family.text_encoders]:
        part.requires_grad_(False).eval()
    loaded = list(getattr(denoiser, "peft_config", {}) or {})
    adapted = [
        name for name in family.text_encoder_names if getattr(getattr(family.pipeline, name), "peft_config", None)
    ]
    if adapted:
        raise ValueError(
            f"The pipeline's {' and '.join(adapted)} has an adapter, which is not trained here and would not be saved. "
            "Merge it first, with `pipeline.fuse_lora()` and `pipeline.unload_lora_weights()`."
        )
    # As in `DPOTrainer`: dropout would make policy and reference differ before anything is learnt.
    for module in denoiser.modules():
        if isinstance(module, torch.nn.Dropout):
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
        _copy_adapter(denoiser, adapter_name)
    elif is_quantized(denoiser):
        raise ValueError(
            "The denoiser is quantised, and quantised weights cannot be trained. Pass a `peft_config` (QLoRA), or load "
            "the denoiser without quantisation for full fine-tuning."
        )
    else:
        denoiser.requires_grad_(True)
        denoiser.to(torch.float32)
        return None
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapter_name


def _add_lora(family: PipelineFamily, peft_config) -> str:
    from peft import LoraConfig

    if not isinstance(peft_config, LoraConfig):
        raise TypeError(
            f"`peft_config` must be a `peft.LoraConfig`, got a `{type(peft_config).__name__}`: diffusers' format, which "
            "pipelines load, is LoRA's."
        )
    if peft_config.modules_to_save:
        raise ValueError(
            f"`modules_to_save={peft_config.modules_to_save!r}` of the `LoraConfig` is not supported: diffusers' LoRA "
            "format has no place for whole modules. Leave it out."
        )
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
            f"`target_modules={targets if isinstance(targets, str) else sorted(targets)!r}` of the `LoraConfig` matches no "
            f"layer of the `{type(denoiser).__name__}`. Leave it out for {family.lora_target_modules}, or choose from the "
            f"linear layers, whose names end in {', '.join(linear)}."
        ) from error
    return POLICY_ADAPTER


def _copy_adapter(denoiser, adapter_name: str) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(denoiser.peft_config[adapter_name])
    denoiser.add_adapter(config, adapter_name=REFERENCE_ADAPTER)
    state = get_peft_model_state_dict(denoiser, adapter_name=adapter_name)
    set_peft_model_state_dict(denoiser, state, adapter_name=REFERENCE_ADAPTER)
    for name, parameter in denoiser.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            parameter.data = parameter.data.float()  # as the policy's, or the two would differ by rounding
    denoiser.set_adapter(adapter_name)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(f".{adapter_name}." in name and "lora_" in name)


def prepare_reference(family: PipelineFamily, ref_model, adapter_name: str | None):
    """
    The separate reference model, frozen: what the user gives, or under full fine-tuning a copy of the denoiser. `None`
    where the denoiser with another adapter, or none, is the reference.

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
    if ref_model is denoiser:
        raise ValueError(
            "`ref_model` is the very model that is trained, so it would change with it. Leave `ref_model` out, and the "
            "model that training starts from is the reference."
        )
    return ref_model.requires_grad_(False).eval()
