#!/usr/bin/env bash
# Run one command on TPU slices of a GKE cluster, by xpk.
#
#   launch/tpu_xpk.sh --cluster C --workload W --tpu TYPE [--slices N] [--image I] [--zone Z] [--dry-run] -- COMMAND...
#
# TYPE: v5p-128, v5litepod-256, ... Without --image, xpk builds one from the repository on its base image. Checkpoints
# must lie on a mounted bucket: give the command an --out on it.
set -euo pipefail
cluster= workload= tpu= slices=1 image= zone= dry=
usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
need() { [ $# -ge 2 ] && [ -n "$2" ] || { echo "error: $1 needs a value" >&2; exit 2; }; }
while [ $# -gt 0 ]; do
  case $1 in
    --cluster) need "$@"; cluster=$2; shift 2 ;;
    --workload) need "$@"; workload=$2; shift 2 ;;
    --tpu) need "$@"; tpu=$2; shift 2 ;;
    --slices) need "$@"; slices=$2; shift 2 ;;
    --image) need "$@"; image=$2; shift 2 ;;
    --zone) need "$@"; zone=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "error: unknown option $1" >&2; usage ;;
  esac
done
[ -n "$cluster" ] && [ -n "$workload" ] && [ -n "$tpu" ] && [ $# -gt 0 ] || usage
[[ $slices =~ ^[1-9][0-9]*$ ]] || { echo "error: --slices $slices is no number of slices" >&2; exit 2; }
command=$(printf '%q ' "$@")
root=$(cd "$(dirname "$0")/.." && pwd)
run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
if [ -n "$image" ]; then
  from=(--docker-image "$image")
else
  from=(--base-docker-image python:3.12 --script-dir "$root")
  command="python3 -m pip install -q -e '.[tpu]' && $command"
fi
run xpk workload create --cluster "$cluster" --workload "$workload" --tpu-type "$tpu" --num-slices "$slices" \
  ${zone:+--zone "$zone"} "${from[@]}" --command "$command"
