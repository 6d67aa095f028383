"""The command line as a user has it: its two streams, its exit code, and what it leaves on the disk.

What `launch` begins is a process; where nothing hangs on that, `call` has the same program in that of the test.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors import safe_open

from tests import program
from tests.program import Done

if TYPE_CHECKING:
    from tests.program import Call

ROOT = Path(__file__).resolve().parents[2]
X17, X11C = (f"{name}-AstolfoMix-x13te0x14te1.safetensors" for name in ("x17", "x11c"))
PATIENCE_SECONDS = 120


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), *arguments]


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=cwd, timeout=PATIENCE_SECONDS)


@pytest.fixture
def demo(demo_dir: Path, tmp_path: Path) -> list[str]:
    """Overrides for a merge of the demo set into a folder of the test's own."""
    return [f"models.dir={demo_dir}", f"out={tmp_path / 'out'}", "executor=local"]


@pytest.fixture(scope="module")
def merged(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """What `python launch.py executor=local` makes of the demo set."""
    out = tmp_path_factory.mktemp("merged")
    done = launch(f"models.dir={demo_dir}", f"out={out}", "executor=local", cwd=out)
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture(scope="module")
def x39a(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """What `python launch.py recipe=x39a executor=local` makes of the demo set."""
    out = tmp_path_factory.mktemp("x39a")
    done = program.call(f"models.dir={demo_dir}", f"out={out}", "executor=local", "recipe=x39a")
    assert done.code == 0, done.err
    return out / "x39a.safetensors", done


def tensors_sha256(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def test_the_demo_makes_both_targets_and_a_manifest_and_nothing_else(
    merged: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = merged
    assert sorted(path.name for path in out.iterdir()) == sorted([X17, X11C, "manifest.json"])
    for name in (X17, X11C):
        with safe_open(out / name, framework="pt") as file:
            assert len(file.keys()) == 2515


def test_the_summary_on_stdout_names_each_file_with_its_size_digest_and_models(
    merged: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = merged
    for name, models in ((X17, "unet: uniform of 32"), (X11C, "unet: uniform of 16")):
        assert str(out / name) in done.stdout
        assert tensors_sha256(out / name) in done.stdout
        assert models in done.stdout
    for word in ("GB/s", "memory", "took"):
        assert word in done.stdout


def test_what_is_odd_in_the_lists_is_noted_on_stderr_and_not_on_stdout(
    merged: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = merged
    assert "model 22 counts more than once, by 11a and 22; it has 1.5 shares of 14" in done.stderr
    assert "note:" not in done.stdout


def test_the_manifest_tells_sources_outputs_and_cost_without_a_path_of_the_machine(
    merged: tuple[Path, subprocess.CompletedProcess[str]], demo_dir: Path
) -> None:
    out, _ = merged
    text = (out / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert str(demo_dir) not in text
    assert str(out) not in text
    assert {output["file"]: output["tensors_sha256"] for output in manifest["outputs"]} == {
        name: tensors_sha256(out / name) for name in (X17, X11C)
    }
    assert {source["id"]: source["size"] for source in manifest["sources"]}["25"] == next(
        demo_dir.glob("_x25-*")
    ).stat().st_size
    assert manifest["outputs"][0]["components"]["te0"]["shares"]["22"] == "3/28"
    assert manifest["bytes_written"] == sum((out / name).stat().st_size for name in (X17, X11C))
    assert manifest["memory"]["peak_by_process"]["driver"] > 0


def test_the_output_says_what_it_is_made_of_and_no_path(
    merged: tuple[Path, subprocess.CompletedProcess[str]], demo_dir: Path
) -> None:
    out, _ = merged
    with safe_open(out / X17, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    recipe = json.loads(metadata["mergeflow"])
    assert recipe["components"]["unet"]["list"][:3] == ["01", "02", "06"]
    assert json.loads(metadata["sd_merge_recipe"])["type"] == "mergeflow"
    assert not any(str(demo_dir) in value or str(out) in value for value in metadata.values())


def test_one_target_alone_is_the_same_file_as_beside_the_other(
    merged: tuple[Path, subprocess.CompletedProcess[str]], demo: list[str], tmp_path: Path, call: Call
) -> None:
    out, _ = merged
    assert call(*demo, "target=x17", "executor.memory=128MiB").code == 0
    assert (tmp_path / "out" / X17).read_bytes() == (out / X17).read_bytes()


def test_the_plan_reads_headers_writes_nothing_and_explains_itself(demo: list[str], tmp_path: Path, call: Call) -> None:
    done = call(*demo, "job=plan")
    assert done.code == 0, done.err
    assert not (tmp_path / "out").exists()
    for line in (
        "te0   uniform of 14 models, written as F16, I64",
        "05 11 17 20 11a 22 23 24 25 26 27 32 36 41",
        "share 1/14 each, but 21 1/28, 22 3/28",
        "vae   model 25 as it is, written as F16",
        "nothing forbids this plan",
    ):
        assert line in done.out


def test_every_problem_of_a_plan_is_told_at_once(demo: list[str], tmp_path: Path, call: Call) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / X11C).write_bytes(b"something dear")
    done = call(*demo, "job=plan", "target.x17.components.vae.model=06", "selection.unet='35,01=2'")
    assert done.code == 1
    assert "problems (4)" in done.out
    assert "248 tensor(s) not in 06" in done.out
    assert "the marker 'v_pred' is in 35 and not in 01" in done.out
    assert "overwrite=true" in done.out
    assert "this plan cannot be carried out" in done.out


MISTAKES = {
    "a typo in an option": (["executor.wrokers=2"], 2, "did you mean 'executor.workers'?"),
    "a typo in a group": (["exectuor=ray"], 2, "did you mean 'executor'?"),
    "a typo in a choice": (["target=x18"], 2, "did you mean 'x17'?"),
    "a typo inside a target": (["target.x17.fil=a"], 2, "did you mean 'target.x17.file'?"),
    "a wrong type": (["executor.workers=many"], 2, "could not be converted to Integer"),
    "a value that is none": (["dtype=fp8"], 2, "expected one of [keep, fp16, bf16, fp32]"),
    "an option that does not exist": (["+colour=red"], 2, "there is no option 'colour'"),
    "an option that would have no effect": (["executor.address=auto"], 2, "is for Ray"),
    "a size that is none": (["executor.memory=lots"], 2, "write 512MiB, 4GiB or 2GB"),
    "a budget that is too small": (["executor.memory=1MiB"], 1, "lower executor.workers"),
    "a folder that is missing": (["models=folder", "models.dir=nowhere"], 1, "nowhere does not exist"),
    "a folder that was not given": (["models=folder", "models.dir=???"], 2, "models.dir is not set"),
    "a count that does not match": (["selection.te0=05,11=3"], 2, "it says =3, but selects 2"),
    "an unknown id": (["selection.te0=05,99"], 2, "'99' is not in"),
    "an id twice": (["selection.te0=05,5"], 2, "'05' is listed 2 times"),
    "an empty list": (["selection.te0='--,--'"], 2, "it selects no model"),
    "a list that no target can find": (["target=single"], 2, "there is no selection 'models'"),
    "something that cannot be read": (["foo=["], 2, "cannot be read"),
    "a shape that is none": (
        ["method=pairwise", "method.shape=ring"],
        2,
        "method.shape=ring is no shape; choose balanced, chain, or write a nested list of ids",
    ),
    "a VAE to bake in that is not named": (
        ["method=pairwise", "method.bake=every"],
        2,
        "method.bake=every needs method.vae=ID, the model whose VAE is baked in",
    ),
    "values to skip in a tree": (
        ["method=pairwise", "nonfinite=skip"],
        2,
        "nonfinite=skip has no meaning for a tree; use error or propagate, or method=uniform",
    ),
    "keys of a tree for a mean": (
        ["method=uniform", "keys=webui"],
        2,
        "keys=webui are the rules of a tree, and method=uniform makes none; add keys=strict, or use method=pairwise",
    ),
    "the mean of a recorded tree by its keys": (
        ["recipe=x39a", "method=uniform"],
        2,
        "keys=webui, which recipe= has chosen, are the rules of a tree, and method=uniform makes none; add keys=strict",
    ),
    "a recipe beside an experiment": (
        ["experiment=round1", "recipe=x39a"],
        2,
        "mergeflow: recipe=x39a has no effect with experiment=round1, which chooses the targets; leave one",
    ),
    "a recipe that is null": (
        ["a=null", "recipe=null", "experiment=null"],
        2,
        "null is no option of recipe= and experiment=; leave it out, or choose one that --help shows",
    ),
    "a tree that no target takes": (
        ["recipe=x39a", "target=x17"],
        2,
        "recipe= has no effect: no target is made of the recorded tree; use target=recorded",
    ),
    "a recipe without its file": (
        ["recipe=file"],
        2,
        "recipe.file is not set; give recipe.file=PATH, a merged file or its metadata as .json",
    ),
    "a recipe whose file is missing": (["recipe=file", "recipe.file=nowhere.json"], 1, "nowhere.json does not exist"),
    "a choice beside a recipe that makes it": (
        ["recipe=file", "recipe.file=nowhere.json", "dtype=fp32"],
        2,
        "dtype has no effect with recipe=file, whose recipe tells it; leave it out",
    ),
    "an unknown node": (
        ["method=pairwise", "method.multipliers.te0-31=0.3"],
        2,
        "method.multipliers names 'te0-31', which is neither a node nor a level of any tree; did you mean 'te0-3'? "
        "(job=plan draws the trees with their names)",
    ),
    "files to compare for another job": (["a=x", "b=y"], 2, "a= and b= are for job=compare, and have no effect on "),
}
COMPARISONS = {
    "nothing to compare": ([], 2, "job=compare needs two files: give a=FILE b=FILE"),
    "nothing to compare with": (["a=x"], 2, "job=compare needs two files: give a=FILE b=FILE"),
    "files to compare that are missing": (["a=x 1", "b=y,2"], 1, "y,2 does not exist"),
    "options of a merge for a comparison": (
        ["a=x", "b=y", "target=x17"],
        2,
        "target has no effect on job=compare, which reads two files as they are; leave it out",
    ),
}
AS_PROCESSES = ("a typo in an option", "a folder that is missing", "an unknown id")


@pytest.mark.parametrize(("arguments", "code", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_a_short_answer(
    arguments: list[str], code: int, words: str, demo: list[str], tmp_path: Path, call: Call
) -> None:
    assert_short_answer(call(*demo, *arguments), code, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "code", "words"), COMPARISONS.values(), ids=COMPARISONS.keys())
def test_a_mistake_in_a_comparison_gets_a_short_answer(
    arguments: list[str], code: int, words: str, tmp_path: Path, call: Call
) -> None:
    assert_short_answer(call("job=compare", "out=out", *arguments), code, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", AS_PROCESSES)
def test_a_mistake_gets_a_short_answer_from_a_process_too(name: str, demo: list[str], tmp_path: Path) -> None:
    arguments, code, words = MISTAKES[name]
    done = launch(*demo, *arguments, cwd=tmp_path)
    assert_short_answer(Done(done.returncode, done.stdout, done.stderr, ""), code, words)
    assert not (tmp_path / "out").exists()


def assert_short_answer(done: Done, code: int, words: str) -> None:
    assert done.code == code, done.err
    assert words in done.err
    assert done.err.startswith("mergeflow: ")
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) <= 6


def test_an_id_that_yaml_reads_as_octal_is_refused(demo: list[str], tmp_path: Path, call: Call) -> None:
    (tmp_path / "mine" / "selection").mkdir(parents=True)
    (tmp_path / "mine" / "selection" / "mine.yaml").write_text("models: [01, 010]\n")
    done = call("-cd", "mine", *demo, "selection=mine", "target=single", "job=plan")
    assert done.code == 2
    assert "YAML does not read 010 as the id that it looks like" in done.err


def test_a_selection_and_a_target_of_ones_own_are_found_in_a_directory_of_ones_own(
    demo: list[str], tmp_path: Path, call: Call
) -> None:
    (tmp_path / "mine" / "selection").mkdir(parents=True)
    (tmp_path / "mine" / "selection" / "mine.yaml").write_text("models: [1, '02', 5]\n")
    done = call("-cd", "mine", *demo, "selection=mine", "target=single")
    assert done.code == 0, done.err
    assert "unet: uniform of 3" in done.out


def test_the_plan_draws_every_tree_once(demo: list[str], tmp_path: Path, call: Call) -> None:
    done = call(*demo, "job=plan", "method=pairwise", "method.multipliers.te0-13=0.4")
    assert done.code == 0, done.err
    for lines in (
        "te0   pairwise (webui) of 14 models, written as F16, I64",
        "        te0-13  B at 0.4\n        ├─ te0-12\n        │  ├─ te0-7\n        │  │  ├─ te0-1 = 05 + 11\n",
        "        │     │  ├─ 11a = 21 + 22\n        │     │  └─ 22\n",
        "te0   pairwise (webui) of 14 models, written as F16, I64\n        by the tree of te0 of x17\n",
        "nothing forbids this plan",
    ):
        assert lines in done.out
    assert done.out.count("te0-1 = 05 + 11") == 1


def test_a_recorded_tree_is_merged_and_says_what_it_is_made_of(
    x39a: tuple[Path, Done],
) -> None:
    path, done = x39a
    assert sorted(file.name for file in path.parent.iterdir()) == ["manifest.json", "x39a.safetensors"]
    assert tensors_sha256(path) in done.out
    with safe_open(path, framework="pt") as file:
        recipe, keys = json.loads(file.metadata()["mergeflow"]), file.keys()
        dtypes = {file.get_slice(key).get_dtype() for key in keys}
    assert dtypes == {"F16"}
    assert recipe["trees"]["x39a"]["nodes"][-1] == ["x39a", [77, 74], 0.2, "weighted_sum", True, None]
    assert set(recipe["components"]["unet"]["shares"].values()) == {"1/40"}


def test_a_file_is_made_again_from_what_it_says_of_itself(
    x39a: tuple[Path, Done], demo: list[str], tmp_path: Path, call: Call
) -> None:
    path, _ = x39a
    done = call(*demo, "recipe=file", f"recipe.file={path}")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_two_files_are_compared_in_a_table_a_picture_and_for_programs(
    x39a: tuple[Path, Done],
    merged: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    call: Call,
) -> None:
    tree, mean = x39a[0], merged[0] / X17
    done = call("job=compare", f"a={tree}", f"b={mean}", "out=compared")
    assert done.code == 0, done.err
    out = tmp_path / "compared"
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.png"]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert (told["a"]["name"], told["b"]["name"], told["equal"]) == (tree.name, X17, False)
    lines = done.out.splitlines()
    assert (lines[0], lines[2]) == (f"a       {tree}", f"b       {mean}")
    assert [line.split()[0] for line in lines if line.startswith(("te0", "te1", "vae", "unet", "all"))] == [
        *("te0", "te1", "vae", "unet", "all"),
        *("te0", "te1", "vae", "unet", "all"),
    ]
    assert lines[-1] == f"written {out / 'compare.json'} and {out / 'compare.png'}"


def test_who_has_read_enough_of_a_comparison_gets_no_traceback(x39a: tuple[Path, Done], tmp_path: Path) -> None:
    arguments = command("job=compare", f"a={x39a[0]}", f"b={x39a[0]}", f"out={tmp_path}")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.close()  # as `| head -1` does once it has its line
    process.stdout = None
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, "Traceback" in errors, "Broken" in errors) == (0, False, False)
    assert json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["equal"] is True


def test_help_shows_the_groups_and_five_examples(tmp_path: Path) -> None:
    done = launch("--help", cwd=tmp_path)
    assert done.returncode == 0
    for group in ("arch", "executor", "experiment", "keys", "method", "models", "recipe", "selection", "target"):
        assert f"\n{group}: " in done.stdout
    assert done.stdout.count("python launch.py") >= 5


def test_showing_the_config_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['launch.py', '--cfg', 'job']\n"
        "from mergeflow.config.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print({'torch', 'ray', 'numpy'} & sys.modules.keys())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("set()\n")
    assert "selection:" in done.stdout


def test_a_sweep_makes_each_alternative_in_a_folder_of_its_own_and_goes_on_after_a_failure(
    demo: list[str], tmp_path: Path, call: Call
) -> None:
    done = call("-m", *demo, "target=x17", "selection.unet='01,02','01,99','02,06'")
    assert done.code == 2
    assert "'99' is not in" in done.err
    made = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.safetensors"))
    assert made == [f"0/{X17}", f"2/{X17}"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_an_interrupted_run_leaves_no_output_and_returns_130_within_three_seconds(
    number: signal.Signals, demo: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(command(*demo), stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    _wait_for(lambda: any(out.glob("*.draft")), process)
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert time.monotonic() - began < 3
    assert process.returncode == 130
    assert "interrupted; no output was written" in errors
    assert "Traceback" not in errors
    assert left_to_resume(out) == ("add resume=true to the same command line" in errors)


def test_an_interrupted_sweep_tells_what_it_has_finished(demo: list[str], tmp_path: Path) -> None:
    alternatives = "selection.unet='01,02','01,06'"
    process = subprocess.Popen(
        command("-m", *demo, "hydra/launcher=basic", "target=x17", alternatives),
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    _wait_for(lambda: any((tmp_path / "out" / "1").glob("*.draft")), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "interrupted; the outputs of 1 finished job(s) are there, and no other" in errors
    assert [path.name for path in (tmp_path / "out").rglob("*.safetensors")] == [X17]


def left_to_resume(directory: Path) -> bool:
    """Whether there are drafts, which then have their journals; there is nothing else."""
    names = {path.name for path in directory.iterdir()}
    drafts = {name for name in names if name.endswith(".draft")}
    assert names == drafts | {f"{name}.journal" for name in drafts}
    return bool(drafts)


def test_an_interrupted_run_on_ray_leaves_no_output_and_no_process(demo: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(*demo, "executor=ray"), stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "Ray is ready" in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # a terminal tells the whole foreground group
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "interrupted; no output was written" in errors
    assert left_to_resume(tmp_path / "out") == ("add resume=true to the same command line" in errors)
    _wait_for(lambda: not _alive_in_session(process.pid))


@pytest.mark.usefixtures("ray")
def test_a_running_cluster_makes_the_same_file_and_is_left_running(
    merged: tuple[Path, subprocess.CompletedProcess[str]], demo: list[str], tmp_path: Path
) -> None:
    import ray

    out, _ = merged
    address = ray.get_runtime_context().gcs_address
    done = launch(
        *demo, "executor=cluster", f"executor.address={address}", "executor.workers=2", "target=x17", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"joining the Ray cluster at {address}" in done.stderr
    assert (tmp_path / "out" / X17).read_bytes() == (out / X17).read_bytes()
    assert ray.get(ray.put("still there")) == "still there"


def _alive_in_session(leader: int) -> list[str]:
    """The processes of the session that `leader` began, zombies aside."""
    listed = subprocess.run(["ps", "-s", str(leader), "-o", "stat=,args="], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if not line.startswith("Z")]


def _wait_for(condition: object, process: subprocess.Popen[str] | None = None) -> None:
    assert callable(condition)
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, "the run was over before it could be interrupted"
        time.sleep(0.005)
