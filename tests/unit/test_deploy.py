"""What deploys the functions: the templates by linters and against our own docs, the zips by importing from them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import hcl2
import parliament
import pytest
import yaml
from cfnlint.api import lint_all

from tests.support import CHECKOUT

AWS = CHECKOUT / "scripts" / "deploy" / "aws" / "template.yaml"
GCP = CHECKOUT / "scripts" / "deploy" / "gcp" / "main.tf"
FUNCTIONS = any((CHECKOUT / "snapshotter").glob("functions*"))


class _Tags(yaml.SafeLoader):
    """CloudFormation's short forms, kept as what they are."""


def _keep(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return {suffix: loader.construct_scalar(node)}
    if isinstance(node, yaml.SequenceNode):
        return {suffix: loader.construct_sequence(node, deep=True)}
    return {suffix: loader.construct_mapping(node, deep=True)}


_Tags.add_multi_constructor("!", _keep)


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load(AWS.read_text(), _Tags)
    return loaded


def linted(text: str) -> list[str]:
    """Errors and warnings; `I...` are hints."""
    return [str(match) for match in lint_all(text) if not match.rule.id.startswith("I")]


def test_cfn_lint_finds_nothing() -> None:
    assert linted(AWS.read_text()) == []
    wrong = AWS.read_text().replace("MaximumRetryAttempts: 10", "MaximumRetries: 10")
    assert linted(wrong) != [], "it would find something"


GOOD = (
    "rate(1 minute)", "rate(1 hour)", "rate(1 day)", "rate(5 minutes)", "rate(24 hours)", "cron(0 10 * * ? *)",
    "cron(15 12 ? * MON-FRI *)", "cron(0/15 * * * ? *)", "cron(0 18 L * ? *)", "cron(0 9 ? * 6#1 2026-2030)",
)  # fmt: skip
BAD = (
    "rate(5 minute)", "rate(1 hours)", "rate(0 minutes)", "rate(hour)", "rate(1 week)", "rate(1.5 hours)", "1 hour",
    "cron(0 10 * * *)", "cron(0 10 * * * *)", "cron(0 10 ? * ? *)", "cron(* * * * ?)", "0 10 * * ? *", "", "at()",
    "rate(5 minutes) ", "cron(0 10 * * ? *) cron(0 11 * * ? *)",
)  # fmt: skip


@pytest.mark.parametrize("expression", GOOD)
def test_a_right_schedule_is_taken(template: dict[str, Any], expression: str) -> None:
    assert re.fullmatch(template["Parameters"]["ScheduleExpression"]["AllowedPattern"], expression)


@pytest.mark.parametrize("expression", BAD)
def test_a_schedule_that_events_would_refuse_is_refused_by_the_template(
    template: dict[str, Any], expression: str
) -> None:
    """cfn-lint takes `rate(5 minute)`; so does CreateStack, and rolls back half way."""
    assert not re.fullmatch(template["Parameters"]["ScheduleExpression"]["AllowedPattern"], expression)


def test_the_function_may_do_what_the_docs_grant_the_taker_and_no_more(template: dict[str, Any]) -> None:
    page = (CHECKOUT / "docs" / "aws.md").read_text()
    policies = template["Resources"]["FunctionRole"]["Properties"]["Policies"]
    for name, policy in (("taker", policies[0]), ("copier", policies[4]["If"][1])):
        match = re.search(rf"<!-- policy: {name} -->\s*```json\n(.*?)```", page, re.DOTALL)
        assert match is not None
        assert policy["PolicyDocument"] == json.loads(match[1])
    actions = {
        action
        for policy in (*policies[1:3], policies[3]["If"][1])
        for statement in policy["PolicyDocument"]["Statement"]
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    }
    assert actions == {
        "logs:CreateLogStream", "logs:PutLogEvents", "sqs:SendMessage", "ssm:SendCommand", "ssm:GetCommandInvocation",
    }  # fmt: skip


def test_parliament_finds_nothing_in_the_policies(template: dict[str, Any]) -> None:
    def resolved(value: Any) -> Any:
        """An ARN in the place of each reference."""
        if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("GetAtt", "Ref", "Sub"):
            (kind, name), *_ = value.items()
            arns = {
                "Log.Arn": "arn:aws:logs:eu-central-1:123456789012:log-group:x:log-stream:y",
                "DeadLetters.Arn": "arn:aws:sqs:eu-central-1:123456789012:queue",
                "Function.Arn": "arn:aws:lambda:eu-central-1:123456789012:function:f",
            }
            if kind == "GetAtt":
                return arns[name]
            text = name.replace("${AWS::Partition}", "aws").replace("${AWS::Region}", "eu-central-1")
            return text.replace("${AWS::AccountId}", "123456789012").replace(":eu-central-1::document", "::*:document")
        if isinstance(value, dict):
            return {key: resolved(entry) for key, entry in value.items()}
        return [resolved(entry) for entry in value] if isinstance(value, list) else value

    for role in ("FunctionRole", "SchedulerRole"):
        for policy in template["Resources"][role]["Properties"]["Policies"]:
            found = policy["If"][1] if "If" in policy else policy
            analyzed = parliament.analyze_policy_string(json.dumps(resolved(found["PolicyDocument"])))
            said = [f for f in analyzed.findings if f.issue not in ("RESOURCE_MISMATCH", "RESOURCE_STAR")]
            assert said == [], found["PolicyName"]


def test_what_fails_is_retried_kept_and_told(template: dict[str, Any]) -> None:
    made = template["Resources"]
    target = made["Schedule"]["Properties"]["Target"]
    assert target["RetryPolicy"]["MaximumRetryAttempts"] > 0 and target["DeadLetterConfig"]["Arn"]
    alarms = [entry["Properties"] for entry in made.values() if entry["Type"] == "AWS::CloudWatch::Alarm"]
    assert {alarm["MetricName"] for alarm in alarms} >= {"Errors", "Invocations", "ApproximateNumberOfMessagesVisible"}
    silent = next(alarm for alarm in alarms if alarm["MetricName"] == "Invocations")
    assert silent["TreatMissingData"] == "breaching", "no data is what is to be told"
    assert made["Function"]["Properties"]["Timeout"] == 900 and made["Function"]["Properties"]["MemorySize"] == 256


# ------------------------------------------------------------------------------------------------------ Terraform


def test_the_terraform_parses_and_every_reference_leads_somewhere() -> None:
    """A parser is all that could be had: neither `terraform validate` nor the provider's schema."""
    with open(GCP) as file:
        parsed = hcl2.load(file)
    text = re.sub(r"#.*", "", GCP.read_text())

    def names(kind: str) -> set[tuple[str, ...]]:
        found = set()
        for block in parsed[kind]:
            for first, inner in block.items():
                first = first.strip('"')
                if kind == "resource":
                    found |= {(first, name.strip('"')) for name in inner if not name.startswith("__")}
                elif not first.startswith("__"):
                    found.add((first,))
        return found

    resources = names("resource")
    assert {kind for kind, _ in resources} >= {
        "google_cloudfunctions2_function", "google_cloud_scheduler_job", "google_service_account",
        "google_project_iam_custom_role", "google_cloud_run_service_iam_member", "google_monitoring_alert_policy",
    }  # fmt: skip
    used = set(re.findall(r"\b(google_\w+)\.(\w+)", text))
    assert used <= resources, used - resources
    assert {(name,) for name in re.findall(r"\bvar\.(\w+)", text)} == names("variable"), "each declared and used"
    assert set(re.findall(r"\blocal\.(\w+)", text)) == {n for b in parsed["locals"] for n in b if not n.startswith("_")}
    # Nobody but the schedule's account may call it.
    assert "allUsers" not in text and "allAuthenticatedUsers" not in text and text.count('"roles/') == 1
    assert "oidc_token" in text


def test_the_terraform_grants_what_the_docs_grant_the_taker() -> None:
    with open(GCP) as file:
        granted = [each.strip('"') for each in hcl2.load(file)["locals"][0]["taker"]]
    page = (CHECKOUT / "docs" / "gcp.md").read_text()
    match = re.search(r"<!-- role: taker -->\s*```yaml\n(.*?)```", page, re.DOTALL)
    assert match is not None
    wanted = set(yaml.safe_load(match[1])["includedPermissions"])
    # Deletion is a role of its own, bound to names.
    assert set(granted) == wanted - {"compute.snapshots.delete"}


# ----------------------------------------------------------------------------------------------------------- zips


def built(cloud: str, archive: Path) -> zipfile.ZipFile:
    script = CHECKOUT / "scripts" / "build_function.py"
    done = subprocess.run(
        [sys.executable, str(script), cloud, "--here", "-o", str(archive)], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(archive)


def test_the_aws_zip_is_small_and_is_all_that_the_function_needs(tmp_path: Path, measured: Any) -> None:
    archive = tmp_path / "f.zip"
    with built("aws", archive) as opened:
        names = opened.namelist()
        opened.extractall(tmp_path / "there")
    measured(f"AWS zip: {archive.stat().st_size / 1e6:.1f} MB with byte code (at most 50)")
    assert archive.stat().st_size <= 50e6
    assert {name.split("/")[1] for name in names if name.startswith("providers/")} <= {
        "__init__.py", "__pycache__", "ebs",
    }  # fmt: skip
    assert not [name for name in names if name.startswith(("snapshotter/testing", "snapshotter/cli", "tests"))]
    wanted = ["providers.ebs.api", "snapshotter.verbs.take", "snapshotter.verbs.prune", "boto3"]
    program = (
        "import importlib, sys\n"
        f"for name in {[*wanted, *(['snapshotter.functions'] if FUNCTIONS else [])]!r}: importlib.import_module(name)\n"
        "from snapshotter.nodes import profiles\n"
        "assert profiles.get('besu').name == 'besu'\n"
        "import boto3\n"
        "for service in ('ec2', 'ssm', 'sts'): boto3.client(service, region_name='eu-central-1')\n"
        "assert all(m.__file__.startswith(sys.argv[1]) for n, m in sys.modules.items()\n"
        "           if n.split('.')[0] in ('snapshotter', 'boto3', 'msgspec', 'tenacity'))\n"
    )
    there = str(tmp_path / "there")
    # No site-packages: what isn't in the zip isn't there.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, sys.argv[1])\n{program}", there],
        capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_gcp_zip_is_source_and_the_same_each_time(tmp_path: Path) -> None:
    with built("gcp", tmp_path / "one.zip") as opened:
        names = opened.namelist()
        assert "gcf_handler" in opened.read("main.py").decode()
        assert "google-cloud-compute" in opened.read("requirements.txt").decode()
    built("gcp", tmp_path / "two.zip").close()
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert not [name for name in names if name.endswith(".pyc")]


def test_an_unbuilt_zip_can_be_imported_from(tmp_path: Path) -> None:
    """Path equals import: the packages work from a zip as they lie in the checkout."""
    built("gcp", tmp_path / "f.zip").close()
    module = "snapshotter.functions" if FUNCTIONS else "snapshotter.verbs.take"
    done = subprocess.run(
        [sys.executable, "-c",
         f"import {module} as found; print(found.__file__)\n"
         "from snapshotter.nodes import profiles; assert profiles.get('besu').name == 'besu'"],
        capture_output=True, text=True, cwd="/", env={**os.environ, "PYTHONPATH": str(tmp_path / "f.zip")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "f.zip"))
