"""
Everything that trl_ext changes at run time in another library: one function each, with the reason, the upstream issue
where there is one, and when it can go. Each has a contract test in `tests/test_contract.py`.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from trl import DPOTrainer


@contextlib.contextmanager
def dpo_trainer_construction(add_head: Callable):
    """
    What `DPOTrainer.__init__` finds in its module while one of our trainers is built.

    - `add_fused_lm_head` is `add_head`: one scoring head, which also scores two models in one pass, in place of TRL's
      fused head with others stacked on it; and it projects only the positions whose label counts on a CPU too, where
      TRL projects all of them, prompts and padding included.
    - `hash_module` returns `None`: TRL's cache of log-probabilities is not used here, and its hash copies every weight
      through fp32 and misses those that DeepSpeed ZeRO-3 has sharded.

    No upstream issue. It can go when `DPOTrainer` builds its head, and hashes its reference, in methods that a
    subclass can override.

    Args:
        add_head (`Callable`):
            Called with a model, and with the keyword arguments of `add_fused_lm_head`.
    """
    dpo_trainer = sys.modules[DPOTrainer.__module__]
    replacements = {"add_fused_lm_head": add_head, "hash_module": lambda module: None}
    original = {name: getattr(dpo_trainer, name) for name in replacements}
    for name, value in replacements.items():
        setattr(dpo_trainer, name, value)
    try:
        yield
    finally:
        for name, value in original.items():
            setattr(dpo_trainer, name, value)


def keep_quantized_weights(model: torch.nn.Module) -> None:
    """
    Keeps bitsandbytes from repacking 4-bit layers of `model` for inference.

    On CPUs with bfloat16 units it does so at a layer's first forward in evaluation mode, for good and with coarser
    scales: after an evaluation, a sample or a reference's forward, training would go on from other weights than it
    began with.

    No upstream issue. It can go when bitsandbytes undoes the repacking in training mode (0.50 does not).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def generation_apart(model: torch.nn.Module) -> Iterator[None]:
    """
    Has `model.generate` not wait for other processes, for a while in which each holds whole weights.

    Transformers generates in step, until every process is done, if a module has an attribute that PyTorch sets on what
    FSDP2 shards. A process that samples more often than another would then wait for it for ever.

    No upstream issue. It can go when `generate(synced_gpus=False)` can be said for a model that others call.
    """
    owners = [owner for owner in _generating(model) if getattr(owner, "_is_fsdp_managed_module", False)]
    for owner in owners:
        owner._is_fsdp_managed_module = False
    try:
        yield
    finally:
        for owner in owners:
            owner._is_fsdp_managed_module = True


def _generating(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The model and, of a [`~peft.PeftModel`], the base model, one of which Transformers asks."""
    return list({id(each): each for each in (model, getattr(model, "get_base_model", lambda: model)())}.values())


def wrap_attention_functions(wrap: Callable[[Callable], Callable]) -> None:
    """
    Has every model of transformers attend through `wrap(attention function)`, from now on in this process.

    A packed row ([`training.shared_prompt`]) has its own kind of mask, which any attention function must understand. A
    registered name is not enough: eager attention is a default argument, one function a modeling file. It stays, since
    gradient checkpointing runs layers again when the forward is over; `wrap` must leave other forwards as they are.

    No upstream issue. It can go when transformers' attention functions take a layout of packed sequences with shared
    prefixes.
    """
    from transformers.modeling_utils import AttentionInterface

    original = AttentionInterface.get_interface
    if getattr(original, "_wraps_for_trl_ext", False):
        return

    def get_interface(self, attn_implementation, default):
        return wrap(original(self, attn_implementation, default))

    get_interface.__dict__["_wraps_for_trl_ext"] = True
    AttentionInterface.get_interface = get_interface


@contextlib.contextmanager
def mask_functions_replaced(replace: Callable[[Callable], Callable]) -> Iterator[None]:
    """
    For a while, every entry of transformers' registry of mask functions is `replace(entry)`. Models look their mask
    function up at each forward; there is no other way to give all layers a mask of one's own and keep the windows of
    those that have some.

    No upstream issue. It can go with [`wrap_attention_functions`].
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks

    own = dict(masks._local_mapping)
    for name in list(masks):
        masks[name] = replace(masks[name])
    try:
        yield
    finally:
        masks._local_mapping.clear()
        masks._local_mapping.update(own)


@contextlib.contextmanager
def diffusers_quantization_on_cpu():
    """
    Lets diffusers load a 4-bit model where there is no accelerator.

    bitsandbytes has CPU kernels, which transformers uses; diffusers 0.42 refuses the CPU ("No GPU found") and asks for
    the current CUDA device.

    No upstream issue. It can go when diffusers' `BnB4BitDiffusersQuantizer` accepts the CPU.
    """
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as Quantizer

    originals = Quantizer.validate_environment, Quantizer.update_device_map
    Quantizer.validate_environment = lambda self, *args, **kwargs: None
    Quantizer.update_device_map = lambda self, device_map: {"": "cpu"} if device_map is None else device_map
    try:
        yield
    finally:
        Quantizer.validate_environment, Quantizer.update_device_map = originals
