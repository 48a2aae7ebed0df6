"""The pages of a shard's KV cache: whose they are, who shares them, and what may be taken.

A page holds the keys and values of some tokens for every layer of the shard. A session has
a table of pages, which grows as it writes. Sessions of one driver may share pages; a page
that is shared is copied before one of them writes to it. A page that nobody uses any more
but whose tokens have a name stays until its room is needed, the least recently used first.

Pure: no clock, no arrays. The pool decides; whoever runs the step copies and writes.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pals.engine.prefix import PrefixScope
from pals.errors import InvalidConfig, PagesExhausted
from pals.types import PeerId, SessionId

PAGE_TOKENS = (16, 32, 64)
"""The page sizes that there are."""

SCRATCH_PAGE = 0
"""Where rows and columns that only pad write. No session has it; it holds nothing."""

CacheShape = tuple[int, int]
"""Heads and width of one array that a layer keeps of each token."""


def token_bytes(
    layers: Iterable[Iterable[CacheShape]], *, element_bytes: int, scale_bytes: int = 0
) -> int:
    """Return what one token takes in the cache of some layers.

    Args:
        layers: For each layer the arrays that it keeps: two of all key heads, or with
            multi-head latent attention a single one.
        element_bytes: Of one stored element.
        scale_bytes: Of the scale that a head of an array has where elements are quantised.
    """
    shapes = [shape for arrays in layers for shape in arrays]
    return sum(heads * (width * element_bytes + scale_bytes) for heads, width in shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFormat:
    """The size of a page.

    Attributes:
        page_tokens: One of `PAGE_TOKENS`.
        token_bytes: What one token takes, over all layers of the shard.
    """

    page_tokens: int
    token_bytes: int

    @property
    def page_bytes(self) -> int:
        return self.page_tokens * self.token_bytes

    def pages_of(self, tokens: int) -> int:
        """Return how many pages hold ``tokens``."""
        return -(-tokens // self.page_tokens)


@dataclass(frozen=True, slots=True)
class PageCopy:
    """A page whose content a step copies to another one before its rows write.

    In one step no page is copied from after it was copied to, nor copied to twice: all
    copies may be read before any is written, or they may run one after another in order.
    """

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Match:
    """What the pool holds of a prompt.

    Attributes:
        tokens: Held from position 0 on.
        idle: Pages among them that nobody uses, and that would count as used once opened.
    """

    tokens: int
    idle: int


@dataclass(slots=True)
class _Page:
    """One page.

    Attributes:
        refs: Tables that it stands in.
        key: Under which it can be found; None for what has no name, or is not written yet.
    """

    refs: int = 0
    key: bytes | None = None


@dataclass(slots=True)
class _Table:
    """The pages of one session.

    Attributes:
        driver: Whose session it is.
        keys: Of its pages from the first one on, as far as they have names.
        pages: As many as hold `length` tokens.
        length: Tokens that are written, or will be when the steps planned so far have run.
        published: Pages from the first one on that were looked at for publishing.
    """

    driver: PeerId
    keys: Sequence[bytes]
    pages: array[int] = field(default_factory=lambda: array("i"))
    length: int = 0
    published: int = 0


class PagePool:
    """All pages of one shard, within its bytes.

    Misuse by this project's own code fails an assertion or raises KeyError; the numbers
    that peers send are checked by `pals.engine.batcher`.

    Attributes:
        format: The size of a page.
        num_pages: That sessions may have; one more is the scratch page.
    """

    def __init__(self, format_: PageFormat, *, budget_bytes: int, scope: PrefixScope) -> None:
        """Divide a budget into pages.

        Raises:
            InvalidConfig: The page size is none of `PAGE_TOKENS`, or the budget holds no
                page beside the scratch page.
        """
        _check(format_, budget_bytes)
        self.format = format_
        self.num_pages = budget_bytes // format_.page_bytes - 1
        self._scope = scope
        self.clear()

    def clear(self) -> None:
        """Forget every session and prefix, as after a failed step that took the cache along."""
        self._pages = [_Page() for _ in range(self.num_pages + 1)]
        self._free = list(range(self.num_pages, SCRATCH_PAGE, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._index: dict[bytes, int] = {}
        self._tables: dict[SessionId, _Table] = {}
        self._used: Counter[PeerId] = Counter()

    # --- what there is ---------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens that one session could have if it were alone."""
        return self.num_pages * self.format.page_tokens

    @property
    def available(self) -> int:
        """Pages that may be taken: empty ones, and idle ones that are evicted."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that are kept for prompts to come."""
        return len(self._idle)

    def used_by(self, driver: PeerId) -> int:
        """Return the pages of a driver's sessions; what two of them share counts once."""
        return self._used[driver]

    def length(self, session: SessionId) -> int:
        """Return the tokens of a session."""
        return self._tables[session].length

    def table(self, session: SessionId) -> array[int]:
        """Return a copy of a session's page table, int32."""
        return self._tables[session].pages[:]

    # --- prefixes --------------------------------------------------------------------

    def keys_of(self, driver: PeerId, names: Sequence[bytes]) -> tuple[bytes, ...]:
        """Return the keys of the pages of a prompt whose blocks a driver calls ``names``."""
        return self._scope.page_keys(driver, names, self.format.page_tokens)

    def match(self, keys: Sequence[bytes]) -> Match:
        """Return what is held of a prompt, without taking it."""
        pages = self._find(keys)
        idle = sum(self._pages[page].refs == 0 for page in pages)
        return Match(len(pages) * self.format.page_tokens, idle)

    def _find(self, keys: Sequence[bytes]) -> list[int]:
        found: list[int] = []
        for key in keys:
            page = self._index.get(key)
            if page is None:
                break
            found.append(page)
        return found

    # --- sessions --------------------------------------------------------------------

    def open(self, session: SessionId, driver: PeerId, keys: Sequence[bytes] = ()) -> int:
        """Begin a session with what is held of its prompt; return how many tokens that is.

        Args:
            session: New in this pool.
            driver: Whose session it is; no page ever serves two drivers.
            keys: From `keys_of` the same driver.
        """
        assert session not in self._tables
        table = self._tables[session] = _Table(driver, keys)
        for page in self._find(keys):
            self._take(page, driver)
            table.pages.append(page)
        table.published = len(table.pages)
        table.length = table.published * self.format.page_tokens
        return table.length

    def fork(self, parent: SessionId, child: SessionId, position: int) -> None:
        """Begin a session with the first ``position`` tokens of another one of its driver."""
        origin = self._tables[parent]
        assert child not in self._tables
        assert position <= origin.length
        whole = position // self.format.page_tokens
        table = self._tables[child] = _Table(origin.driver, origin.keys[:whole])
        table.pages = origin.pages[: self.format.pages_of(position)]
        for page in table.pages:
            self._take(page, origin.driver)
        table.length, table.published = position, min(whole, origin.published)

    def start(self, session: SessionId, position: int) -> None:
        """Let a session go on at ``position`` with the very tokens that it has names for.

        A chain uses what all of its shards hold, which may be less than this one does.
        """
        self._cut(self._tables[session], position)

    def rewind(self, session: SessionId, position: int) -> None:
        """Forget what a session has from ``position`` on; other tokens may follow."""
        table = self._tables[session]
        self._cut(table, position)
        table.keys = table.keys[: position // self.format.page_tokens]

    def name(self, session: SessionId, keys: Sequence[bytes]) -> None:
        """Give the pages of a session their keys, those of the answer so far included."""
        self._tables[session].keys = keys

    def publish(self, session: SessionId, position: int) -> None:
        """Let prompts to come find the named pages below ``position``.

        They are written, or will be by steps that are planned: whoever finds them is planned
        later, and steps run in the order of their plans.
        A page that another session of the driver has published is used instead of its twin.
        """
        table = self._tables[session]
        whole = min(position, table.length) // self.format.page_tokens
        for number in range(table.published, min(whole, len(table.keys))):
            self._publish_page(table, number)
            table.published = number + 1

    def close(self, session: SessionId) -> None:
        """Give the pages of a session back at once; published ones may still be found."""
        table = self._tables.pop(session)
        self._drop(table, 0)

    # --- writing ---------------------------------------------------------------------

    def pages_needed(self, session: SessionId, tokens: int) -> int:
        """Return how many pages `reserve` would take."""
        table = self._tables[session]
        grown = self.format.pages_of(table.length + tokens) - len(table.pages)
        return grown + self._must_copy(table)

    def tokens_within(self, session: SessionId, pages: int) -> int:
        """Return how many tokens a session can write with ``pages`` more, 0 or more."""
        table = self._tables[session]
        whole = len(table.pages) + pages - self._must_copy(table)
        if pages < self._must_copy(table):
            return 0
        return whole * self.format.page_tokens - table.length

    def reserve(self, session: SessionId, tokens: int) -> tuple[PageCopy, ...]:
        """Make room for the next ``tokens`` of a session, which the coming step writes.

        Returns:
            What that step has to copy before.

        Raises:
            PagesExhausted: There are not as many pages, and nothing has changed.
        """
        needed = self.pages_needed(session, tokens)
        if needed > self.available:
            raise PagesExhausted(pages=needed, available=self.available)
        table = self._tables[session]
        copies = self._make_writable(table)
        table.length += tokens
        while len(table.pages) < self.format.pages_of(table.length):
            table.pages.append(self._allocate(table.driver))
        return copies

    def _must_copy(self, table: _Table) -> bool:
        """Return whether others read the page that a session writes to next."""
        is_partial = table.length % self.format.page_tokens != 0
        return is_partial and self._pages[table.pages[-1]].refs > 1

    def _make_writable(self, table: _Table) -> tuple[PageCopy, ...]:
        if table.length % self.format.page_tokens == 0:
            return ()
        page = table.pages[-1]
        if not self._must_copy(table):
            self._unpublish(page)  # nobody else has it, so it needs no copy
            return ()
        table.pages[-1] = self._allocate(table.driver)
        self._release(page, table.driver)
        return (PageCopy(page, table.pages[-1]),)

    # --- pages -----------------------------------------------------------------------

    def _cut(self, table: _Table, position: int) -> None:
        assert 0 <= position <= table.length
        self._drop(table, self.format.pages_of(position))
        table.length = position
        table.published = min(table.published, position // self.format.page_tokens)

    def _drop(self, table: _Table, keep: int) -> None:
        """Release all but the first pages of a table, so that prefixes outlive what follows."""
        while len(table.pages) > keep:
            self._release(table.pages.pop(), table.driver)

    def _publish_page(self, table: _Table, number: int) -> None:
        key, page = table.keys[number], table.pages[number]
        twin = self._index.get(key)
        if twin is not None and twin != page:
            self._take(twin, table.driver)
            table.pages[number] = twin
            self._release(page, table.driver)
        elif self._pages[page].key is None:
            self._pages[page].key = key
            self._index[key] = page

    def _unpublish(self, page: int) -> None:
        key, self._pages[page].key = self._pages[page].key, None
        if key is not None:
            del self._index[key]

    def _allocate(self, driver: PeerId) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._unpublish(page)
        self._pages[page].refs = 1
        self._used[driver] += 1
        return page

    def _take(self, page: int, driver: PeerId) -> None:
        if self._pages[page].refs == 0:
            del self._idle[page]
            self._used[driver] += 1
        self._pages[page].refs += 1

    def _release(self, page: int, driver: PeerId) -> None:
        state = self._pages[page]
        state.refs -= 1
        if state.refs:
            return
        self._used[driver] -= 1
        if not self._used[driver]:
            del self._used[driver]
        if state.key is None:
            self._free.append(page)
        else:
            self._idle[page] = None


def _check(format_: PageFormat, budget_bytes: int) -> None:
    if format_.page_tokens not in PAGE_TOKENS:
        problem, advice = f"a page of {format_.page_tokens} tokens", f"choose one of {PAGE_TOKENS}"
        raise InvalidConfig(source="shard", problem=problem, advice=advice)
    if budget_bytes < 2 * format_.page_bytes:
        problem = f"{budget_bytes} bytes for the KV cache, whose pages have {format_.page_bytes}"
        advice = "give it more memory, or serve fewer layers"
        raise InvalidConfig(source="shard", problem=problem, advice=advice)
