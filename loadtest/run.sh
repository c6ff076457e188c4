#!/bin/sh
# Runs one scenario: starts a registry with images, and in front of it one dray or several that are peers, then runs
# k6 and stops everything. Only the files that OUT names remain.
#
#   loadtest/run.sh rollout                 # pull manifests blobs ranges rollout churn origin-down compare
#   DRAYS=4 NODES=100 loadtest/run.sh rollout
#   OUT=/tmp/churn loadtest/run.sh churn    # also /tmp/churn.json and /tmp/churn.html
#
# DRAY     the program          (target/release/dray, or dray from the path)
# K6       the program          (target/tools/k6, or k6 from the path)
# DRAYS    number of drays      (4 for rollout, otherwise 1)
# SIZE     bytes of a layer     (8000000)
# COUNT    images               (12 for churn, otherwise 4)
# DISK     of each dray         (a third of all images for churn, at least 64 MiB; otherwise 4GiB)
# The scenario lists its own variables at its head; they are passed on.
set -eu
scenario=${1:?which scenario? $(cd "$(dirname "$0")" && ls *.js | sed 's/\.js$//' | tr '\n' ' ')}
here=$(cd "$(dirname "$0")" && pwd)
[ -e "$here/$scenario.js" ] || { echo "no scenario $scenario" >&2; exit 2; }
find_program() { # NAME BUILT
    if [ -x "$2" ]; then echo "$2"; else command -v "$1" || { echo "$1 is missing: build it, or install it" >&2; exit 1; }; fi
}
dray=${DRAY:-$(find_program dray "$here/../target/release/dray")}
k6=${K6:-$(find_program k6 "$here/../target/tools/k6")}
command -v docker-registry >/dev/null || { echo "docker-registry is missing: install it" >&2; exit 1; }

is() { [ "$scenario" = "$1" ]; }
is rollout && drays=${DRAYS:-4} || drays=${DRAYS:-1}
is churn && count=${COUNT:-12} || count=${COUNT:-4}
size=${SIZE:-8000000}
disk=${DISK:-4GiB}
# dray reserves an eighth of the disk for small objects.
if is churn && [ -z "${DISK:-}" ]; then
    third=$((size * count / 3 * 8 / 7 + 1))
    [ $third -gt 67108864 ] || third=67108864
    disk=${third}B
fi

work=$(mktemp -d)
pids=""
stop() {
    for pid in $pids; do kill "$pid" 2>/dev/null || true; done
    for pid in $pids; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

# The first port of a free range.
first=$((3000 + $$ % 5000))
while ss -Hltn "sport >= :$first and sport <= :$((first + 40))" | grep -q .; do first=$((first + 41)); done
registry_port=$first
start_registry() {
    docker-registry serve "$work/registry.yml" >"$work/registry.log" 2>&1 &
    registry=$!
    pids="$pids $registry"
}
printf 'version: 0.1\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: "127.0.0.1:%s"}\n' "$work/registry" "$registry_port" >"$work/registry.yml"
start_registry
wait_for() { # URL
    for _ in $(seq 100); do curl -fsS -o /dev/null "$1" 2>/dev/null && return; sleep 0.1; done
    echo "$1 does not respond" >&2
    exit 1
}
wait_for "http://127.0.0.1:$registry_port/v2/"
images=""
for nth in $(seq "$count"); do
    "$here/seed.sh" "http://127.0.0.1:$registry_port" "team/app$nth" 1 "$size" $((size / 10)) 20000
    images="$images${images:+,}load.example/team/app$nth:1"
done

members="" bases=""
for nth in $(seq "$drays"); do members="$members${members:+, }\"127.0.0.1:$((first + 3 * nth))\""; done
for nth in $(seq "$drays"); do
    {
        printf '[[registry]]\nmatch = "load.example"\nupstreams = ["http://127.0.0.1:%s"]\ntag_ttl = "5s"\n' "$registry_port"
        [ "$drays" = 1 ] || printf '[peers]\nlisten = "127.0.0.1:%s"\nstatic = [%s]\n' $((first + 3 * nth)) "$members"
    } >"$work/dray$nth.toml"
    port=$((first + 3 * nth + 1))
    "$dray" --config "$work/dray$nth.toml" --listen "127.0.0.1:$port" --admin "127.0.0.1:$((port + 1))" \
        --cache-dir "$work/cache$nth" --cache-disk "$disk" --log warn,access=off >"$work/dray$nth.log" 2>&1 &
    pids="$pids $!"
    bases="$bases${bases:+,}http://127.0.0.1:$port"
    wait_for "http://127.0.0.1:$((port + 1))/readyz"
done

base=${bases%%,*}
set -- run --quiet --no-usage-report --env "BASE=$base" --env "BASES=$bases" --env "IMAGES=$images"
for name in VUS ITERATIONS DURATION RATE BURST NODES HOT PIECE P95_MS PLATFORM OUT; do
    eval "value=\${$name:-}"
    [ -z "$value" ] || set -- "$@" --env "$name=$value"
done
# Compares the dray with the registry itself.
is compare && set -- "$@" --env "BASE_A=$base" --env "BASE_B=http://127.0.0.1:$registry_port"
"$k6" "$@" "$here/$scenario.js" &
running=$!
if is origin-down; then
    third=$((${DURATION:-30} / 3))
    sleep $((third + 1))
    kill "$registry" && wait "$registry" 2>/dev/null || true
    sleep "$third"
    start_registry
fi
status=0
wait $running || status=$?
if [ $status != 0 ]; then cat "$work"/dray*.log >&2; fi
exit $status
