# Sourced by the job scripts: which Python, and how the nodes find each other. All of it can be set from outside:
#   GLORIA_VENV=/path/venv GLORIA_INTERFACE=ib0 sbatch launch/pretrain.sbatch ...
#
#   GLORIA_SETUP      a file of the site, sourced first (module load ...)
#   GLORIA_VENV       the virtual environment (default .venv in the folder of the submission)
#   GLORIA_INTERFACE  the network interface between the nodes (eth0, ib0); default: NCCL's and gloo's own choice, or where
#                     that leads nowhere (loopback, a bridge of containers), on each node the one to the other nodes
#   MASTER_PORT       where rank 0 listens; default: from the job id
#   GLORIA_LAUNCHER   torchrun (default: Slurm starts one on each node) or srun (Slurm starts every rank)
#   GLORIA_RANKS_PER_NODE  default: as many as GPUs were asked for
#   GLORIA_MAX_REQUEUES    default 50: a job that comes back for ever is a mistake
#   GLORIA_MAX_FAILURES    default 3: failures in a row without a step of progress, then a run is given up
# Account, partition, time and GPUs are sbatch's own: its flags, or SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS,
# SBATCH_TIMELIMIT, SBATCH_GPUS_PER_NODE in the environment; nodes are the flag --nodes.

set -u

wrong() {
  echo "error: $*" >&2
  exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || wrong "$0: this is no Slurm job; submit it with sbatch"
case "${GLORIA_LAUNCHER:-torchrun}" in
  torchrun | srun) ;;
  *) wrong "GLORIA_LAUNCHER: $GLORIA_LAUNCHER is neither torchrun nor srun; set it to one of them" ;;
esac

# shellcheck disable=SC1090
[ -z "${GLORIA_SETUP:-}" ] || . "$GLORIA_SETUP" || wrong "GLORIA_SETUP: $GLORIA_SETUP fails; see above"

# An environment by path and not by `activate`: nothing of the submitting shell is needed.
[ -z "${GLORIA_VENV:-}" ] || [ -x "$GLORIA_VENV/bin/python" ] ||
  wrong "GLORIA_VENV: $GLORIA_VENV has no bin/python here; name a virtual environment that all nodes see"
