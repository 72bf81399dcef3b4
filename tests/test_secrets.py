"""What is cut out of texts before they are kept, and what must stay."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from conftest import TINY, composed

from runner.secrets import HIDDEN, find_secrets, names_secret, put_credentials, redact, redact_tree, take_credentials

HF, OPENAI, GITHUB, AWS = "hf_" + "aB3" * 10, "sk-" + "proj-" + "x9" * 12, "ghp_" + "Z8" * 18, "AKIA" + "ABCD1234" * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"login with {HF} now", f"login with {HIDDEN} now"),
        (f"key {OPENAI}, {GITHUB}; {AWS}", f"key {HIDDEN}, {HIDDEN}; {HIDDEN}"),
        ("Authorization: Bearer abcdef0123456789abcdef", f"Authorization: Bearer {HIDDEN}"),
        ("{'authorization': 'Basic dXNlcjpwYXNzd29yZA=='}", f"{{'authorization': 'Basic {HIDDEN}'}}"),
        ("http://me:pa%40ss@host:5000/x", f"http://{HIDDEN}@host:5000/x"),
        ("postgresql://u:p@ss@db/name and more", f"postgresql://{HIDDEN}@db/name and more"),
        ("password=hunter2 user=me", f"password={HIDDEN} user=me"),
        ("tracking.api_key='abc def'", f"tracking.api_key={HIDDEN}"),
        ('{"hf_token": "abc", "r": 8}', f'{{"hf_token": {HIDDEN}, "r": 8}}'),
        ("my-secret: x1y2", f"my-secret: {HIDDEN}"),
    ],
)
def test_secrets_are_cut_out(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected, "redacting twice changes nothing"


@pytest.mark.parametrize(
    "text",
    [
        "train.max_tokens=100000 tokens_per_second=812.5 train/tokens: 5",
        "pad_token='<pad>' eos_token=</s> tokenizer=fast",
        "git@github.com:me/repo.git ssh://git@host/repo https://host/path",
        "token=null use_auth_token=true api_key=",
        "hydra.run.dir=outputs/2024-01-01/12-00-00 lora.r=8 data.path=/data/secrets/rows.jsonl",
        "api_key=${oc.env:MY_KEY}",
        "a task-oriented risk-averse disk-bound word",
        "data.path=sk-learn-experiments-2024 name=sk-learn-internationalization",
        "a basic internationalization of bearer responsibilities/and/duties",
    ],
)
def test_what_only_looks_secret_stays(text: str) -> None:
    assert redact(text) == text


S = "hunt-3R2x"
"""A secret that is known by its place alone."""
BASE64 = "dXNlcjpodW50LTNSMng="
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlMTIz"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7\nq2x9\n-----END RSA PRIVATE KEY-----"
SHAPES = {
    f"ValueError: token={S}": S,
    f"error: password={S}": S,
    f"OSError: [Errno 2] error: cannot log in: password: {S}": S,
    f"GET /x?access_token={S}&page=2": S,
    f"tracking.uri=http://host/?api_key={S}": S,
    f"a:b=c:d=token={S}": S,
    f"DB_PASS={S}": S,
    f"PGPASSWORD={S} psql": S,
    f"MYSQL_PWD={S}": S,
    f"SSHPASS={S}": S,
    f"export REDIS_PASSWORD='{S} two words'": "two words",
    f"AWS_SECRET_ACCESS_KEY={S}/abc+def": S,
    f"aws_secret_access_key = {S}": S,
    f"AWS_SESSION_TOKEN={S}": S,
    f"'{AWS}'": AWS,
    f"see {HF}.": HF,
    f"OPENAI_API_KEY: {OPENAI}": OPENAI,
    f"ANTHROPIC_API_KEY={'sk-ant-api03-' + 'aB3' * 8}": "aB3",
    f"url=https://x:{GITHUB}@github.com/me": GITHUB,
    f"https://{'a1' * 20}@sentry.io/1": "a1a1",
    f"cookie {JWT} end": JWT,
    f"Authorization: Bearer {S}": S,
    f"curl -H 'Authorization: Basic {BASE64}' http://h": BASE64,
    f"authorization: token {S}": S,
    f"X-Api-Key: {S}": S,
    f"Proxy-Authorization: Basic {BASE64}": BASE64,
    f"postgresql://me:{S}@db:5432/x": S,
    f"redis://:{S}@cache": S,
    f"mysql://me:{S}/w@db/x": S,
    f"mongodb+srv://u:{S}@c.example.net/db": S,
    f'{{"api_key": "{S}", "r": 8}}': S,
    f"{{'apiKey': '{S}'}}": S,
    f'{{"accessToken":"{S}"}}': S,
    f'"{{\\"client_secret\\": \\"{S}\\"}}"': S,
    f"password: {S} and more\nr: 8": "and more",
    f"  - secret: {S}": S,
    f"password: |\n  {S}\nr: 8": S,
    f"hf_token='{S}'": S,
    f"'db.password=two {S}'": S,
    f'password="a\\"{S}"': S,
    f'password="{S} is cut': S,
    f"login(password={S}, r=8)": S,
    f"password=a,{S}": S,
    f"password=a&{S}": S,
    f"train.py --token {S} --r 8": S,
    f"['--api-key', '{S}']": S,
    f"--password={S}": S,
    f"machine h login me password {S}": S,
    f"curl -u me:{S} http://h": S,
    f"AccountName=x;AccountKey={S}==;Suffix=y": S,
    f"Server=h;Uid=me;Pwd={S};": S,
    f"https://x.blob.core.windows.net/c?sv=1&sig={S * 2}": S,
    f"//registry.npmjs.org/:_authToken={S}": S,
    f"https://hooks.slack.com/services/T0/B0/{S.replace('-', '')}": "3R2x",
    f"<password>{S}</password>": S,
    f":password => '{S}'": S,
    f"SECRET_KEY_BASE={S}": S,
    f"WANDB_API_KEY={'0a' * 20}": "0a0a",
    f"AIza{'x9' * 17}x": "x9x9",
    PEM: "MIIEow",
    f'"private_key": "{PEM}"'.replace("\n", "\\n"): "MIIEow",
    f"key was {PEM.partition('q2x9')[0]}": "MIIEow",
}


@pytest.mark.parametrize(("text", "secret"), SHAPES.items())
def test_each_shape_of_a_secret_is_redacted(text: str, secret: str) -> None:
    assert secret in text
    assert secret not in redact(text)
    assert redact(redact(text)) == redact(text)
    assert secret not in redact(f"ValueError: bad value {text!r}"), "as Python quotes it"


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=1000", "tokenizer=fast", "train.max_tokens=5", "pad_token=<pad>", "task=sft", "eos_token: </s>",
        "tokens: 812", "train/tokens: 5", "seconds_per_token=0.12", "token_type_ids=[0, 1]", "image_token_id=32000",
        "num_key_value_heads=8", "lora.target_modules=k_proj,v_proj", "key=value", "sort_key: name", "primary_key=id",
        "public_key=ssh-rsa", "keyboard: qwerty", "secretary: Bob", "compass=north", "bypass=1", "forward_pass: 3.2 s",
        "password_file=/run/pw", "GOOGLE_APPLICATION_CREDENTIALS=/home/me/key.json",
        "PWD=/home/me/work", "runner.signature=0123456789abcdef", "git sha: " + "0a" * 20,
        "http://host:5000/path@x", "git@github.com:me/x.git", "def f(token: str | None = None):", "token=$HF_TOKEN",
        "docker run -u 1000:1000 image", "bearer of good news", "?page=2&key=short", "decoder_start_token: 0",
        "add_eos_token=true", "next_token: the", "data.path=/data/tokens/part-1", "api_keys: 2 are used",
        "a token is 4 characters", "step 3/6  loss 2.3456  tok/s 812", "optim.learning_rate=1e-4",
        'token = os.environ["HF_TOKEN"]',
    ],
)  # fmt: skip
def test_no_ordinary_text_is_redacted(text: str) -> None:
    assert redact(text) == text


def test_the_value_of_an_option_in_a_list_is_redacted() -> None:
    assert redact_tree(["x", "--token", S, "--r", "8"]) == ["x", "--token", HIDDEN, "--r", "8"]


@pytest.mark.parametrize(
    "secret",
    ["correct horse battery", "correcthorsebatterystaple", "aB3dE5gH7jK9", "550e8400-e29b-41d4-a716-446655440000",
     "wJalrXUtnFEMI/K7MDENG/bPxRfiCY", "hunter2hunter2"],
)  # fmt: skip
def test_values_of_secret_environment_variables_are_hidden_everywhere(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secret)
    assert redact(f"cannot log in with '{secret}' there") == f"cannot log in with '{HIDDEN}' there"


@pytest.mark.parametrize("value", ["abc", "postgres", "postgres_dump", "Llama-chat-instruct", "/data/runs/run-2024"])
def test_words_and_paths_of_the_environment_maim_no_text(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", value)
    text = f"data.path={value}_more model.path=x{value}"
    assert redact(text) == text
    assert redact(f"password={value}") == f"password={HIDDEN}", "under a secret name it stays hidden"


def test_trees_are_redacted_by_key_and_by_content() -> None:
    tree = {
        "hf_token": "anything",
        "password": 12345,
        "secret": {"path": "x", "api_key": "y"},
        "use_token": None,
        "token": True,
        "pad_token": "<pad>",
        "max_tokens": 100,
        "uri": "http://a:b@host",
        "list": [f"x {HF}", 3],
        "api_keys": {"access_key": ["k1", "k2"]},
        "nan": float("nan"),
    }
    nan = tree["nan"]
    assert find_secrets(tree) == [
        "hf_token", "password", "secret.api_key", "uri", "list.0", "api_keys.access_key.0", "api_keys.access_key.1"
    ]  # fmt: skip
    assert find_secrets(redact_tree(tree)) == []
    assert redact_tree(tree) == {
        "hf_token": HIDDEN,
        "password": HIDDEN,
        "secret": {"path": "x", "api_key": HIDDEN},
        "use_token": None,
        "token": True,
        "pad_token": "<pad>",
        "max_tokens": 100,
        "uri": f"http://{HIDDEN}@host",
        "list": [f"x {HIDDEN}", 3],
        "api_keys": {"access_key": [HIDDEN, HIDDEN]},
        "nan": nan,
    }


def test_names() -> None:
    assert all(map(names_secret, ["HF_TOKEN", "tracking.password", "AWS_SECRET_ACCESS_KEY", "api-key", "passwd"]))
    assert not any(map(names_secret, ["tokens", "max_tokens", "eos_token", "tokenizer", "key", "lora.target_modules"]))


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("http://host:5000", ("http://host:5000", None, None)),
        ("http://me:pa%40ss%2F@host:5000/a@b", ("http://host:5000/a@b", "me", "pa@ss/")),
        ("https://token@host", ("https://host", "token", None)),
        ("postgresql://u:p@db/name", ("postgresql://db/name", "u", "p")),
        ("sqlite:////tmp/a@b.db", ("sqlite:////tmp/a@b.db", None, None)),
        ("not a uri", ("not a uri", None, None)),
    ],
)
def test_credentials_are_taken_out_and_put_back(uri: str, parts: tuple[str, str | None, str | None]) -> None:
    assert take_credentials(uri) == parts
    assert put_credentials(*parts) == uri


def test_no_credentials_reach_a_file() -> None:
    """A database below outputs is opened by people whose environment names their server's user, too."""
    assert put_credentials("sqlite:////tmp/mlflow.db", "me", "pass") == "sqlite:////tmp/mlflow.db"


def test_no_file_of_a_run_contains_a_secret(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from runner.tracking import manifest
    from runner.train import run_facts, worker

    def fail(*_: object) -> None:
        for text in SHAPES:
            logging.getLogger("runner").warning(text)
            warnings.warn(text, stacklevel=1)
        raise ValueError(f"error: token={S}")

    monkeypatch.setattr(run_facts, "numbers", fail)
    options = [word for word in TINY if word != "tracking=offline"]
    cfg = composed(*options, "tracking.system_metrics=false", f"outputs_dir={tmp_path}", "train.max_steps=1")
    rundir = manifest.create(cfg, tmp_path / "run", ["runner", *SHAPES], list(SHAPES))
    assert worker.work(rundir) == 1
    out, err = capfd.readouterr()
    texts = {
        str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "dirty.diff"
    }
    texts |= {"stdout": out.encode(), "stderr": err.encode()}
    assert rundir.read_state().reason == f"ValueError: error: token={HIDDEN}"
    for secret in (S, BASE64, JWT, HF, OPENAI, GITHUB, AWS, "MIIEow", "two words"):
        assert [name for name, text in texts.items() if secret.encode() in text] == [], secret
