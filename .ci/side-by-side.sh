#!/bin/sh
# side-by-side.sh COMMAND GROUP...: run a command once for each group of arguments, all at a time.
# Tests of jobs and servers wait much for processes to start. What the first group prints is seen
# at once, what the others print when it has ended. The exit status is 1 where one has failed.
set -u
command=$1 first=$2
shift 2
outputs=$(mktemp -d)
beside="" failed=0 n=0
trap 'kill $beside 2>/dev/null; exit 130' INT TERM
for group; do
    n=$((n + 1))
    (eval "exec $command $group") >"$outputs/$n" 2>&1 &
    beside="$beside $!"
done
echo "$n more beside these tests; their output follows"
(eval "exec $command $first") || failed=1
n=0
for process in $beside; do
    n=$((n + 1))
    wait "$process" || failed=1
    cat "$outputs/$n"
done
rm -r "$outputs"
exit $failed
