"""TabM against an MLP and a deep ensemble of MLPs on the tables that scikit-learn ships.

Every method trains as in the paper: AdamW with learning rate 2e-3, weight decay 3e-4 on all but
biases, gradients clipped at norm 1, early stopping on the validation rows with the weights of the
best epoch. TabM is trained on the mean loss of its members, and stopped by its mean prediction;
then 8 of its 32 members are picked on the validation rows. Each seed draws its own split, initial
values and batches, and all methods share the split.

Source: Gorishniy et al. 2024 (arXiv:2410.24210).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from landscape_fast.methods import select_members
from landscape_fast.methods.seeds import isolated_rng
from landscape_fast.metrics.diversity import diagnose
from landscape_fast.models import MLP, TabM
from landscape_fast.ops._checks import require
from landscape_fast.studies._folds import as_text, mean_se, with_errors
from landscape_fast.studies._tables import Table, load_table
from landscape_fast.studies.report import write_results


@dataclass(frozen=True)
class Settings:
    """One size of the study.

    Attributes:
        tables: of `landscape_fast.studies._tables.TABLES`.
        seeds: how many splits, each with its own training.
        archs: of "tabm", "tabm-mini" and "tabm-packed".
        k: members of a TabM; `kept`: how many of them are picked in the end.
        deep: MLPs in the deep ensemble; the row "mlp" is their mean.
        d_block: width of all networks; n_blocks: their hidden layers; dropout: after each.
        share_training_batches: whether the members of a TabM all see each batch, or each its own.
        batch_size: rows; `epochs`: at most; `patience`: epochs without improvement until the end.
        lr, weight_decay, clip: of AdamW, and the norm that gradients are clipped at.
    """

    tables: tuple[str, ...] = ("breast_cancer", "wine", "diabetes")
    seeds: int = 4
    archs: tuple[str, ...] = ("tabm",)
    k: int = 32
    kept: int = 8
    deep: int = 8
    d_block: int = 128
    n_blocks: int = 3
    dropout: float = 0.1
    share_training_batches: bool = True
    batch_size: int = 64
    epochs: int = 100
    patience: int = 16
    lr: float = 2e-3
    weight_decay: float = 3e-4
    clip: float = 1.0


SMALL = Settings()
SIZES = {
    "tiny": replace(SMALL, tables=("wine",), seeds=2, k=4, kept=2, deep=2, d_block=16, epochs=3),
    "small": SMALL,
    "full": Settings(
        tables=("breast_cancer", "wine", "diabetes", "digits"),
        seeds=15,
        archs=("tabm", "tabm-mini", "tabm-packed"),
        d_block=512,
    ),
}
COLUMNS = (
    ("table", "table", "{}"),
    ("method", "method", "{}"),
    ("members", "members", "{}"),
    ("score", "accuracy or RMSE", "{}"),
    ("member_score", "mean member", "{}"),
    ("nll", "NLL (nats)", "{}"),
    ("better", "better than mlp by", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("seconds", "seconds", "{:.1f}"),
)


def run(size: str = "small", out: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Trains and measures all methods on all tables.

    Args:
        size: "tiny", "small" (minutes on a CPU) or "full".
        out: folder for results.json and results.csv; None writes nothing.
        seed: the first of the seeds.

    Returns:
        A document: rows (means over the seeds, with standard errors), runs (one per seed), notes,
        settings. `describe` makes text of it.

    Raises:
        ValueError: for an unknown size.
        ImportError: without scikit-learn.
    """
    known = tuple(SIZES)
    require(size in known, "gorishniy2024.run", "size", f"one of {known}", repr(size))
    settings, runs, notes, rows = SIZES[size], [], [], []
    for name in settings.tables:
        found, lines = [], []
        for offset in range(settings.seeds):
            results, said = _one_seed(load_table(name, seed + offset), settings, seed + offset)
            found += results
            lines = lines or said  # of the first seed
        runs += found
        rows += _summary(found)
        notes += [f"{name}: {line}" for line in lines]
    notes += [
        f"mean over {settings.seeds} splits, each with its own training, and the standard error of "
        "that mean; the splits share rows, so it is a little too small",
        "better than mlp by: mean difference on the same splits; mlp is the mean member of deep",
        f"picked: {settings.kept} of {settings.k} members, by the validation rows that stopped "
        "the training",
        "NLL of a regression is not given; its score is the RMSE, lower is better",
    ]
    document = {
        "study": "gorishniy2024",
        "size": size,
        "seed": seed,
        "settings": asdict(settings),
        "rows": rows,
        "runs": runs,
        "notes": notes,
        "versions": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    if out is not None:
        write_results(Path(out), document)
    return document


def describe(document: dict[str, Any]) -> str:
    """The table and the notes as text."""
    return as_text(map(_shown, document["rows"]), COLUMNS, document["notes"])


def _one_seed(table: Table, settings: Settings, seed: int) -> tuple[list[dict], list[str]]:
    """All methods on one split: a row each, and what their diversity means."""
    started = time.perf_counter()
    networks = [
        _fit(lambda g: _Single(table, settings, g), table, settings, 1000 * seed + i)
        for i in range(settings.deep)
    ]
    seconds = time.perf_counter() - started
    deep = {part: torch.cat([_predict(n, table, part) for n in networks]) for part in _PARTS}
    count = sum(p.numel() for p in networks[0].parameters())
    rows, lines = [], []
    single = _measure(table, "mlp", deep["test"], None, count, seconds / settings.deep)
    single["score"], single["nll"] = single["member_score"], single["member_nll"]
    rows += [single | {"members": 1}]
    rows += [_measure(table, "deep", deep["test"], None, settings.deep * count, seconds)]
    lines += _diversity("deep", deep["test"], table)
    for arch in settings.archs:
        started = time.perf_counter()
        model = _fit(lambda g, a=arch: _tabm(table, settings, a, g), table, settings, 1000 * seed)
        seconds = time.perf_counter() - started
        outputs = {part: _predict(model, table, part) for part in _PARTS}
        count = sum(p.numel() for p in model.parameters())
        rows += [_measure(table, arch, outputs["test"], None, count, seconds)]
        objective = "nll" if table.classes else "mse"
        values = outputs["val"] if table.classes else outputs["val"][..., 0]
        picked = select_members(values, table.y["val"], settings.kept, objective, replacement=False)
        count = sum(p.numel() for p in model.prune(picked.members).parameters())
        rows += [_measure(table, f"{arch}, picked", outputs["test"], picked, count, seconds)]
        lines += _diversity(arch, outputs["test"], table)
    for row in rows:
        row |= {"seed": seed, "classes": table.classes}
    return rows, lines


_PARTS = ("val", "test")


class _Single(MLP):
    """The MLP of the same width, with a member dimension of one: [B, F] -> [B, 1, C]."""

    def __init__(self, table: Table, settings: Settings, generator: Generator):
        hidden = (settings.d_block,) * settings.n_blocks
        sizes = (table.columns, hidden, table.outputs, settings.dropout)
        super().__init__(*sizes, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unsqueeze(1)


def _tabm(table: Table, settings: Settings, arch: str, generator: Generator) -> TabM:
    return TabM(
        n_num_features=table.columns,
        d_out=table.outputs,
        n_blocks=settings.n_blocks,
        d_block=settings.d_block,
        dropout=settings.dropout,
        k=settings.k,
        arch_type=arch,
        generator=generator,
    )


def _fit(
    build: Callable[[Generator], nn.Module], table: Table, settings: Settings, seed: int
) -> nn.Module:
    """A trained network, with the weights of its best epoch, in evaluation mode."""
    generator = Generator().manual_seed(seed)
    with isolated_rng(seed, torch.device("cpu")):  # for dropout
        model = build(generator)
        decayed = [p for name, p in model.named_parameters() if not name.endswith("bias")]
        others = [p for name, p in model.named_parameters() if name.endswith("bias")]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        optimizer = torch.optim.AdamW(groups, **options)
        best, state, waited = math.inf, {}, 0
        for _ in range(settings.epochs):
            for rows in _batches(table, settings, getattr(model, "k", 1), generator):
                loss = _loss(model(table.x["train"][rows]), table.y["train"][rows], table)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
                optimizer.step()
            now = _validation_loss(model, table)
            waited += 1
            if now < best:
                best, waited = now, 0
                state = {name: value.clone() for name, value in model.state_dict().items()}
            if waited > settings.patience:
                break
        model.load_state_dict(state or model.state_dict())
    return model.eval()


def _batches(table: Table, settings: Settings, k: int, generator: Generator):
    """Row indices of one epoch, [B], or [B, k] where every member goes through its own order."""
    n, own = len(table.y["train"]), k > 1 and not settings.share_training_batches
    orders = [torch.randperm(n, generator=generator) for _ in range(k if own else 1)]
    order = torch.stack(orders, 1) if own else orders[0]
    return order.split(settings.batch_size)


def _loss(outputs: Tensor, targets: Tensor, table: Table) -> Tensor:
    """The mean loss of all members' predictions [B, k, C]; targets [B] or [B, k]."""
    k = outputs.shape[1]
    targets = targets if targets.ndim == 2 else targets.unsqueeze(1).expand(-1, k)
    if table.classes:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    return F.mse_loss(outputs.squeeze(-1), targets)


@torch.no_grad()
def _predict(model: nn.Module, table: Table, part: str) -> Tensor:
    """[members, N, C], in evaluation mode."""
    return model.eval()(table.x[part]).transpose(0, 1)


def _validation_loss(model: nn.Module, table: Table) -> float:
    score = _scores(_predict(model, table, "val"), table.y["val"], table)
    model.train()
    return score["nll"] if table.classes else score["score"]


def _scores(outputs: Tensor, targets: Tensor, table: Table, selection=None) -> dict[str, float]:
    """Accuracy and NLL of the mean probability, or the RMSE of the mean, of [members, N, C]."""
    if not table.classes:
        mean = outputs[..., 0].mean(0) if selection is None else selection.predict(outputs[..., 0])
        return {"score": table.scale * float((mean - targets).square().mean().sqrt()), "nll": None}
    mean = outputs.softmax(-1).mean(0) if selection is None else selection.predict(outputs)
    right = (mean.argmax(-1) == targets).double().mean()
    return {"score": float(right), "nll": float(F.nll_loss(mean.log(), targets))}


def _measure(table, method, outputs, selection, parameters, seconds) -> dict[str, Any]:
    targets = table.y["test"]
    every = [_scores(one.unsqueeze(0), targets, table) for one in outputs]
    mean = {key: None if every[0][key] is None else sum(e[key] for e in every) / len(every)
            for key in ("score", "nll")}  # fmt: skip
    return {
        "table": table.name,
        "method": method,
        "members": len(outputs) if selection is None else len(selection.members),
        **_scores(outputs, targets, table, selection),
        "member_score": mean["score"],
        "member_nll": mean["nll"],
        "parameters": parameters,
        "seconds": seconds,
    }


def _diversity(method: str, outputs: Tensor, table: Table) -> list[str]:
    if table.classes:
        return [f"{method}: {line}" for line in diagnose(outputs, table.y["test"]).lines]
    spread = table.scale * float(outputs[..., 0].std(0).mean())
    return [f"{method}: the members' predictions deviate by {spread:.2f} on average"]


def _summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method: mean over the seeds and its standard error, under key and key_se."""
    methods = list(dict.fromkeys(run["method"] for run in runs))
    of = {m: [run for run in runs if run["method"] == m] for m in methods}
    rows = []
    for method in methods:
        first, row = of[method][0], {}
        for key in ("table", "method", "members", "classes", "parameters"):
            row[key] = first[key]
        row["seconds"] = sum(run["seconds"] for run in of[method])
        for key in ("score", "member_score", "nll"):
            row[key], row[f"{key}_se"] = mean_se([run[key] for run in of[method]])
        sign = 1 if first["classes"] else -1
        pairs = zip(of[method], of["mlp"], strict=True)
        row["better"], row["better_se"] = mean_se(
            [sign * (a["score"] - b["score"]) for a, b in pairs]
        )
        rows.append(row)
    return rows


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    form = "{:.2%}" if row["classes"] else "{:.2f}"
    forms = {"score": form, "member_score": form, "nll": "{:.4f}"}
    return with_errors(row, {**forms, "better": form.replace(":", ":+")})
