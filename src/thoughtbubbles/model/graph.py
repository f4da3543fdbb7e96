"""A decoding step over a static cache as a graph, replayed as one piece on a GPU (method: Cache)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .static import StaticStreamCache

MOST_GRAPHS = 256
"""That torch may make of one function; its own limit is 8, which a few budgets or lengths reach."""

Advance = Callable[[Tensor, Tensor, StaticStreamCache], Tensor]
"""`advance` of a model."""


class StepGraph:
    """Steps of a model over a static cache whose steps are fixed; nothing is read back from the device.

    There is a graph for each power of two of tokens that the rows reach, made when the first step asks for it or by
    `prepare`. Where nothing is replayed or compiled the model is called.

    Args:
        advance: of the model, in evaluation mode.
        cache: of its rows, each of which has had a token before.
        backend: of torch.compile; None does not compile.
    """

    def __init__(self, advance: Advance, cache: StaticStreamCache, backend: str | None = None) -> None:
        self.cache = cache
        self.is_replayed = cache.device.type == "cuda"
        self._ids = torch.zeros(cache.rows, 1, dtype=torch.int64, device=cache.device)
        self._alive = torch.zeros(cache.rows, 1, dtype=torch.bool, device=cache.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._advance = advance
        if backend is not None:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
            self._advance = torch.compile(advance, fullgraph=True, dynamic=False, backend=backend)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Make every graph that steps may ask for, by steps of no row, which change nothing."""
        reach = 0
        while reach < self.cache.longest:
            reach = self.cache.frame.rounded(reach + 1)
            with self.cache.reaching(reach):
                self._alive.zero_()
                self._taken()

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, active: Sequence[bool], alive: Tensor | None = None) -> Tensor:
        """One token more of every active row.

        Args:
            tokens: [B] int64; those of other rows mean nothing.
            active: of each row, whether it goes on.
            alive: [B] bool, of the active rows those whose token is real; None is all.

        Returns:
            Logits [B, V], good until the next step; those of other rows mean nothing.
        """
        self.cache.step(active)
        self._ids.copy_(tokens[:, None])
        self._alive.copy_((torch.tensor(active) if alive is None else alive)[:, None])
        return self._taken()

    def _taken(self) -> Tensor:
        if not self.is_replayed:
            return self._advance(self._ids, self._alive, self.cache)
        reach = self.cache.frame.reach
        if reach not in self._graphs:
            self._graphs[reach] = self._captured()
        graph, logits = self._graphs[reach]
        graph.replay()
        return logits

    def _captured(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of such steps, and where it puts its logits."""
        alive = self._alive.clone()
        self._alive.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._advance(self._ids, self._alive, self.cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._advance(self._ids, self._alive, self.cache)
        self._alive.copy_(alive)
        return graph, logits
