"""Steps recorded once and replayed: with a CUDA graph, hundreds of launches cost the host one call.

What is recorded reads and writes the same addresses at every replay; whatever changes from step to step must be on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Step = Callable[[], None]


def can_record(device: torch.device) -> bool:
    """Whether steps on this device can be recorded now: not on the CPU, and not inside of somebody's own recording, which they join."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


class Recorder:
    """Recordings that share memory: they must be replayed in the order in which they were made, one after the other."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, step: Step) -> Step:
        """What replays a step. The recording itself runs nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            step()
        return graph.replay
