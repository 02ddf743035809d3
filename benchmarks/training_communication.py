"""Bytes that a rank sends in a training step: the formula of ``idavlm.training.memory`` against two processes.

    python -m benchmarks.training_communication

Two processes train a small Llama with DDP and with FSDP2 (gloo, CPU). Counted are the tensors of the collectives: those
that DDP reduces, and those that FSDP2 gathers and reduce-scatters. A ring of N processes sends (N - 1) / N of a tensor
that is gathered or reduce-scattered, and twice that of one that is reduced.
"""

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from idavlm.training.memory import Strategy, step_communication
from idavlm.utils import describe_machine, markdown_table

RANKS = 2
# FSDP2 of torch 2.13 calls the first two, before it called the others.
FSDP_COLLECTIVES = ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    print(f"{describe_machine()}, torch {torch.__version__}\n")
    print(markdown_table(["", "formula, bytes", "counted", "ratio"], measure(args.hidden_size, args.layers)))


def measure(hidden_size: int, layers: int) -> list[list[object]]:
    """Formula, counted bytes and ratio of each set-up."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_worker, args=(folder, hidden_size, layers), nprocs=RANKS)
        counted = torch.load(os.path.join(folder, "counted.pt"))
    num_parameters = counted.pop("parameters")
    rows = []
    for name, stage in (("DDP", 0), ("FSDP2", 3)):
        formula = step_communication(num_parameters, 0, 1, Strategy(num_ranks=RANKS, stage=stage))
        rows.append([name, int(formula), int(counted[name]), round(formula / counted[name], 3)])
    return rows


def _worker(rank: int, folder: str, hidden_size: int, layers: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    share = (RANKS - 1) / RANKS
    counted: dict[str, float] = {}

    model = _model(hidden_size, layers)
    counted["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    sent = 0.0

    def reduce(_, bucket):
        nonlocal sent
        sent += 2 * share * bucket.buffer().nbytes
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0] / RANKS)

    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, reduce)
    _step(parallel)
    counted["DDP"] = sent

    model, sent = _model(hidden_size, layers), 0.0
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in FSDP_COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, _Counting(getattr(dist, name), counted))
    counted["FSDP2"] = 0.0
    _step(model)
    if rank == 0:
        torch.save(counted, os.path.join(folder, "counted.pt"))
    dist.destroy_process_group()


class _Counting:
    """A collective that adds to ``counted`` what a ring sends of its largest tensor, the whole one."""

    def __init__(self, collective, counted: dict[str, float]):
        self.collective = collective
        self.counted = counted

    def __call__(self, *args, **kwargs):
        sizes = [value.nbytes for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        self.counted["FSDP2"] += (RANKS - 1) / RANKS * max(sizes)
        return self.collective(*args, **kwargs)


def _model(hidden_size: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 256}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=3 * hidden_size))


def _step(model: torch.nn.Module) -> None:
    ids = torch.randint(0, 256, (2, 16))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


if __name__ == "__main__":
    main()
