"""
What becomes of each option of `trl.DPOConfig`: a table from the configurations themselves.

    python .ci/docs/migration.py    # writes trl_ext/preference/migration.md; a test says when that is due
"""

import dataclasses
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "trl_ext" / "preference" / "migration.md"

METHODS = {
    "f-DPO": "FDPOConfig",
    "TDPO": "TDPOConfig",
    "Mallows-DPO": "MallowsDPOConfig",
    "RainbowPO": "RainbowPOConfig",
    "SimPER": "SimPERConfig",
    "D2PO": "D2POConfig",
}
# Option of TRL -> the name that a method has for it. TRL's name is understood too.
RENAMED: dict[str, dict[str, str]] = {
    "f_divergence_type": {"f-DPO": "divergence"},
    "f_alpha_divergence_coef": {"f-DPO": "alpha"},
    "padding_free": dict.fromkeys(METHODS, "share_prompts"),
}
NOTES = """`f_divergence_type` and `f_alpha_divergence_coef` are understood by f-DPO. Its own names are
`divergence` and `alpha`, which is the paper's: 1 minus TRL's coefficient.

`padding_free=True`, which TRL 1.16 ignores with a warning, means `share_prompts=True`: no padding, and
each pair's prompt once. Left alone it is so wherever it is exact; `True` refuses to train elsewhere."""


def default(option: dataclasses.Field):
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return None if option.default is dataclasses.MISSING else option.default


def options_of(config) -> dict[str, dataclasses.Field]:
    return {option.name: option for option in dataclasses.fields(config)}


def outcome(option: str, method: str) -> str:
    """ "same", "default ...", "renamed `...`" or "refused"."""
    import trl

    import trl_ext

    config = getattr(trl_ext, METHODS[method])
    if option in config.refused_options():
        return "refused"
    if method in RENAMED.get(option, {}):
        return f"also `{RENAMED[option][method]}`"
    was, now = default(options_of(trl.DPOConfig)[option]), default(options_of(config)[option])
    return "same" if was == now else f"default `{now!r}`"


def page() -> str:
    import transformers
    import trl

    import trl_ext

    dpo, training = options_of(trl.DPOConfig), options_of(transformers.TrainingArguments)
    shown, quiet = [], []
    for option in dpo:
        outcomes = [outcome(option, method) for method in METHODS]
        (quiet if option in training and set(outcomes) == {"same"} else shown).append((option, outcomes))
    lines = [f"| option of `DPOConfig` | its default | {' | '.join(METHODS)} |", "|---|---|" + "---|" * len(METHODS)]
    for option, outcomes in sorted(shown, key=lambda item: item[0] in training):
        lines.append(f"| `{option}` | `{default(dpo[option])!r}` | {' | '.join(outcomes)} |")
    reasons: dict[tuple[str, str], list[str]] = {}
    for method, name in METHODS.items():
        for option, reason in getattr(trl_ext, name).refused_options().items():
            if option in dpo:
                reasons.setdefault((option, reason), []).append(method)
    why = []
    for (option, reason), methods in reasons.items():
        which = "every method" if len(methods) == len(METHODS) else ", ".join(methods)
        if len(methods) == len(METHODS) - 1:
            which = "every method but " + next(method for method in METHODS if method not in methods)
        why.append(f"- `{option}`, by {which}: {reason}.")
    table, list_of_reasons = "\n".join(lines), "\n".join(why)
    return f"""# From `trl.DPOConfig`

`.ci/docs/migration.py` writes this page from the configurations themselves, with TRL
{trl.__version__.rpartition(".")[0]}; a test fails when the page is out of date.

"same" is an option that works as in `trl.DPOTrainer`, with the same default. "refused" is one whose value must stay at
its default; anything else is an error in the constructor.

{table}

The other {len(quiet)} options, all of `transformers.TrainingArguments`, are the same for every method.

{NOTES}

## Why options are refused

{list_of_reasons}

Diffusion-DPO and DSPO train pairs of images and start from `transformers.TrainingArguments`.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)} is written.")
