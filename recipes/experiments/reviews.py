"""
What the demonstrations on film reviews share: SmolLM2-135M-Instruct, the openings that ship with the project as short
prompts, LoRA on the last layers, and runs that are kept, so that an interrupted demonstration goes on where it was.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

COLORS = ("#3b6fb6", "#d9822b", "#4c9a5f", "#a05195", "#8a8a8a", "#c0504d")


def load(name: str | None, dtype: str = "float32"):
    """The quickstart's model, or another one, and its tokenizer."""
    from quickstart_model import quickstart_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = name or quickstart_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    # `generate` gives the head the last position alone, as a slice. On CPUs PyTorch multiplies what is not contiguous
    # without its fast kernels: 8 times slower in float32, 300 times in bfloat16, half of the time of a training step.
    model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))
    return model, AutoTokenizer.from_pretrained(path)


def openings(count: int, split: str, most_words: int | None = None) -> list[str]:
    """The first `count` openings of film reviews of a split, `train` or `test`, of at most so many words."""
    from make_sentiment_pairs import read_openings, split_openings

    train, test = split_openings(read_openings())
    found = train if split == "train" else test
    return [text for text in found if most_words is None or len(text.split()) <= most_words][:count]


def lora(model, rank: int = 16, layers: int = 10):
    """LoRA on the linear layers of the last `layers`: the backward pass ends there."""
    from peft import LoraConfig

    last = model.config.num_hidden_layers
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(max(0, last - layers), last)),
    )


def kept(folder: Path, name: str, settings: dict, make: Callable[[], dict]) -> dict:
    """
    What `make` returns, with its seconds and where it ran; read from `folder` if it was made before with the same
    `settings`.
    """
    from laboratory import provenance

    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    path = Path(folder) / f"{name.replace(' ', '_')}-{digest}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        start, cpu = time.perf_counter(), time.process_time()
        record = make()
        record["seconds"] = round(time.perf_counter() - start, 1)
        record["cpu_seconds"] = round(time.process_time() - cpu, 1)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({**record, **provenance()}))
        temporary.replace(path)
    return json.loads(path.read_text())


# ---- The command line -----------------------------------------------------------------------------------------------


def command_line(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that the demonstrations share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another model than SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of adapters and samples in training")
    parser.add_argument("--most_words", type=int, default=6, help="words of an opening at most")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument("--runs_dir", default=f"outputs/{name}", help="folder that keeps what was made")
    parser.add_argument("--output_dir", default=str(HERE), help="folder for results and plot")
    parser.add_argument("--plot_only", action="store_true", help="table and plot from the results that are there")
    return parser


def demonstrate(
    name: str,
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace], dict],
    table: Callable[[dict], str],
    plot: Callable[[dict, Path], None],
) -> None:
    """Runs a demonstration, or with `plot_only` reads its results; prints the table and draws the plot."""
    folder = Path(args.output_dir)
    path = folder / f"{name}.json"
    if not args.plot_only:
        warnings.filterwarnings("ignore", category=FutureWarning)
        if args.threads is not None:
            import torch

            torch.set_num_threads(args.threads)
        results = run(args)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    print(table(results))
    plot(results, folder / f"{name}.png")
