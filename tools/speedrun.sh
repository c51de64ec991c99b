#!/usr/bin/env bash
# The whole life of the toy in one command: from random numbers, without a network, to a table of
# scores and a strip of pictures.
#
#     bash tools/speedrun.sh                          # into runs/speedrun; some hours on two cores
#     bash tools/speedrun.sh --long runs/long         # both stages of the denoiser, and OUT/weights
#     bash tools/speedrun.sh --size nano runs/nano    # a few steps of everything: two minutes
#     bash tools/speedrun.sh --dry-run                # prints the commands alone
#
# A relative OUT lies in the repository. The same command goes on where it was stopped, by Ctrl-C or
# `kill`: what is done is skipped, and a training resumes. Stop this script, not the command that it
# runs: a training that is stopped alone has saved and ends well, which looks as if it were done.
# After `kill -9` of this script its last command goes on alone. Until that has ended, the same
# command answers that another run is at work there; the seconds of that part are not counted.
#
# OUT/toy, OUT/rl, OUT/search, OUT/turbo    what is made
# OUT/scores/NAME/eval.png                  pictures of an evaluation, its scores in the notes
# OUT/stages/NAME.done, seconds.txt         by which command it was done, and how long it took
# OUT/table.md, OUT/stages.webp             the end, written by tools/summary.py

size=toy
long=no
dry_run=no
OUT=runs/speedrun

while [ $# -gt 0 ]; do
    case $1 in
        --size) shift; size=$1 ;;
        --long) long=yes ;;
        --dry-run | -n) dry_run=yes ;;
        --help | -h) sed -n '2,/^$/s/^#\( \|$\)//p' "$0"; exit ;;
        -*) echo "error: no option $1: see --help" >&2; exit 2 ;;
        *) OUT=${1%/} ;;
    esac
    shift
done
cd "$(dirname "$0")/.." || exit

# --- Numbers: how much of everything --------------------------------------------------------------
# Options of each command, words that blanks divide. What is not named here is the script's default.

case $size in
    toy)
        autoencoder=""                                  # 20 minutes
        text_encoder=""                                 # 3,200 steps: 40 minutes on one core
        denoiser="--stage 1 --compile"                  # 8,500 steps: 40 minutes
        rl="--eval-every 0 --preview-every 0"           # 30 steps: 13 minutes
        search="--requests brief"                       # 8 candidates: 16 minutes on one core
        turbo="--eval-every 0 --preview-every 0"        # 100 steps: 10 minutes
        evaluation=""                                   # 50 prompts a task: a minute
        if [ $long = yes ]; then
            autoencoder="--minutes 60"
            denoiser="--compile"                        # both stages: 12,000 steps more
        fi
        ;;
    nano)
        autoencoder="--size nano --steps 20 --report 10"
        text_encoder="--size nano --steps 20"
        denoiser="--size nano --stage 1"
        rl="--size nano --eval-every 0 --preview-every 0"
        search="--size nano --requests brief --steps 1"
        turbo="--size nano --steps 4 --eval-every 0 --preview-every 0"
        evaluation="--per-task 2"
        if [ $long = yes ]; then
            denoiser="--size nano"
        fi
        ;;
    *)
        echo "error: --size $size: toy or nano" >&2
        exit 2
        ;;
esac

# --- How a stage is run ---------------------------------------------------------------------------

stage() {              # stage NAME COMMAND...: runs a command, unless OUT has it from before
    name=$1
    shift
    done_file=$OUT/stages/$name.done
    if [ $dry_run = no ] && [ -e "$done_file" ]; then
        if [ "$(cat "$done_file")" != "$(quoted "$@")" ]; then
            echo "error: $OUT holds another speedrun: $name was done by '$(cat "$done_file")'," \
                "not by '$(quoted "$@")'; give another OUT" >&2
            exit 2
        fi
        echo "$name: done before"
        return
    fi
    run "$@"
    if [ $dry_run = no ]; then
        quoted "$@" > "$done_file"
    fi
}

