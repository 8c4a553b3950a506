"""Key and value cache of K-iteration inference: one slot for each (iteration, layer), or for several iterations together.

A recurrent-depth model visits its core K times per token, and a token at iteration k attends to the past as it stood at iteration
k. So the core (and, for denoising models, the coda, which also runs at every iteration) owns K times as many slots as it has
layers, unless iterations share theirs (`caches`). Slots are allocated whole at the start: generation never reallocates.

Notable: a pass over one new position is a function of tensors alone. Where it stands is a tensor on the device, and it attends to a
fixed number of columns, those not filled yet behind a mask. So a CUDA graph of it can be replayed at the next position.
"""

import torch
from torch import Tensor

from .attention import additive_mask, half_precision

SMALLEST_VIEW = 64  # columns that a pass over one position attends to at least; then twice as many, and so on

LARGEST_REWRITTEN = 2**20
"""Numbers of the largest keys that compiled code writes in full where only one column is new: the kernel that reads them does it, which
takes less time than a kernel more would for that column."""


def cache_of(iteration: int, iterations: int, caches: int, order: str) -> int:
    """Which of so many caches (0: one for each iteration) an iteration, from 0, uses.

    order: `adjacent`, equal shares of neighbouring iterations; `cyclic`, iteration modulo caches (Huginn's compress-s).
    """
    if not caches or caches >= iterations:
        return iteration
    return iteration % caches if order == "cyclic" else iteration * caches // iterations


class CachePlace:
    """Where the present pass stands, which all slots of a cache share.

    capacity: columns that there are; length: those that are filled before the pass; count: new ones. padding: [B], columns at the
    start of each row that hold nothing, or None. rows: [R], the rows of the batch that are computed, or None for all.
    positions: int64 [1 or B, count], column less padding. turns: the rotary table at these. mask: bool [1 or B, 1, count, columns], what
    each new position attends to, or None where that is simply the causal mask; with a `dtype`, that of the queries, in the form that their
    kernel wants, which would else be made of it anew in each layer.
    """

    def __init__(self, capacity: int, device: torch.device, dtype: torch.dtype | None = None):
        self.capacity, self.length, self.count = capacity, 0, 0
        self.padding = self.rows = self.positions = self.turns = self.mask = None
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # `length`, on the device
        self._mask_dtype = dtype if dtype is not None and half_precision(device, dtype) else None
        self.one_position, self.shown = False, 0  # whether a step of one position is under way, and the columns that it attends to
        self._columns = torch.arange(capacity, device=device)
        self._table: tuple[Tensor, Tensor] | None = None

    @property
    def view(self) -> int:
        """Columns that a pass over the next position attends to, filled or not."""
        view = SMALLEST_VIEW
        while view <= self.length:
            view *= 2
        return min(view, self.capacity)

    def begin(self, rotary, count: int) -> None:
        """Start a pass over so many new positions. rotary: the model's RotaryTable. ValueError when there is no room for them."""
        if self.length + count > self.capacity:
            raise ValueError(f"the key-value cache holds {self.capacity} positions, and {self.length + count} were asked of it")
        if self._table is None:  # kept, as a graph holds on to it, and the model's own may be replaced by a longer one
            self._table = rotary(0, self.capacity, self.column.device)
        self.count, self.one_position, self.rows, self.shown = count, count == 1, None, self.view
        if self.one_position:
            columns = self.column
        else:
            columns = self._columns[self.length : self.length + count]
        seen = self._columns[: self.shown if self.one_position else self.length + count]
        self.positions, self.mask = columns.unsqueeze(0), None
        if self.one_position:
            self.mask = (seen <= columns.unsqueeze(1)).view(1, 1, 1, -1)
        if self.padding is not None:
            self.positions = (self.positions - self.padding.unsqueeze(1)).clamp(min=0)
            own = columns.unsqueeze(1)  # padding sees itself, as softmax needs something
            self.mask = (seen <= own) & ((seen >= self.padding.view(-1, 1, 1, 1)) | (seen == own))
        self._shape_mask()
        self.turns = tuple(table[self.positions].unsqueeze(1) for table in self._table)

    @property
    def is_new(self) -> Tensor:
        """Of the columns that a pass over one position attends to, which is its own: bool [columns, 1]."""
        return (self._columns[: self.shown] == self.column).unsqueeze(1)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows [R] of the batch, until the next pass."""
        self.rows = rows
        if self.padding is not None:
            chosen = self.padding[rows].unsqueeze(1)
            self.positions = (self.column.unsqueeze(0) - chosen).clamp(min=0)
            seen = self._columns[: self.shown]
            self.mask = ((seen <= self.column) & (seen >= chosen)).view(len(rows), 1, 1, -1)
            self._shape_mask()
            self.turns = tuple(table[self.positions].unsqueeze(1) for table in self._table)

    def _shape_mask(self) -> None:
        if self.mask is not None and self._mask_dtype is not None:
            self.mask = additive_mask(self.mask, self._mask_dtype)

    def move(self, length: int) -> None:
        """Say how many columns are filled."""
        self.length = length
        self.column.fill_(length)


class CacheSlot:
    """Keys and values of one layer at one iteration: two tensors [B, H, capacity, D]."""

    def __init__(self, keys: Tensor, values: Tensor, place: CachePlace | None = None):
        """place: of the cache that it belongs to; a slot on its own moves along with what is appended to it."""
        self.keys, self.values = keys, values
        self._alone = place is None
        self.place = CachePlace(keys.shape[2], keys.device) if place is None else place

    @property
    def length(self) -> int:
        """Columns that were filled before the present pass."""
        return self.place.length

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, H, T, D] of new positions; return all keys and values that they may see, under the mask of the place.

        ValueError when the capacity is exceeded.
        """
        place = self.place
        if place.one_position:
            return self._put(self.keys, keys), self._put(self.values, values)
        stop = place.length + keys.shape[2]
        if stop > self.keys.shape[2]:
            raise ValueError(f"the key-value cache holds {self.keys.shape[2]} positions, and {stop} were asked of it")
        self.keys[:, :, place.length : stop] = keys
        self.values[:, :, place.length : stop] = values
        if self._alone:
            place.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def _put(self, stored: Tensor, new: Tensor) -> Tensor:
        place, seen = self.place, stored[:, :, : self.place.shown]
        if place.rows is not None:
            stored[place.rows, :, place.column] = new[:, :, 0]
            return seen.index_select(0, place.rows)
        if torch.compiler.is_compiling() and len(new) == 1 and seen.numel() <= LARGEST_REWRITTEN:
            seen[:] = torch.where(place.is_new, new, seen)
        else:
            stored.index_copy_(2, place.column, new)
        return seen


