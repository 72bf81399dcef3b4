"""What is cut out of texts before they are kept, and what must stay."""

from __future__ import annotations

import pytest

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


def test_a_file_is_told_no_credentials() -> None:
    """A database below outputs is opened by people whose environment names their server's user, too."""
    assert put_credentials("sqlite:////tmp/mlflow.db", "me", "pass") == "sqlite:////tmp/mlflow.db"
