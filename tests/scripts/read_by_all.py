"""
Whether every process has a pipeline's text encoders, where the main process is to read weights for all.

    read_by_all.py <folder of a tiny Stable Diffusion>

Run in two processes. Transformers 5.17 leaves the encoders of the second one empty unless each reads for itself;
5.23 does not.
"""

import os
import sys
from pathlib import Path


TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "diffusion")]

import conftest  # noqa: E402, F401 - sets the environment
import tiny_pipelines  # noqa: E402
import torch  # noqa: E402

from trl_ext.diffusion.loading import load_pipeline  # noqa: E402
from trl_ext.training.sharding import loaded_by_every_process  # noqa: E402


def main(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    # As the launcher sets them for `fsdp_cpu_ram_efficient_loading: true`.
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    with loaded_by_every_process():
        encoder = load_pipeline(folder, dtype=torch.float32, init_kwargs={}).pipeline.text_encoder
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    expected = tiny_pipelines.pipeline("sd").text_encoder.state_dict()
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
    print("read by all", flush=True)
    os._exit(0)  # as `sharded_heads.py` ends
