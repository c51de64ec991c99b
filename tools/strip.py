"""A picture as it appears: one animated WebP over the sampler's steps.

Read before: sample.py.

    python tools/strip.py --prompt "a red circle to the left of a blue square" --out strip.webp

Above is x_t, what the sampler holds: noise at first, data at last. Below is x_t - t v, the picture
to which the velocity points from there: what the model would draw if it had to end at once. The
first of these is a blur, the mean of all pictures that fit the prompt; early steps settle where
things are, late ones their edges. Latents are decoded as they are, so noise looks like whatever the
autoencoder makes of it.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import lens  # noqa: E402  (the path above comes first)
import sample  # noqa: E402
from data import grid_of  # noqa: E402
from kit.checkpoint import PARTS, fetch, load_pipeline, read_metadata  # noqa: E402
from kit.files import Parser, replace_file, run_command  # noqa: E402
from kit.images import contact_sheet  # noqa: E402
from kit.run import pick_device  # noqa: E402


def strip(prompt, weights, seed=0):
    """[PIL image], one a step: x_t above the data it points to. The last shows the finished
    picture twice."""
    folder = fetch(weights, PARTS)
    notes = read_metadata(folder)
    pipeline = load_pipeline(folder, pick_device())
    transformer, vae, _ = pipeline
    steps, guidance = sample.sampler_settings(notes)
    base = sample.usual_base(notes, transformer.config.in_channels)
    grid = grid_of((base, base))
    levels = lens.sigmas(grid[0] * grid[1], steps)             # [steps + 1]

    frames = []

    def keep(i, x, v):
        # After step i, v is still the velocity of the point before it, so that x - t v at the new
        # level is the same guess as before the step: it lies on the line that Euler followed.
        guess = lens.data_prediction(x, v, levels[i + 1])
        shown = [*sample.to_pictures(vae, x, grid), *sample.to_pictures(vae, guess, grid)]
        frames.append(contact_sheet(shown, columns=1))

    sample.generate([prompt], pipeline, seed=seed, height=base, width=base, steps=steps,
                    guidance=guidance, on_step=keep)
    return frames


def main(argv=None):
    parser = Parser("One animated WebP of a picture over the sampler's steps.", __doc__)
    add = parser.add_argument
    add("--prompt", default="a red circle to the left of a blue square")
    add("--weights", default=sample.TOY, metavar="DIR")
    add("--seed", type=int, default=0)
    add("--out", default="strip.webp", metavar="FILE.webp")
    args = parser.parse_args(argv)

    frames = strip(args.prompt, args.weights, args.seed)
    times = [200] * (len(frames) - 1) + [2500]                 # milliseconds; the last one stays
    replace_file(args.out, lambda beside: frames[0].save(
        beside, "WEBP", save_all=True, append_images=frames[1:], duration=times, loop=0,
        quality=60, method=6))
    print(f"{args.out}: {len(frames)} steps, {Path(args.out).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_command(main)
