"""Parameters that are partitioned over processes by ZeRO-3 or FSDP2, and the number of processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def num_processes() -> int:
    """Number of processes of the distributed run; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Index of this process in the distributed run; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_zero3_parameter(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 partitions a parameter. Between the calls of its module it then has no elements."""
    return hasattr(parameter, "ds_id")


def is_sharded_by_fsdp(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, as FSDP2 makes of parameters."""
    return hasattr(tensor, "full_tensor")


def is_partitioned(tensor: Tensor) -> bool:
    """Whether this process has a part of the elements of a tensor only."""
    return is_zero3_parameter(tensor) or is_sharded_by_fsdp(tensor)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all of its elements, on the CPU. All processes must call this function for it."""
    if is_zero3_parameter(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone()
    if is_sharded_by_fsdp(tensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()


@contextmanager
def gathered_for_copy(module: nn.Module) -> Iterator[None]:
    """Within the block, the parameters of ``module`` that ZeRO-3 partitions are whole, so that it can be copied."""
    parameters = [parameter for parameter in module.parameters() if is_zero3_parameter(parameter)]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` of whole tensors on the CPU, also under ZeRO-3 and FSDP2. All processes must call it."""
    return {name: whole_tensor(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}


@contextmanager
def writing_once(module: nn.Module) -> Iterator[bool]:
    """Within the block, files with the whole tensors of ``module`` are written if the yielded value is True.

    If its parameters are partitioned, all processes enter the block to gather them. The first one writes, and the
    others wait for it. Whole parameters are written by every process that enters.
    """
    partitioned = any(is_partitioned(parameter) for parameter in module.parameters())
    yield not partitioned or process_index() == 0
    if partitioned and num_processes() > 1:
        dist.barrier()


def gather_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all processes, with gradients: those of the losses of all processes for the rows of this one.

    All processes must call this function, and the backward pass of all must reach its result.

    Args:
        x: ``[N, ...]``; N may differ between processes.

    Returns:
        ``[sum of N, ...]`` and the process that each row is from.
    """
    processes = num_processes()
    lengths = [torch.zeros((), dtype=torch.long, device=x.device) for _ in range(processes)]
    dist.all_gather(lengths, torch.tensor(len(x), device=x.device))
    sizes = torch.stack(lengths)
    padded = torch.cat([x, x.new_zeros(int(sizes.max()) - len(x), *x.shape[1:])])
    rows = _GatherWithGradient.apply(padded)
    is_row = torch.arange(len(padded), device=x.device) < sizes[:, None]
    return rows[is_row], torch.arange(processes, device=x.device).repeat_interleave(sizes)


class _GatherWithGradient(torch.autograd.Function):
    """``[N, ...]`` of every process to ``[processes, N, ...]``."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(num_processes())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[process_index()]
