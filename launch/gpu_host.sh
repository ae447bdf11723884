#!/usr/bin/env bash
# Run one command on the GPUs of this host: in one process that sees all of them, or in one process each.
#
#   launch/gpu_host.sh [--processes N] [--port PORT] [--dry-run] -- COMMAND...
#
# With --processes the command must take --coordinator, --processes and --process (`jaxformers train` does); process i
# gets GPU i. The script ends with the first code that is not 0, and ends the other processes then.
set -euo pipefail
processes=1 port=12355 dry=
usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
need() { [ $# -ge 2 ] && [ -n "$2" ] || { echo "error: $1 needs a value" >&2; exit 2; }; }
while [ $# -gt 0 ]; do
  case $1 in
    --processes) need "$@"; processes=$2; shift 2 ;;
    --port) need "$@"; port=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "error: unknown option $1" >&2; usage ;;
  esac
done
[ $# -gt 0 ] || usage
[[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "error: --processes $processes is no number of processes" >&2; exit 2; }
run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
if [ "$processes" -eq 1 ]; then run "$@"; exit; fi
pids=()
stop() { [ ${#pids[@]} -eq 0 ] || kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap stop TERM INT
for ((i = 0; i < processes; i++)); do
  one=(env "CUDA_VISIBLE_DEVICES=$i" "$@" --coordinator "localhost:$port" --processes "$processes" --process "$i")
  if [ -n "$dry" ]; then run "${one[@]}"; else "${one[@]}" & pids+=($!); fi
done
[ -z "$dry" ] || exit 0
code=0
for ((left = processes; left > 0; left--)); do
  wait -n "${pids[@]}" || { code=$?; stop; wait "${pids[@]}" 2>/dev/null || true; break; }
done
exit "$code"
