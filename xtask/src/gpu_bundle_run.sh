#!/bin/sh
# Runs every device test of this folder; a missing GPU is a failure. Arguments go to each test, such as a filter.
# `run.sh bench [FILTER] [--kernels] [--steps=N]` times training steps instead, as `cargo xtask bench --device cuda`.
cd "$(dirname "$0")" || exit 1
if [ "$1" = bench ]; then
    shift
    ./benches/gpu_step "$@" || exit 1
    exec ./benches/gpu_ode "$@"
fi
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
summary=
failed=0
for test in tests/*; do
    echo "== $test"
    HALFMODE_REQUIRE_CUDA=1 "./$test" --test-threads 1 "$@" >"$log" 2>&1
    code=$?
    cat "$log"
    [ "$code" -eq 0 ] || failed=1
    result=$(grep '^test result' "$log" || echo "no result: it ended early")
    summary="$summary$(printf '%-32s exit %-3s %s' "${test#tests/}" "$code" "$result")
"
done
printf '\n%s' "$summary"
exit "$failed"
