"""Models and datasets by name, as `trl-ext evaluate` takes them, and the packages that it needs."""

import json
from pathlib import Path

import torch

from .._patches import keep_quantized_weights
from ..training.extras import require_extra
from ..training.named_datasets import refuse_missing_path


def load_causal_lm(
    name: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
):
    """
    A causal language model by its Hub id or folder; a folder with an adapter gives its base model with the adapter.

    Args:
        name (`str`):
            Hub id or folder.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision. In bfloat16 the log-probabilities of whole responses are known to a few tenths of a nat only.
        device (`str`, *optional*):
            Where to put it; a CUDA device if there is one, by default.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the model may run.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to hold the linear layers in 4 bits (NF4), as QLoRA trains on them.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Weights in other formats are pickles, which can run code.
    options = dict(dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True)
    if not load_in_4bit:
        return AutoModelForCausalLM.from_pretrained(name, **options).to(device)
    require_extra("quantization", "`load_in_4bit=True`", "bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=options["dtype"]
    )
    model = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=quantization, device_map={"": device}, **options
    )
    keep_quantized_weights(model)
    return model


def check_causal_lm(name: str, *, trust_remote_code: bool = False) -> None:
    """
    Raises an error if a model's configuration or files show that [`load_causal_lm`] could not load it. It takes
    seconds; loading would fail only after hours of measuring other models.

    Args:
        name (`str`):
            Hub id or folder, of a model or of an adapter.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            As for [`load_causal_lm`].

    Raises:
        `ValueError`: If the model cannot be loaded. The message names the model and what is missing.
    """
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    refuse_missing_path("model", name, file_types=())
    try:
        adapter = find_adapter_config_file(name)
        base = name if adapter is None else json.loads(Path(adapter).read_text())["base_model_name_or_path"]
        AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        missing = "" if Path(name).exists() else f" There is no folder {name} in {Path.cwd()} either."
        raise ValueError(
            f"The model {name!r} cannot be loaded, as its configuration cannot be read. {error}{missing}"
        ) from error
    for folder, what in ((name, "adapter" if adapter else "model"), (base, "model")):
        if Path(folder).is_dir() and not list(Path(folder).glob("*.safetensors")):
            raise ValueError(
                f"The model {name!r} cannot be loaded: the folder {folder} has no weights of the {what} in "
                "safetensors. Other formats can run code, and are not read: save it with `save_pretrained`."
            )


def require(*packages: str, needed_by: str = "A report") -> None:
    """
    Fails early, with what to install, where the first measurement would fail with a bare `No module named ...`.

    Args:
        *packages (`str`):
            Packages of the extra `evaluation`.
        needed_by (`str`, *optional*, defaults to `"A report"`):
            The feature that needs them, for the message.

    Raises:
        `ImportError`: If one of the packages cannot be imported.
    """
    require_extra("evaluation", needed_by, *packages)
