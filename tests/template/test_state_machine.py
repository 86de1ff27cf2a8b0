"""House rules of the state machine: bounded in time, retried, and with an end for every error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qaes.adapters import clients
from qaes.adapters.ledger_client import CALL_SECONDS
from qaes.domain.compliance import Verdict, stopped_by
from qaes.domain.errors import (
    ApprovalExpiredError,
    ApprovalNeededError,
    ApprovalRejectedError,
    ConflictError,
    InvalidInputError,
    LimitError,
    StepDeniedError,
    StoppedError,
    ThrottledError,
)

DEFINITION = Path(__file__).parents[2] / "statemachine" / "task_execution.asl.json"

States = dict[str, dict[str, Any]]


def tasks(states: States) -> States:
    return {name: state for name, state in states.items() if state["Type"] == "Task"}


def successors(state: dict[str, Any]) -> set[str]:
    """Every state that may follow."""
    following = [state, *state.get("Choices", []), *state.get("Catch", [])]
    return {each[key] for each in following for key in ("Next", "Default") if key in each}


def test_every_substitution_is_defined_and_used(template: Any) -> None:
    used = set(re.findall(r"\$\{(\w+)\}", DEFINITION.read_text()))
    assert used == set(template.state_machine["DefinitionSubstitutions"])


def test_every_state_has_a_comment(states: States) -> None:
    assert [name for name, state in states.items() if not state.get("Comment")] == []


def test_every_task_has_timeout_and_jittered_retries(states: States) -> None:
    for name, state in tasks(states).items():
        assert isinstance(state.get("TimeoutSeconds"), int), name
        retry = state["Retry"][-1]
        assert "States.TaskFailed" in retry["ErrorEquals"], name
        assert retry["MaxAttempts"] > 0, name
        assert retry["BackoffRate"] > 1, name
        assert retry["MaxDelaySeconds"] > retry["IntervalSeconds"], name
        assert retry["JitterStrategy"] == "FULL", name


def test_token_waits_for_its_own_time_and_never_twice(template: Any, states: States) -> None:
    waiting = {name: each for name, each in states.items() if str(each.get("Resource")).endswith(".waitForTaskToken")}
    limits = {
        "AwaitApproval": ("ApprovalTimeoutSeconds", "expired"),
        "ExecuteAction": ("ConfirmationTimeoutSeconds", "failed"),
    }
    assert set(waiting) == set(limits)
    for name, state in waiting.items():
        parameter, outcome = limits[name]
        assert state["TimeoutSeconds"] == template.parameters[parameter]["Default"]
        [end] = [each for each in state["Catch"] if "States.Timeout" in each["ErrorEquals"]]
        assert (end["Next"], end["Output"]["outcome"]) == ("EndTask", outcome)
        assert all("States.Timeout" not in retry["ErrorEquals"] for retry in state["Retry"])
    variables = template.functions["AwaitApprovalFunction"]["Environment"]["Variables"]
    assert variables["APPROVAL_TIMEOUT_SECONDS"] == {"Ref": "ApprovalTimeoutSeconds"}
    variables = template.functions["ExecuteActionFunction"]["Environment"]["Variables"]
    assert variables["CONFIRMATION_TIMEOUT_SECONDS"] == {"Ref": "ConfirmationTimeoutSeconds"}


def test_every_error_has_an_end(definition: dict[str, Any]) -> None:
    for name, state in definition["States"].items():
        if state["Type"] in {"Task", "Map"}:
            last = state["Catch"][-1]
            end = "TaskFailed?" if name == "EndTask" else "EndTask"
            assert (last["ErrorEquals"], last["Next"]) == (["States.ALL"], end), name
            assert last["Output"]["error"] == "{% $states.errorOutput %}", name


OUTCOMES = {
    StepDeniedError: "denied",
    ApprovalRejectedError: "rejected",
    ApprovalExpiredError: "expired",
    ApprovalNeededError: None,
}
"""Errors that stop a step, and the outcome of its task; None: an approval is requested."""
STOPPED = {
    "RunSteps": {StepDeniedError, ApprovalNeededError, ApprovalRejectedError},
    "RunFirstSteps": {StepDeniedError, ApprovalNeededError, ApprovalRejectedError},
    "AwaitApproval": {StepDeniedError, ApprovalRejectedError, ApprovalExpiredError},
    "ExecuteAction": {StepDeniedError, ApprovalNeededError, ApprovalRejectedError, ApprovalExpiredError},
}


@pytest.mark.parametrize("name", STOPPED)
def test_stopping_error_ends_the_task_with_its_outcome(states: States, name: str) -> None:
    caught = {error: each for each in states[name]["Catch"] for error in each["ErrorEquals"]}
    assert {error.__name__ for error in STOPPED[name]} == {error for error in caught if error.endswith("Error")}
    for error in STOPPED[name]:
        catch = caught[error.__name__]
        expected = ("AwaitApproval", None) if OUTCOMES[error] is None else ("EndTask", OUTCOMES[error])
        assert (catch["Next"], catch.get("Output", {}).get("outcome")) == expected
    assert caught["States.ALL"]["Output"]["outcome"] == "failed"


def test_steps_run_one_at_a_time(states: States) -> None:
    maps = {name: state for name, state in states.items() if state["Type"] == "Map"}
    assert set(maps) == {"RunSteps", "RunFirstSteps"}
    assert all(state["MaxConcurrency"] == 1 for state in maps.values())


def test_permanent_errors_are_never_retried(states: States) -> None:
    """Errors that stop a step, and that a retry cannot change."""
    for name, state in tasks(states).items():
        first = state["Retry"][0]
        assert first["MaxAttempts"] == 0
        stops = {error.__name__ for error in StoppedError.__subclasses__()}
        assert set(first["ErrorEquals"]) == stops | {ConflictError.__name__, InvalidInputError.__name__}, name


def test_transfer_executed_only_after_ledger_outcome(states: States) -> None:
    """ExecuteAction goes on when its token is answered, not when its function returns."""
    state = states["ExecuteAction"]
    assert state["Resource"].endswith(".waitForTaskToken")
    assert successors(state) == {"AwaitApproval", "EndTask"} and state["End"] is True


SENDS = {"states:SendTaskSuccess", "states:SendTaskFailure"}


def test_run_step_can_neither_move_money_nor_answer_a_token(template: Any, states: States) -> None:
    """States are split by permission: the one that moves money is the one that people have approved."""
    for state in ("RunStep", "RunFirstStep"):
        assert states[state]["Arguments"]["FunctionName"] == states["RunStep"]["Arguments"]["FunctionName"]
    granted = {name: actions_of(template, name) for name in template.functions}
    ledger = ("lambda:InvokeFunction", "LedgerFunction")
    assert {each for each in granted["RunStepFunction"] if each[0].startswith(("lambda", "states"))} == {ledger}
    assert {each for each in granted["PlanTaskFunction"] if each[0].startswith(("lambda", "states"))} == {ledger}
    moves_money = {
        name for name, each in granted.items() if ("lambda:InvokeFunction", "LedgerTransferFunction") in each
    }
    assert moves_money == {"ExecuteActionFunction"}
    answers = {name for name, each in granted.items() if SENDS & {action for action, _ in each}}
    assert answers == {
        "GatewayFunction",
        "ReconcilerFunction",
        "AwaitApprovalFunction",
        "ExecuteActionFunction",
    }
    assert all({action for action, _ in granted[name]} >= SENDS for name in answers)
    assert {name for name, each in granted.items() if ("lambda:InvokeFunction", "RecordEventsFunction") in each} == {
        "ExecuteActionFunction",
        "AuditSweeperFunction",
    }


def actions_of(template: Any, function: str) -> set[tuple[str, str]]:
    """Each allowed action of a function with the resource that it is for, by its name in the template."""
    found = set()
    for statement in template.statements(function):
        if statement["Effect"] == "Allow":
            targets = [each["Fn::GetAtt"][0] if "Fn::GetAtt" in each else "*" for each in statement["Resource"]]
            found |= {(action, target) for action in statement["Action"] for target in targets}
    return found


LEDGER_CALLS = {
    "PlanTaskFunction": 1, "RunStepFunction": 1, "AwaitApprovalFunction": 3, "ExecuteActionFunction": 7,
}  # fmt: skip
"""Maximum number of ledger calls of an invocation that does not stop when its time is short."""


def test_callers_of_the_ledger_have_enough_time(template: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    common = template.document["Globals"]["Function"]["Timeout"]
    limit = {name: function.get("Timeout", common) for name, function in template.functions.items()}
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    clients.reset()
    config = clients.lambda_client().meta.config
    clients.reset()
    assert config.retries["total_max_attempts"] == 1, "a call may move money: it is the state that tries again"
    assert config.read_timeout > limit["LedgerFunction"], "an answer that comes late is an answer"
    call = config.connect_timeout + config.read_timeout
    assert call <= CALL_SECONDS
    for name, calls in LEDGER_CALLS.items():
        assert limit[name] > calls * CALL_SECONDS, name
    # It asks as often as there are transfers; with less than a call's time left it stops.
    assert limit["ReconcilerFunction"] > 3 * CALL_SECONDS


def test_nothing_runs_without_a_clear_yes(states: States) -> None:
    state = states["PolicyAllows?"]
    assert state["Default"] == "TaskEnded"
    assert all("$states.input.allowed = true" in choice["Condition"] for choice in state["Choices"])
    # An unknown verdict denies the step.
    unknown = Verdict.model_construct(verdict="maybe", reason="")
    assert isinstance(stopped_by(unknown), StepDeniedError)


def test_end_of_a_task_does_not_loop(states: States) -> None:
    assert successors(states["EndTask"]) == {"TaskFailed?"}
    assert successors(states["TaskFailed?"]) == {"TaskFailed", "TaskEnded"}
    assert successors(states["TaskFailed"]) == successors(states["TaskEnded"]) == set()


def test_every_state_is_reached_and_exists(definition: dict[str, Any], states: States) -> None:
    maps = [state["ItemProcessor"] for state in states.values() if state["Type"] == "Map"]
    for machine in (definition, *maps):
        reached, open_states = set(), {machine["StartAt"]}
        while open_states:
            name = open_states.pop()
            reached.add(name)
            open_states |= successors(machine["States"][name]) - reached
        outside = set(definition["States"]) if machine is not definition else set()
        assert reached - outside == set(machine["States"])


def test_machine_may_call_its_functions_and_no_others(template: Any) -> None:
    called = [value for value in template.state_machine["DefinitionSubstitutions"].values() if "Fn::GetAtt" in value]
    [invoke] = [each for each in template.statements("TaskExecutionStateMachine") if each["Sid"] == "InvokeTheStates"]
    assert sorted(map(str, called)) == sorted(map(str, invoke["Resource"]))


def test_task_stays_within_its_budget_of_transitions(states: States) -> None:
    """Standard workflows are billed by the transition: three monitoring steps, and a transfer with one approval."""
    monitoring = ["PlanTask", "PolicyAllows?", "RunSteps", *["RunStep"] * 3]
    transfer = ["PlanTask", "PolicyAllows?", "RunFirstSteps", *["RunFirstStep"] * 2, "AwaitApproval", "ExecuteAction"]
    assert {*monitoring, *transfer} <= set(states)
    assert len(monitoring) <= 7
    assert len(transfer) <= 9


THROTTLING = {
    "Lambda.TooManyRequestsException",
    "Lambda.ServiceException",
    "Lambda.AWSLambdaException",
    "Lambda.SdkClientException",
    "Lambda.ClientExecutionTimeoutException",
    "Lambda.Unknown",
    ThrottledError.__name__,
    LimitError.__name__,
}


def test_every_task_waits_for_minutes_when_aws_throttles(states: States) -> None:
    for name, state in tasks(states).items():
        [throttling] = [retry for retry in state["Retry"] if THROTTLING & set(retry["ErrorEquals"])]
        assert set(throttling["ErrorEquals"]) == THROTTLING, name
        assert state["Retry"].index(throttling) == len(state["Retry"]) - 2, "before the one for every error"
        assert throttling["JitterStrategy"] == "FULL", name
        longest = [
            min(throttling["IntervalSeconds"] * throttling["BackoffRate"] ** number, throttling["MaxDelaySeconds"])
            for number in range(throttling["MaxAttempts"])
        ]
        expected = sum(longest) / 2  # full jitter: each wait is half of the longest on average
        assert 10 * 60 <= expected <= 20 * 60, name
        assert sum(longest) < 3600, name
