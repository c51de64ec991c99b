"""Do our numbers agree with the reference's, on the real weights? For those who have both.

Read before: sample.py.

    python tools/parity.py DIR --reference CLONE
    python tools/parity.py DIR --reference CLONE --prompt "..." --side 512 --device cuda

DIR is the released model in diffusers layout; CLONE is a clone of Microsoft's code, whose package
is called `lens`, like our lens.py. It needs diffusers; so the reference runs in a process of its
own, first, and writes what it computed:

    tokens     the ids of the whole chat, with today's date, as the reference has it
    features   what its language model gives to the denoiser
    velocity   what its denoiser answers at the first step, t = 1
    picture    after all steps under guidance, from our noise

Then this process computes the same: features from its own tokens, the velocity from the reference's
features, the picture from its own features. What must hold is said beside each number; a missed
line ends the command with an error. In bf16 two right programs differ by rounding alone, which
the limits allow for.
"""
import datetime
import inspect
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Nothing that imports our lens.py: the inner process needs that name for theirs.
from kit.files import Parser, positive, require, run_command  # noqa: E402

PROMPT = 'A red fox in a snowy forest at sunrise, beside a wooden sign that says "LENS".'
COSINE = 0.99999         # of each token's features, and of the whole velocity
ERROR = 0.02             # of the velocity: length of the difference over its length; bf16
DECIBEL = 45.0           # PSNR of the picture


# --- The reference, in a process of its own -------------------------------------------------------

def run_reference(folder, clone, prompt, side, steps, guidance, device, dtype, file):
    """Runs the reference and writes its numbers to a safetensors file."""
    sys.path.insert(0, clone)
    from lens import LensPipeline  # theirs

    pipe = LensPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    noise = first_noise(side, pipe.transformer.config.in_channels)
    first = {}

    def keep_first(module, positional, named, output):
        if not first:
            # In order: the module, hidden states, features of each layer, their mask, time, shapes.
            signature = inspect.signature(type(module).forward)
            given = list(signature.bind(module, *positional, **named).arguments.values())
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            first.update(x=given[1][:1], mask=given[3][:1], t=given[4][:1], velocity=output[:1])
            first.update({f"features.{k}": layer[:1] for k, layer in enumerate(given[2])})

    hook = pipe.transformer.register_forward_hook(keep_first, with_kwargs=True)
    picture = pipe(prompt=prompt, negative_prompt="", height=side, width=side,
                   num_inference_steps=steps, guidance_scale=guidance,
                   latents=noise.to(device, dtype), output_type="pil").images[0]
    hook.remove()

    ids, _ = pipe._build_chat_inputs([prompt], 512, torch.device(device))
    first.update(ids=ids, picture=torch.tensor(list(picture.convert("RGB").tobytes())))
    save_file({name: t.detach().cpu().contiguous() for name, t in first.items()}, file)


