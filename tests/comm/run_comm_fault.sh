#!/bin/sh
# run_comm_fault.sh PROGRAM MPIEXEC RANKS: runs every scenario of comm_fault and judges its exit status, its
# output, its error file and the time it took.
program=$1 mpiexec=$2 ranks=$3
last=$((ranks - 1))
. "$(dirname "$0")/fault_lib.sh"

here="at step 12, layer 3, dispatch, all-reduce 5 of group 'world'"

# deadline 2 s, answers 2 s, start and end of the job
run late 2 20
status_is 1
says "ERR_TIMEOUT"
says "the deadline of 2 s passed $here"
says "rank $last is missing (no answer"
never_says "rank 0 is missing"
# whoever was first wrote a file before the job ended
cat "$place"/run/error.*.json >"$place/run/error.any.json" 2>/dev/null
file_says any '"ERR_TIMEOUT"'
file_says any "rank $last is missing"
file_says any '"phase":	"dispatch"'

run elsewhere 2 20
status_is 1
says "rank $last is at step 13, checkpoint, barrier 1 of group 'control'"
says "passed $here"
never_says "is missing"

run stopped 2 30
status_is 1
says "rank $last is missing (no answer: ended, stopped or computing)"
says "passed $here"

run paused 0 20
status_is 0
never_says "ERR_"

run failing 0 20
status_is 1
says "the disk of this rank is gone (ERR_IO: input/output error, rank $last)"
file_says "$last" '"code":	"ERR_IO"'
file_says "$last" "\"rank\":	$last"
file_says "$last" '"step":	12'
file_says "$last" '"message":	"the disk of this rank is gone"'
file_says "$last" 'in failing, '

run killed 0 20
[ "$status" -ne 0 ] || fail "a killed rank went unnoticed"

run longer 0 20
status_is 1
says "a message of peer $last: MPI_ERR_TRUNCATE"

run shorter 0 20
status_is 1
says "group 'world': rank $last sent 50 bytes where 100 were expected (ERR_COMM"

run absent 2 20
status_is 1
says "the ranks have not found one another within 2 s"

# without a place for the error file the job still ends, and says why
scenario="no directory"
"$mpiexec" --oversubscribe -n "$ranks" "$program" failing "$place/none" >"$place/output" 2>&1 </dev/null
status=$?
status_is 1
says "the disk of this rank is gone"
says "$place/none"

# a world of one, without mpirun
scenario="alone"
"$program" failing "$place/run" >"$place/output" 2>&1
status=$?
status_is 1
says "the disk of this rank is gone"
file_says 0 '"code":	"ERR_IO"'

[ "$failures" -eq 0 ]
