#!/usr/bin/env bash
# Print how the latest job in a directory of checkpoints stands, for those that decide whether to start another one.
#
#   launch/outcome.sh s3://bucket/run-7        prints, for instance: preempted 1500 1795000000.25
#
# First comes the state, as in `distckpt ls --json`: complete, preempted, failed, running, or unknown; then the newest
# step that is committed, or `none`; then when that job took the directory, or `never`. If that has not changed over a
# start, that start never had the directory, and the state is an earlier job's.
# PYTHON is the Python of the environment, as launch/torchrun.sh says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec "${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}" - "$1" << 'EOF'
import json, subprocess, sys

NOTHING_THERE = 3  # before the first start
command = [sys.executable, "-m", "distckpt.cli", "ls", sys.argv[1], "--json"]
listed = subprocess.run(command, capture_output=True, text=True)
if listed.returncode not in (0, NOTHING_THERE):
    print(listed.stderr, file=sys.stderr)
run = json.loads(listed.stdout or "{}")
latest = run.get("outcome") or {"state": "unknown", "since": "never"}
steps = [one["step"] for one in run.get("checkpoints", []) if one["state"] == "committed"]
print(latest["state"], max(steps, default="none"), latest["since"])
EOF
