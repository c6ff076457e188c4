#!/bin/sh
# Runs a stage of the build or of the tests, and says how long it took: tests/stage.sh NAME COMMAND...
set -eu
name=$1
shift
begun=$(date +%s)
"$@"
echo "stage: $name took $(($(date +%s) - begun)) s"
