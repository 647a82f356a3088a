"""Files that start the runs of an experiment elsewhere: a SLURM array and a script for one machine with several GPUs.

A job takes as many GPUs of one machine as --processes says, and torchrun starts a process of xlstm-train on each: every one
holds the whole model (micro batches and model.activation_checkpointing save memory) and takes a share of each batch. Jobs
run side by side. Both scripts start `reproduce.py ID --job NAME`, which goes on where that job was left; --collect makes the
table at the end.
"""

import shlex

from .execution import write_atomically

ARRAY_LIMIT = 1000  # tasks; SLURM's default MaxArraySize is 1001

HEADER = """# {count} jobs of {name}, listed in jobs.txt, with {processes} GPU(s) each. Start:
#   {start}
# Start it again to go on: finished jobs are skipped, others go on from their newest checkpoint. Table:
#   {collect}
"""
SLURM = """#!/usr/bin/env bash
{header}{parts}#SBATCH --job-name={name}
#SBATCH --array=1-{array}
#SBATCH --gres=gpu:{processes}
#SBATCH --cpus-per-task={cpus}
#SBATCH --mem={memory}G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
# Five minutes before its time is over the job is asked to stop: it saves, ends with status 75, and is queued again.
set -uo pipefail
cd {root} || exit 2
job=$(sed -n "$((SLURM_ARRAY_TASK_ID + ${{OFFSET:-0}}))p" {jobs})
[ -n "$job" ] || {{ echo "there is no such line in jobs.txt" >&2; exit 2; }}
srun {command} --job "$job"
status=$?
if [ $status = 75 ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"; fi
exit $status
"""
LOCAL = """#!/usr/bin/env bash
{header}set -uo pipefail
cd {root} || exit 2
read -ra all <<<"${{GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | tr '\n' ' ')}}"
gpus=()  # {processes} for each job, joined by commas
for ((i = 0; i + {processes} <= ${{#all[@]}}; i += {processes})); do gpus+=("$(IFS=,; echo "${{all[*]:i:{processes}}}")"); done
[ ${{#gpus[@]}} -gt 0 ] || {{ echo "fewer than {processes} GPU(s) found: GPUS=\"0 1\" names them" >&2; exit 2; }}
mapfile -t jobs <{jobs}
taken=$(mktemp -d)
trap 'rm -rf "$taken"' EXIT
trap 'touch "$taken/stop"; kill -TERM "${{workers[@]}}" 2>/dev/null' INT TERM

# A wait that a signal ends comes back early.
wait_for() {{ local status; wait "$1"; status=$?; while kill -0 "$1" 2>/dev/null; do sleep 0.2; done; return $status; }}

worker() {{  # GPUs: takes the next job that none has taken
  local failed=0 i child=
  trap 'if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi' TERM
  for i in "${{!jobs[@]}}"; do
    [ -e "$taken/stop" ] && return 75
    mkdir "$taken/$i" 2>/dev/null || continue
    CUDA_VISIBLE_DEVICES=$1 {command} --jobs ${{#gpus[@]}} --job "${{jobs[$i]}}" &
    child=$!
    [ -e "$taken/stop" ] && kill -TERM "$child"  # asked before the line above
    wait_for "$child" || failed=1
  done
  return $failed
}}

workers=()
for gpu in "${{gpus[@]}}"; do worker "$gpu" & workers+=($!); done
status=0
for pid in "${{workers[@]}}"; do wait_for "$pid" || status=1; done
[ -e "$taken/stop" ] && exit 75
{collect} || status=1
exit $status
"""


def command_line(options, script, python, *more):
    """The command that runs one job of the experiment, with the options that say which sweep is meant."""
    parts = [python, script, options.id]
    parts += ["--mini"] if options.mini else []
    parts += ["--seeds", str(options.seeds)] if options.seeds else []
    parts += ["--only", options.only] if options.only else []
    parts += ["--processes", str(options.processes)] if options.processes > 1 else []
    for name in ("bin", "out", "experiments"):
        parts += [f"--{name}", str(getattr(options, name).resolve())]
    return shlex.join(map(str, [*parts, *more]))


def write_files(folder, experiment, jobs, options, script, python):
    """jobs.txt, array.sbatch and local.sh in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder.resolve() / name for name in ("jobs.txt", "array.sbatch", "local.sh")}
    told = {"name": experiment.name, "count": len(jobs), "root": shlex.quote(str(script.parents[1])),
            "collect": command_line(options, script, python, "--collect"), "jobs": shlex.quote(str(files["jobs.txt"])),
            "command": command_line(options, script, python), "array": min(len(jobs), ARRAY_LIMIT), "parts": "",
            "processes": options.processes, "cpus": 8 * options.processes, "memory": 64 * options.processes}
    local, array = (shlex.quote(str(files[name])) for name in ("local.sh", "array.sbatch"))
    for offset in range(ARRAY_LIMIT, len(jobs), ARRAY_LIMIT):
        told["parts"] += f"#   OFFSET={offset} sbatch --array=1-{min(len(jobs) - offset, ARRAY_LIMIT)} {array}\n"
    if told["parts"]:
        told["parts"] = f"# An array holds {ARRAY_LIMIT} tasks; the others:\n" + told["parts"]
    write_atomically(files["jobs.txt"], "".join(f"{job.name}\n" for job in jobs))
    for name, text, start in (("array.sbatch", SLURM, f"sbatch {array}"), ("local.sh", LOCAL, f'GPUS="0 1 2 3" {local}')):
        write_atomically(files[name], text.format(**told, header=HEADER.format(**told, start=start)))
        files[name].chmod(0o755)
    return list(files.values())
