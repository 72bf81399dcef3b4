"""A trained model as MLflow serves it: texts in, answers out. MLflow copies this file beside the model.

So it knows nothing of this package: where it runs there are mlflow, torch and transformers, and the model's folder.
"""

from __future__ import annotations

from typing import Any

import mlflow


class Answers(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """MLflow takes a model of one's own as a subclass of PythonModel; what it is given is in ``context``."""

    _skip_type_hint_validation = True
    """Without it MLflow asks for annotations at every load; it would take its signature from them (see ``predict``)."""

    def load_context(self, context: Any) -> None:
        """Load model and tokenizer from the artifact ``model``; in float32 on a CPU, as it was stored on a GPU."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder, on_gpu = context.artifacts["model"], torch.cuda.is_available()
        self.is_chat = bool(context.model_config["is_chat"])
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        self.model = (model if on_gpu else model.float()).to("cuda" if on_gpu else "cpu").eval()

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """One answer for each text: of a DataFrame's first column, of a list, or a single one.

        Without annotations: MLflow would take its signature from them, and know no parameters.
        """
        if hasattr(model_input, "iloc"):
            model_input = model_input.iloc[:, 0].tolist() if model_input.ndim == 2 else model_input.tolist()
        texts = [model_input] if isinstance(model_input, str) else list(model_input)
        return [self._answer(str(text), **(params or {})) for text in texts]

    def _answer(self, text: str, max_new_tokens: int = 256, temperature: float = 0.0, system: str = "") -> str:
        import torch

        drawn = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
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
                **drawn,
                **greedy,
            )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    def _prompt(self, text: str, system: str) -> str:
        if self.is_chat:
            first = [{"role": "system", "content": system}] if system else []
            messages = [*first, {"role": "user", "content": text}]
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        start = self.tokenizer.bos_token_id
        begins = start is not None and self.tokenizer("a")["input_ids"][:1] == [start]
        return f"{self.tokenizer.bos_token}{text}" if begins else text


mlflow.models.set_model(Answers())
