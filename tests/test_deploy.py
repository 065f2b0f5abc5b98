"""The Helm chart: its values, its options, its metrics; and the manifests it renders to, where helm is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from apar.runtime.cli.serve import make_parser

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy" / "helm" / "apar"
TEMPLATES = sorted((CHART / "templates").iterdir())
EVERYTHING = [
    "engine.existingClaim=claim",
    "engine.path=/engine",
    "engine.options={--kv-memory-mb,8192}",
    "api.existingSecret=secret",
    "api.modelName=chat",
    "autoscaling.enabled=true",
    "monitoring.podMonitor=true",
    "imagePullSecrets[0].name=pull",
    "nodeSelector.disk=fast",
    "podAnnotations.a=b",
    "service.annotations.c=d",
]


def values() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return loaded


def render(*settings: str) -> dict[str, dict[str, Any]]:
    """Manifests by kind."""
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("helm is not installed")
    command = [helm, "template", "release", str(CHART), "--namespace", "space"]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(done.stdout) if document}


def test_every_value_that_templates_use_is_there_and_used() -> None:
    used = set(re.findall(r"\.Values\.([\w.]+)", "".join(file.read_text() for file in TEMPLATES)))
    known = values()
    for path in used:
        place: Any = known
        for name in path.split("."):
            assert isinstance(place, dict) and name in place, path
            place = place[name]
    for name, part in known.items():
        for path in [f"{name}.{inner}" for inner in part] if isinstance(part, dict) and part else [name]:
            assert any(path == other or path.startswith(f"{other}.") for other in used), f"{path} is a dead value"


def test_options_are_those_of_apar_serve() -> None:
    given = set(re.findall(r"- (--[\w-]+)", (CHART / "templates" / "deployment.yaml").read_text()))
    assert {"--host", "--drain-seconds", "--api-key-file"} <= given
    assert given <= set(make_parser()._option_string_actions)


def test_metrics_of_the_autoscaler_exist() -> None:
    asked = set(re.findall(r"apar:(\w+)", (CHART / "templates" / "scaledobject.yaml").read_text()))
    known = (ROOT / "triton_repo" / "apar" / "1" / "apar_model" / "engine_metrics.py").read_text()
    assert len(asked) == 2
    assert all(f'"{name}": ' in known for name in asked)


def test_image_runs_apar_serve() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["tini", "--", "/opt/apar/bin/apar", "serve"]' in text
    assert "not built" in text
    assert "APAR_CACHE=/tmp/" in text and "TRITON_CACHE_DIR=/tmp/" in text, "the chart's root file system is read-only"
    assert "ARG EXTRAS" in text.partition("AS build")[2].partition("FROM")[2], "the last stage has a compiler for GPUs"


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert f'version = "{chart["appVersion"]}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("settings", [[], EVERYTHING])
def test_manifests(settings: list[str]) -> None:
    found = render(*settings)
    deployment, service = found["Deployment"], found["Service"]
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= labels
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    (container,) = pod["spec"]["containers"]
    options = make_parser().parse_command(container["args"])
    assert options.host == "0.0.0.0" and pod["spec"]["terminationGracePeriodSeconds"] > options.drain_seconds + 20
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    probes = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probes == {"/health", "/health/live"}
    if settings:
        assert set(pod["metadata"]["annotations"]) == {"a"}, "scraped by the PodMonitor, and only once"
        assert options.engine == "/engine" and options.kv_memory_mb == 8192 and options.model_name == "chat"
        scaled = found["ScaledObject"]["spec"]
        assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert "replicas" not in deployment["spec"], "the autoscaler's"
        assert found["PodMonitor"]["spec"]["selector"]["matchLabels"].items() <= labels
    else:
        assert set(found) == {"Deployment", "Service", "PodDisruptionBudget"}
        assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(container["ports"][0]["containerPort"])