def first_noise(side, channels):
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, (side // 16)**2, channels), generator=generator)


# --- Ours, beside it ------------------------------------------------------------------------------

def compare(folder, theirs, prompt, side, steps, guidance, device, dtype):
    """-> [(what, number, limit, whether it holds)]."""
    import sample
    from kit.checkpoint import load_pipeline

    rows = []
    today = datetime.date.today().isoformat()
    _, _, encoder = load_pipeline(folder, device, dtype, parts=("text_encoder",), date=today)
    (ids,), _ = encoder.tokenize([prompt])
    pairs = itertools.zip_longest(ids, theirs["ids"][0].tolist())
    differ = sum(one != other for one, other in pairs)
    rows.append(("tokens that differ", differ, "none", differ == 0))

    ours = encoder.encode_each([prompt])[0].float().cpu()                          # [K, S, E]
    visible = theirs["mask"][0].bool()
    layers = [theirs[f"features.{k}"][0, visible].float() for k in range(len(ours))]
    for k, layer in enumerate(layers):
        if layer.shape != ours[k].shape:
            rows.append((f"features of layer {k}: shapes {list(ours[k].shape)} and "
                         f"{list(layer.shape)}", 0.0, "equal", False))
            continue
        cosine = torch.cosine_similarity(ours[k], layer, dim=-1).min().item()
        rows.append((f"features of layer {k}, cosine of the worst token", cosine,
                     f">= {COSINE}", cosine >= COSINE))
    del encoder

    model, vae, _ = load_pipeline(folder, device, dtype, parts=("transformer", "vae"))
    grid = (side // 16, side // 16)
    text = [layer[None].to(device, dtype) for layer in layers]
    with torch.no_grad():
        v = model(theirs["x"].to(device, dtype), theirs["t"].to(device).float(), text, None, grid)
    v, expected = v.float().cpu().flatten(), theirs["velocity"].float().flatten()
    cosine = torch.cosine_similarity(v, expected, dim=0).item()
    error = ((v - expected).norm() / expected.norm()).item()
    rows.append(("velocity at t = 1, cosine", cosine, f">= {COSINE}", cosine >= COSINE))
    rows.append(("velocity at t = 1, relative error", error, f"<= {ERROR}", error <= ERROR))

    noise = first_noise(side, model.config.in_channels).to(device)
    text = list(ours[:, None].to(device, dtype))
    tokens = sample.denoise(model, noise, text, None, grid, steps, guidance)
    (picture,) = sample.to_pictures(vae, tokens, grid)
    a = torch.tensor(list(picture.tobytes())).double()
    mean_square = (a - theirs["picture"].double()).square().mean().clamp_min(1e-9)
    psnr = (10 * torch.log10(255**2 / mean_square)).item()
    rows.append((f"picture after {steps} steps, PSNR in dB", psnr, f">= {DECIBEL:g}",
                 psnr >= DECIBEL))
    return rows


def main(argv=None):
    parser = Parser("Hold our numbers against the reference's, on the real weights.", __doc__)
    add = parser.add_argument
    add("folder", metavar="DIR", help="the released model in diffusers layout")
    add("--reference", required=True, metavar="CLONE", help="a clone of Microsoft's code")
    add("--prompt", default=PROMPT, help="default: a fox and a sign")
    add("--side", type=positive, default=1024,
        help="pixels of the square picture (default: %(default)s)")
    add("--steps", type=positive, default=20, help="default: %(default)s; of a four-step model 4")
    add("--guidance", type=float, default=5.0,
        help="default: %(default)s; of a four-step model 1")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: CUDA if there is one")
    add("--dtype", default="bf16", choices=("bf16", "fp32"), help="default: %(default)s")
    add("--write-reference", metavar="FILE",
        help="run the reference alone and write its numbers there, as the other process does")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    require(Path(args.folder).is_dir(), f"{args.folder}: no such folder")
    require(Path(args.reference).is_dir(), f"--reference {args.reference}: no such folder")
    require(args.prompt.strip(), "--prompt is empty: say what the picture should show")
    require(args.side % 16 == 0, f"--side {args.side}: must be divisible by 16")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    how = dict(prompt=args.prompt, side=args.side, steps=args.steps, guidance=args.guidance,
               device=args.device, dtype=dtype)

    if args.write_reference:
        run_reference(args.folder, args.reference, **how, file=args.write_reference)
        return

    with tempfile.TemporaryDirectory() as scratch:
        file = str(Path(scratch) / "reference.safetensors")
        print("the reference computes ...", flush=True)
        done = subprocess.run([sys.executable, __file__, *argv, "--write-reference", file])
        require(done.returncode == 0, "the reference did not run (its last lines are above): it "
                "needs diffusers, and DIR in diffusers layout")
        print("and we do ...", flush=True)
        rows = compare(args.folder, load_file(file), **how)

    for what, number, limit, holds in rows:
        print(f"{'holds ' if holds else 'FAILS '} {what}: {number:.6g} ({limit})")
    failed = sum(not holds for *_, holds in rows)
    require(failed == 0, f"{failed} of {len(rows)} numbers do not hold")


if __name__ == "__main__":
    run_command(main)
