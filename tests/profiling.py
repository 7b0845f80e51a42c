"""--profile N of the four scripts: where the time of N training steps goes.

They load it through common.load_tool. It is not in tests/bench.py, which holds its process to
one thread as soon as it is imported.
"""
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from common import peak_memory, processes


def profile(cfg, net, loader, opts, device, rank, share=1.0, **parts):
    """Time N = cfg.profile training steps and print where the time goes; nothing is written.

    share: the part of the published training split's frames that is in an epoch.
    parts: name=(object, "method") of the model, timed within its forward.
    """
    source = iter(loader.begin_at(0))
    batch = next(source).to(device)
    flops = count_flops(net, batch, opts, device)
    places = waits_for_gpu(net, batch, opts, device)
    spent = time_steps(cfg.profile, net, source, opts, device, parts)
    rate, dtype = product_rate(device)
    if rank:
        return
    total = sum(spent.values())
    frames = cfg.batch * processes()
    print_times(cfg, spent, frames, device)
    print(f"matrix products and convolutions: {flops / 1e9:.0f} GFLOP a step, at the "
          f"{rate / 1e9:.0f} GFLOP/s of one large {dtype} product here "
          f"{flops / rate * cfg.profile / total:.0%} of the time")
    epochs = type(cfg)().epochs
    if epochs:
        full = round(share * loader.grid.paper_frames)
        days = epochs * full * total / (cfg.profile * frames) / 86400
        print(f"{epochs} epochs over {full} training frames of {loader.grid.dataset} would take "
              f"{days:.2f} days at this speed")
    if device.type == "cuda":
        listed = ", ".join(f"{place} x {n}" for place, n in places.most_common())
        print(f"{places.total()} waits of the CPU for the GPU in a step: {listed}")


def now(device):
    """Seconds, after the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train_step(net, batch, opts, device):
    """One step -> seconds when it began, had the loss, had the gradients, was done."""
    began = now(device)
    loss, _ = net(batch)
    forward = now(device)
    for opt in opts:
        opt.zero_grad()
    loss.backward()
    backward = now(device)
    for opt in opts:
        opt.step()
    return began, forward, backward, now(device)


def count_flops(net, batch, opts, device):
    """Floating-point operations of the products and convolutions of a step."""
    def grouped(a, b, *_, **__):
        return 2 * a[0] * a[1] * b[-1]

    # torch does not count grouped products
    custom = {torch.ops.aten._grouped_mm: grouped}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        train_step(net, batch, opts, device)
    return counter.get_total_flops()


def waits_for_gpu(net, batch, opts, device):
    """Where the CPU waits for the GPU in a step. -> Counter of "file:line".

    It runs outside FlopCounterMode, which would be the place of every wait.
    """
    if device.type != "cuda":
        return Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train_step(net, batch, opts, device)
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)


def time_steps(steps, net, source, opts, device, parts):
    """Train steps on the batches of `source` -> {what: seconds of all steps}."""
    spent = dict.fromkeys(("wait for data", "transfer", *parts), 0.0)
    spent |= dict.fromkeys(("rest of forward", "backward", "optimiser"), 0.0)

    def timed(name, method):
        def call(*words, **named):
            began = now(device)
            out = method(*words, **named)
            spent[name] += now(device) - began
            return out
        return call

    for name, (owner, method) in parts.items():
        setattr(owner, method, timed(name, getattr(owner, method)))
    for _ in range(steps):
        asked = now(device)
        batch = next(source)
        arrived = now(device)
        batch = batch.to(device)
        before = sum(spent[name] for name in parts)
        began, forward, backward, done = train_step(net, batch, opts, device)
        in_parts = sum(spent[name] for name in parts) - before
        spent["wait for data"] += arrived - asked
        spent["transfer"] += began - arrived
        spent["rest of forward"] += forward - began - in_parts
        spent["backward"] += backward - forward
        spent["optimiser"] += done - backward
    return spent


def product_rate(device):
    """FLOP/s of one large matrix product, the best of five -> rate, name of its dtype."""
    n, dtype = 1536, torch.float32
    if device.type == "cuda":
        n, dtype = 8192, torch.bfloat16
    square = torch.ones(n, n, dtype=dtype, device=device)
    rates = []
    for _ in range(5):
        began = now(device)
        square @ square
        rates.append(2 * n ** 3 / (now(device) - began))
    return max(rates), str(dtype).removeprefix("torch.")


def print_times(cfg, spent, frames, device):
    """A row for each part of a step. spent {what: seconds of all steps}, frames of one step."""
    total = sum(spent.values())
    memory = peak_memory()
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"{cfg.profile} steps of {frames} frames, {cfg.preset} size, {device}, "
          f"{torch.get_num_threads()} threads")
    for name, seconds in spent.items():
        print(f"{name:18}{1e3 * seconds / cfg.profile:10.1f} ms a step{seconds / total:8.1%}")
    print(f"{'in all':18}{1e3 * total / cfg.profile:10.1f} ms a step, "
          f"{cfg.profile * frames / total:.2f} frames/s, "
          f"peak memory of a process {memory:.1f} GiB")