run() {                # run COMMAND...: shows it and runs it; where it fails, this script ends too
    if [ $dry_run = yes ]; then
        quoted "$@"
        return
    fi
    echo
    echo "\$ $(quoted "$@")"
    begin=$SECONDS
    # In the background, and waited for: of a signal bash hears while it waits, but not while it
    # runs a command in the foreground.
    "$@" &
    wait $!
    status=$?
    note_seconds
    if [ $status -ne 0 ]; then
        echo "stage $name failed, with status $status" >&2
        exit $status
    fi
}

quoted() {             # words as a shell reads them
    local line
    line=$(printf ' %q' "$@")
    echo "${line# }"
}

note_seconds() {       # one line for each time that a stage ran, however it ended
    echo "$name $((SECONDS - begin))" >> "$OUT/stages/seconds.txt"
    begin=$SECONDS
}

# A training that is told to stop saves and ends with status 0, as if it were done. So it is here
# that the way ends: no stage is marked, and none begins.
stop() {
    trap '' INT TERM HUP                                # the command under this is told once
    kill -TERM $(jobs -p) 2> /dev/null
    wait
    note_seconds
    echo "stopped; the same command goes on" >&2
    exit "$1"
}

name=start             # of the stage that runs
begin=0                # when it began, in seconds of this script
if [ $dry_run = no ]; then
    mkdir -p "$OUT/stages" || exit
    trap 'stop 129' HUP
    trap 'stop 130' INT
    trap 'stop 143' TERM
fi

# --- The life of a model --------------------------------------------------------------------------

# Pixels to tokens and back; captions to features; then the denoiser, which needs both.
stage autoencoder python -m toy.autoencoder $autoencoder --out "$OUT/toy"
stage text-encoder python -m toy.language $text_encoder --out "$OUT/toy"
stage denoiser python train.py $denoiser --out "$OUT/toy"
stage score-denoiser python sample.py --eval $evaluation --weights "$OUT/toy" \
    --out "$OUT/scores/denoiser"
stage score-plain python sample.py --eval $evaluation --weights "$OUT/toy" --guidance 1 \
    --out "$OUT/scores/plain"

# Rewards, which do without guidance: to be held against the line above.
stage rl python rl.py $rl --init "$OUT/toy" --out "$OUT/rl"
stage score-rl python sample.py --eval $evaluation --weights "$OUT/toy" --lora "$OUT/rl" \
    --guidance 1 --out "$OUT/scores/rl"

# A system prompt for the reasoner: brief requests as they are, and rewritten under it.
stage search python rl.py --search $search --init "$OUT/toy" --out "$OUT/search"
stage score-brief python sample.py --eval $evaluation --weights "$OUT/toy" --requests brief \
    --out "$OUT/scores/brief"
stage score-search python sample.py --eval $evaluation --weights "$OUT/toy" --requests brief \
    --reason --system-prompt "$OUT/search/best.txt" --out "$OUT/scores/search"

# Four steps without guidance.
stage turbo python distill.py $turbo --teacher "$OUT/toy" --out "$OUT/turbo"
stage score-turbo python sample.py --eval $evaluation --weights "$OUT/turbo" \
    --out "$OUT/scores/turbo"

# What weights/ holds: small files. Each adapter names its base as ../toy, from OUT/rl and from
# OUT/weights/toy-rl alike. They are written into OUT; to ship them, copy them over weights/.
if [ $long = yes ]; then
    small=$OUT/weights
    stage export-toy python train.py --export "$small/toy" --out "$OUT/toy"
    run mkdir -p "$small/toy-rl"
    stage export-rl cp -r "$OUT/rl/adapter_config.json" "$OUT/rl/adapter_model.safetensors" \
        "$OUT/rl/model_index.json" "$OUT/rl/scheduler" "$small/toy-rl"
    stage export-turbo python distill.py --size $size --lora 3 --teacher "$small/toy" \
        --out "$OUT/turbo" --export "$small/toy-turbo"
fi

name=summary
run python tools/summary.py "$OUT"
