"""How alike forks and their roots are, and how much each is attenuated, layer by layer.

python scripts/likeness.py MODEL DATA prints one JSON line: for the streams that enter each block, and for those that
leave the last, the mean cosine of a fork to the root of its bubble (means over channels taken off, as LayerNorm does),
the mean score p of roots and of forks, and the roots' mean norm; and the norm of each fork embedding.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thoughtbubbles.data import load_prepared
from thoughtbubbles.model.loading import load_model
from thoughtbubbles.model.streams import Streams
from thoughtbubbles.support.files import json_text
from thoughtbubbles.support.machine import describe_machine
from thoughtbubbles.support.sampling import spread


def main() -> None:
    """Read some validation blocks and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of a run with forks")
    parser.add_argument("data", type=Path, help="folder that `thoughtbubbles prepare` wrote")
    parser.add_argument("--blocks", type=int, default=64, help="validation blocks, evenly spaced")
    options = parser.parse_args()
    model = load_model(options.model).eval()
    validation = load_prepared(options.data).validation
    blocks = validation[spread(len(validation), options.blocks)]["input_ids"]
    with torch.no_grad():
        out = model(blocks, output_streams=True)
    embeddings = {layer: gate.fork_embedding.norm().item() for layer, gate in model.model.gates.items()}
    layers = [likeness(streams) for streams in out.streams]
    print(json_text({"layers": layers, "fork_embedding_norm": embeddings, "machine": describe_machine()}))


def likeness(streams: Streams) -> dict[str, Any]:
    """Of one layer; None where there are no forks."""
    forks, roots = streams.alive & ~streams.is_root, streams.roots()
    own = roots.gather(1, streams.token.clamp(max=streams.num_tokens - 1)[..., None].expand_as(streams.residual))
    cosine = F.cosine_similarity(centred(streams.residual), centred(own), dim=-1)
    p = streams.log_score.exp()
    return {
        "cosine": cosine[forks].mean().item() if forks.any() else None,
        "p_roots": p[streams.is_root].mean().item(),
        "p_forks": p[forks].mean().item() if forks.any() else None,
        "norm_roots": roots.norm(dim=-1).mean().item(),
    }


def centred(x: Tensor) -> Tensor:
    """x [..., D] less its mean over channels."""
    return x - x.mean(-1, keepdim=True)


if __name__ == "__main__":
    main()
