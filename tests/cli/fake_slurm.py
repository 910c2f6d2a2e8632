"""Slurm's commands for one machine: an array's jobs run at once, as soon as they are submitted.

`install` puts them into a folder for `PATH`; the folder then has `calls`, a line for each command
that was run but `srun`, and for each job its process and, when it has ended, its exit status.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel")


def install(folder: Path) -> None:
    for command in COMMANDS:
        script = folder / command
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {command} "$@"\n')
        script.chmod(0o755)


def calls(folder: Path, command: str) -> list[str]:
    lines = (folder / "calls").read_text().splitlines()
    return [line for line in lines if line.split()[0] == command]


def end_all(folder: Path) -> None:
    for job in folder.glob("*.pid"):
        scancel(folder, [job.stem])


def sbatch(folder: Path, arguments: list[str]) -> None:
    script = Path(arguments[-1]).read_text()
    count = re.search(r"--array=0-(\d+)", script)
    number = os.getpid()
    copy = folder / f"{number}.sh"
    copy.write_text(script)
    for index in range(int(count[1]) + 1) if count else [None]:
        job = str(number) if index is None else f"{number}_{index}"
        array = {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(index)}
        alone = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        process = subprocess.Popen(
            ["sh", "-c", f"sh {copy}; echo $? > {folder / job}.status"],
            env={**os.environ, "SLURM_JOB_ID": job, **alone, **(array if count else {})},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        (folder / f"{job}.pid").write_text(str(process.pid))
    print(f"Submitted batch job {number}")


def srun(folder: Path, arguments: list[str]) -> None:
    files = {}
    while arguments[0].startswith("--"):
        option = arguments.pop(0)
        if option in ("--output", "--error"):
            name = arguments.pop(0).replace("%A", os.environ.get("SLURM_ARRAY_JOB_ID", ""))
            name = name.replace("%a", os.environ.get("SLURM_ARRAY_TASK_ID", ""))
            files[option] = name.replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0")
    with open(files["--output"], "a") as output, open(files["--error"], "a") as error:
        sys.exit(subprocess.call(arguments, stdout=output, stderr=error))


def sacct(folder: Path, arguments: list[str]) -> None:
    print("JobID|State|NodeList")
    for pid in folder.glob("*.pid"):
        status = pid.with_suffix(".status")
        said = status.read_text().strip() if status.exists() else None
        state = {None: "RUNNING", "0": "COMPLETED", "cancelled": "CANCELLED"}.get(said, "FAILED")
        print(f"{pid.stem}|{state}|here")


def scancel(folder: Path, arguments: list[str]) -> None:
    """Ends jobs; where the folder has the file `slow`, they go on for two seconds."""
    if (folder / "slow").exists():
        (folder / "slow").unlink()
        command = [sys.executable, __file__, "scancel", *arguments]
        shell = f"sleep 2; exec {shlex.join(command)}"
        subprocess.Popen(["sh", "-c", shell], start_new_session=True)
        return
    for job in arguments:
        if not (folder / f"{job}.status").exists():
            (folder / f"{job}.status").write_text("cancelled")
            os.killpg(int((folder / f"{job}.pid").read_text()), signal.SIGKILL)


if __name__ == "__main__":
    here = Path(os.environ["FAKE_SLURM"])
    name, *given = sys.argv[1:]
    if name != "srun":
        with (here / "calls").open("a") as file:
            file.write(shlex.join([name, *given]) + "\n")
    globals()[name](here, given)
