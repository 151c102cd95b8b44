#!/bin/bash
# slurm/train.sbatch on a real Slurm of two nodes: one job that is stopped by a signal, preempted by Slurm and loses a
# rank comes back each time, goes on from its checkpoint and finishes; a cancelled one stays away.
#   test_slurm.sh ANTIPHON SOURCE_DIRECTORY WORK_DIRECTORY      exit status 77: skipped
set -u
antiphon=$(realpath "$1") source=$(realpath "$2") work=$3
. "$source/tests/slurm/cluster.sh"

if [ -z "${CLUSTER:-}" ]; then
  if reason=$(cluster_obstacle); then
    echo "skipped: $reason"
    exit 77
  fi
  cluster_enter "$(realpath -m "$work")" /bin/bash "$0" "$antiphon" "$source" "$work"
  exit
fi

# ---- helpers ----

trap 'exit 1' INT TERM # the first process of a namespace ignores them otherwise
job=""

fail() {
  echo "FAILED: $*"
  [ -z "$job" ] || { echo "---- job"; timeout 10 scontrol show job "$job"; }
  [ -f "antiphon-$job.log" ] && { echo "---- its log"; tail -n 60 "antiphon-$job.log"; }
  echo "---- daemons"
  cluster_logs
  exit 1
}

# await SECONDS WHAT COMMAND...: polls.
await() {
  local until=$((SECONDS + $1)) what=$2
  shift 2
  while ! "$@"; do
    [ $SECONDS -lt $until ] || fail "waited too long for $what"
    sleep 0.2
  done
  echo "$SECONDS s: $what"
}

job_field() { timeout 10 scontrol show job "$job" | grep -o "\b$1=[^ ]*" | cut -d= -f2; }
job_is() { [ "$(job_field JobState)" = "$1" ]; }
job_requeued() { [ "$(job_field Restarts)" = "$1" ] && job_is PENDING; }
logged() { grep -q -- "$1" "antiphon-$job.log"; }
# The last whole line: the writer may be in the middle of one.
last_step() { tail -n 2 run/metrics.jsonl 2>/dev/null | sed -n 's/^{"step":\([0-9]*\),.*}$/\1/p' | tail -n 1; }
passed_step() { [ "$(last_step || echo 0)" -gt "$1" ] 2>/dev/null; }
saved_step() { ls run/checkpoints | sed -n 's/^step-0*\([0-9][0-9]*\)$/\1/p' | sort -n | tail -n 1; }
checkpoint_after() { [ "$(saved_step)" -gt "$1" ] 2>/dev/null; }

write_config() { # steps
  cat >config.yaml <<END
run: {directory: run, seed: 1, steps: $1, log: 100000, threads: 1}
data:
  path: $source/data/glyphs
  shuffle: 4096
  modalities:
    - {name: image, connector: linear, positions: learned, length: 4, local: 0.01, global: 0.03, experts: 2}
    - {name: text, connector: linear, positions: learned, length: 48, local: 0.01, global: 0.03, experts: 2}
    - {name: speech, connector: linear, positions: learned, length: 80, local: 0.01, global: 0.03, experts: 2}
model:
  {width: 32, layers: 2, heads: 2, hidden: 64, embedding: 32,
   moe: {layers: every 2, experts: 4, choose: 1, hidden: 64, dispatch: capacity, capacity: "1.25", group_samples: 4}}
objective: {pairs: ["image:text", "image:speech", "text:speech"], importance: 0.005, load: 0.005, z: 0.001}
parallel: {experts: 2, placement: shared}
optimizer: {batch: 16, rate: 0.001, warmup: 10, weight_decay: 0.1, clip: 1}
checkpoint: {interval: 500, keep: 2}
evaluate: {interval: 0, at_end: false}
END
}

submit() {
  job=$(timeout 10 sbatch --parsable --cpus-per-task=1 "$source/slurm/train.sbatch" config.yaml) ||
    fail "sbatch refused the job"
}

