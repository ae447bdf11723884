#!/usr/bin/env bash
# Submit one command to SLURM: one process a GPU (or a CPU node), all of them one run.
#
#   launch/slurm.sh [--nodes N] [--gpus G] [--time T] [--partition P] [--account A] [--name X] [--dry-run] -- COMMAND...
#
# --gpus 0 runs one process a node on CPUs. Two minutes before the time limit SLURM sends SIGTERM: the run saves, and
# the job puts itself back into the queue until its command has ended with code 0 by itself.
set -euo pipefail
nodes=1 gpus=8 time=24:00:00 partition= account= name=jaxformers dry=
usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
need() { [ $# -ge 2 ] && [ -n "$2" ] || { echo "error: $1 needs a value" >&2; exit 2; }; }
while [ $# -gt 0 ]; do
  case $1 in
    --nodes) need "$@"; nodes=$2; shift 2 ;;
    --gpus) need "$@"; gpus=$2; shift 2 ;;
    --time) need "$@"; time=$2; shift 2 ;;
    --partition) need "$@"; partition=$2; shift 2 ;;
    --account) need "$@"; account=$2; shift 2 ;;
    --name) need "$@"; name=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "error: unknown option $1" >&2; usage ;;
  esac
done
[ $# -gt 0 ] || usage
[[ $nodes =~ ^[1-9][0-9]*$ && $gpus =~ ^[0-9]+$ ]] || { echo "error: --nodes $nodes --gpus $gpus: no numbers" >&2; exit 2; }
tasks=$((gpus > 0 ? gpus : 1))
per_task=$([ "$gpus" -gt 0 ] && echo "#SBATCH --gpus-per-node=$gpus" || true)
script=$(cat <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks
$per_task
#SBATCH --time=$time
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$name-%j.log
${partition:+#SBATCH --partition=$partition}
${account:+#SBATCH --account=$account}
stopped=
trap 'stopped=1; kill -TERM "\$steps"' TERM
srun --kill-on-bad-exit=0 $(printf '%q ' "$@")&
steps=\$!
wait "\$steps"; code=\$?
[ -z "\$stopped" ] || { wait "\$steps"; code=\$?; }
# 75: a process was lost; the same command goes on from the last checkpoint
if [ -n "\$stopped" ] || [ "\$code" -eq 75 ]; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\$code"
JOB
)
script=$(grep -v '^$' <<<"$script")
if [ -n "$dry" ]; then echo "$script"; else sbatch <<<"$script"; fi
