"""One of several clients: sends jobs at once, checks each answer, and prints what became of them as JSON.

python tests/ndif/client.py HOST CLIENT N_JOBS

Job j of client c scales a site by 1 + c + j/100, so that no two jobs have the same answer.
"""

from __future__ import annotations

import json
import sys

import torch
from zoo_inputs import INPUTS

import mm_adapters as mm

SITE = "vision.blocks.1.attn.hook_z"


def main(host: str, client: int, n_jobs: int) -> None:
    torch.set_num_threads(1)
    model = mm.load("tiny-clip", engine="nnsight", device="meta")
    here = mm.load("tiny-clip").run(INPUTS["tiny-clip"], read=[SITE])[SITE]
    sent = []
    for j in range(n_jobs):
        scale = 1 + client + j / 100
        edit = [mm.Edit(SITE, lambda z, scale=scale: z * scale)]
        job = model.run(INPUTS["tiny-clip"], read=[SITE], edit=edit, remote=host, blocking=False)
        sent.append((scale, job))
    wrong = []
    for scale, job in sent:
        there = job.result(300.0, resend=False)[SITE]
        if not torch.allclose(there, here * scale, rtol=1e-4, atol=1e-5):
            wrong.append(scale)
    sys.stdout.write(
        json.dumps({"answered": len(sent), "wrong": wrong, "ids": [j.id for _, j in sent]}) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
