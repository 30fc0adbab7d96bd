"""launch/ without a cluster: scripts under shellcheck, manifests against schemas, and the programs they call stubbed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from embedjax import launch
from embedjax.__main__ import run
from embedjax.config.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "launch"
CONFIG = "configs/quickstart.py"
SETTINGS = {
    "local": {},
    "slurm": {"nodes": "2"},
    "tpu-vm": {"zone": "z", "accelerator": "v5litepod-16", "nfs": "10.0.0.2:/share", "run_dir": "/runs/r"},
    "jobset-tpu": {"image": "i", "claim": "shared", "run_dir": "/runs/r", "slices": "2"},
    "jobset-gpu": {"image": "i", "claim": "shared", "run_dir": "/runs/r", "hosts": "4"},
    "sky": {"volume": "v", "run_dir": "/runs/r"},
}


# ---- scripts


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_vm.sh"])
def test_scripts_are_sound(name):
    subprocess.run(["bash", "-n", FILES / name], check=True)
    beside = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run([beside if beside.exists() else "shellcheck", FILES / name], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def stub(folder, name, script):
    """A program of that name, first on the path, that writes its arguments down and then runs `script`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    log = f'printf "%s\\n" "$(IFS="|"; echo "{name}|$*")" >> "{folder}/calls"'
    path.write_text(f"#!/bin/bash\n{log}\n{script}\n")
    path.chmod(0o755)


def calls(folder):
    return [re.sub("  +", " ", line).split("|") for line in (folder / "calls").read_text().splitlines()]


def with_stubs(folder, **variables):
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}


