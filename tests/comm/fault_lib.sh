# Sourced by the judges of jobs that go wrong: run_comm_fault.sh, run_comm_device_fault.sh. Needs program, mpiexec,
# ranks; gives a place for the jobs' files and counts failures.
place=$(mktemp -d /tmp/antiphon-fault-XXXXXX) || exit 1
trap 'rm -rf "$place"' EXIT
failures=0

fail() {
  failures=$((failures + 1))
  echo "FAILED: $scenario: $1"
  sed 's/^/    /' "$place/output"
}

# SCENARIO LEAST MOST: seconds that it may take
run() {
  scenario=$1
  rm -rf "$place/run"
  mkdir "$place/run"
  begin=$(date +%s)
  "$mpiexec" --oversubscribe -n "$ranks" "$program" "$scenario" "$place/run" >"$place/output" 2>&1 </dev/null
  status=$?
  end=$(date +%s)
  begin=$(stat -c %Y "$place/run/began" 2>/dev/null || echo "$begin") # when the ranks had found one another
  seconds=$((end - begin))
  echo "$scenario: status $status after $seconds s"
  [ "$seconds" -ge "$2" ] || fail "ended after $seconds s, before $2 s"
  [ "$seconds" -le "$3" ] || fail "took $seconds s, more than $3 s"
}

status_is() { [ "$status" -eq "$1" ] || fail "exit status $status, expected $1"; }
says() { grep -Fq -- "$1" "$place/output" || fail "does not say: $1"; }
never_says() { ! grep -Fq -- "$1" "$place/output" || fail "says: $1"; }

# RANK TEXT: its error file holds the text
file_says() {
  grep -Fq -- "$2" "$place/run/error.$1.json" 2>/dev/null || fail "error.$1.json does not hold: $2"
}
