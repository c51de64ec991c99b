"""What one step really takes at full size, beside what `--dry-run` counts: real code, random weights, random text and pictures.

    python tests/full_step.py rl --area 512                      # a group's loss, there and back, and the optimiser's step
    python tests/full_step.py distill --area 256 --rank 16       # four updates of fake and heads, one of the student

Peak memory is the allocator's on a GPU, the process's resident size on a CPU (Python and PyTorch themselves, about 0.5 GiB, are in it).
At full size it needs 12 to 24 GiB and minutes; a test runs it with `--size nano`."""
import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import lens
import rl
import sample
import train


def random_model(size, device, dtype):
    """Weights are never held twice: 16 GiB of fp32 would not fit twice on the machines that this is for."""
    with torch.device("meta"):
        model = lens.LensTransformer(lens.SIZES[size].transformer)
    model = model.to(dtype).to_empty(device=device).eval()
    block = 0.02 * torch.randn(2**20, device=device, dtype=dtype)                  # over and over: 4 billion draws take minutes on a CPU
    with torch.no_grad():
        for p in model.parameters():
            for part in p.view(-1).split(len(block)):
                part.copy_(block[:len(part)]) if p.ndim > 1 else part.fill_(0.5)
    return model


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rl", "distill"))
    parser.add_argument("--size", default="full")
    parser.add_argument("--area", type=int, default=512)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--text", type=int, default=128, help="text tokens")
    given = parser.parse_args(argv)
    args, config = argparse.Namespace(**vars(given)), lens.SIZES[given.size].transformer
    args.device, args.seed, args.ranks, args.lr = sample.pick_device(None), 0, 1, 1e-4
    args.compile = args.fsdp = False
    grid, text = (args.area // 16, args.area // 16), [torch.randn(args.pictures, args.text, config.enc_hidden_dim, device=args.device)
                                                      for _ in config.selected_layer_index]
    tokens = torch.randn(args.pictures, grid[0] * grid[1], config.in_channels, device=args.device)
    kept = train.activations(config, "full" if args.size == "full" else "none", args.pictures, grid, args.text)
    if args.what == "rl":
        args.how = rl.SETTINGS["full"]._replace(rank=args.rank, alpha=2.0 * args.rank, times=1, batch=args.pictures, group=args.pictures)
        model = random_model(args.size, args.device, torch.bfloat16)
        base = sum(p.numel() for p in model.parameters())
        named, optimizer = rl.make_policies(args, model)
        adapter = sum(p.numel() for p in named.values())
        counted = rl.fixed_bytes(base, adapter) + kept
        text = [layer[:1].bfloat16() for layer in text]

        def step():
            rl.group_loss(args, model, model, tokens, torch.rand(args.pictures), text, 0, 0, (args.area, args.area), args.how,
                          args.pictures, True)
            optimizer.step()
    else:
        args.lora, args.without, args.guidance, args.how, args.bf16 = args.rank, set(), 5.0, distill.SETTINGS["full"], True
        model = random_model(args.size, args.device, torch.float32)
        base = sum(p.numel() for p in model.parameters())
        distill.make_nets(args, model, torch.bfloat16)
        args.heads = distill.make_heads(config, 0).to(args.device)
        adapter = sum(p.numel() for p in args.trained["student"].values())
        counted = distill.fixed_bytes(base, adapter, sum(p.numel() for p in args.heads.parameters())) + 2 * kept
        optimizers = distill.make_optimizers(args, dict.fromkeys(("student", "fake", "heads"), args.lr))
        mask = torch.ones(text[0].shape[:2], dtype=torch.bool, device=args.device)
        levels = lens.sigmas(tokens.shape[1], distill.STEPS)
        batch = lambda k: distill.Batch(tokens, (text, mask, grid), levels, k, torch.randn_like(tokens), torch.Generator().manual_seed(k))

        def step():
            for k in range(distill.CRITIC):
                distill.critic_update(args, batch(k), optimizers)
            distill.student_update(args, batch(distill.STEPS - 1), optimizers)
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize() if args.device != "cpu" else None
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if args.device != "cpu" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {**vars(given), "device": args.device, "parameters": base, "adapter": adapter, "counted_gib": round(counted / 2**30, 4),
             "peak_gib": round(peak / 2**30, 4), "seconds": round(seconds, 1)}
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
