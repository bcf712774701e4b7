"""Several clients, each a process that sends jobs at once and checks each answer; prints what became of them.

python tests/ndif/client.py HOST N_CLIENTS N_JOBS [FIRST]

Job j of client c scales a site by 1 + c + j/100, so that no two jobs have the same answer. With FIRST each
takes that many answers; then a line is printed, and they go on when it is answered by a line: meanwhile the
service may have been ended and started again. What is lost by then is sent again.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from multiprocessing.connection import Connection
from typing import Any

import nnsight
import torch
from zoo_inputs import INPUTS

import mm_adapters as mm
from integrations.ndif.processes import die_with_parent
from mm_adapters.remote import JobLostError

SITE = "vision.blocks.1.attn.hook_z"


def main(host: str, n_clients: int, n_jobs: int, first: int | None = None) -> None:
    torch.set_num_threads(1)
    nnsight.CONFIG.APP.REMOTE_LOGGING = False  # It prints where the answer goes.
    model = mm.load("tiny-clip", engine="nnsight", device="meta")
    here = mm.load("tiny-clip").run(INPUTS["tiny-clip"], read=[SITE])[SITE]
    # Forked, so that what all of them need is imported once.
    fork = multiprocessing.get_context("fork")
    pipes = []
    for client in range(n_clients):
        ours, theirs = fork.Pipe()
        fork.Process(target=send, args=(theirs, model, here, host, client, n_jobs, first)).start()
        theirs.close()
        pipes.append(ours)
    if first is not None:
        assert [pipe.recv() for pipe in pipes] == ["accepted"] * n_clients
        sys.stdout.write("accepted\n")
        sys.stdout.flush()
        sys.stdin.readline()
        for pipe in pipes:
            pipe.send("go on")
    sys.stdout.write(json.dumps([pipe.recv() for pipe in pipes]) + "\n")


def send(
    pipe: Connection, model: Any, here: torch.Tensor, host: str, client: int, n_jobs: int, first: int | None
) -> None:
    die_with_parent()
    sent = []
    for j in range(n_jobs):
        scale = 1 + client + j / 100
        edit = [mm.Edit(SITE, lambda z, scale=scale: __import__("time").sleep(0.1) or z * scale)]
        job = model.run(INPUTS["tiny-clip"], read=[SITE], edit=edit, remote=host, blocking=False)
        sent.append((scale, job, job.id))
    answered, lost, wrong = 0, 0, []
    for i, (scale, job, _) in enumerate(sent):
        if i == first:
            pipe.send("accepted")
            pipe.recv()
        try:
            there = job.result(300.0, resend=False)[SITE]
            answered += 1
        except JobLostError:
            lost += 1
            there = job.result(300.0)[SITE]
        if not torch.allclose(there, here * scale, rtol=1e-4, atol=1e-5):
            wrong.append(scale)
    pipe.send({"answered": answered, "lost": lost, "wrong": wrong, "ids": [name for *_, name in sent]})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
