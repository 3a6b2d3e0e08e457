# Sourced by the sbatch files: `again COMMAND…` runs what goes on from where it was stopped, and queues the job again before its time is over.
#
# Slurm sends SIGUSR1 to the batch script some minutes before the limit (`--signal=B:USR1@300`). The file $ESAM3_STOP then asks the training to stop:
# it writes a checkpoint after the step it is in and ends with status 1 (08_cluster). Anything else that runs then (an evaluation, a cache) may be
# killed anywhere. Either way the job is queued again, under the same number, and goes on. After SIGTERM (a cancelled or pre-empted job) the same
# file is written, but Slurm decides whether the job comes back. A command that fails without a signal fails once: its job is not queued again.

again() {
  local step status signal=
  mkdir -p runs
  export ESAM3_STOP=$PWD/runs/.stop-$SLURM_JOB_ID
  rm -f "$ESAM3_STOP"
  trap 'signal=USR1; : > "$ESAM3_STOP"' USR1
  trap 'signal=${signal:-TERM}; : > "$ESAM3_STOP"' TERM
  "$@" &
  step=$!
  wait "$step"; status=$?
  if [ "$signal" ]; then  # which ended the wait, perhaps not the step
    for ((second = 0; second < ${ESAM3_GRACE:-240}; second++)); do kill -0 "$step" 2> /dev/null || break; sleep 1; done
    if kill -0 "$step" 2> /dev/null; then echo "not stopped after ${ESAM3_GRACE:-240} s: it will go on from its last checkpoint"
    else wait "$step"; status=$?; fi
    rm -f "$ESAM3_STOP"
    [ "$signal$status" = USR10 ] || [ "$signal" = TERM ] || { echo "job $SLURM_JOB_ID is queued again"; scontrol requeue "$SLURM_JOB_ID"; }
  fi
  trap - USR1 TERM
  return "$status"
}
