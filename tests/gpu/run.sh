#!/bin/sh
# Runs each file of tests in a process of its own: a device that was left in an error is no use to the next test, and a
# crash costs one file. Given names of files, runs these.
cd "$(dirname "$0")/../.." || exit 1
export PYTHONPATH=src PYTHONDONTWRITEBYTECODE=1
failed=""
for file in ${*:-tests/gpu/test_*.py}; do
    echo "== $file"
    ${PYTHON:-python3} -m pytest -q -p no:cacheprovider --tb=short "$file" || failed="$failed $file"
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
