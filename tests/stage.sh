#!/bin/sh
# Runs a stage of the build or of the tests, and prints its duration: tests/stage.sh NAME COMMAND...
set -eu
name=$1
shift
begun=$(date +%s)
"$@"
echo "stage: $name took $(($(date +%s) - begun)) s"
