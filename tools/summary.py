"""What a speedrun made: a table of its stages, and a strip of pictures, one row a stage.

Read before: sample.py; tools/speedrun.sh, which ends with this.

    python tools/summary.py runs/speedrun

The same twelve held-out prompts, two of each task, with seeds 0 to 11, after each stage; they are
not selected. What a denoiser made was made by `sample.generate`, as `sample.py` would.
"""
import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import data  # noqa: E402  (the path above comes first)
import sample  # noqa: E402
from kit.checkpoint import load_pipeline, load_vae  # noqa: E402
from kit.files import Parser, read_text, require, run_command, user_path, write_text  # noqa: E402
from kit.images import contact_sheet, read_notes, save_picture, wrapped  # noqa: E402
from kit.places import read_metadata  # noqa: E402
from kit.run import pick_device  # noqa: E402
from toy.checker import held_out_rows  # noqa: E402
from toy.world import draw  # noqa: E402

# Rows of the table: what it is called, the stage that made it, the folder of its scores.
TABLE = (
    ("autoencoder", "autoencoder", None),
    ("text encoder", "text-encoder", None),
    ("denoiser", "denoiser", "denoiser"),
    ("denoiser, guidance 1", None, "plain"),
    ("reward RL, guidance 1", "rl", "rl"),
    ("brief requests, as asked", None, "brief"),
    ("brief requests, rewritten", "search", "search"),
    ("four steps, guidance 1", "turbo", "turbo"),
)
SHOWN = ("overall", "fidelity", "outline")     # of the scores of an evaluation
PER_TASK = 2                                   # prompts of the strip


# --- The table ------------------------------------------------------------------------------------

def table(out):
    """The stages of the speedrun in `out` as a table in Markdown: minutes and scores."""
    seconds = seconds_of(out / "stages" / "seconds.txt")
    seconds.pop("summary", None)                   # of a summary before this one
    total = minutes(sum(seconds.values()))
    lines = ["| stage | minutes | score | fidelity (0 is best) | outline |",
             "|---|---|---|---|---|"]
    for title, stage, scored in TABLE:
        cells = ["-"] * (1 + len(SHOWN))
        if stage:
            cells[0] = minutes(seconds.pop(stage, 0))
        if scored:
            scores = scores_in(out / "scores" / scored)
            cells[1:] = [f"{scores[name]:.2f}" for name in SHOWN]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    # What is left are the evaluations, and what --long exports.
    lines.append(f"| evaluations and the rest | {minutes(sum(seconds.values()))} | - | - | - |")
    lines.append(f"| all | {total} | - | - | - |")
    return "\n".join(lines) + "\n"


def seconds_of(path):
    """{stage: seconds}, all times together that it was run: one that was stopped has several."""
    seconds = {}
    for line in read_text(path).splitlines():
        stage, number = line.split()
        seconds[stage] = seconds.get(stage, 0) + int(number)
    return seconds


def minutes(seconds):
    return f"{seconds / 60:.1f}"


def scores_in(folder):
    """{name: score} of the newest evaluation in a folder: sample.py notes them in its picture."""
    files = sorted(folder.glob("eval*.png"), key=lambda path: path.stat().st_mtime)
    require(files, f"{folder} holds no evaluation: run tools/speedrun.sh to its end first")
    return json.loads(read_notes(files[-1])["score"])


# --- The strip ------------------------------------------------------------------------------------

def strip(out, rewritten):
    """One picture: a row of twelve for each stage, with its title at the left.

    rewritten   what the reasoner made of brief requests for the same scenes
    """
    toy = out / "toy"
    side = home_side(toy)
    rows = held_out_rows(PER_TASK, side, side)
    prompts = [row.prompt for row in rows]
    drawn = [draw(row.scene, side, side) for row in rows]

    def pictures(asked, weights, guidance=None):
        return sample.generate(asked, weights=weights, height=side, width=side, guidance=guidance)

    shown = {
        "drawn": drawn,
        "autoencoder": through_autoencoder(load_vae(toy, pick_device(), torch.float32), drawn),
        "denoiser": pictures(prompts, toy),
        "reward RL, guidance 1": pictures(prompts, out / "rl", guidance=1.0),
        "brief requests, rewritten": pictures(rewritten, toy),
        "four steps, guidance 1": pictures(prompts, out / "turbo"),
    }
    cells = []
    for title, row in shown.items():
        cells += [title_cell(title, side), *row]
    return contact_sheet(cells, columns=1 + len(rows))


def rewrite_brief_requests(weights, system_prompt):
    """[prompt]: the strip's scenes, asked for in few words, and rewritten by the text encoder of
    `weights` under the system prompt of a file."""
    side = home_side(weights)
    requests = [row.prompt for row in held_out_rows(PER_TASK, side, side, "brief")]
    _, _, encoder = load_pipeline(weights, pick_device(), torch.float32, parts=("text_encoder",))
    reasoner = sample.make_reasoner(read_metadata(weights), encoder, system_prompt=system_prompt)
    return reasoner.rewrite(requests)


def home_side(weights):
    """Side of the pictures that these weights draw by default, in pixels."""
    return int(read_metadata(weights)["base"])


@torch.no_grad()
def through_autoencoder(vae, pictures):
    """PIL images of one size, encoded and decoded: the best that a denoiser could do."""
    width, height = pictures[0].size
    return sample.to_pictures(vae, sample.to_tokens(vae, pictures), data.grid_of((height, width)))


def title_cell(title, side):
    """A white picture with a few words in it."""
    cell = Image.new("RGB", (side, side), "white")
    font = ImageFont.load_default(max(10, side // 8))
    ImageDraw.Draw(cell).multiline_text((0, side // 4), "\n".join(wrapped(title, font, side)),
                                        "black", font)
    return cell


# --- The command line -----------------------------------------------------------------------------

def main(argv=None):
    parser = Parser("The table and the strip of pictures of a speedrun.", __doc__)
    parser.add_argument("out", nargs="?", type=user_path, default="runs/speedrun", metavar="OUT",
                        help="what tools/speedrun.sh filled (default: %(default)s)")
    out = Path(parser.parse_args(argv).out)

    text = table(out)
    write_text(out / "table.md", text)
    print(text)
    rewritten = rewrite_brief_requests(out / "toy", out / "search" / "best.txt")
    save_picture(strip(out, rewritten), out / "stages.webp", {
        "pictures": "two held-out prompts of each task, seeds 0 to 11, a row for each stage"})
    print(f"{out / 'table.md'}, {out / 'stages.webp'}")


if __name__ == "__main__":
    run_command(main)
