"""The tools of a request, and whether an answer has to call one."""

from __future__ import annotations

from collections.abc import Sequence

from pals.api.openai.schema.chat import (
    AllowedChoice,
    ChatRequest,
    FunctionObject,
    NamedChoice,
    ToolName,
)
from pals.errors import InvalidRequest
from pals.text.answers.tools import ToolSpec, ToolUse


def tool_use(request: ChatRequest) -> ToolUse | None:
    """Return which tools an answer may call; None where the request has none.

    Raises:
        InvalidRequest: Tools that do not go together, or a choice that is none of them.
    """
    if request.functions and request.tools:
        problem = "`functions` and `tools` are the same thing: send `tools`"
        raise InvalidRequest(problem=problem, param="functions")
    _check_choice("function_call", request.function_call, "functions", request)
    _check_choice("tool_choice", request.tool_choice, "tools", request)
    if request.functions:
        return _functions_use(request.functions, request.function_call)
    specs = _specs([tool.function for tool in request.tools or ()], "tools")
    return _tools_use(request, specs)


def _check_choice(param: str, choice: object, own: str, request: ChatRequest) -> None:
    """Refuse a choice among what a request does not have; a default says nothing.

    That nothing is called is also true where nothing can be, if not of the other list.
    """
    lists = {"functions": request.functions, "tools": request.tools}
    said_in_vain = (None, "auto") if any(lists.values()) else (None, "auto", "none")
    if not lists[own] and choice not in said_in_vain:
        raise InvalidRequest(problem=f"`{param}` is allowed only with `{own}`", param=param)


def _functions_use(functions: Sequence[FunctionObject], choice: str | ToolName | None) -> ToolUse:
    specs = _specs(functions, "functions")
    if isinstance(choice, ToolName):
        _check_known(choice.name, specs, "function_call")
        return ToolUse(tools=specs, choice=choice.name, named=True, parallel=False)
    return ToolUse(tools=specs, choice=choice or "auto", parallel=False)


def _tools_use(request: ChatRequest, specs: tuple[ToolSpec, ...]) -> ToolUse | None:
    choice, parallel = request.tool_choice, request.parallel_tool_calls is not False
    if not specs:
        return None
    match choice:
        case NamedChoice():
            _check_known(choice.function.name, specs, "tool_choice")
            named = choice.function.name
            return ToolUse(tools=specs, choice=named, named=True, parallel=parallel)
        case AllowedChoice():
            allowed = _allowed(choice, specs)
            return ToolUse(tools=allowed, choice=choice.allowed_tools.mode, parallel=parallel)
        case _:
            return ToolUse(tools=specs, choice=choice or "auto", parallel=parallel)


def _allowed(choice: AllowedChoice, specs: tuple[ToolSpec, ...]) -> tuple[ToolSpec, ...]:
    names = {tool.function.name for tool in choice.allowed_tools.tools}
    for name in names:
        _check_known(name, specs, "tool_choice")
    if not names:
        raise InvalidRequest(problem="`tool_choice` allows no tool", param="tool_choice")
    return tuple(spec for spec in specs if spec.name in names)


def _specs(functions: Sequence[FunctionObject], param: str) -> tuple[ToolSpec, ...]:
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise InvalidRequest(problem=f"two of the `{param}` have one name", param=param)
    return tuple(
        ToolSpec(
            name=function.name,
            description=function.description,
            parameters=function.parameters,
            strict=bool(function.strict),
        )
        for function in functions
    )


def _check_known(name: str, specs: Sequence[ToolSpec], param: str) -> None:
    if name not in {spec.name for spec in specs}:
        problem = f"`{param}` names `{name[:64]}`, which is no function of this request"
        raise InvalidRequest(problem=problem, param=param)
