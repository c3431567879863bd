"""Attention of M members against nn.MultiheadAttention, one member at a time."""

import pytest
import torch
from torch import nn

from landscape_fast.nn import BatchEnsembleMultiheadAttention
from landscape_fast.testing import assert_as_exact, check_layer

M, B, L, S, E, H = 3, 2, 5, 6, 8, 2
SIZES = [{}, {"kdim": 6, "vdim": 4}, {"bias": False}]
LAYOUTS = ["folded", "member_major"]


def source(**options):
    """A plain layer in float64 whose biases are not zero."""
    plain = nn.MultiheadAttention(E, H, **options).double()
    for p in plain.parameters():
        if p.ndim == 1:
            nn.init.normal_(p)
    return plain


def inputs(plain):
    """Query, key, value with a row per member, [M, B, L, E]."""
    sizes = ((L, E), (S, plain.kdim), (S, plain.vdim))
    return [torch.randn(M, B, *size, dtype=torch.float64) for size in sizes]


def placed(t, attention):
    """[M, B, L, E] as the layer wants it; its inverse on results is `back`."""
    t = t if attention.batch_first else t.transpose(1, 2)
    if attention.layout == "member_major":
        return t
    return (
        t.flatten(0, 1)
        if attention.batch_first
        else t.transpose(1, 2).flatten(0, 1).transpose(0, 1)
    )


def back(y, attention):
    if attention.layout == "member_major":
        return y if attention.batch_first else y.transpose(1, 2)
    y = y if attention.batch_first else y.transpose(0, 1)
    return y.unflatten(0, (M, B))


def one_by_one(attention, tensors, **options):
    """Output [M, B, L, E] and weights [M, B, ...] of the members, each a plain layer."""
    found = []
    for m in range(M):
        rows = [t[m] if attention.batch_first else t[m].transpose(0, 1) for t in tensors]
        own = {key: v[m] if isinstance(v, list) else v for key, v in options.items()}
        y, weights = attention.member(m)(*rows, **own)
        found.append((y if attention.batch_first else y.transpose(0, 1), weights))
    outputs, weights = zip(*found, strict=True)
    return torch.stack(outputs), None if weights[0] is None else torch.stack(weights)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, "shared"])
def test_is_one_plain_attention_per_member(sizes, batch_first, layout, bias):
    plain = source(batch_first=batch_first, **sizes)
    attention = BatchEnsembleMultiheadAttention.from_attention(
        plain, M, bias=bias, layout=layout, r_init="normal", s_init="normal"
    )
    tensors = inputs(plain)
    given = [placed(t, attention) for t in tensors]
    want, weights = one_by_one(attention, tensors)
    y, got = attention(*given)
    torch.testing.assert_close(back(y, attention), want)
    torch.testing.assert_close(got.reshape(weights.shape), weights)
    y, none = attention(*given, need_weights=False)
    torch.testing.assert_close(back(y, attention), want)
    assert none is None
    _, weights = one_by_one(attention, tensors, average_attn_weights=False)
    _, got = attention(*given, average_attn_weights=False)
    torch.testing.assert_close(got.reshape(weights.shape), weights)


