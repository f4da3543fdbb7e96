"""A few optimizer steps of a tiny model, its blocks sharded by torch's FSDP2 where there are several processes."""

import json
import os

import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM

STEPS, ROWS, LENGTH, VOCABULARY = 12, 4, 16, 61


def losses(rank: int = 0, processes: int = 1) -> list[float]:
    """The loss of each step, over the rows of all processes."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "fork_layers": [1, 2]}
    model = ThoughtbubblesForCausalLM(ThoughtbubblesConfig(vocab_size=VOCABULARY, budget=1.5, **shape))
    if processes > 1:
        mesh = init_device_mesh("cpu", (processes,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        rows = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=draw)[rank::processes]
        loss = model(rows, labels=rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        if processes > 1:
            torch.distributed.all_reduce(whole)
        found.append(float(whole) / processes)
    return found


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    found = losses(torch.distributed.get_rank(), int(os.environ["WORLD_SIZE"]))
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))
    torch.distributed.destroy_process_group()
