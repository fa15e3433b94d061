"""Loading into parameters that are DTensors, as FSDP2 makes them: into their own placements, from whole tensors.

torch deals out a full state dict by the names of parameters. Those of a split layer are not in it, so what it leaves
undone for them is done here: a whole tensor that each process has, or only the first one, becomes each one's shard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def dealt(part: Any, whole: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The whole tensor in every process of the mesh of `part`, where its first one has it; else None.

    Collective: every process of the mesh has to come here, and does, since each one loads the same layers.
    """
    import torch.distributed as dist

    mesh = part.device_mesh
    here = torch.device(mesh.device_type)  # with nccl that is the GPU, wherever the parameters lie
    found = torch.tensor(whole is not None, dtype=torch.uint8, device=here)
    for axis in range(mesh.ndim):  # after the last one all have what the corner of the mesh has
        dist.broadcast(found, src=dist.get_global_rank(mesh.get_group(axis), 0), group=mesh.get_group(axis))
    if not found:
        return None
    full = torch.empty(shape, dtype=part.dtype, device=here) if whole is None else whole.to(here, part.dtype)
    full = full.contiguous()
    for axis in range(mesh.ndim):
        dist.broadcast(full, src=dist.get_global_rank(mesh.get_group(axis), 0), group=mesh.get_group(axis))
    return full


def placed_like(part: Any, piece: Tensor) -> Tensor:
    """`piece`, a DTensor or the same whole tensor in each process, with the placements of `part`."""
    from torch.distributed.tensor import distribute_tensor

    if is_sharded(piece):
        placed: Tensor = piece.redistribute(part.device_mesh, part.placements)  # type: ignore[attr-defined]
        return placed
    return distribute_tensor(piece, part.device_mesh, part.placements, src_data_rank=None)
