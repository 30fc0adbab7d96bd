#!/bin/bash
# Trains a config on a TPU slice of Google Cloud: asks for it as a queued resource, waits for it, installs, runs the command
# on all workers, and starts over when the slice is taken away or the run exits with 75 (saved) or 70 (a process was lost).
#
#   NAME=pod ZONE=us-west4-a ACCELERATOR=v5litepod-256 RUN_DIR=gs://bucket/runs/x \
#     launch/tpu_vm.sh configs/bert_base.py --data.sets.0.source.path 'gs://bucket/pairs/*.parquet'
#
# NAME         name of the queued resource and of its slice           (required)
# ZONE         zone of the slice                                      (required)
# ACCELERATOR  type, such as v5litepod-256, v5p-128 or v6e-64         (required)
# RUN_DIR      run folder that all workers see, such as gs://...      (required)
# PROJECT      project; gcloud's own by default
# RUNTIME      software of the machines                               (default v2-alpha-tpuv5-lite)
# SPOT         1 for spot capacity, which may be taken away           (default 1)
# SOURCE       what pip installs on the workers                       (default: this checkout, copied)
# RESTARTS     restarts after exit code 70                            (default 20)
# POLL         seconds between looks at the state of the request      (default 30)
# KEEP         1 leaves the slice there at the end                    (default 0)
set -uo pipefail

: "${NAME:?}" "${ZONE:?}" "${ACCELERATOR:?}" "${RUN_DIR:?}"
where=(--zone "$ZONE")
if [ -n "${PROJECT:-}" ]; then where+=(--project "$PROJECT"); fi
checkout=$(cd "$(dirname "$0")/.." && pwd)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2>/dev/null
}

request() {
  local spot=()
  if [ "${SPOT:-1}" = 1 ]; then spot=(--spot); fi
  gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" "${where[@]}" \
    --accelerator-type "$ACCELERATOR" --runtime-version "${RUNTIME:-v2-alpha-tpuv5-lite}" "${spot[@]}"
}

release() {
  gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

# Waits until the slice is there; asks for it first, or anew.
obtain() {
  while true; do
    case "$(state)" in
      ACTIVE) return ;;
      "") request || return 1 ;;
      FAILED | SUSPENDED | SUSPENDING) release ;;
    esac
    sleep "${POLL:-30}"
  done
}

on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command "$1"
}

install() {
  if [ -n "${SOURCE:-}" ]; then
    on_all "python3 -m pip install --quiet --upgrade $(printf %q "$SOURCE")"
    return
  fi
  gcloud compute tpus tpu-vm scp --recurse "$checkout" "$NAME:embedjax-checkout" "${where[@]}" --worker=all &&
    on_all "python3 -m pip install --quiet -e 'embedjax-checkout[tpu]'"
}

arguments=$(printf '%q ' "$@" --run-dir "$RUN_DIR")
lost=0
while true; do
  obtain || exit 1
  # The exit codes of ssh to many workers are merged: each worker says its own.
  if install && on_all "cd embedjax-checkout 2>/dev/null; EMBEDJAX_COORDINATOR=auto python3 -m embedjax train $arguments; echo EMBEDJAX_EXIT=\$?" |
    tee "$log"; then :; fi
  codes=$(grep -o 'EMBEDJAX_EXIT=[0-9]*' "$log" | sort -u | cut -d= -f2 | tr '\n' ' ')
  : >"$log"
  echo "exit codes of the workers: ${codes:-none}"
  if [ "$codes" = "0 " ]; then
    code=0
    break
  fi
  other=$(tr ' ' '\n' <<<"$codes" | grep -vx -e 0 -e 75 -e 70 -e 137 -e 143 -e '' | head -n 1)
  if [ -n "$other" ]; then
    code=$other
    break
  fi
  # Not every worker was asked to stop: one was lost, or the slice was taken away.
  if ! grep -qw 75 <<<"$codes" && [ "$(state)" = ACTIVE ]; then
    lost=$((lost + 1))
    if [ "$lost" -gt "${RESTARTS:-20}" ]; then
      code=70
      break
    fi
  fi
  echo "starting again from the last save"
done
if [ "${KEEP:-0}" != 1 ]; then release; fi
exit "$code"
