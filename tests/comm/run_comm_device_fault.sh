#!/bin/sh
# run_comm_device_fault.sh PROGRAM MPIEXEC RANKS: runs every scenario of comm_device_fault, on emulated devices, and
# judges its exit status, its output, its error file and the time it took.
program=$1 mpiexec=$2 ranks=$3
last=$((ranks - 1))
export CUDA_DOUBLE_DEVICES="$ranks"
. "$(dirname "$0")/fault_lib.sh"

here="at step 12, layer 3, dispatch, all-reduce 3 of group 'expert'"

run error 0 30
status_is 1
says "remote process exited or there was a network error: injected failure"
says "$here"
says "ERR_COMM"
file_says "$last" '"phase":	"dispatch"'
file_says "$last" "all-reduce 3 of group 'expert'"

# deadline 2 s, answers 2 s, start and end of the job
run late 2 20
status_is 1
says "the deadline of 2 s passed $here"
says "rank $last is missing (no answer: ended, stopped or computing)"
never_says "rank 0 is missing"

run elsewhere 2 20
status_is 1
says "passed $here"
says "rank $last is at step 13, checkpoint, barrier 1 of group 'control'"
never_says "is missing"

run stuck 2 20
status_is 1
says "passed $here"
says "all its ranks are there: a device or the network between them stands still"

# the list of what is under way is full long before the deadline; what is named is still the first
run flood 2 20
status_is 1
says "passed $here"
says "all its ranks are there"

# what must be let go of does not return: ten seconds, then the process ends without it
run abort 10 25
[ "$status" -ne 0 ] || fail "exit status 0"
says "the disk of this rank is gone (ERR_IO: input/output error, rank $last)"
file_says "$last" '"code":	"ERR_IO"'

run well 0 60
status_is 0
never_says "ERR_"

[ "$failures" -eq 0 ]
