"""rssm_observe on a CUDA device, forward and backward: the reference, eager and as a CUDA graph, and the kernels.

python bench/gpu_rssm_observe.py                    # medians of CUDA events, 16 sequences of 64 steps, bfloat16
python bench/gpu_rssm_observe.py --dtype float32
TRITON_INTERPRET=1 python bench/gpu_rssm_observe.py --tiny    # without a GPU: that all of it runs; times mean nothing
"""

import argparse
import statistics
import time

import torch

from phyxdream import nn, ops

SMALL = dict(deter_size=200, hidden_size=200)
LARGE = dict(cell="block_gru", embed_size=1024)
SIZES = {
    "V1: gru 200, 30 Gaussians": dict(embed_size=1024, cell="gru", stoch_size=30, classes=0, **SMALL),
    "layernorm_gru 512, 32×32": dict(embed_size=1024),
    "12M: block_gru 2048, 32×16": dict(deter_size=2048, classes=16, hidden_size=256, **LARGE),
    "50M: block_gru 4096, 32×32": dict(deter_size=4096, classes=32, hidden_size=512, **LARGE),
}
TINY = {
    "gru 20": dict(embed_size=5, cell="gru", stoch_size=3, classes=0, deter_size=20, hidden_size=9),
    "layernorm_gru 20": dict(embed_size=5, stoch_size=3, classes=4, deter_size=20, hidden_size=9),
    "block_gru 16": dict(embed_size=5, cell="block_gru", stoch_size=3, classes=4, deter_size=16, hidden_size=9),
}
ACTION = 6


def work(sizes, T, B, device, dtype):
    """Forward and backward of the scan: a function without arguments, whose tensors stay where they are."""
    torch.manual_seed(0)
    model = nn.RSSM(action_size=ACTION, **sizes).to(device, dtype)
    embed = torch.randn(T, B, sizes["embed_size"], device=device, dtype=dtype, requires_grad=True)
    action = torch.randn(T, B, ACTION, device=device, dtype=dtype)
    is_first = torch.zeros(T, B, dtype=torch.bool, device=device)
    is_first[0] = True
    noise = model.draw_noise(T, B)
    grads = None
    leaves = [embed, *(x for name, x in model.named_parameters() if not name.startswith("prior."))]

    def forward_backward():
        nonlocal grads
        post = model.filter(embed, action, is_first, None, noise)
        outputs = [post.deter, post.stoch] + ([post.logits] if model.classes else [post.mean, post.std])
        grads = grads or [torch.randn_like(x) for x in outputs]
        return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)

    return forward_backward


def graphed(function):
    """The same as one replayed CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def milliseconds(function, device, rounds):
    """The median of `rounds` calls, the first few left out."""
    times = []
    for i in range(rounds + 3):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            before = time.perf_counter()
            function()
            times.append((time.perf_counter() - before) * 1e3)
            if i:
                break
    return statistics.median(times[3:] or times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="sizes for Triton's interpreter")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, given.dtype) if device == "cuda" else torch.float32  # the interpreter knows no bfloat16
    T, B, rounds = (2, 2, 1) if given.tiny else (64, 16, 30)
    where = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    print(f"{where}, torch {torch.__version__}, {dtype}, T={T}, B={B}: forward and backward")
    for name, sizes in (TINY if given.tiny else SIZES).items():
        medians = {}
        for backend in ("reference", "triton"):
            with ops.use_backend(backend):
                function = work(sizes, T, B, device, dtype)
                medians[backend] = milliseconds(function, device, rounds)
                if device == "cuda":
                    medians[f"{backend} as a graph"] = milliseconds(graphed(function), device, rounds)
        print(f"{name:28}", ", ".join(f"{key} {value:.2f} ms" for key, value in medians.items()), flush=True)


if __name__ == "__main__":
    main()
