# Sourced by every recipe, not run by itself. It reads three environment variables and defines two
# functions.
#
#   MINUTES_SCALE   multiplies minutes of training, numbers of clips and sizes of evaluations;
#                   default 1. 0.01 is a smoke run: every step runs, no figure means anything.
#   DATASETS, RUNS  folders of the prepared sets and of the trainings; default datasets and runs.
#
# The small sets of a smoke run must not stand where the full run looks for its own. So at any other
# scale than 1 the two folders have other defaults: datasets/scale_0.01 and runs/scale_0.01.
MINUTES_SCALE=${MINUTES_SCALE:-1}
below=/scale_$MINUTES_SCALE
[ "$MINUTES_SCALE" = 1 ] && below=
DATASETS=${DATASETS:-datasets$below}
RUNS=${RUNS:-runs$below}

# scaled N: N minutes at this scale, at least 0.05 (3 seconds).
# scaled N MINIMUM: a count at this scale, a whole number that is MINIMUM or more.
scaled() {
    LC_ALL=C awk -v n="$1" -v least="${2:-0}" -v scale="$MINUTES_SCALE" 'BEGIN {
        if (least) { x = int(n * scale + 0.5); printf "%d", x < least ? least : x }
        else { x = n * scale; printf "%.6g", x < 0.05 ? 0.05 : x } }'
}

# once PATH COMMAND...: run the command that makes PATH; skip it, and say so, where PATH exists.
once() {
    local path=$1
    shift
    if [ -e "$path" ]; then
        echo "== $path exists, skipped"
    else
        echo "== $*"
        "$@"
    fi
}
