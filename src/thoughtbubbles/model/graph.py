"""A decoding step over a static cache as a graph, which a GPU replays as one piece (method: Cache)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .modeling import ThoughtbubblesForCausalLM
from .static import StaticStreamCache


class StepGraph:
    """Steps of a model over a static cache; nothing is read back from the device.

    On a GPU there is a graph for each power of two of tokens that the rows reach, captured when the first step asks for
    it or by `prepare`; elsewhere the model is called.

    Args:
        model: in evaluation mode.
        cache: of its rows, each of which has had a token before.
    """

    def __init__(self, model: ThoughtbubblesForCausalLM, cache: StaticStreamCache) -> None:
        self.model, self.cache = model, cache
        self._ids = torch.zeros(cache.rows, 1, dtype=torch.int64, device=cache.device)
        self._alive = torch.zeros(cache.rows, 1, dtype=torch.bool, device=cache.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.is_replayed = self._ids.device.type == "cuda"

    def prepare(self) -> None:
        """Capture every graph that steps may ask for."""
        reach = 0
        while self.is_replayed and reach < self.cache.longest:
            reach = self.cache.frame.rounded(reach + 1)
            self._captured(reach)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, active: Sequence[bool]) -> Tensor:
        """One token more of every active row.

        Args:
            tokens: [B] int64; those of other rows mean nothing.
            active: of each row, whether it goes on.

        Returns:
            Logits [B, V], good until the next step; those of other rows mean nothing.
        """
        self.cache.step(active)
        self._ids.copy_(tokens[:, None])
        self._alive.copy_(torch.tensor(active)[:, None])
        if not self.is_replayed:
            return self.model.advance(self._ids, self._alive, self.cache)
        graph, logits = self._captured(self.cache.frame.reach)
        graph.replay()
        return logits

    def _captured(self, reach: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of steps that reach so many tokens, and where it puts its logits."""
        if reach not in self._graphs:
            kept = self.cache.frame.reach, self._alive.clone()
            self.cache.frame.reach, self.cache.frame.first, self.cache.frame.steps = reach, False, True
            self._alive.zero_()  # a step of no row changes nothing
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.model.advance(self._ids, self._alive, self.cache)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.model.advance(self._ids, self._alive, self.cache)
            self._graphs[reach] = graph, logits
            self.cache.frame.reach = kept[0]
            self._alive.copy_(kept[1])
        return self._graphs[reach]
