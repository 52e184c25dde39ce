"""
What a Diffusion-DPO step costs: encoding every image at every step beside reading its latents from the cache, and the
adapter switched off as the reference beside a second denoiser.

Both ways of getting latents are timed in one process, on one trainer and the same pairs, and take turns, so that
whatever else the machine does falls on both alike; the ratio is the median over rounds of the time of encoding over
that of the cache in the same round, with a bootstrap interval. Reading the pairs is part of a step. Peak memory is
measured apart, each way in a process of its own: on CUDA as the allocator's peak, on CPU as the peak resident size
during a step.

The pipelines have random weights and a real pipeline's shape, so nothing is downloaded.

    python recipes/benchmarks/diffusion_cost.py --shape sd15 --size 256 --rounds 5
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from measuring import interval, peak_memory, quiet, reset_peak_memory


SHAPES = ("tiny", "tiny-sdxl", "sd15", "sdxl")
SIZES = {"tiny": 32, "tiny-sdxl": 32, "sd15": 512, "sdxl": 1024}
REFERENCES = {"adapter": "adapter switched off", "second": "second denoiser"}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="sd15")
    parser.add_argument(
        "--size", type=int, help="height and width of the images in pixels; the pipeline's own by default"
    )
    parser.add_argument("--mode", choices=["lora", "qlora"], default="lora")
    parser.add_argument(
        "--precision",
        choices=["bf16", "fp32"],
        default="bf16",
        help="of the denoiser and the text encoders; the VAE is in float32 in any case, as in the trainer",
    )
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--no_time", action="store_true", help="measure memory only")
    parser.add_argument("--no_memory", action="store_true", help="measure time only")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # used by the run itself
    options = parser.parse_args()
    options.size = options.size or SIZES[options.shape]
    return options


def text_encoder(hidden: int, layers: int, heads: int, projection: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        projection_dim=hidden,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def tokenizer():
    """CLIP's byte alphabet without merges: the tokens mean nothing to random weights, and their number is fixed."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [token + "</w>" for token in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def make_pipeline(shape: str):
    """A pipeline with random weights: the configurations of Stable Diffusion 1.5 and of SDXL, or a small one."""
    import torch
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    # Drawing SDXL's weights on a CPU takes longer than measuring it on a GPU.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return _make_pipeline(shape, scheduler)


