"""The layers under what people train with: compile, AMP, checkpointing, torch.func, export, DDP,
FSDP2. Graph capture is in tests/gpu."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from landscape_fast.nn import BatchEnsembleConv2d, BatchEnsembleLinear, convert_

M, B = 3, 4
RANDOM = {"members": M, "r_init": "normal", "s_init": "normal"}


def linears():
    layers = [BatchEnsembleLinear(6, 8, activation="relu", **RANDOM)]
    layers += [BatchEnsembleLinear(8, 8, rank=2, **RANDOM), nn.ReLU()]
    return nn.Sequential(*layers, BatchEnsembleLinear(8, 3, **RANDOM))


def convolutions():
    layers = [BatchEnsembleConv2d(2, 4, 3, padding=1, activation="relu", **RANDOM)]
    layers += [BatchEnsembleConv2d(4, 4, 3, stride=2, groups=2, **RANDOM), nn.Flatten(-3)]
    return nn.Sequential(*layers, BatchEnsembleLinear(16, 3, **RANDOM))


def transformer():
    """An encoder layer with attention and norms of every member."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    factors = {"r_init": "normal", "s_init": "normal"}
    layer = convert_(layer, M, layout="member_major", norm="per_member", **factors)
    return nn.Sequential(layer, BatchEnsembleLinear(8, 3, **RANDOM))


NETS = {
    "linear": (linears, (6,)),
    "conv": (convolutions, (2, 6, 6)),
    "transformer": (transformer, (5, 8)),
}


@pytest.fixture(params=NETS)
def net_and_x(request):
    make, shape = NETS[request.param]
    torch.manual_seed(0)
    return make(), torch.randn(M, 2 * B, *shape)


def step(model, x):
    """[output, gradients of the input and of all parameters...], of a mean over rows."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.square().mean().backward()
    return [y.detach(), leaf.grad, *[p.grad.clone() for p in model.parameters()]]


def close(got, want, **options):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **options)


@pytest.fixture
def no_graphs():
    """What earlier tests compiled does not count against the limit of recompilations."""
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_compile(name, no_graphs):
    """One graph, forward and backward, in training and in evaluation."""
    make, shape = NETS[name]
    net, x = make(), torch.randn(M, 2 * B, *shape)
    compiled = torch.compile(net, fullgraph=True)
    close(step(compiled, x), step(net, x))
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), net(x))


def test_compile_takes_other_batch_sizes(net_and_x, no_graphs):
    """Two sizes, one graph, without Inductor."""
    net, x = net_and_x
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 8):
        close(step(compiled, x[:, :size]), step(net, x[:, :size]))


def test_amp_with_a_gradient_scaler(net_and_x):
    """A power of two for a scale changes no bit, infinities skip the step, and the loss falls."""
    net, x = net_and_x
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def loss(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net(x)
        assert y.dtype == torch.bfloat16
        return y.float().square().mean()

    loss(x).backward()
    plain = [p.grad.clone() for p in net.parameters()]
    assert all(g.dtype == torch.float32 for g in plain)
    optimizer.zero_grad()
    scaler.scale(loss(x)).backward()
    scaler.unscale_(optimizer)
    for p, g in zip(net.parameters(), plain, strict=True):
        assert torch.equal(p.grad, g)
    optimizer.zero_grad()
    scaler.update()

    before, start = copy.deepcopy(net.state_dict()), loss(x).item()
    scaler.scale(loss(x) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    for _ in range(10):
        optimizer.zero_grad()
        scaler.scale(loss(x)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert loss(x).item() < start


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(net_and_x, use_reentrant):
    net, x = net_and_x
    want = step(net, x)

    class Checkpointed(nn.Module):
        def __init__(self, run):
            super().__init__()
            self.net, self.run = net, run

        def forward(self, x):
            return self.run(x)

    ways = [
        lambda x: checkpoint(net, x, use_reentrant=use_reentrant),
        lambda x: checkpoint_sequential(net, 2, x, use_reentrant=use_reentrant),
    ]
    for way in ways:
        for a, b in zip(step(Checkpointed(way), x), want, strict=True):
            assert torch.equal(a, b)


def test_functional_call_with_grad_and_a_jacobian(net_and_x):
    net, x = net_and_x
    values = dict(net.named_parameters())

    def loss(values, x):
        return torch.func.functional_call(net, values, (x,)).square().mean()

    found, dx = torch.func.grad(loss, argnums=(0, 1))(values, x)
    close([dx, *[found[key] for key in values]], step(net, x)[1:])
    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(values, x.unsqueeze(2))
    mean = {key: value.mean(0) for key, value in per_row.items()}
    close([mean[key] for key in values], [found[key] for key in values])


def test_vmap_over_parameters(net_and_x):
    """An ensemble of ensembles: parameters of two networks, stacked. In float64, since torch's own
    attention takes another kernel there."""
    net, x = (t.double() for t in net_and_x)
    other = copy.deepcopy(net)
    for p in other.parameters():
        nn.init.normal_(p)
    parameters, buffers = torch.func.stack_module_state([net, other])

    def call(parameters, buffers):
        return torch.func.functional_call(net, (parameters, buffers), (x,))

    close(torch.func.vmap(call)(parameters, buffers), [net(x), other(x)])


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_export_with_a_free_batch_size(name):
    make, shape = NETS[name]
    net, x = make().eval(), torch.randn(M, 2 * B, *shape)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({1: batch},))
    for size in (2, 5, 8):
        torch.testing.assert_close(program.module()(x[:, :size]), net(x[:, :size]))


def test_export_of_a_transformer():
    make, shape = NETS["transformer"]
    net, x = make().eval(), torch.randn(M, B, *shape)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


def _gradients(rank, store, out):
    """Gradients of every parameter from two processes, each with half of the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, (make, shape) in NETS.items():
        torch.manual_seed(0)
        net = make()
        x = torch.randn(M, 2 * B, *shape)[:, rank * B : (rank + 1) * B]
        for way in ("ddp", "fsdp"):
            if way == "ddp":
                model = DistributedDataParallel(copy.deepcopy(net))
            else:
                model = copy.deepcopy(net)
                for layer in model:
                    if list(layer.parameters()):
                        fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
            model(x).square().mean().backward()
            grads = [p.grad for p in model.parameters()]
            found[name, way] = [g.full_tensor() if way == "fsdp" else g for g in grads]
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    os._exit(0)  # gloo's threads can crash an interpreter that shuts down


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    out = folder / "gradients.pt"
    torch.multiprocessing.spawn(_gradients, (str(folder / "store"), str(out)), nprocs=2)
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", NETS)
def test_two_processes_find_the_gradients_of_one(distributed, name, way):
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = make()
    x = torch.randn(M, 2 * B, *shape)
    close(distributed[name, way], step(net, x)[2:])