def test_the_formula_itself():
    """The weight of each projection merged by hand: W * s r^T, in the plain function."""
    plain = source(batch_first=True)
    attention = BatchEnsembleMultiheadAttention.from_attention(
        plain, M, r_init="normal", s_init="normal"
    )
    q, k, v = inputs(plain)
    y = attention(*[t.flatten(0, 1) for t in (q, k, v)], need_weights=False)[0].unflatten(0, (M, B))
    for m in range(M):

        def weight(layer, m=m):
            return layer.weight * torch.outer(layer.s[m], layer.r[m])

        heads = []
        for name, t in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            layer = getattr(attention, name)
            heads.append((t[m] @ weight(layer).T + layer.bias[m]).unflatten(-1, (H, E // H)))
        scores = torch.einsum("blhd,bshd->bhls", heads[0], heads[1]) / (E // H) ** 0.5
        mixed = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), heads[2]).flatten(-2)
        want = mixed @ weight(attention.out_proj).T + attention.out_proj.bias[m]
        torch.testing.assert_close(y[m], want)


def masks():
    """(as nn.MultiheadAttention takes it for one member, as ours takes it)."""
    generator = torch.Generator().manual_seed(0)
    padding = torch.rand(M, B, S, generator=generator) < 0.4
    padding[..., 0] = False
    floats = torch.randn(M, B * H, L, S, generator=generator, dtype=torch.float64)
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    yield {"key_padding_mask": list(padding)}, {"key_padding_mask": padding.flatten(0, 1)}
    yield {"key_padding_mask": padding[0]}, {"key_padding_mask": padding[0]}
    yield {"attn_mask": causal}, {"attn_mask": causal}
    yield {"attn_mask": causal, "is_causal": True}, {"attn_mask": causal, "is_causal": True}
    yield {"attn_mask": list(floats)}, {"attn_mask": floats.flatten(0, 1)}
    yield {"attn_mask": floats[0]}, {"attn_mask": floats[0]}
    minus = torch.zeros_like(padding, dtype=torch.float64).masked_fill_(padding, -torch.inf)
    both = {"attn_mask": floats.flatten(0, 1), "key_padding_mask": minus.flatten(0, 1)}
    yield {"attn_mask": list(floats), "key_padding_mask": list(minus)}, both


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", range(7))
def test_masks(case, need_weights):
    plain_mask, ours = list(masks())[case]
    plain = source(batch_first=True)
    for layout in LAYOUTS:
        attention = BatchEnsembleMultiheadAttention.from_attention(
            plain, M, layout=layout, r_init="normal"
        )
        tensors = inputs(plain)
        want, _ = one_by_one(attention, tensors, need_weights=need_weights, **plain_mask)
        y, _ = attention(
            *[placed(t, attention) for t in tensors], need_weights=need_weights, **ours
        )
        torch.testing.assert_close(back(y, attention), want)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_acts_on_the_attention_weights(need_weights):
    """Uniform attention over ones: an output is (kept keys) / (S (1 - p)), with mean one."""
    attention = BatchEnsembleMultiheadAttention(E, H, M, dropout=0.5, batch_first=True)
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(attention, name).weight.zero_()
        for name in ("v_proj", "out_proj"):
            getattr(attention, name).weight.copy_(torch.eye(E))
    x = torch.ones(M * 50, S, E)
    y, _ = attention(x, x, x, need_weights=need_weights)
    steps = y * S / 2
    torch.testing.assert_close(steps, steps.round())
    assert 0 < y.std() and abs(y.mean() - 1) < 5 / (S * M * 50 * H * S) ** 0.5
    y, _ = attention.eval()(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(y, x)


def test_the_start_is_the_plain_one():
    """The same seed gives the bits of nn.MultiheadAttention, and factors draw after the weights."""
    for sizes in ({}, {"kdim": 6, "vdim": 4}):
        torch.manual_seed(3)
        plain = nn.MultiheadAttention(E, H, **sizes)
        torch.manual_seed(3)
        attention = BatchEnsembleMultiheadAttention(E, H, M, **sizes)
        other = BatchEnsembleMultiheadAttention(E, H, M, **sizes)
        missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected and all(key[-2:] in (".r", ".s") for key in missing)
        for key, value in other.state_dict().items():
            assert torch.equal(attention.state_dict()[key], value), key
    drawn = [
        BatchEnsembleMultiheadAttention(
            E, H, M, r_init="normal", generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    one, two, three = (attention.state_dict() for attention in drawn)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["k_proj.r"], three["k_proj.r"])
    drawn[1].reset_parameters(torch.Generator().manual_seed(0))
    assert all(torch.equal(one[key], value) for key, value in drawn[1].state_dict().items())


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_from_attention_keeps_what_it_is(sizes, tie):
    plain = source(batch_first=True, dropout=0.3, **sizes).eval()
    plain.out_proj.weight.requires_grad_(False)
    attention = BatchEnsembleMultiheadAttention.from_attention(plain, M, tie=tie, rank=2)
    assert not attention.training and attention.dropout == 0.3
    assert not attention.out_proj.weight.requires_grad and attention.q_proj.weight.requires_grad
    assert (attention.out_proj.weight is plain.out_proj.weight) == tie
    if "kdim" in sizes:
        assert (attention.k_proj.weight is plain.k_proj_weight) == tie
    assert attention.v_proj.r.shape[0] == 2
    assert {p.dtype for p in attention.parameters()} == {torch.float64}
    q, k, v = (t[0] for t in inputs(plain))
    want = plain(q, k, v)[0]
    y = attention(*[t.repeat(M, 1, 1) for t in (q, k, v)])[0]
    torch.testing.assert_close(y.unflatten(0, (M, B)), want.expand(M, *want.shape))
    member = attention.member(1)
    assert type(member) is nn.MultiheadAttention and not member.training
    assert member.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        for p in member.parameters():
            p.zero_()
    assert torch.equal(attention(*[t.repeat(M, 1, 1) for t in (q, k, v)])[0], y)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_member_draws_nothing_and_what_is_frozen_stays_so(sizes):
    attention = BatchEnsembleMultiheadAttention(E, H, M, **sizes)
    before = torch.get_rng_state()
    assert all(p.requires_grad and p.is_leaf for p in attention.member(1).parameters())
    frozen = attention.requires_grad_(False).member(1)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert torch.equal(before, torch.get_rng_state())


class Alone(nn.Module):
    """Self-attention with one input and one output."""

    def __init__(self, **options):
        super().__init__()
        made = {"r_init": "normal", "s_init": "normal", "batch_first": True, **options}
        self.attention = BatchEnsembleMultiheadAttention(E, H, M, **made)
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, x):
        x = x / x.norm()  # scores of a size where rounding does not swap the largest
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    "layout, shape", [("folded", (M * B, L, E)), ("member_major", (M, B, L, E))]
)
def test_contract(layout, shape, device):
    # a bias of the keys moves all scores of a query alike: softmax has no gradient for it
    model = Alone(layout=layout, bias=False).to(device)
    check_layer(model, torch.randn(shape, device=device))


def test_low_precision():
    model = Alone(dtype=torch.bfloat16)
    x = torch.randn(M * B, L, E).bfloat16()
    exact = Alone(dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    x64 = x.double() / x.norm().double()
    rows = (x / x.norm()).unflatten(0, (M, B))
    plain = torch.cat([model.attention.member(m)(*[rows[m]] * 3)[0] for m in range(M)])
    truth = torch.cat(
        [exact.attention.member(m)(*[x64.unflatten(0, (M, B))[m]] * 3)[0] for m in range(M)]
    )
    assert_as_exact("attention in bfloat16", model(x), plain, truth)


X = torch.zeros(M * B, L, E)
ERRORS = [
    ({"embed_dim": 0}, "embed_dim must be an integer of at least 1; got 0"),
    ({"num_heads": 3}, "num_heads must be a divisor of embed_dim = 8; got 3"),
    ({"dropout": 1.0}, r"dropout must be a probability in \[0, 1\); got 1.0"),
    ({"layout": "batch_major"}, "layout must be 'member_major' or 'folded'; got 'batch_major'"),
    ({"members": 0}, "members must be an integer of at least 1; got 0"),
]
CALLS = [
    ((X[:4], X[:4], X[:4]), {}, r"query must be \[M\*B, L, 8\] with M = 3; got \[4, 5, 8\]"),
    ((X, X[..., :7], X), {}, r"key must be \[M\*B, L, 8\] with M = 3; got \[6, 5, 7\]"),
    ((X, X[:3], X), {}, "query, key and value must be of one batch, and one number of keys; got"),
    ((X, X, X), {"is_causal": True}, "attn_mask must be given with is_causal=True; got None"),
    ((X, X, X), {"attn_mask": X[0]}, r"attn_mask must be \[5, 5\] or \[rows \* 2, 5, 5\] with"),
    ((X, X, X), {"key_padding_mask": X[0]}, r"key_padding_mask must be \[rows, 5\] with rows = 6"),
]


@pytest.mark.parametrize("options, text", ERRORS)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        BatchEnsembleMultiheadAttention(**{"embed_dim": E, "num_heads": H, "members": M, **options})


@pytest.mark.parametrize("tensors, options, text", CALLS)
def test_bad_calls(tensors, options, text):
    attention = BatchEnsembleMultiheadAttention(E, H, M, batch_first=True)
    with pytest.raises(ValueError, match=f"BatchEnsembleMultiheadAttention: {text}"):
        attention(*tensors, **options)


def test_bad_sources():
    convert = BatchEnsembleMultiheadAttention.from_attention
    with pytest.raises(TypeError, match="layer must be an nn.MultiheadAttention; got Linear"):
        convert(nn.Linear(2, 2), M)
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="layer must be without add_bias_kv and add_zero_attn"):
            convert(nn.MultiheadAttention(E, H, **options), M)
    with pytest.raises(ValueError, match="bias must be True or 'shared'; got False"):
        convert(nn.MultiheadAttention(E, H), M, bias=False)
    with pytest.raises(ValueError, match="member: i must be an integer from 0 to 2; got 3"):
        BatchEnsembleMultiheadAttention(E, H, M).member(3)
