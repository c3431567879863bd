"""Where the parts of a network lie: a table on the device, for one launch over many tensors.

A part is a stretch of memory that shares its coefficients: one parameter tensor, or a layer of a
flat vector. Offsets count elements from a base pointer, so that parts may lie in allocations of
their own. Parts are cut into tiles that never cross from one to the next. Where all numbers of a
part are multiples of 16 bytes its tiles are wide, with accesses of that size, and elsewhere narrow.
"""

import functools
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

KEPT = 256  # tables; each is some kilobytes
NARROW = tl.constexpr(2)  # how many times smaller narrow tiles are, for their many addresses


class Row(NamedTuple):
    """A part of P >= 1 elements: where its three tensors lie, and its place in the coefficients."""

    P: int
    anchors: int
    anchors_stride_k: int
    weights: int
    weights_stride_m: int
    danchors: int  # -1 where no gradient is wanted
    danchors_stride_k: int
    part: int
    unit: int = 1  # power of two, up to 16 bytes of elements, that divides all of the above


NO_ROW = Row(*[0] * len(Row._fields))
COLUMNS = tl.constexpr(len(Row._fields))


class Table(NamedTuple):
    """The first tile of each row, the number of tiles, the rows; and (part, first, last tile)."""

    data: torch.Tensor  # int64
    rows: int
    tiles: int
    steps: int  # of the search for the row of a tile
    parts: int
    most: int  # tiles of one part
    unit: int  # of the narrow rows together


class _Entry(NamedTuple):
    table: Table
    uploaded: "torch.cuda.Event | None"
    stream: int


_entries: OrderedDict[tuple, _Entry] = OrderedDict()
_captured: dict[tuple, Table] = {}  # read by every replay of some CUDA graph: never given back


def pieces(row: Sequence[int], full: int) -> list[Row]:
    """`row` with its unit, of at most `full`; as two where all but its last elements are wide."""
    row = Row(*row)
    to = max(row.danchors, 0) | row.danchors_stride_k
    far = row.anchors | row.anchors_stride_k | row.weights | row.weights_stride_m | to
    unit = math.gcd(far | row.P, full)  # of an OR of numbers: the power of two they share
    main = row.P // full * full
    if far % full or main in (0, row.P):
        return [row._replace(unit=unit)]
    rest = row._replace(
        P=row.P - main,
        anchors=row.anchors + main,
        weights=row.weights + main,
        danchors=row.danchors + main if row.danchors >= 0 else -1,
        unit=unit,
    )
    return [row._replace(P=main, unit=full), rest]


def full_unit(t: torch.Tensor) -> int:
    """Elements in 16 bytes."""
    return 16 // t.element_size()


@functools.lru_cache(maxsize=KEPT)
def single(row: tuple[int, ...], full: int) -> Row:
    """The only piece of `row`, which then needs no table; NO_ROW if there are two."""
    first, *more = pieces(row, full)
    return NO_ROW if more else first


def table(rows: Sequence[Sequence[int]], block: int, like: torch.Tensor) -> Table:
    """The table of `rows` for wide tiles of `block` elements, on the device of `like`.

    It is uploaded when first asked for; with the same sizes and addresses it is found again and
    nothing is copied. While a CUDA graph is captured, a table that warming up has made is used
    (`torch.cuda.graph` synchronises before it starts, so it is complete) and kept for good; a new
    one is written by kernels inside the graph. Either way addresses must not change afterwards.
    """
    device, full = like.device, full_unit(like)
    key = (device, block, full, *rows)
    entry = _entries.get(key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if entry is None and capturing:
        return _build(rows, block, full, device, _write_in_graph)
    if entry is None:
        made = _build(rows, block, full, device, _upload)
        event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        _entries[key] = _Entry(made, event, _stream(device))
        if len(_entries) > KEPT:
            _entries.popitem(last=False)
        return made
    _entries.move_to_end(key)
    if capturing:
        _captured[key] = entry.table
    elif entry.uploaded is not None and entry.stream != _stream(device):
        stream = torch.cuda.current_stream(device)
        stream.wait_event(entry.uploaded)
        entry.table.data.record_stream(stream)
    return entry.table


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _build(rows, block, full, device, place) -> Table:
    cut = [piece for row in rows for piece in pieces(row, full)]
    first, sums = [0], []
    for row in cut:
        tiles = triton.cdiv(row.P, block if row.unit == full else block // NARROW.value)
        if not sums or sums[-1][0] != row.part:
            sums.append([row.part, first[-1], first[-1]])
        first.append(first[-1] + tiles)
        sums[-1][2] = first[-1]
    numbers = [*first, *(n for row in cut for n in row), *(n for part in sums for n in part)]
    steps = (len(cut) - 1).bit_length()
    most = max(last - begin for _, begin, last in sums)
    unit = min(row.unit for row in cut)
    return Table(place(numbers, device), len(cut), first[-1], steps, len(sums), most, unit)


def _upload(numbers: list[int], device: torch.device) -> torch.Tensor:
    host = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def _write_in_graph(numbers: list[int], device: torch.device) -> torch.Tensor:
    data = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    torch._foreach_add_(list(data.unbind()), numbers)  # they travel as arguments of its kernels
    return data


@triton.jit
def row_of_tile(table_ptr, tile, R, steps):
    """(pointer to the row that `tile` belongs to, place of the tile among those of the row)."""
    low = tile * 0
    high = low + R
    for _ in range(steps):  # first[low] <= tile < first[high]
        middle = (low + high) // 2
        before = tl.load(table_ptr + middle) <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return table_ptr + R + 1 + low * COLUMNS, tile - tl.load(table_ptr + low)
