"""The vector of a network: order, pads, views, tied weights, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from landscape_fast.nn.flat import FlatLayout


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, a norm, a scalar and a frozen tensor."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.out = nn.Linear(3, 5)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.norm(self.embed(tokens)) * self.scale + self.frozen)


@pytest.fixture
def tied():
    torch.manual_seed(0)
    return Tied().eval()


def test_parts_are_the_parameters_in_order(tied):
    layout = FlatLayout(tied)
    named = dict(tied.named_parameters())
    assert layout.names == tuple(named) and "out.weight" not in layout.names
    assert layout.counts == tuple(p.numel() for p in named.values())
    assert all(size % 8 == 0 and size - count < 8
               for size, count in zip(layout.sizes, layout.counts, strict=True))  # fmt: skip
    assert layout.P == sum(layout.sizes) and len(layout) == len(named)


def test_there_and_back(tied):
    layout = FlatLayout(tied)
    flat = layout.flatten(tied)
    views = layout.views(flat)
    for name, p in tied.named_parameters():
        assert torch.equal(views[name], p), name
        assert views[name].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert torch.equal(flat[layout.mask == 0], torch.zeros(layout.P - sum(layout.counts)))
    assert not flat.requires_grad
    tokens = torch.tensor([0, 4, 2, 2])
    assert torch.equal(functional_call(tied, views, (tokens,)), tied(tokens))


def test_every_kind_of_source_gives_the_same_vector(tied):
    layout = FlatLayout(tied)
    flat = layout.flatten(tied)
    strided = {k: v.T.contiguous().T if v.ndim == 2 else v for k, v in tied.state_dict().items()}
    plain = parameters_to_vector(tied.parameters()).detach()
    for source in (tied.state_dict(), strided, flat, plain, plain.double()):
        assert torch.equal(layout.flatten(source), flat)
    dirty = flat + (layout.mask == 0)  # pads stay zero whatever the source has there
    assert torch.equal(layout.flatten(dirty), flat)
    assert torch.equal(layout.flatten(flat.where(layout.mask != 0, torch.nan)), flat)
    assert torch.equal(layout.flatten_many([tied, flat, plain]), flat.expand(3, -1))
    assert layout.flatten(flat).data_ptr() != flat.data_ptr()


def test_views_of_many_points_are_views(tied):
    layout = FlatLayout(tied)
    points = torch.randn(2, 3, layout.P)
    for name, view in layout.views(points).items():
        assert view.shape == (2, 3, *tied.get_parameter(name).shape)
        view.zero_()
    assert torch.equal(points, points * (layout.mask == 0))


def test_a_group_is_a_module():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3, bias=False))
    layout = FlatLayout(model)
    assert layout.groups == (0, 0, 1, 1, 2)
    per_group = torch.arange(6.0).view(2, 3, 1)
    wide = layout.per_part(per_group)
    assert torch.equal(wide[:, :, 0], torch.tensor([[0.0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]))
    conv = layout.select(lambda name, shape: len(shape) > 1)
    assert conv.tolist() == [True, False, False, False, True]


def test_layouts_of_one_architecture_are_equal():
    a, b = FlatLayout(nn.Linear(3, 2)), FlatLayout(nn.Linear(3, 2))
    assert a == b and hash(a) == hash(b)
    assert a != FlatLayout(nn.Linear(2, 3)) and a != FlatLayout(nn.Linear(3, 2).double())


def test_refusals(tied):
    layout = FlatLayout(tied)
    with pytest.raises(TypeError, match="FlatLayout: model must be an nn.Module; got dict"):
        FlatLayout({})
    with pytest.raises(ValueError, match="model must be a network with parameters; got one with"):
        FlatLayout(nn.ReLU())
    with pytest.raises(ValueError, match="parameters must be of one of .*; got float32, float64"):
        FlatLayout(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
    with pytest.raises(ValueError, match="parameters must be on one device; got cpu, meta"):
        FlatLayout(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
    with pytest.raises(ValueError, match="parameter 'weight' must be initialised; got a lazy one"):
        FlatLayout(nn.LazyLinear(2))
    state = tied.state_dict()
    with pytest.raises(ValueError, match=r"source\['scale'\] must be a Tensor \[\]; got nothing"):
        layout.flatten({k: v for k, v in state.items() if k != "scale"})
    with pytest.raises(ValueError, match=r"source\['frozen'\] must be \[3\]; got \[2\]"):
        layout.flatten({**state, "frozen": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"source must be \[P\] with P = \d+, or \[\d+\] without"):
        layout.flatten(torch.zeros(3))
    with pytest.raises(ValueError, match="sources must be K of at least 1; got 0"):
        layout.flatten_many([])
    with pytest.raises(ValueError, match=r"w must be \[..., P\] with P"):
        layout.views(torch.zeros(3))
    with pytest.raises(ValueError, match=r"per_group must be \[M, G, ...\] with G = 4"):
        layout.per_part(torch.zeros(1, 2, 1))
