#!/usr/bin/env bash
# Run one command on all hosts of a TPU pod slice.
#
#   launch/tpu_gcloud.sh --name NAME --zone ZONE [--create TYPE] [--version V] [--project P] [--dry-run] -- COMMAND...
#
# --create TYPE (v5p-128, v5litepod-16, ...) makes the slice first, as a queued resource. The repository is copied to
# ~/jaxformers on every host and installed there with the extra `tpu`.
set -euo pipefail
name= zone= create= project= dry= version=v2-alpha-tpuv5
usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
need() { [ $# -ge 2 ] && [ -n "$2" ] || { echo "error: $1 needs a value" >&2; exit 2; }; }
while [ $# -gt 0 ]; do
  case $1 in
    --name) need "$@"; name=$2; shift 2 ;;
    --zone) need "$@"; zone=$2; shift 2 ;;
    --create) need "$@"; create=$2; shift 2 ;;
    --version) need "$@"; version=$2; shift 2 ;;
    --project) need "$@"; project=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "error: unknown option $1" >&2; usage ;;
  esac
done
[ -n "$name" ] && [ -n "$zone" ] && [ $# -gt 0 ] || usage
command=$(printf '%q ' "$@")
root=$(cd "$(dirname "$0")/.." && pwd)
run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
place=(--zone "$zone" ${project:+--project "$project"})

if [ -n "$create" ]; then
  run gcloud compute tpus queued-resources create "$name" --node-id "$name" --accelerator-type "$create" \
    --runtime-version "$version" "${place[@]}"
fi
run gcloud compute tpus tpu-vm scp --recurse "$root" "$name:jaxformers" --worker all "${place[@]}"
run gcloud compute tpus tpu-vm ssh "$name" --worker all "${place[@]}" \
  --command "python3 -m pip install -q -e './jaxformers[tpu]'"
run gcloud compute tpus tpu-vm ssh "$name" --worker all "${place[@]}" --command "cd jaxformers && $command"
