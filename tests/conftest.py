import gc
import os
import shutil
import signal
import sys
import tempfile
import threading

import pytest


# Tests never reach the network: models, tokenizers and datasets are built on the spot.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
# Tiny models run faster on one thread, and a fixed number of threads fixes the order of floating-point sums.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run tests marked slow (minutes each)")
    parser.addoption("--other-trl", action="store_true", help="run with a TRL outside the supported range")
    parser.addoption("--regen-golden", action="store_true", help="rewrite tests/golden/*.json instead of comparing")


def pytest_configure(config):
    # Every worker has files of its own: what `datasets` keeps is neither shared with other workers nor left behind.
    folder = os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="trl-ext-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))

    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    if config.getoption("--other-trl"):  # whose version would be refused at import
        import trl

        trl.__version__ = "1.16.0"


def pytest_collection_modifyitems(config, items):
    import torch

    for item in items:
        # Workers must find the same tests, and an address is another one in each.
        assert " at 0x" not in item.nodeid, f"{item.nodeid}: leave `ids` out, so that pytest names the case"
        if "slow" in item.keywords and not config.getoption("--runslow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --runslow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session):
    # Every training collects garbage at its start. What has been imported by now, millions of objects, is never
    # garbage, and looking through it again would take two fifths of the suite's time.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def reference_cache_dir(tmp_path_factory, monkeypatch):
    """No test finds what another, or an earlier run, left in the cache of the reference's statistics."""
    module = sys.modules.get("trl_ext.preference.reference_cache")
    if module is None:
        yield None
        return
    folders = []

    def folder():
        if not folders:
            folders.append(tmp_path_factory.mktemp("reference-cache"))
        return folders[0]

    monkeypatch.setattr(module, "default_cache_dir", folder)
    yield folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A tiny Qwen2 and its tokenizer on disk: the string a user passes as the model."""
    import tiny

    return tiny.save(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def ctrl_c():
    """Interrupts the main thread, as the terminal does."""
    pytest.importorskip("fcntl")  # no signals to threads elsewhere
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the suite's own processes ignore it
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    signal.signal(signal.SIGINT, before)
