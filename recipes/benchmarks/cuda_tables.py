"""What `cuda_check.py` found, as rows of a table: each function makes `(what, result)` of a benchmark's results."""

import statistics

from measuring import interval


GIB = 2**30
# What issue and page ask of the paired head: its time over that of its GEMMs, and its memory without a trained head.
HEAD_TIME, HEAD_MEBIBYTES = 1.3, 1536
HEADS = {
    "published": "published formula, full logits",
    "composed": "TRL's two kernels, composed",
    "paired": "paired head",
    "compiled": "paired head, compiled",
    "floor": "its GEMMs alone",
}

Rows = list[tuple[str, str]]


def rows_of_tests(found: dict) -> Rows:
    failed = found["failures"] + found["errors"]
    passed = found["tests"] - failed - found["skipped"]
    rows = [("tests", f"{passed} passed, {failed} failed, {found['skipped']} skipped")]
    return rows + [("failed", f"`{name}`") for name in found["failed"]]


def rows_of_head(found: dict) -> Rows:
    rows, floor = [], found["rows"].get("floor", {}).get("milliseconds")
    is_frozen = not found["options"]["trained_head"]
    for name, row in found["rows"].items():
        if row["milliseconds"] is None:
            rows.append((HEADS[name], "does not fit into memory"))
            continue
        cells = [f"{row['milliseconds']:.1f} ms"]
        if name != "floor":
            cells.append(f"{row['mebibytes']:,.0f} MiB")
            if floor:
                cells.append(f"{row['milliseconds'] / floor:.2f} times the GEMMs")
        if name in ("paired", "compiled") and floor:
            reached = row["milliseconds"] <= HEAD_TIME * floor
            cells.append(f"goal of {HEAD_TIME} times {'reached' if reached else 'missed'}")
            if is_frozen:
                reached = row["mebibytes"] <= HEAD_MEBIBYTES
                cells.append(f"goal of {HEAD_MEBIBYTES:,} MiB {'reached' if reached else 'missed'}")
        rows.append((HEADS[name], "; ".join(cells)))
    return rows


def rows_of_steps(found: dict) -> Rows:
    rows = []
    for name, row in found["results"].items():
        low, high = row["interval"]
        cells = [f"{row['seconds']:.3f} s", f"{row['ratio']:.2f} ({low:.2f} to {high:.2f}) of DPO's step"]
        if "peak_bytes" in row:
            cells.append(f"peak of the step {row['peak_bytes'] / GIB:.2f} GiB ({row['memory_ratio']:.2f})")
        if row.get("held_bytes"):
            cells.append(f"with the model {(row['held_bytes'] + row['peak_bytes']) / GIB:.2f} GiB")
        rows.append((name, ", ".join(cells)))
    return rows


def rows_of_mixes(found: dict) -> Rows:
    rows = []
    for mix, result in found["results"].items():
        times = result["seconds"]
        padded = times["padded rows"]
        for name, seconds in times.items():
            factors = [b / t for t, b in zip(seconds, padded, strict=True)]
            low, high = interval(factors)
            cells = [f"{statistics.median(seconds):.3f} s"]
            cells.append(f"{statistics.median(factors):.2f} ({low:.2f} to {high:.2f}) times as fast as padded rows")
            if "peaks" in result:
                cells.append(f"peak of the step {result['peaks'][name] / GIB:.2f} GiB")
            rows.append((f"{mix}, {name}", ", ".join(cells)))
    return rows


def rows_of_diffusion(found: dict) -> Rows:
    rows, results = [], found["results"]
    if "time" in results:
        low, high = results["time"]["interval"]
        for name, seconds in results["time"]["seconds"].items():
            cells = [f"{statistics.median(seconds):.3f} s"]
            if name == "encoded":
                cells.append(f"{results['time']['ratio']:.2f} ({low:.2f} to {high:.2f}) of the step on cached latents")
            rows.append((f"step, latents {name}", ", ".join(cells)))
    for way, peak in results.get("memory", {}).items():
        latents, reference = way.split("-")
        reference = {"adapter": "adapter switched off", "second": "second denoiser"}[reference]
        ratio = peak / results["memory"]["cached-adapter"]
        rows.append((f"peak memory, latents {latents}, {reference}", f"{peak / GIB:.2f} GiB ({ratio:.2f})"))
    return rows


def rows_of_generation(found: dict) -> Rows:
    rows = []
    for name, row in found["results"].items():
        low, high = row["interval"]
        ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f}) of `generate`'s time"
        rows.append((name, f"{row['seconds']:.2f} s, {row['tokens_per_second']:,.0f} tokens/s, {ratio}"))
    return rows


def rows_of_quickstart(found: dict) -> Rows:
    before, after = found["eval_before"], found["eval_after"]
    return [
        ("model", found["model"]),
        ("whole run", f"{found['seconds']:.0f} s, {after['step']:.0f} steps"),
        ("loss on held-out pairs", f"{before['eval_loss']:.4f} before, {after['eval_loss']:.4f} after"),
        ("reward margin", f"{before['eval_rewards/margins']:.4f} before, {after['eval_rewards/margins']:.4f} after"),
    ]
