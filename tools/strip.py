"""A picture as it appears: one animated WebP over the sampler's steps.

Read before: sample.py.

    python tools/strip.py --prompt "a red circle to the left of a blue square" --out strip.webp

Above is x_t, what the sampler holds: noise at first, data at last. Below is x_t - t v, the picture
to which the velocity points from there: what the model would draw if it had to end at once. The
first of these has a rough patch where each thing will be, for it comes near the mean of all
pictures that fit the prompt; early steps settle where things are, late ones their edges. Latents
are decoded as they are, so noise looks like whatever the autoencoder makes of it.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import lens  # noqa: E402  (the path above comes first)
import sample  # noqa: E402
from kit.checkpoint import load_vae  # noqa: E402
from kit.files import Parser, replace_file, run_command, seed_number, user_path  # noqa: E402
from kit.images import contact_sheet  # noqa: E402
from kit.places import PARTS, fetch  # noqa: E402
from kit.run import pick_device  # noqa: E402


def strip(prompt, weights, seed=0):
    """[PIL image], one a step: x_t above the data it points to. The last shows the finished
    picture twice."""
    folder = fetch(weights, PARTS)
    points = []                                                # [(x, v)] of each step

    def keep(i, x, v):
        points.append((x, v))

    sample.generate([prompt], weights=folder, seed=seed, on_step=keep)

    tokens = points[0][0].shape[1]
    side = math.isqrt(tokens)                                  # of a square, which is the default
    levels = lens.sigmas(tokens, len(points))                  # [steps + 1]
    vae = load_vae(folder, pick_device())
    frames = []
    for (x, v), level in zip(points, levels[1:]):
        # x is where the step ended, and v the velocity where it began. x - t v is the same guess
        # from both ends: Euler's step follows the line between them.
        guess = lens.data_prediction(x, v, level)
        shown = [sample.to_pictures(vae, held, (side, side))[0] for held in (x, guess)]
        frames.append(contact_sheet(shown, columns=1))
    return frames


def main(argv=None):
    parser = Parser("One animated WebP of a picture over the sampler's steps.", __doc__)
    add = parser.add_argument
    add("--prompt", default="a red circle to the left of a blue square",
        help="default: %(default)s")
    add("--weights", default=sample.TOY, metavar="DIR", help="default: weights/toy")
    add("--seed", type=seed_number, default=0, help="default: %(default)s")
    add("--out", type=user_path, default="strip.webp", metavar="FILE.webp",
        help="default: %(default)s")
    args = parser.parse_args(argv)

    frames = strip(args.prompt, args.weights, args.seed)
    times = [200] * (len(frames) - 1) + [2500]                 # milliseconds; the last one stays
    replace_file(args.out, lambda beside: frames[0].save(
        beside, "WEBP", save_all=True, append_images=frames[1:], duration=times, loop=0,
        quality=60, method=6))
    print(f"{args.out}: {len(frames)} steps, {Path(args.out).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_command(main)
