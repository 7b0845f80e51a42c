"""--profile N of the four scripts: where the time of N training steps goes. Loaded by them through common.load_tool.

Not in tests/bench.py, which holds its process to one thread as soon as it is imported.
"""
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from common import peak_memory, processes


def profile(cfg, net, loader, opts, device, rank, share=1.0, **parts):
    """--profile N: where the time of N training steps goes, printed; nothing is written.

    share: of the published training split's frames, in an epoch. parts: name=(object, "method") of the model, timed within its forward.
    """
    spent = dict.fromkeys(("wait for data", "transfer", *parts, "rest of forward", "backward", "optimiser"), 0.0)

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(name, method):
        def call(*words, **named):
            begin = now()
            out = method(*words, **named)
            spent[name] += now() - begin
            return out
        return call

    def train(batch):
        """One step -> seconds when it began, had the loss, had the gradients, was done."""
        times = [now()]
        loss, _ = net(batch)
        times.append(now())
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        times.append(now())
        for opt in opts:
            opt.step()
        return [*times, now()]

    grouped = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]}                # torch does not count them
    source = iter(loader.begin_at(0))
    batch = next(source).to(device)
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter:
        train(batch)
    flops = counter.get_total_flops()
    if device.type == "cuda":                                       # outside the counter, which would be the place of every wait
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            train(batch)
            torch.cuda.set_sync_debug_mode("default")
    for name, (owner, method) in parts.items():
        setattr(owner, method, timed(name, getattr(owner, method)))
    for _ in range(cfg.profile):
        asked = now()
        batch = next(source)
        got = now()
        batch = batch.to(device)
        within = sum(spent[name] for name in parts)
        begun, forward, backward, done = train(batch)
        for name, seconds in (("wait for data", got - asked), ("transfer", begun - got), ("backward", backward - forward), ("optimiser", done - backward),
                              ("rest of forward", forward - begun - sum(spent[name] for name in parts) + within)):
            spent[name] += seconds
    n, kind = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    square, rates = torch.ones(n, n, dtype=kind, device=device), []
    for _ in range(5):
        begin = now()
        square @ square
        rates.append(2 * n ** 3 / (now() - begin))
    if rank:
        return
    total, frames = sum(spent.values()), cfg.batch * processes()
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else peak_memory()
    print(f"{cfg.profile} steps of {frames} frames, {cfg.preset} size, {device}, {torch.get_num_threads()} threads")
    for name, seconds in spent.items():
        print(f"{name:18}{1e3 * seconds / cfg.profile:10.1f} ms a step{seconds / total:8.1%}")
    print(f"{'in all':18}{1e3 * total / cfg.profile:10.1f} ms a step, {cfg.profile * frames / total:.2f} frames/s, peak memory of a process {memory:.1f} GiB")
    print(f"matrix products and convolutions: {flops / 1e9:.0f} GFLOP a step, at the {max(rates) / 1e9:.0f} GFLOP/s of one large {str(kind)[6:]} product here "
          f"{flops / max(rates) * cfg.profile / total:.0%} of the time")
    full = round(share * loader.grid.paper_frames)
    if type(cfg)().epochs:
        print(f"{type(cfg)().epochs} epochs over {full} training frames of {loader.grid.dataset} would take "
              f"{type(cfg)().epochs * full * total / (cfg.profile * frames) / 86400:.2f} days at this speed")
    if device.type == "cuda":
        places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told if "synchroniz" in str(w.message))
        print(f"{places.total()} waits of the CPU for the GPU in a step: " + ", ".join(f"{place} x {n}" for place, n in places.most_common()))