class KeyValueCache:
    """All slots of one generation.

    `prelude[layer]`, `core[iteration][layer]` and `coda[iteration][layer]` are what `RecurrentDepthLM.prelude`, `iterate` and
    `readout` take as their `cache`; iterations that share a cache have the same slots, whose past is as the last of them left it.
    A pass is: `place.begin`, the model's parts, `advance`. `bytes` is what it takes.
    """

    def __init__(self, config, iterations: int, coda_iterations: int, batch: int, capacity: int, like: Tensor, caches: int = 0,
                 order: str = "adjacent"):
        """config: ModelConfig; `like` gives device and dtype. coda_iterations: K for a denoising model, whose coda runs at every
        iteration, and 1 for a model that reads out once. caches, order: how iterations share them, see `cache_of`."""
        self.place = CachePlace(capacity, like.device, like.dtype)
        self._stores: list[tuple[Tensor, list[int]]] = []
        self.bytes = 0

        def part(layers: int, count: int) -> list[list[CacheSlot]]:
            index = [cache_of(k, count, caches, order) for k in range(count)]
            shape = (max(index) + 1, layers, 2, batch, config.heads, capacity, config.head_width)
            store = torch.zeros(shape, device=like.device, dtype=like.dtype)
            self._stores.append((store, index))
            self.bytes += store.nbytes
            slots = [[CacheSlot(keys, values, self.place) for keys, values in cache] for cache in store]
            return [slots[cache] for cache in index]

        (self.prelude,) = part(config.prelude_layers, 1)
        self.core = part(config.core_layers, iterations)
        self.coda = part(config.coda_layers, coda_iterations)

    @property
    def length(self) -> int:
        """Positions that are filled."""
        return self.place.length

    def advance(self) -> None:
        """The pass is over: its positions are filled."""
        self.place.move(self.place.length + self.place.count)

    def truncate(self, length: int) -> None:
        """Forget all positions but the first so many. ValueError when there are not as many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"the cache holds {self.length} positions and cannot be cut to {length}: choose from 0 to {self.length}")
        self.place.move(length)

    def share_last(self, last: Tensor) -> None:
        """Fill what the iterations that were left out would have written for the new position, as the last that ran left it.

        last: int64 [B], the last iteration, from 0, that ran in each row (Huginn does the same, when it looks keys and values up).
        Caches that an earlier iteration shares hold something already. Costs a copy of the position's keys and values, and no computation.
        """
        for store, index in self._stores:
            if len(index) == 1:
                continue
            first = torch.tensor([index.index(cache) for cache in range(store.shape[0])], device=store.device)
            own = torch.arange(store.shape[0], device=store.device)
            written_by = torch.tensor(index, device=store.device)[last]  # the cache of each row's last iteration
            source = torch.where(first.unsqueeze(1) <= last, own.unsqueeze(1), written_by)  # [caches, B]
            column = store[:, :, :, :, :, self.place.column]  # [caches, layers, 2, B, H, 1, D], a copy
            rows = torch.arange(len(last), device=store.device)
            # Two index tensors apart from each other bring their shape to the front: [caches, B, layers, 2, H, 1, D].
            chosen = column[source, :, :, rows]
            store.index_copy_(5, self.place.column, chosen.movedim(1, 3))