# A requeued job waits two minutes for its begin time, which a test need not; but a start within the second of the
# requeue is refused ("job credential revoked").
start_now() {
  sleep 2
  timeout 10 scontrol update JobId="$job" StartTime=now || fail "StartTime=now was refused"
}

kill_a_rank() {
  local entry
  for entry in /proc/[0-9]*; do
    [ "$(readlink "$entry/exe")" = "$antiphon" ] && kill -KILL "${entry#/proc/}" && return 0
  done
  fail "no rank to kill"
}

# ---- the test ----

cluster_start || fail "the cluster did not start"
cd "$CLUSTER" || exit 1
export ANTIPHON=$antiphon ANTIPHON_WAIT=3
echo "$SECONDS s: the cluster is up"

write_config 100000000
submit
await 60 "first steps" passed_step 20

timeout 10 scancel --signal=USR1 "$job"
await 60 "stopped by SIGUSR1, requeued by the script" job_requeued 1
logged 'start 1: stopped on request and saved; back into the queue' || fail "status 75 did not lead to a requeue"
first=$(last_step)
[ "$(saved_step)" = "$first" ] || fail "step $first was the last, the checkpoint is of step $(saved_step)"
start_now
await 60 "steps after the first requeue" passed_step $((first + 20))
logged "resumed at step $first from" || fail "did not resume at step $first"

timeout 10 sbatch --partition=urgent --nodes=2 --exclusive --output=urgent.log --wrap "sleep 1" ||
  fail "sbatch refused the urgent job"
await 60 "preempted by Slurm" job_requeued 2
logged 'DUE TO PREEMPTION' || fail "Slurm does not speak of a preemption"
logged 'start 2: stopped on request and saved; the job is' || fail "no orderly stop at the preemption"
second=$(last_step)
[ "$(saved_step)" = "$second" ] || fail "step $second was the last, the checkpoint is of step $(saved_step)"
start_now
await 60 "steps after the preemption" passed_step $((second + 20))
logged "resumed at step $second from" || fail "did not resume at step $second"

await 60 "a checkpoint of the third start" checkpoint_after "$second"
kill_a_rank
await 60 "a rank killed, requeued by the script" job_requeued 3
logged 'start 3: failed with status .* after a checkpoint; back into the queue' || fail "a lost rank was not noticed"
third=$(saved_step)
write_config $((third + 250))
start_now
await 90 "finished" job_is COMPLETED
[ "$(job_field ExitCode)" = 0:0 ] || fail "exit status $(job_field ExitCode)"
logged "resumed at step $third from" || fail "did not resume at step $third"
logged 'start 4: finished' || fail "the script does not know that training is finished"

# Every step once, in order; the final checkpoint is sound.
sed -n 's/^{"step":\([0-9]*\),.*}$/\1/p' run/metrics.jsonl >steps
[ "$(wc -l <steps)" = "$(wc -l <run/metrics.jsonl)" ] || fail "metrics.jsonl has lines that are not a step"
seq $((third + 250)) | cmp - steps || fail "steps are missing or doubled"
last=run/checkpoints/step-$(printf %08d $((third + 250)))
timeout 60 "$antiphon" check "$last" || fail "the last checkpoint is damaged"
echo "$SECONDS s: stops at $first and $second, a rank lost after $third, $((third + 250)) steps in all"

rm -r run
write_config 100000000
submit
await 60 "first steps of another job" passed_step 20
timeout 10 scancel "$job"
await 60 "cancelled" job_is CANCELLED
logged 'start 1: stopped on request and saved; the job is' || fail "no orderly stop at the cancellation"
sleep 2
job_is CANCELLED || fail "a cancelled job came back"

rm -r run
sed -i 's/width: 32/widht: 32/' config.yaml
submit
await 60 "a faulty configuration fails" job_is FAILED
[ "$(job_field ExitCode)" = 1:0 ] || fail "exit status $(job_field ExitCode)"
logged widht || fail "the log does not name the faulty key"
echo "$SECONDS s: passed"