def _make_pipeline(shape: str, scheduler):
    from diffusers import (
        AutoencoderKL,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    tiny, is_xl = shape.startswith("tiny"), shape.endswith("sdxl")
    blocks = (16, 32, 32, 32) if tiny else (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8 if tiny else 32,
        sample_size=SIZES[shape],
        scaling_factor=0.13025 if is_xl else 0.18215,
    )
    if is_xl:
        unet = UNet2DConditionModel(
            sample_size=SIZES[shape] // 8,
            block_out_channels=(32, 64, 64) if tiny else (320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2) if tiny else (1, 2, 10),
            attention_head_dim=(2, 4, 4) if tiny else (5, 10, 20),
            cross_attention_dim=64 if tiny else 2048,
            norm_num_groups=8 if tiny else 32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8 if tiny else 256,
            # Six numbers of the image's size, and the pooled text.
            projection_class_embeddings_input_dim=6 * 8 + 32 if tiny else 6 * 256 + 1280,
        )
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text_encoder(32, 2, 2) if tiny else text_encoder(768, 12, 12),
            text_encoder_2=text_encoder(*((32, 2, 2) if tiny else (1280, 32, 20)), projection=True),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet,
            scheduler=scheduler,
            add_watermarker=False,
        )
    unet = UNet2DConditionModel(
        sample_size=SIZES[shape] // 8,
        block_out_channels=(32, 64) if tiny else (320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * (1 if tiny else 3) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (1 if tiny else 3),
        attention_head_dim=8,
        cross_attention_dim=32 if tiny else 768,
        norm_num_groups=8 if tiny else 32,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder(32, 2, 2) if tiny else text_encoder(768, 12, 12),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_dataset(options):
    """Pairs of JPEG files of the training size, in memory, as in Pick-a-Pic."""
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    generator = np.random.default_rng(0)

    def jpeg() -> bytes:
        # Enlarged noise: as large a file as a photograph's, not the many times larger one of noise.
        small = generator.integers(0, 256, (options.size // 8, options.size // 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((options.size, options.size), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        return buffer.getvalue()

    return Dataset.from_list(
        [{"prompt": f"a photo of {i}", "chosen": jpeg(), "rejected": jpeg()} for i in range(options.pairs)]
    )


def make_trainer(options, folder: str, reference: str = "adapter"):
    """A trainer that encodes at every step, ready to step; and `step(dataset)`, one whole step on all its pairs."""
    import copy

    import torch
    from peft import LoraConfig

    from trl_ext import DiffusionDPOConfig, DiffusionDPOTrainer

    cuda = torch.cuda.is_available()
    model, quantization, second = make_pipeline(options.shape), None, None
    bf16 = options.precision == "bf16"
    if bf16:
        for name in ("unet", "text_encoder", "text_encoder_2"):
            if getattr(model, name, None) is not None:
                getattr(model, name).to(torch.bfloat16)
    if options.mode == "qlora":
        from transformers import BitsAndBytesConfig

        model.save_pretrained(os.path.join(folder, "model"))
        model = os.path.join(folder, "model")
        compute = torch.bfloat16 if bf16 else torch.float32
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=True,
        )
    elif reference == "second":
        second = copy.deepcopy(model.unet)
    args = DiffusionDPOConfig(
        output_dir=os.path.join(folder, "out"),
        per_device_train_batch_size=options.pairs,
        resolution=options.size,
        prompt_dropout=0.0,
        max_steps=1,
        gradient_checkpointing=options.gradient_checkpointing,
        bf16=bf16,
        use_cpu=not cuda,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DiffusionDPOTrainer(
        model=model,
        ref_model=second,
        args=args,
        train_dataset=make_dataset(options),
        quantization_config=quantization,
        peft_config=LoraConfig(r=16, lora_alpha=16),
    )
    if options.mode == "qlora" and reference == "second":
        raise SystemExit("A second denoiser is compared in `--mode lora` only.")
    trainer.create_optimizer()
    wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = wrapped
    wrapped.train()
    trainer.current_gradient_accumulation_steps = 1  # set by the training loop, which this is not

    def step(dataset):
        batch = trainer.data_collator([dataset[i] for i in range(options.pairs)])
        trainer.training_step(wrapped, batch)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        for window in trainer._window.values():
            window.clear()
        if cuda:
            torch.cuda.synchronize()

    return trainer, step


def make_cache(trainer, folder: str):
    from trl_ext.diffusion.latent_cache import cache_latents

    family = trainer.family
    return cache_latents(
        trainer.train_dataset,
        os.path.join(folder, "cache"),
        encode_images=family.encode_images,
        encode_prompts=family.encode_prompts,
        image_fingerprint="benchmark",
        prompt_fingerprint="benchmark",
        progress=False,
    )


def measure_memory_of(options) -> None:
    """Peak of a step of one way, `source` of the latents and kind of reference, in this process."""
    import torch
    from diffusers.training_utils import free_memory

    source, reference = options.memory_of.split("-")
    with tempfile.TemporaryDirectory() as folder:
        trainer, step = make_trainer(options, folder, reference)
        dataset = trainer.train_dataset
        if source == "cached":
            dataset = make_cache(trainer, folder)
            # As the trainer does with `cache_latents=True` for a pipeline that it loaded itself.
            trainer.family.free([*trainer.family.text_encoder_names, "vae"])
            free_memory()
        step(dataset)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        reset_peak_memory()
        step(dataset)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
        print(json.dumps({"peak": peak}))


def measure_time(options) -> dict[str, list[float]]:
    """Seconds of a step on encoded and on cached latents, by round."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, step = make_trainer(options, folder)
        datasets = {"encoded": trainer.train_dataset, "cached": make_cache(trainer, folder)}
        times = {name: [] for name in datasets}
        for _ in range(options.warmup):
            step(datasets["cached"])  # filling the cache has warmed the encoders up
        for round_index in range(options.rounds):
            # The order changes from round to round, so that neither always follows the other.
            for name in sorted(datasets, reverse=round_index % 2 == 1):
                start = time.perf_counter()
                step(datasets[name])
                times[name].append(time.perf_counter() - start)
            shown = ", ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in times.items())
            print(f"round {round_index + 1}: {shown}", file=sys.stderr, flush=True)
    return times


def main() -> None:
    options = parse_args()
    import diffusers
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    quiet()
    diffusers.utils.logging.set_verbosity_error()
    if options.memory_of:
        return measure_memory_of(options)

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    checkpointing = "on" if options.gradient_checkpointing else "off"
    results: dict = {}
    print(
        f"{options.shape}, {options.mode}, {options.precision}, {options.pairs} pairs of {options.size} x "
        f"{options.size} pixels, gradient checkpointing {checkpointing}, {device}, torch {torch.__version__}"
    )
    if not options.no_time:
        times = measure_time(options)
        ratios = [encoded / cached for encoded, cached in zip(times["encoded"], times["cached"], strict=True)]
        low, high = interval(ratios)
        results["time"] = {"seconds": times, "ratio": statistics.median(ratios), "interval": [low, high]}
        print(f"| latents | step, median of {options.rounds} | encoding every step takes (95% interval) |")
        print("|---|---|---|")
        encoded, cached = (statistics.median(times[name]) for name in ("encoded", "cached"))
        ratio = statistics.median(ratios)
        print(f"| encoded every step | {encoded:.3f} s | {ratio:.3f} times ({low:.3f} to {high:.3f}) |")
        print(f"| from the cache | {cached:.3f} s | 1 |", flush=True)
    if not options.no_memory:
        ways = ["encoded-adapter", "cached-adapter"] + ["cached-second"] * (options.mode == "lora")
        peaks = {}
        for way in ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", way]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                sys.exit(result.stderr)
            peaks[way] = json.loads(result.stdout.splitlines()[-1])["peak"]
        results["memory"] = peaks
        kind = "peak GPU memory" if torch.cuda.is_available() else "peak resident memory"
        print(f"\n| latents | reference | {kind} of a step | ratio |")
        print("|---|---|---|---|")
        for way, peak in peaks.items():
            source, reference = way.split("-")
            source = "encoded every step" if source == "encoded" else "from the cache, encoders freed"
            ratio = peak / peaks["cached-adapter"]
            print(f"| {source} | {REFERENCES[reference]} | {peak / 2**30:.2f} GiB | {ratio:.2f} |")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"options": vars(options), "device": device, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
