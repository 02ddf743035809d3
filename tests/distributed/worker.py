"""One process of a distributed run: ``python -m tests.distributed.worker FOLDER STRATEGY:MODEL:KIND ...``.

The environment variables RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun does; without
them it is a run of one process. All cases share one process group, since a start takes longer than a case. Every
process writes the result of every case to ``FOLDER/STRATEGY-MODEL-KIND-RANK.pt``. A case that takes longer than
:data:`TIME_LIMIT` ends the process with the traceback of where it hangs.
"""

import faulthandler
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import runs

TIME_LIMIT = float(os.environ.get("IDAVLM_TIME_LIMIT", 60))


def result_file(folder: Path, case: tuple[str, str, str], rank: int) -> Path:
    return folder / f"{'-'.join(case)}-{rank}.pt".replace(" ", "_")


def without_compiling() -> None:
    """Keep DeepSpeed from compiling its reduction in shared memory, which takes minutes and is used for inference."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    if any(text.startswith("ZeRO") for text in sys.argv[2:]):
        without_compiling()
    rank, images = int(os.environ.get("RANK", 0)), folder / "images"
    for text in sys.argv[2:]:
        case = tuple(text.split(":"))
        faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
        start, part = time.time(), folder / "runs" / text
        try:
            found = runs.run(part, *case, images)
        except BaseException as error:  # the other process may wait for this one
            found = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        faulthandler.cancel_dump_traceback_later()
        found["seconds"] = time.time() - start
        torch.save(found, result_file(folder, case, rank))
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        if "error" in found:
            print(f"rank {rank}: {text} failed: {found['error']}", flush=True)
            os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