@pytest.mark.parametrize(
    ("code", "lost", "requeued"),
    [
        (0, 0, False),
        (75, 20, True),
        (70, 3, True),
        (70, 20, False),
        (137, 0, True),
        (139, 20, False),
        (2, 3, False),
        (130, 0, False),
    ],
)
def test_slurm_requeues_what_was_saved_or_lost(code, lost, requeued, tmp_path):
    """Those that were lost before are counted; those that were saved, as by a time limit, are not."""
    count = tmp_path / "embedjax-31.lost"
    count.write_text(f"{lost}\n")
    stub(tmp_path, "scontrol", 'if [ "$1" = show ]; then printf "a1\\na2\\n"; fi')
    stub(tmp_path, "srun", f'echo "$EMBEDJAX_COORDINATOR $EMBEDJAX_PROCESS_COUNT"; exit {code}')
    variables = {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_ID": "31", "SLURM_NTASKS": "2", "SLURM_RESTART_COUNT": "30"}
    command = ["bash", str(FILES / "slurm.sbatch"), "c.py", "--name", "two words"]
    found = subprocess.run(command, env=with_stubs(tmp_path, **variables), capture_output=True, text=True, cwd=tmp_path)
    assert (int(count.read_text()) if count.exists() else None) == (lost + (code != 75) if requeued else None)
    assert found.stdout.startswith("a1:20031 2\n")
    assert found.returncode == (0 if requeued else code)
    assert (["scontrol", "requeue", "31"] in calls(tmp_path)) == requeued
    srun = next(call for call in calls(tmp_path) if call[0] == "srun")
    assert srun[-6:] == ["task", "embedjax", "train", "c.py", "--name", "two words"]


def test_tpu_vm_waits_installs_runs_and_starts_over(tmp_path):
    """The slice is taken away once: asked for, waited for, run; deleted, asked for again, run to the end, deleted."""
    # States in the order they are asked for; after the run that was interrupted the request is suspended.
    # Once it cannot be asked, which does not mean that there is none.
    states = ["NOT_FOUND", "WAITING_FOR_RESOURCES", "503", "ACTIVE", "SUSPENDED", "NOT_FOUND", "ACTIVE"]
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    (tmp_path / "codes").write_text("75\n0\n")
    take = lambda name: f'head -n 1 "{tmp_path}/{name}"; sed -i 1d "{tmp_path}/{name}"'
    state = f'state=$({take("states")}); case $state in NOT_FOUND|503) echo "ERROR: $state" >&2; exit 1;; esac; echo $state'
    script = f'case "$*" in *describe*) {state};; *embedjax\\ train*) echo "EMBEDJAX_EXIT=$({take("codes")})";; esac'
    stub(tmp_path, "gcloud", script)
    command = launch.prepare("tpu-vm", [CONFIG, "--name", "two words"], {**SETTINGS["tpu-vm"], "name": "pod", "poll": "0"})
    found = subprocess.run(command.argv, env=with_stubs(tmp_path, **command.environment), capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    made = [call[1:] for call in calls(tmp_path)]
    queued, zone = ["compute", "tpus", "queued-resources"], ["--zone", "z"]
    ask = [*queued, "describe", "pod", *zone, "--format=value(state.state)"]
    create = [*queued, "create", "pod", "--node-id", "pod", *zone, "--accelerator-type", "v5litepod-16"]
    create += ["--runtime-version", "v2-alpha-tpuv5-lite", "--spot"]
    delete = [*queued, "delete", "pod", *zone, "--force", "--quiet"]
    ssh = ["compute", "tpus", "tpu-vm", "ssh", "pod", *zone, "--worker=all", "--command"]
    copy = ["compute", "tpus", "tpu-vm", "scp", "--recurse", str(ROOT), "pod:embedjax-checkout", *zone, "--worker=all"]
    venv = "python3 -m pip install --quiet uv && python3 -m uv venv --quiet --allow-existing --python 3.12 embedjax-venv &&"
    venv = [*ssh, f"{venv} python3 -m uv pip install --quiet --python embedjax-venv -e 'embedjax-checkout[tpu,gcs]'"]
    train = "cd embedjax-checkout && EMBEDJAX_COORDINATOR=auto ~/embedjax-venv/bin/python -m embedjax train "
    train = [*ssh, train + r"configs/quickstart.py --name two\ words --run-dir /runs/r ; echo EMBEDJAX_EXIT=$?"]
    made = [["mount"] if "mountpoint" in "".join(call) else call for call in made]
    once = [[*ssh, "rm -rf embedjax-checkout"], copy, venv, ["mount"], train]
    assert made == [ask, create, ask, ask, ask, *once, ask, delete, ask, create, ask, *once, delete]
    assert "ERROR: 503" in found.stderr and "NOT_FOUND" not in found.stderr


def test_tpu_vm_copies_the_config_of_an_installed_package(tmp_path):
    stub(tmp_path, "gcloud", 'case "$*" in *describe*) echo ACTIVE;; *embedjax\\ train*) echo EMBEDJAX_EXIT=0;; esac')
    (tmp_path / "mine.py").write_text("")
    settings = {**SETTINGS["tpu-vm"], "poll": "0", "keep": "1", "source": "embedjax[tpu]"}
    command = launch.prepare("tpu-vm", [str(tmp_path / "mine.py:tiny"), "--steps", "3"], settings)
    found = subprocess.run(command.argv, env=with_stubs(tmp_path, **command.environment), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    made = [call for call in calls(tmp_path) if "describe" not in call]
    assert made[0][-1] == "rm -rf embedjax-checkout && mkdir embedjax-checkout"
    assert [str(tmp_path / "mine.py"), "embedjax:embedjax-checkout/"] == made[1][6:8]
    assert "cd embedjax-checkout && " in made[-1][-1] and "train mine.py:tiny --steps 3 --run-dir /runs/r" in made[-1][-1]


def on_a_worker(tmp_path, settings):
    """What one worker runs when the slice is there: gcloud runs the commands here, and the programs they call are stubs."""
    script = """
case "$*" in
  *"storage buckets describe"*) echo "${NAMED:-True}";;
  *describe*) echo ACTIVE;;
  *"embedjax train"*) echo EMBEDJAX_EXIT=0;;
  *mountpoint*) bash -c "${@: -1}";;
esac"""
    stub(tmp_path, "gcloud", script)
    stub(tmp_path, "sudo", 'case "$1" in tee) cat >&2;; esac')
    for name, result in {
        "mountpoint": "exit 1",
        "curl": "echo KEY",
        "lsb_release": "echo jammy",
        "gcsfuse": "",
        "id": "echo 7",
    }.items():
        stub(tmp_path, name, result)
    base = {name: value for name, value in SETTINGS["tpu-vm"].items() if name != "nfs"}
    command = launch.prepare("tpu-vm", [CONFIG], {**base, "poll": "0", "keep": "1", **settings})
    variables = with_stubs(tmp_path, **command.environment)
    return subprocess.run(command.argv, env=variables, capture_output=True, text=True)


def test_tpu_vm_mounts_an_nfs_share(tmp_path):
    found = on_a_worker(tmp_path, {"nfs": "10.0.0.2:/a share"})
    assert found.returncode == 0, found.stderr
    made = [call for call in calls(tmp_path) if call[0] != "gcloud"]
    assert ["sudo", "mount", "-t", "nfs", "-o", "nolock", "10.0.0.2:/a share", "/runs"] in made
    assert made[0] == ["mountpoint", "-q", "/runs"] and any("nfs-common" in call for call in made)


def test_tpu_vm_mounts_a_bucket(tmp_path):
    found = on_a_worker(tmp_path, {"bucket": "b"})
    assert found.returncode == 0, found.stderr
    source = "deb [signed-by=/usr/share/keyrings/gcsfuse.asc] https://packages.cloud.google.com/apt gcsfuse-jammy main"
    assert source in found.stderr and "KEY" in found.stderr
    made = calls(tmp_path)
    assert made[-2] == ["gcsfuse", "--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0", "b", "/runs"]
    assert ["sudo", "chown", "7", "/runs"] in made


def test_tpu_vm_refuses_a_flat_bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("NAMED", " ")
    found = on_a_worker(tmp_path, {"bucket": "b"})
    assert found.returncode == 2 and "hierarchical namespace" in found.stderr and len(calls(tmp_path)) == 1


@pytest.mark.parametrize(("source", "told"), [("", f"c.py is no file of {ROOT}"), ("embedjax", "c.py: no such config file")])
def test_tpu_vm_refuses_a_config_that_is_not_copied(tmp_path, source, told):
    stub(tmp_path, "gcloud", "")
    given = {"NAME": "n", "ZONE": "z", "ACCELERATOR": "a", "RUN_DIR": "/runs/r", "NFS": "h:/s", "SOURCE": source}
    command = ["bash", str(FILES / "tpu_vm.sh"), "c.py:f"]
    found = subprocess.run(command, env=with_stubs(tmp_path, **given), capture_output=True, text=True)
    assert found.returncode == 2 and told in found.stderr and not (tmp_path / "calls").exists()


def test_tpu_vm_gives_up_where_it_is_never_answered(tmp_path):
    stub(tmp_path, "gcloud", 'echo "ERROR: PERMISSION_DENIED" >&2; exit 1')
    command = launch.prepare("tpu-vm", ["configs/clip.py:l14"], {**SETTINGS["tpu-vm"], "poll": "0"})
    assert command.argv[-1] == "configs/clip.py:l14"
    found = subprocess.run(command.argv, env=with_stubs(tmp_path, **command.environment), capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr.count("PERMISSION_DENIED") == len(calls(tmp_path)) == 10


@pytest.mark.parametrize("changed", [{"RUN_DIR": "/home/r"}, {"RUN_DIR": "/runs/"}, {"NFS": ""}])
def test_tpu_vm_refuses_what_it_does_not_mount(changed, tmp_path):
    stub(tmp_path, "gcloud", "")
    given = {"NAME": "n", "ZONE": "z", "ACCELERATOR": "a", "RUN_DIR": "/runs/r", "NFS": "h:/s", **changed}
    command = ["bash", str(FILES / "tpu_vm.sh"), CONFIG]
    found = subprocess.run(command, env=with_stubs(tmp_path, **given), capture_output=True, text=True)
    assert found.returncode == 2 and "/runs" in found.stderr and not (tmp_path / "calls").exists()


def test_tpu_vm_goes_on_after_a_signal(tmp_path):
    (tmp_path / "codes").write_text("139\n0\n")
    code = f'head -n 1 "{tmp_path}/codes"; sed -i 1d "{tmp_path}/codes"'
    stub(tmp_path, "gcloud", f'case "$*" in *describe*) echo ACTIVE;; *embedjax\\ train*) echo EMBEDJAX_EXIT=$({code});; esac')
    command = launch.prepare("tpu-vm", [CONFIG], {**SETTINGS["tpu-vm"], "poll": "0"})
    found = subprocess.run(command.argv, env=with_stubs(tmp_path, **command.environment), capture_output=True, text=True)
    assert found.returncode == 0 and "starting again" in found.stdout


@pytest.mark.parametrize("code", [2, 5])
def test_tpu_vm_gives_up_on_an_error(code, tmp_path):
    stub(tmp_path, "gcloud", f'case "$*" in *describe*) echo ACTIVE;; *embedjax\\ train*) echo EMBEDJAX_EXIT={code};; esac')
    command = launch.prepare("tpu-vm", [CONFIG], {**SETTINGS["tpu-vm"], "poll": "0", "keep": "1"})
    found = subprocess.run(command.argv, env=with_stubs(tmp_path, **command.environment), capture_output=True, text=True)
    assert found.returncode == code
    assert not any("delete" in call for call in calls(tmp_path))


# ---- manifests


def strict(properties, required=()):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def many(items, **more):
    return {"type": "array", "items": items, **more}


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TEXTS = many(TEXT)
LABELS = {"type": "object", "additionalProperties": TEXT}
COUNT = {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
# Of Kubernetes' own types (core/v1, batch/v1), what the manifests use: names, types, what is required, and values that are
# allowed; what its API checks besides, where it matters here.
CONTAINER = strict(
    {
        "name": NAME,
        "image": {"type": "string", "minLength": 1},
        "command": TEXTS,
        "args": TEXTS,
        "env": many(
            strict(
                {"name": TEXT, "value": TEXT, "valueFrom": strict({"fieldRef": strict({"fieldPath": TEXT}, ["fieldPath"])})},
                ["name"],
            )
        ),
        "ports": many(strict({"containerPort": {"type": "integer", "minimum": 1, "maximum": 65535}}, ["containerPort"])),
        "resources": strict({"limits": {"type": "object", "additionalProperties": {"type": ["integer", "string"]}}}),
        "volumeMounts": many(strict({"name": NAME, "mountPath": TEXT}, ["name", "mountPath"])),
    },
    ["name"],
)
VOLUME = strict(
    {
        "name": NAME,
        "emptyDir": strict({"medium": {"enum": ["", "Memory"]}}),
        "persistentVolumeClaim": strict({"claimName": NAME, "readOnly": FLAG}, ["claimName"]),
    },
    ["name"],
)
POD = strict(
    {
        "restartPolicy": {"enum": ["Never"]},  # Kubernetes asks it of a job with a pod failure policy
        "terminationGracePeriodSeconds": COUNT,
        "nodeSelector": LABELS,
        "containers": many(CONTAINER, minItems=1),
        "volumes": many(VOLUME),
    },
    ["containers", "restartPolicy"],
)
POD_RULE = strict(
    {
        "action": {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
        "onExitCodes": strict(
            {
                "containerName": TEXT,
                "operator": {"enum": ["In", "NotIn"]},
                "values": many({"type": "integer", "minimum": 1, "maximum": 255}, minItems=1, maxItems=255, uniqueItems=True),
            },
            ["operator", "values"],
        ),
        "onPodConditions": many(
            strict({"type": TEXT, "status": {"enum": ["True", "False", "Unknown"]}}, ["type", "status"]), maxItems=20
        ),
    },
    ["action"],
)
JOB = strict(
    {
        "completionMode": {"enum": ["Indexed", "NonIndexed"]},
        "parallelism": COUNT,
        "completions": COUNT,
        "backoffLimit": COUNT,
        "podFailurePolicy": strict({"rules": many(POD_RULE, maxItems=20)}, ["rules"]),
        "template": strict({"metadata": strict({"labels": LABELS, "annotations": LABELS}), "spec": POD}),
    },
    ["template"],
)
# JobSet's own fields, all of them, as the CRD of jobset.x-k8s.io/v1alpha2 (kubernetes-sigs/jobset) has them, and what its
# webhook asks besides: the reasons, the name of a rule. What newer ones add is left out, for a cluster may not have it yet:
# onJobFailureMessagePatterns, volumeClaimPolicies, InPlaceRestart, RestartJob and RestartJobAndIgnoreMaxRestarts.
FAILURE_RULE = strict(
    {
        "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", "maxLength": 128},
        "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
        "onJobFailureReasons": many(
            {
                "enum": [
                    "BackoffLimitExceeded",
                    "DeadlineExceeded",
                    "FailedIndexes",
                    "MaxFailedIndexesExceeded",
                    "PodFailurePolicy",
                ]
            }
        ),
        "targetReplicatedJobs": TEXTS,
    },
    ["action", "name"],
)
REPLICATED_JOB = strict(
    {
        "name": NAME,
        "groupName": TEXT,
        "replicas": COUNT,
        "template": strict(
            {
                "metadata": strict(
                    {"name": TEXT, "namespace": TEXT, "labels": LABELS, "annotations": LABELS, "finalizers": TEXTS}
                ),
                "spec": JOB,
            }
        ),
        "dependsOn": many(strict({"name": TEXT, "status": {"enum": ["Ready", "Complete"]}}, ["name", "status"])),
    },
    ["name", "template"],
)
JOBSET = strict(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": strict({"name": NAME, "annotations": LABELS}, ["name"]),
        "spec": strict(
            {
                "replicatedJobs": many(REPLICATED_JOB, minItems=1),
                "network": strict({"enableDNSHostnames": FLAG, "subdomain": TEXT, "publishNotReadyAddresses": FLAG}),
                "successPolicy": strict({"operator": {"enum": ["All", "Any"]}, "targetReplicatedJobs": TEXTS}, ["operator"]),
                "failurePolicy": strict(
                    {
                        "maxRestarts": COUNT,
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                        "rules": many(FAILURE_RULE),
                    }
                ),
                "startupPolicy": strict({"startupPolicyOrder": {"enum": ["AnyOrder", "InOrder"]}}, ["startupPolicyOrder"]),
                "suspend": FLAG,
                "coordinator": strict({"replicatedJob": TEXT, "jobIndex": NUMBER, "podIndex": NUMBER}, ["replicatedJob"]),
                "managedBy": TEXT,
                "ttlSecondsAfterFinished": COUNT,
            }
        ),
    },
    ["apiVersion", "kind", "metadata", "spec"],
)
CLAIM = strict(
    {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "PersistentVolumeClaim"},
        "metadata": strict({"name": NAME}, ["name"]),
        "spec": strict(
            {
                "accessModes": many({"const": "ReadWriteMany"}, minItems=1),
                "storageClassName": TEXT,
                "resources": strict({"requests": strict({"storage": {"type": "string", "pattern": "^[0-9]+[GT]i$"}})}),
            },
            ["accessModes", "resources"],
        ),
    },
    ["apiVersion", "kind", "metadata", "spec"],
)


def manifest(target, **settings):
    return yaml.safe_load(launch.prepare(target, ["configs/x.py", "--name", "two words"], SETTINGS[target] | settings).text)


@pytest.mark.parametrize("target", ["jobset-tpu", "jobset-gpu"])
def test_jobsets_follow_the_schema(target):
    made = manifest(target)
    jsonschema.Draft202012Validator.check_schema(JOBSET)
    jsonschema.validate(made, JOBSET)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert container["args"][:4] == ["train", "configs/x.py", "--name", "two words"] and container["args"][-2] == "--run-dir"
    assert job["parallelism"] == job["completions"] == 4  # one pod a host
    # Exit code 75 of our container fails the job for the reason that the set's rule restarts it for.
    rules = job["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    assert made["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    # The run folder is in what the claim mounts, and the claim is the one that was named.
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in job["template"]["spec"]["volumes"]}
    assert mounts.keys() == volumes.keys() and volumes["runs"]["persistentVolumeClaim"] == {"claimName": "shared"}
    assert mounts["runs"] == launch.MOUNT and Path(container["args"][-1]).parent == Path(mounts["runs"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("failurePolicy.rules.0.action", "RestartAll"),
        ("failurePolicy.rules.0.onJobFailureReasons.0", "ExitCode"),
        ("failurePolicy.rules.0", {"action": "RestartJobSet"}),  # the CRD asks for its name too
        ("failurePolicy.restartStrategy", "Recreated"),
        ("failurePolicy.maxRestart", 3),
        ("successPolicy", {"operator": "Most"}),
        ("network.enableDNSHostname", True),
        ("replicatedJobs.0.replica", 2),
        ("replicatedJobs.0.template.spec.podFailurePolicy.rules.1.onPodConditions.0", {"type": "DisruptionTarget"}),
        ("replicatedJobs.0.template.spec.template.spec.volumes.0.persistentVolumeClaim", {"claim": "shared"}),
    ],
)
def test_the_schema_refuses(path, value):
    broken = manifest("jobset-gpu")
    *above, last = path.split(".")
    node = broken["spec"]
    for key in above:
        node = node[int(key) if isinstance(node, list) else key]
    node[int(last) if isinstance(node, list) else last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, JOBSET)


def test_the_claim_that_storage_makes():
    made = yaml.safe_load((FILES / "storage.yaml").read_text())
    jsonschema.validate(made, CLAIM)
    assert f"claim={made['metadata']['name']}" in (FILES / "jobset-tpu.yaml").read_text()


def test_jobset_gpu_tells_the_pods_of_each_other():
    made = manifest("jobset-gpu", name="bert")
    env = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert env[0]["value"] == "bert-node-0-0.bert:8476" and env[1]["value"] == "4"
    assert {"name": "JAX_PLATFORMS", "value": "cuda,cpu"} in env  # or a driver that is not found means a run on the CPU


def test_sky():
    task = yaml.safe_load((FILES / "sky.yaml").read_text())
    known = {"name", "resources", "num_nodes", "workdir", "envs", "file_mounts", "volumes", "setup", "run"}
    assert set(task) <= known and {"name", "resources", "run"} <= set(task)
    # A volume, which all nodes mount; a bucket is no file system.
    assert task["volumes"] == {launch.MOUNT: "${VOLUME}"} and Path(task["envs"]["RUN_DIR"]).parent == Path(launch.MOUNT)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 70]
    assert set(re.findall(r"\$\{?([A-Z]+)\}?", task["setup"])) <= set(task["envs"])
    made = launch.prepare("sky", [str(ROOT / CONFIG), "--name", "two words"], {**SETTINGS["sky"], "nodes": "2"})
    command = made.argv
    assert task["workdir"] == "." and made.folder == ROOT and f"CONFIG={CONFIG}" in command
    assert command[:4] == ["sky", "jobs", "launch", "--yes"] and command[-1].endswith("sky.yaml")
    assert set(word.partition("=")[0] for flag, word in zip(command, command[1:], strict=False) if flag == "--env") <= set(
        task["envs"]
    )


def test_sky_runs_the_arguments_as_given(tmp_path):
    task = yaml.safe_load((FILES / "sky.yaml").read_text())
    (tmp_path / "embedjax-venv").mkdir()
    venv = tmp_path / "embedjax-venv" / "bin"
    stub(venv, "python", 'echo "$EMBEDJAX_COORDINATOR $EMBEDJAX_PROCESS_COUNT $EMBEDJAX_PROCESS_ID"')
    variables = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    variables |= {"CONFIG": "c.py", "ARGS": "--name 'two words'", "RUN_DIR": "/runs/r", "HOME": str(tmp_path)}
    found = subprocess.run(["bash", "-c", task["run"]], env=with_stubs(tmp_path, **variables), capture_output=True, text=True)
    assert found.stdout == "10.0.0.1:8476 2 1\n"
    assert calls(venv) == [["python", "-m", "embedjax", "train", "c.py", "--run-dir", "/runs/r", "--name", "two words"]]


@pytest.mark.parametrize(("extra", "installed"), [("", ".[gcs]"), ("tpu", ".[gcs,tpu]")])
def test_images_and_nodes_can_read_buckets(extra, installed, tmp_path):
    stub(tmp_path, "python3", "")
    stub(tmp_path, "python", "")
    setup = yaml.safe_load((FILES / "sky.yaml").read_text())["setup"]
    image = next(line for line in (FILES / "Dockerfile").read_text().splitlines() if line.startswith("RUN python"))
    for script in (setup, image.removeprefix("RUN ")):
        subprocess.run(["sh", "-c", script], env=with_stubs(tmp_path, EXTRA=extra), check=True)
    assert [call[-1] for call in calls(tmp_path)] == ["uv", str(Path.home() / "embedjax-venv"), installed, installed]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "gcsfs" in extras["gcs"][0] and "tpu" in extras


def test_dockerfile_copies_what_is_there():
    lines = (FILES / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    assert lines[-1] == 'ENTRYPOINT ["embedjax"]'


# ---- the verb


@pytest.mark.parametrize("target", launch.TARGETS)
def test_dry_run_prints_and_runs_nothing(target, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("it ran"))
    settings = [word for name, value in SETTINGS[target].items() for word in ("--with", f"{name}={value}")]
    monkeypatch.setattr(os, "execvpe", lambda *a: pytest.fail("it ran"))
    assert run(["launch", target, CONFIG, *settings, "--steps", "3", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert CONFIG in out and "--steps" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["slrm", "c.py"], ["slrm", "'slurm'"]),
        (["slurm"], ["config file"]),
        (["jobset-tpu", "c.py"], ["--with image=...", "--with claim=...", "--with run_dir=..."]),
        (["sky", "c.py", "--with", "volum=b"], ["volum", "'volume'"]),
        (["local", "c.py", "--with", "processes"], ["NAME=VALUE"]),
        (["sky", "c.py", "--with", "volume=v", "--with", "run_dir=/runs/r"], ["c.py: no file of", "launch sky copies"]),
    ],
)
def test_wrong_launches(arguments, words, capsys):
    assert run(["launch", *arguments]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err


@pytest.mark.parametrize("target", ["tpu-vm", "jobset-tpu", "jobset-gpu", "sky"])
@pytest.mark.parametrize("folder", ["gs://b/r", "/home/r", "runs/r", "/runs", "/runs/../r", "/runsx/r"])
def test_a_run_folder_that_is_not_mounted(target, folder):
    with pytest.raises(ConfigError, match="mount"):
        launch.prepare(target, [CONFIG], SETTINGS[target] | {"run_dir": folder})


@pytest.mark.parametrize("changed", [{"nfs": ""}, {"bucket": "b"}])
def test_tpu_vm_mounts_one_thing(changed):
    with pytest.raises(ConfigError, match="one of --with nfs"):
        launch.prepare("tpu-vm", ["c.py"], SETTINGS["tpu-vm"] | changed)


def test_what_is_launched_gets_the_signals(tmp_path):
    """Its exit code is the command's own: 75 where it was asked to stop and saved."""
    script = 'trap "sleep 0.5; exit 75" TERM; pwd; while :; do sleep 0.1; done'
    source = f"from pathlib import Path; from embedjax import launch\nlaunch.run(launch.Command(['bash', '-c', {script!r}], "
    source += f"folder=Path({str(tmp_path)!r})))"
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", source], env=variables, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == f"{tmp_path}\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75


def test_a_program_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not installed"):
        launch.run(launch.prepare("slurm", ["c.py"], {}))
    with pytest.raises(ConfigError, match="kubectl is not installed"):
        launch.run(launch.prepare("jobset-gpu", ["c.py"], SETTINGS["jobset-gpu"]))


def test_an_installed_package_says_where_the_files_are(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "site-packages" / "embedjax" / "launch.py"))
    with pytest.raises(ConfigError, match="clone it"):
        launch.prepare("local", ["c.py"], {})


# ---- several processes of this machine


def pretender(tmp_path, script):
    """An environment in which `python -m embedjax` is a small script."""
    package = tmp_path / "pretended" / "embedjax"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(
        f"import os, sys, time, pathlib, signal\nfolder = pathlib.Path({str(tmp_path)!r})\n{script}\n"
    )
    return {**os.environ, "PYTHONPATH": str(package.parent), "CUDA_VISIBLE_DEVICES": ""}


TELL = """
name = os.environ["EMBEDJAX_PROCESS_ID"]
log = folder / f"log-{name}"
with log.open("a") as file:
    print(os.environ["EMBEDJAX_PROCESS_COUNT"], *sys.argv[1:], file=file)
attempt = len(log.read_text().splitlines())
"""


def local(tmp_path, script, **variables):
    command = [sys.executable, str(FILES / "local.py"), "2", "c.py", "--steps", "3"]
    return subprocess.run(
        command, env=pretender(tmp_path, TELL + script) | variables, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )


def test_local_starts_again_when_a_process_is_lost(tmp_path):
    """First one is killed and the other reports the loss; then all are saved; then all come to the end."""
    script = (
        'if attempt == 1:\n    os.kill(os.getpid(), 9) if name == "1" else sys.exit(70)\nsys.exit(75 if attempt == 2 else 0)'
    )
    found = local(tmp_path, script)
    assert found.returncode == 0 and found.stderr.count("starting 2 processes again") == 2
    for name in "01":
        assert (tmp_path / f"log-{name}").read_text() == "2 train c.py --steps 3\n" * 3


@pytest.mark.parametrize("codes", [(75, 143), (75, -15), (143, 143)])
def test_local_asked_to_stop_before_there_was_anything_to_save(tmp_path, codes):
    """Saved as far as there is anything: the same command goes on. Unasked, it does so itself."""
    first, second = codes
    leave = lambda code: "os.kill(os.getpid(), 15)" if code < 0 else f"sys.exit({code})"
    found = local(tmp_path, f'sys.exit(0) if attempt > 1 else {leave(second)} if name == "1" else {leave(first)}', RESTARTS="0")
    assert found.returncode == 0 and "exit 75: starting" in found.stderr


def test_local_gives_up_on_an_error_and_on_too_many_losses(tmp_path):
    assert local(tmp_path, 'sys.exit(3 if name == "1" else 70)').returncode == 3
    shutil.rmtree(tmp_path / "pretended")
    found = local(tmp_path, "sys.exit(70)", RESTARTS="1")
    assert found.returncode == 70 and found.stderr.count("again") == 1


def test_local_ends_those_that_hang(tmp_path):
    found = local(tmp_path, 'sys.exit(2) if name == "1" else time.sleep(60)', PATIENCE="0.5")
    assert found.returncode == 2


@pytest.mark.slow
def test_local_trains_saves_and_resumes(tmp_path, config_file):
    config = config_file(400)
    folder = tmp_path / "run"
    command = launch.prepare("local", [str(config), "--run-dir", str(folder)], {"processes": "2"}).argv
    variables = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    metrics = folder / "metrics.jsonl"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 240
            while not (metrics.exists() and metrics.read_text().count("\n") > 5):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 75, (tmp_path / "log").read_text()
        finally:
            process.kill()
    done = metrics.read_text().count("\n")
    assert 5 < done < 400
    again = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 401))
