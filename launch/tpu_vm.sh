#!/bin/bash
# Trains a config on a TPU slice of Google Cloud: asks for it as a queued resource, waits for it, installs, runs the command
# on all workers, and starts over when the slice is taken away or the run exits with 75 (saved), 70 (a process was lost) or by a signal.
#
#   NAME=pod ZONE=us-west4-a ACCELERATOR=v5litepod-256 NFS=10.0.0.2:/share RUN_DIR=/runs/x \
#     launch/tpu_vm.sh configs/bert_base.py --data.sets.0.source.path 'gs://bucket/pairs/*.parquet'
#
# All workers mount one file system at /runs, NFS or BUCKET; the README says what it must do.
#
# NAME         name of the queued resource and of its slice           (required)
# ZONE         zone of the slice                                      (required)
# ACCELERATOR  type, such as v5litepod-256, v5p-128 or v6e-64         (required)
# RUN_DIR      run folder, under /runs                                (required)
# NFS          share to mount, HOST:/SHARE, such as Filestore's       (this or BUCKET)
# BUCKET       bucket with hierarchical namespace, mounted by gcsfuse
# PROJECT      project; gcloud's own by default
# RUNTIME      software of the machines                               (default v2-alpha-tpuv5-lite)
# SPOT         1 for spot capacity, which may be taken away           (default 1)
# SOURCE       what pip installs, such as 'embedjax[tpu,gcs] @ git+https://...'  (default: this checkout, copied); the config
#              alone is copied then
# RESTARTS     restarts after exit code 70                            (default 20)
# POLL         seconds between looks at the state of the request      (default 30)
# KEEP         1 leaves the slice there at the end                    (default 0)
set -uo pipefail

: "${NAME:?}" "${ZONE:?}" "${ACCELERATOR:?}" "${RUN_DIR:?}"
fail() {
  echo "tpu_vm.sh: $1" >&2
  exit 2
}
case $RUN_DIR in /runs/?*) ;; *) fail "RUN_DIR is $RUN_DIR; it must be /runs/..., where the workers mount NFS or BUCKET" ;; esac
if [ -z "${NFS:-}${BUCKET:-}" ]; then fail "NFS (HOST:/SHARE) or BUCKET is needed, to mount at /runs"; fi
if [ -n "${BUCKET:-}" ]; then
  # In others a folder is renamed file by file, which gcsfuse refuses: the first save would fail.
  named=$(gcloud storage buckets describe "gs://$BUCKET" --format='value(hierarchical_namespace.enabled)')
  if [ "$named" != True ]; then fail "gs://$BUCKET has no hierarchical namespace, which is chosen when a bucket is made"; fi
fi
where=(--zone "$ZONE")
if [ -n "${PROJECT:-}" ]; then where+=(--project "$PROJECT"); fi
checkout=$(cd "$(dirname "$0")/.." && pwd)
config=${1:?the config is missing} # FILE.py or FILE.py:FUNCTION
file=${config%.py:*}
if [ "$file" != "$config" ]; then file=$file.py; fi
if [ -n "${SOURCE:-}" ]; then
  if [ ! -f "$file" ]; then fail "$file: no such config file"; fi
elif [ ! -f "$checkout/$file" ]; then
  fail "$file is no file of $checkout, which is copied to the workers"
fi
log=$(mktemp) errors=$(mktemp)
trap 'rm -f "$log" "$errors"' EXIT

# ABSENT where there is no such request; what cannot be asked just now is no state.
state() {
  if gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2>"$errors"; then
    return
  fi
  if grep -qi -e NOT_FOUND -e 'not found' "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
  fi
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
  local found silent=0
  while true; do
    found=$(state)
    case "$found" in
      ACTIVE) return ;;
      ABSENT) request || return 1 ;;
      FAILED | SUSPENDED | SUSPENDING) release ;;
    esac
    # An answer may fail now and then; none at all is a wrong login or name.
    if [ -n "$found" ]; then silent=0; else silent=$((silent + 1)); fi
    if [ "$silent" -ge 10 ]; then return 1; fi
    sleep "${POLL:-30}"
  done
}

on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command "$1"
}

# The machines' own Python may be older than jax wants.
install() {
  local what="-e 'embedjax-checkout[tpu,gcs]'" copied=("$checkout" "$NAME:embedjax-checkout")
  local clear="rm -rf embedjax-checkout" # or the copy would lie in that of another start
  if [ -n "${SOURCE:-}" ]; then
    what="--upgrade $(printf %q "$SOURCE")"
    copied=("$file" "$NAME:embedjax-checkout/")
    clear="$clear && mkdir embedjax-checkout"
  fi
  on_all "$clear" || return
  gcloud compute tpus tpu-vm scp --recurse "${copied[@]}" "${where[@]}" --worker=all || return
  on_all "python3 -m pip install --quiet uv && python3 -m uv venv --quiet --allow-existing --python 3.12 embedjax-venv && \
    python3 -m uv pip install --quiet --python embedjax-venv $what"
}

# A fresh machine may be busy installing updates of its own.
mount_runs() {
  local apt="sudo DEBIAN_FRONTEND=noninteractive apt-get --option DPkg::Lock::Timeout=600 --yes --quiet" mount
  local google=https://packages.cloud.google.com/apt keys=/usr/share/keyrings/gcsfuse.asc
  if [ -n "${NFS:-}" ]; then
    # A server of NFS 3 keeps the lock of a machine that was taken away, and the next start would find the run folder held:
    # locks stay on their machine. This script runs one start at a time.
    mount="$apt update && $apt install nfs-common && sudo mkdir -p /runs && \
      sudo mount -t nfs -o nolock $(printf %q "$NFS") /runs && { [ -w /runs ] || sudo chown \"\$(id -u)\" /runs; }"
  else
    # Without caches a worker sees what another has just written.
    mount="curl --fail --silent --show-error $google/doc/apt-key.gpg | sudo tee $keys >/dev/null && \
      echo \"deb [signed-by=$keys] $google gcsfuse-\$(lsb_release -cs) main\" | \
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null && $apt update && $apt install gcsfuse && \
      sudo mkdir -p /runs && sudo chown \"\$(id -u)\" /runs && \
      gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $(printf %q "$BUCKET") /runs"
  fi
  on_all "mountpoint -q /runs || { $mount; }"
}

if [ -n "${SOURCE:-}" ]; then set -- "$(basename "$file")${config#"$file"}" "${@:2}"; fi
arguments=$(printf '%q ' "$@" --run-dir "$RUN_DIR")
lost=0
while true; do
  obtain || exit 1
  # The exit codes of ssh to many workers are merged: each worker says its own.
  train="cd embedjax-checkout && EMBEDJAX_COORDINATOR=auto ~/embedjax-venv/bin/python -m embedjax train $arguments"
  if install && mount_runs && on_all "$train; echo EMBEDJAX_EXIT=\$?" | tee "$log"; then :; fi
  codes=$(grep -o 'EMBEDJAX_EXIT=[0-9]*' "$log" | sort -u | cut -d= -f2 | tr '\n' ' ')
  : >"$log"
  echo "exit codes of the workers: ${codes:-none}"
  if [ "$codes" = "0 " ]; then
    code=0
    break
  fi
  # From 128 on it was a signal that ended it.
  other=$(tr ' ' '\n' <<<"$codes" | awk '$1 != "" && $1 != 0 && $1 != 75 && $1 != 70 && $1 < 128' | head -n 1)
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
  sleep "${POLL:-30}" # a slice that goes may be called active a while
done
if [ "${KEEP:-0}" != 1 ]; then release; fi
exit "$code"
