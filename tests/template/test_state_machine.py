"""House rules of the state machine: bounded in time, retried, and with an end for every error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qaes.adapters import clients
from qaes.adapters.ledger_client import CALL_SECONDS
from qaes.domain.errors import ThrottledError
from worker.app import NotConfirmedYetError

DEFINITION = Path(__file__).parents[2] / "statemachine" / "task_execution.asl.json"
ENDS = {"CompleteTask", "DenyTask", "RejectTask", "ExpireTask", "FailTask"}

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


def test_every_state_says_what_it_is_for(states: States) -> None:
    assert [name for name, state in states.items() if not state.get("Comment")] == []


def test_every_task_has_a_time_limit_and_retries_with_backoff_and_jitter(states: States) -> None:
    for name, state in tasks(states).items():
        assert isinstance(state.get("TimeoutSeconds"), int), name
        retry = state["Retry"][-1]
        assert "States.TaskFailed" in retry["ErrorEquals"], name
        assert retry["MaxAttempts"] > 0, name
        assert retry["BackoffRate"] > 1, name
        assert retry["MaxDelaySeconds"] > retry["IntervalSeconds"], name
        assert retry["JitterStrategy"] == "FULL", name


def test_a_token_waits_for_its_own_time_and_never_twice(template: Any, states: States) -> None:
    waiting = {name: each for name, each in states.items() if str(each.get("Resource")).endswith(".waitForTaskToken")}
    limits = {
        "AwaitApproval": ("ApprovalTimeoutSeconds", "ApprovalExpired"),
        "AwaitConfirmation": ("ConfirmationTimeoutSeconds", "ConfirmationTimedOut"),
    }
    assert set(waiting) == set(limits)
    for name, state in waiting.items():
        parameter, end = limits[name]
        assert state["TimeoutSeconds"] == template.parameters[parameter]["Default"]
        assert {"ErrorEquals": ["States.Timeout"], "Next": end} in state["Catch"]
        assert all("States.Timeout" not in retry["ErrorEquals"] for retry in state["Retry"])
    variables = template.functions["RequestApprovalFunction"]["Environment"]["Variables"]
    assert variables["APPROVAL_TIMEOUT_SECONDS"] == {"Ref": "ApprovalTimeoutSeconds"}
    variables = template.functions["AwaitConfirmationFunction"]["Environment"]["Variables"]
    assert variables["CONFIRMATION_TIMEOUT_SECONDS"] == {"Ref": "ConfirmationTimeoutSeconds"}


def test_every_error_has_an_end(definition: dict[str, Any]) -> None:
    for name, state in definition["States"].items():
        if state["Type"] in {"Task", "Map"}:
            last = state["Catch"][-1]
            end = "TaskFailed" if name == "FailTask" else "FailTask"
            assert (last["ErrorEquals"], last["Next"]) == (["States.ALL"], end), name


def test_what_stops_a_step_ends_the_task_by_its_name(states: States) -> None:
    caught = {each["ErrorEquals"][0]: each["Next"] for each in states["ExecuteSteps"]["Catch"]}
    inner = states_in(states["ExecuteSteps"])
    raised = {state["Error"] for state in inner.values() if state["Type"] == "Fail"}
    assert caught == {
        "StepDenied": "DenyTask",
        "ApprovalRejected": "RejectTask",
        "ApprovalExpired": "ExpireTask",
        "States.ALL": "FailTask",
    }
    # A transfer without an end in time is no end of its own: the task has failed, and a retry finds the transfer.
    assert raised == set(caught) - {"States.ALL"} | {"ConfirmationTimedOut"}


def test_steps_run_one_at_a_time(states: States) -> None:
    assert states["ExecuteSteps"]["MaxConcurrency"] == 1


@pytest.mark.parametrize("name", ["ExecuteStep", "SubmitTransfer"])
def test_a_step_that_was_refused_is_never_tried_again(states: States, name: str) -> None:
    first = states[name]["Retry"][0]
    assert "States.QueryEvaluationError" in first["ErrorEquals"]
    assert first["MaxAttempts"] == 0
    assert "$error(" in states[name]["Output"]


def test_a_transfer_is_executed_only_when_the_ledger_has_said_what_became_of_it(states: States) -> None:
    assert successors(states["SubmitTransfer"]) == {"AwaitConfirmation"}
    assert successors(states["AwaitConfirmation"]) == {"ExecuteStep", "ConfirmationTimedOut"}
    assert "submitted" not in states["ExecuteStep"]["Output"]


def test_who_is_woken_too_early_waits_again_and_does_not_poll(states: States) -> None:
    too_early = NotConfirmedYetError.__name__
    state = states["ExecuteStep"]
    assert state["Catch"] == [{"ErrorEquals": [too_early], "Next": "AwaitConfirmation"}]
    assert too_early in state["Retry"][0]["ErrorEquals"]
    assert state["Retry"][0]["MaxAttempts"] == 0


def test_one_state_alone_hands_a_transfer_in(states: States) -> None:
    handing_in = {name for name, state in states.items() if "submit" in state.get("Arguments", {}).get("Payload", {})}
    assert handing_in == {"SubmitTransfer"}
    assert states["SubmitTransfer"]["Arguments"]["Payload"]["submit"] is True


LEDGER_CALLS = {
    "CheckComplianceFunction": 3, "ExecuteStepFunction": 4, "AwaitConfirmationFunction": 1, "TransferEndedFunction": 2,
}  # fmt: skip
"""How often one invocation asks the ledger at most, of those that do not stop when their time is short."""


def test_who_asks_the_ledger_has_the_time_for_it(template: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert states["PolicyAllowed?"]["Default"] == "DenyTask"
    assert states["Verdict?"]["Default"] == "StepDenied"


def test_the_end_of_a_task_does_not_loop(states: States) -> None:
    for name in ENDS:
        assert successors(states[name]) <= {"FailTask", "TaskFailed"}, name
    assert successors(states["FailTask"]) == {"TaskFailed"}
    assert successors(states["TaskFailed"]) == set()


def test_every_state_is_reached_and_exists(definition: dict[str, Any], states: States) -> None:
    for machine in (definition, states["ExecuteSteps"]["ItemProcessor"]):
        reached, open_states = set(), {machine["StartAt"]}
        while open_states:
            name = open_states.pop()
            reached.add(name)
            open_states |= successors(machine["States"][name]) - reached
        assert reached == set(machine["States"])


def test_the_machine_may_call_its_functions_and_no_others(template: Any) -> None:
    called = [value for value in template.state_machine["DefinitionSubstitutions"].values() if "Fn::GetAtt" in value]
    [invoke] = [each for each in template.statements("TaskExecutionStateMachine") if each["Sid"] == "InvokeTheStates"]
    assert sorted(map(str, called)) == sorted(map(str, invoke["Resource"]))


def test_a_task_stays_within_its_budget_of_transitions() -> None:
    """Standard workflows are billed by the transition: three monitoring steps, and a transfer with one approval."""
    planning = ["AnalyzeTask", "CheckPolicy", "PolicyAllowed?", "BuildPlan", "ValidatePlan", "ExecuteSteps"]
    step = ["CheckCompliance", "Verdict?", "ExecuteStep", "RecordAudit"]
    approval = ["CheckCompliance", "Verdict?", "AwaitApproval"]
    assert len([*planning, *step * 3, "CompleteTask"]) <= 20
    transfer = ["SubmitTransfer", "AwaitConfirmation"]
    assert len([*planning, *step * 3, *approval, *transfer, "CompleteTask"]) <= 24


def states_in(map_state: dict[str, Any]) -> States:
    inner: States = map_state["ItemProcessor"]["States"]
    return inner


THROTTLING = {
    "Lambda.TooManyRequestsException",
    "Lambda.ServiceException",
    "Lambda.AWSLambdaException",
    "Lambda.SdkClientException",
    "Lambda.ClientExecutionTimeoutException",
    "Lambda.Unknown",
    ThrottledError.__name__,
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
