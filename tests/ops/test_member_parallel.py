"""Members sharded over processes with DTensor: the shared weight's gradient must be summed over
them."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map

from landscape_fast.ops import batch_ensemble_linear

M, B, I, O = 4, 3, 5, 2  # noqa: E741


def _inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((M, B, I), (O, I), (M, I), (M, O))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def _gradients(rank, store, out, declared):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    member, shared = [Shard(0)], [Replicate()]
    placements = (member, shared, member, member)
    tensors = [
        distribute_tensor(t, mesh, p).requires_grad_()
        for t, p in zip(_inputs(), placements, strict=True)
    ]
    # each process holds only its members' part of dL/dweight: that is Partial, and must be declared
    grads = {"in_grad_placements": (member, [Partial()], member, member)} if declared else {}
    layer = local_map(
        batch_ensemble_linear,
        out_placements=member,
        in_placements=placements,
        device_mesh=mesh,
        **grads,
    )
    layer(*tensors).to_local().square().sum().backward()
    found = [t.grad.full_tensor() for t in tensors]
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    os._exit(0)  # gloo's threads can crash an interpreter that shuts down


def _run(folder, declared):
    out = folder / f"grads-{declared}.pt"
    arguments = (str(folder / f"store-{declared}"), str(out), declared)
    torch.multiprocessing.spawn(_gradients, arguments, nprocs=2)
    return torch.load(out, weights_only=True)


def test_the_gradient_of_a_shared_weight_is_summed_over_members_elsewhere(tmp_path):
    leaves = [t.requires_grad_() for t in _inputs()]
    truth = torch.autograd.grad(batch_ensemble_linear(*leaves).square().sum(), leaves)
    for found, want in zip(_run(tmp_path, declared=True), truth, strict=True):
        torch.testing.assert_close(found, want)
    wrong = _run(tmp_path, declared=False)[1]
    assert not torch.allclose(wrong, truth[1]), "PyTorch now infers Partial: simplify the recipe"
