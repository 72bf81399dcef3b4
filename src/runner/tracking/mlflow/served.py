"""A trained model as an MLflow pyfunc model: texts in, answers out, or scores.

MLflow, or the runner, copies this file into the model's folder, so it must not import this package: only mlflow, torch
and transformers are installed where the model is served, and PEFT for an adapter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow


class Answers(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Custom models of MLflow are subclasses of PythonModel; ``context`` has their artifacts and settings."""

    _skip_type_hint_validation = True
    """Stops a warning of MLflow at every load about missing type hints (see ``predict``)."""

    def load_context(self, context: Any) -> None:
        """Load model and tokenizer from the artifact ``model``: float32 on a CPU, the stored dtype on a GPU.

        An adapter is put on its base model, which ``adapter_config.json`` names.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        folder, on_gpu = context.artifacts["model"], torch.cuda.is_available()
        self.is_chat, self.problem = bool(context.model_config["is_chat"]), context.model_config.get("problem")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        auto = AutoModelForSequenceClassification if self.problem else AutoModelForCausalLM
        if Path(folder, "adapter_config.json").is_file():
            self.model = self._adapted(auto, Path(folder), context.model_config.get("quantization"), on_gpu)
            return
        model = auto.from_pretrained(folder)
        self.model = (model if on_gpu else model.float()).to("cuda" if on_gpu else "cpu").eval()

    def _adapted(self, auto: Any, folder: Path, quantization: dict[str, Any] | None, on_gpu: bool) -> Any:
        """The base model with the adapter in ``folder``; ``quantization``: how the base is stored, if not as it is."""
        from peft import PeftModel
        from transformers import AutoConfig, BitsAndBytesConfig

        about = json.loads(Path(folder, "adapter_config.json").read_text())
        base = str(about["base_model_name_or_path"])
        if Path(base).is_absolute() and not Path(base).is_dir():
            problem = f"the base model of this adapter is not here: {base}. Put it there, or register the run"
            raise FileNotFoundError(f"{problem} (python -m runner register RUN NAME), which writes the whole model")
        options: dict[str, Any] = {"revision": about["revision"]} if about.get("revision") else {}
        if Path(folder, "config.json").is_file():  # of another head or other positions than the base has
            options["config"] = AutoConfig.from_pretrained(folder)
        if quantization:
            options["quantization_config"] = BitsAndBytesConfig(**quantization)
            options["device_map"] = {"": "cuda" if on_gpu else "cpu"}
        model = auto.from_pretrained(base, **options)
        model = model if on_gpu or quantization else model.float()
        if len(self.tokenizer) > model.config.get_text_config().vocab_size:  # new tokens
            model.resize_token_embeddings(len(self.tokenizer))
        adapted = PeftModel.from_pretrained(model, folder)
        return (adapted if quantization else adapted.to("cuda" if on_gpu else "cpu")).eval()

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """One answer per text. ``model_input``: a DataFrame (its first column), a list of texts, or one text.

        With a score head a DataFrame with the scores (for classes: probabilities) of each text; a second column of
        ``model_input`` is the answer to the first.
        No type hints: MLflow would derive the signature from them, without ``params``.
        """
        if hasattr(model_input, "iloc"):
            model_input = model_input.to_numpy().tolist() if model_input.ndim == 2 else model_input.tolist()
        given = [model_input] if isinstance(model_input, str) else list(model_input)
        rows = [[str(text) for text in (row if isinstance(row, list) else [row])] for row in given]
        if not self.problem:
            return [self._answer(row[0], **(params or {})) for row in rows]
        import pandas  # type: ignore[import-untyped]

        return pandas.DataFrame([self._scores(row, **(params or {})) for row in rows])

    def _scores(self, texts: list[str], system: str = "") -> dict[str, float]:
        import torch

        text = self._rendered(texts, system, adds=False) if self.is_chat else texts[0]
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=not self.is_chat)
        with torch.no_grad():
            scores = self.model(input_ids=inputs["input_ids"].to(self.model.device)).logits[0].double()
        if self.problem == "single_label_classification":
            scores = scores.softmax(-1)
        elif self.problem == "multi_label_classification":
            scores = scores.sigmoid()
        return dict(zip(self.model.config.id2label.values(), scores.tolist(), strict=True))

    def _answer(self, text: str, max_new_tokens: int = 256, temperature: float = 0.0, system: str = "") -> str:
        import torch

        sampling = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
        greedy = {} if temperature else {"temperature": None, "top_p": None, "top_k": None}
        inputs = self.tokenizer(self._prompt(text, system), return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"].to(self.model.device)  # (1, T)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=int(max_new_tokens),
                do_sample=bool(temperature),
                pad_token_id=self.tokenizer.pad_token_id,
                **sampling,
                **greedy,
            )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    def _prompt(self, text: str, system: str) -> str:
        if self.is_chat:
            return self._rendered([text], system, adds=True)
        bos = self.tokenizer.bos_token_id
        adds_bos = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
        return f"{self.tokenizer.bos_token}{text}" if adds_bos else text

    def _rendered(self, texts: list[str], system: str, *, adds: bool) -> str:
        """The chat of a user and the assistant; ``adds``: with the beginning of the next answer."""
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        messages = [*([{"role": "system", "content": system}] if system else []), *turns]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=adds))


mlflow.models.set_model(Answers())