export PATH="${GLORIA_VENV:-$PWD/.venv}/bin:$PATH"
has_module() { python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"; }
if ! has_module torch || ! has_module gloria; then
  wrong "$(command -v python || echo 'no python'): has no gloria and torch; run make setup, or set GLORIA_VENV"
fi

# Lines of the log appear when they are printed, not when a buffer is full.
export PYTHONUNBUFFERED=1

nodes=${SLURM_JOB_NUM_NODES:-1}
# As many ranks on a node as GPUs were asked for ("a100:4" is 4); an exclusive job is given all that are there.
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
ranks_per_node=${GLORIA_RANKS_PER_NODE:-${gpus##*:}}

# The batch script runs on the first node, and so does rank 0.
node_list=$(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
  wrong "scontrol: does not list the nodes of $SLURM_JOB_NODELIST; put Slurm's commands in the PATH (GLORIA_SETUP)"
MASTER_ADDR=$(head -n 1 <<<"$node_list")
LAST_NODE=$(tail -n 1 <<<"$node_list")
export MASTER_ADDR LAST_NODE
# Below the ephemeral ports (32768 and up), so that no outgoing connection can hold it; other jobs have other ids.
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}

if [ -n "${GLORIA_INTERFACE:-}" ]; then
  [ -e "/sys/class/net/$GLORIA_INTERFACE" ] ||
    wrong "GLORIA_INTERFACE: $(hostname) has no $GLORIA_INTERFACE; it has $(ls -m /sys/class/net)"
  export NCCL_SOCKET_IFNAME=$GLORIA_INTERFACE GLOO_SOCKET_IFNAME=$GLORIA_INTERFACE
fi
# Run on each node, for their interfaces need not have the same names: towards the first node, and there to the last.
# shellcheck disable=SC2016
choose_interface='
  if [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && [ -z "${GLORIA_INTERFACE:-}" ]; then
    [ "$SLURM_NODEID" = 0 ] && peer=$LAST_NODE || peer=$MASTER_ADDR
    chosen=$(python -m gloria.dist.interface "$peer") || exit 2
    [ -z "$chosen" ] || export $chosen
  fi'

# launch MODULE [ARGUMENT...]: every rank of the job, in one of two forms.
# In both USR1 is ignored before Python starts: torchrun would die of it, and so would a rank that is still importing.
# The ranks then set their own handler, which saves and stops.
# shellcheck disable=SC2016
launch() {
  # One rank's failure ends the step: the others would wait for it in a collective.
  # No binding to cores: a rank's data thread, checkpoint thread and NCCL would share one.
  local step=(srun --kill-on-bad-exit=1 --cpu-bind=none)
  case "${GLORIA_LAUNCHER:-torchrun}" in
    torchrun)
      # Static rendezvous: ranks follow the order of the nodes, and the address is the one above.
      "${step[@]}" --ntasks-per-node=1 --ntasks="$nodes" bash -c \
        "trap '' USR1; $choose_interface"'; exec python -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"' _ \
        --nnodes "$nodes" --nproc-per-node "$ranks_per_node" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m "$@"
      ;;
    srun)
      # Every rank sees all GPUs of its node, as NCCL's direct copies between them want.
      "${step[@]}" --ntasks-per-node="$ranks_per_node" --ntasks="$((nodes * ranks_per_node))" --gpu-bind=none \
        bash -c "trap '' USR1; $choose_interface"'; exec "$@"' _ python -m "$@"
      ;;
  esac
}

# launch_until_stopped MODULE [ARGUMENT...]: launch, and where Slurm says by USR1 that the time is over (--signal=B:USR1@N)
# ask the ranks to stop until they have. Slurm's own signal to them would be lost while they start.
asked=no asking=
late() { :; } # what a script does where they take too long
# shellcheck disable=SC2034,SC2329
ask() {
  asked=yes
  late &
  asking="$asking $!"
  while scancel --signal=USR1 "$SLURM_JOB_ID"; do sleep 10; done &
  asking="$asking $!"
}
launch_until_stopped() {
  local ranks code
  trap ask USR1
  # In the background, for bash does not look at a signal while it waits for a command.
  (trap '' USR1 && launch "$@") &
  ranks=$!
  wait $ranks
  code=$?
  while kill -0 $ranks 2>/dev/null; do
    wait $ranks # the first one ended with the signal
    code=$?
  done
  # These would ask the same job, once that is requeued, to stop as it starts, or requeue it. Some may have ended.
  # shellcheck disable=SC2086
  [ -z "$asking" ] || kill $asking 2>/dev/null
  return $code
}

# requeue WHAT: the same job, under the same id, once there is room again. Does not return.
requeue() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${GLORIA_MAX_REQUEUES:-50}" ]; then
    echo "error: $1: not done after ${SLURM_RESTART_COUNT:-0} requeues; GLORIA_MAX_REQUEUES allows more" >&2
  elif scontrol requeue "$SLURM_JOB_ID"; then
    sleep 120 # Slurm ends this script while it requeues the job
  fi
  echo "$1: to be continued, and this job is not requeued; submit it again, or the next one of a chain goes on" >&2
  exit 75 # EX_TEMPFAIL
}

# go_on RUN MODULE [ARGUMENT...]: a run to its end, again after a failure and, requeued, after a stop. Does not return.
go_on() {
  local run=$1 failures=0 before code
  shift
  while true; do
    before=$(steps "$run")
    echo "== job $SLURM_JOB_ID, requeued ${SLURM_RESTART_COUNT:-0} times: $nodes x $ranks_per_node ranks on" \
      "$SLURM_JOB_NODELIST, $run at step $before"
    launch_until_stopped "$@"
    code=$?
    # The run's own state decides, not an exit status that a launcher has passed on.
    python -m gloria.checkpoints --run "$run" --status
    case $? in
      0) exit 0 ;;
      75 | 1) ;; # to be continued, or failed: a rank that was lost may do better on the next try
      *) exit 2 ;;
    esac
    [ "$code" != 0 ] || break # it has saved and stopped because it was asked to
    [ "$(steps "$run")" = "$before" ] || failures=0
    failures=$((failures + 1))
    if [ "$failures" -ge "${GLORIA_MAX_FAILURES:-3}" ]; then
      echo "error: $run: $failures failures in a row without a step of progress; see above" >&2
      exit 1
    fi
    [ "$asked" = no ] || break # no time for another try
    echo "== the ranks failed (status $code); another try on the same nodes"
  done
  requeue "$run"
}

# How far a run is, over all seeds of a fine-tuning.
steps() {
  sed -n 's/^ "step": \([0-9]*\),*$/\1/p' "$1"/status.json "$1"/seed-*/status.json 2>/dev/null |
    awk '{ sum += $1 } END { print sum + 0 }'
}
