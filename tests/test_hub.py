"""Pushed in one commit, read at one revision, and whatever the hub or the network does, nothing is half done.

Against a server on loopback that speaks the hub's protocol (tests/hub.py). `CAPRESE_TEST_REAL_HUB=1 HF_TOKEN=...
pytest tests/test_hub.py` runs those that make sense there, unchanged, against the real one, in a private repository.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REAL_HUB, byte_tokenizer, recovered, tiny_llama
from hub import READ, WRITE
from huggingface_hub import HfApi
from test_phases import prompts
from typer.testing import CliRunner

import caprese
from caprese.adapters import Adapter
from caprese.adapters import hub as client
from caprese.cli import app
from caprese.efficient_methods import phases_of
from caprese.files import read_sealed, write_sealed

runner = CliRunner()
local = pytest.mark.skipif(REAL_HUB, reason="needs a hub that can be made to fail")


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """Between attempts."""
    if not REAL_HUB:
        monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def repo(hub):
    """A repository name that is free, and is so again afterwards."""
    api = HfApi()
    name = f"{api.whoami()['name']}/caprese-test-{uuid.uuid4().hex[:8]}"
    yield name
    if REAL_HUB:
        api.delete_repo(name, missing_ok=True)


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory):
    """What `recover` leaves behind, of a base with a licence."""
    base = tmp_path_factory.mktemp("hub") / "secret-place" / "tiny-llama"
    shutil.copytree(tiny_dir, base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-license\n---\n\n# tiny\n")
    model, tokenizer = caprese.load_base(str(base))
    sizes = {"train": 12, "validation": 4, "test": 4, "max_new_tokens": 8, "prompts": "gym:simple_equations"}
    out = base.parent / "out"
    recipe = caprese.Recipe(
        model=str(base),
        rank=4,
        output=str(out),
        method="static",
        samples=sizes,
        end_to_end={"epochs": 1},
        evaluation={"latency_tokens": 6},
    )
    caprese.recover(model, tokenizer, recipe)
    return base, out


def answer(model) -> list[int]:
    tokens = model.generate(input_ids=prompts(7)[0], max_new_tokens=12, do_sample=False)
    return tokens[0].tolist()


def held(repo: str) -> list[str]:
    return sorted(HfApi().list_repo_files(repo))


def test_what_is_pushed_is_loaded_in_a_fresh_process_with_the_same_tokens(finished, repo, tmp_path):
    base, out = finished
    caprese.push(out, repo, private=True)
    script = (
        "import sys, json, torch, caprese\n"
        "base, repo, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])\n"
        "model, _ = caprese.load_base(base)\n"
        "model = caprese.load(model, repo)\n"
        "print(json.dumps(model.generate(input_ids=torch.tensor(ids), max_new_tokens=12, do_sample=False)[0].tolist()))"
    )
    ids = json.dumps(prompts(7)[0].tolist())
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": os.environ.get("HF_TOKEN", "")}
    run = [sys.executable, "-c", script, str(base), repo, ids]
    done = subprocess.run(run, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == answer(caprese.load(str(base), out))


def test_one_commit_holds_all_and_no_place_on_this_machine(finished, hub, repo, tmp_path):
    _, out = finished
    facts = caprese.push(out, repo, private=True)
    commits = HfApi().list_repo_commits(repo) if REAL_HUB else hub.repos[repo].commits
    assert len(commits) == 2  # the one that made the repository, and this
    wanted = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "caprese_calibration.safetensors",
        "caprese_config.json",
        "recipe.yaml",
        "report.html",
        "report.json",
    }
    files = set(held(repo))
    assert wanted <= files and any(f.startswith("plots/") for f in files)
    assert not any(f.startswith(("samples", ".state")) for f in files)
    assert set(facts["files"]) == files - {".gitattributes"}
    for name in facts["files"]:
        data = Path(HfApi().hf_hub_download(repo, name, local_dir=tmp_path)).read_bytes()
        assert b"secret-place" not in data and str(out.parent).encode() not in data, name


def test_the_card(finished, repo, tmp_path):
    _, out = finished
    caprese.push(out, repo, private=True)
    card = Path(HfApi().hf_hub_download(repo, "README.md", local_dir=tmp_path)).read_text()
    matter = yaml.safe_load(card.split("---")[1])
    assert matter["base_model"] == "tiny-llama" and matter["base_model_relation"] == "adapter"
    assert matter["library_name"] == "peft" and {"caprese", "lora", "static"} <= set(matter["tags"])
    assert matter["license"] == "other" and matter["license_name"] == "tiny-license"
    assert f'model = caprese.load(model, "{repo}")' in card and "| recovered |" in card
    assert f"hf download {repo} recipe.yaml" in card and "caprese recover --recipe recipe.yaml" in card
    linked = {line.split("](")[1].rstrip(")") for line in card.splitlines() if line.startswith("![")}
    assert linked and linked <= set(held(repo))


def test_a_dry_run_sends_nothing(finished, repo):
    _, out = finished
    shown = json.loads(runner.invoke(app, ["push", str(out), repo, "--dry-run", "--json"]).stdout)
    assert shown["commit"] is None and shown["files"]["adapter_model.safetensors"] > 0
    with pytest.raises(caprese.CapreseError, match="no repository"):
        caprese.info(repo)


def test_private_is_kept(finished, repo):
    _, out = finished
    caprese.push(out, repo, private=True)
    assert HfApi().repo_info(repo).private
    caprese.push(out, repo)  # what is there stays as it is
    assert HfApi().repo_info(repo).private


def test_revisions(finished, repo, tmp_path):
    base, out = finished
    first = caprese.push(out, repo, private=True)["commit"]
    model = caprese.load(str(base), out)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-40)
    caprese.save(model, tmp_path)
    second = caprese.push(tmp_path, repo)["commit"]
    assert "report.json" not in held(repo)  # it was of other weights
    assert answer(caprese.load(str(base), repo)) == answer(caprese.load(str(base), tmp_path))
    old = answer(caprese.load(str(base), out))
    assert old == answer(caprese.load(str(base), repo, revision=first))
    assert old == answer(caprese.load(str(base), f"{repo}@{first}"))
    assert caprese.info(repo, revision=first)["commit"] == first and caprese.info(repo)["commit"] == second
    with pytest.raises(caprese.CapreseError, match=r"has no revision 'v9'"):
        caprese.load(str(base), repo, revision="v9")


@local
@pytest.mark.parametrize("asked", [1, 2, 5])
def test_a_push_between_two_requests_mixes_no_commits(hub, tmp_path, monkeypatch, asked):
    """Sidecar, weights, recipe and report are of one commit, and nothing is asked for after."""
    for seed in (1, 2):
        method = caprese.Griffin(sparsity=0.3 * seed)
        caprese.save(recovered(caprese.apply(tiny_llama(), method), rank=seed, seed=seed), tmp_path / str(seed))
    repo = f"alice/moving-{asked}"
    old = caprese.push(tmp_path / "1", repo)["commit"]
    new = {path.name: path.read_bytes() for path in (tmp_path / "2").iterdir()}
    seen: list[str] = []

    def fault(method: str, path: str) -> None:
        seen.append(path)
        if len(seen) == asked:
            hub.repos[repo].commit("moved on", {**hub.repos[repo].commits[-1].files, **new})

    monkeypatch.setattr(hub, "fault", fault)
    adapter = Adapter.open(repo)
    assert len(seen) > 5 and sum("/revision/" in path for path in seen) == 1
    count, first = len(seen), adapter.commit == old
    assert first == (asked > 1) and set(adapter.ranks.values()) == {1 if first else 2}
    model = caprese.load(tiny_llama(), adapter)
    assert answer(model) == answer(caprese.load(tiny_llama(), tmp_path / ("1" if first else "2")))
    assert adapter.report() is None and adapter.recipe is None and len(seen) == count


def test_pushing_the_same_twice_makes_no_second_commit(finished, repo):
    _, out = finished
    assert caprese.push(out, repo, private=True)["commit"] == caprese.push(out, repo)["commit"]


def test_info_says_what_it_is_and_whether_it_fits(finished, repo, tmp_path):
    base, out = finished
    caprese.push(out, repo, private=True)
    for where in (str(out), repo):
        facts = json.loads(runner.invoke(app, ["info", where, "--json", "--model", str(base)]).stdout)
        assert facts["method"] == "static:0.5" and facts["rank"] == 4 and facts["fits"] is True
        assert facts["base"] == "tiny-llama" and "tiny-llama" in facts["needs"][0]
        assert facts["quality"]["recovered"]["kl"] >= 0 and facts["parameters"] == 3 * 2 * 4 * 32
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(base / "tokenizer.json", tmp_path / "other")
    shutil.copy(base / "tokenizer_config.json", tmp_path / "other")
    other = runner.invoke(app, ["info", repo, "--json", "--model", str(tmp_path / "other")])
    assert other.exit_code == 1 and "other weights" in json.loads(other.stdout)["why_not"]
    assert "static:0.5" in runner.invoke(app, ["info", repo]).stdout


def test_an_adapter_without_a_report_gets_a_card_too(repo, tmp_path):
    caprese.save(recovered(caprese.apply(tiny_llama(), caprese.Griffin())), tmp_path)
    caprese.push(tmp_path, repo, private=True)
    card = Path(HfApi().hf_hub_download(repo, "README.md", local_dir=tmp_path / "got")).read_text()
    assert "griffin:0.5" in card and f'caprese.load(model, "{repo}")' in card
    assert answer(caprese.load(tiny_llama(), repo)) == answer(caprese.load(tiny_llama(), tmp_path))


def test_few_bits_are_the_same_ones_after_a_push(repo, tmp_path):
    """Also their scales, which samples chose, and with no dense copy."""
    methods = caprese.resolve_recipe(method="griffin:0.5+q4:scales=calibrated:head=true").methods
    ids = prompts(7)[0]
    rows = [caprese.Tokens(ids, torch.full((len(ids),), 3))]
    how = {"calibration": caprese.calibrate(tiny_llama(), methods, rows), "prefill": "stored"}
    model = recovered(caprese.apply(tiny_llama(), methods, **how))
    caprese.save(model, tmp_path / "out")
    caprese.push(tmp_path / "out", repo, private=True)
    again = caprese.load(tiny_llama(), repo, keep_dense=False, fused=True)
    assert phases_of(again).prefill == "stored" and answer(again) == answer(model)


def test_recover_pushes_when_it_is_done(tiny_dir, repo, tmp_path):
    sizes = ["--samples", "8", "--max-new-tokens", "6", "--epochs", "0", "--rank", "2", "--prompts"]
    args = ["recover", "--model", str(tiny_dir), *sizes, "gym:simple_equations", "--output", str(tmp_path / "out")]
    done = runner.invoke(app, [*args, "--push-to-hub", repo, "--private", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["hub"]["repo"] == repo and "caprese_config.json" in held(repo)
    assert HfApi().repo_info(repo).private


# what goes wrong


@local
def test_a_public_repository_is_not_taken_for_a_private_one(finished, hub, repo):
    _, out = finished
    caprese.push(out, repo)
    with pytest.raises(caprese.CapreseError, match="exists and is public"):
        caprese.push(out, repo, private=True)
    with pytest.raises(caprese.CapreseError, match="exists and is public"):
        client.prepare(repo, True)


@local
@pytest.mark.parametrize(
    ("token", "says"), [("", "no valid token"), ("hf_nobody", "no valid token"), (READ, "may not write")]
)
def test_without_the_right_to_write(finished, hub, monkeypatch, token, says):
    _, out = finished
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(caprese.CapreseError, match=rf"{says}.*hf auth login") as caught:
        caprese.push(out, "alice/x")
    assert "\n" not in str(caught.value) and not (token and token in str(caught.value)) and not hub.repos


@local
@pytest.mark.parametrize(
    ("token", "repo", "says"),
    [("", "alice/x", "no valid token"), (READ, "alice/x", "but not write"), (WRITE, "bob/x", "may not write to bob/x")],
)
def test_recover_asks_for_the_right_to_write_before_it_works(tiny_dir, hub, monkeypatch, tmp_path, token, repo, says):
    monkeypatch.setenv("HF_TOKEN", token)
    args = ["recover", "--model", str(tiny_dir), "--output", str(tmp_path / "out"), "--push-to-hub", repo]
    done = runner.invoke(app, args)
    assert done.exit_code == 1 and says in done.output and not (tmp_path / "out").exists() and not hub.repos


@local
def test_somebody_elses_namespace(finished, hub):
    _, out = finished
    with pytest.raises(caprese.CapreseError, match="may not write to bob/x"):
        caprese.push(out, "bob/x")


@local
def test_what_is_not_there_or_not_for_you(finished, hub, repo, monkeypatch):
    base, out = finished
    caprese.push(out, repo, private=True)
    hub.repos["alice/plain"] = type(hub.repos[repo])(private=False)
    hub.repos["alice/plain"].commit("x", {"config.json": b"{}"})
    hub.repos["alice/gated"] = type(hub.repos[repo])(private=False, gated=True, commits=hub.repos[repo].commits)
    with pytest.raises(caprese.CapreseError, match=r"holds no caprese_config\.json|is it a caprese adapter"):
        caprese.load(str(base), "alice/plain")
    with pytest.raises(caprese.CapreseError, match="no repository 'alice/none'"):
        caprese.load(str(base), "alice/none")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(caprese.CapreseError, match=r"no repository .* or it is private.*hf auth login"):
        caprese.info(repo + "@main")
    with pytest.raises(caprese.CapreseError, match="gated: accept its terms"):
        caprese.load(str(base), "alice/gated")


@local
@pytest.mark.parametrize("status", [409, 429, 500, 503])
def test_a_busy_hub_is_asked_again(finished, hub, repo, status):
    _, out = finished
    hub.fail("POST", "/commit/", status, times=2)
    assert caprese.push(out, repo)["commit"] == hub.repos[repo].commits[-1].oid
    assert len(hub.repos[repo].commits) == 2


@local
@pytest.mark.parametrize(
    ("status", "says"),
    [(409, "changed while"), (429, "slow down"), (503, r"has trouble \(503\)"), (403, "may not write")],
)
def test_a_hub_that_stays_so_leaves_the_repository_as_it_was(finished, hub, repo, status, says):
    _, out = finished
    first = caprese.push(out, repo)["commit"]
    before = dict(hub.repos[repo].commits[-1].files)
    hub.repos[repo].commits[-1].files.pop("recipe.yaml")
    hub.fail("POST", "/commit/", status, times=9)
    with pytest.raises(caprese.CapreseError, match=says):
        caprese.push(out, repo)
    hub.faults.clear()
    assert hub.repos[repo].commits[-1].oid == first
    caprese.push(out, repo)
    assert hub.repos[repo].commits[-1].files == before


@local
@pytest.mark.parametrize(
    ("status", "says"), [(503, r"has trouble \(503\)"), (403, "may not write"), (429, "slow down")]
)
def test_large_files_are_refused_in_words_too(finished, hub, repo, status, says):
    _, out = finished
    hub.fail("PUT", "/lfs/", status, times=99)
    with pytest.raises(caprese.CapreseError, match=says):
        caprese.push(out, repo)
    hub.faults.clear()
    caprese.push(out, repo)
    assert "adapter_model.safetensors" in held(repo)


@local
def test_a_connection_cut_in_the_middle_of_an_upload(finished, hub, repo):
    _, out = finished
    hub.fail("PUT", "/lfs/", after=100)
    caprese.push(out, repo)  # sent again
    assert any(line.endswith("cut") for line in hub.log)
    assert answer(caprese.load(tiny_llama(), repo)) == answer(caprese.load(tiny_llama(), out))


@local
def test_a_rerun_sends_only_what_is_missing(finished, hub, repo):
    _, out = finished
    hub.fail("POST", "/commit/", after=10, times=9)
    with pytest.raises(caprese.CapreseError, match="cannot reach the hub.*whatever was sent is kept"):
        caprese.push(out, repo)
    hub.faults.clear()
    sent = [line for line in hub.log if line.startswith("PUT /lfs/")]
    assert sent and len(sent) == len(set(sent)) and len(hub.repos[repo].commits) == 1
    hub.log.clear()
    caprese.push(out, repo)
    assert not any(line.startswith("PUT") for line in hub.log) and len(hub.repos[repo].commits) == 2


@local
def test_a_download_cut_in_the_middle_or_a_hub_that_is_down(finished, hub, repo):
    _, out = finished
    caprese.push(out, repo)
    hub.fail("GET", "/lfs/", after=0)
    expected = answer(caprese.load(tiny_llama(), out))
    assert answer(caprese.load(tiny_llama(), repo)) == expected
    hub.fail("GET", "/api/models", 500, times=50)
    hub.fail("HEAD", "/resolve/", 500, times=50)
    assert answer(caprese.load(tiny_llama(), repo)) == expected  # from the cache
    with pytest.raises(caprese.CapreseError, match=r"cannot reach the hub|has trouble"):
        caprese.load(tiny_llama(), "alice/never-seen")


def test_nothing_says_where_it_was_made(repo, tmp_path, monkeypatch):
    """Neither an absolute nor a relative path: of prompts, base or output."""
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("secret-place/base")
    byte_tokenizer().save_pretrained("secret-place/base")
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(1000)]
    Path("secret-place/prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for prompts_file in (str(tmp_path / "secret-place/prompts.jsonl"), "secret-place/prompts.jsonl"):
        args = ["recover", "--model", "secret-place/base", "--output", "secret-place/out", "--prompts", prompts_file]
        args += ["--samples", "8", "--max-new-tokens", "6", "--epochs", "0", "--rank", "2", "--column", "prompt"]
        assert runner.invoke(app, [*args, "--overwrite"], catch_exceptions=False).exit_code == 0
        caprese.push("secret-place/out", repo, private=True)
        for name in held(repo):
            data = Path(HfApi().hf_hub_download(repo, name, local_dir=tmp_path / "got")).read_bytes()
            assert b"secret-place" not in data and str(tmp_path).encode() not in data, name


@local
def test_a_licence_is_the_bases_own_and_nobody_elses(hub, tmp_path, monkeypatch):
    api = HfApi()
    api.create_repo("alice/base")
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    api.upload_folder(repo_id="alice/base", folder_path=tmp_path / "base")
    model, _ = caprese.load_base("alice/base")
    caprese.save(recovered(caprese.apply(model, caprese.Griffin())), tmp_path / "adapter")
    assert caprese.push(tmp_path / "adapter", "alice/x", dry_run=True)["license"] == "mit"
    caprese.save(recovered(caprese.apply(tiny_llama(), caprese.Griffin())), tmp_path / "local")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "LlamaForCausalLM").mkdir()
    (tmp_path / "LlamaForCausalLM" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert caprese.push(tmp_path / "local", "alice/x", dry_run=True)["license"] is None


@local
def test_what_is_damaged_is_not_pushed(finished, hub, tmp_path):
    _, out = finished
    copy = shutil.copytree(out, tmp_path / "out")
    weights = copy / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(caprese.CapreseError, match="was altered"):
        caprese.push(copy, "alice/x")
    weights.write_bytes(data[:-7])
    with pytest.raises(caprese.CapreseError, match="truncated"):
        caprese.push(copy, "alice/x")
    copy = shutil.copytree(out, tmp_path / "first")
    for name in ("adapter_config.json", "caprese_config.json"):  # what decides no result is damage too
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before + b" ")
        with pytest.raises(caprese.CapreseError, match=f"{name} is damaged or missing"):
            caprese.push(copy, "alice/x")
        (copy / name).write_bytes(before)
    copy = shutil.copytree(out, tmp_path / "second")
    report = read_sealed(copy / "report.json", "")
    write_sealed(copy / "report.json", {**report, "adapter_digest": "0" * 32})
    with pytest.raises(caprese.CapreseError, match="is of another adapter"):
        caprese.push(copy, "alice/x")
    for content in ("{", "[]", "{}"):
        (copy / "adapter_config.json").write_text(content)
        with pytest.raises(caprese.CapreseError, match=r"adapter_config\.json of .* is damaged"):
            caprese.info(copy)
    (copy / "adapter_config.json").unlink()
    with pytest.raises(caprese.CapreseError, match=r"holds no adapter_config\.json"):
        caprese.info(copy)
    with pytest.raises(caprese.CapreseError, match="no directory"):
        caprese.push(tmp_path / "nowhere", "alice/x")
    with pytest.raises(caprese.CapreseError, match="holds no caprese_config"):
        caprese.push(tmp_path, "alice/x")
    with pytest.raises(caprese.CapreseError, match="no hub id"):
        caprese.push(out, "x")
    assert not hub.repos


@local
def test_a_tampered_download_is_refused(finished, hub, repo):
    _, out = finished
    caprese.push(out, repo)
    files = hub.repos[repo].commits[-1].files
    data = bytearray(files["adapter_model.safetensors"])
    data[-2] ^= 1
    hub.repos[repo].commit("oops", {**files, "adapter_model.safetensors": bytes(data)})
    with pytest.raises(caprese.CapreseError, match="was altered"):
        caprese.load(tiny_llama(), repo)


@local
def test_the_token_is_in_no_output_and_no_file(finished, hub, repo, tmp_path):
    _, out = finished
    done = runner.invoke(app, ["push", str(out), repo])
    assert done.exit_code == 0 and WRITE not in done.output
    hub.fail("POST", "/commit/", 500, times=9)
    done = runner.invoke(app, ["push", str(out), f"{repo}-again"])
    assert done.exit_code == 1 and WRITE not in done.output and "trouble" in done.output
    assert not any(WRITE.encode() in data for data in hub.repos[repo].commits[-1].files.values())
    assert not any(WRITE in p.read_text(errors="ignore") for p in Path(os.environ["HF_HOME"]).rglob("*") if p.is_file())


@local
def test_a_base_of_another_revision_is_refused_and_the_right_one_is_found(hub, finished, tmp_path):
    base, _ = finished
    api = HfApi()
    api.create_repo("alice/base")
    first = api.upload_folder(repo_id="alice/base", folder_path=base).oid
    model, _ = caprese.load_base("alice/base")
    adapted = recovered(caprese.apply(model, caprese.Griffin()), scale=0.3)
    caprese.save(adapted, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "caprese_config.json").read_text())["base"]["revision"] == first
    tuned = tiny_llama()
    tuned.model.layers[2].self_attn.v_proj.weight.data.mul_(1.02)
    tuned.save_pretrained(tmp_path / "tuned")
    second = api.upload_folder(repo_id="alice/base", folder_path=tmp_path / "tuned").oid
    newest, _ = caprese.load_base("alice/base")
    with pytest.raises(caprese.CapreseError, match=rf"alice/base@{first}.*alice/base@{second}.*\(attention\)"):
        caprese.load(newest, tmp_path / "adapter")
    assert answer(caprese.load("alice/base", tmp_path / "adapter")) == answer(adapted)
    assert torch.equal(newest(prompts(5)[0]).logits, tuned(prompts(5)[0]).logits)
    assert caprese.info(tmp_path / "adapter", model="alice/base")["fits"] is True
    args = ["generate", "-m", "alice/base", "-a", str(tmp_path / "adapter"), "-p", "ab", "--max-new-tokens", "4"]
    assert runner.invoke(app, args).exit_code == 0
