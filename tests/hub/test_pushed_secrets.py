"""A push finds secrets of every kind in text files of every name and encoding, and passes over placeholders."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from time import process_time

import pytest

from paft_merge import hub
from paft_merge.errors import HubError
from paft_merge.hub import secret_files
from paft_merge.hub.secret_files import Place, secrets_in_file
from paft_merge.recipe.secrets import find_secrets

RANDOM = random.Random(0)


def letters(count: int, among: str = string.ascii_letters + string.digits) -> str:
    return "".join(RANDOM.choices(among, k=count))


TOKEN = "hf_" + letters(34)
PEM = "-----BEGIN {}PRIVATE KEY-----\n" + letters(64) + "\n-----END PRIVATE KEY-----\n"

SECRETS = {
    "a Hugging Face token": [
        TOKEN, "api_org_" + letters(34), "hf_oauth_" + letters(40), f"https://me:{TOKEN}@huggingface.co/me/m",
    ],
    "a GitHub token": [f"{p}_{letters(36)}" for p in ("ghp", "gho", "ghs", "ghu", "ghr")]
    + [f"github_pat_{letters(22)}_{letters(59)}"],
    "a GitLab token": ["glpat-" + letters(20)],
    "an Anthropic key": [f"sk-ant-api03-{letters(40)}-{letters(40)}_{letters(10)}AA"],
    "an OpenAI key": ["sk-" + letters(48), f"sk-proj-{letters(60)}-{letters(40)}", "sk-or-v1-" + letters(64, "0123456789abcdef")],
    "an AWS key": ["AKIA" + letters(16, "ABCDEFGHIJKLMNOP234567"), "ASIA" + letters(16, "ABCDEFGHIJKLMNOP234567")],
    "an AWS secret key": ["aws_secret_access_key = " + letters(40), "AWS_SECRET_ACCESS_KEY='" + letters(40) + "'"],
    "a Slack token": [f"xox{c}-{letters(12, '0123456789')}-{letters(24)}" for c in "abprs"],
    "a Google API key": ["AIza" + letters(35)],
    "a W&B key": ["export WANDB_API_KEY=" + letters(40, "0123456789abcdef")],
    "a bearer token": [
        "Authorization: Bearer " + letters(20) + "1", '{"Authorization": "Bearer ' + letters(30) + '"}',
        "headers['authorization'] = 'bearer " + letters(30) + "'", 'curl -H "Authorization: Bearer eyJhbGciOi.' + letters(40) + '"',
    ],
    "a password in a URL": ["https://me:" + letters(12) + "@host.org/x", "postgres://u:" + letters(20) + "@db:5432/x"],
    "a private key": [PEM.format(kind) for kind in ("", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED ")]
    + ["-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES\n\n" + letters(64), PEM.format("").replace("\n", "\r\n")],
}  # fmt: skip
"""By kind: texts that hold one."""

PLACEHOLDERS = (
    *("hf_" + "x" * 34, "hf_XXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX", "hf_...", "hf_<your token>", "hf_abc" + "*" * 31, "hf_" + "a" * 34),
    *("$HF_TOKEN", "<token>", "hf_your_token_here", "hf_hub_download", "hf_AbC" + "X" * 31, "api_org_" + "x" * 34),
    *("sk-...", "sk-" + "x" * 48, "sk-ant-your-api-key-here-please-now", "sk-proj-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "sk-learn"),
    *("ghp_" + "x" * 36, "github_pat_" + "0" * 60, "AKIAIOSFODNN7EXAMPLE", "xoxb-xxxxxxxxxxxx-xxxxxxxxxxxx", "AIza..."),
    *("Authorization: Bearer $HF_TOKEN", "Authorization: Bearer <token>", "Authorization: Bearer YOUR_API_TOKEN_123456789"),
    *("Authorization: Bearer {token}", "the Authorization: Bearer authentication of the Hub", "WANDB_API_KEY=$KEY"),
    *("-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----\n<key>"),
    *("https://user:password@host", "https://me:${TOKEN_OF_ME}@host", "https://me:<password>@host", "https://x.org:443/@name"),
    *("https://user:xxxxxxxxxx@host", "https://a.org/x:y@z", "http://a:b@c, mailto://me@host.org"),
    *("-----BEGIN PUBLIC KEY-----\n" + letters(64), "a sk-risk of task-" + letters(40), "https://huggingface.co/me/hf_" + letters(20)),
)  # fmt: skip

NAMES = (
    *("run.log", "train.sh", "params.toml", "a.ini", "b.cfg", "rows.jsonl", "job.out", "job.err", "Makefile", "README.md"),
    *("config.json", "sub/deep/x.yaml", "notes.rst", "weird.abc", "model.safetensors.txt", "train.py", "t.csv", "a.html"),
)  # fmt: skip


def problems_of(folder: Path) -> list[str]:
    try:
        hub.prepare_upload(folder)
    except HubError as error:
        return [str(p).removeprefix(f"{folder}/") for p in error.problems if p.code == "PUSH_SECRET"]
    return []


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in SECRETS.items() for text in texts])
@pytest.mark.parametrize("around", ["{}", "before\n key={}\n", '"{}"', "line\\n{}\\n"])
def test_every_kind_is_found(tmp_path: Path, kind: str, text: str, around: str) -> None:
    (tmp_path / "report.txt").write_text(around.replace("{}", text))
    assert list(secrets_in_file(tmp_path / "report.txt")) == [Place(kind, 2 if around.startswith("before") else 1)]
    (found,) = problems_of(tmp_path)
    assert f"holds what looks like {kind}; take it out" in found
    assert text[-12:] not in found


@pytest.mark.parametrize("kind", SECRETS)
def test_every_kind_is_found_in_a_notebook(tmp_path: Path, kind: str) -> None:
    outputs = [{"output_type": "stream", "text": [f"{line}\n" for line in text.split("\n")]} for text in SECRETS[kind]]
    cells = [{"cell_type": "code", "source": ["!env"], "outputs": [one]} for one in outputs]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}, indent=1))
    assert [place.kind for place in secrets_in_file(tmp_path / "a.ipynb")] == [kind] * len(outputs)
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [{"source": "x\n" + "\n".join(SECRETS[kind])}]}))
    assert {place.kind for place in secrets_in_file(tmp_path / "a.ipynb")} == {kind}


@pytest.mark.parametrize("text", PLACEHOLDERS)
def test_placeholders_do_not_block(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(f"# How to\n\nRun it with {text} first.\n")
    assert problems_of(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_files_of_every_name_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f"first\nHF_TOKEN={TOKEN}\n")
    assert problems_of(tmp_path) == [
        f"{name}:2: holds what looks like a Hugging Face token; take it out, and revoke it if it was ever shown"
    ]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"]
)
def test_files_of_every_encoding_are_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "run.log").write_bytes(f"Schlüssel für alle\nsecond line\nHF_TOKEN={TOKEN}\n".encode(encoding))
    assert list(secrets_in_file(tmp_path / "run.log")) == [Place("a Hugging Face token", 3)]


def test_all_secrets_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(f"{TOKEN}\n{TOKEN}\nghp_{letters(36)}\n")
    (tmp_path / "b.sh").write_text(f"\n\n{TOKEN}")
    assert [text.split(" holds ")[0] for text in problems_of(tmp_path)] == ["a.log:1:", "a.log:3:", "b.sh:3:"]
    assert "a Hugging Face token (and 1 more)" in problems_of(tmp_path)[0]


def test_binary_files_are_not_taken_for_text_except_pickled_arguments(tmp_path: Path) -> None:
    body = b"\x80\x02\x00\x00\x01" * 50 + TOKEN.encode() + b"\x00q\x01"
    for name in ("picture.png", "weights.bin", "training_args.bin"):
        (tmp_path / name).write_bytes(body)
    assert problems_of(tmp_path) == [
        "training_args.bin: holds what looks like a Hugging Face token; take it out, and revoke it if it was ever shown"
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_secrets_across_the_pieces_of_a_large_file_are_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr(secret_files, "_PIECE", 2000)
    lines = ["x" * RANDOM.randrange(90) for _ in range(2000)]
    at = sorted(RANDOM.sample(range(2000), 100))
    for line in at:
        lines[line] += " " + RANDOM.choice([TOKEN, PEM.format("").replace("\n", "\\n"), "AIza" + letters(35)])
    (tmp_path / "big.jsonl").write_text("\n".join(lines), encoding=encoding)
    assert [place.line for place in secrets_in_file(tmp_path / "big.jsonl")] == [line + 1 for line in at]


def test_the_token_of_this_login_is_found_in_any_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_writer")
    (tmp_path / "a.log").write_text("x\nhf_writer\n", encoding="utf-16")
    (found,) = problems_of(tmp_path)
    assert found.startswith("a.log:2: holds what looks like this login's Hugging Face token")
    assert "hf_writer" not in found


def test_the_old_name_of_prepare_upload_warns(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("fine")
    with pytest.warns(FutureWarning, match=r"'hub.pack' is deprecated .*; use 'hub.prepare_upload'"):
        assert hub.pack(tmp_path).kind == "report"


def test_a_long_text_is_searched_soon_and_whole() -> None:
    every = [(kind, one) for kind, secrets in SECRETS.items() for one in secrets]
    text = "the quick brown fox, " * 400_000
    began = process_time()
    found = list(find_secrets(text + "".join(f"\n{' word' * 300}\n{one}" for _, one in every)))
    assert process_time() - began < 1  # all patterns at every character: 2 s
    assert sorted(one.kind for one in found) == sorted(kind for kind, _ in every)
